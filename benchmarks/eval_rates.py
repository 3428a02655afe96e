"""Log-likelihoods through lm-evaluation-harness: its own `hf` model beside ours, on the same CPU, interleaved.

    python benchmarks/eval_rates.py [--preset pythia-70m] [--rounds 5] [--output benchmarks/results]

Random weights, float32, all cores, requests of token ids as the harness hands them to a model, of lengths as those of
real tasks. Choices: questions of 40 to 120 tokens with four choices of 5 to 30 (HellaSwag's sizes). Letters:
the same with choices of one token, which both sides answer from one forward pass. Singles: a context of 60 to 120 with
one to three tokens (LAMBADA). Texts: windows of 512. Both may have ROWS rows of LENGTH tokens in a forward pass. Each
round runs both once; the ratio is that of the medians.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import jax
import numpy as np
import torch
import transformers
from lm_eval.models.huggingface import HFLM
from machine import describe_machine

import neox_jax
from neox_jax.config import ModelConfig
from neox_jax.scoring import score_continuations

ROWS, LENGTH = 16, 128


def make_requests(config: ModelConfig, kind: str) -> list[tuple[list[int], list[int]]]:
    random = np.random.default_rng(0)

    def tokens(low: int, high: int) -> list[int]:
        return random.integers(1, config.vocab_size, random.integers(low, high + 1)).tolist()

    if kind == "texts":
        return [([0], tokens(512, 512)) for _ in range(8)]
    if kind == "singles":
        return [(tokens(60, 120), tokens(1, 3)) for _ in range(96)]
    low, high = (1, 1) if kind == "letters" else (5, 30)
    return [(context, tokens(low, high)) for context in (tokens(40, 120) for _ in range(32)) for _ in range(4)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="pythia-70m")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="a folder for the result as JSON")
    args = parser.parse_args()
    torch.set_num_threads(os.cpu_count())
    config = ModelConfig.preset(args.preset)
    torch.manual_seed(0)
    reference = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**config.to_hf())).eval()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=_any_tokenizer(), eos_token="<|endoftext|>")
    theirs = HFLM(pretrained=reference, tokenizer=tokenizer, batch_size=ROWS, max_length=2048)
    model = neox_jax.init_model(config)
    result = {}
    for kind in ("choices", "letters", "singles", "texts"):
        requests = make_requests(config, kind)
        named = [(None, *request) for request in requests]
        contestants = {
            "hf": lambda named=named: theirs._loglikelihood_tokens(named, disable_tqdm=True),
            "neox_jax": lambda requests=requests: score_continuations(model, requests, batch_tokens=ROWS * LENGTH),
        }
        seconds = {name: [] for name in contestants}
        for run in contestants.values():
            run()
        for _ in range(args.rounds):
            for name, run in contestants.items():
                start = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - start)
        medians = {name: statistics.median(times) for name, times in seconds.items()}
        result[kind] = {
            "requests_per_second": {name: round(len(requests) / median, 1) for name, median in medians.items()},
            "ratio": round(medians["hf"] / medians["neox_jax"], 2),
            "ratio_of_rounds": sorted(round(a / b, 2) for a, b in zip(*seconds.values(), strict=True)),
        }
        print(kind, json.dumps(result[kind]), flush=True)
    versions = {module.__name__: module.__version__ for module in (jax, torch, transformers)}
    report = {
        **describe_machine(),
        "preset": args.preset,
        "versions": versions,
        "rows": ROWS,
        "length": LENGTH,
        **result,
    }
    if args.output:
        path = args.output / f"{report['date']}-eval-rates-{args.preset}.json"
        path.write_text(json.dumps(report, indent=2) + "\n")


def _any_tokenizer():
    from neox_jax.tokenizer import train_tokenizer

    return train_tokenizer(["the cat sat on the mat and the dog sat on the log " * 3], vocab_size=290)._backend


if __name__ == "__main__":
    main()
