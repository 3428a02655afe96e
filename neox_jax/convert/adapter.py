"""Adapters apart from the model that they are for: what they know of it, put onto it, and merged into its weights.

SHAPES  R rank  in, out: of a weight as it is stored, [out, in]
"""

import dataclasses
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from neox_jax.checkpoint.steps import read_adapter_meta
from neox_jax.checkpoint.streamed import read_leaves
from neox_jax.config import LoraConfig, ModelConfig
from neox_jax.convert import names
from neox_jax.convert.files import join_problems
from neox_jax.convert.manifest import identify
from neox_jax.convert.stored import StoredModel, Wrapped
from neox_jax.errors import InputError
from neox_jax.lora import is_factor, split_adapters
from neox_jax.model import NeoX, abstract_model
from neox_jax.train_state import pure_params
from neox_jax.tree import join, map_named, named_leaves


@dataclasses.dataclass(frozen=True)
class Base:
    """The model that adapters are for: a SOURCE, its weights' identity (`manifest.identify`) where it is known, and its
    revision where it is an id on the hub."""

    source: str
    sha256: str | None = None
    revision: str | None = None


@dataclasses.dataclass(frozen=True)
class Adapter:
    """factors: by PEFT's names, one for each layer, as it stores them: A [R, in], B [out, R]. place: for messages.
    files: what it is read from."""

    lora: LoraConfig
    factors: dict[str, np.ndarray]
    base: Base
    place: str
    files: tuple[Path, ...] = ()


def about_adapter(lora: LoraConfig, base: Base) -> dict:
    """What a step says of its adapters."""
    return {**dataclasses.asdict(lora), "base": base.source, "base_sha256": base.sha256}


def is_adapter_step(folder: Path) -> bool:
    """Whether a step of ours holds adapters and not a model. Raises: DamagedError."""
    return read_adapter_meta(folder) is not None


def read_adapter_step(folder: Path) -> Adapter:
    """The adapters of a step. Raises: DamagedError."""
    about = dict(read_adapter_meta(folder))
    base = Base(about.pop("base"), about.pop("base_sha256"))
    lora = LoraConfig(**{**about, "targets": tuple(about["targets"])})
    arrays = {name: array.read().result() for name, array in read_leaves(folder / "params").items()}
    files = tuple(sorted(path for path in (folder / "params").rglob("*") if path.is_file()))
    return Adapter(lora, _apart(lora, arrays), base, str(folder), files)


def adapter_of(model: NeoX) -> Adapter:
    """The adapters of a model on devices of this process. Raises: InputError where it has none."""
    if model.lora is None:
        raise InputError("the model has no adapters; nothing to save")
    arrays = {name: jax.device_get(x) for name, x in named_leaves(model).items() if is_factor(name)}
    return Adapter(model.lora, _apart(model.lora, arrays), Base(""), "the model")


def check_base(adapter: Adapter, stored: StoredModel) -> None:
    """Raises: InputError where the weights are not those that the adapters were trained over, as far as it is known."""
    if adapter.base.sha256 is None:
        return
    found = identify(stored)
    if found != adapter.base.sha256:
        raise InputError(
            f"{adapter.place} was trained over weights with SHA-256 {adapter.base.sha256[:12]}, and {stored.place} has "
            f"{found[:12]}; give the model that it was trained over ({adapter.base.source})"
        )


def check_same(adapter: Adapter, lora: LoraConfig) -> None:
    """Raises: InputError where a run of `lora` cannot go on with these adapters."""
    there, wanted = ({**dataclasses.asdict(one), "targets": sorted(one.targets)} for one in (adapter.lora, lora))
    fields = ("rank", "alpha", "targets", "rslora")
    differing = [f"{name} {there[name]!r}, not {wanted[name]!r}" for name in fields if there[name] != wanted[name]]
    if differing:
        raise InputError(f"the adapters in {adapter.place} have {'; '.join(differing)}; set lora to what they have")


