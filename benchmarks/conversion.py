"""Memory and speed of conversions, beside `cp` of the same files in the same run.

    python benchmarks/conversion.py FOLDER [--layers 8] [--rounds 3] [--evicted] [--output benchmarks/results]

Makes a checkpoint of GPT-NeoX-20B's width with random weights in FOLDER (which needs about four times its size), in
shards that are each larger than what a conversion may take. Each round converts it to each format and back to Hugging
Face's, one after the other, each beside cp of the files that it reads. A conversion ends when what it wrote is on
disk, so cp is timed to its end and to the end of a sync behind it. What is read, by both, is in memory; with --evicted
it is on disk alone, as a checkpoint is that was downloaded and is larger than memory. A first round is not counted: it
touches memory that the machine has not given out yet. Memory is RssAnon, sampled from outside every 5 ms. The bound is
what it is after the imports, and the largest tensor, and 1 GiB.
"""

import argparse
import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from machine import describe_machine

from neox_jax.config import PRESETS
from neox_jax.convert.hf import save_hf
from neox_jax.convert.stored import StoredModel, expected_shapes, num_bytes

CHILD = """
import sys, neox_jax
from neox_jax.convert import source
print("imported", flush=True)
sys.stdin.readline()
arguments = dict(tensor_parallel=int(sys.argv[4])) if sys.argv[3] == "neox" else {}
source.convert(sys.argv[1], sys.argv[2], format=sys.argv[3], **arguments)
"""
# (from, to): each is a folder that an earlier line of the round has made.
PAIRS = [("source", "hf"), ("source", "neox"), ("neox", "hf"), ("source", "orbax"), ("orbax", "hf")]


@dataclasses.dataclass(frozen=True)
class RandomTensor:
    """float16 like initialised weights, cut from one pool: every tensor starts elsewhere in it."""

    pool: np.ndarray
    start: int
    shape: tuple[int, ...]
    dtype = np.dtype(np.float16)

    def read(self, slices):
        rows, *rest = slices
        width = int(np.prod(self.shape[1:], dtype=np.int64))
        first = (self.start + rows.start * width) % len(self.pool)
        flat = np.take(self.pool, np.arange(first, first + (rows.stop - rows.start) * width), mode="wrap")
        return flat.reshape(-1, *self.shape[1:])[(slice(None), *rest)]


def make_checkpoint(folder: Path, num_layers: int) -> StoredModel:
    config = dataclasses.replace(PRESETS["gpt-neox-20b"], num_hidden_layers=num_layers)
    pool = np.random.default_rng(0).normal(0, 0.02, 1 << 24).astype(np.float16)
    shapes = expected_shapes(config)
    tensors = {name: RandomTensor(pool, 7919 * i, shape) for i, (name, shape) in enumerate(shapes.items())}
    model = StoredModel(config, tensors, str(folder))
    shutil.rmtree(folder, ignore_errors=True)
    save_hf(model, folder, max_shard_bytes=0.6 * model.num_bytes)
    return model


def anonymous_bytes(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("RssAnon")), 0)


def convert(source: Path, destination: Path, format: str) -> tuple[float, int, int]:
    """Converts in a process of its own; returns seconds without its imports, RssAnon after these, and its peak."""
    shutil.rmtree(destination, ignore_errors=True)
    command = [sys.executable, "-c", CHILD, str(source), str(destination), format, "2"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as child:
        assert child.stdout.readline() == "imported\n"
        before = peak = anonymous_bytes(child.pid)
        start = time.perf_counter()
        child.stdin.write("go\n")
        child.stdin.flush()
        while child.poll() is None:
            peak = max(peak, anonymous_bytes(child.pid))
            time.sleep(0.005)
        seconds = time.perf_counter() - start
    if child.returncode:
        raise SystemExit(f"the conversion of {source} to {format} failed")
    return seconds, before, peak


def evict(folder: Path) -> None:
    """Has the files under a folder dropped from the page cache."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_all(folder: Path) -> None:
    """Has the files under a folder in the page cache."""
    buffer = bytearray(1 << 20)
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass


def copy(source: Path, destination: Path) -> tuple[float, float]:
    """Seconds of cp, and until its files are on disk."""
    shutil.rmtree(destination, ignore_errors=True)
    os.sync()
    start = time.perf_counter()
    subprocess.run(["cp", "-r", source, destination], check=True)
    seconds = time.perf_counter() - start
    os.sync()
    synced_seconds = time.perf_counter() - start
    shutil.rmtree(destination)
    return seconds, synced_seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--evicted", action="store_true")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    source = args.folder / "source"
    model = make_checkpoint(source, args.layers)
    largest = max(map(num_bytes, model.tensors.values()))
    shards = [path.stat().st_size for path in source.glob("*.safetensors")]
    print(f"{model.num_bytes / 1e9:.2f} GB in {len(shards)} shards; largest tensor {largest / 1e6:.0f} MB", flush=True)

    found = {pair: [] for pair in PAIRS}
    for warm in [False] + [True] * args.rounds:
        for pair in PAIRS:
            prepare = evict if args.evicted else read_all
            prepare(args.folder / pair[0])
            cp_seconds, synced_seconds = copy(args.folder / pair[0], args.folder / "copy")
            prepare(args.folder / pair[0])
            destination = args.folder / (pair[1] if pair[0] == "source" else f"{pair[0]}-{pair[1]}")
            seconds, before, peak = convert(args.folder / pair[0], destination, pair[1])
            run = {"seconds": seconds, "cp": cp_seconds, "cp_sync": synced_seconds, "before": before, "peak": peak}
            if warm:
                found[pair].append(run)
            extra, bound = peak - before, largest + (1 << 30)
            speeds = [model.num_bytes / 1e9 / each for each in (seconds, cp_seconds, synced_seconds)]
            print(
                f"{pair[0]} -> {pair[1]}: {speeds[0]:.2f} GB/s, cp {speeds[1]:.2f}, cp and sync {speeds[2]:.2f}; "
                f"{extra / 2**20:.0f} MiB above {before / 2**20:.0f} ({bound / 2**20:.0f} allowed)",
                flush=True,
            )
            if pair[1] == "hf":  # and what it was made of: the machine shall not have to drop the source from memory
                shutil.rmtree(destination)
                if pair[0] != "source":
                    shutil.rmtree(args.folder / pair[0])
    shutil.rmtree(source)

    result = {
        **describe_machine(),
        "numpy": np.__version__,
        "model_bytes": model.num_bytes,
        "largest_tensor_bytes": largest,
        "shard_bytes": sorted(shards),
        "allowed_bytes_above_imports": largest + (1 << 30),
        "conversions": {
            f"{a} -> {b}": {
                "speed_relative_to_cp": statistics.median(run["cp"] / run["seconds"] for run in runs),
                "speed_relative_to_cp_and_sync": statistics.median(run["cp_sync"] / run["seconds"] for run in runs),
                "cp_gigabytes_per_second": statistics.median(model.num_bytes / 1e9 / run["cp"] for run in runs),
                "gigabytes_per_second": statistics.median(model.num_bytes / 1e9 / run["seconds"] for run in runs),
                "peak_bytes_above_imports": max(run["peak"] - run["before"] for run in runs),
            }
            for (a, b), runs in found.items()
        },
        "rounds": args.rounds,
        "evicted": args.evicted,
    }
    print(json.dumps(result, indent=2))
    if args.output is not None:
        kind = f"{model.num_bytes / 1e9:.0f}gb{'-evicted' if args.evicted else ''}"
        path = args.output / f"{result['date']}-conversion-{kind}-cpu.json"
        path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
