"""What becomes of processes that hang: real ones, alone and several; and of those whose numbers go bad."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from neox_jax.peers import Alone
from neox_jax.watchdog import Watchdog

ROOT = Path(__file__).resolve().parents[1]
HOST = socket.gethostname()
AGAIN = "start it again: a run goes on from its last checkpoint"
PROGRAM = """
import json, os, signal, socket, sys, time
from neox_jax import hub, peers, watchdog
from neox_jax.errors import NumbersError
from neox_jax.watchdog import Watchdog

watchdog.END_SECONDS = 5
folder, address, num_processes, process_id, plan = *sys.argv[1:3], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
peers.ROLL_SECONDS = peers.LEAVE_SECONDS = hub.ROLL_SECONDS = hub.LEAVE_SECONDS = 1.5

def in_sleep():
    time.sleep(60)

def in_socket():
    socket.create_server(("127.0.0.1", 0)).accept()

def compile_minutes():
    import jax
    loop = lambda x: jax.lax.fori_loop(0, 2**31 - 1, lambda i, x: jax.numpy.sin(x), x)
    return jax.jit(loop).lower(1.0).compile()

def in_jax():
    minutes(1.0).block_until_ready()

def in_print():
    while True:
        print("x" * 1000)

def in_nothing():
    pass

def in_steps():
    for step in range(6, 20):
        time.sleep(0.1)
        watchdog.beat(f"step {step}")

def stopped():
    os.kill(os.getpid(), signal.SIGSTOP)

def bad_numbers():
    raise NumbersError("loss is not finite")

mine = json.loads(plan)[process_id]
minutes = compile_minutes() if mine[0] == "in_jax" else None
here = peers.Alone()
if num_processes > 1:
    here = peers.meet(address, num_processes=num_processes, process_id=process_id, facts={}, timeout_seconds=60)
with here, Watchdog(0.5, folder=folder, peers=here) as watchdog:
    for step in range(1, 8):
        watchdog.beat(f"step {step}")
        if num_processes > 1:
            if step != 5:
                here.gather(f"step {step}")
            if step == mine[1]:
                globals()[mine[0]]()
            here.agree_to_stop(step)
        elif step == 5:
            globals()[mine[0]]()
if num_processes > 1:
    here.close()
