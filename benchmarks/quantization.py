"""What 8 bits cost in accuracy: log probabilities and likeliest tokens of a real text, beside the model as it is.

    python benchmarks/quantization.py --model runs/quickstart/run --text runs/quickstart/corpus/heldout.txt \\
        [--tokens 16384] [--output benchmarks/results]

For bfloat16 and for int8 weights every position is scored in one forward pass. For the int8 cache the text goes through
the decoding step, CHUNK tokens at a time behind a cache in 8 bits. A difference is in nats a token: above 0 is worse.
Agreement: the share of positions at which both find the same token likeliest.
"""

import argparse
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from machine import describe_machine

import neox_jax
from neox_jax.engine import extend
from neox_jax.kv_cache import KVCache
from neox_jax.quantize import quantize_model

CHUNK = 16


@jax.jit
def score_chunk(model, x_BTD, targets_BT):
    logprobs = jax.nn.log_softmax(model.unembed(model.final_layer_norm(x_BTD)))
    return jnp.take_along_axis(logprobs, targets_BT[..., None], axis=-1)[..., 0], jnp.argmax(logprobs, axis=-1)


def score(model, rows_BT) -> tuple[np.ndarray, np.ndarray]:
    """Log probabilities of tokens 1 to T - 1 and the likeliest tokens there, [B, T - 1] each."""
    hidden = jax.jit(lambda model, rows: model.hidden(rows))
    found = []
    for row in rows_BT[:, None]:
        normed = hidden(model, row[:, :-1])
        logprobs = jax.nn.log_softmax(model.unembed(normed))
        found.append((jnp.take_along_axis(logprobs, row[:, 1:, None], axis=-1)[0, :, 0], jnp.argmax(logprobs[0], -1)))
    return tuple(np.stack(part) for part in zip(*jax.device_get(found), strict=True))


def score_through_cache(model, rows_BT) -> tuple[np.ndarray, np.ndarray]:
    """The same by steps of CHUNK tokens, all earlier keys and values in 8 bits."""
    config, (batch, length) = model.config, rows_BT.shape
    sizes = {"layers": config.num_hidden_layers, "heads": config.num_attention_heads, "head_dim": config.head_dim}
    cache = KVCache.zeros(**sizes, batch=batch, length=length, dtype=jnp.int8)

    @jax.jit
    def step(cache, tokens_BT):
        x_BTD, keys_values = extend(model, cache, tokens_BT)
        return cache.append(*keys_values, jnp.full(batch, CHUNK)), x_BTD

    found = []
    for start in range(0, length - 1, CHUNK):
        cache, x_BTD = step(cache, rows_BT[:, start : start + CHUNK])
        found.append(jax.device_get(score_chunk(model, x_BTD, rows_BT[:, start + 1 : start + CHUNK + 1])))
    return tuple(np.concatenate(part, axis=1) for part in zip(*found, strict=True))


def compare(exact, other) -> dict[str, float]:
    return {
        "nats_per_token_more": float(exact[0].mean() - other[0].mean()),
        "largest_difference": float(np.abs(exact[0] - other[0]).max()),
        "argmax_agreement": float((exact[1] == other[1]).mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="SOURCE")
    parser.add_argument("--text", required=True, type=Path)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--output", type=Path, help="a folder for the result as JSON")
    args = parser.parse_args()

    def load(dtype: str = "float32"):
        return neox_jax.load_model(args.model, dtype=dtype)

    exact = load()
    length = exact.config.max_position_embeddings // CHUNK * CHUNK
    ids = neox_jax.load_tokenizer(args.model).encode(args.text.read_text(encoding="utf-8"))[: args.tokens]
    rows_BT = jnp.asarray(ids[: len(ids) // (length + 1) * (length + 1)]).reshape(-1, length + 1)
    wanted = score(exact, rows_BT)
    found = {
        "bfloat16": compare(wanted, score(load("bfloat16"), rows_BT)),
        "int8 weights": compare(wanted, score(quantize_model(load(), "int8"), rows_BT)),
        "int8 cache": compare(wanted, score_through_cache(exact, rows_BT)),
        "int8 weights and cache": compare(wanted, score_through_cache(quantize_model(load(), "int8"), rows_BT)),
    }
    result = {
        **describe_machine(),
        "jax": jax.__version__,
        "parameters": exact.config.num_parameters,
        "tokens": int(wanted[0].size),
        "nats_per_token": float(-wanted[0].mean()),
        "beside_float32": found,
    }
    print(json.dumps(result, indent=2))
    if args.output:
        (args.output / f"{result['date']}-quantization.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
