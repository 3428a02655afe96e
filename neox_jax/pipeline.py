"""Pipeline parallelism as one program: all stages run at once, each on another microbatch.

SHAPES  S stages  M microbatches  B rows of a microbatch  T length  D model  L layers
The stacked layers [L, ...] are [S, L/S, ...], a stage to each slice of the mesh's `pipe` axis. An iteration runs every
stage on what its predecessor gave in the one before, then hands it on; after M + S - 1 iterations all microbatches are
through. Stages without a microbatch yet, or no more, compute on zeros: the bubble, (S - 1) / (M + S - 1) of the time.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from neox_jax.model import REMAT_POLICIES, Layer, NeoX, gather_positions, run_layers, scatter_positions
from neox_jax.sharding import constrain, positions_axis


def bubble(num_stages: int, microbatches: int) -> float:
    """The share of a step in which a stage waits."""
    return (num_stages - 1) / (microbatches + num_stages - 1)


def pipelined_hidden(
    model: NeoX, layers: Layer, tokens_MBT, segment_ids_MBT=None, *, cast: Callable, remat: str, attention: str
) -> jax.Array:
    """The final LayerNorm's output for each microbatch. Shapes: [M,B,T] -> [M,B,T,D].

    layers: the master weights; cast(layers, iteration) makes of them what is computed with, so that gradients are
    summed over microbatches in the masters' dtype.
    """
    mesh, num_stages = model.mesh, model.mesh.shape["pipe"]
    microbatches = tokens_MBT.shape[0]
    tables = model.rotary_tables(jnp.arange(tokens_MBT.shape[-1]))
    stages = jax.tree.map(functools.partial(_split_stages, num_stages=num_stages), layers)

    def run_stage(layers, x_BTD, segment_ids_BT, iteration):
        attend = functools.partial(model.attend(attention), segment_ids_BT=segment_ids_BT)
        return run_layers(
            cast(layers, iteration), x_BTD, tables, attend, mesh, remat="none" if remat == "full" else remat
        )

    if remat == "full":
        # Of each microbatch a stage keeps what came in, and not what went into each of its layers: every microbatch of
        # a step is in flight, which would be most of the memory.
        run_stage = jax.checkpoint(run_stage, policy=REMAT_POLICIES[remat], prevent_cse=False)
    run_stages = jax.vmap(run_stage, in_axes=(0, 0, 0, None), spmd_axis_name="pipe")

    def iterate(carry, iteration):
        x_SBTD, segment_ids_SBT = carry
        now = jnp.minimum(iteration, microbatches - 1)
        x_SBTD = _hand_on(x_SBTD, model.embed(tokens_MBT[now]), mesh)
        if segment_ids_SBT is not None:
            segment_ids_SBT = jnp.roll(segment_ids_SBT, 1, axis=0).at[0].set(segment_ids_MBT[now])
        x_SBTD = _pin(run_stages(stages, x_SBTD, segment_ids_SBT, iteration), mesh)
        return (x_SBTD, segment_ids_SBT), scatter_positions(x_SBTD[-1], mesh)

    embedded = jax.eval_shape(model.embed, tokens_MBT[0])
    start = _pin(jnp.zeros((num_stages, *embedded.shape), embedded.dtype), mesh)
    segments = None if segment_ids_MBT is None else jnp.zeros((num_stages, *tokens_MBT.shape[1:]), jnp.int32)
    _, out = jax.lax.scan(iterate, (start, segments), jnp.arange(microbatches + num_stages - 1))
    return model.final_layer_norm(jax.vmap(lambda x_BTD: gather_positions(x_BTD, mesh))(out[num_stages - 1 :]))


def _split_stages(leaf: jax.Array, *, num_stages: int) -> jax.Array:
    return leaf.reshape(num_stages, leaf.shape[0] // num_stages, *leaf.shape[1:])


def _hand_on(x_SBTD: jax.Array, first_BTD: jax.Array, mesh) -> jax.Array:
    """Each stage gets its predecessor's output, the first one a new microbatch."""
    return _pin(jnp.roll(x_SBTD, 1, axis=0).at[0].set(first_BTD), mesh)


def _pin(x_SBTD: jax.Array, mesh) -> jax.Array:
    return constrain(x_SBTD, ("stages", "batch", positions_axis(x_SBTD.shape[2], mesh), "hidden"), mesh)
