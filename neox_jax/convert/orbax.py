"""Our own runs' parameters as stored tensors, and stored tensors as a run's step 0, a layer of one at a time."""

import dataclasses
import functools
import math
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import tensorstore as ts
from flax import nnx

from neox_jax.checkpoint.steps import read_meta, read_quantization
from neox_jax.checkpoint.streamed import StreamedArray, copy_to_host, read_leaves, save_params
from neox_jax.checkpoint.sums import SUMS, read_sums
from neox_jax.checkpoint.trees import check_tree, read_tree
from neox_jax.convert import names
from neox_jax.convert.stored import BLOCK_BYTES, StoredModel, StoredTensor, num_bytes, read_ours
from neox_jax.errors import InputError
from neox_jax.model import NeoX, abstract_model
from neox_jax.train_state import pure_params
from neox_jax.tree import map_named, named_leaves

CHUNK_BYTES = 2 * BLOCK_BYTES  # stored as one: small enough for a processor's cache, and for buffers to be used again


def load_step(folder: Path, *, mesh=None, dtype=None) -> NeoX:
    """Restores the model of a step's folder onto the mesh, or onto the default device; dtype: cast once, on devices."""
    config, stored_dtype = read_meta(folder)
    quantization = read_quantization(folder)
    if quantization and dtype is not None:
        raise InputError(f"{folder} holds {quantization} weights, computed in {stored_dtype}; leave dtype out")
    target = abstract_model(config, dtype=stored_dtype, mesh=mesh, quantization=quantization)
    if mesh is None:
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), target)
    graphdef, _ = nnx.split(target)
    model = nnx.merge(graphdef, read_tree(folder / "params", pure_params(target)))
    return model if dtype is None else jax.tree.map(lambda x: x.astype(dtype), model)


def read_step(folder: Path) -> StoredModel:
    """The model of a step's folder; weights are still on disk. Raises: InputError if it is not whole."""
    config, dtype = read_meta(folder)
    if quantization := read_quantization(folder):
        raise InputError(f"{folder} holds {quantization} weights; convert the model that they were made from")
    target = pure_params(abstract_model(config, dtype=dtype))
    params = folder / "params"
    check_tree(params, target)
    leaves = named_leaves(target)
    arrays = read_leaves(params)
    found = {}
    for name, leaf in leaves.items():
        row = names.BY_NAME[name]
        shape = leaf.shape[1:] if row.stacked else leaf.shape
        if row.is_table:
            shape = (config.vocab_size, *shape[1:])
        for layer in row.layers(leaf.shape):
            found[row.hf_name(layer)] = _InArray(name, arrays[name], layer, shape, row, np.dtype(leaf.dtype))
    order = names.in_order(config.num_hidden_layers)
    tensors = {name: found[name] for name in order if name in found}
    files = tuple(sorted(path for path in params.rglob("*") if path.is_file()))
    notes = ("the run's optimizer state is not converted",) if (folder / "optimizer").is_dir() else ()
    sums = (read_sums(folder) or {}) if (folder / SUMS).is_file() else {}  # compared when the step was chosen
    digests = {folder / name: digest for name, digest in sums.items()}
    return StoredModel(dataclasses.replace(config, vocab_multiple=1), tensors, str(folder), files, notes, digests)


@dataclasses.dataclass(frozen=True)
class _InArray:
    """One layer of an array on disk. ours: the layer's shape in our layout, without rows that only pad."""

    name: str
    array: ts.TensorStore
    layer: int | None
    ours: tuple[int, ...]
    row: names.Row
    dtype: np.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return names.stored_shape(self.ours, self.row.dims)

    @property
    def row_unit(self) -> int:
        """The stored rows of a chunk, which is decoded as one."""
        chunk = self.array.chunk_layout.read_chunk.shape[0 if self.layer is None else 1 :]
        first, *rest = self.row.dims[0]
        return min(chunk[first], self.ours[first]) * math.prod(self.ours[dim] for dim in rest)

    def read(self, slices: tuple[slice, ...]) -> np.ndarray:
        bounds, inside = names.covering_bounds(slices, self.ours, self.row.dims)
        index = tuple(slice(*bound) for bound in bounds)
        try:
            part = self.array[index if self.layer is None else (self.layer, *index)].read().result()
        except ValueError as error:
            raise InputError(f"{self.name} cannot be read: {' '.join(str(error).split())[:300]}") from error
        return names.to_stored(part, self.row.dims)[inside]


def write_run(stored: StoredModel, folder: Path) -> None:
    """Writes a run folder with these parameters as step 0."""
    config = dataclasses.replace(stored.config, vocab_multiple=1)

    def streamed(name: str, leaf) -> StreamedArray:
        row = names.BY_NAME[name]
        tensors = {layer: stored.tensors[row.hf_name(layer)] for layer in row.layers(leaf.shape)}
        ours = leaf.shape[1:] if row.stacked else leaf.shape
        cut = row.dims[0][0]  # the dim whose parts are whole rows of the stored tensor
        num = _num_in_chunk(ours, cut, row, tensors)
        chunks = (*ours[:cut], num, *ours[cut + 1 :])
        parts = functools.partial(_parts, row, tensors, ours, cut, num)
        return StreamedArray(leaf.shape, stored.dtype, (1, *chunks) if row.stacked else chunks, parts)

    save_params(map_named(streamed, pure_params(abstract_model(config, dtype=stored.dtype))), folder, config)


def write_model(model: NeoX, folder: Path) -> None:
    """Writes a run folder with a model's parameters, whatever they are, as step 0."""
    save_params(copy_to_host(pure_params(model)), folder, model.config)


def _num_in_chunk(ours: tuple[int, ...], cut: int, row: names.Row, tensors: dict[int | None, StoredTensor]) -> int:
    """How many of dim `cut` make a chunk of about CHUNK_BYTES, of rows that can be read by themselves."""
    tensor = next(iter(tensors.values()))
    rows_each = tensor.shape[0] // ours[cut]
    unit = -(-getattr(tensor, "row_unit", 1) // rows_each)
    return min(ours[cut], max(1, CHUNK_BYTES * ours[cut] // num_bytes(tensor) // unit) * unit)


def _parts(
    row: names.Row, tensors: dict[int | None, StoredTensor], ours: tuple[int, ...], cut: int, num: int
) -> Iterator[tuple[tuple, np.ndarray]]:
    """Each tensor whole, its rows in order."""
    for layer, tensor in tensors.items():
        for start in range(0, ours[cut], num):
            bounds = [(0, size) for size in ours]
            bounds[cut] = (start, min(start + num, ours[cut]))
            index = tuple(slice(*bound) for bound in bounds)
            yield (index if layer is None else (layer, *index)), read_ours(row, tensor, ours, bounds)
