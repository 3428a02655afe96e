"""NeoX checkpoints: torch's files by the facts' rules load to transformers' logits; bit-equal round trips; refusals."""

import json
import os
import re
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import load_file
from variants import VARIANTS, random_model, random_reference

from neox_jax.config import ModelConfig
from neox_jax.convert import names, stored
from neox_jax.convert.hf import load_hf, save_hf
from neox_jax.convert.neox import load_neox, read_neox, save_neox
from neox_jax.convert.neox_files import is_neox_folder, locate_step
from neox_jax.errors import InputError
from neox_jax.model import abstract_model
from neox_jax.sharding import make_mesh
from neox_jax.tree import named_leaves

torch.set_num_threads(1)
TOKENS = np.random.default_rng(1).integers(0, 97, (2, 12))
TINY = {**VARIANTS["pythia"], "num_hidden_layers": 2, "hidden_act": "gelu_fast"}
SEQUENTIAL = {**TINY, "use_parallel_residual": False}
TIED = {**TINY, "tie_word_embeddings": True}


# ---- an independent writer: NeoX's rules, straight from shared/neox-facts.md, with torch alone


def neox_yaml(config: dict, num_ranks: int) -> str:
    """As NeoX's own configs are: hyphens and underscores, comments, trailing commas, Python's True."""
    return f"""# a comment
{{
  "pipe-parallel-size": 1,
  "model-parallel-size": {num_ranks},
  "num-layers": {config["num_hidden_layers"]},
  "hidden-size": {config["hidden_size"]},
  "num-attention-heads": {config["num_attention_heads"]},
  "seq-length": {config["max_position_embeddings"]},
  "max-position-embeddings": {config["max_position_embeddings"]},
  "norm": "layernorm",
  "layernorm-epsilon": {config["layer_norm_eps"]},
  "pos-emb": "rotary",
  "rotary_pct": {config["rotary_pct"]},
  "rotary_emb_base": {int(config["rotary_emb_base"])},
  "no-weight-tying": {not config["tie_word_embeddings"]},
  "gpt_j_residual": {config["use_parallel_residual"]},
  "bias-gelu-fusion": {config["hidden_act"] != "gelu"},
  "use_bias_in_attn_linear": {config["attention_bias"]},
  "attention_config": [[["flash"], {config["num_hidden_layers"]}]],
  "optimizer": {{"type": "Adam", "params": {{"lr": 0.97e-4, "betas": [0.9, 0.95], }} }},
}}
"""


def neox_layers(state: dict, config: dict, num_ranks: int, mlp=("dense_h_to_4h", "dense_4h_to_h")) -> list[dict]:
    """For each rank: number of the layer -> name -> tensor."""
    num_layers = config["num_hidden_layers"]
    ranks = [{} for _ in range(num_ranks)]
    for name, tensor in state.items():
        if name.startswith("gpt_neox.layers."):
            _, _, i, inner = name.split(".", 3)
            number = int(i) + 2
            inner = inner.replace("dense_h_to_4h", mlp[0]).replace("dense_4h_to_h", mlp[1])
        else:
            number, inner = {
                "gpt_neox.embed_in.weight": (0, "word_embeddings.weight"),
                "gpt_neox.final_layer_norm.weight": (num_layers + 3, "norm.weight"),
                "gpt_neox.final_layer_norm.bias": (num_layers + 3, "norm.bias"),
                "lm_head.weight": (num_layers + 4, "final_linear.weight"),
            }[name]
        if "norm" in inner:
            parts = [tensor] * num_ranks
        elif inner in ("attention.dense.weight", f"mlp.{mlp[1]}.weight"):
            parts = torch.chunk(tensor, num_ranks, dim=1)
        elif inner in ("attention.dense.bias", f"mlp.{mlp[1]}.bias"):
            parts = [tensor / num_ranks if config["use_parallel_residual"] else tensor] * num_ranks
        else:
            parts = torch.chunk(tensor, num_ranks, dim=0)
        assert len(parts) == num_ranks
        for rank, part in zip(ranks, parts, strict=True):
            rank.setdefault(number, {})[inner] = part.clone()
    for rank in ranks:
        for number in range(2, num_layers + 2):
            rank[number]["attention.rotary_emb.inv_freq"] = torch.ones(3)
            rank[number]["attention.core_attention._extra_state"] = None
    return ranks


