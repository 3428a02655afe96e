"""Arrays that are written a part at a time, as Orbax lays them out, and read back so: of none more than a part is held.

The writing is TensorStore's and ours. Orbax's own writers of arrays stop waiting when the first write fails, on a full
disk for one, and the others go on in a folder that is being removed.
"""

import asyncio
import collections
import concurrent.futures
import dataclasses
import json
import math
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath

from neox_jax.checkpoint.steps import DamagedError
from neox_jax.tree import map_named

IN_FLIGHT_BYTES = 64 << 20  # handed to TensorStore and not yet written; one part at least


class Parts(Protocol):
    """What a `StreamedArray` is written from: its parts in any order, each with the index where it belongs."""

    def __call__(self) -> Iterator[tuple[tuple[slice | int, ...], np.ndarray]]: ...


@dataclasses.dataclass(frozen=True)
class StreamedArray:
    """A leaf to be written. chunks: the shape that is stored in one piece; a part must be of whole chunks."""

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
    """Writes `StreamedArray`s as Orbax does numpy arrays, in a thread. cancelled: set by whoever wants no more."""

    def __init__(self):
        super().__init__(deepcopy_host_arrays=False)
        self.cancelled = threading.Event()

    async def serialize(self, values, infos, args=None):
        thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="writing")
        written = thread.submit(self._write, values, infos)
        thread.shutdown(wait=False)
        return [written]

    def _write(self, values: list[StreamedArray], infos: list[ocp.type_handlers.ParamInfo]) -> None:
        # Each file would be waited for on its own; whoever commits the step syncs all of it.
        context = ts.Context({"file_io_sync": False})
        waiting, num_bytes, failed = collections.deque(), 0, None
        try:
            opened = [_open_to_write(value, info, context) for value, info in zip(values, infos, strict=True)]
            for value, array in zip(values, [future.result() for future in opened], strict=True):
                for index, part in value.parts():
                    while waiting and num_bytes + part.nbytes > IN_FLIGHT_BYTES:
                        future, size = waiting.popleft()
                        num_bytes -= size
                        future.result()
                    if self.cancelled.is_set():
                        raise concurrent.futures.CancelledError
                    future = array[index].write(part, can_reference_source_data_indefinitely=True)
                    waiting.append((future, part.nbytes))
                    num_bytes += part.nbytes
        except Exception as error:
            failed = error
            raise
        finally:
            # All of them, whatever came of the first: nothing may be written after this returns.
            errors = [error for future, _ in waiting if (error := future.commit.exception()) is not None]
            if errors and failed is None:
                raise errors[0]


def _open_to_write(value: StreamedArray, info: ocp.type_handlers.ParamInfo, context: ts.Context) -> ts.Future:
    """Opens an array in this process's own key-value store; `finalize` of Orbax's handler merges those of all."""
    process_id = jax.process_index()
    folder = {"driver": "file", "path": f"{info.parent_dir}/ocdbt.process_{process_id}/"}
    spec = {
        "driver": "zarr",
        "kvstore": {
            "driver": "ocdbt",
            "base": {**folder, "file_io_locking": {"mode": "non_atomic"}},
            "path": f"{info.name}/",
            # As Orbax has them, since it merges what is written here.
            "config": {"max_inline_value_bytes": 1024, "max_decoded_node_bytes": 10**8, "manifest_kind": "single"},
            "assume_config": True,
            "target_data_file_size": 2 << 30,
        },
        "metadata": {"shape": list(value.shape), "chunks": list(value.chunks), "compressor": None},
        "dtype": np.dtype(value.dtype).name,
        "store_data_equal_to_fill_value": True,  # a chunk that is missing is damage, not zeros
    }
    if process_id == 0:
        return ts.open(spec, create=True, open=True, context=context)
    return ts.open(spec, open=True, assume_metadata=True, context=context)


