"""PEFT's adapters: its numbers in training and out of its files, ours in its hands, merged, refused."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import TINY, losses_of, save_base, with_adapters

import neox_jax
from neox_jax.cli import main
from neox_jax.config import LORA_TARGETS
from neox_jax.convert.peft import read_peft, save_peft
from neox_jax.convert.source import convert, open_adapter
from neox_jax.errors import InputError
from neox_jax.model import init_model
from neox_jax.quantize import quantize_model
from neox_jax.train import Run, train

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
ALL = {"rank": 4, "alpha": 16, "targets": LORA_TARGETS}
KINDS = {"default": {}, "all": {"target_modules": list(LORA_TARGETS)}, "rslora": {"use_rslora": True, "r": 6}}


@pytest.fixture(scope="module")
def base(data, tmp_path_factory):
    return save_base(data, tmp_path_factory.mktemp("base") / "hf")


def torch_model(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


def make_peft(base, folder, **fields):
    """PEFT's own folder of random adapters over the base, and its model."""
    torch.manual_seed(0)
    options = {"r": 4, "lora_alpha": 16, "init_lora_weights": False, "task_type": "CAUSAL_LM", **fields}
    options.setdefault("target_modules", ["query_key_value"])
    model = peft.get_peft_model(torch_model(base), peft.LoraConfig(**options))
    with torch.no_grad():  # weights as large as trained ones
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.mul_(0.3)
    model.save_pretrained(folder)
    return model.eval()


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory):
    """Folders of PEFT's by kind, each with its model."""
    folder = tmp_path_factory.mktemp("peft")
    return {kind: (folder / kind, make_peft(base, folder / kind, **fields)) for kind, fields in KINDS.items()}


def some_tokens(shape=(2, 24)):
    return np.random.default_rng(1).integers(0, TINY.vocab_size, shape)


def logits_of(model, tokens):
    if not isinstance(model, torch.nn.Module):
        return np.asarray(model(jnp.asarray(tokens)))
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.numpy()


@pytest.mark.parametrize("kind", KINDS)
def test_pefts_adapters_here_give_its_logits(base, adapters, kind):
    folder, theirs = adapters[kind]
    tokens = some_tokens()
    ours = neox_jax.load_model(base, adapter=folder)
    wanted = logits_of(theirs, tokens)
    assert np.abs(wanted - logits_of(torch_model(base), tokens)).max() > 0.1, "adapters that do nothing show nothing"
    np.testing.assert_allclose(logits_of(ours, tokens), wanted, atol=1e-5, rtol=0)
    np.testing.assert_allclose(
        logits_of(neox_jax.load_model(folder), tokens), wanted, atol=1e-5, rtol=0
    )  # names its base


def test_the_revision_of_the_base_is_not_lost(adapters, tmp_path):
    adapter = read_peft(change(adapters["default"][0], tmp_path, revision="step1000"))
    assert adapter.base.revision == "step1000"
    save_peft(adapter, tmp_path / "copy")
    assert peft.LoraConfig.from_pretrained(tmp_path / "copy").revision == "step1000"


def test_a_torch_file_of_adapters(base, adapters, tmp_path):
    folder, theirs = adapters["all"]
    (tmp_path / "adapter_config.json").write_text((folder / "adapter_config.json").read_text())
    torch.save(peft.get_peft_model_state_dict(theirs), tmp_path / "adapter_model.bin")
    found, wanted = read_peft(tmp_path), read_peft(folder)
    assert found.lora == wanted.lora
    assert found.factors.keys() == wanted.factors.keys()
    assert all(np.array_equal(found.factors[name], wanted.factors[name]) for name in wanted.factors)


