"""One run in a folder at a time: a lease in RUN/run.lock that is kept fresh while its owner lives. No jax."""

import contextlib
import dataclasses
import datetime
import json
import os
import secrets
import socket
import sys
import threading
import time
from pathlib import Path

from neox_jax.errors import InputError

LOCK_FILE, CLAIM_FILE = "run.lock", "run.lock.new"
REFRESH_SECONDS, LOOK_SECONDS, STALE_SECONDS = 10, 5, 90


@dataclasses.dataclass(frozen=True)
class _Lease:
    """Who holds a folder. pid_namespace: in which pid means that process; start_time: in ticks since boot, for a pid is
    used again; token: of this lease alone; since: UTC."""

    host: str
    boot_id: str
    pid_namespace: str
    pid: int
    start_time: int
    token: str
    since: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


class RunLock:
    """Holds a run's folder, which is made if it is not there, for as long as the context lasts.

    Raises: InputError, on entering, where another run holds it or nothing can be written there.

    The owner sets the file's mtime every REFRESH_SECONDS, which takes no room on a full disk. Where this process can
    look the owner up (same boot, same pid namespace), the folder is held exactly as long as that lives, stopped or not.
    An owner on this host from before it booted is gone. All others are watched from here: the folder is taken over once
    the mtime has stayed the same for STALE_SECONDS, so that two hosts' clocks are never compared. Containers are among
    those, unless they share a pid namespace: one's pid means nothing in another, whatever their hostnames.

    Who makes CLAIM_FILE, by an exclusive creation, may rename it to LOCK_FILE, and what is there then tells who has it.
    An owner that was taken over while it could not refresh (a suspended host) learns of it from `check`.
    """

    def __init__(self, folder: Path):
        self._folder, self._path, self._claim = Path(folder), Path(folder) / LOCK_FILE, Path(folder) / CLAIM_FILE
        self._lease = _new_lease()
        self._lost: str | None = None
        self._released = threading.Event()

    def __enter__(self):
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            while not self._acquire():
                pass
        except OSError as error:
            raise InputError(
                f"{self._folder} cannot be locked for this run ({_reason(error)}); it must be a folder that can be "
                "written to, on a disk with room"
            ) from error
        self._refreshed = time.monotonic()
        threading.Thread(target=self._keep_fresh, name="neox_jax.run_lock", daemon=True).start()
        return self

    def __exit__(self, *error):
        self._released.set()
        with contextlib.suppress(OSError):
            if self._is_ours():
                self._path.unlink()

    def check(self) -> None:
        """To be called before anything is written; looks at the file only if that has not been done for a while, as
        after the process was stopped.

        Raises: InputError where the folder is no longer this run's.
        """
        if time.monotonic() - self._refreshed > 2 * REFRESH_SECONDS:
            self._refresh()
        if self._lost is not None:
            raise InputError(f"{self._lost}; nothing more is written by this one")

    def _acquire(self) -> bool:
        """Tries once; False: something changed meanwhile, look again. Raises: InputError where another has it."""
        if self._is_ours():  # another, that had the right to, has renamed our claim
            return True
        holder, seen = _examine(self._path)
        if holder is not None:
            self._refuse(holder)
        try:
            _create(self._claim, self._lease)
        except FileExistsError:
            holder, claim = _examine(self._claim)
            if holder is not None:
                self._refuse(holder)
            if claim is not None:  # left behind by one that was killed in this very moment
                self._claim.unlink(missing_ok=True)
            return False
        if _read(self._path)[0] != seen:
            self._claim.unlink(missing_ok=True)
            return False
        with contextlib.suppress(FileNotFoundError):
            self._claim.rename(self._path)
        return self._is_ours()

    def _refuse(self, holder: str) -> None:
        raise InputError(f"{self._folder} is in use by another run ({holder}); stop that, or use another --workdir")

    def _is_ours(self) -> bool:
        return _parse(_read(self._path)[0]) == self._lease

    def _keep_fresh(self) -> None:
        while self._lost is None and not self._released.wait(REFRESH_SECONDS):
            self._refresh()

    def _refresh(self) -> None:
        try:
            with self._path.open("rb") as file:
                lease = _parse(file.read())
                if lease == self._lease:
                    os.utime(file.fileno())
                    self._refreshed = time.monotonic()
                else:
                    self._lost = f"{self._folder} was taken over by another run ({_describe(lease)})"
        except FileNotFoundError:
            self._lost = f"{self._path} was removed, so that another run may have begun there"
        except OSError as error:  # perhaps for a moment
            if time.monotonic() - self._refreshed > STALE_SECONDS:
                self._lost = f"{self._path} could not be refreshed for {STALE_SECONDS} s ({_reason(error)})"


