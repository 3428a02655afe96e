"""A model as its stored tensors, wherever they are: what every reader gives and every writer takes.

Names and layout are Hugging Face's. Nothing is read before somebody asks, and then a part of a tensor at a time, so a
conversion never holds a model.
"""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from neox_jax.config import DTYPES, ModelConfig, check_choice
from neox_jax.convert import names
from neox_jax.convert.byte_reader import RawBytes
from neox_jax.errors import InputError
from neox_jax.lora import is_factor
from neox_jax.model import NeoX, abstract_model
from neox_jax.sharding import RULES
from neox_jax.tree import map_named, named_leaves

_JAX_ALIGNMENT = 64
BLOCK_BYTES = 8 << 20  # of this size buffers are used again by the allocator, and stay in the processor's cache


class StoredTensor(Protocol):
    """A tensor that can be read in parts.

    One whose rows cannot be read one by one at no extra cost has a `row_unit`: how many belong together. One whose
    bytes are stored as they are has `raw`: where they are, one part after the other.
    """

    shape: tuple[int, ...]
    dtype: np.dtype

    def read(self, slices: tuple[slice, ...]) -> np.ndarray:
        """tensor[slices]: a slice for each dim, with plain bounds and step 1. It may be memory that others read."""


@dataclasses.dataclass(frozen=True)
class StoredModel:
    """A model's configuration and its tensors by full Hugging Face name, without rows that only pad.

    tensors: in the order in which they are read best: as they are in files, or layer by layer.
    place: for messages. files: what they are read from. notes: what whoever converts it should know, a line each.
    digests: SHA-256, in hex, of those files that were hashed when they were opened.
    """

    config: ModelConfig
    tensors: dict[str, StoredTensor]
    place: str
    files: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()
    digests: Mapping[Path, str] = dataclasses.field(default_factory=dict)

    def cast(self, dtype=None) -> "StoredModel":
        """The same with every tensor in one dtype; None is the one that they are stored in.

        Raises: InputError for an unknown dtype; or where None is given and they are stored in several.
        """
        if dtype is None:
            found = sorted({np.dtype(tensor.dtype).name for tensor in self.tensors.values()})
            if len(found) > 1:
                raise InputError(
                    f"{self.place} stores parameters as {' and '.join(found)}; pass a dtype to cast them all to"
                )
            return self
        dtype = check_dtype(dtype)
        tensors = {
            name: tensor if tensor.dtype == dtype else _Cast(tensor, name, dtype)
            for name, tensor in self.tensors.items()
        }
        return dataclasses.replace(self, tensors=tensors)

    @property
    def dtype(self) -> np.dtype:
        """That of all tensors, once `cast` has passed."""
        return np.dtype(next(iter(self.tensors.values())).dtype)

    @property
    def num_bytes(self) -> int:
        return sum(map(num_bytes, self.tensors.values()))


def check_dtype(dtype) -> np.dtype | None:
    """The dtype of this name; None stays None. Raises: InputError if parameters are not stored in such a one."""
    if dtype is None:
        return None
    name = dtype if isinstance(dtype, str) else jnp.dtype(dtype).name
    check_choice("dtype", name, DTYPES)
    return np.dtype(jnp.dtype(name))


def num_bytes(tensor: StoredTensor) -> int:
    return math.prod(tensor.shape) * np.dtype(tensor.dtype).itemsize


def whole(tensor: StoredTensor) -> np.ndarray:
    return tensor.read(tuple(slice(0, size) for size in tensor.shape))


def blocks(tensor: StoredTensor) -> Iterator[np.ndarray]:
    """Its rows in order, of about BLOCK_BYTES at a time, C-contiguous."""
    step = _rows_in_block(tensor)
    rest = tuple(slice(0, size) for size in tensor.shape[1:])
    for start in range(0, tensor.shape[0], step):
        yield np.ascontiguousarray(tensor.read((slice(start, min(start + step, tensor.shape[0])), *rest)))


