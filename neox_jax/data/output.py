"""What tokenising leaves at a prefix: .bin and .idx, and a .json that says what of; all of them, or none.

Until they are whole they are in the folder PREFIX.partial. The .json takes its name first, so that a .bin or .idx
without it was made by something else.
"""

import contextlib
import dataclasses
import fcntl
import itertools
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from neox_jax.data.megatron import HEADER
from neox_jax.data.text_files import Shard
from neox_jax.disk import sync
from neox_jax.errors import InputError

MADE_BY = "neox-jax tokenize 1"
SUFFIXES = (".json", ".bin", ".idx")  # in the order in which they appear
LOCK = "lock"


@dataclasses.dataclass(frozen=True)
class Work:
    """What an output is made of. Equal works give equal files.

    inputs: name without folders, and bytes, of each file. tokenizer_sha256: of `Tokenizer.to_json()`. eod: the id that
    ends each document, None for none. shard: as "0/4", None for everything.
    """

    inputs: tuple[tuple[str, int], ...]
    tokenizer_sha256: str
    eod: int | None
    json_key: str
    dtype: str
    shard: str | None = None


@dataclasses.dataclass(frozen=True)
class TokenizeSummary:
    """What was written.

    bytes: of UTF-8 text in the documents. empty_documents: left out, since they had no tokens. bad_documents: left out
    by skip_bad; bad_places: where the first of them are, and why. seconds: 0 where the output was there before.
    """

    documents: int
    tokens: int
    bytes: int
    empty_documents: int
    bad_documents: int
    bad_places: tuple[str, ...]
    seconds: float = 0.0


def prefix_of(output: str | Path, shard: Shard | None) -> Path:
    """Where a shard of an output goes: PREFIX-00002-of-00007 for 2/7."""
    return Path(output if shard is None else f"{output}-{shard.index:05}-of-{shard.count:05}")


def file_of(prefix: Path, suffix: str) -> Path:
    """PREFIX.bin, say; a prefix may have a dot in its name."""
    return prefix.with_name(prefix.name + suffix)


@contextlib.contextmanager
def partial_folder(prefix: Path) -> Iterator[Path]:
    """Gives PREFIX.partial, which is empty, this process's alone, and gone afterwards.

    What a process that was killed has left in it is removed. On a file system without locks two processes that write
    the same output at the same time are not told apart.
    Raises: InputError where another process has it, or where writing fails in the block or here.
    """
    folder = file_of(prefix, ".partial")
    try:
        with _lock(folder):
            try:
                for path in folder.iterdir():
                    if path.name != LOCK:
                        path.unlink()
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        raise InputError(
            f"{prefix}.bin cannot be written ({error.strerror or error}); nothing of it was kept: make room, or give "
            "another place"
        ) from error


def _lock(folder: Path) -> BinaryIO:
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / LOCK, "ab")  # noqa: SIM115 (whoever called closes it)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.close()
            raise InputError(
                f"{folder} is in use: another process writes the same output; wait for it, or give another output"
            ) from error
        except OSError:  # this file system has no locks
            return lock
        with contextlib.suppress(FileNotFoundError):
            if (folder / LOCK).stat().st_ino == os.fstat(lock.fileno()).st_ino:
                return lock
        lock.close()  # of a folder that its owner has removed meanwhile


def find_finished(prefix: Path, work: Work) -> TokenizeSummary | None:
    """What is there already of the same work; None where there is nothing, or only what a killed process left.

    Raises: InputError where there is anything else, which is not to be overwritten.
    """
    found = read_record(prefix)
    if found is None:
        for path in (file_of(prefix, suffix) for suffix in SUFFIXES):
            if path.exists():
                raise InputError(
                    f"{path} is there, and no {prefix}.json that says of what; move it away, or give another output"
                )
        return None
    if not all(file_of(prefix, suffix).exists() for suffix in found.suffixes()):
        return None
    if found.work != work:
        raise InputError(
            f"{prefix}.json tells of other work ({describe_difference(found.work, work)}); remove it with its .bin and "
            ".idx, or give another output"
        )
    found.check_files(prefix)
    return found.summary


@dataclasses.dataclass(frozen=True)
class Record:
    """What PREFIX.json says: the work, and what came of it."""

    work: Work
    summary: TokenizeSummary

    def suffixes(self) -> tuple[str, ...]:
        """Of the files that there must be: a shard without documents has no .bin and no .idx."""
        return SUFFIXES if self.summary.documents else SUFFIXES[:1]

    def check_files(self, prefix: Path) -> None:
        """Raises: InputError where a file is not there, or not of the size that it was written with."""
        num_documents = self.summary.documents
        sizes = {
            ".bin": self.summary.tokens * np.dtype(self.work.dtype).itemsize,
            ".idx": HEADER.size + 12 * num_documents + 8 * (num_documents + 1),
        }
        for suffix in self.suffixes()[1:]:
            path = file_of(prefix, suffix)
            if not path.is_file() or path.stat().st_size != sizes[suffix]:
                got = f"has {path.stat().st_size} bytes" if path.is_file() else "is not there"
                raise InputError(
                    f"{path} {got}; {prefix}.json tells of {sizes[suffix]} bytes: copy it again, or remove all three "
                    "files and make them again"
                )


def read_record(prefix: Path) -> Record | None:
    """What PREFIX.json says; None without such a file. Raises: InputError for a file that says something else."""
    path = file_of(prefix, ".json")
    if not path.exists():
        return None
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        if fields.pop("made_by") != MADE_BY:
            raise ValueError("made_by")
        work = fields.pop("work")
        work["inputs"] = tuple((name, num_bytes) for name, num_bytes in work["inputs"])
        fields["bad_places"] = tuple(fields["bad_places"])
        return Record(Work(**work), TokenizeSummary(**fields))
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise InputError(f"{path} is not by {MADE_BY!r}; move it away, or give another output") from error


def describe_difference(a: Work, b: Work) -> str:
    """The first field in which they differ, with both values."""
    for field in dataclasses.fields(Work):
        values = [getattr(work, field.name) for work in (a, b)]
        if field.name == "inputs" and values[0] != values[1]:
            pairs = itertools.zip_longest(*values, fillvalue="nothing")
            values = next(pair for pair in pairs if pair[0] != pair[1])
        if values[0] != values[1]:
            return f"{field.name}: {values[0]}, not {values[1]}"
    raise AssertionError("they are the same")


def publish(folder: Path, prefix: Path, record: Record) -> None:
    """Gives tokens.bin and tokens.idx in a partial folder their names, and the record with them."""
    summary = dataclasses.asdict(record.summary)
    del summary["seconds"]  # so that equal works have equal records
    text = json.dumps({"made_by": MADE_BY, "work": dataclasses.asdict(record.work), **summary}, indent=1)
    (folder / "tokens.json").write_text(text + "\n", encoding="utf-8")
    for suffix in record.suffixes():
        sync(folder / f"tokens{suffix}")
    for suffix in record.suffixes():
        os.replace(folder / f"tokens{suffix}", file_of(prefix, suffix))