def params_handler(streamed: StreamedHandler) -> ocp.PyTreeCheckpointHandler:
    """Orbax's handler for a tree of `StreamedArray`s."""
    registry = ocp.type_handlers.create_type_handler_registry((StreamedArray, streamed))
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


def save_tree(
    handler: ocp.PyTreeCheckpointHandler, folder: Path, tree, *, interrupted: Callable[[], None] = lambda: None
) -> None:
    """Writes a tree into a folder. Whatever fails, nothing is written after this returns.

    Orbax's own `save` waits for no other of its writers (of metadata, which makes the folder where it is gone) once one
    has failed. interrupted: called on Ctrl-C, which comes here, and not into Orbax, whose own threads would go on.
    """

    async def save() -> None:
        failed = None
        for writing in await handler.async_save(epath.Path(folder), args=ocp.args.PyTreeSave(tree)) or ():
            try:
                writing.result()
            except Exception as error:
                failed = failed or error
        if failed is not None:
            raise failed

    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        try:
            thread.submit(asyncio.run, save()).result()
        except BaseException:
            interrupted()
            raise


def copy_to_host(tree):
    """A tree of jax arrays as one of `StreamedArray`s, of what this process has to write of them.

    A chunk is a device's share, of one layer where there are layers: a conversion or a hash reads one without others.
    """
    shards = jax.tree.map(lambda leaf: [one for one in leaf.addressable_shards if one.replica_id == 0], tree)
    for one in jax.tree.leaves(shards):
        one.data.copy_to_host_async()

    def to_streamed(name: str, leaf: jax.Array, mine: list) -> StreamedArray:
        chunks = leaf.sharding.shard_shape(leaf.shape)
        if "layers" in name.split("."):
            chunks = (1, *chunks[1:])
        # A donated buffer is not reused while numpy looks at it.
        parts = [(one.index, np.asarray(one.data)) for one in mine]
        return StreamedArray(leaf.shape, np.dtype(leaf.dtype), chunks, lambda: iter(parts))

    return map_named(to_streamed, tree, shards)


def read_about(folder: Path) -> dict:
    """What Orbax says of the arrays in a folder. Raises: DamagedError."""
    try:
        about = json.loads((folder / "_METADATA").read_text(encoding="utf-8"))
        about["tree_metadata"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _unreadable(folder, error) from error
    return about


def _unreadable(folder: Path, error: Exception) -> DamagedError:
    return DamagedError(f"{folder} cannot be read: {' '.join(str(error).split())[:300]}")


def read_leaves(folder: Path) -> dict[str, ts.TensorStore]:
    """Maps the name of each array that is stored in a folder, with dots as in the tree, to it, to read parts of.

    Raises: DamagedError where they cannot be opened.
    """
    about = read_about(folder)
    try:
        keys = [one["key_metadata"] for one in about["tree_metadata"].values() if not _is_empty(one)]
        driver = "zarr3" if about.get("use_zarr3", False) else "zarr"
        store = {"driver": "file", "path": f"{folder.absolute()}/"}
        names = sorted(".".join(str(key["key"]) for key in path) for path in keys)
        if about.get("use_ocdbt", True):
            places = {name: {"driver": "ocdbt", "base": store, "path": f"{name}/"} for name in names}
        else:
            places = {name: {**store, "path": f"{store['path']}{name}/"} for name in names}
        specs = {name: {"driver": driver, "kvstore": places[name]} for name in names}
        opened = {name: ts.open(spec, open=True, read=True) for name, spec in specs.items()}
        return {name: future.result() for name, future in opened.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _unreadable(folder, error) from error


def _is_empty(leaf: dict) -> bool:
    """Whether this is no array, but a part of an optimizer that has no state."""
    return leaf["value_metadata"]["skip_deserialize"]


def dtype_of(array) -> np.dtype:
    """Of TensorStore's, numpy's, jax's arrays, and abstract ones."""
    return np.dtype(getattr(array.dtype, "numpy_dtype", array.dtype))