def _rows_in_block(tensor: StoredTensor) -> int:
    row_bytes = num_bytes(tensor) // max(1, tensor.shape[0])
    unit = getattr(tensor, "row_unit", 1)
    return max(1, BLOCK_BYTES // max(1, row_bytes) // unit) * unit


class Digests(dict[str, Any]):
    """`hashlib` objects of tensors by name, complete when all is written; a writer updates them with the bytes."""

    def begin(self, name: str):
        self[name] = hashlib.sha256()
        return self[name]

    def of_file(self, raw: RawBytes) -> list:
        """What else wants to be updated with these bytes."""
        return []


def write_tensor(file, name: str, tensor: StoredTensor, digests: Digests | None) -> None:
    """Writes a tensor's bytes to a file of `LargeFiles`, and hashes them into `digests`."""
    mine = [] if digests is None else [digests.begin(name)]
    if (parts := raw_parts(tensor)) is None:
        for block in blocks(tensor):
            file.write(block.reshape(-1).view(np.uint8).data, mine)
        return
    for raw in parts:
        read, checks = (raw.read, []) if raw.stream is None else raw.stream()
        file.fill(raw.num_bytes, read, [*mine, *([] if digests is None else digests.of_file(raw)), *checks])


def raw_parts(tensor: StoredTensor) -> list[RawBytes] | None:
    """What its bytes are one after the other, where they are stored as they are."""
    return getattr(tensor, "raw", None)


@dataclasses.dataclass(frozen=True)
class Wrapped:
    """A stored tensor that is read in another way; the base of those."""

    tensor: StoredTensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.tensor.dtype)

    @property
    def row_unit(self) -> int:
        return getattr(self.tensor, "row_unit", 1)


@dataclasses.dataclass(frozen=True)
class _Cast(Wrapped):
    name: str
    wanted: np.dtype

    @property
    def dtype(self) -> np.dtype:
        return self.wanted

    def read(self, slices: tuple[slice, ...]) -> np.ndarray:
        part = self.tensor.read(slices)
        with np.errstate(over="ignore"):
            cast = part.astype(self.dtype)
        if self.dtype == np.float16 and not np.array_equal(np.isfinite(cast), np.isfinite(part)):
            raise InputError(
                f"{self.name} has values beyond {float(np.finfo(np.float16).max):g}, the largest of float16; "
                "convert to bfloat16 or float32"
            )
        return cast


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The stored shape of each tensor of such a model by full Hugging Face name, layer by layer."""
    shapes = {}
    for name, leaf in named_leaves(abstract_model(dataclasses.replace(config, vocab_multiple=1))).items():
        row = names.BY_NAME[name]
        shape = names.stored_shape(leaf.shape[1:] if row.stacked else leaf.shape, row.dims)
        shapes |= {row.hf_name(layer): shape for layer in row.layers(leaf.shape)}
    return {name: shapes[name] for name in names.in_order(config.num_hidden_layers) if name in shapes}


# ---- to and from devices


def from_model(model: NeoX) -> StoredModel:
    """The tensors of a model on devices of this process; each is brought to the host when it is read. Not adapters.

    model: any pytree of the model's structure: gradients, for one.
    """
    found, config = {}, dataclasses.replace(model.config, vocab_multiple=1)
    for name, leaf in named_leaves(model).items():
        if is_factor(name):
            continue
        row = names.BY_NAME[name]
        shape = leaf.shape[1:] if row.stacked else leaf.shape
        if row.is_table:
            shape = (config.vocab_size, *shape[1:])
        for layer in row.layers(leaf.shape):
            found[row.hf_name(layer)] = _OnDevice(leaf, layer, shape, row)
    order = names.in_order(config.num_hidden_layers)
    return StoredModel(config, {name: found[name] for name in order if name in found}, "the model")


@dataclasses.dataclass(frozen=True)
class _OnDevice:
    """One layer of a parameter. ours: the layer's shape in our layout, without rows that only pad."""

    leaf: jax.Array | np.ndarray
    layer: int | None
    ours: tuple[int, ...]
    row: names.Row

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.leaf.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        return names.stored_shape(self.ours, self.row.dims)

    def read(self, slices: tuple[slice, ...]) -> np.ndarray:
        bounds, inside = names.covering_bounds(slices, self.ours, self.row.dims)
        starts, sizes = [start for start, _ in bounds], [stop - start for start, stop in bounds]
        if self.layer is not None:
            starts, sizes = [self.layer, *starts], [1, *sizes]
        part = np.asarray(_take(self.leaf, starts, tuple(sizes)))
        return names.to_stored(part.reshape(part.shape[len(sizes) - len(bounds) :]), self.row.dims)[inside]


def _take(leaf, starts: list[int], sizes: tuple[int, ...]):
    if isinstance(leaf, jax.Array):
        return _take_on_device(leaf, np.asarray(starts, np.int32), sizes)
    return leaf[tuple(slice(start, start + size) for start, size in zip(starts, sizes, strict=True))]


# Traced, so that one program serves every layer, and what is on the devices beside it stays there.
@functools.partial(jax.jit, static_argnums=2)
def _take_on_device(leaf, starts, sizes):
    return jax.lax.dynamic_slice(leaf, starts, sizes)


