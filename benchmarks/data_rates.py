"""How fast the data path is: gpt-neox's index and its memory, blends, shuffled orders, the loader.

    python benchmarks/data_rates.py [--samples 1e8] [--output benchmarks/results]

The index is built in one thread and not read from its cache, for documents of 1 to 3,000 tokens, all in one epoch, or
in ten from a billion samples on (which take 19 GB of memory), after a tiny one for which its loops were compiled.
What it holds beside the arrays that it makes is the peak of the process (VmHWM) less what it had before and less
those arrays. The shuffle, which is most of it, is timed beside NumPy's on a tenth of as many. The loader reads a file
of 512 MB, which is in the page cache, in batches of 1,024 rows of 2,048 tokens, and puts them on the CPU device. Slow
reads sleep 50 ms each, and steps 20 ms.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numba
import numpy as np
from machine import describe_machine

from neox_jax.data import IndexedDataset, IndexedDatasetWriter, MegatronSamples, blend_indices
from neox_jax.data.gpt_neox import build_index
from neox_jax.data.index_loops import shuffle
from neox_jax.data.loader import Loader
from neox_jax.data.orders import BlendedSamples, SequentialSamples, ShuffledSamples, Windows

SEQ_LENGTH, BATCH = 2048, 1024
MEAN_DOCUMENT = 1500
READ_SECONDS, STEP_SECONDS = 0.05, 0.02


def status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))


def measure_index(num_samples: int) -> dict:
    num_epochs = 10 if num_samples >= 10**9 else 1
    num_documents = num_samples * SEQ_LENGTH // MEAN_DOCUMENT // num_epochs
    sizes = np.empty(num_documents, np.int32)
    random = np.random.default_rng(0)
    for start in range(0, num_documents, 1 << 20):
        block = sizes[start : start + (1 << 20)]
        block[:] = random.integers(1, 2 * MEAN_DOCUMENT, len(block))
    start = time.perf_counter()
    build_index(sizes[:2], documents=range(2), num_epochs=9, seq_length=2, seed=1)
    compile_seconds = time.perf_counter() - start
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before, start, start_cpu = status_bytes("VmRSS"), time.perf_counter(), time.process_time()
    arrays = build_index(sizes, documents=range(num_documents), num_epochs=num_epochs, seq_length=SEQ_LENGTH, seed=1234)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
    made = sum(array.nbytes for array in arrays)
    samples = len(arrays[2])
    return {
        "samples": samples,
        "documents": num_documents,
        "epochs": num_epochs,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "compile_seconds": compile_seconds,
        "samples_per_second": samples / seconds,
        "bytes_made": made,
        "bytes_beside": status_bytes("VmHWM") - before - made,
    }


def measure_shuffles(size: int) -> dict:
    """Nanoseconds for each element, NumPy's and ours."""
    result = {"size": size}
    shuffles = {"numpy_ns": np.random.RandomState(1).shuffle, "ours_ns": lambda x: shuffle(np.random.MT19937(1), x)}
    for name, function in shuffles.items():
        function(np.arange(2, dtype=np.uint32))  # compiled
        x = np.arange(size, dtype=np.uint32)
        start = time.perf_counter()
        function(x)
        result[name] = (time.perf_counter() - start) / size * 1e9
    return result


def measure_blend(num_samples: int, num_datasets: int) -> dict:
    weights = np.random.default_rng(0).random(num_datasets) + 0.01
    start = time.perf_counter()
    blend_indices(weights, num_samples)
    seconds = time.perf_counter() - start
    return {"samples": num_samples, "datasets": num_datasets, "samples_per_second": num_samples / seconds}


def write_tokens(prefix: Path, num_tokens: int) -> IndexedDataset:
    random = np.random.default_rng(0)
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        while num_tokens > 0:
            document = random.integers(0, 50000, random.integers(1, 2 * MEAN_DOCUMENT), dtype=np.uint16)
            writer.add_document(document)
            num_tokens -= len(document)
    return IndexedDataset(prefix)


def open_orders(dataset: IndexedDataset) -> dict:
    shape = {"seq_length": SEQ_LENGTH, "vocab_size": 50432}
    windows = Windows(dataset, 0, len(dataset), SEQ_LENGTH, SEQ_LENGTH)
    twenty = np.random.default_rng(0).random(20) + 0.01
    megatron = MegatronSamples(dataset, seq_length=SEQ_LENGTH, num_samples=10**6, seed=1)
    return {
        "shuffled": ShuffledSamples([windows], weights=[1], seed=1, **shape),
        "shuffled, 20 parts": ShuffledSamples([windows] * 20, weights=twenty, seed=1, **shape),
        "megatron": BlendedSamples([megatron], weights=[1], num_samples=10**6, **shape),
        "sequential": SequentialSamples([windows], which="train", **shape),
    }


def measure_order(samples: ShuffledSamples) -> float:
    """Rows a second: which window each is, nothing read."""
    start = time.perf_counter()
    for step in range(100):
        samples._locate(np.arange(step * BATCH, (step + 1) * BATCH))
    return 100 * BATCH / (time.perf_counter() - start)


def measure_loader(samples, num_steps: int = 100) -> float:
    """Tokens a second that a loop gets which does nothing else."""
    loader = Loader(samples, batch_size=BATCH, seq_length=SEQ_LENGTH)
    loader.batch(0).block_until_ready()
    start = time.perf_counter()
    for _, batch, _ in loader.batches(0, num_steps):
        batch.block_until_ready()
    return num_steps * BATCH * SEQ_LENGTH / (time.perf_counter() - start)


class Slow:
    """Samples each read of which sleeps first."""

    def __init__(self, samples):
        self._samples, self.num_samples = samples, samples.num_samples

    def rows(self, indices):
        time.sleep(READ_SECONDS)
        return self._samples.rows(indices)


def measure_waits(samples, num_steps: int = 100) -> dict:
    waits = []
    for _, _, wait_seconds in Loader(Slow(samples), batch_size=BATCH // 4, seq_length=SEQ_LENGTH).batches(0, num_steps):
        waits.append(wait_seconds)
        time.sleep(STEP_SECONDS)
    return {
        "read_seconds": READ_SECONDS,
        "step_seconds": STEP_SECONDS,
        "steps": num_steps,
        "first_wait_seconds": waits[0],
        "longest_later_wait_seconds": max(waits[1:]),
        "all_later_waits_seconds": sum(waits[1:]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=float, default=1e8)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    result = {
        **describe_machine(),
        "numpy": np.__version__,
        "numba": numba.__version__,
        "jax": jax.__version__,
    }

    def report(name: str, value) -> None:
        result[name] = value
        print(json.dumps({name: value}), flush=True)

    report("index", measure_index(int(args.samples)))
    report("shuffle", measure_shuffles(int(args.samples) // 10))
    report("blend", measure_blend(10**7, 20))
    with tempfile.TemporaryDirectory() as folder:
        orders = open_orders(write_tokens(Path(folder) / "set", 1 << 28))
        shuffled = {name: samples for name, samples in orders.items() if name.startswith("shuffled")}
        report("order_rows_per_second", {name: measure_order(samples) for name, samples in shuffled.items()})
        report("loader_tokens_per_second", {name: measure_loader(samples) for name, samples in orders.items()})
        report("slow_reads", measure_waits(orders["shuffled"]))
    if args.output is not None:
        path = args.output / f"{result['date']}-data-rates-cpu.json"
        path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
