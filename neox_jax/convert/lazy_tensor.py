"""Tensors in a file, of which all or a part is read when it is asked for."""

import math
from collections.abc import Iterator

import numpy as np

from neox_jax.convert.byte_reader import CHUNK_BYTES, ByteReader, RawBytes


class LazyTensor:
    """A tensor in a file: `shape`, `dtype` and a way to read all or part of it."""

    __slots__ = ("_reader", "_start", "_strides", "dtype", "shape")

    def __init__(
        self, reader: ByteReader, start: int, shape: tuple[int, ...], strides: tuple[int, ...] | None, dtype: np.dtype
    ):
        """start: in bytes. strides: in elements, or None for a contiguous tensor. Whoever makes one has checked that
        it lies in the reader, that `is_representable`, and that dims do not overlap, other than by a stride of 0."""
        self.shape, self.dtype = shape, dtype
        self._reader, self._start = reader, start
        self._strides = contiguous_strides(shape) if strides is None else strides

    def __repr__(self) -> str:
        return f"LazyTensor(shape={self.shape}, dtype={self.dtype.name})"

    @property
    def raw(self) -> list[RawBytes] | None:
        """Its bytes, where they are in the file in order."""
        if self.dtype == np.bool_ or not _is_contiguous(self.shape, self._strides):
            return None
        return [self._reader.raw(self._start, math.prod(self.shape) * self.dtype.itemsize)]

    def blocks(self) -> Iterator[np.ndarray]:
        """Its elements in order, as new C-contiguous arrays of at most CHUNK_BYTES."""
        for part in cut(self.shape, self.dtype.itemsize):
            yield self.read(part)

    def read(self, index: tuple[slice, ...] | slice = ()) -> np.ndarray:
        """A new C-contiguous array of tensor[index]; index: a slice, or one for each of the first dims, steps >= 1.

        Of a contiguous tensor only the bytes of the slice are read; of another at most CHUNK_BYTES are held at a time.
        A reader with checksums (`torch_zip.Member`) reads all that it has once, at its first read, for the sum.
        Raises: InputError if the file is damaged, or no longer as it was when it was opened.
        """
        index = (index,) if isinstance(index, slice) else tuple(index)
        if len(index) > len(self.shape):
            raise IndexError(f"{len(index)} slices of a tensor with {len(self.shape)} dims")
        start, shape, strides = self._start, [], []
        for axis, (size, stride) in enumerate(zip(self.shape, self._strides, strict=True)):
            part = range(size)[index[axis]] if axis < len(index) else range(size)
            if part.step < 1:
                raise IndexError("a slice's step must be 1 or more")
            if len(part):
                start += part.start * stride * self.dtype.itemsize
            shape.append(len(part))
            strides.append(stride * part.step)
        # A dim of stride 0 (torch's expand) is in the file once.
        once = [size if stride else min(size, 1) for size, stride in zip(shape, strides, strict=True)]
        stored = np.dtype(np.uint8) if self.dtype == np.bool_ else self.dtype
        out = np.empty(once, stored)
        if out.size:
            self._fill(out, start, strides)
        if self.dtype == np.bool_:
            out = out != 0  # a byte that is neither 0 nor 1 is no numpy bool
        return out if once == shape else np.array(np.broadcast_to(out, shape), order="C")

    def _fill(self, out: np.ndarray, start: int, strides: list[int]) -> None:
        itemsize = out.dtype.itemsize
        if out.flags.c_contiguous and _is_contiguous(out.shape, strides):
            self._reader.read_into(start, out.reshape(-1).view(np.uint8))
            return
        num_bytes = span(out.shape, strides) * itemsize
        if num_bytes <= CHUNK_BYTES:
            raw = np.empty(num_bytes, np.uint8)  # bytearray would ask the system for new pages each time
            self._reader.read_into(start, raw)
            flat = raw.view(out.dtype)
            out[...] = np.lib.stride_tricks.as_strided(flat, out.shape, [stride * itemsize for stride in strides])
            return
        # Halving at least, along the outermost dim in the file: dims do not overlap, so nothing is read twice.
        axis = max((axis for axis, size in enumerate(out.shape) if size > 1), key=lambda axis: strides[axis])
        step_bytes = strides[axis] * itemsize
        step = max(1, min(CHUNK_BYTES // step_bytes, out.shape[axis] // 2))
        for first in range(0, out.shape[axis], step):
            part = (slice(None),) * axis + (slice(first, first + step),)
            self._fill(out[part], start + first * step_bytes, strides)


def cut(shape: tuple[int, ...], itemsize: int) -> Iterator[tuple[slice, ...]]:
    """Indices of parts of at most CHUNK_BYTES that one after the other hold a tensor's elements, in C order."""
    if not shape:
        yield ()
    if not shape or 0 in shape:
        return
    entry_bytes = [math.prod(shape[axis + 1 :]) * itemsize for axis in range(len(shape))]
    axis = next(axis for axis, num_bytes in enumerate(entry_bytes) if num_bytes <= CHUNK_BYTES)
    step = CHUNK_BYTES // entry_bytes[axis]
    for outer in np.ndindex(*shape[:axis]):
        before = [slice(i, i + 1) for i in outer]
        for start in range(0, shape[axis], step):
            yield (*before, slice(start, start + step))


def contiguous_strides(shape) -> tuple[int, ...]:
    """The strides, in elements, of a C-contiguous tensor, as torch counts them where a dim is empty."""
    return tuple(math.prod(size or 1 for size in shape[axis + 1 :]) for axis in range(len(shape)))


def is_representable(shape, dtype: np.dtype) -> bool:
    """Whether numpy has arrays of this shape: where a dim is empty, the others still count."""
    return len(shape) <= 32 and math.prod(size or 1 for size in shape) * dtype.itemsize < 1 << 63


def span(shape, strides) -> int:
    """The number of elements from the first of a view that is not empty to its last."""
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def _is_contiguous(shape, strides) -> bool:
    inner = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size > 1 and stride != inner:
            return False
        inner *= size
    return True