def to_model(stored: StoredModel, *, mesh=None) -> NeoX:
    """The model of these tensors on the mesh, or on the default device; each device's part is read by itself.

    Where vocab_size does not divide over the mesh the tables get rows of zeros behind it (config.vocab_multiple), which
    take part in nothing. stored: after `cast`.
    """
    config, dtype = padded_for(stored.config, mesh), stored.dtype

    def read(name, leaf):
        row = names.BY_NAME[name]
        tensors = [stored.tensors[row.hf_name(layer)] for layer in row.layers(leaf.shape)]
        read_part = functools.partial(_read_part, row, tensors, leaf.shape, dtype)
        if mesh is None:
            return jnp.asarray(read_part((slice(None),) * len(leaf.shape)))
        parts = {}  # replicas on this host share one array

        def once(index):
            key = tuple((part.start, part.stop) for part in index)
            return parts[key] if key in parts else parts.setdefault(key, read_part(index))

        return jax.make_array_from_callback(leaf.shape, leaf.sharding, once, dtype=dtype)

    return map_named(read, abstract_model(config, dtype=dtype, mesh=mesh))


def padded_for(config: ModelConfig, mesh) -> ModelConfig:
    """The model with tables that divide over the mesh."""
    parts = 1 if mesh is None else math.prod(mesh.shape.get(axis, 1) for axis in RULES["vocab"])
    return dataclasses.replace(config, vocab_multiple=parts) if config.vocab_size % parts else config


def _read_part(row: names.Row, tensors: list[StoredTensor], shape, dtype, index: tuple[slice, ...]) -> np.ndarray:
    """Part of a parameter, in our layout. Table rows beyond those stored, which only pad it, are zeros."""
    bounds = [part.indices(size)[:2] for part, size in zip(index, shape, strict=True)]
    out = _empty([stop - start for start, stop in bounds], dtype)
    if row.stacked:
        for i, tensor in enumerate(tensors[slice(*bounds[0])]):
            _read_ours(row, tensor, shape[1:], bounds[1:], out[i])
        return out
    num_rows = tensors[0].shape[0]
    start, stop = (min(end, num_rows) for end in bounds[0])
    out[stop - start :] = 0
    if start < stop:
        _read_ours(row, tensors[0], shape, [(start, stop), *bounds[1:]], out[: stop - start])
    return out


def _empty(shape: list[int], dtype) -> np.ndarray:
    """An array that jax on a CPU takes as it is, without a copy."""
    num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(num_bytes + _JAX_ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _JAX_ALIGNMENT
    return memory[start : start + num_bytes].view(dtype).reshape(shape)


def _read_ours(row: names.Row, tensor: StoredTensor, shape, bounds: list[tuple[int, int]], out: np.ndarray) -> None:
    """Reads part of one layer of a parameter into `out`, contiguous and in our layout, a block at a time.

    shape: of the whole layer, bounds: (start, stop) for each dim.
    """
    rows, *rest = names.stored_slices(bounds, shape, row.dims)
    step = _rows_in_block(tensor)
    for start in range(rows.start, rows.stop, step):
        part = tensor.read((slice(start, min(start + step, rows.stop)), *rest))
        names.put_stored(part, row.dims, out, start - rows.start)


# ---- comparing


def compare(one: StoredModel, other: StoredModel) -> list[str]:
    """What differs between two models' tensors, bit for bit; empty where nothing does. A block of each is held."""
    ours, theirs = one.tensors, other.tensors
    found = [f"{name} is in the first only" for name in ours if name not in theirs]
    found += [f"{name} is in the second only" for name in theirs if name not in ours]
    for name in [name for name in ours if name in theirs]:
        a, b = ours[name], theirs[name]
        kinds = [f"{np.dtype(tensor.dtype).name}{list(tensor.shape)}" for tensor in (a, b)]
        if kinds[0] != kinds[1]:
            found.append(f"{name} is {kinds[0]} and {kinds[1]}")
            continue
        gap, same = 0.0, True
        for rows, other_rows in zip_rows(a, b):
            if rows.tobytes() != other_rows.tobytes():
                same = False
                with np.errstate(invalid="ignore"):  # infinities
                    gap = max(gap, np.abs(rows.astype(np.float64) - other_rows.astype(np.float64)).max())
        if not same:
            found.append(f"{name} differs, by at most {gap:.3g}")
    return found


def zip_rows(one: StoredTensor, other: StoredTensor) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The same rows of two tensors of one shape, of about BLOCK_BYTES at a time."""
    left = blocks(other)
    pending = np.empty((0, *other.shape[1:]), other.dtype)
    for block in blocks(one):
        while len(pending) < len(block):
            pending = np.concatenate([pending, next(left)]) if len(pending) else next(left)
        yield block, pending[: len(block)]
        pending = pending[len(block) :]