def write_reference(folder: Path, model, config: dict, num_ranks: int, layout="pipeline", **options) -> Path:
    """A NeoX checkpoint of transformers' model, at step 7; its step folder."""
    state = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight" or not config["tie_word_embeddings"]}
    step = folder / "global_step7"
    (step / "configs").mkdir(parents=True)
    (folder / "latest").write_text("global_step7\n")
    (step / "configs" / "tiny.yml").write_text(neox_yaml(config, num_ranks))
    for i, layers in enumerate(neox_layers(state, config, num_ranks, **options)):
        module = None
        if layout == "pipeline":
            for number, tensors in layers.items():
                torch.save(tensors, step / f"layer_{number:02d}-model_{i:02d}-model_states.pt")
        else:
            module = {f"sequential.{n}.{name}": t for n, tensors in layers.items() for name, t in tensors.items()}
        # What a real one holds besides: states of random number generators, and other objects.
        rest = {"iteration": 7, "args": {"num_layers": 2}, "np_rng_state": np.random.get_state(), "path": Path("x")}
        torch.save({"module": module, **rest}, step / f"mp_rank_{i:02d}_model_states.pt")
        torch.save({"optimizer_state_dict": {}}, step / f"zero_pp_rank_0_mp_rank_{i:02d}_optim_states.pt")
    return step


def even_rows(config: dict) -> dict:
    """NeoX's tables divide over its ranks."""
    return {**config, "vocab_size": 104}


def expected(model) -> dict[str, np.ndarray]:
    state = {k.replace("lm_head", "embed_out"): v.numpy() for k, v in model.state_dict().items()}
    return {k: v for k, v in state.items() if k != "embed_out.weight" or not model.config.tie_word_embeddings}


def assert_same_weights(model, wanted: dict[str, np.ndarray]) -> None:
    got = {name: stored.whole(tensor) for name, tensor in stored.from_model(model).tensors.items()}
    assert got.keys() == wanted.keys()
    for name in wanted:
        assert got[name].dtype == wanted[name].dtype
        assert got[name].shape == wanted[name].shape
        assert got[name].tobytes() == wanted[name].tobytes(), name


def logits_of(model) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS)).logits.numpy()


@pytest.fixture(scope="module")
def references():
    """references(config): transformers' model, made once."""
    made = {}

    def get(config: dict):
        key = json.dumps(config, sort_keys=True)
        if key not in made:
            made[key] = random_reference(config)
        return made[key]

    return get


@pytest.fixture
def small(tmp_path, references):
    """A checkpoint of two ranks to do damage to: its step folder."""
    config = even_rows(TINY)
    return write_reference(tmp_path / "small", references(config), config, 2)


# ---- reading


@pytest.mark.parametrize("layout", ["pipeline", "sequential"])
@pytest.mark.parametrize("mlp", [("dense_h_to_4h", "dense_4h_to_h"), ("linear1", "linear2")])
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("config", [TINY, SEQUENTIAL], ids=["parallel", "sequential-residual"])
def test_what_torch_wrote_loads_bit_equal(config, num_ranks, mlp, layout, tmp_path, references):
    config = even_rows(config)
    theirs = references(config)
    write_reference(tmp_path, theirs, config, num_ranks, layout, mlp=mlp)
    model = load_neox(tmp_path)
    assert_same_weights(model, expected(theirs))
    assert model.config == ModelConfig.from_hf(config)


@pytest.mark.parametrize(
    ("name", "num_ranks"),
    [("20b", 2), ("pythia", 4), ("redpajama", 2), ("tied", 1), ("no-attention-bias", 2), ("sequential-tied", 2)],
)
def test_same_logits_as_transformers(name, num_ranks, tmp_path, references):
    config = even_rows(VARIANTS[name])
    theirs = references(config)
    write_reference(tmp_path, theirs, config, num_ranks)
    model = load_neox(tmp_path)
    assert_same_weights(model, expected(theirs))
    wanted = logits_of(theirs)
    assert np.abs(wanted).max() > 1, "the random weights prove nothing"
    assert np.abs(np.asarray(model(TOKENS)) - wanted).max() <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_is_kept_or_cast_once(dtype, tmp_path):
    config = even_rows(SEQUENTIAL)
    theirs = random_reference(config).to(dtype)
    write_reference(tmp_path, theirs, config, 2)
    model = load_neox(tmp_path)
    for full_name, tensor in stored.from_model(model).tensors.items():
        name = full_name.replace("embed_out", "lm_head")
        assert stored.whole(tensor).tobytes() == theirs.state_dict()[name].view(torch.int16).numpy().tobytes()
    assert {leaf.dtype.name for leaf in jax.tree.leaves(model)} == {str(dtype).removeprefix("torch.")}
    assert_same_weights(load_neox(tmp_path, dtype="float32"), expected(theirs.float()))


