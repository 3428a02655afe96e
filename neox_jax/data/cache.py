"""Arrays that take long to make, kept in files with their checksums: made once, then mapped.

They lie in PREFIX.cache/NAME/ beside the dataset, or, where that cannot be written, in neox_jax/ of the user's cache
folder ($XDG_CACHE_HOME, else ~/.cache); where neither can, they stay in memory. NAME says everything they depend on, so
that whoever writes them writes the same bytes: processes that start together each put whole files under the same names,
one file at a time, SHA256SUMS last.
"""

import hashlib
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

SUMS = "SHA256SUMS"  # as `sha256sum -c` reads it
_log = logging.getLogger(__name__)


def cached_arrays(
    prefix: str, name: str, arrays: tuple[str, ...], make: Callable[[], tuple[np.ndarray, ...]]
) -> tuple[np.ndarray, ...]:
    """What `make()` returns, mapped from the files of an earlier call where these are as they were written.

    arrays: the names of what it returns, for the files.
    """
    folders = [Path(f"{prefix}.cache") / name, _user_folder(prefix) / name]
    for folder in folders:
        found = _read(folder, arrays)
        if found is not None:
            return found
    made = make()
    for folder in folders:
        try:
            _write(folder, arrays, made)
        except OSError as error:
            _log.info("no cache in %s: %s", folder, error.strerror)
        else:
            return tuple(_map(folder, array) for array in arrays)
    _log.warning("neox-jax: neither %s nor %s can be written: they are made again at each start", *folders)
    return made


def _user_folder(prefix: str) -> Path:
    """One for each dataset, by where it lies."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    place = hashlib.sha256(os.path.abspath(prefix).encode()).hexdigest()[:16]
    return Path(base, "neox_jax", f"{Path(prefix).name}-{place}")


def _read(folder: Path, arrays: tuple[str, ...]) -> tuple[np.ndarray, ...] | None:
    """The arrays; None where there are none, or (with a line) where a file is not as it was written."""
    if not os.path.exists(folder / SUMS):  # nor where one may not look
        return None
    try:
        lines = [f"{_hash(folder / f'{array}.npy')}  {array}.npy\n" for array in arrays]
        problem = None if "".join(lines) == (folder / SUMS).read_text() else f"not all is as {SUMS} says"
    except (OSError, UnicodeDecodeError) as error:
        problem = str(error)
    if problem is None:
        return tuple(_map(folder, array) for array in arrays)
    _log.warning("neox-jax: the files in %s are damaged (%s); they are made again", folder, problem)
    return None


def _map(folder: Path, array: str) -> np.ndarray:
    return np.asarray(np.load(folder / f"{array}.npy", mmap_mode="r"))


def _write(folder: Path, arrays: tuple[str, ...], made: tuple[np.ndarray, ...]) -> None:
    """Each file whole under its name, SHA256SUMS last. Raises: OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for array, values in zip(arrays, made, strict=True):
        digest = _replace(folder / f"{array}.npy", lambda file, values=values: np.save(file, values))
        lines.append(f"{digest}  {array}.npy\n")
    _replace(folder / SUMS, lambda file: file.write("".join(lines).encode()))


def _hash(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _replace(path: Path, write: Callable) -> str:
    """Writes a file under another name and renames it; its SHA-256."""
    handle, temporary = tempfile.mkstemp(prefix=f"{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            os.fchmod(handle, 0o644)
            write(file)
        digest = _hash(temporary)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    return digest
