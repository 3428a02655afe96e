"""What a run is made of at one step: parameters, optimizer state and the number of steps attempted."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx, struct

from neox_jax.config import LoraConfig, ModelConfig
from neox_jax.lora import split_adapters
from neox_jax.model import NeoX, abstract_model, init_model
from neox_jax.sharding import replicated, spread


@struct.dataclass
class LossScale:
    """What float16 gradients are multiplied by, so that small ones do not vanish; every field is a scalar.

    scale: float32. hysteresis: how many overflows are borne before it is halved. attempts: so far; last_overflow: the
    attempt at which the last one was.
    """

    scale: jax.Array
    hysteresis: jax.Array
    attempts: jax.Array
    last_overflow: jax.Array


SCALE_START, SCALE_MIN, SCALE_WINDOW, HYSTERESIS = 2.0**12, 1.0, 1000, 2  # GPT-NeoX's settings for 20B and Pythia


def init_loss_scale() -> LossScale:
    return LossScale(jnp.float32(SCALE_START), jnp.int32(HYSTERESIS), jnp.int32(0), jnp.int32(-1))


def update_loss_scale(state: LossScale, finite: jax.Array) -> LossScale:
    """The rule of DeepSpeed's DynamicLossScaler.

    An overflow halves the scale, down to SCALE_MIN, once HYSTERESIS of them have been; SCALE_WINDOW attempts after the
    last one the scale doubles and the hysteresis is full again.
    """
    halved = jnp.maximum(state.scale / 2, SCALE_MIN)
    borne = state.hysteresis > 1
    window = (state.attempts - state.last_overflow) % SCALE_WINDOW == 0
    return LossScale(
        scale=jnp.where(finite, jnp.where(window, state.scale * 2, state.scale), jnp.where(borne, state.scale, halved)),
        hysteresis=jnp.where(
            finite,
            jnp.where(window, HYSTERESIS, state.hysteresis),
            jnp.where(borne, state.hysteresis - 1, state.hysteresis),
        ),
        attempts=state.attempts + 1,
        last_overflow=jnp.where(finite, state.last_overflow, state.attempts),
    )


@struct.dataclass
class TrainState:
    """params: pure dict of float32 master weights, or of adapters' factors alone; step: attempts so far, skipped ones
    included, int32 [].

    Completed updates are the optimizer state's own count; the schedule follows that. loss_scale: in float16 training.
    """

    step: jax.Array
    params: dict
    optimizer_state: Any
    loss_scale: LossScale | None = None


def pure_params(model: NeoX) -> dict:
    """The model's parameters as a nested pure dict of arrays."""
    return nnx.to_pure_dict(nnx.split(model)[1])


def abstract_state(
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    mesh,
    *,
    dtype: str = "float32",
    lora: LoraConfig | None = None,
) -> TrainState:
    """The state's shapes, dtypes and shardings. Each moment lives where its parameter does, and is cut over the
    replicas too (`data`): ZeRO-1. dtype: of the computation. lora: of the adapters that are trained alone.

    Raises: InputError if a dim does not divide over the mesh.
    """
    params = pure_params(abstract_model(config, mesh=mesh, lora=lora))
    if lora is not None:
        params, _ = split_adapters(params)
    optimizer_state = optax.tree_map_params(
        optimizer,
        lambda moment, param: jax.ShapeDtypeStruct(
            moment.shape, moment.dtype, sharding=spread(param.sharding, moment.shape, "data")
        ),
        jax.eval_shape(optimizer.init, params),
        params,
        transform_non_params=lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated(mesh)),
    )
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated(mesh))
    loss_scale = None
    if dtype == "float16":
        loss_scale = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated(mesh)),
            jax.eval_shape(init_loss_scale),
        )
    return TrainState(step=step, params=params, optimizer_state=optimizer_state, loss_scale=loss_scale)


def init_state(
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    mesh,
    *,
    seed: int,
    params: dict | None = None,
    dtype: str = "float32",
    lora: LoraConfig | None = None,
) -> TrainState:
    """A state at step 0, made on the mesh; `params` (in the mesh's shardings) replaces the initialisation."""
    abstract = abstract_state(config, optimizer, mesh, dtype=dtype, lora=lora)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    if params is None:
        # What is not among the results is not made.
        make = jax.jit(
            lambda: split_adapters(pure_params(NeoX(config, rngs=nnx.Rngs(seed), lora=lora)))[0],
            out_shardings=shardings.params,
        )
        params = pure_params(init_model(config, seed=seed, mesh=mesh)) if lora is None else make()
    make = jax.jit(
        lambda params: TrainState(
            step=jnp.int32(0),
            params=params,
            optimizer_state=optimizer.init(params),
            loss_scale=init_loss_scale() if dtype == "float16" else None,
        ),
        out_shardings=shardings,
    )
    return make(params)