@pytest.mark.parametrize("layout", ["pipeline", "sequential"])
@pytest.mark.parametrize("sizes", [{"fsdp": 2, "model": 4}, {"data": 2, "fsdp": 4}, {"model": 8}], ids=str)
def test_loads_onto_a_mesh(sizes, layout, tmp_path, references):
    config = {
        **VARIANTS["pythia"],
        "num_attention_heads": 8,
        "rotary_pct": 1.0,
        "vocab_size": 98,
    }  # 98 rows are padded to divide
    theirs = references(config)
    write_reference(tmp_path, theirs, config, 2, layout)
    model = load_neox(tmp_path, mesh=make_mesh(**sizes))
    assert_same_weights(model, expected(theirs))
    kernel = model.layers.mlp.dense_h_to_4h.kernel[...]
    assert kernel.sharding.num_devices == 8
    assert not kernel.sharding.is_fully_replicated
    logits = np.asarray(model(np.tile(TOKENS, (4, 1))))[:2, :, :98]
    np.testing.assert_allclose(logits, logits_of(theirs), atol=2e-5, rtol=0)  # sums in another order


def test_norms_that_drifted_are_averaged_and_reported(small, references):
    name = "post_attention_layernorm.weight"
    first, second = (small / f"layer_03-model_0{rank}-model_states.pt" for rank in (0, 1))
    tensors = torch.load(second)
    tensors[name][5] += 0.25
    torch.save(tensors, second)
    checkpoint = read_neox(small)
    full = "gpt_neox.layers.1.post_attention_layernorm.weight"
    assert checkpoint.drift == {full: pytest.approx(0.25, rel=1e-5)}
    wanted = expected(references(even_rows(TINY)))
    wanted[full] = ((torch.load(first)[name].double() + tensors[name].double()) / 2).float().numpy()
    assert_same_weights(stored.to_model(checkpoint), wanted)


def test_sequential_biases_are_copies_and_parallel_ones_shares(tmp_path, references):
    config = even_rows(SEQUENTIAL)
    step = write_reference(tmp_path, references(config), config, 2)
    path = step / "layer_02-model_01-model_states.pt"
    tensors = torch.load(path)
    tensors["attention.dense.bias"] += 0.01
    torch.save(tensors, path)
    assert read_neox(tmp_path).drift == {"gpt_neox.layers.0.attention.dense.bias": pytest.approx(0.01, rel=1e-4)}
    tensors["attention.dense.bias"] += 2
    torch.save(tensors, path)
    with pytest.raises(
        InputError, match=r"attention\.dense\.bias differs between the ranks by 2\.01: .*gpt_j_residual"
    ):
        read_neox(tmp_path)
    text = (step / "configs" / "tiny.yml").read_text()
    (step / "configs" / "tiny.yml").write_text(text.replace('"gpt_j_residual": False', '"gpt_j_residual": True'))
    bias = load_neox(tmp_path).layers.attention.dense.bias[0]
    wanted = 2 * expected(references(config))["gpt_neox.layers.0.attention.dense.bias"] + np.float32(2.01)
    np.testing.assert_allclose(bias, wanted, rtol=1e-6, atol=1e-6)


