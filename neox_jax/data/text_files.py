"""Which text files are meant, which share of them is one machine's, and what documents are in them."""

import contextlib
import dataclasses
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from neox_jax.errors import InputError

SUFFIXES = (".txt", ".jsonl", ".jsonl.zst")
CHUNK_BYTES = 1 << 20  # of text, in one piece of work; a longer document is a piece by itself
ZSTD_BLOCK_BYTES = 1 << 16  # compressed; text may be hundreds of times as long
ZSTD_WINDOW_BYTES = 1 << 31  # what `zstd --long=31` asks for; the library alone refuses more than 2**27


@dataclasses.dataclass(frozen=True)
class Shard:
    """Part `index` of `count` of some work, counted from 0. Raises: InputError for one that is not among them."""

    index: int
    count: int

    def __post_init__(self):
        if not 0 <= self.index < self.count:
            raise InputError(
                f"shard {self}: there are 0/{self.count} to {self.count - 1}/{self.count}; give one of these"
            )

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


@dataclasses.dataclass(frozen=True)
class Span:
    """Bytes [start, end) of a file as it is stored; whole lines, or the whole file."""

    path: Path
    start: int
    end: int


@dataclasses.dataclass(frozen=True)
class Piece:
    """Whole documents: bytes [start, end) of a file's text, which in a .zst is only there once decompressed.

    data: these bytes where they are at hand, else None. input_bytes: what was read for them of the file as stored.
    """

    path: Path
    start: int
    end: int
    data: bytes | None
    input_bytes: int

    def read(self) -> bytes:
        """Raises: InputError."""
        if self.data is not None:
            return self.data
        with _opened(self.path) as file:
            file.seek(self.start)
            return file.read(self.end - self.start)


@dataclasses.dataclass(frozen=True)
class BadText:
    """What is no document, and why. start: its first byte in the file's text."""

    path: Path
    start: int
    problem: str

    def __str__(self) -> str:
        """FILE:LINE and the problem, for a .txt without the line; reads the file up to there to count lines."""
        if self.path.name.endswith(".txt"):
            return f"{self.path}: {self.problem}"
        line, left = 1, self.start
        with _opened(self.path) as file:
            text = _decompressed(file, self.path) if _is_compressed(self.path) else file
            while left and (block := text.read(min(left, CHUNK_BYTES))):
                line, left = line + block.count(b"\n"), left - len(block)
        return f"{self.path}:{line}: {self.problem}"


def find_inputs(inputs: list[str | Path]) -> list[Path]:
    """The files meant: named ones as they are, folders searched. Raises: InputError for what cannot be read."""
    paths = []
    for name in map(Path, inputs):
        if name.is_dir():
            found = sorted(path for path in name.rglob("*") if path.is_file() and path.name.endswith(SUFFIXES))
            if not found:
                raise InputError(f"no {', '.join(SUFFIXES)} files in {name}")
            paths += found
        elif not name.is_file():
            raise InputError(f"no file or folder {name}")
        elif not name.name.endswith(SUFFIXES):
            raise InputError(f"{name} is of no known kind; wanted {', '.join(SUFFIXES)}, or a folder of these")
        else:
            paths.append(name)
    return paths


