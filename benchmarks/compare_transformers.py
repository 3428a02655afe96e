"""Training and decoding at one shape, beside transformers on the same device, interleaved in one run.

    python benchmarks/compare_transformers.py --preset pythia-70m --rounds 5 --output benchmarks/results

Both sides have random weights, float32 but where another format is named, all cores. Each round runs every contestant
once, so that a slow minute of the machine hits all; ratios are those of the medians, and the spread of the rounds' own
ratios stands beside them. Training: forward, backward, global-norm clip and AdamW on a batch of 4 x 512 (transformers:
eager PyTorch, foreach AdamW). Decoding: 64 greedy tokens behind a prompt of 16, the prompt's own pass included on both
sides. Prefill: 4 prompts of 512, to keys and values and the logits behind each, the same on both sides.
"""

import argparse
import functools
import json
import os
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from machine import describe_machine

import neox_jax
from neox_jax.bench import bench_step
from neox_jax.config import ModelConfig
from neox_jax.engine import Engine
from neox_jax.quantize import quantize_model

TRAIN_SHAPE = (4, 512)
PROMPT_LENGTH, NEW_TOKENS = 16, 64


def reference_model(config: ModelConfig):
    torch.manual_seed(0)
    return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**config.to_hf()))


def training(config: ModelConfig) -> dict:
    """Contestants of one training step: name -> function that runs it."""
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (TRAIN_SHAPE[0], TRAIN_SHAPE[1] + 1))
    model = reference_model(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1)
    inputs = torch.tensor(tokens[:, :-1])
    targets = torch.tensor(tokens[:, 1:])

    def theirs():
        optimizer.zero_grad(set_to_none=True)
        logits = model(input_ids=inputs, use_cache=False).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    ours = bench_step(neox_jax.init_model(config), jnp.asarray(tokens), dtype="float32")
    return {"transformers": theirs, "neox_jax": ours}


def decoding(config: ModelConfig, batch_size: int) -> dict:
    prompts = np.random.default_rng(0).integers(0, config.vocab_size, (batch_size, PROMPT_LENGTH))
    reference = reference_model(config).eval()
    inputs = torch.tensor(prompts)
    options = {"do_sample": False, "min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS, "pad_token_id": 0}

    def theirs():
        with torch.inference_mode():
            out = reference.generate(inputs, attention_mask=torch.ones_like(inputs), **options)
        assert out.shape[1] == PROMPT_LENGTH + NEW_TOKENS

    def ours(model):
        out = neox_jax.generate(
            model, None, prompts.tolist(), max_new_tokens=NEW_TOKENS, temperature=0, ignore_eos=True
        )
        assert all(len(c.tokens) == NEW_TOKENS for c in out)

    models = {
        "neox_jax": neox_jax.init_model(config),
        "neox_jax, bfloat16": neox_jax.init_model(config, dtype=jnp.bfloat16),
        "neox_jax, int8 weights": quantize_model(neox_jax.init_model(config), "int8"),
    }
    return {"transformers": theirs} | {name: functools.partial(ours, model) for name, model in models.items()}


def prefilling(config: ModelConfig) -> dict:
    prompts = np.random.default_rng(0).integers(0, config.vocab_size, TRAIN_SHAPE)
    reference = reference_model(config).eval()
    inputs = torch.tensor(prompts)
    engine = Engine(neox_jax.init_model(config), num_slots=1, max_length=TRAIN_SHAPE[1] + 1)

    def theirs():
        with torch.inference_mode():
            reference(inputs, use_cache=True, logits_to_keep=1)

    return {"transformers": theirs, "neox_jax": lambda: jax.block_until_ready(engine.prefill(prompts.tolist()))}


def race(contestants: dict, rounds: int, tokens: int) -> dict:
    """Seconds of each contestant in each round, after one that does not count."""
    for run in contestants.values():
        run()
    seconds = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, run in contestants.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    ours = [name for name in contestants if name != "transformers"]
    rounds_of = {name: zip(seconds["transformers"], seconds[name], strict=True) for name in ours}
    return {
        "tokens_per_second": {name: round(tokens / median, 1) for name, median in medians.items()},
        "ratio": {name: round(medians["transformers"] / medians[name], 3) for name in ours},
        "ratio_of_rounds": {name: sorted(round(a / b, 3) for a, b in pairs) for name, pairs in rounds_of.items()},
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="pythia-70m")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="a folder for a dated JSON file")
    args = parser.parse_args()
    config = ModelConfig.preset(args.preset)
    torch.set_num_threads(os.cpu_count())
    results = {
        "train 4 x 512": race(training(config), args.rounds, TRAIN_SHAPE[0] * TRAIN_SHAPE[1]),
        "prefill 4 x 512": race(prefilling(config), args.rounds, TRAIN_SHAPE[0] * TRAIN_SHAPE[1]),
    }
    for batch_size in (1, 8):
        name = f"decode, batch {batch_size}"
        results[name] = race(decoding(config, batch_size), args.rounds, batch_size * NEW_TOKENS)
    report = {
        **describe_machine(),
        "preset": args.preset,
        "versions": {m.__name__: m.__version__ for m in (jax, torch, transformers)},
        "results": results,
    }
    text = json.dumps(report, indent=2)
    print(text)
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / f"{report['date']}-compare-transformers-{args.preset}.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
