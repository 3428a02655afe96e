"""One way in and one way out: a SOURCE is recognised by its content, whatever kind it is."""

import dataclasses
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np

from neox_jax.checkpoint.steps import STEPS_FOLDER, list_steps, read_meta
from neox_jax.checkpoint.sums import find_problems
from neox_jax.config import ModelConfig, check_choice
from neox_jax.convert import hf, hub, neox, orbax, peft
from neox_jax.convert.adapter import (
    Adapter,
    Base,
    adapter_of,
    attach,
    check_base,
    is_adapter_step,
    merge,
    read_adapter_step,
)
from neox_jax.convert.byte_reader import RawBytes
from neox_jax.convert.files import is_partial, read_json, written_whole
from neox_jax.convert.manifest import MANIFEST, Hashing, identify
from neox_jax.convert.neox_files import is_neox_folder, locate_step
from neox_jax.convert.stored import (
    Digests,
    StoredModel,
    Wrapped,
    check_dtype,
    from_model,
    padded_for,
    raw_parts,
    to_model,
)
from neox_jax.errors import InputError
from neox_jax.model import NeoX
from neox_jax.quantize import quantize_model
from neox_jax.sharding import AXES
from neox_jax.tokenizer import Tokenizer
from neox_jax.tree import num_bytes

TOKENIZER_FILE = "tokenizer.json"
WHOLE = ("params", "meta")  # of a step: what a model is made of
FORMATS = ("hf", "orbax", "neox")

_READ = {"hf": hf.read_hf, "neox": neox.read_neox, "orbax": orbax.read_step}


def load_model(
    source: str | Path,
    *,
    mesh=None,
    dtype=None,
    revision: str | None = None,
    quantize: str | None = None,
    adapter: str | Path | None = None,
    merged: bool = False,
) -> NeoX:
    """Loads a model from a SOURCE: a Hugging Face folder or hub id, a NeoX checkpoint (pipeline or sequential layout,
    any tensor parallelism), a run folder (its latest verified step, or `folder@step`), or a folder of one of its steps.
    A run of adapters, or a folder of PEFT's, is the model that it names with its adapters on it, not merged.

    mesh: ours, or any whose axis names are among ours. dtype: parameters are cast to it once; None keeps what is
    stored. revision: of a hub id. quantize: "int8" for weights in 8 bits (`quantize_model`), which a run may hold
    already. adapter: a run of adapters or PEFT's folder, to be put on the model. merged: into its weights.
    Raises: InputError if nothing recognisable is there, or what is there is incomplete, or adapters are of another
    model; never a random model.
    """
    if mesh is not None and not set(mesh.axis_names) <= set(AXES):
        raise InputError(f"mesh axes {mesh.axis_names}: each must be one of {', '.join(AXES)}")
    dtype = check_dtype(dtype)
    kind, folder, found = _open(source, revision=revision, adapter=adapter)
    if found is not None and found.base.sha256 is not None:
        check_base(found, _READ[kind](folder))
    if merged and found is not None:
        model = to_model(merge(_READ[kind](folder), found).cast(dtype), mesh=mesh)
    elif kind == "orbax":
        model = orbax.load_step(folder, mesh=mesh, dtype=dtype)
    else:
        model = to_model(_READ[kind](folder).cast(dtype), mesh=mesh)
    model = model if quantize is None else quantize_model(model, quantize)
    return model if merged or found is None else attach(model, found)


def open_source(source: str | Path, *, revision: str | None = None, adapter: str | Path | None = None) -> StoredModel:
    """The configuration and the tensors of a SOURCE, with its weights still on disk; adapters are merged into them.

    Raises: as `load_model`.
    """
    kind, folder, found = _open(source, revision=revision, adapter=adapter)
    stored = _READ[kind](folder)
    if found is None:
        return stored
    check_base(found, stored)
    return merge(stored, found)


def config_of(source: str | Path, *, mesh=None, revision: str | None = None) -> ModelConfig:
    """The model of a SOURCE as `load_model` makes it on the mesh; its weights are not read. Raises: as `load_model`."""
    kind, folder, found = _open(source, revision=revision, adapter=None, items=("meta",))
    if kind == "orbax" and found is None and not orbax.is_converted(folder):
        return read_meta(folder)[0]
    return padded_for(_READ[kind](folder).config, mesh)


