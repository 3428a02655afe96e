"""Weights in 8 bits: half of what a step of decoding reads, and of what a chip holds.

Symmetric int8 with a scale for each output channel: x @ (q * s) = (x @ q) * s, so that a kernel is only ever converted
where the product reads it, and no dequantized copy of it is made. Embeddings, biases and norms stay as they are.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from neox_jax.config import QUANTIZATIONS, check_choice
from neox_jax.model import NeoX, abstract_model
from neox_jax.tree import leaf_name, map_named, named_leaves

SCALE = "_scale"


def quantize_model(model: NeoX, quantization: str) -> NeoX:
    """The model with its matrices in that format; its own arrays are given up.

    Each weight is rounded to the nearest of 255 steps of its output channel's largest: an error of at most 1/254 of it.
    Raises: InputError for an unknown format. A model that is quantized already is given back as it is.
    """
    check_choice("quantization", quantization, QUANTIZATIONS)
    if model.quantization:
        return model
    dtype = model.embed_in.embedding.dtype
    target = abstract_model(model.config, dtype=dtype, mesh=model.mesh, quantization=quantization, lora=model.lora)
    leaves = named_leaves(target)
    shardings = {name: leaf.sharding for name, leaf in leaves.items()} if model.mesh is not None else None
    # A leaf at a time, so that no more than one is there twice.
    made = {}
    for path, value in jax.tree_util.tree_leaves_with_path(model):
        name = leaf_name(path)
        if name + SCALE not in leaves:
            made[name] = value
            continue
        inputs = value.ndim - leaves[name + SCALE].ndim
        places = None if shardings is None else (shardings[name], shardings[name + SCALE])
        made[name], made[name + SCALE] = _compile(inputs, name.startswith("embed"), places)(value)
        value.delete()
    graphdef, _ = nnx.split(target)
    state = nnx.state(map_named(lambda name, _: made[name], target))
    return nnx.merge(graphdef, state)


def quantize_array(x: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """int8 and float32 scales over these axes, the ones that a product sums over."""
    x = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(x), axis=axes, keepdims=True)
    q = jnp.round(x * (127 / jnp.where(largest == 0, 1, largest))).astype(jnp.int8)
    return q, jnp.squeeze(largest, axes) / 127


@functools.cache
def _compile(inputs: int, is_table: bool, places):
    axes = (1,) if is_table else tuple(range(1, 1 + inputs))
    return jax.jit(lambda x: quantize_array(x, axes), out_shardings=places)
