"""Bytes of a file or of memory at a place, all of them or an InputError: what readers of untrusted files stand on.

A file is read with pread, not mapped: one cut short while it is open gives an error and not SIGBUS, and a mapping's
pages would add up to the whole file.
"""

import contextlib
import dataclasses
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from neox_jax.errors import InputError

CHUNK_BYTES = 8 << 20  # what is read and not kept is read in pieces of this


@dataclasses.dataclass(frozen=True)
class RawBytes:
    """Bytes as they are stored. read(start, out): those from `start` on, into a writable buffer. path: of the file in
    which they begin at `start`, or None where that is no plain file. stream: where there is a checksum of just these
    bytes, gives a `read` without it and what is to be updated with all of them, in order, which raises at the last."""

    num_bytes: int
    read: Callable[[int, memoryview], None]
    path: str | None
    start: int
    stream: Callable[[], tuple[Callable[[int, memoryview], None], list]] | None = None

    def cut(self, num_bytes: int) -> "RawBytes":
        """The first of them."""
        return self if num_bytes >= self.num_bytes else dataclasses.replace(self, num_bytes=num_bytes, stream=None)


class ByteReader:
    """Bounds-checked reads of bytes in memory. path, first: of the file in which they begin there; None if in none."""

    path: str | None = None
    first = 0

    def __init__(self, data: bytes):
        self._data, self.name, self.num_bytes = memoryview(data), "the given bytes", len(data)

    def refuse(self, why: str):
        """Raises: InputError, always, naming the file."""
        raise InputError(f"{self.name}: {why}")

    def read(self, start: int, num_bytes: int) -> bytearray:
        """`num_bytes` bytes from `start`. Raises: InputError, before it allocates, if not all of them are there."""
        self.check_bounds(start, num_bytes)
        out = bytearray(num_bytes)
        self.read_into(start, out)
        return out

    def raw(self, start: int, num_bytes: int) -> RawBytes:
        """`num_bytes` bytes from `start`."""
        return RawBytes(num_bytes, lambda first, out: self.read_into(start + first, out), self.path, self.first + start)

    def read_into(self, start: int, out) -> None:
        """Fills `out`, a writable buffer of bytes, from `start`. Raises: InputError if not all of them are there."""
        self.check_bounds(start, len(out))
        memoryview(out)[:] = self._data[start : start + len(out)]

    def check_bounds(self, start: int, num_bytes: int) -> None:
        """Raises: InputError if those bytes are not all there."""
        if start < 0 or start + num_bytes > self.num_bytes:
            self.refuse("is too short for what should be in it; download it again")


class FileReader(ByteReader):
    """The same of a regular file; nothing else (a pipe would block, a device never ends).

    It is opened for each read, as a checkpoint can be of more files than a process may have open, and each read is of
    the file that was there at first, unchanged.
    """

    def __init__(self, path: Path):
        self.name = ascii(str(path))[1:-1]
        self.path = os.path.abspath(path)  # of the working directory that it is now
        with self._opened() as descriptor:
            status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{self.name} is no regular file; wanted a weights file")
        self.num_bytes, self._identity = status.st_size, _identity(status)

    def read_into(self, start: int, out) -> None:
        self.check_bounds(start, len(out))  # preadv takes -1 for "where the last read ended"
        left = memoryview(out)
        with self._opened() as descriptor:
            self._check_same(descriptor)
            try:
                while left and (num_read := os.preadv(descriptor, [left], start)):
                    start, left = start + num_read, left[num_read:]
            except OSError as error:
                raise InputError(f"{self.name} cannot be read: {error.strerror}") from error
            self._check_same(descriptor)
        if left:
            self.refuse(_SHORTER)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[int]:
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError as error:
            raise InputError(f"{self.name} is not there; check the path, or download it again") from error
        except (OSError, ValueError) as error:  # ValueError: a NUL in the name
            raise InputError(f"{self.name} cannot be opened: {getattr(error, 'strerror', error)}") from error
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def _check_same(self, descriptor: int) -> None:
        status = os.fstat(descriptor)
        if _identity(status) != self._identity:
            self.refuse(_SHORTER if status.st_size < self.num_bytes else "changed while it was read; try again")


_SHORTER = "became shorter while it was open; download it again"


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def show_name(name: str) -> str:
    """A name from a file for a message: one line, plain, not long."""
    return ascii(name[:80] + "..." if len(name) > 80 else name)
