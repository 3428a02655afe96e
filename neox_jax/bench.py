"""Measures one thing at a time: a training step, decoding, or prefill. Seconds are medians of the timed repetitions."""

import dataclasses
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from neox_jax.config import Config, LoraConfig, ModelConfig, TrainConfig
from neox_jax.convert.source import load_model
from neox_jax.engine import Engine
from neox_jax.errors import InputError
from neox_jax.generation import generate
from neox_jax.hardware import memory_bandwidth, peak_flops
from neox_jax.model import NeoX, init_model
from neox_jax.optimizer import make_optimizer, make_schedule
from neox_jax.quantize import quantize_model
from neox_jax.sharding import make_mesh
from neox_jax.train_state import abstract_state, init_state, pure_params
from neox_jax.train_step import make_train_step
from neox_jax.tree import num_bytes

PROMPT_LENGTH = 16


def open_model(*, source: str | None, preset: str | None, dtype: str, quantize: str | None = None) -> NeoX:
    """A model from a SOURCE, or one of this preset's shape with random weights, on the default device."""
    if source is not None:
        return load_model(source, dtype=dtype, quantize=quantize)
    model = init_model(ModelConfig.preset(preset), dtype=dtype)
    return model if quantize is None else quantize_model(model, quantize)


def bench_train(model: NeoX, *, batch_size: int, seq_length: int, dtype: str, steps: int) -> dict:
    """A whole training step: forward, backward, clip and AdamW over float32 master weights."""
    _check_shape(model.config, batch_size, seq_length, steps)
    run = bench_step(model, _random_tokens(model.config, (batch_size, seq_length + 1)), dtype=dtype)
    seconds = _median_seconds(run, steps)
    flops = model.config.training_flops_per_token(seq_length) * batch_size * seq_length
    return _compute_bound(seconds, batch_size * seq_length, flops, dtype)


def bench_step(model: NeoX, tokens: jax.Array, *, dtype: str, lora: LoraConfig | None = None, **options):
    """A function that runs one training step on tokens [B, T + 1] each time it is called, and waits for it.

    lora: trains adapters over the model as it is. options: more fields of TrainConfig, as remat and attention. The
    model's arrays may be given up once it is made, but for adapters.
    """
    shape = {"batch_size": tokens.shape[0], "seq_length": tokens.shape[1] - 1}
    train = TrainConfig(steps=10**6, dtype=dtype, **shape, **options)
    config = Config(model=model.config, train=train)
    if lora is not None:
        config = dataclasses.replace(config, init_from="the model", lora=lora)
    mesh = make_mesh(devices=jax.devices()[:1])
    optimizer = make_optimizer(config.optimizer, train.steps)
    if lora is None:
        params, frozen = jax.tree.map(lambda x: x.astype(jnp.float32), pure_params(model)), ()
    else:
        params, frozen = None, (pure_params(model),)
    kind = {"dtype": dtype, "lora": lora}
    state = init_state(config.model, optimizer, mesh, seed=0, params=params, **kind)
    step = make_train_step(
        config,
        optimizer=optimizer,
        schedule=make_schedule(config.optimizer, train.steps),
        mesh=mesh,
        state_shardings=jax.tree.map(lambda x: x.sharding, abstract_state(config.model, optimizer, mesh, **kind)),
    )

    def run():
        nonlocal state
        state, metrics = step(state, tokens, *frozen)
        jax.block_until_ready((state, metrics))

    return run


def bench_prefill(model: NeoX, *, batch_size: int, seq_length: int, dtype: str, steps: int) -> dict:
    """Prompts of seq_length tokens to keys and values, and the logits behind the last token of each."""
    _check_shape(model.config, batch_size, seq_length, steps)
    prompts = np.asarray(_random_tokens(model.config, (batch_size, seq_length))).tolist()
    if seq_length == model.config.max_position_embeddings:
        raise InputError(f"--seq-length {seq_length} is all of the model's context; leave room for a token")
    engine = Engine(model, num_slots=1, max_length=seq_length + 1)
    seconds = _median_seconds(lambda: jax.block_until_ready(engine.prefill(prompts)), steps)
    config = model.config
    head_flops = 2 * config.hidden_size * config.padded_vocab_size  # for the last token of each row only
    flops = batch_size * (seq_length * (config.forward_flops_per_token(seq_length) - head_flops) + head_flops)
    return _compute_bound(seconds, batch_size * seq_length, flops, dtype)


def bench_decode(
    model: NeoX, *, batch_size: int, seq_length: int, dtype: str, steps: int, int8_cache: bool = False
) -> dict:
    """Greedy decoding of seq_length new tokens behind prompts of 16, everything that `generate` does included.

    step_seconds is per token and row of the batch; the prefill is timed apart and taken off. The limit is the time to
    read every weight once (the embedding but for its rows) and the filled cache, at the memory's bandwidth.
    """
    config = model.config
    _check_shape(config, batch_size, seq_length, steps)
    prompts = np.asarray(_random_tokens(config, (batch_size, PROMPT_LENGTH))).tolist()
    options = {"temperature": 0, "ignore_eos": True, "batch_size": batch_size, "int8_cache": int8_cache}
    whole = _median_seconds(lambda: generate(model, None, prompts, max_new_tokens=seq_length + 1, **options), steps)
    first = _median_seconds(lambda: generate(model, None, prompts, max_new_tokens=1, **options), steps)
    seconds = (whole - first) / seq_length
    weights = num_bytes(model) - (0 if config.tie_word_embeddings else num_bytes(model.embed_in))
    head_bytes = config.head_dim + 4 if int8_cache else config.head_dim * jnp.dtype(dtype).itemsize
    cached_tokens = batch_size * (PROMPT_LENGTH + seq_length / 2)
    cache = 2 * config.num_hidden_layers * config.num_attention_heads * head_bytes * cached_tokens
    bandwidth, source = memory_bandwidth(jax.devices()[0])
    return {
        **_environment(),
        "step_seconds": seconds,
        "tokens_per_second": batch_size / seconds,
        "first_token_seconds": first,
        "bandwidth_share": (weights + cache) / bandwidth / seconds,
        "bandwidth_bytes_per_second": bandwidth,
        "bandwidth_source": source,
    }


def _compute_bound(seconds: float, tokens: int, flops: float, dtype: str) -> dict:
    peak, source = peak_flops(jax.devices()[0], dtype)
    return {
        **_environment(),
        "step_seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "mfu": flops / seconds / peak,
        "peak_flops_per_second": peak,
        "peak_source": source,
    }


def _environment() -> dict:
    return {"device": jax.devices()[0].device_kind, "jax": jax.__version__}


def _check_shape(model: ModelConfig, batch_size: int, seq_length: int, steps: int) -> None:
    for name, value in (("--batch-size", batch_size), ("--seq-length", seq_length), ("--steps", steps)):
        if value < 1:
            raise InputError(f"{name} is {value}; it must be at least 1")
    if seq_length > model.max_position_embeddings:
        raise InputError(
            f"--seq-length {seq_length} is longer than the model's context, {model.max_position_embeddings}"
        )


def _random_tokens(config: ModelConfig, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.randint(jax.random.key(0), shape, 0, config.vocab_size)


def _median_seconds(run, steps: int) -> float:
    run()  # compiles
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
