"""Faults that meet a whole run: what a user sees, the exit code, and that training goes on with the same bytes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from mounts import python_in_a_small_disk
from runs import ROOT, free_port, make_config, run_cli, train_arguments, wait_for_step

from neox_jax.checkpoint.digest import digest_step
from neox_jax.checkpoint.steps import list_steps
from neox_jax.cli import main
from neox_jax.data.megatron import IndexedDatasetWriter
from neox_jax.errors import InputError
from neox_jax.events import Events
from neox_jax.metrics import read_metrics
from neox_jax.train import train as train_on_all

STEPS = 40


@pytest.fixture(scope="module")
def straight(data, tmp_path_factory) -> Path:
    """A run that nothing happened to."""
    folder = tmp_path_factory.mktemp("runs") / "straight"
    train(config_of(data), folder)
    return folder


def config_of(folder, **sections):
    return make_config(folder, **{"train": {"steps": STEPS}, "checkpoint": {"every": 10, "keep": 9}, **sections})


def train(config, folder, **options):
    """On one device, which is the fastest here."""
    return train_on_all(config, folder, devices=jax.devices()[:1], **options)


def assert_same_end(folder: Path, wanted: Path) -> None:
    step = list_steps(wanted / "checkpoints")[-1]
    assert digest_step(folder / "checkpoints" / str(step)) == digest_step(wanted / "checkpoints" / str(step))
    lines = [
        [(line["step"], line["loss"], line["batch_sha256"]) for line in read_metrics(run / "metrics.jsonl")]
        for run in (folder, wanted)
    ]
    assert lines[0] == lines[1]


def events_of(folder: Path) -> list[str]:
    return [json.loads(line)["text"] for line in (folder / "events.jsonl").read_text().splitlines()]


def copy_until(straight: Path, folder: Path, step: int) -> Path:
    """The run as it was when it had saved this step and gone on a little."""
    shutil.copytree(straight, folder)
    for later in list_steps(folder / "checkpoints"):
        if later > step:
            shutil.rmtree(folder / "checkpoints" / str(later))
    return folder


# ---- what is on the disk


@pytest.mark.parametrize("how", ["bit", "page", "cut", "gone"])
def test_a_damaged_checkpoint(data, straight, tmp_path, how):
    run = copy_until(straight, tmp_path / "run", 20)
    files = [path for path in (run / "checkpoints" / "20" / "params").rglob("*") if path.is_file()]
    path = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    if how == "bit":
        content[len(content) // 2] ^= 1
    elif how == "page":
        content[4096:8192] = bytes(4096)
    path.write_bytes(content[:-1] if how == "cut" else content)
    if how == "gone":
        path.unlink()
    train(config_of(data), run)
    told = [text for text in events_of(run) if "is damaged" in text]
    assert len(told) == 1
    assert told[0].startswith(f"the checkpoint of step 20 is damaged, {path.relative_to(run / 'checkpoints' / '20')}")
    assert f"going on from step 10 of {STEPS} in {run}" in events_of(run)
    assert (run / "damaged_checkpoints" / "20").is_dir()
    assert_same_end(run, straight)


def test_a_configuration_that_was_cut_off(data, straight, tmp_path, capsys):
    run = copy_until(straight, tmp_path / "run", 20)
    text = (run / "config.json").read_text()
    (run / "config.json").write_text(text[: len(text) // 2])
    with pytest.raises(InputError, match=r"config.json cannot be read as JSON"):
        train(config_of(data), run)
    (run / "config.json").write_text(text)
    train(config_of(data), run)
    assert_same_end(run, straight)


def test_tensorboard_has_a_file_in_its_place(data, straight, tmp_path, capsys):
    run = copy_until(straight, tmp_path / "run", 20)
    shutil.rmtree(run / "tensorboard")
    (run / "tensorboard").write_text("mine")
    train(config_of(data), run)
    assert capsys.readouterr().err.count("no more is written for TensorBoard") == 1
    assert (run / "tensorboard").read_text() == "mine"
    assert_same_end(run, straight)


# ---- what is read


def test_a_dataset_that_is_cut_off_while_it_is_read(data, straight, tmp_path):
    for suffix in (".bin", ".idx"):
        shutil.copy(data / f"train{suffix}", tmp_path / f"train{suffix}")
    run, whole = copy_until(straight, tmp_path / "run", 20), (tmp_path / "train.bin").read_bytes()
    where = {"tokenizer": str(data / "tokenizer.json")}
    config = config_of(data, data={**where, "train": str(tmp_path / "train")})
    with pytest.MonkeyPatch.context() as patch:  # what is said comes when everything is open
        patch.setattr(Events, "say", lambda *_: os.truncate(tmp_path / "train.bin", len(whole) // 2))
        with pytest.raises(InputError, match=r"train.bin has \d+ bytes; \d+ when it was opened: it was truncated"):
            train(config, run, accept_changes=True)
    with pytest.raises(InputError, match=r"train.bin has \d+ bytes; train.idx describes \d+"):
        train(config, run, accept_changes=True)
    (tmp_path / "train.bin").write_bytes(whole)
    train(config, run, accept_changes=True)
    assert_same_end(run, straight)


def test_a_token_that_is_met_on_the_way(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 512, 30 * 8 * 33).astype(np.uint16)
    wrong = tokens.copy()
    wrong[25 * 8 * 32 + 7] = 600
    for name, values in (("data", tokens), ("wrong", wrong)):
        with IndexedDatasetWriter(tmp_path / name, np.uint16) as writer:
            writer.add_document(values)
    paths = [tmp_path / f"{name}.bin" for name in ("data", "wrong")]
    right = paths[0].read_bytes()
    config = config_of(
        tmp_path, train={"steps": 28}, data={"train": str(tmp_path / "data"), "order": "sequential", "tokenizer": ""}
    )
    train(config, tmp_path / "straight")
    paths[0].write_bytes(paths[1].read_bytes())
    with pytest.raises(InputError, match=rf"data.bin: token 600 at position {25 * 8 * 32 + 7} of document 0"):
        train(config, tmp_path / "run")
    assert list_steps(tmp_path / "run" / "checkpoints") == [0, 10, 20]
    paths[0].write_bytes(right)
    train(config, tmp_path / "run")
    assert_same_end(tmp_path / "run", tmp_path / "straight")


# ---- real processes


def test_two_runs_in_one_folder(data, tmp_path):
    arguments = train_arguments(data, tmp_path / "run", **{"train.steps": 100_000, "checkpoint.every": 100})
    first = run_cli(*arguments)
    try:
        wait_for_step(tmp_path / "run", 5)
        second = run_cli(*arguments)
        _, err = second.communicate(timeout=120)
        assert second.returncode == 65, err
        (line,) = err.splitlines()
        assert line.startswith(f"neox-jax: {tmp_path / 'run'} is in use by another run (process {first.pid} on ")
        assert first.poll() is None
        first.send_signal(signal.SIGTERM)
        _, err = first.communicate(timeout=120)
        assert first.returncode == 75, err
    finally:
        first.kill()
    steps = [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert steps == list(range(1, len(steps) + 1))
    assert main(["checkpoint", "verify", str(tmp_path / "run")]) == 0


FULL_DISK = """
from pathlib import Path
from runs import run_cli, train_arguments, wait_for_step

