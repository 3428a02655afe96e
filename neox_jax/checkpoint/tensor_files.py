"""Arrays as zarr files of which each holds one layer, its dims in any order: how a conversion lays out a run.

A file is what a shard is in zarr 3: chunks of whole rows, one after the other, and an index of where they begin. So it
holds the bytes of the tensor that a layer was converted from, and an ending: they are written, and hashed, as they
come, and Orbax and zarr's own tools read the array in our shape.
"""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from neox_jax.checkpoint.streamed import save_tree

CHUNK_BYTES = 16 << 20  # what is read at least, of an array of which a part is wanted


@dataclasses.dataclass(frozen=True)
class FiledArray:
    """An array in such files. stacked: whether its first dim is the layer, else all of it is one file. order: of the
    dims of a layer as they are in the file, from the outermost in."""

    shape: tuple[int, ...]
    dtype: np.dtype
    stacked: bool
    order: tuple[int, ...]

    # What Orbax asks of an array before it writes it.
    ndim = property(lambda self: len(self.shape))
    size = property(lambda self: math.prod(self.shape))
    itemsize = property(lambda self: self.dtype.itemsize)
    nbytes = property(lambda self: self.size * self.itemsize)

    def path(self, layer: int | None) -> str:
        """The file of a layer (None: of all) in the array's folder."""
        return ".".join(["c", *([] if layer is None else [str(layer)]), *(["0"] * len(self._layer))])

    def ending(self) -> bytes:
        """What a file has after the layer's bytes: zeros until the last chunk is whole, and the index."""
        num_chunks = -(-self._layer[self.order[0]] // self._num_rows)
        chunk_bytes = math.prod(self._cut(self._num_rows)) * self.itemsize
        padding = bytes(num_chunks * chunk_bytes - math.prod(self._layer) * self.itemsize)
        index = [(i * chunk_bytes, chunk_bytes) for i in range(num_chunks)]
        return padding + np.array(index, "<u8").tobytes()

    def is_in(self, folder: Path) -> bool:
        """Whether an array's folder says that it is laid out so. Raises: OSError, ValueError."""
        found = json.loads((folder / "zarr.json").read_text(encoding="utf-8"))
        return all(found.get(key) == value for key, value in self.metadata().items())

    def metadata(self) -> dict:
        """What zarr.json says."""
        layer = (1,) if self.stacked else ()
        first = len(layer)
        num_chunks = -(-self._layer[self.order[0]] // self._num_rows)
        transposed = [*range(first), *(first + dim for dim in self.order)]
        little = {"name": "bytes", "configuration": {"endian": "little"}}
        inner = {
            "chunk_shape": [*layer, *self._cut(self._num_rows)],
            "codecs": [{"name": "transpose", "configuration": {"order": transposed}}, little],
            "index_codecs": [little],
        }
        file_shape = [*layer, *self._cut(num_chunks * self._num_rows)]
        return {
            "shape": list(self.shape),
            "data_type": self.dtype.name,
            "fill_value": 0,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": file_shape}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
            "codecs": [{"name": "sharding_indexed", "configuration": inner}],
        }

    @property
    def _layer(self) -> tuple[int, ...]:
        return self.shape[1:] if self.stacked else self.shape

    @property
    def _num_rows(self) -> int:
        """Of the file's outermost dim in a chunk."""
        size = self._layer[self.order[0]]
        row_bytes = math.prod(self._layer) * self.itemsize // size
        return min(size, max(1, CHUNK_BYTES // row_bytes))

    def _cut(self, num_rows: int) -> tuple[int, ...]:
        """The shape of a layer with so many rows."""
        return tuple(num_rows if dim == self.order[0] else size for dim, size in enumerate(self._layer))


class _Handler(ocp.type_handlers.NumpyHandler):
    """Has Orbax make arrays whose files somebody else writes."""

    async def serialize(self, values, infos, args=None):
        for value, info in zip(values, infos, strict=True):
            folder = {"driver": "file", "path": f"{info.parent_dir}/{info.name}/"}
            await ts.open({"driver": "zarr3", "kvstore": folder, "metadata": value.metadata()}, create=True)
        return []


def create_arrays(folder: Path, tree) -> ocp.PyTreeCheckpointHandler:
    """Writes all of a tree of `FiledArray`s but its files, and returns Orbax's handler of it."""
    registry = ocp.type_handlers.create_type_handler_registry((FiledArray, _Handler()))
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=True, type_handler_registry=registry)
    save_tree(handler, folder, tree)
    return handler
