"""Our own runs' parameters as stored tensors, and stored tensors as a run's step 0, a layer of one at a time."""

import dataclasses
import functools
import itertools
import math
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from flax import nnx

from neox_jax.checkpoint.commit import write_step_zero
from neox_jax.checkpoint.steps import make_meta, read_meta, read_quantization
from neox_jax.checkpoint.streamed import (
    StreamedHandler,
    copy_to_host,
    params_handler,
    read_about,
    read_leaves,
    save_tree,
)
from neox_jax.checkpoint.sums import SUMS, read_sums
from neox_jax.checkpoint.tensor_files import FiledArray, create_arrays
from neox_jax.checkpoint.trees import check_tree, read_tree
from neox_jax.convert import names
from neox_jax.convert.byte_reader import FileReader, RawBytes
from neox_jax.convert.byte_writer import LargeFiles
from neox_jax.convert.stored import Digests, StoredModel, num_bytes, to_model, write_tensor
from neox_jax.errors import InputError
from neox_jax.model import NeoX, abstract_model
from neox_jax.train_state import pure_params
from neox_jax.tree import map_named, named_leaves


def load_step(folder: Path, *, mesh=None, dtype=None) -> NeoX:
    """Loads the model of a step's folder onto the mesh, or onto the default device; dtype: cast once."""
    if is_converted(folder):
        return to_model(read_step(folder).cast(dtype), mesh=mesh)
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


def is_converted(folder: Path) -> bool:
    """Whether a step's parameters are files of tensors, as `write_run` makes them, which are read as any checkpoint's;
    Orbax would restore them in our shape, in twice the time (`tensor_files`). Raises: DamagedError."""
    return not read_about(folder / "params").get("use_ocdbt", True)


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
        row, filed = names.BY_NAME[name], _as_files(name, leaf)
        as_files = filed if (params / name).is_dir() and filed.is_in(params / name) else None
        shape = leaf.shape[1:] if row.stacked else leaf.shape
        if row.is_table:
            shape = (config.vocab_size, *shape[1:])
        for layer in row.layers(leaf.shape):
            found[row.hf_name(layer)] = _InArray(
                name, arrays[name], layer, shape, row, np.dtype(leaf.dtype), params / name, as_files
            )
    order = names.in_order(config.num_hidden_layers)
    tensors = {name: found[name] for name in order if name in found}
    files = tuple(sorted(path for path in params.rglob("*") if path.is_file()))
    notes = ("the run's optimizer state is not converted",) if (folder / "optimizer").is_dir() else ()
    sums = (read_sums(folder) or {}) if (folder / SUMS).is_file() else {}  # compared when the step was chosen
    digests = {folder / name: digest for name, digest in sums.items()}
    return StoredModel(dataclasses.replace(config, vocab_multiple=1), tensors, str(folder), files, notes, digests)


@dataclasses.dataclass(frozen=True)
class _InArray:
    """One layer of an array on disk. ours: the layer's shape in our layout, without rows that only pad. folder: the
    array's, where it has one. filed: how its files are, where they are ours."""

    name: str
    array: ts.TensorStore
    layer: int | None
    ours: tuple[int, ...]
    row: names.Row
    dtype: np.dtype
    folder: Path
    filed: FiledArray | None

    @property
    def shape(self) -> tuple[int, ...]:
        return names.stored_shape(self.ours, self.row.dims)

    @functools.cached_property
    def raw(self) -> list[RawBytes] | None:
        if self.filed is None:
            return None
        reader, ending = FileReader(self.folder / self.filed.path(self.layer)), self.filed.ending()
        end = reader.num_bytes - len(ending)
        return [reader.raw(0, num_bytes(self))] if reader.read(end, len(ending)) == ending else None

    @property
    def row_unit(self) -> int:
        """The stored rows of a chunk, which is decoded as one."""
        chunk = self.array.chunk_layout.read_chunk.shape[0 if self.layer is None else 1 :]
        first, *rest = self.row.dims[0]
        return min(chunk[first], self.ours[first]) * math.prod(self.ours[dim] for dim in rest)

    def read(self, slices: tuple[slice, ...]) -> np.ndarray:
        bounds, inside = names.covering_bounds(slices, self.ours, self.row.dims)
        layer = self.array if self.layer is None else self.array[self.layer]
        part = layer[tuple(slice(*bound) for bound in bounds)]
        order = list(itertools.chain(*self.row.dims))
        is_in_order = list(part.chunk_layout.inner_order) == order  # on disk, as a conversion writes it
        try:
            values = (part.transpose(order) if is_in_order else part).read().result()
        except ValueError as error:
            raise InputError(f"{self.name} cannot be read: {' '.join(str(error).split())[:300]}") from error
        if is_in_order:
            return values.reshape(names.stored_shape(part.shape, self.row.dims))[inside]
        return names.to_stored(values, self.row.dims)[inside]


def write_run(stored: StoredModel, folder: Path, digests: Digests | None = None) -> None:
    """Writes a run folder with these parameters as step 0. digests: gets the tensors' too."""
    config, digests = dataclasses.replace(stored.config, vocab_multiple=1), Digests() if digests is None else digests

    arrays = map_named(_as_files, pure_params(abstract_model(config, dtype=stored.dtype)))

    def write(params: Path) -> tuple[ocp.CheckpointHandler, dict[Path, str]]:
        handler = create_arrays(params, arrays)
        files = {}
        for name, array in named_leaves(arrays).items():
            row = names.BY_NAME[name]
            for layer in row.layers(array.shape):
                files[row.hf_name(layer)] = params / name / array.path(layer), array.ending()
        with LargeFiles() as writing:
            for name, tensor in stored.tensors.items():
                path, ending = files[name]
                with writing.create(path) as file:
                    write_tensor(file, name, tensor, digests)
                    file.write(ending)
        return handler, {path: _hash_on(digests[name], ending) for name, (path, ending) in files.items()}

    write_step_zero(folder, make_meta(config, arrays), write)


def _as_files(name: str, leaf) -> FiledArray:
    """A parameter as files of its stored tensors."""
    row = names.BY_NAME[name]
    return FiledArray(leaf.shape, np.dtype(leaf.dtype), row.stacked, tuple(itertools.chain(*row.dims)))


def write_model(model: NeoX, folder: Path) -> None:
    """Writes a run folder with a model's parameters, whatever they are, as step 0."""
    params, streamed = copy_to_host(pure_params(model)), StreamedHandler()

    def write(folder: Path) -> tuple[ocp.CheckpointHandler, dict[Path, str]]:
        handler = params_handler(streamed)
        save_tree(handler, folder, params, interrupted=streamed.cancelled.set)
        return handler, {}

    write_step_zero(folder, make_meta(model.config, params), write)


def _hash_on(digest, ending: bytes) -> str:
    digest = digest.copy()
    digest.update(ending)
    return digest.hexdigest()