data, run, filler = Path({data!r}), Path("/mnt/run"), Path("/mnt/filler")
arguments = train_arguments(data, run, **{fields!r})

def fill():
    with filler.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            pass

first = run_cli(*arguments)
wait_for_step(run, 5)
fill()
out, err = first.communicate(timeout=200)
assert first.returncode == 65, (first.returncode, out, err)
print([line for line in out.splitlines() if line.startswith("no checkpoint of step")][0])
print([line for line in err.splitlines() if "could not be saved" in line][0])
print(len([line for line in err.splitlines() if "cannot be written" in line]))
assert "Traceback" not in err, err
filler.unlink()
second = run_cli(*arguments)
out, err = second.communicate(timeout=200)
assert second.returncode == 0, err
hashed = run_cli("checkpoint", "hash", run)
print(hashed.communicate()[0])
lines = (run / "metrics.jsonl").read_text().splitlines()
assert len(lines) == {steps}, len(lines)
"""


def test_a_disk_that_fills_up_and_has_room_again(data, tmp_path):
    fields = {"train.steps": 120, "checkpoint.every": 20, "checkpoint.keep": 2}
    script = FULL_DISK.format(data=str(data), fields=fields, steps=120)
    done = python_in_a_small_disk("/mnt", "40m", script)
    assert done.returncode == 0, (done.stdout, done.stderr)
    no_checkpoint, last, torn, state, params, *_ = done.stdout.splitlines()
    assert no_checkpoint.startswith("no checkpoint of step 20: ")
    assert no_checkpoint.endswith("training goes on, the next one due tries again")
    assert last.startswith("neox-jax: the checkpoint of step 120 could not be saved: ")
    assert torn == "1"
    assert run_cli(*train_arguments(data, tmp_path / "straight", **fields)).wait(timeout=200) == 0
    digests = digest_step(tmp_path / "straight" / "checkpoints" / "120")
    assert (state, params) == (f"{digests['state']}  state", f"{digests['params']}  params")


def test_a_folder_that_cannot_be_written_to():
    script = """
