"""Cross-entropy of the output head, without ever holding all logits.

SHAPES  B batch  T length  D model  V vocab (padded)  G groups of rows  Q groups of positions  C positions of a chunk
Rows in a group, and positions in a group, are on the same devices; a chunk takes a part of every group, so that no
device waits for another's chunk.
"""

import functools
import math

import jax
import jax.numpy as jnp

from neox_jax.attention import NEGATIVE
from neox_jax.sharding import RULES, constrain

CHUNK_BYTES = 128 * 2**20  # of float32 logits a chunk and device; 32 to 128 MiB measured alike on CPU


def cross_entropy_sum(
    hidden_BTD: jax.Array,
    head_VD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    *,
    vocab_size: int,
    mesh=None,
) -> jax.Array:
    """The weighted sum of -log p(target), in nats: float32, whatever the inputs' dtype.

    hidden: the final LayerNorm's output; head: rows beyond vocab_size take no part. Logits exist for a chunk of
    positions at a time, and where gradients are asked for they are made in the same pass, so that nothing is computed
    twice. Forward-mode differentiation is not defined.
    Shapes: hidden [B,T,D], head [V,D], targets [B,T] integers, weights [B,T] float32 -> [].
    """
    batch, length, _ = hidden_BTD.shape
    row_groups, position_groups = _groups(mesh, "batch", batch), _groups(mesh, "head_positions", length)
    num_devices = 1 if mesh is None else mesh.size
    per_group = length // position_groups
    wanted = 4 * batch * length * head_VD.shape[0] // (CHUNK_BYTES * num_devices) + 1
    chunks = next(n for n in range(min(wanted, per_group), per_group + 1) if per_group % n == 0)
    layout = (chunks, row_groups, position_groups, mesh)
    return _cross_entropy_sum(vocab_size, layout, hidden_BTD, head_VD, targets_BT, weights_BT)


def target_weights(counted_BT: jax.Array, *, rows: int = 0) -> jax.Array:
    """Weights under which the plain mean over all targets is the mean over those that count.

    rows: 0 for the mean over all counted targets; else, of each so many consecutive rows, the mean of their own means,
    those without any left out. Weights have the mean 1, so that whatever the batch is divided into is divided as one
    without masks is; where nothing counts they are 0, and so are the loss and its gradients.
    Shapes: counted [B,T] bool -> [B,T] float32.
    """
    counted_GRT = counted_BT.reshape(-1, rows or counted_BT.shape[0], counted_BT.shape[1])
    num_counted_G = counted_GRT.sum(axis=(1, 2), dtype=jnp.int32).astype(jnp.float32)
    num_groups = jnp.maximum((num_counted_G > 0).sum(), 1)
    weight_G = counted_BT.size / num_groups / jnp.maximum(num_counted_G, 1)
    return (counted_GRT * weight_G[:, None, None]).reshape(counted_BT.shape)


def _groups(mesh, logical: str, size: int) -> int:
    """Over how many devices the mesh spreads a dim of this logical axis."""
    parts = 1 if mesh is None else math.prod(mesh.shape.get(axis, 1) for axis in RULES[logical])
    return parts if size % parts == 0 else 1


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _cross_entropy_sum(vocab_size, layout, hidden, head, targets, weights):
    table = head.astype(hidden.dtype)

    def body(total, chunk):
        hidden_GBQCD, targets_GBQC, weights_GBQC = chunk
        _, losses_GBQC = _chunk_losses(hidden_GBQCD, table, targets_GBQC, vocab_size)
        return total + jnp.sum(losses_GBQC * weights_GBQC), None

    total, _ = jax.lax.scan(body, jnp.float32(0), _split(layout, hidden, targets, weights))
    return total


def _forward(vocab_size, layout, hidden, head, targets, weights):
    _, row_groups, _, mesh = layout
    table = head.astype(hidden.dtype)  # once, and not for every chunk
    summed = ("batch" if row_groups > 1 else None, "vocab", "hidden")

    def body(carry, chunk):
        total, head_gradient_GVD = carry
        hidden_GBQCD, targets_GBQC, weights_GBQC = chunk
        probabilities_GBQCV, losses_GBQC = _chunk_losses(hidden_GBQCD, table, targets_GBQC, vocab_size)
        is_target_GBQCV = jnp.arange(head.shape[0]) == targets_GBQC[..., None]
        gradient_GBQCV = ((probabilities_GBQCV - is_target_GBQCV) * weights_GBQC[..., None]).astype(hidden.dtype)
        hidden_gradient = jnp.einsum("GBQCV,VD->GBQCD", gradient_GBQCV, table)
        # A sum for each group of rows: one over all of them would be reduced over the devices at every chunk.
        head_gradient_GVD += jnp.einsum(
            "GBQCV,GBQCD->GVD", gradient_GBQCV, hidden_GBQCD, preferred_element_type=jnp.float32
        )
        head_gradient_GVD = constrain(head_gradient_GVD, summed, mesh)
        return (total + jnp.sum(losses_GBQC * weights_GBQC), head_gradient_GVD), hidden_gradient

    start = constrain(jnp.zeros((row_groups, *head.shape), jnp.float32), summed, mesh)
    (total, head_gradient), gradients = jax.lax.scan(
        body, (jnp.float32(0), start), _split(layout, hidden, targets, weights)
    )
    hidden_gradient = jnp.moveaxis(gradients, 0, 3).reshape(hidden.shape)
    return total, (hidden_gradient, head_gradient.sum(axis=0).astype(head.dtype))


def _backward(vocab_size, layout, gradients, upstream):
    hidden_gradient, head_gradient = gradients
    return (
        (upstream * hidden_gradient).astype(hidden_gradient.dtype),
        (upstream * head_gradient).astype(head_gradient.dtype),
        None,
        None,
    )


_cross_entropy_sum.defvjp(_forward, _backward)


def _split(layout, *arrays):
    """[B, T, ...] -> [chunks, G, B/G, Q, C, ...]."""
    chunks, row_groups, position_groups, mesh = layout

    def split(x):
        per_chunk = x.shape[1] // position_groups // chunks
        grouped = x.reshape(row_groups, -1, position_groups, chunks, per_chunk, *x.shape[2:])
        rows, positions = "batch" if row_groups > 1 else None, "head_positions" if position_groups > 1 else None
        axes = (rows, None, positions, None, None, *(None,) * (x.ndim - 2))
        return jnp.moveaxis(constrain(grouped, axes, mesh), 3, 0)

    return tuple(map(split, arrays))


def _chunk_losses(hidden, head_VD, targets, vocab_size):
    """Probabilities [..., V] and losses [...], float32. Shapes: hidden [..., D], targets [...]."""
    logits = jnp.einsum("...D,VD->...V", hidden, head_VD, preferred_element_type=jnp.float32)
    if head_VD.shape[0] != vocab_size:
        logits = jnp.where(jnp.arange(head_VD.shape[0]) < vocab_size, logits, NEGATIVE)
    log_normaliser = jax.nn.logsumexp(logits, axis=-1)
    target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jnp.exp(logits - log_normaliser[..., None]), log_normaliser - target
