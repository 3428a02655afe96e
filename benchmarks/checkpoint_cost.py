"""What a checkpoint costs a run: hashing, the stall of the step that begins it, the steps beside which it is written.

    python benchmarks/checkpoint_cost.py DIR --output benchmarks/results     # DIR: on the disk to be written to
    python benchmarks/checkpoint_cost.py DIR --preset tiny --rounds 1        # seconds: that the script itself works

Windows of training steps are interleaved, three kinds a round: quiet; with saves in the background, one after the
other, hashing and all; and with another process that only hashes from memory for as many CPU seconds as those saves
took. What the third costs too is a machine with too few cores, and not the checkpoint. The stall is compared with a
copy of the state on the host, or off the device.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from machine import describe_machine

from neox_jax.checkpoint.manager import RunCheckpoints
from neox_jax.checkpoint.steps import size_on_disk
from neox_jax.checkpoint.sums import SUMS, hash_files
from neox_jax.config import CheckpointConfig, Config, ModelConfig, TrainConfig
from neox_jax.optimizer import make_optimizer, make_schedule
from neox_jax.sharding import make_mesh
from neox_jax.train_state import abstract_state, init_state
from neox_jax.train_step import make_train_step
from neox_jax.tree import num_bytes

BURN = """
import hashlib, sys, time
piece = bytes(1 << 20)
print("ready", flush=True)
sys.stdin.readline()
end = time.process_time() + float(sys.argv[1])
while time.process_time() < end:
    hashlib.sha256(piece)
"""


class Training:
    """A step that goes on from its own state, and that state's checkpoints."""

    def __init__(self, folder: Path, preset: str, batch_size: int, seq_length: int):
        train = TrainConfig(steps=10**6, batch_size=batch_size, seq_length=seq_length)
        config = Config(model=ModelConfig.preset(preset), train=train)
        mesh, optimizer = make_mesh(devices=jax.devices()[:1]), make_optimizer(config.optimizer, train.steps)
        abstract = abstract_state(config.model, optimizer, mesh, dtype=train.dtype)
        self.state = init_state(config.model, optimizer, mesh, seed=0, dtype=train.dtype)
        schedule = make_schedule(config.optimizer, train.steps)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        self._step = make_train_step(
            config, optimizer=optimizer, schedule=schedule, mesh=mesh, state_shardings=shardings
        )
        shape = (batch_size, seq_length + 1)
        self._tokens = jax.random.randint(jax.random.key(0), shape, 0, config.model.vocab_size, jnp.int32)
        self._model, self._number = config.model, 0
        shutil.rmtree(folder, ignore_errors=True)
        self._checkpoints = RunCheckpoints(folder, CheckpointConfig(every=1, keep=1))

    def step(self) -> float:
        start = time.perf_counter()
        self.state, metrics = self._step(self.state, self._tokens)
        jax.block_until_ready((self.state, metrics))
        return time.perf_counter() - start

    def begin_save(self) -> float:
        """Seconds until training may go on."""
        self._number += 1
        start = time.perf_counter()
        if not self._checkpoints.save(self._number, self.state, self._model):
            raise SystemExit("no checkpoint was written; see above")
        return time.perf_counter() - start

    def is_saving(self) -> bool:
        return self._checkpoints.is_saving

    def finish_save(self) -> None:
        self._checkpoints.close()


def hash_gigabytes_per_second(folder: Path) -> float:
    """One file by one thread, from the page cache."""
    path = folder / "to_hash"
    path.write_bytes(np.random.default_rng(0).bytes(256 << 20))
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        hash_files([path])
        seconds.append(time.perf_counter() - start)
    path.unlink()
    return (256 << 20) / 1e9 / min(seconds)


def copy_seconds(state) -> float:
    """A copy of the state into new memory of the host."""
    start = time.perf_counter()
    copies = [np.array(leaf, copy=True) for leaf in jax.tree.leaves(state)]
    seconds = time.perf_counter() - start
    del copies
    return seconds


