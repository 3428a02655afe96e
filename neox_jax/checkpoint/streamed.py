"""Arrays that Orbax writes a part at a time, and that are read back so: no more of them is held than a part or two."""

import asyncio
import dataclasses
import json
import math
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts


class Parts(Protocol):
    """What a `StreamedArray` is written from: its parts in any order, each with the index where it belongs."""

    def __call__(self) -> Iterator[tuple[tuple[slice | int, ...], np.ndarray]]: ...


@dataclasses.dataclass(frozen=True)
class StreamedArray:
    """A leaf for `save_params`. chunks: the shape that is stored in one piece; a part must be of whole chunks."""

    shape: tuple[int, ...]
    dtype: np.dtype
    chunks: tuple[int, ...]
    parts: Parts

    # What Orbax asks of an array before it writes it.
    ndim = property(lambda self: len(self.shape))
    size = property(lambda self: math.prod(self.shape))
    itemsize = property(lambda self: self.dtype.itemsize)
    nbytes = property(lambda self: self.size * self.itemsize)


class StreamedHandler(ocp.type_handlers.NumpyHandler):
    """Writes a `StreamedArray` as Orbax writes a numpy array, but by parts, and one array after the other.

    cancelled: set by whoever does not want the rest. error: what went wrong, for whoever waits for the save to raise:
    raised here, it would leave Orbax with coroutines that nobody awaits.
    """

    def __init__(self):
        super().__init__(deepcopy_host_arrays=False)
        self.cancelled, self.error = threading.Event(), None
        self._one_at_a_time = asyncio.Lock()

    async def _open_and_write(self, value, tspec, ts_context):
        tspec["metadata"]["chunks"] = list(value.chunks)
        # Each file would be waited for on its own; whoever moves the finished folder to its place syncs all of it.
        context = ts.Context({"file_io_sync": False}, parent=ts_context)
        async with self._one_at_a_time:
            try:
                array = await ts.open(ts.Spec(tspec), create=True, open=True, context=context)
                parts = value.parts()
                while not self.cancelled.is_set() and (part := next(parts, None)) is not None:
                    index, values = part
                    await array[index].write(values, can_reference_source_data_indefinitely=True)
            except Exception as error:
                self.error = self.error or error
                self.cancelled.set()


def params_handler(streamed: StreamedHandler) -> ocp.PyTreeCheckpointHandler:
    """Orbax's handler for a tree of `StreamedArray`s. Not compressed: weights hardly are by it, and it takes long."""
    registry = ocp.type_handlers.create_type_handler_registry((StreamedArray, streamed))
    return ocp.PyTreeCheckpointHandler(use_compression=False, type_handler_registry=registry)


def open_arrays(folder: Path, names: list[str]) -> dict[str, ts.TensorStore]:
    """Opens arrays that Orbax wrote under `folder`, for reading parts of them; names: as in the tree, with dots."""
    uses_zarr3 = json.loads((folder / "_METADATA").read_text(encoding="utf-8")).get("use_zarr3", False)
    base = {"driver": "ocdbt", "base": f"file://{folder.absolute()}"}
    specs = {
        name: {"driver": "zarr3" if uses_zarr3 else "zarr", "kvstore": {**base, "path": f"{name}/"}} for name in names
    }
    opened = {name: ts.open(spec, open=True, read=True) for name, spec in specs.items()}
    return {name: future.result() for name, future in opened.items()}
