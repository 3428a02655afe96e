"""Adapters in training: on any mesh, over 8 bits, restored, refused; and what a run says that it needs of memory."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import TINY, losses_of, make_config, params_digest, save_base, with_adapters

import neox_jax
from neox_jax import memory
from neox_jax.checkpoint.digest import digest_step
from neox_jax.checkpoint.streamed import read_leaves
from neox_jax.config import LORA_TARGETS, LoraConfig, ModelConfig
from neox_jax.errors import InputError
from neox_jax.lora import split_adapters
from neox_jax.model import init_model
from neox_jax.train import Run, train
from neox_jax.train_state import pure_params

ALL = {"rank": 4, "alpha": 16, "targets": LORA_TARGETS}


@pytest.fixture(scope="module")
def base(data, tmp_path_factory):
    return save_base(data, tmp_path_factory.mktemp("base") / "hf")


def run(config, folder):
    sizes = dataclasses.asdict(config.mesh).values()
    return train(config, folder, devices=jax.devices()[: int(np.prod([max(1, size) for size in sizes]))])


def some_logits(model):
    tokens = np.random.default_rng(1).integers(0, TINY.vocab_size, (2, 24))
    return np.asarray(model(jnp.asarray(tokens)))


def test_at_first_it_is_the_model_itself(data, base, tmp_path):
    config = with_adapters(data, base, lora=ALL, checkpoint={"steps": (0,)})
    begun = Run(config, tmp_path / "run", jax.devices()[:1])
    checkpoints = begun.open_checkpoints()
    checkpoints.save(0, begun.init_state(), begun.config.model, force=True)
    begun.write_files()
    model = neox_jax.load_model(tmp_path / "run")
    assert model.lora is not None
    assert np.array_equal(some_logits(model), some_logits(neox_jax.load_model(base)))


def test_only_adapters_have_gradients_moments_and_a_checkpoint(data, base, tmp_path):
    run(with_adapters(data, base, lora={"rank": 2}), tmp_path / "run")
    step = tmp_path / "run/checkpoints/4"
    names = {"layers.attention.query_key_value.lora.a", "layers.attention.query_key_value.lora.b"}
    assert set(read_leaves(step / "params")) == names
    moments = {name.split(".mu.")[-1] for name in read_leaves(step / "optimizer") if ".mu." in name}
    assert moments == names
    meta = json.loads((step / "meta/metadata").read_text())
    assert meta["adapter"]["base"] == str(base)
    assert len(meta["adapter"]["base_sha256"]) == 64


MESHES = {
    "data, fsdp, model": {"data": 2, "fsdp": 2, "model": 2},
    "pipe, model": {"pipe": 2, "model": 2, "data": 2},
    "fsdp, seq": {"fsdp": 4, "seq": 2},
}


@pytest.fixture(scope="module")
def on_one_device(data, base, tmp_path_factory):
    """Losses of four steps on one device, by what holds the weights."""
    found = {}
    for quantize in ("", "int8"):
        folder = tmp_path_factory.mktemp("one")
        run(mesh_config(data, base, quantize, {}), folder)
        found[quantize] = losses_of(folder)
    return found


def mesh_config(data, base, quantize, mesh):
    train = {"steps": 4, "batch_size": 8, "seq_length": 32, "microbatches": 2}
    return with_adapters(data, base, lora={**ALL, "quantize": quantize}, mesh=mesh, train=train)


@pytest.mark.parametrize(("mesh", "quantize"), [*((mesh, "") for mesh in MESHES), ("pipe, model", "int8")])
def test_every_mesh_equals_one_device(data, base, tmp_path, on_one_device, mesh, quantize):
    run(mesh_config(data, base, quantize, MESHES[mesh]), tmp_path)
    losses = losses_of(tmp_path)
    np.testing.assert_allclose(losses, on_one_device[quantize], atol=1e-4, rtol=0)
    assert losses[-1] < losses[0]


def test_dropout_is_drawn_anew_and_only_while_training(data, base, tmp_path):
    train = {"steps": 4, "batch_size": 8, "seq_length": 32, "microbatches": 2}
    sections = {"train": train}
    for name, lora in (("with", {**ALL, "dropout": 0.5}), ("without", ALL)):
        run(with_adapters(data, base, lora=lora, **sections), tmp_path / name)
    assert losses_of(tmp_path / "with")[0] == losses_of(tmp_path / "without")[0]  # B is zero at first
    assert losses_of(tmp_path / "with")[2] != losses_of(tmp_path / "without")[2]
    model = neox_jax.load_model(tmp_path / "with")
    assert np.array_equal(some_logits(model), some_logits(model))

    begun = Run(
        with_adapters(data, base, lora={**ALL, "dropout": 0.5}, **sections), tmp_path / "again", jax.devices()[:1]
    )
    step, rows = begun.compile_step(), begun.train_loader.host_batch(0)
    # Of a state whose B is not zero, the same batch at two steps.
    state = begun.init_state()
    for _ in range(2):
        state, _ = step(state, rows, *begun.frozen)
    copies = [jax.tree.map(jnp.copy, state) for _ in range(3)]
    later = dataclasses.replace(copies[2], step=copies[2].step + 1)
    losses = [float(step(one, rows, *begun.frozen)[1]["loss"]) for one in (copies[0], copies[1], later)]
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("lora", [{**ALL, "dropout": 0.2}, {"rank": 2, "quantize": "int8"}])
def test_resumed_bitwise(data, base, tmp_path, lora):
    config = with_adapters(data, base, lora=lora)
    half = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=2))
    constant = {"schedule": "constant", "warmup_steps": 0}
    config, half = (
        dataclasses.replace(one, optimizer=dataclasses.replace(one.optimizer, **constant)) for one in (config, half)
    )
    run(config, tmp_path / "whole")
    run(half, tmp_path / "halves")
    run(config, tmp_path / "halves")
    assert params_digest(tmp_path / "halves", 4) == params_digest(tmp_path / "whole", 4)
    assert digest_step(tmp_path / "halves/checkpoints/4") == digest_step(tmp_path / "whole/checkpoints/4")


def test_the_base_is_found_from_anywhere(data, base, tmp_path, monkeypatch):
    """A step of a run, named from the folder that it is in, pinned to that step."""
    whole = make_config(data)
    run(whole, tmp_path / "base_run")
    monkeypatch.chdir(tmp_path)
    run(with_adapters(data, "base_run@2", lora={"rank": 2}), tmp_path / "run")
    monkeypatch.chdir(data)
    model = neox_jax.load_model(tmp_path / "run")
    two = neox_jax.load_model(tmp_path / "base_run@2")
    assert np.array_equal(model.embed_in.embedding[...], two.embed_in.embedding[...])


def test_another_base_is_refused(data, base, tmp_path):
    config = with_adapters(data, base, lora=ALL)
    run(config, tmp_path / "run")
    neox_jax.save_model(init_model(TINY, seed=4), tmp_path / "other")
    other = dataclasses.replace(
        config, init_from=str(tmp_path / "other"), train=dataclasses.replace(config.train, steps=6)
    )
    with pytest.raises(InputError, match="was trained over weights with SHA-256"):
        run(other, tmp_path / "run")
    with pytest.raises(InputError, match="was trained over weights with SHA-256"):
        neox_jax.load_model(tmp_path / "other", adapter=tmp_path / "run")
    whole = dataclasses.replace(other, lora=LoraConfig(), init_from=str(base))
    with pytest.raises(InputError, match="holds adapters"):
        train(whole, tmp_path / "run", devices=jax.devices()[:1], accept_changes=True)


def test_a_run_over_other_adapters(data, base, tmp_path):
    """From adapters full training goes on with the merged weights, and adapters only with the same fields."""
    run(with_adapters(data, base, lora=ALL), tmp_path / "run")
    with pytest.raises(InputError, match="rank 4, not 8"):
        run(with_adapters(data, tmp_path / "run", lora={**ALL, "rank": 8}), tmp_path / "next")
    begun = Run(with_adapters(data, tmp_path / "run", lora=ALL), tmp_path / "next", jax.devices()[:1])
    factors, _ = split_adapters(pure_params(neox_jax.load_model(tmp_path / "run")))
    assert jax.tree.all(jax.tree.map(np.array_equal, begun.init_state().params, factors))
    whole = Run(with_adapters(data, tmp_path / "run", lora={}), tmp_path / "whole", jax.devices()[:1])
    merged = pure_params(neox_jax.load_model(tmp_path / "run", merged=True))
    assert jax.tree.all(jax.tree.map(np.array_equal, whole.init_state().params, merged))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": -1}, "lora.rank is -1"),
        ({"rank": 2, "alpha": 0}, "lora.alpha is 0"),
        ({"rank": 2, "dropout": 1.0}, "lora.dropout is 1.0"),
        ({"rank": 2, "targets": ()}, "lora.targets is ()"),
        ({"rank": 2, "targets": ("dense_h_to_h4",)}, "did you mean 'dense_h_to_4h'"),
        ({"rank": 2, "quantize": "int9"}, "did you mean 'int8'"),
    ],
)
def test_wrong_fields(fields, message):
    with pytest.raises(InputError) as error:
        LoraConfig(**fields)
    assert message in str(error.value)


def test_fields_that_do_not_go_together(data):
    with pytest.raises(InputError, match="lora.rank is set without init_from"):
        dataclasses.replace(make_config(data), lora=LoraConfig(rank=2))
    with pytest.raises(InputError, match="lora.quantize is set without lora.rank"):
        dataclasses.replace(make_config(data), lora=LoraConfig(quantize="int8"))


def test_what_a_run_needs_of_memory_is_said_and_must_be_there(data, base, tmp_path, capsys, monkeypatch):
    config = with_adapters(data, base, lora=ALL)
    run(config, tmp_path / "run")
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("memory of a device")]
    sizes = r"parameters [\d.]+ MiB, adapters [\d.]+ MiB, optimizer [\d.]+ MiB, gradients, activations and the rest "
    assert re.search(sizes + r"[\d.]+ MiB: [\d.]+ MiB of [\d.]+ [GM]iB$", line)

    begun = Run(config, tmp_path / "next", jax.devices()[:1])
    held = begun.memory.parts
    assert held["parameters"] == 4 * TINY.num_parameters
    factors = sum(leaf.size for leaf in jax.tree.leaves(begun.init_state().params))
    assert held["adapters"] == 4 * factors
    assert 2 * held["adapters"] <= held["optimizer"] < 2 * held["adapters"] + 100
    split = Run(with_adapters(data, base, lora=ALL, mesh={"fsdp": 2, "model": 2}), tmp_path / "next", jax.devices()[:4])
    assert held["parameters"] / 4 < split.memory.parts["parameters"] < held["parameters"] / 3

    enough = sum(held.values())
    for limit in (enough - 1, enough + 1):  # too little for the state, or for a step
        monkeypatch.setattr(memory, "device_memory", lambda device, limit=limit: limit)
        with pytest.raises(InputError, match="does not fit a device: parameters .* lower train.batch_size"):
            run(config, tmp_path / "refused")
        assert not (tmp_path / "refused/checkpoints/2").exists()


def test_weights_in_8_bits_are_never_dequantized_as_a_whole(data, tmp_path):
    """Of what the step holds beside its arguments nothing is as large as all matrices in the compute dtype."""
    wide = dataclasses.replace(
        ModelConfig.preset("tiny"), hidden_size=256, intermediate_size=1024, num_hidden_layers=16
    )
    neox_jax.save_model(init_model(wide), tmp_path / "base")
    sizes = {}
    for quantize in ("", "int8"):
        config = with_adapters(
            data,
            tmp_path / "base",
            lora={**ALL, "quantize": quantize},
            model=wide,
            train={"steps": 4, "batch_size": 1, "seq_length": 16, "remat": "full"},
        )
        begun = Run(config, tmp_path / f"run{quantize}", jax.devices()[:1])
        compiled = begun.compile_step()
        sizes[quantize] = compiled.memory_analysis()
        if quantize:
            kernels = [leaf for leaf in jax.tree.leaves(begun.frozen) if leaf.dtype == jnp.int8]
            assert len(kernels) == 5  # the head's too
            stacked = [f"f32[{','.join(map(str, leaf.shape))}]" for leaf in kernels[1:]]
            text = compiled.as_text()
            assert "s8[16," in text
            assert not [shape for shape in stacked if shape in text]
    floats = 4 * wide.num_hidden_layers * 12 * wide.hidden_size**2
    assert sizes["int8"].temp_size_in_bytes < floats / 4
    saved = sizes[""].argument_size_in_bytes - sizes["int8"].argument_size_in_bytes
    assert saved > 0.7 * floats
