"""Rotary position embedding on the first dims of each head.

SHAPES  B batch  T length  N heads  H head dim  R rotated dims
"""

import jax
import jax.numpy as jnp


def rotary_tables(positions: jax.Array, *, base: float, rotary_dim: int, dtype) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of each position's angles, float32 inside, in `dtype` as Hugging Face does.

    Shapes: positions [T] or [B, T] in tokens from 0 -> two of [T or B T, R/2].   Source: arXiv:2204.06745.
    """
    inverse_frequencies = base ** (-jnp.arange(0, rotary_dim, 2, dtype=jnp.float32) / rotary_dim)
    angles = positions[..., None].astype(jnp.float32) * inverse_frequencies
    return jnp.cos(angles).astype(dtype), jnp.sin(angles).astype(dtype)


def apply_rotary(x_BTNH: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates the first R dims of each head, R twice the tables' width: dim i with dim i + R/2 (half split).

    Shapes: x [B,T,N,H], tables two of [T, R/2] or [B,T,R/2] -> [B,T,N,H] in x.dtype.
    """
    cos, sin = (table[..., None, :] for table in tables)
    half = cos.shape[-1]
    first, second, rest = x_BTNH[..., :half], x_BTNH[..., half : 2 * half], x_BTNH[..., 2 * half :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)
