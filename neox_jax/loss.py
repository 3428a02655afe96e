"""Cross-entropy of the output head, without ever holding all logits.

SHAPES  B batch  T length  D model  V vocab (padded)
"""

import functools

import jax
import jax.numpy as jnp

from neox_jax.attention import NEGATIVE

CHUNK_BYTES = 64 * 2**20  # of float32 logits a chunk and device; 32 to 128 MiB measured alike on CPU


def cross_entropy_sum(
    hidden_BTD: jax.Array,
    head_VD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    *,
    vocab_size: int,
    num_shards: int = 1,
) -> jax.Array:
    """The weighted sum of -log p(target), in nats: float32, whatever the inputs' dtype.

    hidden: the final LayerNorm's output; head: rows beyond vocab_size take no part; num_shards: over how many devices
    the logits spread. Logits exist for a chunk of positions at a time, and where gradients are asked for they are made
    in the same pass, so that nothing is computed twice. Forward-mode differentiation is not defined.
    Shapes: hidden [B,T,D], head [V,D], targets [B,T] integers, weights [B,T] float32 -> [].
    """
    batch, length, _ = hidden_BTD.shape
    wanted = 4 * batch * length * head_VD.shape[0] // (CHUNK_BYTES * num_shards) + 1
    chunks = next(n for n in range(min(wanted, length), length + 1) if length % n == 0)
    return _cross_entropy_sum(vocab_size, chunks, hidden_BTD, head_VD, targets_BT, weights_BT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _cross_entropy_sum(vocab_size, chunks, hidden, head, targets, weights):
    def body(total, chunk):
        hidden_BCD, targets_BC, weights_BC = chunk
        _, losses_BC = _chunk_losses(hidden_BCD, head, targets_BC, vocab_size)
        return total + jnp.sum(losses_BC * weights_BC), None

    total, _ = jax.lax.scan(body, jnp.float32(0), _split(chunks, hidden, targets, weights))
    return total


def _forward(vocab_size, chunks, hidden, head, targets, weights):
    def body(carry, chunk):
        total, head_gradient_VD = carry
        hidden_BCD, targets_BC, weights_BC = chunk
        probabilities_BCV, losses_BC = _chunk_losses(hidden_BCD, head, targets_BC, vocab_size)
        is_target_BCV = jnp.arange(head.shape[0]) == targets_BC[..., None]
        gradient_BCV = ((probabilities_BCV - is_target_BCV) * weights_BC[..., None]).astype(hidden.dtype)
        hidden_gradient_BCD = jnp.einsum("BCV,VD->BCD", gradient_BCV, head.astype(hidden.dtype))
        head_gradient_VD += jnp.einsum("BCV,BCD->VD", gradient_BCV, hidden_BCD, preferred_element_type=jnp.float32)
        return (total + jnp.sum(losses_BC * weights_BC), head_gradient_VD), hidden_gradient_BCD

    start = (jnp.float32(0), jnp.zeros(head.shape, jnp.float32))
    (total, head_gradient), hidden_gradients = jax.lax.scan(body, start, _split(chunks, hidden, targets, weights))
    hidden_gradient = jnp.moveaxis(hidden_gradients, 0, 1).reshape(hidden.shape)
    return total, (hidden_gradient, head_gradient.astype(head.dtype))


def _backward(vocab_size, chunks, gradients, upstream):
    hidden_gradient, head_gradient = gradients
    return (
        (upstream * hidden_gradient).astype(hidden_gradient.dtype),
        (upstream * head_gradient).astype(head_gradient.dtype),
        None,
        None,
    )


_cross_entropy_sum.defvjp(_forward, _backward)


def _split(chunks: int, *arrays):
    """[B, T, ...] -> [chunks, B, T / chunks, ...]: chunks of positions, so that the batch stays where it is sharded."""
    return tuple(jnp.moveaxis(x.reshape(x.shape[0], chunks, x.shape[1] // chunks, *x.shape[2:]), 1, 0) for x in arrays)


def _chunk_losses(hidden_BCD, head_VD, targets_BC, vocab_size):
    """Probabilities [B,C,V] and losses [B,C], float32."""
    logits_BCV = jnp.einsum(
        "BCD,VD->BCV", hidden_BCD, head_VD.astype(hidden_BCD.dtype), preferred_element_type=jnp.float32
    )
    if head_VD.shape[0] != vocab_size:
        logits_BCV = jnp.where(jnp.arange(head_VD.shape[0]) < vocab_size, logits_BCV, NEGATIVE)
    log_normaliser_BC = jax.nn.logsumexp(logits_BCV, axis=-1)
    target_BC = jnp.take_along_axis(logits_BCV, targets_BC[..., None], axis=-1)[..., 0]
    return jnp.exp(logits_BCV - log_normaliser_BC[..., None]), log_normaliser_BC - target_BC
