"""Several processes: how they meet, that they compute one run whatever their number, how they end together.

All processes are on this machine; what only several hosts could show is not shown here.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from runs import free_port

import neox_jax
from neox_jax.checkpoint.steps import list_steps
from neox_jax.config import ModelConfig, load_config
from neox_jax.data.megatron import IndexedDatasetWriter
from neox_jax.distributed import Place, check_alone, detect_place
from neox_jax.errors import InputError
from neox_jax.metrics import read_metrics
from neox_jax.model import init_model
from neox_jax.tokenizer import train_tokenizer
from neox_jax.train import train
from neox_jax.tree import named_leaves

ROOT = Path(__file__).resolve().parents[1]
WORKER = Path(__file__).with_name("distributed_worker.py")
TEXTS = [p.read_text(encoding="utf-8") for p in sorted((ROOT / "neox_jax").glob("*.py"))]
STEPS = 4
TENSOR = {"mesh.data": 2, "mesh.model": 2}
SHARDED = {"mesh.data": 2, "mesh.fsdp": 2}


class Processes:
    """Children that are all gone at the end, with what they printed and how they ended."""

    def __init__(self):
        self.children: list[subprocess.Popen] = []

    def start(self, *command, devices: int = 1, cwd: Path = ROOT, **environment) -> subprocess.Popen:
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(devices),
            **environment,
        }
        child = subprocess.Popen(
            [sys.executable, *map(str, command)],
            cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.children.append(child)
        return child

    def wait(self, *, seconds: float = 200) -> list[tuple[int, str, str]]:
        """(exit code, stdout, stderr) of each."""
        outcomes, deadline = [], time.monotonic() + seconds
        for child in self.children:
            out, err = child.communicate(timeout=max(1, deadline - time.monotonic()))
            outcomes.append((child.returncode, out, err))
        self.children = []
        return outcomes

    def close(self) -> None:
        for child in self.children:
            child.kill()
            child.communicate()


@pytest.fixture
def processes():
    made = Processes()
    yield made
    made.close()


def lines_of(outcomes) -> list[list[str]]:
    """What each said on stderr that is not progress."""
    return [[line for line in err.splitlines() if not line.startswith("training ")] for _, _, err in outcomes]


def codes_of(outcomes) -> list[int]:
    return [code for code, _, _ in outcomes]


# --- meeting and talking, without jax --------------------------------------------------------------------------------


def talk(processes: Processes, folder: Path, num_processes: int, *, without=(), seconds=30, **plan):
    """Runs the worker's `peers` mode; returns (outcomes, coordinator, seconds it took)."""
    coordinator, began = f"127.0.0.1:{free_port()}", time.monotonic()
    path = folder / "plan.json"
    path.write_text(json.dumps({**plan, **plan.pop("each", {})}))
    for i in range(num_processes):
        if i not in without:
            processes.start(WORKER, "peers", coordinator, num_processes, i, path)
    return processes.wait(seconds=seconds), coordinator, time.monotonic() - began


