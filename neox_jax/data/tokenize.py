"""Text files to a Megatron dataset, in bounded memory; the same bytes for any number of workers."""

import collections
import dataclasses
import functools
import io
import itertools
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np

from neox_jax.data.megatron import IndexedDatasetWriter, best_dtype
from neox_jax.errors import InputError
from neox_jax.tokenizer import Tokenizer

SUFFIXES = (".txt", ".jsonl", ".jsonl.zst")
CHUNK_BYTES = 1 << 20  # of text, in one piece of work; a longer document is a piece by itself
ZSTD_BLOCK_BYTES = 1 << 16  # compressed; text may be hundreds of times as long
CHUNKS_AHEAD = 3  # for each worker: how much is read ahead of what is written


@dataclasses.dataclass(frozen=True)
class TokenizeSummary:
    """What was written. bytes: of UTF-8 text in the documents. empty_documents: left out, since they had no tokens."""

    documents: int
    tokens: int
    bytes: int
    seconds: float
    empty_documents: int


@dataclasses.dataclass(frozen=True)
class _Chunk:
    """Lines of one .jsonl (first_line counts from 1), or, with first_line 0, the whole of one .txt."""

    path: str
    first_line: int
    lines: list[bytes]
    input_bytes: int  # read from the file for it, compressed where the file is


@dataclasses.dataclass(frozen=True)
class _Tokens:
    """The documents of a chunk end to end, and the number of tokens in each."""

    tokens: np.ndarray
    sizes: list[int]
    num_bytes: int
    num_empty: int


