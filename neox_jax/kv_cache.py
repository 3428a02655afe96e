"""Keys and values of the tokens so far, read-only inside a step and written once after it.

SHAPES  L layers  B batch  N heads  H head dim  S cached length  T new tokens
Why this layout and a write after the layers: compiled for a v5e-8 at 20B, writing inside the scan over layers, or
other orders of the dims, cost a temporary as large as the cache; this costs none.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from neox_jax.sharding import constrain, partition_spec

LOGICAL = ("layers", "batch", "heads", "head_dim", "length")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """keys (rotated), values [L,B,N,H,S]; lengths [B] int32: how many positions of each row hold a token."""

    keys: jax.Array
    values: jax.Array
    lengths: jax.Array

    @classmethod
    def zeros(cls, *, layers: int, batch: int, heads: int, head_dim: int, length: int, dtype, mesh: Mesh | None = None):
        """An empty cache: heads over the mesh's `model`, rows over `data` x `fsdp`.

        Raises: InputError if the heads or the rows do not divide over the mesh.
        """
        empty = jnp.zeros((layers, batch, heads, head_dim, length), dtype)
        lengths = constrain(jnp.zeros(batch, jnp.int32), ("batch",), mesh)
        return cls(constrain(empty, LOGICAL, mesh), constrain(empty, LOGICAL, mesh), lengths)

    def fill(self, keys_LBTNH: jax.Array, values_LBTNH: jax.Array, lengths_B: jax.Array, mesh: Mesh | None = None):
        """The cache with these tokens from position 0 on, of which the first lengths[b] count."""

        def write(old, new):
            new = new.transpose(0, 1, 3, 4, 2).astype(old.dtype)
            return constrain(jax.lax.dynamic_update_slice(old, new, (0,) * 5), LOGICAL, mesh)

        return KVCache(write(self.keys, keys_LBTNH), write(self.values, values_LBTNH), lengths_B)

    def append(self, keys_LBNH: jax.Array, values_LBNH: jax.Array, num_new_B: jax.Array, mesh: Mesh | None = None):
        """The cache with a token more behind each row's own where num_new[b] is 1.

        What lies behind a row's length is never read, so a row that is done passes 0 and writes to no effect.
        """
        write = _write_rows
        if mesh is not None and mesh.size > 1:  # each device writes its own rows and heads: nothing is communicated
            cache = partition_spec(LOGICAL, mesh)
            rows = partition_spec(("batch",), mesh)
            write = jax.shard_map(write, mesh=mesh, in_specs=(cache, cache, rows), out_specs=cache)
        return KVCache(
            write(self.keys, keys_LBNH[..., None].astype(self.keys.dtype), self.lengths),
            write(self.values, values_LBNH[..., None].astype(self.values.dtype), self.lengths),
            self.lengths + num_new_B,
        )


def _write_rows(old_LBNHS, new_LBNH1, positions_B):
    """Writes one position of each row, in place.

    A loop, because dynamic_update_slice under vmap moves the rows in front (two copies of the cache), and a scatter is
    no cheaper, has its updates gathered over a mesh, and on the CPU turns a 16-bit cache into a float32 one.
    """

    def write_row(b, cache):
        new = jax.lax.dynamic_slice_in_dim(new_LBNH1, b, 1, axis=1)
        return jax.lax.dynamic_update_slice(cache, new, (0, b, 0, 0, positions_B[b]))

    return jax.lax.fori_loop(0, len(positions_B), write_row, old_LBNHS)
