"""Folders that are there whole or not at all, and JSON that says what it says once."""

import collections
import contextlib
import errno
import json
import os
import re
import shutil
from pathlib import Path

from neox_jax.disk import sync
from neox_jax.errors import InputError

SPARE_BYTES = 64 << 20  # beside the tensors: configuration, headers, indexes, and what a file system takes itself
MAX_JSON_BYTES = 16 << 20  # an index of 160,000 tensors
MAX_PROBLEMS, MAX_PROBLEM = 50, 500  # told of; characters of one

_PARTIAL = re.compile(r"\..+\.partial-\d+")


def require_new(folder: Path) -> None:
    """Raises: InputError if there is a file of this name, or a folder that is not empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} already has something in it; give a new or an empty folder")


@contextlib.contextmanager
def written_whole(folder: Path, num_bytes: int):
    """Gives a new folder beside `folder`, which takes its name once all its files are on disk.

    num_bytes: about how many will be written. What fails, or is interrupted, leaves nothing.
    Raises: InputError if folder has something in it, if there is no room for that many, or if room runs out.
    """
    folder = Path(os.path.abspath(folder))
    require_new(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder.parent).free
        if free < num_bytes + SPARE_BYTES:
            raise InputError(
                f"{folder} needs {(num_bytes + SPARE_BYTES) / 1e9:.2f} GB, and {folder.parent} has {free / 1e9:.2f} GB "
                "free; make room, or give a folder on another disk"
            )
        partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
    except OSError as error:
        raise InputError(f"{folder} cannot be made: {error.strerror}") from error
    try:
        yield partial
        for path in [*partial.rglob("*"), partial]:
            sync(path)
        partial.rename(folder)  # onto an empty folder too
        sync(folder.parent)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        reason = _full_disk(error)
        if reason:
            raise InputError(f"{folder} cannot be written: {reason}; nothing of it was kept") from error
        raise


def _full_disk(error: BaseException) -> str:
    """The system's words for it, where this error says that there is no more room; TensorStore's only quote them."""
    for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        reason = os.strerror(code)
        if getattr(error, "errno", None) == code or (isinstance(error, ValueError) and reason in str(error)):
            return reason
    return ""


def find_partials(folder: Path) -> list[Path]:
    """What conversions to this folder have left that were killed, or are still at work."""
    folder = Path(os.path.abspath(folder))
    return sorted(folder.parent.glob(f".{folder.name}.partial-*")) if folder.parent.is_dir() else []


def is_partial(path: Path) -> bool:
    """Whether this is in a folder that `written_whole` has not finished."""
    return any(_PARTIAL.fullmatch(part) for part in Path(os.path.abspath(path)).parts)


def read_json(path: Path):
    """Parses a JSON file. Raises: InputError if it cannot be read or parsed, or says a key twice."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"it is larger than {MAX_JSON_BYTES} bytes")
        return parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as JSON: {one_line(error)}") from error


def parse_json(text: str | bytes):
    """Parses JSON. Raises: ValueError if it is none, or says a key twice."""
    return json.loads(text, object_pairs_hook=_unique)


def _unique(pairs: list) -> dict:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        key, _ = collections.Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"key {key!r:.80} is there twice")
    return unique


def to_json(values: dict) -> str:
    return json.dumps(values, indent=2) + "\n"


def one_line(error: BaseException | str) -> str:
    """A text that may quote a file, for a message: one line, nothing that a terminal acts on, not long."""
    text = " ".join(str(error).split())
    text = text if len(text) <= MAX_PROBLEM else text[:MAX_PROBLEM] + "..."
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def join_problems(problems: list[str]) -> str:
    """All of them for one message; of very many the first, and how many more there are."""
    more = [f"and {len(problems) - MAX_PROBLEMS} more"] if len(problems) > MAX_PROBLEMS else []
    return "; ".join([*map(one_line, problems[:MAX_PROBLEMS]), *more])
