"""SHA-256 of what a checkpoint holds, whatever mesh wrote it into whatever files; from memory the same as from disk."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from neox_jax.checkpoint.steps import DamagedError
from neox_jax.checkpoint.streamed import dtype_of, read_leaves

ITEMS = ("optimizer", "params")


def digest_step(step_folder: Path, progress: Callable[[int, int], None] | None = None) -> dict[str, str]:
    """The digests of a step, as `digest_arrays` makes them. progress: called with the bytes done, and of all.

    Raises: DamagedError where something cannot be read.
    """
    arrays = {item: read_leaves(step_folder / item) for item in ITEMS if (step_folder / item).is_dir()}
    try:
        return digest_arrays(arrays, progress)
    except ValueError as error:  # TensorStore's
        raise DamagedError(f"{step_folder} cannot be read: {' '.join(str(error).split())[:300]}") from error


def digest_arrays(arrays: dict[str, dict], progress: Callable[[int, int], None] | None = None) -> dict[str, str]:
    """SHA-256 in hex of `params`, and of the whole `state` where there is an `optimizer`.

    arrays: by item and name; numpy's, jax's or TensorStore's, of which one chunk of rows at a time is read. What is
    hashed, in the order of items and names: "ITEM.NAME DTYPE SHAPE", a newline, the values in C order, little-endian.
    """
    state, params = hashlib.sha256(), hashlib.sha256()
    total, done = sum(_num_bytes(one) for item in arrays.values() for one in item.values()), 0
    for item, named in sorted(arrays.items()):
        digests = [state, params] if item == "params" else [state]
        for name, array in sorted(named.items()):
            header = f"{item}.{name} {dtype_of(array).name} {list(array.shape)}\n".encode()
            for digest in digests:
                digest.update(header)
            for block in _blocks(array):
                for digest in digests:
                    digest.update(block.reshape(-1).view(np.uint8).data)
                done += block.nbytes
                if progress is not None:
                    progress(done, total)
    found = {"params": params.hexdigest()}
    return {"state": state.hexdigest(), **found} if "optimizer" in arrays else found


def _blocks(array):
    """Rows of an array, as many as are stored in one chunk."""
    if not array.shape:
        yield np.ascontiguousarray(array)
        return
    layout = getattr(array, "chunk_layout", None)
    rows = max(1, array.shape[0]) if layout is None else layout.read_chunk.shape[0]
    for start in range(0, array.shape[0], rows):
        yield np.ascontiguousarray(array[start : min(start + rows, array.shape[0])])


def _num_bytes(array) -> int:
    return int(np.prod(array.shape, dtype=np.int64)) * dtype_of(array).itemsize
