"""How a step comes to be: a temporary folder, that gets its name when everything in it is whole, hashed and on disk."""

import errno
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import orbax.checkpoint as ocp
from etils import epath

from neox_jax.checkpoint.steps import META_FILE, STEPS_FOLDER, TEMPORARY, temporary_of
from neox_jax.checkpoint.sums import write_sums
from neox_jax.disk import sync

_TOLD = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES, errno.ENOENT, errno.EFBIG)


def begin_step(step_folder: Path, items: list[str]) -> None:
    """Makes the temporary folder of a step, with a folder for each item; process 0 does, before any writes."""
    folder = temporary_of(step_folder)
    shutil.rmtree(folder, ignore_errors=True)
    try:
        for item in items:
            (folder / item).mkdir(parents=True)
    except OSError:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def commit_step(
    folder: Path,
    meta: dict,
    handlers: dict[str, ocp.CheckpointHandler],
    *,
    beside_training: bool,
    digests: Mapping[Path, str] = MappingProxyType({}),
) -> None:
    """Makes a step of a temporary folder that all processes have written to. digests: as in `write_sums`.

    Raises: OSError.
    """
    for item, handler in handlers.items():
        handler.finalize(epath.Path(folder / item))
    (folder / META_FILE).parent.mkdir()
    (folder / META_FILE).write_text(json.dumps(meta), encoding="utf-8")
    # For Orbax's own CheckpointManager.
    known = {item: handler.typestr() for item, handler in handlers.items()}
    about = {"item_handlers": {**known, "meta": ocp.JsonCheckpointHandler.typestr()}, "metrics": {}}
    times = {"init_timestamp_nsecs": time.time_ns(), "commit_timestamp_nsecs": time.time_ns()}
    (folder / "_CHECKPOINT_METADATA").write_text(json.dumps({**about, **times}), encoding="utf-8")
    write_sums(folder, beside_training=beside_training, digests=digests)
    folder.rename(folder.with_name(folder.name.removesuffix(TEMPORARY)))
    sync(folder.parent)


def write_step_zero(
    folder: Path, meta: dict, write_params: Callable[[Path], tuple[ocp.CheckpointHandler, Mapping[Path, str]]]
) -> None:
    """Makes step 0 of a run folder, of parameters alone. Raises: OSError, and what `write_params` does.

    write_params: writes them into a folder and returns Orbax's handler of them, and `digests` as in `write_sums`.
    """
    step = (folder / STEPS_FOLDER).absolute() / "0"
    partial = temporary_of(step)
    begin_step(step, ["params"])
    with quiet_orbax:
        handler, digests = write_params(partial / "params")
        commit_step(partial, meta, {"params": handler}, beside_training=False, digests=digests)


def what_failed(error: BaseException) -> str:
    """The system's words for it where there are some; TensorStore's errors only quote them."""
    text = " ".join(str(error).split())
    for code in _TOLD:
        if getattr(error, "errno", None) == code or os.strerror(code) in text:
            return os.strerror(code)
    return f"{type(error).__name__}: {text[:300]}"


class _Quiet(logging.Filter):
    """As a context: Orbax logs nothing. What goes wrong is raised too, and said in a line; Orbax has tracebacks."""

    def __init__(self):
        super().__init__()
        self._lock, self._count = threading.Lock(), 0

    def __enter__(self):
        with self._lock:
            self._count += 1
            logging.getLogger("absl").addFilter(self)

    def __exit__(self, *_):
        with self._lock:
            self._count -= 1
            if self._count == 0:
                logging.getLogger("absl").removeFilter(self)

    def filter(self, record: logging.LogRecord) -> bool:
        places = [record.pathname]
        if record.exc_info and record.exc_info[2] is not None:  # absl's own file is the place, at times
            places.append(record.exc_info[2].tb_frame.f_code.co_filename)
        return not any("orbax" in place for place in places)


quiet_orbax = _Quiet()