import subprocess
from pathlib import Path
from runs import make_data, run_cli, train_arguments
Path("/mnt/data").mkdir()
make_data(Path("/mnt/data"))
subprocess.run(["mount", "-o", "remount,ro", "/mnt"], check=True)
process = run_cli(*train_arguments(Path("/mnt/data"), "/mnt/run"))
out, err = process.communicate(timeout=200)
print(err, end="")
raise SystemExit(process.returncode)
"""
    done = python_in_a_small_disk("/mnt", "40m", script)
    assert done.returncode == 65
    (line,) = done.stdout.splitlines()
    assert line.startswith("neox-jax: /mnt/run")
    assert "read-only file system" in line.lower()


def test_one_of_two_processes_is_stopped(data, tmp_path):
    """The other names it and ends; stopped for good it would be waited for by the heartbeat's 100 s, or for ever."""
    fields = {"train.steps": 100_000, "safety.step_seconds": 15, "mesh.data": 2, "checkpoint.every": 20}
    port = free_port()
    arguments = train_arguments(data, tmp_path / "run", **fields)
    place = ["--coordinator", f"127.0.0.1:{port}", "--num-processes", "2"]
    both = [run_cli(*arguments, *place, "--process-id", i, env=environment_of_one_device()) for i in range(2)]
    try:
        wait_for_step(tmp_path / "run", 30, *both)
        both[1].send_signal(signal.SIGSTOP)
        stopped = time.monotonic()
        _, err = both[0].communicate(timeout=120)
        assert time.monotonic() - stopped < 60
        assert both[0].returncode == 75, err
        line = [text for text in err.splitlines() if text.startswith("neox-jax: ")][-1]
        assert "has taken longer than 15 s" in line
        assert "process 1 (" in line
        assert "does not answer" in line
        both[1].send_signal(signal.SIGCONT)
        assert both[1].wait(timeout=60) == 75
    finally:
        for process in both:
            process.kill()
    assert (tmp_path / "run" / "stacks-0.txt").read_text()
    assert main(["checkpoint", "verify", str(tmp_path / "run")]) == 0


def test_random_kills():
    """A short run of benchmarks/random_kills.py."""
    command = [sys.executable, "benchmarks/random_kills.py", "--kills", "2", "--steps", "100", "--seed", "5"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the same SHA-256 after 2 kills as without" in done.stdout


def environment_of_one_device() -> dict[str, str]:
    return {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
