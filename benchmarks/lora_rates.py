"""Training adapters beside transformers + PEFT on the same device, interleaved in one run.

    python benchmarks/lora_rates.py --output benchmarks/results                # float32 on a CPU, Pythia-70m's shape
    python benchmarks/lora_rates.py --gpu --output benchmarks/results          # bfloat16, Pythia-2.8b and 6.9b

Both sides: random weights, adapters of rank 16 on all four products of a layer, AdamW, a global-norm clip, the same
tokens; ours also over weights in 8 bits. Peak memory, on a GPU: of either side's own allocator, ours over all three
steps that it runs. Run from the working tree: nothing needs to be installed.
"""

import argparse
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
import peft
import torch
import transformers
from machine import describe_machine

import neox_jax
from neox_jax.bench import bench_step
from neox_jax.config import LORA_TARGETS, LoraConfig, ModelConfig
from neox_jax.quantize import quantize_model

RANK = 16
ON_CPU = {"pythia-70m": (4, 512)}
ON_GPU = {"pythia-2.8b": (8, 2048), "pythia-6.9b": (4, 2048)}
GIB = 2**30


def their_step(config: ModelConfig, tokens: np.ndarray, device: str, dtype: str):
    torch.manual_seed(0)
    options = {"dtype": getattr(torch, dtype), "attn_implementation": "sdpa"}
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(transformers.GPTNeoXConfig(**config.to_hf()), **options)
    lora = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(LORA_TARGETS), task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, lora).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1)
    batch = torch.tensor(tokens, device=device)
    inputs, targets = batch[:, :-1].contiguous(), batch[:, 1:].flatten()

    def run():
        optimizer.zero_grad(set_to_none=True)
        logits = model(input_ids=inputs, use_cache=False).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    return run


def our_step(config: ModelConfig, tokens: np.ndarray, dtype: str, quantize: str):
    model = neox_jax.init_model(config, dtype=jnp.dtype(dtype))
    model = quantize_model(model, quantize) if quantize else model
    lora = LoraConfig(rank=RANK, alpha=RANK, targets=LORA_TARGETS, quantize=quantize)
    return bench_step(model, jnp.asarray(tokens), dtype=dtype, lora=lora)


def race(name: str, shape: tuple[int, int], *, rounds: int, device: str, dtype: str) -> dict:
    config = ModelConfig.preset(name)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (shape[0], shape[1] + 1))
    sides = {
        "neox_jax": our_step(config, tokens, dtype, ""),
        "neox_jax, int8 weights": our_step(config, tokens, dtype, "int8"),
        "transformers + peft": their_step(config, tokens, device, dtype),
    }
    seconds = {side: [] for side in sides}
    for run in sides.values():
        for _ in range(2):  # compiles, and settles
            run()
    for _ in range(rounds):
        for side, run in sides.items():
            start = time.perf_counter()
            run()
            seconds[side].append(time.perf_counter() - start)
    theirs = seconds["transformers + peft"]
    median = {side: statistics.median(times) for side, times in seconds.items()}
    found = {
        "batch": shape[0],
        "length": shape[1],
        "dtype": dtype,
        "tokens_per_second": {side: round(shape[0] * shape[1] / value, 1) for side, value in median.items()},
        "ratio": {side: round(statistics.median(theirs) / value, 3) for side, value in median.items()},
        "ratio_of_rounds": {
            side: sorted(round(b / a, 3) for a, b in zip(times, theirs, strict=True)) for side, times in seconds.items()
        },
    }
    if device == "cuda":
        stats = jax.devices()[0].memory_stats()
        found["peak_gib"] = {
            "neox_jax": stats["peak_bytes_in_use"] / GIB,
            "transformers + peft": torch.cuda.max_memory_allocated() / GIB,
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--models", nargs="+", choices=[*ON_CPU, *ON_GPU])
    parser.add_argument("--output", type=Path, help="a folder for a dated JSON file")
    args = parser.parse_args()
    if args.gpu and jax.devices()[0].platform != "gpu":
        raise SystemExit("lora_rates.py: --gpu, and there is no GPU here")
    torch.set_num_threads(os.cpu_count())
    device, dtype = ("cuda", "bfloat16") if args.gpu else ("cpu", "float32")
    shapes = ON_GPU if args.gpu else ON_CPU
    about = describe_machine()
    if args.gpu:
        about["hardware"] = jax.devices()[0].device_kind
    result = {
        **about,
        "versions": {module.__name__: module.__version__ for module in (jax, torch, transformers, peft)},
        "rank": RANK,
        "training": {},
    }
    for name in args.models or shapes:
        result["training"][name] = race(name, shapes[name], rounds=args.rounds, device=device, dtype=dtype)
        gc.collect()
        jax.clear_caches()
    text = json.dumps(result, indent=2)
    print(text)
    if args.output is not None:
        (args.output / f"{result['date']}-lora-{'gpu' if args.gpu else 'cpu'}.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