def quiet(training: Training, num_steps: int) -> dict:
    return {"steps": [training.step() for _ in range(num_steps)]}


def saving(training: Training, num_steps: int) -> dict:
    stalls, steps = [], []
    for _ in range(num_steps):
        if not training.is_saving():
            stalls.append(training.begin_save())
        steps.append(training.step())
    training.finish_save()
    return {"steps": steps, "stalls": stalls}


def burning(training: Training, num_steps: int, cpu_seconds: float) -> dict:
    command = [sys.executable, "-c", BURN, str(cpu_seconds)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        child.stdout.readline()
        child.stdin.write("go\n")
        child.stdin.flush()
        steps = [training.step() for _ in range(num_steps)]
        child.kill()
    return {"steps": steps}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--preset", default="pythia-70m")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--seq-length", type=int, default=64)
    parser.add_argument("--steps", type=int, default=10, help="of a window")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    hash_speed = hash_gigabytes_per_second(args.folder)
    training = Training(args.folder / "run", args.preset, args.batch_size, args.seq_length)
    training.step()

    training.begin_save()
    training.finish_save()
    step_folder = max((args.folder / "run" / "checkpoints").iterdir())
    cpu_start, start = time.process_time(), time.perf_counter()
    training.begin_save()
    training.finish_save()
    save_seconds, save_cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    num_saves, windows = [], {"quiet": [], "saving": [], "burning": []}
    for number in range(args.rounds):
        for kind in ("quiet", "saving", "burning") if number % 2 else ("saving", "burning", "quiet"):
            if kind == "quiet":
                found = quiet(training, args.steps)
            elif kind == "saving":
                found = saving(training, args.steps)
                num_saves.append(len(found["stalls"]))
            else:
                found = burning(training, args.steps, num_saves[-1] * save_cpu_seconds)
            windows[kind].append(found)
            print(f"{kind}: {sum(found['steps']) / args.steps * 1e3:.1f} ms a step", flush=True)
    copies = [copy_seconds(training.state) for _ in range(5)]
    stalls = [stall for window in windows["saving"] for stall in window["stalls"]]
    # A window has a save's beginning and its end: its mean, not its median, is what the run takes.
    means = {kind: [statistics.fmean(window["steps"]) for window in found] for kind, found in windows.items()}
    seconds = {kind: statistics.median(each) for kind, each in means.items()}
    slower = {kind: seconds[kind] / seconds["quiet"] - 1 for kind in ("saving", "burning")}
    (step_folder,) = (args.folder / "run" / "checkpoints").iterdir()

    result = {
        **describe_machine(),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "orbax": ocp.__version__,
        "preset": args.preset,
        "batch": [args.batch_size, args.seq_length],
        "state_bytes": num_bytes(training.state),
        "checkpoint_bytes": size_on_disk(step_folder),
        "files": len((step_folder / SUMS).read_text().splitlines()),
        "hash_gigabytes_per_second_a_core": hash_speed,
        "save_seconds_alone": save_seconds,
        "save_cpu_seconds": save_cpu_seconds,
        "stall_seconds": statistics.median(stalls),
        "worst_stall_seconds": max(stalls),
        "copy_seconds": statistics.median(copies),
        "stall_relative_to_copy": statistics.median(stalls) / statistics.median(copies),
        "step_seconds": seconds,
        "step_seconds_of_windows": means,
        "steps_slower_while_saving": slower["saving"],
        "steps_slower_beside_as_much_hashing_in_another_process": slower["burning"],
        "steps_slower_by_the_checkpoint_itself": slower["saving"] - slower["burning"],
        "saves_a_window": num_saves,
        "steps_a_window": args.steps,
        "rounds": args.rounds,
    }
    print(json.dumps(result, indent=2))
    if args.output is not None:
        path = args.output / f"{result['date']}-checkpoint-cost-cpu.json"
        path.write_text(json.dumps(result, indent=2) + "\n")
    shutil.rmtree(args.folder / "run")


if __name__ == "__main__":
    main()