HOST = socket.gethostname()
REFUSED = {
    "missing": (
        {"without": [2], "timeout": 2},
        f"process 2 (of 4) did not arrive at {{at}} within 2 s; here are {HOST} (0), {HOST} (1), {HOST} (3)",
    ),
    "two missing": (
        {"without": [2, 3], "timeout": 2},
        f"processes 2-3 (of 4) did not arrive at {{at}} within 2 s; here are {HOST} (0), {HOST} (1)",
    ),
    "another number": (
        {"each": {"3": {"num_processes": 5}}},
        f"process 3 ({HOST}) was started as one of 5 processes, process 0 ({HOST}) as one of 4; start all with the "
        "same number",
    ),
    "twice": (
        {"each": {"3": {"process_id": 2}}},
        f"process 2 was started twice, on {HOST} and {HOST}; give each its own id",
    ),
    "another configuration": (
        {"facts": {"a": [1], "b": 0.5, "c": None}, "each": {"1": {"facts": {"a": [2], "b": 0.5, "d": 1}}}},
        f"process 1 ({HOST}) differs from process 0 ({HOST}): a is [2], not [1]; d is 1, not None; start all alike",
    ),
    "a problem": ({"each": {"2": {"problem": "no such file"}}}, f"process 2 ({HOST}): no such file"),
    "a problem of the first": ({"each": {"0": {"problem": "no such file"}}}, f"process 0 ({HOST}): no such file"),
    "a problem, and one is late": (
        {"each": {"2": {"problem": "no such file"}, "1": {"late": 1}}},
        f"process 2 ({HOST}): no such file",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_all_hear_why_they_do_not_start(processes, tmp_path, name):
    plan, message = REFUSED[name]
    outcomes, coordinator, seconds = talk(processes, tmp_path, 4, **plan)
    assert codes_of(outcomes) == [65] * len(outcomes), outcomes
    assert {out.strip() for _, out, _ in outcomes} == {message.format(at=coordinator)}
    assert lines_of(outcomes) == [[]] * len(outcomes)
    assert seconds < 15


def test_no_process_0(processes, tmp_path):
    outcomes, coordinator, seconds = talk(processes, tmp_path, 2, without=[0], timeout=2)
    assert outcomes[0][:2] == (
        65,
        f"process 1 (of 2), on {HOST}, did not find process 0 at {coordinator} within 2 s (connection refused); start "
        "it there, or open the port\n",
    )
    assert seconds < 10


def test_a_problem_is_not_kept_for_a_process_0_that_does_not_come(processes, tmp_path):
    outcomes, _, seconds = talk(processes, tmp_path, 2, without=[0], timeout=60, problem="no such file")
    assert outcomes[0][:2] == (65, "no such file\n")
    assert seconds < 15


def test_a_port_in_use(processes, tmp_path, monkeypatch):
    from neox_jax import hub, peers

    monkeypatch.setattr(hub, "HELLO_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(InputError, match=f"cannot listen on port {port} of .*in use.*another port"):
            peers.meet(f"127.0.0.1:{port}", num_processes=2, process_id=0, facts={}, timeout_seconds=2)


def test_strangers_are_ignored(processes, tmp_path):
    """What connects and is no process of ours neither takes part nor is in the way."""
    coordinator = f"127.0.0.1:{free_port()}"
    (tmp_path / "plan.json").write_text(json.dumps({"do": [["gather", "x", 5]]}))
    processes.start(WORKER, "peers", coordinator, 2, 0, tmp_path / "plan.json")
    sent = [
        b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\xff\n", b"[]\n", b"{}\n", b"[" * 10**5 + b"\n", b"",
        b'{"op": "hello", "neox_jax": 1, "id": -1, "num_processes": 2, "host": "x", "facts": {}}\n',
        b'{"op": "hello", "neox_jax": 1, "id": 1, "num_processes": 2, "host": 7, "facts": {}}\n',
        b'{"op": "hello", "neox_jax": 9, "id": 1, "num_processes": 2, "host": "x", "facts": {}}\n',
        b"x" * 2**21, b"half a line",
    ]  # fmt: skip
    strangers = []
    for data in sent:
        strangers.append(connect(coordinator))
        with_reset = threading.Thread(target=send, args=(strangers[-1], data))
        with_reset.start()
        with_reset.join(5)
    processes.start(WORKER, "peers", coordinator, 2, 1, tmp_path / "plan.json")
    assert processes.wait(seconds=20) == [(0, "[5, 5]\n", "")] * 2
    for stranger in strangers:
        stranger.close()


def connect(coordinator: str) -> socket.socket:
    host, _, port = coordinator.rpartition(":")
    for _ in range(100):
        try:
            return socket.create_connection((host, int(port)), timeout=5)
        except OSError:
            time.sleep(0.1)
    raise AssertionError("nobody listens")


def send(connection: socket.socket, data: bytes) -> None:
    with contextlib.suppress(OSError):  # it was closed before all was sent, as it should
        connection.sendall(data)


def test_gather_is_by_process(processes, tmp_path):
    do = {str(i): {"do": [["gather", "x", {"i": i}], ["same", "y", {"a": 1}], ["gather", "z", i]]} for i in range(3)}
    outcomes, _, _ = talk(processes, tmp_path, 3, each=do)
    assert outcomes == [(0, '[{"i": 0}, {"i": 1}, {"i": 2}]\n[0, 1, 2]\n', "")] * 3


ENDS = {
    "refuses": ([["refuse", "no data\nhere"]], 65, f"process 1 ({HOST}): no data\nhere"),
    "dies": ([["kill"]], 75, f"process 1 ({HOST}) is gone; start it again: a run goes on from its last checkpoint"),
    "interrupted": ([["signal", "SIGINT"]], 130, f"process 1 ({HOST}): interrupted"),
    "terminated": (
        [["signal", "SIGTERM"]],
        75,
        f"process 1 ({HOST}) is gone; start it again: a run goes on from its last checkpoint",
    ),
    "differs": (
        [["same", "the data", {"a": 2}]],
        65,
        f"process 1 ({HOST}) differs from process 0 ({HOST}): a is 2, not 1; start all alike",
    ),
    "does not come": (
        [["sleep", 60]],
        75,
        f"process 1 (of 3), on {HOST} (1), did not come to 'the data' within 3 s; start it again: a run goes on "
        "from its last checkpoint",
    ),
    "is elsewhere": (
        [["gather", "the weather"]], 1, None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ENDS)
def test_one_ends_all(processes, tmp_path, name):
    """Also those that are busy elsewhere: here process 2, which sleeps."""
    actions, code, message = ENDS[name]
    wait = [["same", "the data", {"a": 1}], ["sleep", 60]]
    last = wait if name in ("differs", "does not come") else [["sleep", 60]]
    plan = {"timeout": 3, "each": {"0": {"do": wait}, "1": {"do": actions}, "2": {"do": last}}}
    outcomes, _, seconds = talk(processes, tmp_path, 3, **plan)
    own = {"dies": -signal.SIGKILL, "terminated": -signal.SIGTERM}.get(name, code)
    assert codes_of(outcomes) == [code, own, code], outcomes
    for ended, _, err in outcomes:
        if message is not None and ended > 0:  # not killed
            assert err == f"neox-jax: {message}\n"
    assert seconds < 12


def test_process_0_dies(processes, tmp_path):
    here = ["gather", "all are here"]
    ends = ["kill"], ["sleep", 60], ["gather", "x"]
    plan = {"each": {str(i): {"do": [here, end]} for i, end in enumerate(ends)}}
    outcomes, _, seconds = talk(processes, tmp_path, 3, **plan)
    assert codes_of(outcomes) == [-9, 75, 75]
    message = f"neox-jax: process 0 ({HOST}) is gone; start it again: a run goes on from its last checkpoint\n"
    assert [err for _, _, err in outcomes[1:]] == [message] * 2
    assert seconds < 10


def test_a_defect_keeps_its_traceback(processes, tmp_path):
    plan = {"each": {"0": {"do": [["sleep", 60]]}, "1": {"do": [["break", "what is this"]]}}}
    outcomes, _, _ = talk(processes, tmp_path, 2, **plan)
    assert codes_of(outcomes) == [1, 1]
    assert outcomes[0][2] == f"neox-jax: process 1 ({HOST}): RuntimeError: what is this\n"
    assert "Traceback" in outcomes[1][2]


@pytest.mark.parametrize("who", [0, 2])
def test_all_stop_at_one_step(processes, tmp_path, who):
    """However far apart they are: here nothing but the agreement itself couples them."""
    do = {str(i): {"do": [["steps", 41, 0.001 * (i + 1), 200 if i == who else None]]} for i in range(4)}
    outcomes, _, _ = talk(processes, tmp_path, 4, each=do)
    assert codes_of(outcomes) == [0] * 4, outcomes
    stopped = {int(out) for _, out, _ in outcomes}
    assert len(stopped) == 1
    assert min(stopped) >= 200


def test_a_signal_before_the_first_step(processes, tmp_path):
    do = {str(i): {"do": [["steps", 41, 0.001, 41 if i == 1 else None]]} for i in range(2)}
    outcomes, _, _ = talk(processes, tmp_path, 2, each=do)
    assert len({out for _, out, _ in outcomes}) == 1


# --- places ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (("10.0.0.1", 2, 0), r"coordinator '10.0.0.1': wanted HOST:PORT"),
        ((":80", 2, 0), "wanted HOST:PORT"),
        (("host:port", 2, 0), "wanted HOST:PORT"),
        (("host:70000", 2, 0), "wanted HOST:PORT"),
        (("host:80", 0, 0), "num-processes is 0; it must be at least 1"),
        (("host:80", 4, 4), "process-id is 4; with 4 processes it is from 0 to 3"),
        (("host:80", 4, -1), "process-id is -1"),
    ],
)
def test_no_such_place(place, message):
    with pytest.raises(InputError, match=message):
        Place(*place)


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"SLURM_NTASKS": "4"}, "SLURM_NTASKS is 4, so .* --distributed auto .* --distributed off"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE is 2"),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "TPU_WORKER_HOSTNAMES names several hosts"),
        ({"SLURM_NTASKS": "1", "TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({}, None),
    ],
)
def test_one_that_was_forgotten(environ, message):
    if message is None:
        check_alone(environ)
        return
    with pytest.raises(InputError, match=message):
        check_alone(environ)


def slurm(process_id: int, num_processes: int, port: int) -> dict:
    return {
        "SLURM_JOB_ID": "77", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": str(num_processes),
        "SLURM_PROCID": str(process_id), "SLURM_LOCALID": str(process_id), "JAX_COORDINATOR_PORT": str(port),
    }  # fmt: skip


def test_detected_places(monkeypatch):
    """jax's own detection, which is not part of its documented interface."""
    for name, value in slurm(1, 4, 5000).items():
        monkeypatch.setenv(name, value)
    assert detect_place(timeout_seconds=5) == Place("localhost:5000", 4, 1, (1,))
    monkeypatch.setenv("OMPI_MCA_orte_hnp_uri", "1314521088.0;tcp://10.96.0.1,10.148.0.1:34911")
    for name, value in {"SIZE": "8", "RANK": "6", "LOCAL_RANK": "2"}.items():
        monkeypatch.setenv(f"OMPI_COMM_WORLD_{name}", value)
    assert detect_place(timeout_seconds=5) == Place("10.96.0.1:5000", 8, 6, (2,))


def test_nothing_detected(monkeypatch):
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    with pytest.raises(
        InputError, match=r"found no TPU pod, SLURM step \(srun\) or Open MPI job .* give --coordinator"
    ):
        detect_place(timeout_seconds=5)


# --- one run, whatever the number of processes -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    tokenizer = train_tokenizer(TEXTS, vocab_size=512)
    tokenizer.save(folder / "tokenizer.json")
    for name, texts in (("train", TEXTS[2:]), ("valid", TEXTS[:2])):
        with IndexedDatasetWriter(folder / name, np.uint16) as writer:
            for text in texts:
                writer.add_document([*tokenizer.encode(text), tokenizer.eos_token_id])
    (folder / "other").mkdir()
    with IndexedDatasetWriter(folder / "other" / "train", np.uint16) as writer:
        writer.add_document([1, 2, 3] * 20_000)
    return folder


def overrides(data: Path, *sections, **fields) -> list[tuple[str, str]]:
    values = {"train.steps": STEPS, "checkpoint.every": 2, "data.train": data / "train", "log.batch_digest": True}
    values |= {"data.tokenizer": data / "tokenizer.json", "eval.sample_tokens": 0}
    for section in sections:
        values |= section
    return [(name, str(value)) for name, value in {**values, **fields}.items()]


def with_valid(data: Path) -> dict:
    return {"data.valid": data / "valid", "eval.every": 2, "eval.batches": 2}


def alone(data: Path, folder: Path, *sections):
    return train(load_config("configs/tiny.py", overrides(data, *sections)), folder, devices=jax.devices()[:4])


def several(num_processes: int, out: Path, runs: list) -> list:
    """Trains the runs, (folder, overrides), over 4 devices in so many processes; what each process tells."""
    coordinator, processes = f"127.0.0.1:{free_port()}", Processes()
    out.mkdir()
    plan = {"runs": [{"folder": str(folder), "overrides": fields} for folder, fields in runs], "out": str(out)}
    (out / "plan.json").write_text(json.dumps(plan))
    try:
        for i in range(num_processes):
            arguments = ("runs", coordinator, num_processes, i, out / "plan.json")
            processes.start(WORKER, *arguments, devices=4 // num_processes)
        outcomes = processes.wait()
    finally:
        processes.close()
    assert codes_of(outcomes) == [0] * num_processes, outcomes
    assert [line for lines in lines_of(outcomes)[1:] for line in lines] == []  # only the first speaks
    return [json.loads((out / f"{i}.json").read_text()) for i in range(num_processes)]


def cut_off(folder: Path, copy: Path) -> Path:
    """The run as it was when only half of its steps had been saved."""
    shutil.copytree(folder, copy)
    shutil.rmtree(copy / "checkpoints" / str(STEPS))
    return copy


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("weights") / "hf"
    neox_jax.save_model(init_model(ModelConfig.preset("tiny"), seed=5), folder)
    return folder


@pytest.fixture(scope="module")
def kinds(data, weights) -> dict:
    """tensor: with held-out loss and a sample; sharded: from weights that are there."""
    return {
        "tensor": {**TENSOR, **with_valid(data), "eval.sample_tokens": 8},
        "sharded": {**SHARDED, "init_from": weights},
    }


@pytest.fixture(scope="module")
def one(data, kinds, tmp_path_factory) -> dict:
    """Runs by one process with 4 devices: name -> (folder, result)."""
    folder = tmp_path_factory.mktemp("one")
    return {name: (folder / name, alone(data, folder / name, fields)) for name, fields in kinds.items()}


@pytest.fixture(scope="module")
def two(data, kinds, tmp_path_factory) -> tuple[Path, list]:
    """The same by two processes with 2 devices each: their folder, what each process told."""
    folder = tmp_path_factory.mktemp("two")
    runs = [(folder / name, overrides(data, fields)) for name, fields in kinds.items()]
    return folder, several(2, folder / "out", runs)


@pytest.fixture(scope="module")
def four(data, two, tmp_path_factory) -> tuple[Path, list]:
    """By four processes with a device each: `tensor` anew, and gone on with from the middle of two's."""
    folder = tmp_path_factory.mktemp("four")
    resumed = cut_off(two[0] / "tensor", folder / "resumed")
    runs = [(folder / "tensor", overrides(data, TENSOR)), (resumed, overrides(data, TENSOR, with_valid(data)))]
    return folder, several(4, folder / "out", runs)


def assert_same_run(folder: Path, wanted: Path, *, names=("loss", "grad_norm", "valid_loss")) -> None:
    lines, wanted_lines = (read_metrics(run / "metrics.jsonl") for run in (folder, wanted))
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["batch_sha256"] for line in lines] == [line["batch_sha256"] for line in wanted_lines]
    for name in names:
        values, wanted_values = ([line[name] for line in each if name in line] for each in (lines, wanted_lines))
        np.testing.assert_allclose(values, wanted_values, rtol=0, atol=1e-5, err_msg=name)
        assert np.isfinite(values).all()
    assert list_steps(folder / "checkpoints") == list_steps(wanted / "checkpoints")


def assert_same_heldout(told: list, number: int, wanted) -> None:
    """Each process returned the same, which is what one process returns."""
    for process in told:
        for name in ("valid_loss", "valid_bits_per_byte"):
            assert process[number]["result"][name] == pytest.approx(getattr(wanted, name), abs=1e-5)


@pytest.mark.parametrize("name", ["tensor", "sharded"])
def test_two_processes_are_one_run(one, two, name):
    names = ("loss", "grad_norm") if name == "sharded" else ("loss", "grad_norm", "valid_loss")
    assert_same_run(two[0] / name, one[name][0], names=names)


def test_four_processes_are_one_run(one, four):
    assert_same_run(four[0] / "tensor", one["tensor"][0], names=("loss", "grad_norm"))


def test_the_heldout_loss_of_several(one, two, four):
    assert_same_heldout(two[1], 0, one["tensor"][1])
    assert_same_heldout(four[1], 1, one["tensor"][1])


def test_a_sample_is_written_by_several(one, two):
    assert one["tensor"][1].sample
    assert [process[0]["result"]["sample"] for process in two[1]] == [one["tensor"][1].sample] * 2


def test_two_are_gone_on_with_by_four(one, four):
    assert_same_run(four[0] / "resumed", one["tensor"][0])


def test_two_are_gone_on_with_by_one(data, kinds, one, two, tmp_path):
    resumed = cut_off(two[0] / "tensor", tmp_path / "resumed")
    alone(data, resumed, kinds["tensor"])
    assert_same_run(resumed, one["tensor"][0])


def test_each_process_reads_its_rows(two, four):
    """Batch 3 of 8 rows is samples 24 to 31: half a batch for each replica, however many processes hold it."""
    halves = [list(range(24, 28)), list(range(28, 32))]
    assert [sorted(process[0]["rows"]) for process in two[1]] == halves
    assert [sorted(process[1]["rows"]) for process in two[1]] == halves
    assert [sorted(process[0]["rows"]) for process in four[1]] == [halves[0], halves[0], halves[1], halves[1]]


def test_several_start_from_weights(weights, two):
    wanted, found = (named_leaves(neox_jax.load_model(source)) for source in (weights, f"{two[0] / 'sharded'}@0"))
    assert wanted.keys() == found.keys()
    assert all((wanted[name] == found[name]).all() for name in wanted)


# --- ending together -------------------------------------------------------------------------------------------------


def start_training(processes: Processes, folder, fields: list, *, num_processes=2, environments=None, where=None):
    """Starts `neox-jax train` in each process; by flags, or by the environment of each."""
    port = free_port()
    for i in range(num_processes):
        flags = ["--coordinator", f"127.0.0.1:{port}", "--num-processes", num_processes, "--process-id", i]
        environment = {}
        if environments is not None:
            flags, environment = ["--distributed", "auto"], environments(i, num_processes, port)
        processes.start(
            "-m", "neox_jax.cli", "train", "--config", ROOT / "configs/tiny.py", "--workdir", folder, *flags,
            "--distributed-timeout", 60, "--heartbeat-timeout", 20,
            *(f"--config.{name}={value}" for name, value in fields),
            devices=4 // num_processes, cwd=ROOT if where is None else where[i], **environment,
        )  # fmt: skip


def wait_for_step(processes: Processes, folder: Path, step: int) -> None:
    deadline = time.monotonic() + 150
    while time.monotonic() < deadline:
        if any(line["step"] >= step for line in read_metrics(folder / "metrics.jsonl")):
            return
        assert all(child.poll() is None for child in processes.children), processes.wait()
        time.sleep(0.05)
    raise AssertionError(f"no step {step} in time")


def test_a_run_that_is_stopped_and_killed(processes, data, tmp_path):
    """SIGTERM to one of two: both save at one step. `kill -9`: the other ends at once. Then to the end."""
    last = 80
    fields = overrides(data, TENSOR, {"train.steps": last, "checkpoint.every": 10, "checkpoint.keep": 100})
    folder = tmp_path / "run"

    start_training(processes, folder, fields, environments=slurm)
    wait_for_step(processes, folder, 15)
    processes.children[1].send_signal(signal.SIGTERM)
    outcomes = processes.wait()
    assert codes_of(outcomes) == [75, 75], outcomes
    stopped_at = list_steps(folder / "checkpoints")[-1]
    assert 15 <= stopped_at < last
    assert f"stopped and saved at step {stopped_at};" in outcomes[0][1]
    assert lines_of(outcomes) == [[], []]

    start_training(processes, folder, fields)
    wait_for_step(processes, folder, stopped_at + 25)
    processes.children[1].kill()
    killed = time.monotonic()
    outcomes = processes.wait()
    assert time.monotonic() - killed < 20  # the heartbeat's; it takes a moment
    assert codes_of(outcomes) == [75, -9]
    assert f"going on from step {stopped_at} of {last}" in outcomes[0][1]
    message = f"neox-jax: process 1 ({HOST}) is gone; start it again: a run goes on from its last checkpoint"
    assert lines_of(outcomes)[0] == [message]
    saved = list_steps(folder / "checkpoints")[-1]
    assert stopped_at < saved < last

    start_training(processes, folder, fields)
    outcomes = processes.wait()
    assert codes_of(outcomes) == [0, 0], outcomes
    assert f"going on from step {saved} of {last}" in outcomes[0][1]
    assert not list((folder / "checkpoints").glob("*tmp*"))

    straight = [("train.steps", str(last)), ("checkpoint.every", "0")]
    config = load_config("configs/tiny.py", [*overrides(data, TENSOR), *straight])
    train(config, tmp_path / "straight", devices=jax.devices()[:4])
    lines, wanted = (read_metrics(run / "metrics.jsonl") for run in (folder, tmp_path / "straight"))
    assert [line["step"] for line in lines] == list(range(1, last + 1))
    assert [line["batch_sha256"] for line in lines] == [line["batch_sha256"] for line in wanted]
    np.testing.assert_allclose([line["loss"] for line in lines], [line["loss"] for line in wanted], atol=1e-5)


def two_hosts(tmp_path: Path) -> list[Path]:
    """Two folders, as if each process were on a host of its own, where one path is another file."""
    hosts = [tmp_path / "host0", tmp_path / "host1"]
    for host in hosts:
        host.mkdir()
    return hosts


def link_data(host: Path, source: Path) -> None:
    for suffix in (".bin", ".idx"):
        (host / f"train{suffix}").symlink_to(source / f"train{suffix}")


@pytest.mark.parametrize("what", ["missing", "different"])
def test_data_of_one_host(processes, data, tmp_path, what):
    hosts = two_hosts(tmp_path)
    link_data(hosts[0], data)
    if what == "different":
        link_data(hosts[1], data / "other")
    fields = overrides(data, TENSOR, {"data.train": "train"})
    start_training(processes, tmp_path / "run", fields, where=hosts)
    outcomes = processes.wait(seconds=60)
    assert codes_of(outcomes) == [65, 65], outcomes
    (line,), (other,) = lines_of(outcomes)
    assert line == other
    if what == "missing":
        assert line.startswith(f"neox-jax: process 1 ({HOST}): ")
        assert "train.idx" in line
    else:
        assert line.startswith(f"neox-jax: process 1 ({HOST}) differs from process 0 ({HOST}): batch 0 of data.train")
    assert not (tmp_path / "run").exists()


def test_bad_data_met_on_the_way(processes, data, tmp_path):
    """A token beyond the vocabulary in row 5 of batch 3, which only process 1 reads; both end while they train."""
    tokens = np.ones(8 * 8 * 32 + 1, np.uint16)
    tokens[3 * 8 * 32 + 5 * 32 + 3] = 999
    with IndexedDatasetWriter(tmp_path / "bad", np.uint16) as writer:
        writer.add_document(tokens)
    fields = overrides(data, TENSOR, {"data.train": tmp_path / "bad", "data.order": "sequential", "train.steps": 8})
    fields += [("log.batch_digest", "false"), ("checkpoint.every", "1")]
    start_training(processes, tmp_path / "run", fields)
    outcomes = processes.wait(seconds=100)
    assert codes_of(outcomes) == [65, 65], outcomes
    (line,), (other,) = lines_of(outcomes)
    assert line == other
    assert line.startswith(f"neox-jax: process 1 ({HOST}): {tmp_path / 'bad'}.bin: token 999 at position 931")
    assert [metrics["step"] for metrics in read_metrics(tmp_path / "run" / "metrics.jsonl")][-1] <= 3


def test_folders_that_are_not_shared(processes, data, tmp_path):
    hosts, plan, coordinator = two_hosts(tmp_path), tmp_path / "plan.json", f"127.0.0.1:{free_port()}"
    for host in hosts:
        (host / "configs").symlink_to(ROOT / "configs")
    plan.write_text(json.dumps({"runs": [{"folder": "run", "overrides": overrides(data, TENSOR)}], "out": "."}))
    for i, host in enumerate(hosts):
        processes.start(WORKER, "runs", coordinator, 2, i, plan, devices=2, cwd=host)
    outcomes = processes.wait(seconds=60)
    line = (
        f"neox-jax: process 1 ({HOST}): does not see what process 0 wrote to run/config.json; --workdir must be one "
        "folder that all hosts share"
    )
    assert codes_of(outcomes) == [65, 65], outcomes
    assert lines_of(outcomes) == [[line], [line]]


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--coordinator", "127.0.0.1:5000"], 2, "--coordinator, --num-processes and --process-id together"),
        (["--process-id", "0", "--distributed", "auto"], 2, "--num-processes and --process-id together"),
        (["--distributed-timeout", "0"], 2, "'0' is no whole number of seconds above 0"),
        (["--coordinator", "here", "--num-processes", "2", "--process-id", "0"], 65, "wanted HOST:PORT"),
        (["--coordinator", "h:1", "--num-processes", "2", "--process-id", "2"], 65, "process-id is 2; with 2"),
    ],
)
def test_wrong_flags(capsys, tmp_path, flags, code, message):
    from neox_jax.cli import main

    try:
        found = main(["train", "--config", "configs/tiny.py", "--workdir", str(tmp_path / "run"), *flags])
    except SystemExit as error:  # argparse's own way
        found = error.code
    assert (found, message in capsys.readouterr().err) == (code, True)


def test_jax_in_several_processes_that_the_run_knows_nothing_of(data, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    with pytest.raises(InputError, match="one of 4 processes of jax, and 1 of the run; start each with --distributed"):
        alone(data, tmp_path / "run")
    assert not (tmp_path / "run").exists()
