"""Keys and values of the tokens so far, read-only inside a step and written once after it.

SHAPES  L layers  B batch (slots)  N heads  H head dim  S cached length  T new tokens  R new rows
Why this layout and a write after the layers: compiled for a v5e-8 at 20B, writing inside the scan over layers, or
other orders of the dims, cost a temporary as large as the cache; this costs none.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from neox_jax.sharding import constrain, partition_spec

LOGICAL = ("layers", "batch", "heads", "head_dim", "length")
SCALES_LOGICAL = ("layers", "batch", "heads", "length")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """keys (rotated), values [L,B,N,H,S]; lengths [B] int32: how many positions of each row hold a token.

    In an int8 cache each head of each position has a scale, key_scales, value_scales [L,B,N,S] float32; else None.
    """

    keys: jax.Array
    values: jax.Array
    lengths: jax.Array
    key_scales: jax.Array | None = None
    value_scales: jax.Array | None = None

    @classmethod
    def zeros(cls, *, layers: int, batch: int, heads: int, head_dim: int, length: int, dtype, mesh: Mesh | None = None):
        """An empty cache: heads over the mesh's `model`, rows over `data` x `fsdp`.

        Raises: InputError if the heads or the rows do not divide over the mesh.
        """

        def empty(logical, dtype):
            sizes = {"layers": layers, "batch": batch, "heads": heads, "head_dim": head_dim, "length": length}
            return constrain(jnp.zeros([sizes[axis] for axis in logical], dtype), logical, mesh)

        parts = [empty(LOGICAL, dtype), empty(LOGICAL, dtype), empty(("batch",), jnp.int32)]
        if dtype == jnp.int8:
            parts += [empty(SCALES_LOGICAL, jnp.float32), empty(SCALES_LOGICAL, jnp.float32)]
        return cls(*parts)

    @property
    def layers(self) -> tuple:
        """What a scan over layers reads of it, as `attention.cached_attention` takes it."""
        return self.keys, self.values, self.key_scales, self.value_scales

    def insert(self, keys_LRTNH, values_LRTNH, lengths_R, slots_R, mesh: Mesh | None = None) -> "KVCache":
        """The cache with these rows in these slots, from position 0 on, of which the first lengths[r] tokens count."""
        new = self._stored(keys_LRTNH, values_LRTNH)
        written = [
            _write(old, part, slots_R, mesh, into_slots=True) for old, part in zip(self.layers, new, strict=True)
        ]
        lengths = constrain(self.lengths.at[slots_R].set(lengths_R), ("batch",), mesh)
        return KVCache(*written[:2], lengths, *written[2:])

    def append(self, keys_LBTNH, values_LBTNH, num_new_B, mesh: Mesh | None = None) -> "KVCache":
        """The cache with the first num_new[b] of these T tokens behind each row's own.

        What lies behind a row's length is never read, so all T are written: there must be room for them.
        """
        new = self._stored(keys_LBTNH, values_LBTNH)
        written = [_write(old, part, self.lengths, mesh) for old, part in zip(self.layers, new, strict=True)]
        return KVCache(*written[:2], self.lengths + num_new_B, *written[2:])

    def _stored(self, keys_LBTNH, values_LBTNH) -> tuple:
        """New keys, values and their scales, as they are kept: [L,B,N,H,T] and [L,B,N,T]."""
        parts = [x.transpose(0, 1, 3, 4, 2) for x in (keys_LBTNH, values_LBTNH)]
        if self.key_scales is None:
            return (*(part.astype(self.keys.dtype) for part in parts), None, None)
        (keys, key_scales), (values, value_scales) = map(_quantize, parts)
        return keys, values, key_scales, value_scales


def _quantize(x_LBNHT) -> tuple[jax.Array, jax.Array]:
    """int8 and a scale for each head of each position."""
    x_LBNHT = x_LBNHT.astype(jnp.float32)
    scales_LBNT = jnp.max(jnp.abs(x_LBNHT), axis=3) / 127
    divisors = jnp.where(scales_LBNT == 0, 1, scales_LBNT)[:, :, :, None]
    return jnp.round(x_LBNHT / divisors).astype(jnp.int8), scales_LBNT


def _write(old, new, places, mesh: Mesh | None, *, into_slots: bool = False):
    """Writes in place: row r of new into slot places[r], or behind position places[r] of the same row.

    Each device writes its own rows and heads; only rows that go into slots are sent to all of them.
    """
    if old is None:
        return None
    write = _write_slots if into_slots else _write_rows
    if mesh is None or mesh.size == 1:
        return write(old, new, places, 0)
    logical = LOGICAL if old.ndim == 5 else SCALES_LOGICAL
    cache, rows = partition_spec(logical, mesh), partition_spec(("batch",), mesh)
    axes = rows[0] if rows else None
    local_rows = old.shape[1] // math.prod(mesh.shape[a] for a in (axes if isinstance(axes, tuple) else (axes,)) if a)

    def on_device(old, new, places):
        first = 0 if axes is None else jax.lax.axis_index(axes) * local_rows
        return write(old, new, places, first)

    new_spec = partition_spec((logical[0], None, *logical[2:]), mesh) if into_slots else cache
    places_spec = partition_spec((None,), mesh) if into_slots else rows
    return jax.shard_map(
        on_device, mesh=mesh, in_specs=(cache, new_spec, places_spec), out_specs=cache, check_vma=False
    )(old, new, places)


def _write_rows(old, new, positions_B, first):
    """Writes new positions of each row.

    A loop, because dynamic_update_slice under vmap moves the rows in front (two copies of the cache), and a scatter is
    no cheaper, has its updates gathered over a mesh, and on the CPU turns a 16-bit cache into a float32 one.
    """

    def write_row(b, cache):
        row = jax.lax.dynamic_slice_in_dim(new, b, 1, axis=1)
        return jax.lax.dynamic_update_slice(cache, row, (0, b, *(0,) * (old.ndim - 3), positions_B[b]))

    return jax.lax.fori_loop(0, len(positions_B), write_row, old)


def _write_slots(old, new, slots_R, first):
    """Writes whole rows; first: the slot that this device's rows begin with."""

    def write_row(r, cache):
        slot = slots_R[r] - first
        mine = (slot >= 0) & (slot < old.shape[1])
        start = (0, jnp.clip(slot, 0, old.shape[1] - 1), *(0,) * (old.ndim - 2))
        row = jax.lax.dynamic_slice_in_dim(new, r, 1, axis=1)
        there = jax.lax.dynamic_slice(cache, start, row.shape)
        return jax.lax.dynamic_update_slice(cache, jnp.where(mine, row, there), start)

    return jax.lax.fori_loop(0, len(slots_R), write_row, old)
