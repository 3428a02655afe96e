"""What a conversion read and what it wrote, by SHA-256: `conversion.json` in the folder that it made.

A tensor's digest is of its bytes under Hugging Face's name, in that layout, whatever the format it is written in: the
same weights have the same digests everywhere.
"""

import concurrent.futures
import hashlib
import threading
from pathlib import Path

import numpy as np

import neox_jax
from neox_jax.convert.files import read_json, to_json
from neox_jax.convert.stored import StoredModel, blocks
from neox_jax.errors import InputError

MANIFEST, FORMAT = "conversion.json", 1
HASHED_BYTES = 1 << 20  # of a file at a time: they stay in the processor's cache (1.65 GB/s; by 8 MiB 1.49)


class Hashing:
    """Hashes a source's files and tensors in two threads while a conversion goes on; leaving it stops them."""

    def __init__(self, stored: StoredModel):
        self._stored, self._cancelled = stored, threading.Event()
        self._threads = concurrent.futures.ThreadPoolExecutor(2, thread_name_prefix="hashing")

    def __enter__(self) -> "Hashing":
        self._files = self._threads.submit(_hash_files, self._stored.files, self._cancelled)
        self._tensors = self._threads.submit(hash_tensors, self._stored, self._cancelled)
        return self

    def __exit__(self, *_) -> None:
        self._cancelled.set()
        self._threads.shutdown()

    def write(self, folder: Path, **about) -> None:
        """Writes the manifest into `folder` once everything is hashed. about: what else it shall say."""
        source = {"place": self._stored.place, "files": self._files.result()}
        values = {"format": FORMAT, "neox_jax": neox_jax.__version__, **about}
        text = to_json({**values, "source": source, "tensors": self._tensors.result()})
        (folder / MANIFEST).write_text(text, encoding="utf-8")


def hash_tensors(stored: StoredModel, cancelled: threading.Event | None = None) -> dict[str, dict]:
    """Maps each tensor's name to its dtype, shape and SHA-256."""
    digests = {}
    for name, tensor in stored.tensors.items():
        digest = hashlib.sha256()
        for block in blocks(tensor):
            if cancelled is not None and cancelled.is_set():
                return {}
            digest.update(block.reshape(-1).view(np.uint8).data)
        about = {"dtype": np.dtype(tensor.dtype).name, "shape": list(tensor.shape)}
        digests[name] = {**about, "sha256": digest.hexdigest()}
    return digests


def _hash_files(paths: tuple[Path, ...], cancelled: threading.Event) -> dict[str, dict]:
    digests, buffer = {}, bytearray(HASHED_BYTES)
    for path in paths:
        digest, num_bytes = hashlib.sha256(), 0
        with open(path, "rb", buffering=0) as file:
            while num_read := file.readinto(buffer):
                if cancelled.is_set():
                    return {}
                digest.update(memoryview(buffer)[:num_read])
                num_bytes += num_read
        digests[_short_name(path, paths)] = {"bytes": num_bytes, "sha256": digest.hexdigest()}
    return digests


def _short_name(path: Path, paths: tuple[Path, ...]) -> str:
    """Its path from the folder that all of them are in."""
    shared = [parent for parent in path.parents if all(parent in other.parents for other in paths)]
    return str(path.relative_to(shared[0]) if shared else path)


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