def attach(model: NeoX, adapter: Adapter) -> NeoX:
    """The model with these adapters, in its own dtype and on its mesh. Raises: InputError where they do not fit it."""
    lora = dataclasses.replace(adapter.lora, dropout=0.0, quantize=model.quantization)
    dtype = model.embed_in.embedding.dtype
    _check_shapes(adapter, model.config)
    target = abstract_model(model.config, dtype=dtype, mesh=model.mesh, quantization=model.quantization, lora=lora)
    graphdef, _ = nnx.split(target)
    factors, weights = split_adapters(pure_params(target))
    there = named_leaves(model)
    weights = map_named(lambda name, _: there[name], weights)
    return nnx.merge(graphdef, join(weights, place_factors(adapter, factors)))


def place_factors(adapter: Adapter, abstract: dict) -> dict:
    """The factors, stacked in our layout, as a tree like this one of ShapeDtypeStructs, on its shardings if any."""
    rows = {row.name: row for row in _rows(adapter.lora)}

    def place(name: str, leaf):
        row, shape = rows[name], leaf.shape[1:]
        layers = (adapter.factors[row.hf_name(layer)] for layer in row.layers(leaf.shape))
        stacked = np.stack([names.from_stored(factor, row.dims, shape) for factor in layers]).astype(leaf.dtype)
        if leaf.sharding is None:
            return jax.device_put(stacked)
        return jax.make_array_from_callback(stacked.shape, leaf.sharding, lambda index: stacked[index])

    return map_named(place, abstract)


def merge(stored: StoredModel, adapter: Adapter) -> StoredModel:
    """The model of the sums of its weights and the adapters' products, computed in float32, in the weights' own dtype.

    Raises: InputError where they do not fit it, or were trained over other weights.
    """
    _check_shapes(adapter, stored.config)
    tensors = dict(stored.tensors)
    for kernel in _kernels(adapter.lora):
        for layer in range(stored.config.num_hidden_layers):
            name = kernel.hf_name(layer)
            a, b = (adapter.factors[row.hf_name(layer)] for row in names.factor_rows(kernel))
            tensors[name] = _Merged(tensors[name], a, b, adapter.lora.scale)
    notes = (*stored.notes, f"the adapters of {adapter.place} are merged into the weights")
    return dataclasses.replace(stored, tensors=tensors, files=stored.files + adapter.files, notes=notes)


def _kernels(lora: LoraConfig) -> list[names.Row]:
    return [row for row in names.ROWS if row.name.endswith(".kernel") and row.name.split(".")[-2] in lora.targets]


def _rows(lora: LoraConfig) -> list[names.Row]:
    return [row for kernel in _kernels(lora) for row in names.factor_rows(kernel)]


def _apart(lora: LoraConfig, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The factors of each layer as they are stored, from stacks in our layout."""
    return {
        row.hf_name(layer): names.to_stored(factor.astype(np.float32), row.dims)
        for row in _rows(lora)
        for layer, factor in enumerate(arrays[row.name])
    }


def _check_shapes(adapter: Adapter, config: ModelConfig) -> None:
    leaves, wanted = named_leaves(abstract_model(config, lora=adapter.lora)), {}
    for row in _rows(adapter.lora):
        shape = leaves[row.name].shape
        wanted |= {row.hf_name(layer): names.stored_shape(shape[1:], row.dims) for layer in row.layers(shape)}
    found = {name: factor.shape for name, factor in adapter.factors.items()}
    problems = [f"{name} is missing" for name in wanted if name not in found]
    problems += [f"{name} has no place in it" for name in found if name not in wanted]
    problems += [
        f"{name} is {list(found[name])}, wanted {list(shape)}"
        for name, shape in wanted.items()
        if found.get(name, shape) != shape
    ]
    if problems:
        raise InputError(f"{adapter.place} does not fit the model: {join_problems(problems)}")


@dataclasses.dataclass(frozen=True)
class _Merged(Wrapped):
    """A weight and the product of two factors of its own rows and columns. a [R, in]; b [out, R]."""

    a: np.ndarray
    b: np.ndarray
    scale: float

    def read(self, slices: tuple[slice, ...]) -> np.ndarray:
        part = self.tensor.read(slices)
        rows, columns = slices
        return (part.astype(np.float32) + self.scale * (self.b[rows] @ self.a[:, columns])).astype(part.dtype)