def open_base(source: str | Path) -> tuple[str, Adapter | None]:
    """What a SOURCE is without the adapters that it may have, as a SOURCE from any working directory, and those.

    Raises: as `load_model`.
    """
    kind, folder, found = _open(source, revision=None, adapter=None)
    base = Base(str(source)) if found is None else found.base
    is_on_hub = kind == "hf" and not Path(base.source).exists()
    return (base.source if is_on_hub and base.revision is None else os.path.abspath(folder)), found


def identify_source(source: str | Path) -> str:
    """The identity of a SOURCE's weights (`manifest.identify`). Raises: as `load_model`."""
    return identify(open_source(source))


def open_adapter(path: str | Path) -> Adapter:
    """The adapters of a run, or of PEFT's folder. Raises: InputError where there are none, or they are damaged."""
    kind, folder = _locate_whole(path, revision=None)
    if kind == "peft":
        return peft.read_peft(folder)
    if kind == "orbax" and is_adapter_step(folder):
        return read_adapter_step(folder)
    raise InputError(f"{path} holds a model, and no adapters; wanted a run with lora.rank, or PEFT's folder")


def _open(
    source: str | Path, *, revision: str | None, adapter: str | Path | None, items: tuple[str, ...] = WHOLE
) -> tuple[str, Path, Adapter | None]:
    """The kind and the folder of a model, and the adapters to be put on it, if any. items: as `_locate_whole`."""
    found = None if adapter is None else open_adapter(adapter)
    kind, folder = _locate_whole(source, revision=revision, items=items)
    if kind != "peft" and not (kind == "orbax" and is_adapter_step(folder)):
        return kind, folder, found
    if found is not None:
        raise InputError(f"{source} has adapters already; with --adapter name the model that they are for")
    found = open_adapter(source)
    if not found.base.source:
        raise InputError(
            f"{source} does not say which model its adapters are for; name that one, and these as --adapter"
        )
    try:
        kind, folder = _locate_whole(found.base.source, revision=revision or found.base.revision, items=items)
    except InputError as error:
        raise InputError(
            f"the model that the adapters in {source} are for: {error}; or name it, and them as --adapter"
        ) from error
    if kind == "peft" or (kind == "orbax" and is_adapter_step(folder)):
        raise InputError(f"{source} has adapters for {found.base.source}, which has some itself; merge those first")
    return kind, folder, found


def folder_of(source: str | Path, *, revision: str | None = None) -> Path:
    """The folder of a SOURCE in which its tokenizer and its manifest are. Raises: as `load_model`."""
    kind, folder = locate(source, revision=revision)
    if kind == "peft" and not (folder / TOKENIZER_FILE).is_file():
        base = open_adapter(folder).base
        return folder_of(base.source, revision=revision or base.revision)
    if kind == "orbax":
        return folder.parent.parent  # beside its checkpoints
    if kind == "neox" and not (folder / TOKENIZER_FILE).is_file() and not (folder / MANIFEST).is_file():
        return locate_step(folder).parent
    return folder


def load_tokenizer(source: str | Path, *, revision: str | None = None) -> Tokenizer:
    """The tokenizer of a SOURCE, or of a tokenizer.json file. Raises: InputError if there is none."""
    if Path(source).is_file():
        return Tokenizer.from_file(source)
    folder = folder_of(source, revision=revision)
    if not (folder / TOKENIZER_FILE).is_file():
        raise InputError(f"{folder} has no {TOKENIZER_FILE}; name a tokenizer file, or copy the model's beside it")
    return Tokenizer.from_file(folder / TOKENIZER_FILE, eos_token_id=_stated_eos(folder))


