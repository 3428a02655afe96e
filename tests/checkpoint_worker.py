"""What tests/test_checkpoint.py does in processes of its own: `checkpoint_worker.py MODE ARGUMENTS...`.

killed FOLDER: saves step 1, then step 2 in a child that is killed in the middle, once for each moment. full FOLDER:
fills the disk that FOLDER is on, in several ways. read_only FOLDER: what can be done there. together COORDINATOR N I
FOLDER WHAT: is one of several processes.
"""

import dataclasses
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import jax
import numpy as np

from neox_jax.checkpoint import commit, manager, writer
from neox_jax.checkpoint.digest import digest_step
from neox_jax.checkpoint.manager import RunCheckpoints
from neox_jax.checkpoint.steps import list_steps
from neox_jax.cli import main
from neox_jax.config import CheckpointConfig, ModelConfig, OptimizerConfig
from neox_jax.convert.source import load_model
from neox_jax.errors import InputError
from neox_jax.optimizer import make_optimizer
from neox_jax.sharding import make_mesh
from neox_jax.train_state import TrainState, abstract_state

MODEL = dataclasses.replace(ModelConfig.preset("tiny"), num_hidden_layers=2)
MOMENTS = ["folder", "copied", "written", "merged", "hashed", "named", "removing"]


def make_abstract(mesh=None, model: ModelConfig = MODEL, **options) -> TrainState:
    mesh = make_mesh(devices=jax.devices()[:1]) if mesh is None else mesh
    return abstract_state(model, make_optimizer(OptimizerConfig(), 1000), mesh, **options)


def make_state(seed: int, mesh=None) -> TrainState:
    """Random, the same on every mesh; nothing is compiled."""
    random = np.random.default_rng(seed)

    def fill(leaf):
        values = np.asarray(random.normal(size=leaf.shape) * 100).astype(leaf.dtype)
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: values[index])

    return jax.tree.map(fill, make_abstract(mesh))


def save(folder: Path, step: int) -> None:
    checkpoints = RunCheckpoints(folder, CheckpointConfig(every=1, keep=1))
    checkpoints.save(step, make_state(step), MODEL, force=True)
    checkpoints.close()


def killed(folder: Path) -> None:
    for moment in MOMENTS:
        child = os.fork()  # before jax has any thread, so that its start is paid for once
        if child == 0:
            save(folder / moment, 1)
            die_at(moment)
            save(folder / moment, 2)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, moment


def die_at(moment: str) -> None:
    def die(*_, **__):
        os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(10)

    if moment == "folder":
        writer.copy_to_host = die
    elif moment == "copied":
        writer.StepWriter._run = die
    elif moment == "written":
        writer.StepWriter._commit = die
    elif moment == "merged":
        commit.write_sums = die
    elif moment == "hashed":
        real = commit.write_sums
        commit.write_sums = lambda folder, **options: (real(folder, **options), die())
    elif moment == "named":
        manager.steps_to_remove = die
    elif moment == "removing":
        shutil.rmtree = lambda path, **_: ".removed" in str(path) and Path(path).exists() and die()


def why_not_saved(checkpoints: RunCheckpoints, step: int, state: TrainState) -> str:
    try:
        checkpoints.save(step, state, MODEL, force=True)
    except InputError as error:
        return str(error)
    raise AssertionError(f"step {step} was saved")


def read_only(folder: Path) -> None:
    for verb in ("list", "verify", "hash"):
        assert main(["checkpoint", verb, str(folder)]) == 0
    assert main(["checkpoint", "prune", "--keep", "1", str(folder)]) == 65
    load_model(folder)
    checkpoints = RunCheckpoints(folder, CheckpointConfig(every=1))
    assert not checkpoints.save(3, make_state(3), MODEL)
    print(why_not_saved(checkpoints, 3, make_state(3)))


def full(folder: Path) -> None:
    """On a disk of 16 MB, where a checkpoint takes 2.3."""
    said = []
    checkpoints = RunCheckpoints(folder, CheckpointConfig(every=1), say=lambda text, step: said.append(text))
    state = make_state(0)
    assert checkpoints.save(1, state, MODEL)
    checkpoints.close()

    filler = folder / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(folder).free - 2_000_000))
    assert not checkpoints.save(2, state, MODEL)
    assert len(said) == 1
    assert "GB wanted and 0.002 GB free" in said[0], said
    refused = why_not_saved(checkpoints, 2, state)
    assert "step 2 could not be saved" in refused, refused

    real = shutil.disk_usage
    for free in (1_500_000, 700_000, 20_000):  # runs out in the optimizer's data, the parameters', at once
        filler.write_bytes(filler.read_bytes() + bytes(max(0, real(folder).free - free)))
        before = real(folder).free
        shutil.disk_usage = lambda path: shutil._ntuple_diskusage(1 << 40, 0, 1 << 40)
        checkpoints.save(3, state, MODEL)
        while checkpoints.is_saving:
            time.sleep(0.01)
        checkpoints.save(3.5, state, MODEL)  # not due: it only sees what became of the last
        assert "step 3 could not be written: No space left on device" in said[-1], said
        refused = why_not_saved(checkpoints, 4, state)
        assert "No space left on device" in refused, refused
        assert "goes on from step 1" in refused, refused
        shutil.disk_usage = real
        deadline = time.monotonic() + 20  # a busy machine closes the files that were removed a little later
        while abs(real(folder).free - before) >= 10_000:
            assert time.monotonic() < deadline, "something of it was kept"
            time.sleep(0.05)
        assert os.listdir(folder / "checkpoints") == ["1"]
    filler.unlink()
    assert checkpoints.save(5, state, MODEL)
    checkpoints.close()
    assert list_steps(folder / "checkpoints") == [1, 5]
    assert digest_step(folder / "checkpoints" / "5") == digest_step(folder / "checkpoints" / "1")
    print("survived", len(said))


def together(coordinator: str, num_processes: str, process_id: str, folder: str, what: str) -> None:
    from neox_jax.distributed import Place, joined

    place = Place(coordinator, int(num_processes), int(process_id))
    with joined(place, facts={}, timeout_seconds=60) as peers:
        mesh = make_mesh(fsdp=len(jax.devices()))
        checkpoints = RunCheckpoints(
            Path(folder), CheckpointConfig(every=1), peers, lambda text, step: peers.process_id or print(text)
        )
        if what == "save":
            checkpoints.save(1, make_state(1, mesh), MODEL)
            checkpoints.close()
            if peers.process_id == 1:
                writer.StepWriter._marker = no_room
            assert checkpoints.save(2, make_state(2, mesh), MODEL)
            checkpoints.close()
            peers.gather("closed")
            assert list_steps(Path(folder) / "checkpoints") == [1], "process 1 could not write, and all know"
            if peers.process_id == 1:
                writer.StepWriter._marker = MARKER
            checkpoints.save(3, make_state(3, mesh), MODEL)
            checkpoints.save(4, make_state(4, mesh), MODEL, force=True)
        else:
            step, state = checkpoints.restore_newest(make_abstract(mesh))
            checkpoints.save(step + 1, state, MODEL, force=True)
        checkpoints.close()


MARKER = writer.StepWriter._marker


def no_room(self, process_id: int):
    raise OSError(28, os.strerror(28))


if __name__ == "__main__":
    mode, *arguments = sys.argv[1:]
    if mode == "together":
        together(*arguments)
    else:
        {"killed": killed, "full": full, "read_only": read_only}[mode](Path(*arguments))