def test_a_checkpoint_is_recognised_wherever_one_points(small, tmp_path):
    root = small.parent
    assert is_neox_folder(root)
    assert is_neox_folder(small)
    assert not is_neox_folder(tmp_path)
    assert not is_neox_folder(small / "configs")
    assert not is_neox_folder(small / "layer_00-model_00-model_states.pt")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "latest").write_text("tomorrow")
    assert not is_neox_folder(tmp_path / "other")
    assert locate_step(root) == locate_step(small) == small

    (root / "latest").unlink()
    assert locate_step(root) == small
    (root / "global_step8").mkdir()
    with pytest.raises(InputError, match="2 steps and no file `latest`; give one: global_step7, global_step8"):
        locate_step(root)
    (root / "latest").write_text("global_step9")
    assert is_neox_folder(root)
    with pytest.raises(InputError, match="says global_step9, which is not there; it has global_step7, global_step8"):
        locate_step(root)
    (root / "latest").write_text("../../etc")
    with pytest.raises(InputError, match="wanted the name of a folder"):
        locate_step(root)
    (root / "latest").write_text("global_step8")
    with pytest.raises(InputError, match="neither layer_XX"):
        locate_step(root)
    with pytest.raises(InputError, match="no NeoX checkpoint"):
        locate_step(small / "configs")
    (root / "latest").write_text("global_step" + "9" * 240)
    with pytest.raises(InputError, match="wanted the name of a folder"):
        locate_step(root)
    for path in (root / "latest", root / "absent"):
        with pytest.raises(InputError, match="is no folder"):
            locate_step(path)


def test_optimizer_states_that_are_not_there(small):
    (small / "zero_pp_rank_1_mp_rank_00_optim_states.pt").symlink_to("absent")
    assert "not imported (2 files" in read_neox(small).notes[0]


