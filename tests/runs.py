"""Small runs in real folders and real processes, for the tests that need them."""

import dataclasses
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from neox_jax.checkpoint.digest import digest_step
from neox_jax.config import SECTIONS, Config, LoraConfig, MeshConfig, ModelConfig
from neox_jax.convert.source import save_model
from neox_jax.data.megatron import IndexedDatasetWriter
from neox_jax.metrics import read_metrics
from neox_jax.model import init_model
from neox_jax.tokenizer import Tokenizer, train_tokenizer

TINY = ModelConfig.preset("tiny")
ROOT = Path(__file__).resolve().parents[1]
TEXTS = [p.read_text(encoding="utf-8") for p in sorted((ROOT / "neox_jax").glob("*.py"))]


def make_data(folder: Path) -> Path:
    """Writes tokenizer.json and train, valid and short .{bin,idx} of this project's own source."""
    tokenizer = train_tokenizer(TEXTS, vocab_size=512)
    tokenizer.save(folder / "tokenizer.json")
    for name, texts in (("train", TEXTS[2:]), ("valid", TEXTS[:2])):
        with IndexedDatasetWriter(folder / name, np.uint16) as writer:
            for text in texts:
                writer.add_document([*tokenizer.encode(text), tokenizer.eos_token_id])
    with IndexedDatasetWriter(folder / "short", np.uint16) as writer:
        writer.add_document([1] * 250)
    return folder


def make_config(folder: Path, *, mesh=None, model=TINY, **sections) -> Config:
    defaults = {
        "train": {"steps": 4, "batch_size": 8, "seq_length": 32},
        "optimizer": {"learning_rate": 1e-2, "min_learning_rate": 1e-3, "warmup_steps": 1},
        "data": {"train": str(folder / "train"), "tokenizer": str(folder / "tokenizer.json")},
        "checkpoint": {"every": 2},
        "eval": {"sample_tokens": 0},
        "log": {"every": 1, "batch_digest": True},
        "safety": {},
    }
    made = {
        name: kind(**{**defaults[name], **sections.get(name, {})})
        for name, kind in SECTIONS.items()
        if name in defaults
    }
    return Config(model=model, mesh=MeshConfig(**(mesh or {})), **made)


def save_base(data: Path, folder: Path) -> Path:
    """A Hugging Face folder of a small random model, with the tokenizer of the data."""
    save_model(init_model(TINY, seed=3), folder, tokenizer=Tokenizer.from_file(data / "tokenizer.json"))
    return folder


def with_adapters(data: Path, base: Path, *, lora: dict, mesh=None, **sections) -> Config:
    """A run of adapters (or, of rank 0, of all weights) over a base."""
    config = make_config(data, mesh=mesh, **sections)
    return dataclasses.replace(config, init_from=str(base), lora=LoraConfig(**lora))


def params_digest(folder: Path, step: int) -> str:
    return digest_step(folder / "checkpoints" / str(step))["params"]


def losses_of(folder: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(folder / "metrics.jsonl")]


def run_cli(*arguments, **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "neox_jax.cli", *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def train_arguments(data, folder, **overrides):
    fields = {"data.train": data / "train", "data.tokenizer": data / "tokenizer.json", "eval.sample_tokens": 0}
    fields |= overrides
    return [
        "train",
        "--config",
        "configs/tiny.py",
        "--workdir",
        folder,
        *(f"--config.{k}={v}" for k, v in fields.items()),
    ]


def wait_for_step(folder: Path, step: int, *processes: subprocess.Popen) -> None:
    """Until a run has logged a step. Fails at once where one of its processes has ended."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if any(line["step"] >= step for line in read_metrics(folder / "metrics.jsonl")):
            return
        for process in processes:
            assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    raise AssertionError(f"no step {step} within two minutes")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
