"""Folders that are there whole or not at all, and JSON that says what it says once."""

import collections
import contextlib
import errno
import fcntl
import json
import mmap
import os
import re
import shutil
from pathlib import Path

from neox_jax.errors import InputError

SPARE_BYTES = 64 << 20  # beside the tensors: configuration, headers, indexes, and what a file system takes itself
# At a time to a file. Linux 6.18 on ext4, 3 GB and fsync: 1.4 GB/s in writes of 128 KiB, 0.35 in writes of 8 MiB.
PIECE_BYTES = 128 << 10
LARGE_WRITE_BYTES = 1 << 20
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


def write_in_pieces(file, data) -> None:
    """Writes a buffer of bytes by PIECE_BYTES."""
    view = memoryview(data)
    for start in range(0, len(view), PIECE_BYTES):
        file.write(view[start : start + PIECE_BYTES])


class LargeFile:
    """A new file that is written once from its start to its end; leaving it without an error waits for the disk.

    Past the page cache where the file system allows it: its pages cost more time than the bytes (measured as
    PIECE_BYTES: 1.75 GB/s with 0.07 s of processor time a gigabyte, 0.6 s through the cache), and reading is faster
    for what they would have displaced.
    """

    def __init__(self, path: Path):
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        self._direct = self._set_direct(True)
        self._buffer, self._filled = mmap.mmap(-1, LARGE_WRITE_BYTES), 0  # of whole pages, as direct writes want

    def _set_direct(self, wanted: bool) -> bool:
        """Whether writes go past the page cache from now on."""
        flag = getattr(os, "O_DIRECT", 0)
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL) & ~flag
        try:
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags | flag if wanted else flags)
        except OSError:
            return False  # not on this file system
        return wanted and flag != 0

    def __enter__(self) -> "LargeFile":
        return self

    def write(self, data) -> None:
        view = memoryview(data)
        while view:
            part = view[: LARGE_WRITE_BYTES - self._filled]
            self._buffer[self._filled : self._filled + len(part)] = part
            self._filled, view = self._filled + len(part), view[len(part) :]
            if self._filled == LARGE_WRITE_BYTES:
                self._flush()

    def _flush(self) -> None:
        left = memoryview(self._buffer)[: self._filled]
        while left:
            if self._direct and len(left) % mmap.PAGESIZE:  # the end of the file, or what a full disk did not take
                self._direct = self._set_direct(False)
            try:
                left = left[os.write(self._descriptor, left if self._direct else left[:PIECE_BYTES]) :]
            except OSError as error:
                if error.errno != errno.EINVAL or not self._direct:
                    raise
                self._direct = self._set_direct(False)  # a file system that says only now that it cannot
        self._filled = 0

    def __exit__(self, kind, *_) -> None:
        try:
            if kind is None:
                self._flush()
                os.fsync(self._descriptor)
        finally:
            os.close(self._descriptor)


def sync(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