def test_a_bare_folder_with_its_config_beside(small, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in small.glob("layer_*.pt"):
        path.rename(bare / path.name)
    (small / "configs" / "tiny.yml").rename(bare / "config.yml")
    assert is_neox_folder(bare)
    assert load_neox(bare).config == ModelConfig.from_hf(even_rows(TINY))


def test_settings_may_stand_in_several_files(small):
    configs = small / "configs"
    (configs / "local.yml").write_text('{"data-path": "x", "num_layers": 2}')
    assert load_neox(small).config.layer_norm_eps == 1e-5  # YAML 1.1 takes 1e-5 for a string
    (configs / "local.yml").write_text('{"num_layers": 3}')
    with pytest.raises(InputError, match=r"num_layers is 3 in local\.yml, but 2 in tiny\.yml"):
        load_neox(small)


def test_neox_defaults_fill_in_what_a_configuration_leaves_out(small):
    path = small / "configs" / "tiny.yml"
    path.write_text(
        '{"num_attention_heads": 4, "pos_emb": "rotary", "seq_length": 64, "no_weight_tying": true, "norm": null}'
    )
    config = load_neox(small).config
    assert (config.hidden_act, config.rotary_pct, config.use_parallel_residual) == ("gelu", 1.0, False)
    assert (config.max_position_embeddings, config.layer_norm_eps) == (64, 1e-5)


# ---- refusals


def problems_of(folder) -> str:
    with pytest.raises(InputError) as caught:
        load_neox(folder)
    text = str(caught.value)
    assert "\n" not in text
    return text


SETTINGS = {
    "pos-emb: rotary -> alibi": "pos_emb is 'alibi'; only 'rotary'",
    "norm: layernorm -> rmsnorm": "norm is 'rmsnorm'; only 'layernorm'",
    "activation: None -> geglu": "activation is 'geglu'; only 'gelu'",
    "num_kv_heads: None -> 2": "num_kv_heads is 2, but there are 4 heads: grouped queries",
    "moe_num_experts: None -> 8": "moe_num_experts is 8; only 1",
    "gpt_j_tied: None -> True": "gpt_j_tied is True; only False",
    "attention_config: None -> [[['global', 'local'], 1]]": "attention_config has local",
    "num-attention-heads: 4 -> None": "does not say num_attention_heads",
    "num-attention-heads: 4 -> 3": "num_attention_heads 3 does not divide over the 2 ranks",
    "num-attention-heads: 4 -> four": "num_attention_heads is 'four' in the configuration; wanted a whole number",
    "num-attention-heads: 4 -> 6": "does not divide over 6 heads",
    "pos-emb: rotary -> None": "pos_emb is not said, and 'learned' by NeoX's default",
    "gpt_j_residual: True -> yes please": "gpt_j_residual is 'yes please' in the configuration; wanted true or false",
    "num-layers: 2 -> 5": "num_layers is 5 in the configuration, but 2 by the weights",
    "rotary_pct: 0.25 -> 'nan'": "rotary_pct is 'nan' in the configuration; wanted a number",
    "hidden-size: 32 -> 48": "hidden_size is 48 in the configuration, but 32 by the weights",
    "model-parallel-size: 2 -> 4": "model_parallel_size is 4 in the configuration, but the files are of 2 ranks",
    "no-weight-tying: True -> False": "final_linear.weight' is no parameter of this configuration (no_weight_tying",
    "use_bias_in_attn_linear: True -> False": "attention.dense.bias' is no parameter",
}


@pytest.mark.parametrize(("change", "message"), SETTINGS.items(), ids=lambda text: text[:40])
def test_refuses_what_is_no_plain_neox(change, message, small):
    path = small / "configs" / "tiny.yml"
    key, _, values = change.partition(": ")
    settings = yaml.safe_load(path.read_text())
    settings.pop("attention_config")
    value = yaml.safe_load(values.partition(" -> ")[2])
    settings[key] = None if value == "None" else value
    if settings[key] is None:
        del settings[key]
    path.write_text(json.dumps(settings))
    assert message in problems_of(small)


def test_refuses_a_configuration_that_cannot_be_read(small):
    path = small / "configs" / "tiny.yml"
    for text, message in {
        "{": "cannot be read as YAML",
        "[1, 2]": "holds a list",
        '{"num_layers": 2, "num_layers": 2}': "key 'num_layers' is there twice",
        "!!python/object/apply:os.system ['true']": "cannot be read as YAML",
        "[" * 20000: "cannot be read as YAML",
        "{? [1]: 2}": "cannot be read as YAML",
        "#" * (1 << 21): "larger than",
        "a: &a [1]\nb: *a": "it has an alias (*name); write out what that stands for",
        "a: &a {x: 1}\nb: {<<: *a}": "cannot be read as YAML",
        "a: " + "1:" * 60_000 + "1": "a number has 120001 digits",
        "a: 0x" + "f" * 5000: "a number has 5002 digits",
        "a: " + "9" * 5000: "a number has 5000 digits",
        "a: !!bool maybe": "cannot be read as YAML: 'maybe'",
        "a: !!timestamp x": "cannot be read as YAML",
        "a: !!int ''": "cannot be read as YAML",
        "1.5: 1": "a key is 1.5; wanted a name",
        f"{1 << 61}: 1": "a key is 2305843009213693952; wanted a name",
        "2001-12-14: 1": "a key is datetime.date(2001, 12, 14); wanted a name",
        "{" + ", ".join(f"k{i}: 1" for i in range(9000)) + "}": "does not say num_attention_heads",
    }.items():
        path.write_text(text)
        assert message in problems_of(small)
    path.unlink()
    assert "no configuration: put the run's config.yml into" in problems_of(small)
    os.mkfifo(path)
    (small / "configs" / "x.yml").symlink_to("/dev/zero")
    assert "no configuration: put the run's config.yml into" in problems_of(small)


def damage(path: Path, change) -> None:
    tensors = torch.load(path, weights_only=False)
    change(tensors)
    torch.save(tensors, path)


def test_all_problems_are_reported_at_once(small):
    rank = {i: [small / f"layer_{i:02d}-model_{r:02d}-model_states.pt" for r in (0, 1)] for i in (0, 2, 3, 5, 6)}
    rank[5][1].unlink()
    rank[6][0].write_bytes(b"not a zip")
    damage(rank[2][0], lambda t: t.pop("input_layernorm.bias"))
    damage(rank[2][1], lambda t: t.update({"adapter.weight": torch.ones(2)}))
    damage(rank[3][1], lambda t: t.update({"attention.dense.weight": torch.ones(32, 8)}))
    damage(rank[3][0], lambda t: t.update({"attention.dense.bias": t["attention.dense.bias"].half()}))
    damage(rank[3][1], lambda t: t.update({"mlp.dense_h_to_4h.bias": 3}))
    text = problems_of(small)
    for message in (
        "layer_05-model_01-model_states.pt is missing",
        "layer_06-model_00-model_states.pt",
        "layer 2's input_layernorm.bias is missing on rank 0",
        "layer 2's 'adapter.weight' is no parameter of this configuration",
        "layer 3's attention.dense.weight is [32, 8] on rank 1, wanted [32, 16]",
        "layer 3's attention.dense.bias is float16 and float32 on different ranks",
        "mlp.dense_h_to_4h.bias' is no tensor",
    ):
        assert message in text, text
    assert text.count("layer 5") == text.count("layer 6") == 0  # explained by their files


def test_refuses_missing_ranks_and_layers(small):
    for path in small.glob("layer_03-*"):
        path.unlink()
    assert "layer 3 is missing on every rank" in problems_of(small)
    for path in small.glob("layer_*-model_01-*"):
        path.unlink()
    assert "model_parallel_size is 2 in the configuration, but the files are of 1 ranks" in problems_of(small)


def test_refuses_damage_in_the_sequential_layout(tmp_path, references):
    config = even_rows(TINY)
    step = write_reference(tmp_path, references(config), config, 2, "sequential")
    first, second = step / "mp_rank_00_model_states.pt", step / "mp_rank_01_model_states.pt"
    damage(second, lambda t: t["module"].pop("sequential.2.input_layernorm.weight"))
    damage(second, lambda t: t["module"].update({"tied.weight": torch.ones(2)}))
    text = problems_of(tmp_path)
    assert "layer 2's input_layernorm.weight is missing on rank 1" in text
    assert "mp_rank_01_model_states.pt: 'tied.weight' is no parameter" in text
    first.unlink()
    assert "mp_rank_00_model_states.pt is missing" in problems_of(tmp_path)
    damage(second, lambda t: t.update(module=None))
    assert "no weights under 'module'" in problems_of(tmp_path)


def test_a_number_of_a_layer_or_rank_has_one_spelling(small):
    """Of two files for one place it would be chance which is read."""
    data, files = (small / "layer_02-model_00-model_states.pt").read_bytes(), read_neox(small).files
    for name in ("layer_002-model_00", "layer_02-model_000", "layer_٠٢-model_00", "layer_02-model_00\n"):
        (small / f"{name}-model_states.pt").write_bytes(data[:100])
    assert read_neox(small).files == files
    (small / "layer_02-model_999-model_states.pt").write_bytes(data)
    assert "has layer files of rank 999, but nearly all of those of lower ranks are missing" in problems_of(small)


def test_refuses_both_names_of_one_tensor(small):
    path = small / "layer_02-model_00-model_states.pt"
    damage(path, lambda t: t.update({"mlp.linear1.bias": t["mlp.dense_h_to_4h.bias"]}))
    assert "holds mlp.dense_h_to_4h.bias under both its older and its newer name" in problems_of(small)


def test_refuses_dtypes_that_differ_unless_told(small, references):
    for path in small.glob("layer_00-*"):
        damage(path, lambda t: t.update({"word_embeddings.weight": t["word_embeddings.weight"].half()}))
    assert "stores parameters as float16 and float32; pass a dtype" in problems_of(small)
    assert load_neox(small, dtype="float32").embed_in.embedding.dtype == np.float32
    for path in small.glob("layer_00-*"):
        damage(path, lambda t: t.update({"word_embeddings.weight": t["word_embeddings.weight"].char()}))
    assert "word_embeddings.weight is int8, wanted one of float32" in problems_of(small)


# ---- writing


@pytest.mark.parametrize("mlp_names", ["dense", "linear"])
@pytest.mark.parametrize("name", VARIANTS)
def test_round_trip_through_neox_is_bit_equal(name, mlp_names, tmp_path):
    config = VARIANTS[name]
    num_ranks = 3 if config["num_attention_heads"] == 3 else 2
    original = random_model(config)
    save_hf(original, tmp_path / "hf")
    save_neox(load_hf(tmp_path / "hf"), tmp_path / "neox", tensor_parallel=num_ranks, mlp_names=mlp_names)
    again = load_neox(tmp_path / "neox")
    assert again.config == original.config
    save_hf(again, tmp_path / "back")
    wanted, got = (load_file(tmp_path / folder / "model.safetensors") for folder in ("hf", "back"))
    assert wanted.keys() == got.keys()
    assert all(wanted[key].tobytes() == got[key].tobytes() for key in wanted)
    first, last = (json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("hf", "back"))
    assert first == last


@pytest.mark.parametrize("dtype", [np.float32, "bfloat16", np.float16])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 6])
def test_biases_split_into_shares_that_sum_to_the_bit(num_ranks, dtype, tmp_path):
    sizes = {"hidden_size": 48, "num_attention_heads": 12, "rotary_pct": 1.0, "intermediate_size": 96}
    model = random_model({**TINY, **sizes}, dtype=np.dtype(dtype))
    small = np.dtype(dtype).type(np.finfo(np.float16).smallest_subnormal if dtype == np.float16 else 1e-45)
    odd = [0.0, -0.0, small, -small, np.inf, -np.inf, 1e-3, 60000]
    bias = model.layers.attention.dense.bias
    bias[...] = bias[...].at[0, : len(odd)].set(np.array(odd, dtype))
    save_neox(model, tmp_path / "neox", tensor_parallel=num_ranks)
    last = tmp_path / "neox" / "global_step0" / f"layer_02-model_{num_ranks - 1:02d}-model_states.pt"
    shares = torch.load(last)["attention.dense.bias"].double().numpy()[len(odd) :]
    wanted = np.asarray(bias[...])[0, len(odd) :].astype(np.float64) / num_ranks
    np.testing.assert_allclose(shares, wanted, rtol=1e-2)  # the ranks share alike, to rounding in bfloat16
    again = load_neox(tmp_path / "neox")
    for name, leaf in named_leaves(model).items():
        assert np.asarray(leaf).tobytes() == np.asarray(named_leaves(again)[name]).tobytes(), name


