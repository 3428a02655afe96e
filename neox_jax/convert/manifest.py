"""What a conversion read and what it wrote, by SHA-256: `conversion.json` in the folder that it made.

A tensor's digest is of its bytes under Hugging Face's name, in that layout, whatever the format it is written in: the
same weights have the same digests everywhere.
"""

import collections
import concurrent.futures
import dataclasses
import hashlib
import os
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np

import neox_jax
from neox_jax.convert.files import read_json, to_json
from neox_jax.convert.stored import BLOCK_BYTES, StoredModel, StoredTensor, blocks
from neox_jax.errors import InputError

MANIFEST, FORMAT = "conversion.json", 1
HASHED_BYTES = 1 << 20  # of a file at a time: they stay in the processor's cache (1.65 GB/s; by 8 MiB 1.49)
WAITING_BYTES = 2 * BLOCK_BYTES  # read and not hashed yet, or one part that is larger


class Hashing:
    """Hashes a source's files and tensors while a conversion goes on, each in a thread; leaving it stops them."""

    def __init__(self, stored: StoredModel):
        self._stored, self._cancelled = stored, threading.Event()
        self._threads = [concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="hashing") for _ in range(2)]

    def __enter__(self) -> "Hashing":
        self._files = self._threads[0].submit(_hash_files, self._stored, self._cancelled)
        return self

    def __exit__(self, *_) -> None:
        self._cancelled.set()
        for thread in self._threads:
            thread.shutdown(cancel_futures=True)

    def read_tensors(self) -> None:
        """Has the tensors read once more, to be hashed."""
        self._tensors = self._threads[1].submit(hash_tensors, self._stored, self._cancelled)

    def follow_tensors(self) -> StoredModel:
        """The same model, which is hashed as it is read: each tensor once, whole rows in order."""
        self._tensors = _Followed(self._stored, self._threads[1])
        return self._tensors.stored

    def write(self, folder: Path, **about) -> None:
        """Writes the manifest into `folder` once everything is hashed. about: what else it shall say."""
        source = {"place": self._stored.place, "files": self._files.result()}
        values = {"format": FORMAT, "neox_jax": neox_jax.__version__, **about}
        text = to_json({**values, "source": source, "tensors": self._tensors.result()})
        (folder / MANIFEST).write_text(text, encoding="utf-8")


class _Followed:
    """A model whose parts are hashed in a thread as they are read."""

    def __init__(self, stored: StoredModel, thread: concurrent.futures.Executor):
        self._thread, self._waiting = thread, collections.deque()
        self._tensors = {name: _FollowedTensor(tensor, self._hash) for name, tensor in stored.tensors.items()}
        self.stored = dataclasses.replace(stored, tensors=self._tensors)

    def _hash(self, digest, part: np.ndarray) -> None:
        while self._waiting and sum(num_bytes for _, num_bytes in self._waiting) + part.nbytes > WAITING_BYTES:
            self._waiting.popleft()[0].result()
        self._waiting.append((self._thread.submit(digest.update, _bytes(part)), part.nbytes))

    def result(self) -> dict[str, dict]:
        """As `hash_tensors`, once everything is read and hashed."""
        for hashed, _ in self._waiting:
            hashed.result()
        return {name: tensor.about() for name, tensor in self._tensors.items()}


class _FollowedTensor:
    def __init__(self, tensor: StoredTensor, hash: Callable):
        self.shape, self.dtype, self.row_unit = tensor.shape, np.dtype(tensor.dtype), getattr(tensor, "row_unit", 1)
        self._tensor, self._hash, self._digest, self._num_rows = tensor, hash, hashlib.sha256(), 0

    def read(self, slices: tuple[slice, ...]) -> np.ndarray:
        assert slices[0].start == self._num_rows, "not the rows that come next"
        part = np.ascontiguousarray(self._tensor.read(slices))
        assert part.shape[1:] == self.shape[1:], "not whole rows"
        self._num_rows += len(part)
        self._hash(self._digest, part)
        return part

    def about(self) -> dict:
        assert self._num_rows == self.shape[0], "rows have not been read"
        return _about(self, self._digest)


def hash_tensors(stored: StoredModel, cancelled: threading.Event | None = None) -> dict[str, dict]:
    """Maps each tensor's name to its dtype, shape and SHA-256."""
    found = {}
    for name, tensor in stored.tensors.items():
        digest = hashlib.sha256()
        for block in blocks(tensor):
            if cancelled is not None and cancelled.is_set():
                return {}
            digest.update(_bytes(block))
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


def _bytes(part: np.ndarray) -> memoryview:
    return part.reshape(-1).view(np.uint8).data


def _hash_files(stored: StoredModel, cancelled: threading.Event) -> dict[str, dict]:
    """Maps each file's path, from the folder that all of them are in, to its size and SHA-256."""
    shared = os.path.commonpath([os.path.abspath(path.parent) for path in stored.files]) if stored.files else ""
    digests, buffer = {}, bytearray(HASHED_BYTES)
    for path in stored.files:
        name = os.path.relpath(path, shared)
        if path in stored.digests:
            digests[name] = {"bytes": path.stat().st_size, "sha256": stored.digests[path]}
            continue
        digest, num_bytes = hashlib.sha256(), 0
        with open(path, "rb", buffering=0) as file:
            while num_read := file.readinto(buffer):
                if cancelled.is_set():
                    return {}
                digest.update(memoryview(buffer)[:num_read])
                num_bytes += num_read
        digests[name] = {"bytes": num_bytes, "sha256": digest.hexdigest()}
    return digests


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
