"""Our own runs' parameters as stored tensors, and stored tensors as a run's step 0, a layer of one at a time."""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import tensorstore as ts
from flax import nnx

from neox_jax.checkpoint.steps import read_meta, read_quantization
from neox_jax.checkpoint.streamed import StreamedArray, copy_to_host, read_leaves, save_params
from neox_jax.checkpoint.trees import check_tree, read_tree
from neox_jax.convert import names
from neox_jax.convert.stored import BLOCK_BYTES, StoredModel, StoredTensor, read_ours
from neox_jax.errors import InputError
from neox_jax.model import NeoX, abstract_model
from neox_jax.train_state import pure_params
from neox_jax.tree import map_named, named_leaves

TABLE_CHUNK_BYTES = 4 * BLOCK_BYTES


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
    return StoredModel(dataclasses.replace(config, vocab_multiple=1), tensors, str(folder), files, notes)


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
        return self.array.chunk_layout.read_chunk.shape[0] if self.row.is_table else self.shape[0]

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
        tensors = [stored.tensors[row.hf_name(layer)] for layer in row.layers(leaf.shape)]
        if row.stacked:
            chunks = (1, *leaf.shape[1:])
        else:
            row_bytes = math.prod(leaf.shape[1:]) * stored.dtype.itemsize
            chunks = (min(leaf.shape[0], max(1, TABLE_CHUNK_BYTES // row_bytes)), *leaf.shape[1:])
        return StreamedArray(leaf.shape, stored.dtype, chunks, lambda: _parts(row, tensors, leaf.shape, chunks[0]))

    save_params(map_named(streamed, pure_params(abstract_model(config, dtype=stored.dtype))), folder, config)


def write_model(model: NeoX, folder: Path) -> None:
    """Writes a run folder with a model's parameters, whatever they are, as step 0."""
    save_params(copy_to_host(pure_params(model)), folder, model.config)


def _parts(
    row: names.Row, tensors: list[StoredTensor], shape: tuple[int, ...], rows: int
) -> Iterator[tuple[tuple, np.ndarray]]:
    if row.stacked:
        bounds = [(0, size) for size in shape[1:]]
        for layer, tensor in enumerate(tensors):
            yield (layer,), read_ours(row, tensor, shape[1:], bounds)
        return
    rest = [(0, size) for size in shape[1:]]
    for start in range(0, shape[0], rows):
        stop = min(start + rows, shape[0])
        yield (slice(start, stop),), read_ours(row, tensors[0], shape, [(start, stop), *rest])