def save_model(
    model: NeoX,
    path: str | Path,
    *,
    format: str = "hf",
    tokenizer: Tokenizer | None = None,
    tensor_parallel: int = 1,
) -> None:
    """Writes a model in its own dtype, with its configuration and, where given, its tokenizer.

    format: hf (a folder that transformers loads), orbax (a run folder with the parameters as step 0) or neox (NeoX's
    pipeline layout, cut for tensor_parallel ranks): adapters are merged into the weights. Or peft: the adapters alone.
    Takes any pytree of the model's structure: gradients, for one. Nothing half-written is left behind. A quantized
    model goes into orbax only.
    Raises: InputError for another format, a folder that is there already and not empty, or where there is no room.
    """
    tokenizer_json = None if tokenizer is None else tokenizer.to_json()
    check_choice("format", format, (*FORMATS, "peft"))
    if format == "peft":
        peft.save_peft(adapter_of(model), path)
        return
    if model.lora is not None and model.quantization:
        raise InputError(f"adapters over {model.quantization} weights cannot be merged; save them as peft")
    if model.quantization:
        if format != "orbax":
            raise InputError(
                f"{model.quantization} weights cannot be saved as {format}; take orbax, or save the model "
                "that they were made from"
            )
        _write_orbax(path, num_bytes(model), tokenizer_json, lambda folder: orbax.write_model(model, folder))
        return
    stored = from_model(model)
    stored = stored if model.lora is None else merge(stored, adapter_of(model))
    _write(stored, path, format=format, tensor_parallel=tensor_parallel, tokenizer_json=tokenizer_json)


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    format: str,
    tensor_parallel: int = 1,
    dtype=None,
    tokenizer: Tokenizer | None = None,
    revision: str | None = None,
    adapter: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> StoredModel:
    """Writes a SOURCE in another format (see `save_model`) without ever holding the model, and a manifest beside it.

    adapter: merged into it. progress: called with the bytes of tensors done, and of all. Returns what was read; its
    notes are for the user.
    Raises: as `load_model` and `save_model`.
    """
    check_choice("format", format, FORMATS)
    stored = open_source(source, revision=revision, adapter=adapter).cast(dtype)
    with Hashing(stored) as hashing:
        read = stored if progress is None else _count(stored, progress)
        tokenizer_json = None if tokenizer is None else tokenizer.to_json()
        about = {"written": {"format": format, "tensor_parallel": tensor_parallel}}
        _write(
            read,
            destination,
            format=format,
            tensor_parallel=tensor_parallel,
            tokenizer_json=tokenizer_json,
            digests=hashing.digests,
            finish=lambda folder: hashing.write(folder, **about),
        )
    return stored


def _write(
    stored: StoredModel,
    path: str | Path,
    *,
    format: str,
    tensor_parallel: int,
    tokenizer_json: str | None,
    digests: Digests | None = None,
    finish: Callable[[Path], None] | None = None,
) -> None:
    if tensor_parallel != 1 and format != "neox":
        raise InputError(f"tensor_parallel {tensor_parallel} is of NeoX's layout only; {format} has one part")
    if format == "hf":
        hf.save_hf(stored, path, tokenizer_json=tokenizer_json, digests=digests, finish=finish)
    elif format == "neox":
        neox.save_neox(
            stored,
            path,
            tensor_parallel=tensor_parallel,
            tokenizer_json=tokenizer_json,
            digests=digests,
            finish=finish,
        )
    else:

        def write(folder: Path) -> None:
            orbax.write_run(stored, folder, digests)
            if finish is not None:
                finish(folder)

        _write_orbax(path, stored.num_bytes, tokenizer_json, write)


def _write_orbax(path: str | Path, size: int, tokenizer_json: str | None, write: Callable[[Path], None]) -> None:
    with written_whole(Path(path), size) as partial:
        if tokenizer_json is not None:
            (partial / TOKENIZER_FILE).write_text(tokenizer_json, encoding="utf-8")
        write(partial)


def _count(stored: StoredModel, progress: Callable[[int, int], None]) -> StoredModel:
    """The same model, which tells of what is read from it."""
    done, total, lock = 0, stored.num_bytes, threading.Lock()

    def count(num_bytes: int) -> None:
        nonlocal done
        with lock:  # a format may be written by several threads
            done += num_bytes
            progress(min(done, total), total)

    tensors = {name: _Counted(tensor, count) for name, tensor in stored.tensors.items()}
    return dataclasses.replace(stored, tensors=tensors)