def tokenize_files(
    inputs: list[str | Path],
    *,
    tokenizer: Tokenizer,
    output: str | Path,
    append_eod: bool = False,
    json_key: str = "text",
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> TokenizeSummary:
    """Writes OUTPUT.bin and OUTPUT.idx, one sequence a document, as gpt-neox's preprocess_data.py does.

    inputs: .txt (a document each), .jsonl and .jsonl.zst (a document a line, under json_key), or folders, searched
    for these in the order of their sorted paths. Text is taken byte for byte: line ends are not translated.
    append_eod: tokenizer.eos_token_id ends each document. progress(bytes_done, bytes_total) counts input bytes.
    workers: processes; with 1 the tokenizers library threads by itself.
    Raises: InputError with file and line for what is no UTF-8, JSON or text; for no documents at all; then nothing
    is written.
    """
    began = time.perf_counter()
    if append_eod and tokenizer.eos_token_id is None:
        raise InputError(
            "append_eod: this tokenizer has no end-of-document token (<|endoftext|> or </s>); leave it off"
        )
    paths = find_inputs(inputs)
    total_bytes, done_bytes = sum(path.stat().st_size for path in paths), 0
    dtype = best_dtype(tokenizer.vocab_size)
    job = _Job(tokenizer, append_eod=append_eod, json_key=json_key, dtype=dtype)
    documents = tokens = text_bytes = empty = 0
    with IndexedDatasetWriter(output, dtype) as writer:
        chunks = itertools.chain.from_iterable(map(_read_chunks, paths))
        if workers > 1:
            results = _tokenize_in_processes(job, chunks, workers)
        else:
            results = ((chunk.input_bytes, job.tokenize(chunk)) for chunk in chunks)
        for input_bytes, result in results:
            for document in np.split(result.tokens, np.cumsum(result.sizes)[:-1]) if result.sizes else []:
                writer.add_document(document)
            documents, tokens = documents + len(result.sizes), tokens + len(result.tokens)
            text_bytes, empty = text_bytes + result.num_bytes, empty + result.num_empty
            done_bytes += input_bytes
            if progress:
                progress(done_bytes, total_bytes)
        if not documents:
            raise InputError(f"no documents in {len(paths)} files ({empty} were empty); give files with text in them")
    return TokenizeSummary(documents, tokens, text_bytes, time.perf_counter() - began, empty)


def read_texts(inputs: list[str | Path], *, json_key: str = "text") -> Iterator[str]:
    """The documents of these files or folders one by one, as `tokenize_files` finds them: to train a tokenizer on."""
    for chunk in itertools.chain.from_iterable(map(_read_chunks, find_inputs(inputs))):
        yield from _texts(chunk, json_key)


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


class _Job:
    """Turns chunks into tokens: the same function of a chunk in every process."""

    def __init__(self, tokenizer: Tokenizer, *, append_eod: bool, json_key: str, dtype: np.dtype):
        self.tokenizer, self.json_key, self.dtype = tokenizer, json_key, dtype
        self.end = [tokenizer.eos_token_id] if append_eod else []

    def tokenize(self, chunk: _Chunk) -> _Tokens:
        texts = list(_texts(chunk, self.json_key))
        documents = self.tokenizer.encode_batch(texts)
        full = [ids + self.end for ids in documents if ids]
        return _Tokens(
            tokens=np.fromiter(itertools.chain.from_iterable(full), self.dtype),
            sizes=[len(ids) for ids in full],
            num_bytes=sum(len(text.encode()) for text in texts),
            num_empty=len(documents) - len(full),
        )


def _texts(chunk: _Chunk, json_key: str) -> Iterator[str]:
    """The documents of a chunk; blank lines of a .jsonl are none."""
    for i, line in enumerate(chunk.lines):
        where = f"{chunk.path}:{chunk.first_line + i}" if chunk.first_line else chunk.path
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{where}: not UTF-8 at byte {error.start} ({error.reason}); convert the file") from error
        if not chunk.first_line:
            yield text
        elif text.strip():
            yield _text_of_line(text, json_key, where)


def _text_of_line(line: str, json_key: str, where: str) -> str:
    try:
        document = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({error}); wanted an object a line") from error
    if not isinstance(document, dict) or json_key not in document:
        got = f"the keys {', '.join(document)}" if isinstance(document, dict) else f"a {type(document).__name__}"
        raise InputError(f"{where}: wanted an object with the key {json_key!r}, got {got}; name the key of the text")
    text = document[json_key]
    if not isinstance(text, str):
        raise InputError(f"{where}: {json_key!r} holds a {type(text).__name__}; wanted a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: half a surrogate pair at character {error.start} is no text; mend it") from error
    return text


def _read_chunks(path: Path) -> Iterator[_Chunk]:
    if path.name.endswith(".txt"):
        content = path.read_bytes()
        yield _Chunk(str(path), 0, [content], len(content))
        return
    with open(path, "rb") as file:
        lines = _decompressed(file, path) if path.name.endswith(".zst") else file
        first_line, read = 1, 0
        while chunk := lines.readlines(CHUNK_BYTES):
            position = file.tell()
            yield _Chunk(str(path), first_line, chunk, position - read)
            first_line, read = first_line + len(chunk), position


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
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
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


_worker_job: _Job | None = None  # what a worker process works on, set once as it starts


def _start_worker(tokenizer_json: str, eos_token_id: int | None, **fields) -> None:
    global _worker_job
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _worker_job = _Job(Tokenizer.from_json(tokenizer_json, eos_token_id=eos_token_id), **fields)


def _tokenize_in_worker(chunk: _Chunk) -> _Tokens:
    return _worker_job.tokenize(chunk)


def _tokenize_in_processes(job: _Job, chunks: Iterator[_Chunk], workers: int) -> Iterator[tuple[int, _Tokens]]:
    """In the order of the chunks, with so many under way that memory is bounded (Pool.imap would read everything)."""
    start = functools.partial(_start_worker, append_eod=bool(job.end), json_key=job.json_key, dtype=job.dtype)
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=start,
        initargs=(job.tokenizer.to_json(), job.tokenizer.eos_token_id),
    )
    pending = collections.deque()
    try:
        for chunk in chunks:
            pending.append((chunk.input_bytes, pool.submit(_tokenize_in_worker, chunk)))
            if len(pending) == workers * CHUNKS_AHEAD:
                input_bytes, future = pending.popleft()
                yield input_bytes, future.result()
        for input_bytes, future in pending:
            yield input_bytes, future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
