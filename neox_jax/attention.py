"""Attention under one contract.

SHAPES  B batch  T query length  S key length  U new keys beside a cache (as T)  N heads  H head dim
"""

import jax
import jax.numpy as jnp

NEGATIVE = -1e30  # a mask value that stays finite in float32, so that no row becomes NaN


def causal_attention(
    q_BTNH: jax.Array, k_BTNH: jax.Array, v_BTNH: jax.Array, *, segment_ids_BT: jax.Array | None = None
) -> jax.Array:
    """Each token attends to itself and to those before it, of its own segment where segments are given.

    Scores and softmax are float32 whatever the inputs are (float16 scores overflow on the small Pythias).
    Shapes: q, k, v [B,T,N,H], segment_ids [B,T] integers -> [B,T,N,H] in v.dtype.
    """
    length = q_BTNH.shape[1]
    scores_BNTS = jnp.einsum("BTNH,BSNH->BNTS", q_BTNH, k_BTNH, preferred_element_type=jnp.float32)
    mask = jnp.tril(jnp.ones((length, length), bool))
    if segment_ids_BT is not None:
        mask = mask & (segment_ids_BT[:, None, :, None] == segment_ids_BT[:, None, None, :])
    scores_BNTS = jnp.where(mask, scores_BNTS * q_BTNH.shape[-1] ** -0.5, NEGATIVE)
    weights_BNTS = jax.nn.softmax(scores_BNTS, axis=-1).astype(v_BTNH.dtype)
    return jnp.einsum("BNTS,BSNH->BTNH", weights_BNTS, v_BTNH)


def cached_attention(
    q_BTNH: jax.Array,
    k_BTNH: jax.Array,
    v_BTNH: jax.Array,
    *,
    keys_BNHS: jax.Array,
    values_BNHS: jax.Array,
    lengths_B: jax.Array,
) -> jax.Array:
    """New tokens attend to the first lengths[b] cached ones, to those new before them and to themselves.

    The cache is only read: the new tokens' own keys and values come beside it, and the two softmaxes are one through
    a common maximum and sum. Scores and softmax are float32.
    Shapes: q, k, v [B,T,N,H] of the new tokens, keys, values [B,N,H,S], lengths [B] -> [B,T,N,H] in v.dtype.
    """
    scale = q_BTNH.shape[-1] ** -0.5
    cached_BNTS = jnp.einsum("BTNH,BNHS->BNTS", q_BTNH, keys_BNHS, preferred_element_type=jnp.float32) * scale
    filled_BS = jnp.arange(keys_BNHS.shape[-1]) < lengths_B[:, None]
    cached_BNTS = jnp.where(filled_BS[:, None, None], cached_BNTS, NEGATIVE)
    new_BNTU = jnp.einsum("BTNH,BUNH->BNTU", q_BTNH, k_BTNH, preferred_element_type=jnp.float32) * scale
    new_BNTU = jnp.where(jnp.tril(jnp.ones(new_BNTU.shape[-2:], bool)), new_BNTU, NEGATIVE)

    highest = jnp.maximum(cached_BNTS.max(-1, keepdims=True), new_BNTU.max(-1, keepdims=True))
    cached_BNTS, new_BNTU = jnp.exp(cached_BNTS - highest), jnp.exp(new_BNTU - highest)
    total = cached_BNTS.sum(-1, keepdims=True) + new_BNTU.sum(-1, keepdims=True)
    cached_BNTS, new_BNTU = ((part / total).astype(v_BTNH.dtype) for part in (cached_BNTS, new_BNTU))
    out_BTNH = jnp.einsum("BNTS,BNHS->BTNH", cached_BNTS, values_BNHS, preferred_element_type=jnp.float32)
    out_BTNH += jnp.einsum("BNTU,BUNH->BTNH", new_BNTU, v_BTNH, preferred_element_type=jnp.float32)
    return out_BTNH.astype(v_BTNH.dtype)
