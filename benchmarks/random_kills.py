"""Kills a run at random moments, again and again, and compares its end with that of a run that nobody touched.

    python benchmarks/random_kills.py --kills 30 --seed 1

A tiny model on one CPU device, saved every 10 of --steps steps. Each kill -9 comes at a random time after the start of
a process: before it has compiled, in a step, in a save or between. Then the same command again, and at last to the end.
SHA-256 of parameters and optimizer state must be those of the straight run; metrics.jsonl must have each step once,
with the same loss and batch; every checkpoint must verify. Prints what each kill hit; exit 1 where something differs.
"""

import argparse
import collections
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from neox_jax.data.megatron import IndexedDatasetWriter
from neox_jax.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[1]
SAVE_EVERY = 10


def command(folder: Path, run: Path, steps: int) -> list[str]:
    fields = {"train.steps": steps, "data.train": folder / "train", "eval.sample_tokens": 0, "log.batch_digest": True}
    fields |= {"checkpoint.every": SAVE_EVERY, "checkpoint.keep": 2}
    overrides = [f"--config.{name}={value}" for name, value in fields.items()]
    return [*cli("train"), "--config", str(ROOT / "configs" / "tiny.py"), "--workdir", str(run), *overrides]


def cli(*arguments) -> list[str]:
    return [sys.executable, "-m", "neox_jax.cli", *map(str, arguments)]


def environment(folder: Path) -> dict[str, str]:
    """With a compilation cache, so that a restart takes seconds."""
    cache = {"JAX_COMPILATION_CACHE_DIR": str(folder / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1"}
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {**cache, **os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def run_to_the_end(arguments: list[str], folder: Path) -> float:
    """Seconds that it took. Raises: RuntimeError where it did not end well."""
    began = time.perf_counter()
    done = subprocess.run(arguments, env=environment(folder), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"exit {done.returncode}: {done.stderr[-2000:]}")
    return time.perf_counter() - began


def start_and_kill(arguments: list[str], folder: Path, run: Path, seconds: float) -> str:
    """Kills it after so many seconds; returns what it was at."""
    before = newest_line(run)
    process = subprocess.Popen(
        arguments, env=environment(folder), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    time.sleep(seconds)
    if process.poll() is not None:
        error = process.communicate()[1]
        if process.returncode:
            raise RuntimeError(f"exit {process.returncode} by itself: {error[-2000:]}")
        return "after its end"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    names = [path.name for path in (run / "checkpoints").iterdir()] if (run / "checkpoints").is_dir() else []
    if any(not name.isdigit() for name in names):
        return "in a save"
    return "before its first step" if newest_line(run) == before else "in a step"


def newest_line(run: Path) -> int:
    return max((line["step"] for line in read_metrics(run / "metrics.jsonl")), default=0)


def differences(straight: Path, killed: Path, folder: Path) -> list[str]:
    """What of the killed run's end is not as the straight run's."""
    problems, hashes = [], []
    for run in (straight, killed):
        for verb in ("verify", "hash"):
            done = subprocess.run(cli("checkpoint", verb, run), env=environment(folder), capture_output=True, text=True)
            if done.returncode:
                problems.append(f"checkpoint {verb} {run.name}: exit {done.returncode}, {done.stdout}{done.stderr}")
        hashes.append(done.stdout)
    if hashes[0] != hashes[1]:
        problems.append(f"hash: {hashes[0]!r}, killed {hashes[1]!r}")
    lines = [
        [(line["step"], line["loss"], line["batch_sha256"]) for line in read_metrics(run / "metrics.jsonl")]
        for run in (straight, killed)
    ]
    if lines[0] != lines[1]:
        problems.append(f"metrics.jsonl: {len(lines[0])} lines, killed {len(lines[1])}")
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, chance = Path(name), random.Random(args.seed)
        with IndexedDatasetWriter(folder / "train", np.uint16) as writer:
            writer.add_document(np.random.default_rng(0).integers(0, 512, 50_000))
        straight, killed = folder / "straight", folder / "killed"
        run_to_the_end(command(folder, folder / "warm-up", SAVE_EVERY), folder)  # fills the compilation cache
        startup = run_to_the_end(command(folder, folder / "short", SAVE_EVERY), folder)
        seconds = run_to_the_end(command(folder, straight, args.steps), folder)
        print(f"{args.steps} steps straight in {seconds:.1f} s, {SAVE_EVERY} in {startup:.1f} s", flush=True)
        arguments, hit = command(folder, killed, args.steps), collections.Counter()
        for number in range(args.kills):
            at = chance.uniform(0.2, 1.0) * startup + chance.choice((0, 1)) * chance.uniform(
                0, 2 * seconds / args.kills
            )
            what = start_and_kill(arguments, folder, killed, at)
            hit[what] += 1
            print(f"kill {number + 1}: after {at:.2f} s, {what}, step {newest_line(killed)}", flush=True)
        run_to_the_end(arguments, folder)
        problems = differences(straight, killed, folder)
        print(", ".join(f"{count} {what}" for what, count in hit.most_common()))
        for problem in problems:
            print(problem)
        print("differs" if problems else f"the same SHA-256 after {hit.total()} kills as without")
        return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
