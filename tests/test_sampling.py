"""What a token is drawn from, against transformers' processors; that drawing is by row, traced and fair."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neox_jax.sampling import SamplingParams, argmax, process_logits, row_keys, sample

B, V, T = 4, 101, 12
OFF = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
CASES = [
    {},
    {"temperature": 0.5},
    {"temperature": 3.0},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 1000},
    {"top_p": 0.9},
    {"top_p": 0.3},
    {"top_p": 1e-6},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.7},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.8},
    {"temperature": 1.7, "top_k": 50, "top_p": 0.95, "min_p": 0.1, "repetition_penalty": 1.2},
    {"temperature": 0.3, "top_p": 0.99, "min_p": 0.01, "repetition_penalty": 5.0},
]


def logits_of(seed: int = 0, scale: float = 3.0) -> np.ndarray:
    return scale * np.random.default_rng(seed).standard_normal((B, V), np.float32)


def tokens_of(seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, V, (B, T), np.int32)


def by_transformers(logits: np.ndarray, tokens: np.ndarray, params: dict) -> np.ndarray:
    """Through the list of processors that transformers itself puts together for generate()."""
    torch = pytest.importorskip("torch")
    from transformers import GenerationConfig, GPTNeoXConfig, GPTNeoXForCausalLM

    tiny = GPTNeoXConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9)
    params = {**params, "top_k": params["top_k"] or None, "min_p": params["min_p"] or None}
    config = GenerationConfig(do_sample=True, num_beams=1, **params)
    processors = GPTNeoXForCausalLM(tiny)._get_logits_processor(config, input_ids_seq_length=tokens.shape[1])
    return processors(torch.from_numpy(tokens).long(), torch.from_numpy(logits.copy())).numpy()


@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(f"{k}={v}" for k, v in case.items()) or "off")
def test_processed_logits_are_those_of_transformers(case):
    logits, tokens = logits_of(), tokens_of()
    wanted = by_transformers(logits, tokens, {**OFF, **case})
    got = np.asarray(process_logits(jnp.asarray(logits), jnp.asarray(tokens), **case))
    assert (np.isinf(got) == np.isinf(wanted)).all()
    np.testing.assert_allclose(got, wanted, atol=1e-5, rtol=1e-5)


def test_each_row_has_parameters_of_its_own():
    rows = [{**OFF, **CASES[i]} for i in (1, 13, 14, 15)]
    params = {name: jnp.asarray([row[name] for row in rows]) for name in OFF}
    logits, tokens = jnp.asarray(logits_of()), jnp.asarray(tokens_of())
    got = process_logits(logits, tokens, **params)
    for i, row in enumerate(rows):
        alone = process_logits(logits[i : i + 1], tokens[i : i + 1], **row)
        np.testing.assert_allclose(got[i], alone[0], rtol=1e-6)


def test_padding_is_not_penalized():
    logits, tokens = jnp.asarray(logits_of()), jnp.asarray(tokens_of())
    padding = jnp.full((B, 3), -1)
    wanted = process_logits(logits, tokens, repetition_penalty=2.0)
    for outside in (padding, padding + V + 1, padding - V):
        padded = jnp.concatenate([tokens, outside], axis=1)
        np.testing.assert_array_equal(process_logits(logits, padded, repetition_penalty=2.0), wanted)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_thresholds_hold_for_any_float(scale):
    """top_k by bisection of the bits equals a sort: negative, tiny and huge values, zeros of both signs."""
    logits = logits_of() * np.float32(scale)
    logits[0, :3] = 0.0, -0.0, -np.inf
    for k in (1, 5, V - 1):
        kept = np.isfinite(process_logits(jnp.asarray(logits), jnp.zeros((B, 1), int), top_k=k))
        wanted = logits >= np.sort(logits, axis=1)[:, [V - k]]
        np.testing.assert_array_equal(kept, wanted & np.isfinite(logits))


def test_argmax_is_the_first_of_equals():
    x = np.round(logits_of(scale=1.0))
    np.testing.assert_array_equal(argmax(jnp.asarray(x)), x.argmax(axis=1))
    assert (np.asarray(argmax(jnp.full((2, 5), jnp.nan))) < 5).all()


@jax.jit
def _draw(logits, params, seeds, position, num_tokens, previous):
    positions = jnp.full(len(logits), position)
    options = {"positions_B": positions, "previous_tokens_BT": previous, "num_tokens": num_tokens}
    return sample(logits, params, keys_B=row_keys(seeds), **options)


def draw(logits, params: SamplingParams, *, seeds=None, position=0, num_tokens=None, previous=None):
    batch, size = logits.shape
    seeds = np.arange(batch, dtype=np.uint32)[None] if seeds is None else seeds
    previous = jnp.full((batch, 2), -1) if previous is None else previous
    return _draw(logits, params, seeds, position, size if num_tokens is None else num_tokens, previous)


def test_frequencies_are_those_of_the_softmax():
    """Within 4 standard deviations, each of 4 tokens, over rows and over positions."""
    logits = np.asarray([1.0, 0.0, -1.0, 2.0], np.float32)
    num_draws, temperature = 4000, 1.5
    probabilities = np.asarray(jax.nn.softmax(logits / temperature))
    deviation = np.sqrt(num_draws * probabilities * (1 - probabilities))
    params = SamplingParams(temperature=temperature)
    rows = draw(np.tile(logits, (num_draws, 1)), params)
    positions = jax.vmap(lambda position: draw(logits[None], params, position=position)[0])(jnp.arange(num_draws))
    for tokens in (rows, positions):
        off = np.bincount(tokens, minlength=4) - num_draws * probabilities
        assert (np.abs(off) < 4 * deviation).all(), off / deviation


def test_a_row_draws_the_same_among_others():
    logits, params = logits_of(scale=0.5), SamplingParams(temperature=0.9, top_p=0.95)
    together = draw(logits, params, position=3)
    for i in range(B):
        alone = draw(logits[i : i + 1], params, seeds=np.asarray([[i]], np.uint32), position=3)
        assert alone[0] == together[i]


def test_draws_differ_by_seed_row_and_position():
    flat = np.zeros((8, 5000), np.float32)
    tokens = [draw(flat, SamplingParams(), seeds=np.stack([[s] * 8, range(8)]).astype(np.uint32)) for s in (0, 1)]
    tokens.append(draw(flat, SamplingParams(), seeds=np.stack([[0] * 8, range(8)]).astype(np.uint32), position=1))
    assert len(set(np.concatenate(tokens).tolist())) > 20  # of 24


def test_temperature_zero_is_greedy_row_by_row():
    logits = logits_of(scale=0.1)
    params = SamplingParams(temperature=jnp.asarray([0.0, 1.0, 0.0, 1.0]), top_p=jnp.asarray([0.5, 1.0, 1.0, 0.9]))
    tokens = np.stack([draw(logits, params, position=p) for p in range(20)])
    assert (tokens[:, [0, 2]] == logits.argmax(axis=1)[[0, 2]]).all()
    assert (tokens[:, [1, 3]] != logits.argmax(axis=1)[[1, 3]]).any(axis=0).all()


def test_greedy_counts_the_repetition_penalty():
    logits = np.asarray([[3.0, 2.9, 0.0]], np.float32)
    tokens = draw(logits, SamplingParams(temperature=0.0, repetition_penalty=2.0), previous=jnp.asarray([[0, -1]]))
    assert tokens[0] == 1


@pytest.mark.parametrize("params", [SamplingParams(temperature=0.0), SamplingParams(), SamplingParams(top_k=3)])
def test_rows_of_the_table_without_a_token_are_never_chosen(params):
    logits = logits_of(scale=0.1)
    logits[:, 60:] += 50
    for position in range(10):
        assert (np.asarray(draw(logits, params, position=position, num_tokens=60)) < 60).all()


def test_other_parameters_compile_nothing():
    logits, num_compiled = logits_of()[:3], _draw._cache_size()
    for case in CASES:
        draw(logits, SamplingParams(**{**OFF, **case}))
    assert _draw._cache_size() == num_compiled + 1
