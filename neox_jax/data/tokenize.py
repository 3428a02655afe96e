"""Text files to a Megatron dataset, in bounded memory; the same bytes for any number of workers and shards."""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from neox_jax.data.megatron import IndexedDatasetWriter, best_dtype
from neox_jax.data.output import Record, TokenizeSummary, Work, find_finished, partial_folder, prefix_of, publish
from neox_jax.data.text_files import BadText, Piece, Shard, find_inputs, find_spans, read_pieces, split_texts
from neox_jax.data.unit_cache import UnitCache
from neox_jax.data.workers import map_in_order
from neox_jax.errors import InputError
from neox_jax.tokenizer import Tokenizer

MAX_BAD_PLACES = 3  # told of


@dataclasses.dataclass(frozen=True)
class _Tokens:
    """The documents of a piece end to end, and the number of tokens in each."""

    tokens: np.ndarray
    sizes: list[int]
    num_bytes: int
    num_empty: int
    bad: list[BadText]
    input_bytes: int


def tokenize_files(
    inputs: list[str | Path],
    *,
    tokenizer: Tokenizer,
    output: str | Path,
    append_eod: bool = False,
    json_key: str = "text",
    workers: int = 1,
    shard: Shard | None = None,
    skip_bad: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> TokenizeSummary:
    """Writes OUTPUT.bin and .idx, one sequence a document, as gpt-neox's preprocess_data.py does, and OUTPUT.json.

    inputs: .txt (a document each), .jsonl and .jsonl.zst (a document a line, under json_key), or folders, searched
    for these in the order of their sorted paths. Text is taken byte for byte: line ends are not translated.
    append_eod: tokenizer.eos_token_id ends each document. progress(bytes_done, bytes_total) counts input bytes.
    workers: processes that tokenise, each on one core. shard: only this share, at `prefix_of(output, shard)`; it may
    have no documents, and then only the .json is written. skip_bad: so many that are no UTF-8, JSON or text are left
    out. Where OUTPUT.json says that the same work is done, nothing is.
    Raises: InputError with file and line for one bad document more, for no documents at all, and where something else
    is at OUTPUT; then nothing is written.
    """
    if append_eod and tokenizer.eos_token_id is None:
        raise InputError(
            "append_eod: this tokenizer has no end-of-document token (<|endoftext|> or </s>); leave it off"
        )
    if workers < 1 or skip_bad < 0:
        raise InputError(f"workers {workers}, skip_bad {skip_bad}; wanted at least 1 and at least 0")
    began = time.perf_counter()
    paths = find_inputs(inputs)
    spans = find_spans(paths, shard or Shard(0, 1))
    tokenizer_json = tokenizer.to_json()
    work = Work(
        inputs=tuple((path.name, path.stat().st_size) for path in paths),
        tokenizer_sha256=hashlib.sha256(tokenizer_json.encode()).hexdigest(),
        eod=tokenizer.eos_token_id if append_eod else None,
        json_key=json_key,
        dtype=best_dtype(tokenizer.vocab_size).name,
        shard=None if shard is None else str(shard),
    )
    prefix = prefix_of(output, shard)
    with partial_folder(prefix) as folder:
        summary = find_finished(prefix, work)
        if summary is not None:
            return summary
        make = functools.partial(_Job, tokenizer_json, work, skip_bad)
        total = _Total(sum(span.end - span.start for span in spans), skip_bad, progress)
        pieces = itertools.chain.from_iterable(map(read_pieces, spans))
        with _one_thread_each(), contextlib.closing(map_in_order(make, pieces, workers=workers)) as results:
            _write(folder / "tokens", np.dtype(work.dtype), map(total.add, results))
        if not total.documents and shard is None:
            raise InputError(
                f"no documents in {len(paths)} files ({total.empty} were empty, {len(total.bad)} bad); give files with "
                "text in them"
            )
        summary = total.summary()
        publish(folder, prefix, Record(work, summary))
    return dataclasses.replace(summary, seconds=time.perf_counter() - began)


def read_texts(inputs: list[str | Path], *, json_key: str = "text") -> Iterator[str]:
    """The documents of these files or folders one by one, as `tokenize_files` finds them: to train a tokenizer on."""
    spans = find_spans(find_inputs(inputs), Shard(0, 1))
    for piece in itertools.chain.from_iterable(map(read_pieces, spans)):
        for text in split_texts(piece, json_key):
            if isinstance(text, BadText):
                raise InputError(str(text))
            yield text


class _Job:
    """Turns pieces into tokens: the same function of a piece in every process."""

    def __init__(self, tokenizer_json: str, work: Work, skip_bad: int):
        self.work, self.skip_bad, self.dtype = work, skip_bad, np.dtype(work.dtype)
        self.encoder = UnitCache(Tokenizer.from_json(tokenizer_json), self.dtype)
        self.end = b"" if work.eod is None else self.dtype.type(work.eod).tobytes()

    def __call__(self, piece: Piece) -> _Tokens:
        texts, bad = [], []
        for text in split_texts(piece, self.work.json_key):
            (bad if isinstance(text, BadText) else texts).append(text)
            if len(bad) > self.skip_bad:
                break
        full = [tokens + self.end for tokens in self.encoder.encode_batch(texts) if tokens]
        return _Tokens(
            tokens=np.frombuffer(b"".join(full), self.dtype),
            sizes=[len(tokens) // self.dtype.itemsize for tokens in full],
            num_bytes=sum(len(text.encode()) for text in texts),
            num_empty=len(texts) - len(full),
            bad=bad,
            input_bytes=piece.input_bytes,
        )


class _Total:
    """Adds up what comes, tells progress, and raises InputError at one bad document too many."""

    def __init__(self, input_bytes: int, skip_bad: int, progress: Callable[[int, int], None] | None):
        self.input_bytes, self.skip_bad, self.progress = input_bytes, skip_bad, progress
        self.documents = self.tokens = self.num_bytes = self.empty = self.done_bytes = 0
        self.bad: list[BadText] = []

    def add(self, result: _Tokens) -> _Tokens:
        self.bad += result.bad
        if len(self.bad) > self.skip_bad:
            more = f" (bad document {self.skip_bad + 1}; {self.skip_bad} may be skipped)" if self.skip_bad else ""
            raise InputError(f"{self.bad[self.skip_bad]}{more}")
        self.documents += len(result.sizes)
        self.tokens += len(result.tokens)
        self.num_bytes += result.num_bytes
        self.empty += result.num_empty
        self.done_bytes += result.input_bytes
        if self.progress:
            self.progress(self.done_bytes, self.input_bytes)
        return result

    def summary(self) -> TokenizeSummary:
        places = tuple(str(bad) for bad in self.bad[:MAX_BAD_PLACES])
        return TokenizeSummary(self.documents, self.tokens, self.num_bytes, self.empty, len(self.bad), places)


def _write(prefix: Path, dtype: np.dtype, results: Iterator[_Tokens]) -> None:
    """Writes a dataset, or nothing where there are no documents."""
    full = (result for result in results if result.sizes)
    first = next(full, None)
    if first is None:
        return
    with IndexedDatasetWriter(prefix, dtype) as writer:
        for result in itertools.chain([first], full):
            for document in np.split(result.tokens, np.cumsum(result.sizes)[:-1]):
                writer.add_document(document)


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    """Within it the tokenizers library uses no threads of its own, here and in processes that are started."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