@pytest.mark.parametrize("config", [TINY, {**SEQUENTIAL, "attention_bias": False}, TIED], ids=["untied", "seq", "tied"])
def test_torch_reads_what_neox_expects(config, tmp_path):
    model = random_model(config, dtype=np.float16)
    save_neox(model, tmp_path, tensor_parallel=2, step=12, config_extra={"train_iters": 20})
    assert (tmp_path / "latest").read_text() == "global_step12"
    step = tmp_path / "global_step12"
    read = {path.name: torch.load(path, weights_only=True) for path in step.glob("*.pt")}
    layers = {name: tensors for name, tensors in read.items() if name.startswith("layer_")}
    numbers = [0, 2, 3, 5] + ([] if config["tie_word_embeddings"] else [6])
    assert sorted(layers) == [f"layer_{n:02d}-model_{r:02d}-model_states.pt" for n in numbers for r in (0, 1)]

    attention = {"attention.query_key_value.weight": (48, 32), "attention.dense.weight": (32, 16)}
    if config["attention_bias"]:
        attention |= {"attention.query_key_value.bias": (48,), "attention.dense.bias": (32,)}
    block = {
        "input_layernorm.weight": (32,),
        "input_layernorm.bias": (32,),
        "post_attention_layernorm.weight": (32,),
        "post_attention_layernorm.bias": (32,),
        "mlp.dense_h_to_4h.weight": (64, 32),
        "mlp.dense_h_to_4h.bias": (64,),
        "mlp.dense_4h_to_h.weight": (32, 64),
        "mlp.dense_4h_to_h.bias": (32,),
        **attention,
    }
    shapes = {0: {"word_embeddings.weight": (128, 32)}, 2: block, 3: block, 6: {"final_linear.weight": (128, 32)}}
    shapes[5] = {"norm.weight": (32,), "norm.bias": (32,)}
    for name, tensors in layers.items():
        assert {key: tuple(t.shape) for key, t in tensors.items()} == shapes[int(name[6:8])]
        assert {t.dtype for t in tensors.values()} == {torch.float16}

    whole = {
        name: torch.from_numpy(stored.whole(tensor).copy()) for name, tensor in stored.from_model(model).tensors.items()
    }
    first, second = (layers[f"layer_02-model_0{rank}-model_states.pt"] for rank in (0, 1))
    bias = "mlp.dense_4h_to_h.bias"
    shared = 2 if config["use_parallel_residual"] else 1
    assert torch.equal(first[bias] * shared, whole[f"gpt_neox.layers.0.{bias}"])
    assert torch.equal(first[bias], second[bias])
    dense = "attention.dense.weight"
    assert torch.equal(torch.cat([first[dense], second[dense]], dim=1), whole[f"gpt_neox.layers.0.{dense}"])
    table = torch.cat([layers[f"layer_00-model_0{rank}-model_states.pt"]["word_embeddings.weight"] for rank in (0, 1)])
    assert torch.equal(table[:97], whole["gpt_neox.embed_in.weight"])
    assert not table[97:].any()

    for rank in (0, 1):
        state = read[f"mp_rank_{rank:02d}_model_states.pt"]
        assert (state["iteration"], state["mp_world_size"], state["module"]) == (12, 2, None)
    settings = yaml.safe_load((step / "configs" / "config.yml").read_text())
    assert settings["layernorm_epsilon"] == 1e-5
    assert isinstance(settings["layernorm_epsilon"], float)
    assert settings["train_iters"] == 20
    assert settings["no_weight_tying"] is not config["tie_word_embeddings"]


