"""A run's steps on disk: `RUN/checkpoints/STEP/{params,optimizer,meta}`. A step has its name once it is whole."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import jax
import numpy as np

from neox_jax.config import ModelConfig
from neox_jax.disk import sync
from neox_jax.errors import InputError

FORMAT = 1
STEPS_FOLDER, DAMAGED_FOLDER = "checkpoints", "damaged_checkpoints"
META_FILE = "meta/metadata"
TEMPORARY = ".orbax-checkpoint-tmp"  # Orbax's own ending for what is not whole, so that its tools know it too


class DamagedError(InputError):
    """A step that is not as it was written."""


def list_steps(folder: Path) -> list[int]:
    """The steps under a `checkpoints` folder, ascending; temporary folders do not count."""
    try:
        names = [entry.name for entry in os.scandir(folder) if entry.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(int(name) for name in names if name.isdecimal() and str(int(name)) == name)


def temporary_of(step_folder: Path) -> Path:
    """Where a step is while it is written."""
    return step_folder.with_name(step_folder.name + TEMPORARY)


def remove_temporary(folder: Path) -> None:
    """Removes what killed saves have left under a `checkpoints` folder. For a run's only writer."""
    for path in folder.glob(f"*{TEMPORARY}*"):
        shutil.rmtree(path, ignore_errors=True)


def remove_step(step_folder: Path) -> None:
    """Removes a step, which loses its name first: a kill leaves no half of one."""
    doomed = step_folder.with_name(f"{step_folder.name}.removed{TEMPORARY}")
    shutil.rmtree(doomed, ignore_errors=True)
    step_folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def move_aside(step_folder: Path) -> Path:
    """Moves a damaged step out of `checkpoints`, under a name that is not taken, and returns where to."""
    folder = step_folder.parent.with_name(DAMAGED_FOLDER)
    folder.mkdir(exist_ok=True)
    target, number = folder / step_folder.name, 1
    while target.exists():
        target, number = folder / f"{step_folder.name}.{number}", number + 1
    step_folder.rename(target)
    sync(folder)
    sync(step_folder.parent)
    return target


def files_of(folder: Path) -> list[Path]:
    """Every file under a folder, sorted; hidden ones are the file system's or a desktop's."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))


def size_on_disk(folder: Path) -> int:
    """Bytes of all files; 0 for a step that a run removes meanwhile."""
    try:
        return sum(path.stat().st_size for path in files_of(folder))
    except FileNotFoundError:
        return 0


def make_meta(model: ModelConfig, params, adapter: dict | None = None) -> dict:
    """What a step says of itself, so that it is readable alone. adapter: of adapters, what they are and of what."""
    dtypes = [np.dtype(leaf.dtype).name for leaf in jax.tree.leaves(params)]
    meta = {"format": FORMAT, "model": dataclasses.asdict(model), "dtype": dtypes[0], "has_sums": True}
    meta |= {"quantization": "int8"} if "int8" in dtypes else {}
    return meta if adapter is None else {**meta, "adapter": adapter}


def read_meta(step_folder: Path) -> tuple[ModelConfig, str]:
    """The model and the parameters' dtype of a step.

    Raises: DamagedError if it cannot be read; InputError if a newer version wrote it.
    """
    meta = _load_meta(step_folder)
    try:
        if meta["format"] != FORMAT:
            raise InputError(
                f"{step_folder}: checkpoint format {meta['format']!r}, and this version reads {FORMAT}; update neox_jax"
            )
        return ModelConfig(**meta["model"]), meta["dtype"]
    except (KeyError, TypeError) as error:
        raise _unreadable(step_folder, error) from error


def read_quantization(step_folder: Path) -> str:
    """The format of a step's matrices where they are quantized, else "". Raises: DamagedError."""
    return _load_meta(step_folder).get("quantization", "")


def read_adapter_meta(step_folder: Path) -> dict | None:
    """What a step of adapters says of them; None of a model's step. Raises: DamagedError."""
    return _load_meta(step_folder).get("adapter")


def should_have_sums(step_folder: Path) -> bool:
    """Whether this step was written with its files' SHA-256; older versions did not. Raises: DamagedError."""
    return "has_sums" in _load_meta(step_folder)


def _load_meta(step_folder: Path) -> dict:
    try:
        meta = json.loads((Path(step_folder) / META_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _unreadable(step_folder, error) from error
    if not isinstance(meta, dict):
        raise _unreadable(step_folder, "no JSON object")
    return meta


def _unreadable(step_folder: Path, why) -> DamagedError:
    return DamagedError(f"{step_folder}: no readable checkpoint metadata at {Path(step_folder) / META_FILE} ({why})")
