"""Training on one GPU beside transformers: cuDNN attention checked first, then steps of three Pythias, interleaved.

    python benchmarks/gpu_train.py --output benchmarks/results         # needs a GPU, PyTorch with CUDA, transformers
    python benchmarks/gpu_train.py --tiny                              # anywhere: that the script itself works

Both sides hold float32 master weights and AdamW moments and compute in bfloat16, on the same tokens, with all of a
step: forward, backward, global-norm clip, update. transformers has SDPA attention, torch.compile, autocast and fused
AdamW.
Utilisation is the model's FLOPs (causal attention counted half) over the chip's peak, and over the best of a few large
matrix products measured in the same run. Run from the working tree: nothing needs to be installed.
"""

import argparse
import datetime
import gc
import json
import os
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs its share
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

import neox_jax
from neox_jax.attention import make_attend
from neox_jax.bench import bench_step
from neox_jax.config import ModelConfig
from neox_jax.hardware import find_chip

SHAPES = {"pythia-410m": (16, 2048), "pythia-1.4b": (8, 2048), "pythia-2.8b": (4, 2048)}
TINY = {"tiny": (2, 64)}


def check_attention(head_dims=(64, 80, 96, 128), length: int = 2048) -> dict:
    """The largest difference of cuDNN's output and gradients from the reference's in float32, relative to the latter's
    largest value, beside that of the reference in bfloat16."""
    found = {}
    for head_dim in head_dims:
        keys = jax.random.split(jax.random.key(head_dim), 4)
        arrays = [jax.random.normal(key, (2, length, 4, head_dim), jnp.float32) for key in keys]
        wanted = _attention_and_gradients("xla", jnp.float32, *arrays)
        for backend in ("xla", "cudnn"):
            got = _attention_and_gradients(backend, jnp.bfloat16, *arrays)
            errors = [float(jnp.abs(a - b).max() / jnp.abs(b).max()) for a, b in zip(got, wanted, strict=True)]
            found[f"{backend} head_dim {head_dim}"] = dict(zip(("out", "dq", "dk", "dv"), errors, strict=True))
        worst = {backend: max(found[f"{backend} head_dim {head_dim}"].values()) for backend in ("xla", "cudnn")}
        if worst["cudnn"] > 2 * worst["xla"] + 1e-2:
            raise SystemExit(f"cuDNN attention is wrong at head_dim {head_dim}: {worst}")
    return found


def _attention_and_gradients(backend: str, dtype, *arrays) -> list:
    attend = make_attend(backend, None)

    @jax.jit
    def run(q, k, v, upstream):
        def out(q, k, v):
            return attend(q.astype(dtype), k.astype(dtype), v.astype(dtype)).astype(jnp.float32)

        value, pullback = jax.vjp(out, q, k, v)
        return [value, *pullback(upstream)]

    return run(*arrays)


def matmul_ceiling() -> float:
    """The best FLOP/s of a few bfloat16 products."""
    best = 0.0
    for m, k, n in ((8192, 8192, 8192), (16384, 4096, 16384), (16384, 8192, 8192)):
        x, y = (jax.random.normal(jax.random.key(0), shape, jnp.bfloat16) for shape in ((m, k), (k, n)))
        product = jax.jit(lambda x, y: x @ y)
        product(x, y).block_until_ready()
        for _ in range(5):
            start = time.perf_counter()
            for _ in range(4):
                out = product(x, y)
            out.block_until_ready()
            best = max(best, 4 * 2 * m * k * n / (time.perf_counter() - start))
    return best


def their_step(config: ModelConfig, tokens: np.ndarray, device: str, compiled: bool):
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    theirs = transformers.GPTNeoXConfig(**config.to_hf(), attn_implementation="sdpa")
    with torch.device(device):
        model = transformers.GPTNeoXForCausalLM(theirs).train()
    fused = {"fused": True} if device == "cuda" else {}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, **fused)
    batch = torch.tensor(tokens, device=device)
    inputs, targets = batch[:, :-1].contiguous(), batch[:, 1:].flatten()

    def loss():
        with torch.autocast(device, dtype=torch.bfloat16):
            logits = model(input_ids=inputs, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets)

    compute = torch.compile(loss) if compiled else loss

    def run():
        optimizer.zero_grad(set_to_none=True)
        compute().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    return run


def our_step(config: ModelConfig, tokens: np.ndarray, **options):
    return bench_step(neox_jax.init_model(config), jnp.asarray(tokens), dtype="bfloat16", **options)


def race(name: str, shape: tuple[int, int], *, rounds: int, device: str) -> dict:
    config = ModelConfig.preset(name)
    batch_size, length = shape
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (batch_size, length + 1))
    contestants = {
        "neox_jax": our_step(config, tokens),
        "transformers": their_step(config, tokens, device, compiled=device == "cuda"),
    }
    seconds = {side: [] for side in contestants}
    for run in contestants.values():
        for _ in range(3):  # compiles, and settles
            run()
    for _ in range(rounds):
        for side, run in contestants.items():
            start = time.perf_counter()
            run()
            seconds[side].append(time.perf_counter() - start)
    median = {side: statistics.median(times) for side, times in seconds.items()}
    return {
        "batch": batch_size,
        "length": length,
        "tokens_per_second": {side: batch_size * length / value for side, value in median.items()},
        "ratio": median["transformers"] / median["neox_jax"],
        "ratios_of_rounds": [b / a for a, b in zip(seconds["neox_jax"], seconds["transformers"], strict=True)],
        "model_flops_per_second": {
            side: batch_size * length * config.training_flops_per_token(length) / value
            for side, value in median.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small shapes, on whatever there is")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    on_gpu = jax.devices()[0].platform == "gpu"
    if not (args.tiny or on_gpu):
        raise SystemExit("gpu_train.py: there is no GPU here; give --tiny to try the script itself")
    device = jax.devices()[0]
    chip = find_chip(device.device_kind)
    result = {
        "date": datetime.date.today().isoformat(),
        "hardware": device.device_kind,
        "versions": {"jax": jax.__version__, "torch": torch.__version__, "transformers": transformers.__version__},
        "training": {},
    }
    if on_gpu:
        result["attention"] = check_attention()
        result["matmul_flops_per_second"] = matmul_ceiling()
    for name, shape in (TINY if args.tiny else {name: SHAPES[name] for name in args.models}).items():
        found = race(name, shape, rounds=2 if args.tiny else args.rounds, device="cuda" if on_gpu else "cpu")
        if on_gpu:
            ours = found["model_flops_per_second"]["neox_jax"]
            found["share_of_matmul_ceiling"] = ours / result["matmul_flops_per_second"]
            found["mfu"] = None if chip is None else ours / chip.bf16_flops
        result["training"][name] = found
        print(name, json.dumps(found), flush=True)
        gc.collect()
        jax.clear_caches()
        if on_gpu:
            torch.cuda.empty_cache()
    print(json.dumps(result, indent=2))
    if args.output is not None:
        path = args.output / f"{result['date']}-gpu-train-{device.device_kind.lower().replace(' ', '-')}.json"
        path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