def test_saves_from_a_mesh_and_a_tokenizer_beside(tmp_path):
    model = random_model(TINY)
    save_neox(model, tmp_path / "one", tensor_parallel=2)
    sharded = load_neox(tmp_path / "one", mesh=make_mesh(fsdp=2, model=4))
    assert sharded.config.vocab_multiple == 4
    save_neox(sharded, tmp_path / "two", tensor_parallel=2)
    for path in (tmp_path / "one").rglob("*.*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes()


def test_refuses_to_write_what_does_not_fit(tmp_path):
    model = random_model(TINY)
    for options, message in (
        ({"tensor_parallel": 3}, "4 heads do not divide over 3 ranks; try 1, 2, 4"),
        ({"tensor_parallel": 0}, "tensor_parallel is 0"),
        ({"mlp_names": "liner"}, "did you mean 'linear'"),
        ({"config_extra": {"hidden_size": 1}}, "config_extra sets hidden_size"),
    ):
        with pytest.raises(InputError, match=re.escape(message)):
            save_neox(model, tmp_path / "new", **options)
    assert not list(tmp_path.iterdir())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(InputError, match="already has something in it"):
        save_neox(model, tmp_path / "full")


def test_nothing_half_written_is_left(tmp_path, monkeypatch):
    def fail(path, tree):
        raise OSError("no space left on device")

    monkeypatch.setattr("neox_jax.convert.neox.save_torch_file", fail)
    with pytest.raises(OSError):
        save_neox(random_model(TINY), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_refuses_our_own_file_when_it_contradicts(tmp_path):
    save_neox(random_model(TINY), tmp_path / "out")
    path = tmp_path / "out" / "global_step0" / "configs" / "neox_jax.json"
    extras = json.loads(path.read_text())
    for change, message in (
        ({"vocab_size": 1000}, "says vocab_size 1000, but the tables have 128 rows"),
        ({"vocab_size": "97"}, "is not as it was written"),
        ({"hidden_act": "gelu"}, "says hidden_act 'gelu', but bias_gelu_fusion is True"),
        ({"rotary_pct": 1}, "is not as it was written"),
        ({"rotary_pct": None}, "is not as it was written"),
        ({"vocab_multiple": None}, "is not as it was written"),
        ({"eos_token_id": 1 << 40}, "eos_token_id is 1099511627776; it must be at most"),
    ):
        path.write_text(json.dumps({**extras, **change}))
        assert message in problems_of(tmp_path / "out")


def test_every_row_of_the_table_says_how_ranks_hold_it():
    stacked = {row.neox_name for row in names.ROWS if row.stacked}
    assert (
        len({row.neox_name for row in names.ROWS})
        == len(names.ROWS)
        == len(named_leaves(abstract_model(ModelConfig())))
    )
    assert not any("{" in name or name.startswith("gpt_neox") for name in stacked)


def test_a_huge_number_in_a_name_costs_nothing(tmp_path, references):
    config = even_rows(TINY)
    step = write_reference(tmp_path, references(config), config, 1, "sequential")
    path = step / "mp_rank_00_model_states.pt"
    damage(path, lambda t: t["module"].update({"sequential.99999999999.norm.weight": torch.ones(2)}))
    assert "'sequential.99999999999.norm.weight' is no parameter" in problems_of(tmp_path)
    damage(path, lambda t: t.update(module={"sequential.0.word_embeddings.weight": torch.ones(2, 2), "x\ny": 1}))
    assert "neither a final norm nor" in problems_of(tmp_path)
