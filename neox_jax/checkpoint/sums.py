"""`SHA256SUMS` of a step, as `sha256sum -c` reads it: written before the step has its name, compared before its use."""

import concurrent.futures
import errno
import hashlib
import os
import re
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from neox_jax.checkpoint.steps import files_of, should_have_sums
from neox_jax.disk import sync
from neox_jax.errors import InputError

SUMS = "SHA256SUMS"
HASHED_BYTES = 1 << 20  # of a file at a time: they stay in the processor's cache
MAX_THREADS = 8
LOWEST_PRIORITY = 19

_LINE = re.compile(r"([0-9a-f]{64})  (.+)")


def write_sums(folder: Path, *, beside_training: bool, digests: Mapping[Path, str] = MappingProxyType({})) -> None:
    """Writes SHA256SUMS of all files under `folder`, and waits until everything there is on disk.

    digests: those of files that were hashed as they were written, in hex. Raises: OSError.
    """
    # Largest first: the threads, and the processes that share a verification, get equal parts.
    paths = sorted(files_of(folder), key=lambda path: -path.stat().st_size)
    with concurrent.futures.ThreadPoolExecutor(1, "syncing") as thread:
        synced = [thread.submit(sync, path) for path in paths]
        unknown = [path for path in paths if path not in digests]
        found = {**digests, **hash_files(unknown, beside_training=beside_training)}
        for path, future in zip(paths, synced, strict=True):
            future.result()
            if isinstance(found[path], OSError):
                raise found[path]
    text = "".join(f"{found[path]}  {path.relative_to(folder).as_posix()}\n" for path in paths)
    (folder / SUMS).write_text(text, encoding="utf-8")
    sync(folder / SUMS)
    for path in [*folder.rglob("*"), folder]:
        if path.is_dir():
            sync(path)


def hash_files(
    paths: list[Path], progress: Callable[[int], None] | None = None, *, beside_training: bool = False
) -> dict[Path, str | OSError]:
    """Each file's SHA-256 in hex, or why it cannot be read. progress: called with bytes as they are hashed, from
    several threads. beside_training: by half of the cores, and after whatever else wants them."""
    num_threads = max(1, min(MAX_THREADS, (os.cpu_count() or 1) // (2 if beside_training else 1)))
    initializer = yield_to_others if beside_training else None
    with concurrent.futures.ThreadPoolExecutor(num_threads, "hashing", initializer=initializer) as threads:
        return dict(zip(paths, threads.map(lambda path: _hash_file(path, progress), paths), strict=True))


def yield_to_others() -> None:
    """Lets other threads go first from now on, where the system can do that for one thread alone (Linux)."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOWEST_PRIORITY)


def _hash_file(path: Path, progress: Callable[[int], None] | None) -> str | OSError:
    digest, buffer = hashlib.sha256(), bytearray(HASHED_BYTES)
    try:
        with open(path, "rb", buffering=0) as file:
            while num_read := file.readinto(buffer):
                digest.update(memoryview(buffer)[:num_read])
                if progress is not None:
                    progress(num_read)
    except OSError as error:
        return error
    return digest.hexdigest()


def find_problems(
    step_folder: Path,
    *,
    items: tuple[str, ...] | None = None,
    part: tuple[int, int] = (0, 1),
    progress: Callable[[int, int], None] | None = None,
) -> list[str] | None:
    """What is wrong with a step's files, each as "FILE: WHAT"; None for a step of an older version, without sums.

    items: only these of its folders, as ("params", "meta"). part: which of how many shares of the files to read.
    progress: called with the bytes done, and of all.
    Raises: InputError for a file that this user may not read, or that the file system does not give now.
    """
    if not (step_folder / SUMS).is_file():
        return [f"{SUMS}: missing"] if _claims_sums(step_folder) else None
    try:
        sums = read_sums(step_folder)
    except OSError as error:
        return [f"{SUMS}: {_reason(step_folder / SUMS, error)}"]
    if sums is None:
        return [f"{SUMS}: not as it was written"]

    def wanted(name: str) -> bool:
        return items is None or name.split("/")[0] in items

    problems = []
    if part[0] == 0:
        there = {path.relative_to(step_folder).as_posix() for path in files_of(step_folder)} - {SUMS}
        problems += [f"{name}: not in {SUMS}" for name in sorted(there - sums.keys()) if wanted(name)]
    mine = [name for name in sums if wanted(name)][part[0] :: part[1]]
    digests = hash_files([step_folder / name for name in mine], _adding_up(step_folder, mine, progress))
    for name in mine:
        found = digests[step_folder / name]
        if isinstance(found, OSError):
            problems.append(f"{name}: {_reason(step_folder / name, found)}")
        elif found != sums[name]:
            problems.append(f"{name}: not as it was written (SHA-256 differs)")
    return problems


def _claims_sums(step_folder: Path) -> bool:
    try:
        return should_have_sums(step_folder)
    except InputError:
        return False  # whoever reads it will say so


def read_sums(step_folder: Path) -> dict[str, str] | None:
    """Each file's digest by name, in the order in which they are there; None where they are not as we write them.

    Raises: OSError.
    """
    try:
        matches = [_LINE.fullmatch(line) for line in (step_folder / SUMS).read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError:
        return None
    if not matches or not all(matches):
        return None
    sums = {match[2]: match[1] for match in matches}
    outside = [name for name in sums if name.startswith("/") or ".." in name.split("/")]  # as /dev/zero, without end
    return None if outside else sums


def _reason(path: Path, error: OSError) -> str:
    if isinstance(error, (FileNotFoundError, NotADirectoryError, IsADirectoryError)):
        return "missing"
    if error.errno == errno.EIO:  # a sector that is gone
        return f"cannot be read ({error.strerror})"
    raise InputError(f"{path} cannot be read: {error.strerror}") from error


def _adding_up(step_folder: Path, names: list[str], progress: Callable[[int, int], None] | None):
    if progress is None:
        return None
    sizes = [(step_folder / name).stat().st_size for name in names if (step_folder / name).is_file()]
    done, lock = 0, threading.Lock()

    def add(num_bytes: int) -> None:
        nonlocal done
        with lock:
            done += num_bytes
            progress(done, sum(sizes))

    return add
