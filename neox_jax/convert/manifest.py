"""What a conversion read and what it wrote, by SHA-256: `conversion.json` in the folder that it made.

A tensor's digest is of its bytes under Hugging Face's name, in that layout, whatever the format it is written in: the
same weights have the same digests everywhere.
"""

import concurrent.futures
import hashlib
import os
import threading
from collections.abc import Mapping
from pathlib import Path

import numpy as np

import neox_jax
from neox_jax.convert.byte_reader import FileReader, RawBytes
from neox_jax.convert.files import read_json, to_json
from neox_jax.convert.stored import Digests, StoredModel, StoredTensor, blocks, raw_parts
from neox_jax.errors import InputError

MANIFEST, FORMAT = "conversion.json", 1
HASHED_BYTES = 1 << 20  # of a file at a time: they stay in the processor's cache (1.65 GB/s; by 8 MiB 1.49)


class Hashing:
    """Hashes what a conversion reads and writes while it goes on; leaving it stops that.

    Whoever writes the tensors hashes them into `digests`, and with them the files whose parts are read in order by
    that. Other files are read once more, in a thread.
    """

    def __init__(self, stored: StoredModel):
        self._followed = {path: _FollowedFile(path, last) for path, last in _files_in_order(stored).items()}
        self.digests = _DigestsAndFiles(self._followed)
        self._stored, self._cancelled = stored, threading.Event()
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "hashing")

    def __enter__(self) -> "Hashing":
        others = [path for path in self._stored.files if os.path.abspath(path) not in self._followed]
        self._files = self._thread.submit(_hash_files, others, self._stored.digests, self._cancelled)
        return self

    def __exit__(self, *_) -> None:
        self._cancelled.set()
        self._thread.shutdown()

    def write(self, folder: Path, **about) -> None:
        """Writes the manifest into `folder` once everything is hashed. about: what else it shall say."""
        tensors = {name: _about(tensor, self.digests[name]) for name, tensor in self._stored.tensors.items()}
        source = {"place": self._stored.place, "files": self._about_files()}
        values = {"format": FORMAT, "neox_jax": neox_jax.__version__, **about}
        text = to_json({**values, "source": source, "tensors": tensors})
        (folder / MANIFEST).write_text(text, encoding="utf-8")

    def _about_files(self) -> dict[str, dict]:
        """Maps each file's path, from the folder that all of them are in, to its size and SHA-256."""
        others, paths = self._files.result(), [os.path.abspath(path) for path in self._stored.files]
        shared = os.path.commonpath([os.path.dirname(path) for path in paths]) if paths else ""
        found = {path: self._followed[path].about() if path in self._followed else others[path] for path in paths}
        return {os.path.relpath(path, shared): about for path, about in found.items()}


def _files_in_order(stored: StoredModel) -> dict[str, int]:
    """The files of which the tensors, in order, have the parts in order, and where the last of these ends."""
    starts = {}
    for tensor in stored.tensors.values():
        for raw in raw_parts(tensor) or ():
            starts.setdefault(raw.path, []).append((raw.start, raw.num_bytes))
    known = {os.path.abspath(path) for path in stored.digests}
    followed = {path: found for path, found in starts.items() if path not in (None, *known) and found == sorted(found)}
    return {path: sum(found[-1]) for path, found in followed.items()}


class _FollowedFile:
    """A file that is hashed by what is read of it. What is between that is read here, or all, where it is not read in
    order after all."""

    def __init__(self, path: str, last: int):
        """last: where what is read of it ends; the rest is read here at once."""
        self._reader, self._digest, self._position = FileReader(Path(path)), hashlib.sha256(), 0
        self._in_order, self._last = True, last

    def update(self, start: int, data: memoryview) -> None:
        self._in_order = self._in_order and start >= self._position
        if self._in_order:
            self._read_until(start)
            self._digest.update(data)
            self._position += len(data)
            if self._position == self._last:
                self._read_until(self._reader.num_bytes)

    def about(self) -> dict:
        if not self._in_order:
            self._digest, self._position = hashlib.sha256(), 0
        self._read_until(self._reader.num_bytes)
        return {"bytes": self._position, "sha256": self._digest.hexdigest()}

    def _read_until(self, end: int) -> None:
        while self._position < end:
            part = self._reader.read(self._position, min(HASHED_BYTES, end - self._position))
            self._digest.update(part)
            self._position += len(part)


class _Part:
    """What is to be updated with the bytes of a file from `start` on."""

    def __init__(self, file: _FollowedFile, start: int):
        self._file, self._start = file, start

    def update(self, data: memoryview) -> None:
        self._file.update(self._start, data)
        self._start += len(data)


class _DigestsAndFiles(Digests):
    def __init__(self, followed: dict[str, _FollowedFile]):
        super().__init__()
        self._followed = followed

    def of_file(self, raw: RawBytes) -> list:
        return [_Part(self._followed[raw.path], raw.start)] if raw.path in self._followed else []


def hash_tensors(stored: StoredModel) -> dict[str, dict]:
    """Maps each tensor's name to its dtype, shape and SHA-256."""
    found = {}
    for name, tensor in stored.tensors.items():
        digest = hashlib.sha256()
        for block in blocks(tensor):
            digest.update(block.reshape(-1).view(np.uint8).data)
        found[name] = _about(tensor, digest)
    return found


def identify(stored: StoredModel) -> str:
    """One SHA-256 for all weights, the same for the same weights in whatever format they are stored."""
    digest = hashlib.sha256()
    for name, about in sorted(hash_tensors(stored).items()):
        digest.update(f"{name} {about['dtype']} {about['shape']} {about['sha256']}\n".encode())
    return digest.hexdigest()


def _about(tensor: StoredTensor, digest) -> dict:
    return {"dtype": np.dtype(tensor.dtype).name, "shape": list(tensor.shape), "sha256": digest.hexdigest()}


def _hash_files(paths: list[Path], known: Mapping[Path, str], cancelled: threading.Event) -> dict[str, dict]:
    """Maps each file's whole path to its size and SHA-256. known: the latter, where it need not be read for it."""
    found, buffer = {}, bytearray(HASHED_BYTES)
    for path in paths:
        name = os.path.abspath(path)
        if path in known:
            found[name] = {"bytes": path.stat().st_size, "sha256": known[path]}
            continue
        digest, num_bytes = hashlib.sha256(), 0
        with open(path, "rb", buffering=0) as file:
            while num_read := file.readinto(buffer):
                if cancelled.is_set():
                    return {}
                digest.update(memoryview(buffer)[:num_read])
                num_bytes += num_read
        found[name] = {"bytes": num_bytes, "sha256": digest.hexdigest()}
    return found


def find_manifest(folder: Path) -> dict | None:
    """The tensors' digests of the conversion that made this folder, by name; None where there is no manifest.

    Raises: InputError where it cannot be understood.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    values = read_json(path)
    tensors = values.get("tensors") if isinstance(values, dict) and values.get("format") == FORMAT else None
    if not isinstance(tensors, dict) or not all(isinstance(one, dict) and "sha256" in one for one in tensors.values()):
        raise InputError(f"{path} is not as this version writes it (format {FORMAT}); remove it to go without")
    return tensors


def check(stored: StoredModel, written: dict) -> list[str]:
    """What of a model is no longer as its manifest says that it was written; empty where all is."""
    found = hash_tensors(stored)
    problems = [f"{name} is not there any more" for name in written if name not in found]
    problems += [f"{name} was not there when it was written" for name in found if name not in written]
    problems += [f"{name} has changed since it was written" for name in found if found[name] != written.get(name)]
    return problems
