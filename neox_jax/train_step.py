"""One step of training, pure: state and batch in, state and metrics out.

SHAPES  B batch  T length  M microbatches
"""

import functools

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from neox_jax.config import Config, ModelConfig
from neox_jax.loss import cross_entropy_sum
from neox_jax.model import NeoX, abstract_model
from neox_jax.optimizer import num_updates
from neox_jax.sharding import constrain
from neox_jax.train_state import TrainState
from neox_jax.tree import is_decayed, map_named


def cast_kernels(params, dtype):
    """Kernels and tables in the compute dtype; biases and norms stay float32 (they are tiny, and added in float32)."""
    return map_named(lambda name, leaf: leaf.astype(dtype) if is_decayed(name) else leaf, params)


def next_token_loss(model: NeoX, tokens: jax.Array, *, remat: str = "none") -> jax.Array:
    """The mean loss in nats of predicting tokens [B, T + 1] from those before them. Shapes: [B,T+1] -> []."""
    inputs_BT, targets_BT = tokens[:, :-1], tokens[:, 1:]
    hidden_BTD = model.hidden(constrain(inputs_BT, ("batch", "length"), model.mesh), remat=remat)
    total = cross_entropy_sum(
        hidden_BTD,
        model.head,
        targets_BT,
        jnp.ones(targets_BT.shape, jnp.float32),
        vocab_size=model.config.vocab_size,
        num_shards=1 if model.mesh is None else model.mesh.size,
    )
    return total / targets_BT.size


def split_microbatches(tokens: jax.Array, microbatches: int, mesh) -> jax.Array:
    """Microbatch m takes rows m, m + M, m + 2M ..., so that every device keeps the rows it has.

    Shapes: [B,T] -> [M,B/M,T].
    """
    split_MBT = tokens.reshape(-1, microbatches, tokens.shape[-1]).swapaxes(0, 1)
    return constrain(split_MBT, (None, "batch", "length"), mesh)


def accumulate_gradients(loss_fn, params, tokens: jax.Array, microbatches: int, mesh):
    """Loss and float32 gradients, the batch divided into microbatches that are summed in float32."""
    value_and_grad = jax.value_and_grad(loss_fn)
    if microbatches == 1:
        return value_and_grad(params, tokens)

    def body(carry, tokens_BT):
        return jax.tree.map(jnp.add, carry, value_and_grad(params, tokens_BT)), None

    zeros = (jnp.float32(0), jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params))
    total, _ = jax.lax.scan(body, zeros, split_microbatches(tokens, microbatches, mesh))
    return jax.tree.map(lambda x: x / microbatches, total)


def train_step(
    state: TrainState, tokens: jax.Array, *, graphdef, optimizer, schedule, dtype, remat, microbatches, mesh
):
    """Applies one update, or none where the loss or the gradient norm is not finite.

    Shapes: tokens [B,T+1]. Metrics (float32 []): loss and grad_norm (before clipping) of this batch, learning_rate
    used, skipped (0 or 1). A skipped step changes nothing but `step`: the schedule and every moment stay.
    """

    def loss_fn(params, tokens):
        model = nnx.merge(graphdef, cast_kernels(params, dtype))
        return next_token_loss(model, tokens, remat=remat)

    loss, gradients = accumulate_gradients(loss_fn, state.params, tokens, microbatches, mesh)
    grad_norm = optax.tree.norm(gradients)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    updates, optimizer_state = optimizer.update(gradients, state.optimizer_state, state.params)
    new = (optax.apply_updates(state.params, updates), optimizer_state)
    params, optimizer_state = jax.tree.map(
        functools.partial(jnp.where, finite), new, (state.params, state.optimizer_state)
    )
    metrics = {
        "loss": loss,
        "grad_norm": grad_norm,
        "learning_rate": schedule(num_updates(state.optimizer_state)),
        "skipped": 1 - finite.astype(jnp.int32),
    }
    return TrainState(step=state.step + 1, params=params, optimizer_state=optimizer_state), metrics


def make_train_step(config: Config, *, optimizer, schedule, mesh, state_shardings):
    """Jits `train_step` for a run: the state donated and kept where it lives."""
    step = functools.partial(
        train_step,
        graphdef=model_graph(config.model, mesh),
        optimizer=optimizer,
        schedule=schedule,
        dtype=jnp.dtype(config.train.dtype),
        remat=config.train.remat,
        microbatches=config.train.microbatches,
        mesh=mesh,
    )
    return jax.jit(step, donate_argnums=0, out_shardings=(state_shardings, None))


def make_eval_step(config: Config, *, mesh):
    """Jits the loss alone: (params, tokens [B,T+1]) -> mean nats a token, float32 []."""
    graphdef, dtype = model_graph(config.model, mesh), jnp.dtype(config.train.dtype)

    def eval_step(params, tokens):
        model = nnx.merge(graphdef, cast_kernels(params, dtype))
        split_MBT = split_microbatches(tokens, config.train.microbatches, mesh)
        return jnp.mean(jax.lax.map(lambda tokens_BT: next_token_loss(model, tokens_BT), split_MBT))

    return jax.jit(eval_step)


def model_graph(config: ModelConfig, mesh):
    """The model without its arrays, to merge parameters into at trace time."""
    return nnx.split(abstract_model(config, mesh=mesh))[0]
