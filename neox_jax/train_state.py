"""What a run is made of at one step: parameters, optimizer state and the number of steps attempted."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx, struct

from neox_jax.config import ModelConfig
from neox_jax.model import NeoX, abstract_model, init_model
from neox_jax.sharding import replicated


@struct.dataclass
class TrainState:
    """params: pure dict of float32 master weights; step: attempts so far, skipped ones included, int32 [].

    Completed updates are the optimizer state's own count; the schedule follows that.
    """

    step: jax.Array
    params: dict
    optimizer_state: Any


def pure_params(model: NeoX) -> dict:
    """The model's parameters as a nested pure dict of arrays."""
    return nnx.to_pure_dict(nnx.split(model)[1])


def abstract_state(config: ModelConfig, optimizer: optax.GradientTransformation, mesh) -> TrainState:
    """The state's shapes, dtypes and shardings. Each moment lives where its parameter does.

    Raises: InputError if a dim does not divide over the mesh.
    """
    params = pure_params(abstract_model(config, mesh=mesh))
    optimizer_state = optax.tree_map_params(
        optimizer,
        lambda moment, param: jax.ShapeDtypeStruct(moment.shape, moment.dtype, sharding=param.sharding),
        jax.eval_shape(optimizer.init, params),
        params,
        transform_non_params=lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated(mesh)),
    )
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated(mesh))
    return TrainState(step=step, params=params, optimizer_state=optimizer_state)


def init_state(
    config: ModelConfig, optimizer: optax.GradientTransformation, mesh, *, seed: int, params: dict | None = None
) -> TrainState:
    """A state at step 0, made on the mesh; `params` (in the mesh's shardings) replaces the initialisation."""
    if params is None:
        params = pure_params(init_model(config, seed=seed, mesh=mesh))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, optimizer, mesh))
    make = jax.jit(
        lambda params: TrainState(step=jnp.int32(0), params=params, optimizer_state=optimizer.init(params)),
        out_shardings=shardings,
    )
    return make(params)
