"""Speed of `neox-jax tokenize`: by one worker, and how much more by two.

    python benchmarks/tokenize_rates.py TOKENIZER TEXT... [--megabytes 128] [--rounds 3] [--output benchmarks/results]

Cuts texts (files, or folders with .txt, .md, .rst or .py in them) into documents of 4 KB, up to so many megabytes of
one .jsonl. No text is there twice, as words that were met before are quicker. Each round tokenises it with one worker
and with two, one after the other, by the command line in a process of its own: starting it, its workers and the
tokenizer count, so that less than 100 MB say little about the gain. A worker is one process on one core. With one
worker that process reads and writes too, and the tokenizers library, which would use every core by itself, is told
not to. CPU seconds are those of all processes of a run: where other programs are at work, seconds say little, and
what two workers can gain at most is twice the CPU seconds of one worker by those of two. The library alone, by one
thread over the first documents in batches of 256, is measured in CPU seconds of this process.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import tokenizers
from machine import describe_machine

DOCUMENT_BYTES = 4096  # of ASCII
LIBRARY_DOCUMENTS = 2000  # which the library alone is given
SUFFIXES = (".txt", ".md", ".rst", ".py")
WORKERS = (1, 2)


def read_documents(paths: list[Path], max_bytes: int) -> list[str]:
    """Documents of DOCUMENT_BYTES or less, of max_bytes of text together or a little more, where there is so much."""
    files = []
    for path in paths:
        files += sorted(each for each in path.rglob("*") if each.suffix in SUFFIXES) if path.is_dir() else [path]
    documents, num_bytes = {}, 0  # a dict, for copies of a file are common
    for path in files:
        text = path.read_text(encoding="utf-8", errors="replace")
        for start in range(0, len(text), DOCUMENT_BYTES):
            if num_bytes >= max_bytes:
                return list(documents)
            document = text[start : start + DOCUMENT_BYTES]
            num_bytes += 0 if document in documents else len(document.encode())
            documents[document] = None
    return list(documents)


def library_rate(tokenizer: Path, documents: list[str]) -> float:
    """Megabytes a CPU second of the tokenizers library by itself."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    backend = tokenizers.Tokenizer.from_file(str(tokenizer))
    began = time.process_time()
    for start in range(0, len(documents), 256):
        backend.encode_batch_fast(documents[start : start + 256], add_special_tokens=False)
    return sum(len(text.encode()) for text in documents) / 1e6 / (time.process_time() - began)


def tokenize(source: Path, tokenizer: Path, workers: int) -> dict[str, float]:
    """Seconds and CPU seconds of one run, with every process that it started."""
    with tempfile.TemporaryDirectory(dir=source.parent) as folder:
        command = [sys.executable, "-m", "neox_jax.cli", "tokenize", source, "--tokenizer", tokenizer, "--append-eod"]
        command += ["--output", Path(folder, "out"), "--workers", workers]
        began = time.perf_counter()
        with subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL) as run:
            _, status, usage = os.wait4(run.pid, 0)
            run.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - began
    if run.returncode:
        raise SystemExit(f"tokenizing failed with {workers} workers")
    return {"seconds": seconds, "cpu_seconds": usage.ru_utime + usage.ru_stime}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("texts", type=Path, nargs="+", metavar="TEXT")
    parser.add_argument("--megabytes", type=float, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()

    documents = read_documents(args.texts, round(args.megabytes * 1e6))
    num_bytes = sum(len(text.encode()) for text in documents)
    print(f"{num_bytes / 1e6:.1f} MB in {len(documents)} documents", flush=True)
    runs, library = {workers: [] for workers in WORKERS}, []
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "in.jsonl")
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
        for _ in range(args.rounds):
            library.append(library_rate(args.tokenizer, documents[:LIBRARY_DOCUMENTS]))
            print(f"the library alone: {library[-1]:.2f} MB a CPU second", flush=True)
            for workers in WORKERS:
                run = tokenize(source, args.tokenizer, workers)
                runs[workers].append(run)
                rates = [num_bytes / 1e6 / run[name] for name in ("seconds", "cpu_seconds")]
                print(f"{workers} workers: {rates[0]:.2f} MB/s, {rates[1]:.2f} MB a CPU second", flush=True)

    def median_rate(workers: int, name: str) -> float:
        return statistics.median(num_bytes / 1e6 / run[name] for run in runs[workers])

    pairs = list(zip(runs[1], runs[2], strict=True))
    result = {
        **describe_machine(),
        "tokenizers": tokenizers.__version__,
        "numpy": np.__version__,
        "tokenizer": args.tokenizer.name,
        "texts": [path.name for path in args.texts],
        "text_bytes": num_bytes,
        "documents": len(documents),
        "megabytes_per_second": {f"{workers} workers": median_rate(workers, "seconds") for workers in WORKERS},
        "megabytes_per_cpu_second": {f"{workers} workers": median_rate(workers, "cpu_seconds") for workers in WORKERS},
        "library_alone_megabytes_per_cpu_second": statistics.median(library),
        "two_workers_relative_to_one": statistics.median(one["seconds"] / two["seconds"] for one, two in pairs),
        "two_workers_at_most_by_cpu_seconds": statistics.median(
            2 * one["cpu_seconds"] / two["cpu_seconds"] for one, two in pairs
        ),
        "rounds": args.rounds,
    }
    print(json.dumps(result, indent=2))
    if args.output is not None:
        path = args.output / f"{result['date']}-tokenize-rates-cpu.json"
        path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
