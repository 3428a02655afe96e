"""AdamW and the learning-rate schedules of GPT-NeoX."""

import jax.numpy as jnp
import optax

from neox_jax.config import OptimizerConfig
from neox_jax.errors import InputError
from neox_jax.tree import is_decayed, map_named


def make_schedule(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """n, the completed updates before this one -> its learning rate.

    cosine_floor: gpt-neox v1.0's rule, which trained GPT-NeoX-20B and Pythia. Warm-up peak*n/W (the first update has
      rate 0); then max(min, peak/2 * (cos(pi*m/T) + 1)) with m = min(n, T - W) - W: the cosine spans all T steps.
    cosine: the rule of gpt-neox's head. Warm-up peak*max(1, n)/W; then a cosine from peak to min over the T - W steps
      that are left, min beyond them.
    linear: the same warm-up, then a straight line to min. constant: the same warm-up, then peak.
    Raises: InputError if the warm-up is not shorter than the run.
    """
    peak, floor, warmup, total = config.learning_rate, config.min_learning_rate, config.warmup_steps, total_steps
    if not 0 <= warmup < total:
        raise InputError(
            f"optimizer.warmup_steps {warmup} is not between 0 and train.steps {total} - 1; warm up for "
            f"{max(0, total // 100)} steps (1%), say"
        )

    def cosine_floor(n):
        m = jnp.minimum(n, total - warmup) - warmup
        decayed = jnp.maximum(floor, peak / 2 * (jnp.cos(jnp.pi * m / total) + 1))
        return jnp.where(n < warmup, peak * n / max(warmup, 1), decayed)

    def after_warmup(decay):
        def schedule(n):
            fraction = jnp.clip((n - warmup) / (total - warmup), 0, 1)
            return jnp.where(n < warmup, peak * jnp.maximum(1, n) / max(warmup, 1), decay(fraction))

        return schedule

    return {
        "cosine_floor": cosine_floor,
        "cosine": after_warmup(lambda f: floor + (peak - floor) / 2 * (jnp.cos(jnp.pi * f) + 1)),
        "linear": after_warmup(lambda f: peak + (floor - peak) * f),
        "constant": after_warmup(lambda f: peak),
    }[config.schedule]


def make_optimizer(config: OptimizerConfig, total_steps: int) -> optax.GradientTransformation:
    """AdamW after a global-norm clip (clip_norm 0: none); biases and norms are not decayed, embeddings are."""
    clip = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    return optax.chain(
        *clip,
        optax.adamw(
            make_schedule(config, total_steps),
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=lambda params: map_named(lambda name, _: is_decayed(name), params),
        ),
    )


def num_updates(optimizer_state) -> jnp.ndarray:
    """Completed, unskipped updates: what the schedule counts."""
    return optax.tree.get(optimizer_state, "count", filtering=lambda path, _: "ScaleByAdamState" in str(path))