@dataclasses.dataclass(frozen=True)
class _Counted(Wrapped):
    count: Callable[[int], None]

    @property
    def raw(self) -> list[RawBytes] | None:
        parts = raw_parts(self.tensor)
        return None if parts is None else [self._counted(raw) for raw in parts]

    def _counted(self, raw: RawBytes) -> RawBytes:
        def counting(read: Callable[[int, memoryview], None]) -> Callable[[int, memoryview], None]:
            def counted(start: int, out: memoryview) -> None:
                read(start, out)
                self.count(len(out))

            return counted

        def stream() -> tuple[Callable[[int, memoryview], None], list]:
            read, checks = raw.stream()
            return counting(read), checks

        return dataclasses.replace(raw, read=counting(raw.read), stream=raw.stream and stream)

    def read(self, slices: tuple[slice, ...]) -> np.ndarray:
        part = self.tensor.read(slices)
        self.count(part.nbytes)
        return part


def locate(source: str | Path, *, revision: str | None = None) -> tuple[str, Path]:
    """Recognises a SOURCE by its content: (kind, folder), for orbax the folder of the chosen step."""
    text, _, step = str(source).rpartition("@")
    if text and step.isdigit() and Path(text).is_dir():
        return "orbax", _run(Path(text), int(step))
    path = Path(source)
    if is_partial(path):
        raise InputError(f"{path} is of a conversion that was interrupted or is still at work; convert again")
    if path.is_dir():
        if (path / STEPS_FOLDER).is_dir():
            return "orbax", _run(path, None)
        if path.name.isdigit() and (path / "params").is_dir():
            return "orbax", path
        if is_neox_folder(path):
            return "neox", path
        if hf.is_hf_folder(path):
            return "hf", path
        if peft.is_peft_folder(path):
            return "peft", path
        raise InputError(
            f"{path} is no model: wanted a Hugging Face folder (config.json and *.safetensors), a run folder "
            f"({STEPS_FOLDER}/STEP), a NeoX checkpoint (latest and global_stepN) or PEFT's ({peft.CONFIG})"
        )
    if not path.exists() and hub.looks_like_repo_id(str(source)):
        return "hf", hub.fetch_snapshot(str(source), revision=revision)
    raise InputError(f"no model at {source}: no such folder, and not the id of a model on the hub (ORGANISATION/NAME)")


def _locate_whole(source: str | Path, *, revision: str | None, items: tuple[str, ...] = WHOLE) -> tuple[str, Path]:
    """As `locate`, but of a run folder the newest step of which these items are as they were written.

    One that was asked for by number is not replaced by another. Raises: InputError if it, or every one, is damaged.
    """
    kind, folder = locate(source, revision=revision)
    if kind != "orbax":
        return kind, folder
    steps = [folder]
    if (Path(source) / STEPS_FOLDER).is_dir():
        steps = [folder.parent / str(step) for step in reversed(list_steps(folder.parent))]
    damaged = []
    for step in steps:
        problems = find_problems(step, items=items)
        if not problems:
            for text in damaged:
                print(f"neox-jax: {text}; taking step {step.name}", file=sys.stderr, flush=True)
            if problems is None:
                print(f"neox-jax: {step} has no checksums (of an older version): not verified", file=sys.stderr)
            return kind, step
        damaged.append(f"{step} is damaged ({problems[0]})")
    raise InputError(f"{'; '.join(damaged)}; take another step, or another copy of it")


def _run(folder: Path, step: int | None) -> Path:
    steps = list_steps(folder / STEPS_FOLDER)
    if not steps:
        raise InputError(f"{folder / STEPS_FOLDER} holds no complete checkpoint yet")
    if step is not None and step not in steps:
        raise InputError(f"{folder} has no checkpoint of step {step}; it has {', '.join(map(str, steps))}")
    return folder / STEPS_FOLDER / str(steps[-1] if step is None else step)


def _stated_eos(folder: Path) -> int | None:
    """The eos id that a Hugging Face folder's config.json states, for tokenizers that do not say which it is."""
    path = folder / "config.json"
    if not path.is_file():
        return None
    values = read_json(path)
    eos = values.get("eos_token_id") if isinstance(values, dict) else None
    return eos if isinstance(eos, int) else None