print("done")
"""


@pytest.fixture
def start(tmp_path):
    """Starts processes that do step after step, until one does at its step what the plan says of it."""
    children = []
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}

    def start(*plan, folder=tmp_path) -> list[subprocess.Popen]:
        for i in range(len(plan)):
            command = [sys.executable, "-c", PROGRAM, folder, address, str(len(plan)), str(i), json.dumps(plan)]
            children.append(
                subprocess.Popen(
                    command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
                )
            )  # fmt: skip
        return children

    yield start
    for child in children:
        child.kill()
        child.communicate()


def outcome(child: subprocess.Popen) -> tuple[int, str, list[str]]:
    """(exit code, stdout, the lines of stderr that are not stacks)."""
    out, err = child.communicate(timeout=40)
    stacks = re.compile(r"$|(Current thread|Thread) 0x|  File |  <no Python frame>|  \.\.\.|Extension modules:")
    return child.returncode, out, [line for line in err.splitlines() if not stacks.match(line)]


# --- alone ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["in_sleep", "in_socket", "in_jax"])
def test_a_process_that_hangs_is_ended(start, tmp_path, where):
    (child,) = start([where])
    out, err = child.communicate(timeout=40)
    assert child.returncode == 75, err
    stacks = f"{tmp_path}/stacks-*.txt"
    line = f"neox-jax: step 5 has taken longer than 0.5 s (where each thread was: {stacks}); {AGAIN}"
    assert err.splitlines()[-1] == line
    assert out == ""
    for text in (err, (tmp_path / "stacks-0.txt").read_text()):
        assert f" in {where}\n" in text
        assert text.count("Current thread") == 1
        assert "importlib" not in text


def test_output_that_nobody_reads_keeps_nothing_alive(start):
    """The lock of standard output is held by the thread that hangs."""
    (child,) = start(["in_print"])
    assert child.wait(timeout=30) == 75
    assert AGAIN in child.stderr.read()


def test_stacks_that_cannot_be_written_keep_nothing_alive(start, tmp_path):
    (child,) = start(["in_sleep"], folder=tmp_path / "nothing")
    assert outcome(child)[0] == 75


@pytest.mark.parametrize("where", ["in_nothing", "in_steps"])
def test_a_process_that_goes_on_is_not_ended(start, tmp_path, where):
    (child,) = start([where])
    assert outcome(child) == (0, "done\n", [])
    assert not list(tmp_path.iterdir())


def test_a_stopped_process_goes_on(start):
    (child,) = start(["stopped"])
    wait_until_stopped(child)
    time.sleep(1)
    child.send_signal(signal.SIGCONT)
    assert outcome(child) == (0, "done\n", [])


def wait_until_stopped(child: subprocess.Popen) -> None:
    deadline = time.monotonic() + 20
    while Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        assert child.poll() is None, child.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


class Ended(Alone):
    def __init__(self):
        super().__init__()
        self.lines = []

    def end_stuck(self, line):
        self.lines.append(line)


def test_what_is_off(tmp_path):
    peers = Ended()
    with Watchdog(0, folder=tmp_path, peers=peers) as watchdog:
        watchdog.beat("step 1")
        time.sleep(0.3)
    with Watchdog(0.2, folder=tmp_path, peers=peers) as watchdog:
        time.sleep(0.4)  # no beat yet
        watchdog.beat("step 1")
        time.sleep(0.05)
    time.sleep(0.4)
    assert peers.lines == []
    with Watchdog(0.2, folder=tmp_path, peers=peers) as watchdog:
        watchdog.beat("step 1")
        time.sleep(0.5)
    assert peers.lines
    assert all(line.startswith("step 1 has taken longer than 0.2 s (") for line in peers.lines)


# --- several ----------------------------------------------------------------------------------------------------------


def test_the_one_that_is_stopped_is_named_and_ends_when_it_goes_on(start, tmp_path):
    nothing = ["in_nothing", 0]
    children = start(nothing, nothing, ["stopped", 4])
    line = (
        f"neox-jax: step 6 has taken longer than 0.5 s (where each thread was: {tmp_path}/stacks-*.txt): "
        f"process 2 ({HOST}) does not answer (stopped, or the host is gone); {AGAIN}"
    )
    for child in children[:2]:
        assert outcome(child) == (75, "", [line])
    assert children[2].poll() is None
    children[2].send_signal(signal.SIGCONT)
    code, _, lines = outcome(children[2])
    assert (code, lines) == (75, [line])


def test_the_hub_that_is_stopped_is_named(start, tmp_path):
    children = start(["stopped", 4], ["in_nothing", 0])
    code, _, lines = outcome(children[1])
    assert code == 75
    assert lines[0].endswith(f": process 0 ({HOST}) does not answer; {AGAIN}")
    children[0].send_signal(signal.SIGCONT)
    code, _, lines = outcome(children[0])
    assert code == 75
    assert len(lines) == 1


def test_the_one_that_is_behind_is_named(start, tmp_path):
    nothing = ["in_nothing", 0]
    outcomes = [outcome(child) for child in start(nothing, ["in_sleep", 5], nothing)]
    assert [code for code, _, _ in outcomes] == [75] * 3
    lines = {line for _, _, lines in outcomes for line in lines}
    assert len(lines) == 1
    assert f": process 1 ({HOST}) is at step 5, the furthest at step 6; {AGAIN}" in lines.pop()
    assert " in in_sleep\n" in (tmp_path / "stacks-1.txt").read_text()
    assert " in gather\n" in (tmp_path / "stacks-2.txt").read_text()


def test_all_hang_alike(start):
    outcomes = [outcome(child) for child in start(["in_sleep", 5], ["in_sleep", 5])]
    assert [code for code, _, _ in outcomes] == [75] * 2
    assert [lines for _, _, lines in outcomes] == [outcomes[0][2]] * 2
    (line,) = outcomes[0][2]
    assert line.startswith("neox-jax: step 5 has taken longer than 0.5 s (")
    assert line.endswith(f": all 2 processes answer, and are at step 5; {AGAIN}")


@pytest.mark.parametrize("who", [0, 1])
def test_bad_numbers_end_all_with_one_line(start, who):
    plan = [["in_sleep", 3], ["in_sleep", 3]]
    plan[who] = ["bad_numbers", 3]
    outcomes = [outcome(child) for child in start(*plan)]
    assert outcomes == [(70, "", [f"neox-jax: process {who} ({HOST}): loss is not finite"])] * 2
