"""Low-rank adapters: what is added to a layer's products with a target's kernel, and which parameters that has.

SHAPES  L layers  R rank  D model  N heads  H head dim  C query, key, value  F mlp
Each factor has the axes of the kernel's side that it is on, and lies on the mesh as that does: A [L, *inputs, R] with
the inputs, B [L, R, *outputs] with the outputs. So a column-parallel product needs no collective more, and what a
row-parallel one adds is summed over ranks with the product itself.
Source: LoRA, arXiv:2106.09685; QLoRA, arXiv:2305.14314; rsLoRA, arXiv:2312.03732; initialised as PEFT does.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx

from neox_jax.config import LORA_TARGETS, LoraConfig
from neox_jax.tensor_parallel import Ranks
from neox_jax.tree import join, map_named, select

PART, NOISE = ".lora.", "noise"  # in an adapter's names


class LoRAParam(nnx.Variable):
    """A factor of an adapter: trained while every `nnx.Param` stays."""


class Noise(nnx.Variable):
    """What dropout draws from in a step [L, 4]: seed, step, microbatch, layer; uint32."""


class LoRA(nnx.Module):
    """x A B times a scale, for a stack of layers. inputs, outputs: of the kernel, logical axis -> size.

    With dropout it has `noise`, a place for what a step draws from.
    """

    def __init__(
        self, config: LoraConfig, layers: int, inputs: dict, outputs: dict, *, target: str, dtype, rngs: nnx.Rngs
    ):
        bound = 1 / math.sqrt(math.prod(inputs.values()))
        a = jax.random.uniform(rngs.params(), (layers, *inputs.values(), config.rank), dtype, -bound, bound)
        b = jnp.zeros((layers, config.rank, *outputs.values()), dtype)
        self.a = LoRAParam(a, logical=("layers", *inputs, "rank"))
        self.b = LoRAParam(b, logical=("layers", "rank", *outputs))
        noise = jnp.zeros((layers, 4), jnp.uint32)
        self.noise = Noise(noise, logical=("layers", "norm")) if config.dropout else None
        self.scale, self.dropout = config.scale, config.dropout
        self.number = LORA_TARGETS.index(target)
        self.num_inputs = len(inputs)

    def __call__(self, x: jax.Array, ranks: Ranks, *, part: int | None = None) -> jax.Array:
        """What is added to a product with the kernel, or with the fused query, key or value part of it."""
        a, b = self.a[...], self.b[...]
        a_axes, b_axes = (factor.get_metadata("logical")[1:] for factor in (self.a, self.b))
        if part is not None:
            b, b_axes = b[..., part, :], (*b_axes[:-2], b_axes[-1])
        a = ranks.gather_weights(a.astype(x.dtype), a_axes)
        b = ranks.gather_weights(b.astype(x.dtype), b_axes)
        if self.noise is not None:
            key = ranks.fold(jax.random.key(self.number), a_axes)
            for i in range(4):
                key = jax.random.fold_in(key, self.noise[...][i])
            kept = jax.random.bernoulli(key, 1 - self.dropout, x.shape)
            x = jnp.where(kept, x / (1 - self.dropout), 0).astype(x.dtype)
        low = jnp.tensordot(x, a, axes=self.num_inputs)
        return jnp.tensordot(low * jnp.asarray(self.scale, low.dtype), b, axes=1)


def adapter_for(config: LoraConfig | None, target: str, *args, **options) -> LoRA | None:
    """The adapter of a target, or None where it has none."""
    return LoRA(config, *args, target=target, **options) if config and target in config.targets else None


def is_factor(name: str) -> bool:
    """Whether the parameter of this name is trained in a run of adapters."""
    return PART in name and not name.endswith(NOISE)


def split_adapters(params: dict) -> tuple[dict, dict]:
    """(factors of adapters, what they are added to) of a pure dict of parameters, both without dropout's noise."""
    return select(params, is_factor), select(params, lambda name: PART not in name)


def with_noise(params: dict, config: LoraConfig, *, layers: int, seed: int, step: jax.Array) -> dict:
    """The parameters with what dropout draws from in this step; as they are where there is none."""
    if not config.dropout:
        return params
    numbers = jnp.stack([jnp.uint32(seed % 2**32), step.astype(jnp.uint32), jnp.uint32(0)])
    noise = jnp.concatenate([jnp.tile(numbers, (layers, 1)), jnp.arange(layers, dtype=jnp.uint32)[:, None]], axis=1)
    places = {name: place for name, place in _PLACES.items() if name in config.targets}
    trees = [{"layers": {block: {name: {"lora": {NOISE: noise}}}}} for name, block in places.items()]
    return join(params, *trees)


_PLACES = dict(zip(LORA_TARGETS, ("attention", "attention", "mlp", "mlp"), strict=True))


def of_microbatch(params, index: jax.Array):
    """The same parameters, of which dropout draws for this microbatch."""

    def number(name: str, leaf):
        return leaf.at[..., 2].set(index.astype(leaf.dtype)) if PART in name and name.endswith(NOISE) else leaf

    return map_named(number, params)


def without_dropout(config: LoraConfig | None) -> LoraConfig | None:
    """As it is when nothing is trained."""
    return None if config is None else dataclasses.replace(config, dropout=0.0)