def held_by(folder: Path) -> str | None:
    """The process that holds a run's folder, in words, or None; may take STALE_SECONDS, and says so, where that is on
    another host. Raises: InputError where it cannot be read."""
    try:
        return _examine(Path(folder) / LOCK_FILE)[0]
    except OSError as error:
        raise InputError(f"{folder}/{LOCK_FILE} cannot be read ({_reason(error)})") from error


def _examine(path: Path) -> tuple[str | None, bytes | None]:
    """(who holds the lease there, None for nobody; its bytes, None where there is no file)."""
    first = None
    # Looks are counted, not seconds: they stop when the file system, or this process, does.
    for look in range(1 + round(STALE_SECONDS / LOOK_SECONDS)):
        content, mtime_ns = _read(path)
        if content is None:
            return None, None
        lease = _parse(content)
        lives = None if lease is None else _lives(lease, mtime_ns)
        if lives is not None:
            return (str(lease) if lives else None), content
        if first is None:
            first = content, mtime_ns
            print(
                f"neox-jax: {path} is of {_describe(lease)}, which cannot be looked up from here; waiting for "
                f"{STALE_SECONDS} s at most to see whether it is refreshed",
                file=sys.stderr,
                flush=True,
            )
        elif first != (content, mtime_ns):
            return _describe(lease), content
        if look * LOOK_SECONDS < STALE_SECONDS:
            time.sleep(LOOK_SECONDS)
    return None, content


def _lives(lease: _Lease, mtime_ns: int) -> bool | None:
    """Whether the owner is there, where that can be known from here."""
    here = _new_lease()
    place = (lease.boot_id, lease.pid_namespace)
    if all(place) and place == (here.boot_id, here.pid_namespace):
        try:
            os.kill(lease.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass  # another user's, there all the same
        state, start_time = _process(lease.pid)
        return None if start_time is None else (start_time == lease.start_time and state not in "ZX")
    if lease.host == here.host and lease.boot_id != here.boot_id and mtime_ns < _boot_seconds() * 10**9:
        return False
    return None


def _new_lease() -> _Lease:
    now = datetime.datetime.now(datetime.UTC)
    return _Lease(
        host=socket.gethostname(),
        boot_id=_proc("sys/kernel/random/boot_id").strip(),
        pid_namespace=_pid_namespace(),
        pid=os.getpid(),
        start_time=_process(os.getpid())[1] or 0,
        token=secrets.token_hex(8),
        since=f"{now:%Y-%m-%d %H:%M:%S} UTC",
    )


def _describe(lease: _Lease | None) -> str:
    return "an unknown process" if lease is None else str(lease)


def _create(path: Path, lease: _Lease) -> None:
    """Raises: FileExistsError; any other OSError leaves no file."""
    with path.open("xb") as file:
        try:
            file.write(json.dumps(dataclasses.asdict(lease)).encode())
            file.flush()
            os.fsync(file.fileno())
        except OSError:
            path.unlink(missing_ok=True)
            raise


def _read(path: Path) -> tuple[bytes | None, int]:
    """(bytes, mtime in ns); None where there is no file. Opened each time: over NFS that is what looks anew."""
    try:
        with path.open("rb") as file:
            return file.read(), os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None, 0


def _parse(content: bytes | None) -> _Lease | None:
    """None: no lease, as of one that was cut off."""
    try:
        lease = _Lease(**json.loads(content or b""))
    except (ValueError, TypeError, RecursionError):
        return None
    kinds = {field.name: field.type for field in dataclasses.fields(_Lease)}
    if any(type(getattr(lease, name)) is not kind for name, kind in kinds.items()):
        return None
    return lease if 0 < lease.pid < 2**31 else None


def _proc(name: str) -> str:
    """A file under /proc, "" where there is none (it is Linux's)."""
    try:
        return Path("/proc", name).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _process(pid: int) -> tuple[str, int | None]:
    """(state, start in ticks since boot) of a process that is there."""
    fields = _proc(f"{pid}/stat").rpartition(")")[2].split()  # a program's name may hold anything
    return (fields[0], int(fields[19])) if fields else ("", None)


def _pid_namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _boot_seconds() -> int:
    """When this host was booted, in seconds since the epoch; 0: not known."""
    lines = [line.split() for line in _proc("stat").splitlines() if line.startswith("btime ")]
    return int(lines[0][1]) if lines else 0


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()