def test_twenty_steps_are_pefts(data, base, tmp_path):
    """The same start (a file of PEFT's), batches and optimizer: the same losses, and the same adapters at the end."""
    model = make_peft(base, tmp_path / "start", target_modules=list(LORA_TARGETS))
    steps, rate = 20, 3e-3
    config = with_adapters(
        data,
        tmp_path / "start",
        lora=ALL,
        train={"steps": steps, "batch_size": 4, "seq_length": 32},
        optimizer={"learning_rate": rate, "schedule": "constant", "warmup_steps": 0},
        checkpoint={"every": 0},
    )
    train(config, tmp_path / "run", devices=jax.devices()[:1])
    loader = Run(config, tmp_path / "other", jax.devices()[:1]).train_loader
    batches = [torch.tensor(np.asarray(loader.host_batch(i)).astype(np.int64)) for i in range(steps)]

    options = config.optimizer
    trained = [p for name, p in model.named_parameters() if "lora_" in name]
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(
        trained, lr=rate, betas=(options.b1, options.b2), eps=options.eps, weight_decay=options.weight_decay
    )
    losses = []
    for batch in batches:
        logits = model(batch[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, options.clip_norm)
        optimizer.step()
        losses.append(loss.item())
    assert max(losses) - min(losses) > 0.2, "nothing was learnt"
    np.testing.assert_allclose(losses_of(tmp_path / "run"), losses, atol=1e-4, rtol=0)
    tokens = some_tokens()
    np.testing.assert_allclose(
        logits_of(neox_jax.load_model(tmp_path / "run"), tokens), logits_of(model, tokens), atol=2e-3, rtol=0
    )


def test_our_adapters_there_give_our_logits(data, base, tmp_path):
    config = with_adapters(data, base, lora={**ALL, "rslora": True})
    train(config, tmp_path / "run", devices=jax.devices()[:1])
    save_peft(open_adapter(tmp_path / "run"), tmp_path / "peft")
    tokens = some_tokens()
    ours = neox_jax.load_model(tmp_path / "run")
    theirs = peft.PeftModel.from_pretrained(torch_model(base), tmp_path / "peft").eval()
    wanted = logits_of(ours, tokens)
    assert np.abs(wanted - logits_of(torch_model(base), tokens)).max() > 0.05
    np.testing.assert_allclose(logits_of(theirs, tokens), wanted, atol=1e-5, rtol=0)
    again = neox_jax.load_model(base, adapter=tmp_path / "peft")
    assert np.array_equal(logits_of(again, tokens), wanted)

    convert(tmp_path / "run", tmp_path / "merged", format="hf")
    np.testing.assert_allclose(logits_of(neox_jax.load_model(tmp_path / "merged"), tokens), wanted, atol=1e-4, rtol=0)
    np.testing.assert_allclose(logits_of(torch_model(tmp_path / "merged"), tokens), wanted, atol=1e-4, rtol=0)
    neox_jax.save_model(ours, tmp_path / "saved")  # merges too
    assert (tmp_path / "saved/model.safetensors").read_bytes() == (tmp_path / "merged/model.safetensors").read_bytes()
    neox_jax.save_model(ours, tmp_path / "saved_peft", format="peft")
    files = [tmp_path / name / "adapter_model.safetensors" for name in ("saved_peft", "peft")]
    assert files[0].read_bytes() == files[1].read_bytes()
    merged = neox_jax.load_model(tmp_path / "run", merged=True)
    assert merged.lora is None
    np.testing.assert_allclose(logits_of(merged, tokens), wanted, atol=1e-4, rtol=0)


def change(folder, tmp_path, **fields):
    """A copy of an adapter's folder with other fields in its configuration."""
    values = json.loads((folder / "adapter_config.json").read_text()) | fields
    (tmp_path / "adapter_config.json").write_text(json.dumps(values))
    (tmp_path / "adapter_model.safetensors").write_bytes((folder / "adapter_model.safetensors").read_bytes())
    return tmp_path


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"use_dora": True}, "use_dora True"),
        ({"bias": "all"}, "bias 'all'"),
        ({"modules_to_save": ["embed_out"]}, "modules_to_save"),
        ({"rank_pattern": {"dense": 2}}, "rank_pattern"),
        ({"layers_to_transform": [0]}, "layers_to_transform"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa'"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"something_new": 3}, "something_new 3"),
        ({"r": 5}, "rank 4, and adapter_config.json says r 5"),
        ({"lora_alpha": "x"}, "lora.alpha is 'x'"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(adapters, tmp_path, fields, named):
    with pytest.raises(InputError) as error:
        read_peft(change(adapters["default"][0], tmp_path, **fields))
    assert named in str(error.value)


def test_wrong_weights_of_adapters_are_refused(base, adapters, tmp_path):
    from safetensors.numpy import load_file, save_file

    def refused(change_tensors) -> str:
        folder = change(adapters["default"][0], tmp_path)
        tensors = load_file(folder / "adapter_model.safetensors")
        change_tensors(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")
        with pytest.raises(InputError) as error:
            neox_jax.load_model(base, adapter=folder)
        return str(error.value)

    name = "base_model.model.gpt_neox.layers.{}.attention.query_key_value.lora_A.weight"
    assert "lora_A of query_key_value is missing in layers 2" in refused(lambda t: t.pop(name.format(2)))
    other = {"base_model.model.embed_out.lora_A.weight": np.zeros((4, 64), np.float32)}
    assert "embed_out" in refused(lambda t: t.update(other))
    assert "ranks 3, 4" in refused(lambda t: t.update({name.format(1): np.zeros((3, 64), np.float32)}))
    wide = refused(lambda t: t.update({name.format(1): np.zeros((4, 65), np.float32)}))
    assert "[4, 65], wanted [4, 64]" in wide
    bigger = init_model(dataclasses.replace(TINY, num_hidden_layers=5))
    neox_jax.save_model(bigger, tmp_path / "bigger")
    with pytest.raises(InputError, match="layers.4.attention.query_key_value.lora_A.weight is missing"):
        neox_jax.load_model(tmp_path / "bigger", adapter=adapters["default"][0])


def test_adapters_over_8_bits(base, adapters, tmp_path):
    folder, theirs = adapters["all"]
    tokens = some_tokens()
    model = neox_jax.load_model(base, adapter=folder, quantize="int8")
    assert model.quantization == "int8"
    wanted = logits_of(theirs, tokens)
    assert np.abs(logits_of(model, tokens) - wanted).mean() < 0.02 * np.abs(wanted).mean()
    again = quantize_model(neox_jax.load_model(base, adapter=folder), "int8")
    assert np.array_equal(logits_of(again, tokens), logits_of(model, tokens))
    with pytest.raises(InputError, match="cannot be merged"):
        neox_jax.save_model(model, tmp_path / "merged")


def test_the_verbs_take_adapters(base, adapters, tmp_path, capsys):
    folder, _ = adapters["all"]
    prompt = ["--prompt", "def f(", "--temperature", "0", "--max-new-tokens", "12"]
    assert main(["convert", str(base), str(tmp_path / "merged"), "--to", "hf", "--adapter", str(folder)]) == 0
    assert "are merged into the weights" in capsys.readouterr().out
    texts = []
    for source in (["--model", str(base), "--adapter", str(folder)], ["--model", str(tmp_path / "merged")]):
        assert main(["generate", *source, *prompt]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert main(["generate", "--model", str(base), *prompt]) == 0
    assert capsys.readouterr().out != texts[0]

    text = tmp_path / "text.txt"
    text.write_text("def g(x):\n    return x\n" * 9)
    scores = []
    for source in (["--model", str(base), "--adapter", str(folder)], ["--model", str(tmp_path / "merged")]):
        assert main(["eval", *source, "--text", str(text), "--json"]) == 0
        scores.append(json.loads(capsys.readouterr().out)["nats_per_token"])
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)

    assert main(["convert", str(folder), str(tmp_path / "copy"), "--to", "peft"]) == 0
    assert "parameters of adapters" in capsys.readouterr().out
    assert read_peft(tmp_path / "copy").factors.keys() == read_peft(folder).factors.keys()
    for wrong, message in (
        (["convert", str(base), str(tmp_path / "x"), "--to", "peft"], "holds a model, and no adapters"),
        (["generate", "--model", str(folder), "--adapter", str(folder), *prompt], "has adapters already"),
        (["generate", "--model", str(base), "--adapter", str(tmp_path), *prompt], "is no model"),
    ):
        assert main(wrong) == 65
        assert message in capsys.readouterr().err
