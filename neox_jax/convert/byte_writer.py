"""Gigabytes into files, past the page cache where the file system allows it."""

import collections
import concurrent.futures
import contextlib
import errno
import fcntl
import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

# At a time to a file. Linux 6.18 on ext4, 3 GB and fsync: 1.4 GB/s in writes of 128 KiB, 0.35 in writes of 8 MiB.
PIECE_BYTES = 128 << 10
MAX_DIGESTS = 3  # of the same bytes
MAX_BLOCKS = 4  # that are used and not hashed yet
BUFFER_BYTES, NUM_BUFFERS = 4 << 20, 8  # written as one; filled ones wait, so that the disk does not


class LargeFiles:
    """Writes new files, each from its start to its end, and hashes what it writes; leaving it without an error waits
    until all is hashed and handed to the system (not for the disk: `disk.sync`).

    Past the page cache where the file system allows it: its pages cost more time than the bytes (measured as
    PIECE_BYTES: 2.2 GB/s with 0.05 s of processor time a gigabyte, 1.75 and 0.09 in writes of 1 MiB, 0.6 s through the
    cache), and reading is faster for what they would have displaced. Threads write and hash from the memory that was
    read into, while the next bytes are read into another.
    """

    def __init__(self, num_open: int = 1):
        """num_open: files that are written at a time."""
        num_buffers = NUM_BUFFERS - 1 + num_open
        self._empty = [mmap.mmap(-1, BUFFER_BYTES) for _ in range(num_buffers)]  # whole pages, for direct writes
        self._used = collections.deque()  # (buffer, what is to be done with it)
        self._writing = concurrent.futures.ThreadPoolExecutor(1, "writing")
        self._hashing = [concurrent.futures.ThreadPoolExecutor(1, "hashing") for _ in range(MAX_DIGESTS)]

    def __enter__(self) -> "LargeFiles":
        return self

    def __exit__(self, kind, *_) -> None:
        try:
            while kind is None and self._used:
                self._wait_for_one()
        finally:
            for thread in (*self._hashing, self._writing):  # nothing is written after this
                thread.shutdown()

    @contextlib.contextmanager
    def create(self, path: Path) -> Iterator["_LargeFile"]:
        """A new file, with `write` and `fill`. Raises: OSError, also for what was written before."""
        file = _LargeFile(self, path)
        try:
            yield file
            file.flush()
        finally:
            self._writing.submit(file.close)

    def take_buffer(self) -> mmap.mmap:
        while not self._empty:
            self._wait_for_one()
        return self._empty.pop()

    def hashed(self, blocks: Iterable[np.ndarray], digests: Sequence) -> Iterator[np.ndarray]:
        """The blocks, which are hashed while they are used, and must stay as they are."""
        waiting = collections.deque()
        for block in blocks:
            waiting.append(self.hash(digests, block.reshape(-1).view(np.uint8).data))
            yield block
            if len(waiting) == MAX_BLOCKS:
                _wait_for(waiting.popleft())
        for hashed in waiting:
            _wait_for(hashed)

    def hash(self, digests: Sequence, data: memoryview) -> list[concurrent.futures.Future]:
        """Has digests updated with bytes that stay as they are until then, each by a thread of its place."""
        assert len(digests) <= MAX_DIGESTS
        return [thread.submit(one.update, data) for thread, one in zip(self._hashing, digests, strict=False)]

    def write(self, write: Callable[[], None], buffer: mmap.mmap, hashed: list[concurrent.futures.Future]) -> None:
        """hashed: what must be done too before the buffer is used again."""
        self._used.append((buffer, [*hashed, self._writing.submit(write)]))

    def _wait_for_one(self) -> None:
        buffer, to_do = self._used.popleft()
        _wait_for(to_do)
        self._empty.append(buffer)


def _wait_for(to_do: list[concurrent.futures.Future]) -> None:
    """Raises: what went wrong."""
    for done in to_do:
        done.result()


class _LargeFile:
    def __init__(self, files: LargeFiles, path: Path):
        self._files, self._buffer, self._filled, self._hashed = files, None, 0, []
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        self._direct = self._set_direct(True)

    def _set_direct(self, wanted: bool) -> bool:
        """Whether writes go past the page cache from now on."""
        flag = getattr(os, "O_DIRECT", 0)
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL) & ~flag
        try:
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags | flag if wanted else flags)
        except OSError:
            return False  # not on this file system
        return wanted and flag != 0

    def write(self, data, digests: Sequence = ()) -> int:
        """Writes a buffer of bytes, all of it, and returns how many. digests: what to `update` with them, at most
        MAX_DIGESTS; that is complete when all is written."""
        view = memoryview(data)

        def copy(start: int, out: memoryview) -> None:
            out[:] = view[start : start + len(out)]

        self.fill(len(view), copy, digests)
        return len(view)

    def fill(self, num_bytes: int, read: Callable[[int, memoryview], None], digests: Sequence = ()) -> None:
        """Writes what `read(start, out)` gives, for parts one after the other: bytes from `start` on, into `out`."""
        start = 0
        while start < num_bytes:
            if self._buffer is None:
                self._buffer, self._filled, self._hashed = self._files.take_buffer(), 0, []
            part = memoryview(self._buffer)[self._filled : self._filled + num_bytes - start]
            read(start, part)
            self._hashed += self._files.hash(digests, part)
            start, self._filled = start + len(part), self._filled + len(part)
            if self._filled == BUFFER_BYTES:
                self.flush()

    def flush(self) -> None:
        """Hands what there is to the threads; whoever writes more after it makes the file slow."""
        if self._buffer is not None:
            data = memoryview(self._buffer)[: self._filled]
            self._files.write(lambda: self._write(data), self._buffer, self._hashed)
            self._buffer = None

    def close(self) -> None:
        os.close(self._descriptor)

    def _write(self, left: memoryview) -> None:
        while left:
            whole_pages = len(left) - len(left) % mmap.PAGESIZE
            if self._direct and not whole_pages:  # the end of the file
                self._direct = self._set_direct(False)
            try:
                left = left[os.write(self._descriptor, left[: whole_pages if self._direct else PIECE_BYTES]) :]
            except OSError as error:
                if error.errno != errno.EINVAL or not self._direct:
                    raise
                # A file system that says only now that it cannot, or the rest of what a full disk did not take.
                self._direct = self._set_direct(False)