def find_spans(paths: list[Path], shard: Shard) -> list[Span]:
    """A shard's share of these files, by bytes as they are stored; those of all shards in order are all of them.

    A line of a .jsonl belongs to the shard that its first byte falls to; a .txt or .zst, which is not cut, to the one
    of its middle byte. Raises: InputError.
    """
    sizes = [path.stat().st_size for path in paths]
    first, last = (sum(sizes) * i // shard.count for i in (shard.index, shard.index + 1))
    spans, position = [], 0
    for path, size in zip(paths, sizes, strict=True):
        if path.name.endswith(".jsonl"):
            with _opened(path) as file:
                start, end = (_next_line(file, min(max(0, edge - position), size)) for edge in (first, last))
        else:
            start, end = 0, size if first <= position + size // 2 < last else 0
        if start < end:
            spans.append(Span(path, start, end))
        position += size
    return spans


def read_pieces(span: Span) -> Iterator[Piece]:
    """A span in pieces of CHUNK_BYTES, or of one document where that is longer. Raises: InputError."""
    if span.path.name.endswith(".txt"):
        yield Piece(span.path, span.start, span.end, None, span.end - span.start)
    elif _is_compressed(span.path):
        yield from _read_compressed(span.path)
    else:
        with _opened(span.path) as file:
            start = span.start
            while start < span.end:
                end = _next_line(file, min(start + CHUNK_BYTES, span.end))
                yield Piece(span.path, start, end, None, end - start)
                start = end


def split_texts(piece: Piece, json_key: str) -> Iterator[str | BadText]:
    """The documents of a piece; blank lines of a .jsonl are none. Raises: InputError where it cannot be read."""
    data = piece.read()
    if piece.path.name.endswith(".txt"):
        yield _text_or_problem(piece, piece.start, lambda: _decode(data))
        return
    start = piece.start
    for line in data.split(b"\n"):
        if line.strip():
            yield _text_or_problem(piece, start, lambda line=line: _text_of_line(line, json_key))
        start += len(line) + 1


def _text_or_problem(piece: Piece, start: int, read) -> str | BadText:
    try:
        return read()
    except ValueError as error:
        return BadText(piece.path, start, str(error))


def _decode(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start} ({error.reason}); convert the file") from error


def _text_of_line(line: bytes, json_key: str) -> str:
    """Raises: ValueError that says what is wrong with it."""
    content = _decode(line)
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error}); wanted an object a line") from error
    if not isinstance(document, dict) or json_key not in document:
        got = f"the keys {', '.join(document)}" if isinstance(document, dict) else f"a {type(document).__name__}"
        raise ValueError(f"wanted an object with the key {json_key!r}, got {got}; name the key of the text")
    text = document[json_key]
    if not isinstance(text, str):
        raise ValueError(f"{json_key!r} holds a {type(text).__name__}; wanted a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"half a surrogate pair at character {error.start} is no text; mend it") from error
    return text


def _next_line(file: BinaryIO, position: int) -> int:
    """The first line that starts at this byte or behind it; the end of the file where none does."""
    if position == 0:
        return 0
    file.seek(position - 1)
    file.readline()
    return file.tell()


def _read_compressed(path: Path) -> Iterator[Piece]:
    with _opened(path) as file:
        text, start, read = _decompressed(file, path), 0, 0
        while data := text.read(CHUNK_BYTES) + text.readline():
            position = file.tell()
            yield Piece(path, start, start + len(data), data, position - read)
            start, read = start + len(data), position


def _is_compressed(path: Path) -> bool:
    return path.name.endswith(".zst")


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    try:
        with open(path, "rb") as file:
            yield file
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error


def _decompressed(file: BinaryIO, path: Path) -> BinaryIO:
    """The text inside a .zst of any number of frames; damage and truncation are an InputError."""
    try:
        import zstandard
    except ImportError as error:
        raise InputError(f"{path} needs the zstandard package: pip install 'neox_jax[data]'") from error

    def blocks() -> Iterator[bytes]:  # not the library's stream_reader, to which a truncated file is just a short one
        frame = None
        while data := file.read(ZSTD_BLOCK_BYTES):
            while data:
                frame = frame or zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW_BYTES).decompressobj()
                try:
                    yield frame.decompress(data)
                except zstandard.ZstdError as error:
                    raise InputError(f"{path} is no zstandard file, or damaged ({error}); copy it again") from error
                data = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
        if frame:
            raise InputError(f"{path} ends in the middle of its data: it is truncated; copy it again")

    return io.BufferedReader(_BlockReader(blocks()), CHUNK_BYTES)


class _BlockReader(io.RawIOBase):
    """A file made of the blocks of an iterator."""

    def __init__(self, blocks: Iterator[bytes]):
        self._blocks, self._rest = blocks, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._rest:
            block = next(self._blocks, None)
            if block is None:
                return 0
            self._rest = memoryview(block)
        n = min(len(buffer), len(self._rest))
        buffer[:n], self._rest = self._rest[:n], self._rest[n:]
        return n
