"""The shards of a tokenised dataset put together: the bytes that one run over everything would have written."""

import dataclasses
import glob
import re
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from neox_jax.data.megatron import DTYPE_CODES, HEADER, MAGIC, VERSION, IndexedDataset
from neox_jax.data.output import (
    Record,
    TokenizeSummary,
    describe_difference,
    file_of,
    find_finished,
    partial_folder,
    prefix_of,
    publish,
    read_record,
)
from neox_jax.data.text_files import Shard
from neox_jax.data.tokenize import MAX_BAD_PLACES
from neox_jax.errors import InputError

BLOCK_BYTES = 16 << 20  # of a .bin at a time
BLOCK_DOCUMENTS = 1 << 20  # of an .idx at a time
MAX_MISSING = 5  # named
_RECORD = re.compile(r"-(\d{5,})-of-(\d{5,})\.json")


def merge_shards(
    output: str | Path, *, progress: Callable[[int, int], None] | None = None
) -> tuple[TokenizeSummary, int]:
    """Writes OUTPUT.bin, .idx and .json from every OUTPUT-0000i-of-0000n, which stay; also returns how many they are.

    progress(bytes_done, bytes_total) counts the bytes of the .bin. Memory is bounded by blocks.
    Raises: InputError where a shard is missing or not whole, where they are not of one tokenizer, of the same inputs
    and options, and where something else is at OUTPUT; then nothing is written.
    """
    began, prefix = time.perf_counter(), Path(output)
    shards = _find_shards(prefix)
    record = _add_up(list(shards.values()))
    with partial_folder(prefix) as folder:
        summary = find_finished(prefix, record.work)
        if summary is not None:
            return summary, len(shards)
        for shard_prefix, shard in shards.items():
            shard.check_files(shard_prefix)
        datasets = [IndexedDataset(name) for name, shard in shards.items() if shard.summary.documents]
        if not datasets:
            raise InputError(f"no documents in the {len(shards)} shards of {prefix}; give files with text in them")
        _write_tokens(folder / "tokens.bin", datasets, progress)
        _write_index(folder / "tokens.idx", datasets)
        publish(folder, prefix, record)
    return dataclasses.replace(record.summary, seconds=time.perf_counter() - began), len(shards)


def _find_shards(prefix: Path) -> dict[Path, Record]:
    """The record of every shard, by prefix, in order. Raises: InputError where they are not one whole set."""
    names = [path.name.removeprefix(prefix.name) for path in prefix.parent.glob(f"{glob.escape(prefix.name)}-*.json")]
    found = sorted(tuple(map(int, match.groups())) for match in map(_RECORD.fullmatch, names) if match)
    counts = sorted({count for _, count in found})
    if not counts:
        raise InputError(f"no {prefix}-00000-of-....json; shards are made by `tokenize --output {prefix} --shard I/N`")
    if len(counts) > 1:
        raise InputError(f"{prefix} has shards of {' and of '.join(map(str, counts))}; remove those of all but one")
    missing = sorted(set(range(counts[0])) - {index for index, _ in found})
    if missing:
        first = ", ".join(f"{index}/{counts[0]}" for index in missing[:MAX_MISSING])
        raise InputError(f"{prefix} lacks {len(missing)} of {counts[0]} shards ({first}); make them, or copy them here")
    prefixes = [prefix_of(prefix, Shard(index, count)) for index, count in found]
    shards = {name: read_record(name) for name in prefixes}
    wanted = shards[prefixes[0]].work
    for (index, count), (name, record) in zip(found, shards.items(), strict=True):
        wanted = dataclasses.replace(wanted, shard=str(Shard(index, count)))
        if record.work != wanted:
            raise InputError(
                f"{name} does not go with {prefixes[0]} ({describe_difference(record.work, wanted)}); make both with "
                "the same tokenizer, inputs and options"
            )
    return shards


def _add_up(shards: list[Record]) -> Record:
    """What one run over everything would have recorded."""
    summaries = [shard.summary for shard in shards]
    places = [place for summary in summaries for place in summary.bad_places]
    return Record(
        dataclasses.replace(shards[0].work, shard=None),
        TokenizeSummary(
            documents=sum(summary.documents for summary in summaries),
            tokens=sum(summary.tokens for summary in summaries),
            bytes=sum(summary.bytes for summary in summaries),
            empty_documents=sum(summary.empty_documents for summary in summaries),
            bad_documents=sum(summary.bad_documents for summary in summaries),
            bad_places=tuple(places[:MAX_BAD_PLACES]),
        ),
    )


def _write_tokens(path: Path, datasets: list[IndexedDataset], progress: Callable[[int, int], None] | None) -> None:
    done, total = 0, sum(map(_num_bytes, datasets))
    with open(path, "wb") as merged:
        for dataset in datasets:
            with open(file_of(Path(dataset.prefix), ".bin"), "rb") as file:
                while block := file.read(BLOCK_BYTES):
                    merged.write(block)
                    done += len(block)
                    if progress:
                        progress(done, total)


def _write_index(path: Path, datasets: list[IndexedDataset]) -> None:
    num_documents = sum(map(len, datasets))
    with open(path, "wb") as file:
        code = DTYPE_CODES[datasets[0].dtype]
        file.write(HEADER.pack(MAGIC, VERSION, code, num_documents, num_documents + 1))
        for dataset in datasets:
            for start in range(0, len(dataset), BLOCK_DOCUMENTS):
                file.write(dataset.sizes[start : start + BLOCK_DOCUMENTS].tobytes())
        offset = 0
        for dataset in datasets:
            for start in range(0, len(dataset), BLOCK_DOCUMENTS):
                file.write((dataset.pointers[start : start + BLOCK_DOCUMENTS] + offset).tobytes())
            offset += _num_bytes(dataset)
        for start in range(0, num_documents + 1, BLOCK_DOCUMENTS):
            file.write(np.arange(start, min(start + BLOCK_DOCUMENTS, num_documents + 1), dtype="<i8").tobytes())


def _num_bytes(dataset: IndexedDataset) -> int:
    return int(dataset.sizes.sum(dtype=np.int64)) * dataset.dtype.itemsize
