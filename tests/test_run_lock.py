"""Who holds a run's folder: by real processes, some of which say that they are on another host."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mounts import python_in_a_small_disk

from neox_jax import run_lock
from neox_jax.errors import InputError
from neox_jax.run_lock import CLAIM_FILE, LOCK_FILE, RunLock, held_by

ROOT = Path(__file__).resolve().parents[1]
HOLD = """
import os, signal, socket, sys, time
from neox_jax import run_lock
from neox_jax.errors import InputError

folder, host, done, begin = *sys.argv[1:4], float(sys.argv[4])
run_lock.REFRESH_SECONDS, run_lock.LOOK_SECONDS, run_lock.STALE_SECONDS = 0.2, 0.1, 1
if host:
    socket.gethostname = lambda: host
    run_lock._pid_namespace = lambda: host
time.sleep(max(0, begin - time.time()))
try:
    with run_lock.RunLock(folder) as lock:
        print("held", flush=True)
        while not os.path.exists(done):
            time.sleep(0.01)
            lock.check()
    print("released", flush=True)
except InputError as error:
    print(error, flush=True)
    sys.exit(65)
"""
IN_USE = "is in use by another run (process {pid} on {host}, since 20"


@pytest.fixture(autouse=True)
def short_times(monkeypatch):
    """As in the processes, so that nothing here takes minutes."""
    for name, seconds in {"REFRESH_SECONDS": 0.2, "LOOK_SECONDS": 0.1, "STALE_SECONDS": 1}.items():
        monkeypatch.setattr(run_lock, name, seconds)


@pytest.fixture
def start(tmp_path):
    """Starts a process that holds tmp_path / "run" until there is tmp_path / "done", or tells why it cannot."""
    children = []

    def start(host="", begin=0.0):
        arguments = [sys.executable, "-c", HOLD, tmp_path / "run", host, tmp_path / "done", str(begin)]
        child = subprocess.Popen(
            arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": ROOT}
        )
        children.append(child)
        return child

    yield start
    for child in children:
        child.kill()
        child.communicate()


def wait_until_held(child: subprocess.Popen) -> None:
    assert child.stdout.readline() == "held\n", child.communicate()


def write_lease(folder: Path, name: str = LOCK_FILE, **fields) -> Path:
    """A lease of this very process, but for the fields given."""
    folder.mkdir(exist_ok=True)
    lease = dataclasses.replace(run_lock._new_lease(), **fields)
    (folder / name).write_text(json.dumps(dataclasses.asdict(lease)))
    return folder / name


@contextlib.contextmanager
def refreshing(path: Path):
    """As its owner on another host would."""
    code = "import os, sys, time\nwhile True: os.utime(sys.argv[1]); time.sleep(0.1)"
    child = subprocess.Popen([sys.executable, "-c", code, path])
    yield
    child.kill()
    child.wait()


def acquire(folder: Path) -> float:
    """Seconds until it was ours."""
    began = time.monotonic()
    with RunLock(folder) as lock:
        lock.check()
        return time.monotonic() - began


def test_it_is_there_while_the_context_lasts(tmp_path):
    folder = tmp_path / "a" / "run"
    with RunLock(folder):
        assert [path.name for path in folder.iterdir()] == [LOCK_FILE]
        assert held_by(folder).startswith(f"process {os.getpid()} on ")
    assert list(folder.iterdir()) == []
    assert held_by(folder) is None
    assert held_by(tmp_path / "nothing") is None
    with pytest.raises(KeyError), RunLock(folder):
        raise KeyError
    assert list(folder.iterdir()) == []


def test_a_second_run_is_refused(start, tmp_path):
    owner = start()
    wait_until_held(owner)
    expected = IN_USE.format(pid=owner.pid, host=os.uname().nodename)
    for stopped in (False, True):
        if stopped:  # it lives all the same
            owner.send_signal(signal.SIGSTOP)
            time.sleep(run_lock.STALE_SECONDS * 1.2)
        began = time.monotonic()
        with pytest.raises(InputError) as refused, RunLock(tmp_path / "run"):
            pass
        assert expected in str(refused.value)
        assert str(refused.value).endswith("; stop that, or use another --workdir")
        assert time.monotonic() - began < 0.5
    owner.send_signal(signal.SIGCONT)
    time.sleep(0.5)
    assert owner.poll() is None
    assert held_by(tmp_path / "run") is not None


def test_a_killed_owner_holds_nothing(start, tmp_path):
    owner = start()
    wait_until_held(owner)
    owner.kill()
    os.waitid(os.P_PID, owner.pid, os.WEXITED | os.WNOWAIT)  # a zombie: dead, but its pid is still there
    assert (tmp_path / "run" / LOCK_FILE).exists()
    assert acquire(tmp_path / "run") < 0.5
    write_lease(tmp_path / "run", pid=owner.pid, start_time=1)
    owner.wait()
    assert held_by(tmp_path / "run") is None
    assert acquire(tmp_path / "run") < 0.5


def test_a_pid_that_is_another_process_by_now(tmp_path):
    write_lease(tmp_path / "run", start_time=1)
    assert acquire(tmp_path / "run") < 0.5


def test_an_owner_from_before_the_last_boot(tmp_path):
    path = write_lease(tmp_path / "run", boot_id="another")
    os.utime(path, (1e9, 1e9))
    assert acquire(tmp_path / "run") < 0.5
    # Refreshed since: that is another machine, or container, of the same name.
    with refreshing(write_lease(tmp_path / "run", boot_id="another")):
        assert held_by(tmp_path / "run") is not None


@pytest.mark.parametrize("fields", [{"host": "b", "boot_id": "b"}, {"pid_namespace": "b"}, {"boot_id": ""}])
def test_an_owner_that_cannot_be_looked_up(tmp_path, capsys, fields):
    """Refreshed: refused. Otherwise: watched, and then taken over; whatever its clock says."""
    path = write_lease(tmp_path / "run", **fields)
    os.utime(path, (4e9, 4e9))
    with refreshing(path), pytest.raises(InputError, match=r"in use by another run \(process .*\); stop that"):
        acquire(tmp_path / "run")
    os.utime(path, (4e9, 4e9))
    assert 0.9 < acquire(tmp_path / "run") < 3
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all("cannot be looked up from here; waiting for 1 s at most" in line for line in lines)


@pytest.mark.parametrize("content", ["", "[]", '{"pid": 1}'])
def test_a_lease_that_cannot_be_read_is_watched(tmp_path, capsys, content):
    (tmp_path / LOCK_FILE).write_text(content)
    with refreshing(tmp_path / LOCK_FILE):
        assert held_by(tmp_path) == "an unknown process"
    assert 0.9 < acquire(tmp_path) < 3


LEFT = {
    "nothing": lambda folder: None,
    "of a dead process": lambda folder: write_lease(folder, start_time=1),
    "of another host": lambda folder: write_lease(folder, host="b", boot_id="b"),
    "a claim too": lambda folder: [write_lease(folder, name, start_time=1) for name in (LOCK_FILE, CLAIM_FILE)],
}


@pytest.mark.parametrize("left", LEFT)
def test_one_of_many_at_once_gets_it(start, tmp_path, left):
    LEFT[left](tmp_path / "run")
    begin = time.time() + 1
    children = [start(begin=begin) for _ in range(5)]
    deadline = time.monotonic() + 20
    while sum(child.poll() is None for child in children) > 1 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [child.poll() for child in children].count(None) == 1
    (tmp_path / "done").touch()
    outcomes = [child.communicate(timeout=30) for child in children]
    won = [child for child in children if child.returncode == 0]
    assert len(won) == 1, outcomes
    for child, (out, _) in zip(children, outcomes, strict=True):
        assert out == "held\nreleased\n" if child is won[0] else "is in use by another run" in out, outcomes
    assert list((tmp_path / "run").iterdir()) == []


def test_a_run_that_was_taken_over_ends(start, tmp_path):
    """One on another host stands still for too long, goes on, and leaves alone what is no longer its."""
    owner = start(host="b")
    wait_until_held(owner)
    with pytest.raises(InputError, match="process .* on b, since"):
        acquire(tmp_path / "run")
    owner.send_signal(signal.SIGSTOP)
    with RunLock(tmp_path / "run") as lock:
        content = (tmp_path / "run" / LOCK_FILE).read_bytes()
        owner.send_signal(signal.SIGCONT)
        out, err = owner.communicate(timeout=10)
        assert owner.returncode == 65, err
        assert f"was taken over by another run (process {os.getpid()} on " in out
        assert out.endswith("); nothing more is written by this one\n")
        assert (tmp_path / "run" / LOCK_FILE).read_bytes() == content
        lock.check()


def test_check_sees_at_once_what_the_thread_has_not_yet(tmp_path, monkeypatch):
    monkeypatch.setattr(RunLock, "_keep_fresh", lambda self: None)
    with RunLock(tmp_path) as lock:
        write_lease(tmp_path)
        lock.check()
        time.sleep(2.5 * run_lock.REFRESH_SECONDS)
        with pytest.raises(InputError, match="taken over"):
            lock.check()
    assert (tmp_path / LOCK_FILE).exists()


def test_a_lock_that_was_removed(tmp_path):
    with RunLock(tmp_path) as lock:
        (tmp_path / LOCK_FILE).unlink()
        time.sleep(2 * run_lock.REFRESH_SECONDS)
        with pytest.raises(InputError, match="run.lock was removed, so that another run may have begun"):
            lock.check()


def test_a_file_system_that_does_not_answer_for_a_moment(tmp_path, monkeypatch):
    utime, broken = os.utime, [True]

    def fail(descriptor):
        if broken[0]:
            raise OSError(5, "Input/output error")
        utime(descriptor)

    with RunLock(tmp_path) as lock:
        monkeypatch.setattr(os, "utime", fail)
        time.sleep(run_lock.STALE_SECONDS / 2)
        lock.check()
        broken[0] = False
        time.sleep(run_lock.STALE_SECONDS)
        lock.check()
        broken[0] = True
        time.sleep(1.5 * run_lock.STALE_SECONDS)
        with pytest.raises(InputError, match=r"could not be refreshed for 1 s \(input/output error\)"):
            lock.check()
        monkeypatch.undo()


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for folder, why in {"file": "file exists", "file/run": "not a directory"}.items():
        with pytest.raises(InputError, match=rf"cannot be locked for this run \({why}\); it must be a folder"):
            acquire(tmp_path / folder)


FULL_DISK = """
import os, sys, time
from pathlib import Path
from neox_jax import run_lock
from neox_jax.errors import InputError

run_lock.REFRESH_SECONDS = 0.2
folder = Path(sys.argv[1])
def fill():
    with open(folder / "filler", "ab", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            pass
fill()
try:
    run_lock.RunLock(folder).__enter__()
except InputError as error:
    print(error)
print(sorted(os.listdir(folder)))
(folder / "filler").unlink()
with run_lock.RunLock(folder) as lock:
    fill()
    before = (folder / "run.lock").stat().st_mtime_ns
    time.sleep(1)
    lock.check()
    print((folder / "run.lock").stat().st_mtime_ns > before)
print(sorted(os.listdir(folder)))
"""


def test_a_full_disk(tmp_path):
    """A tmpfs in a namespace of its own. To hold the folder takes no room; to begin does."""
    done = python_in_a_small_disk(tmp_path, "64k", FULL_DISK)
    assert done.stdout.splitlines() == [
        f"{tmp_path} cannot be locked for this run (no space left on device); it must be a folder that can be written "
        "to, on a disk with room",
        "['filler']",
        "True",
        "['filler']",
    ], done.stderr
