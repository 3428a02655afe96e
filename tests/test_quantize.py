"""Weights in 8 bits: how close they are, where they may go, and that no dequantized copy is made."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_generation import CONFIG, EIGHT_HEADS, prompts_of, sharded, tokens_of
from variants import VARIANTS, random_model

import neox_jax
from neox_jax.checkpoint.steps import read_meta
from neox_jax.config import ModelConfig
from neox_jax.convert.source import convert
from neox_jax.errors import InputError
from neox_jax.generation import generate
from neox_jax.model import abstract_model
from neox_jax.quantize import quantize_array, quantize_model
from neox_jax.sharding import make_mesh
from neox_jax.tree import named_leaves, num_bytes


def dequantized(model) -> dict[str, np.ndarray]:
    leaves = {name: np.asarray(leaf) for name, leaf in named_leaves(model).items()}
    for name in [name for name in leaves if name.endswith("_scale")]:
        kernel = name.removesuffix("_scale")
        scale = leaves.pop(name)
        inputs = leaves[kernel].ndim - scale.ndim
        axes = (1,) if kernel.startswith("embed") else tuple(range(1, 1 + inputs))
        leaves[kernel] = leaves[kernel] * np.expand_dims(scale, axes)
    return leaves


@pytest.mark.parametrize("name", ["pythia", "redpajama", "sequential-tied"])
def test_each_weight_is_within_half_a_step(name):
    model = random_model(VARIANTS[name])
    exact = {name: np.asarray(leaf) for name, leaf in named_leaves(model).items()}
    quantized = quantize_model(model, "int8")
    leaves = named_leaves(quantized)
    kinds = {leaf.dtype.name for name, leaf in leaves.items() if name.endswith(("kernel", "embed_out.embedding"))}
    assert kinds == {"int8"}
    assert leaves["embed_in.embedding"].dtype == jnp.float32
    for name, got in dequantized(quantized).items():
        step = 0
        if name + "_scale" in leaves:
            inputs = leaves[name].ndim - leaves[name + "_scale"].ndim
            axes = (1,) if name.startswith("embed") else tuple(range(1, 1 + inputs))
            step = np.expand_dims(np.asarray(leaves[name + "_scale"]), axes)
        assert (np.abs(got - exact[name]) <= step * 0.5001).all(), name


def test_logits_are_those_of_the_dequantized_weights():
    """The scales stand behind the products, which changes rounding alone."""
    tokens = jnp.asarray(prompts_of(lengths=(20, 20)))
    for name in ("pythia", "sequential-tied"):
        quantized = quantize_model(random_model(VARIANTS[name]), "int8")
        twin = random_model(VARIANTS[name])
        values = dequantized(quantized)
        twin = jax.tree.unflatten(jax.tree.structure(twin), [jnp.asarray(values[one]) for one in named_leaves(twin)])
        np.testing.assert_allclose(quantized(tokens), twin(tokens), atol=1e-4)
        assert np.abs(np.asarray(twin(tokens)) - np.asarray(random_model(VARIANTS[name])(tokens))).max() > 1e-3


def test_zeros_and_outliers():
    x = jnp.zeros((4, 3)).at[0, 1].set(5e3).at[1, 1].set(-1e-3)
    q, scale = quantize_array(x, (0,))
    np.testing.assert_array_equal(q, np.array(x != 0) * np.array([[0, 127, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]]))
    np.testing.assert_allclose(scale, [0, 5e3 / 127, 0], rtol=1e-6)


@pytest.mark.parametrize("axes", [{"model": 8}, {"data": 2, "fsdp": 2, "model": 2}])
def test_a_mesh_gives_the_same(axes):
    mesh = make_mesh(**axes)
    alone, spread = random_model(EIGHT_HEADS), sharded(EIGHT_HEADS, mesh)
    alone, spread = quantize_model(alone, "int8"), quantize_model(spread, "int8")
    kernel = spread.layers.mlp.dense_h_to_4h
    assert (
        kernel.kernel[...].sharding.shard_shape(kernel.kernel.shape)[2]
        == EIGHT_HEADS.intermediate_size // axes["model"]
    )
    prompts = prompts_of(EIGHT_HEADS, (5, 1, 17))
    options = {"max_new_tokens": 20, "temperature": 0.8, "ignore_eos": True}
    got, wanted = generate(spread, None, prompts, **options), generate(alone, None, prompts, **options)
    assert tokens_of(got) == tokens_of(wanted)


def test_stored_and_loaded(tmp_path):
    model = quantize_model(random_model(CONFIG, dtype=jnp.bfloat16), "int8")
    neox_jax.save_model(model, tmp_path / "int8", format="orbax")
    loaded = neox_jax.load_model(tmp_path / "int8")
    for name, leaf in named_leaves(model).items():
        other = named_leaves(loaded)[name]
        assert other.dtype == leaf.dtype
        np.testing.assert_array_equal(other, leaf)
    assert read_meta(tmp_path / "int8" / "checkpoints" / "0")[1] == "bfloat16"
    assert quantize_model(loaded, "int8") is loaded
    with pytest.raises(InputError, match="int8 weights cannot be saved as hf; take orbax"):
        neox_jax.save_model(model, tmp_path / "hf", format="hf")
    with pytest.raises(InputError, match="holds int8 weights; convert the model that they were made from"):
        convert(tmp_path / "int8", tmp_path / "hf", format="hf")
    with pytest.raises(InputError, match="computed in bfloat16; leave dtype out"):
        neox_jax.load_model(tmp_path / "int8", dtype="float32")


def test_quantized_while_it_is_loaded(tmp_path):
    neox_jax.save_model(random_model(CONFIG), tmp_path / "hf")
    mesh = make_mesh(model=4, devices=jax.devices()[:4])
    model = neox_jax.load_model(tmp_path / "hf", mesh=mesh, dtype="bfloat16", quantize="int8")
    assert model.layers.mlp.dense_h_to_4h.kernel.dtype == jnp.int8
    assert model.embed_in.embedding.dtype == jnp.bfloat16
    with pytest.raises(InputError, match="quantization is 'int3'.* did you mean 'int8'"):
        neox_jax.load_model(tmp_path / "hf", quantize="int3")


def test_half_the_bytes():
    config = ModelConfig.preset("pythia-70m")
    half = num_bytes(abstract_model(config, dtype=jnp.bfloat16))
    eighth = num_bytes(abstract_model(config, dtype=jnp.bfloat16, quantization="int8"))
    table = 2 * config.padded_vocab_size * config.hidden_size
    assert 0.5 < (eighth - table) / (half - table) < 0.51


def test_decoding_in_8_bits_is_close():
    """The mean log probability of a real text says more: benchmarks/quantization.py."""
    model, prompts = random_model(CONFIG), prompts_of()
    tokens = jnp.asarray([prompt[:1] * 24 for prompt in prompts])
    exact = np.asarray(jax.nn.log_softmax(model(tokens)))
    close = np.asarray(jax.nn.log_softmax(quantize_model(model, "int8")(tokens)))
    np.testing.assert_allclose(close, exact, atol=0.1)
