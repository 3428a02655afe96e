"""What a token is drawn from, against transformers' processors; that drawing is by row, traced and fair."""

import functools
import itertools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neox_jax.sampling import SamplingParams, argmax, process_logits, row_keys, sample, top_logprobs
from neox_jax.sharding import constrain, make_mesh

B, V, T = 4, 104, 12
OFF = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
OFF_HERE = {"presence_penalty": 0.0, "frequency_penalty": 0.0}  # transformers has none
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
GRID = {
    "temperature": (0.6, 1.7),
    "top_k": (0, 6, 40),
    "top_p": (1.0, 0.85),
    "min_p": (0.0, 0.06),
    "repetition_penalty": (1.0, 1.4),
}
CASES += [dict(zip(GRID, values, strict=True)) for values in itertools.product(*GRID.values())]


def logits_of(seed: int = 0, scale: float = 3.0) -> np.ndarray:
    return scale * np.random.default_rng(seed).standard_normal((B, V), np.float32)


def peaked_logits() -> np.ndarray:
    """Few values, so that many tokens tie; one token far above the others, two such, none, and all equal."""
    logits = np.round(logits_of(5))
    logits[0, 10] += 12
    logits[1, 10:12] = 15
    logits[3] = 2
    return logits


def tokens_of(seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, V, (B, T), np.int32)


@functools.cache
def tiny_reference():
    pytest.importorskip("torch")
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    return GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=9, **sizes))


def by_transformers(logits: np.ndarray, tokens: np.ndarray, **params) -> np.ndarray:
    """Through the list of processors that transformers itself puts together for generate(), in its order."""
    model = tiny_reference()
    import torch
    from transformers import GenerationConfig

    params = {**OFF, **params}
    params |= {name: params[name] or None for name in ("top_k", "min_p")}
    config = GenerationConfig(do_sample=True, num_beams=1, **params)
    processors = model._get_logits_processor(config, input_ids_seq_length=tokens.shape[1])
    return processors(torch.from_numpy(tokens).long(), torch.from_numpy(logits.copy())).numpy()


process = jax.jit(process_logits)


def processed(logits, tokens, **params) -> np.ndarray:
    return np.asarray(process(jnp.asarray(logits), jnp.asarray(tokens), **{**OFF, **OFF_HERE, **params}))


def softmax(x: np.ndarray) -> np.ndarray:
    exponentials = np.exp(x - x.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("logits", [logits_of(), peaked_logits()], ids=["random", "peaked"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(f"{k}={v}" for k, v in case.items()) or "off")
def test_probabilities_are_those_of_transformers(case, logits):
    tokens = tokens_of()
    wanted = by_transformers(logits, tokens, **case)
    # Its top-p keeps some of the tokens that tie with the last one kept, whichever its sort puts first; here all stay.
    unfiltered = by_transformers(logits, tokens, **{**case, "top_k": 0, "top_p": 1.0, "min_p": 0.0})
    least_kept = np.where(np.isinf(wanted), np.inf, unfiltered).min(axis=1, keepdims=True)
    wanted = np.where(unfiltered >= least_kept, unfiltered, -np.inf)
    got = processed(logits, tokens, **case)
    assert (np.isinf(got) == np.isinf(wanted)).all()
    np.testing.assert_allclose(softmax(got), softmax(wanted), atol=1e-5, rtol=0)


def test_each_row_has_parameters_of_its_own():
    rows = [{**OFF, **OFF_HERE, **CASES[i]} for i in (1, 13, 14, 15)]
    rows[1] |= {"presence_penalty": 0.5}
    rows[2] |= {"frequency_penalty": -0.5}
    params = {name: jnp.asarray([row[name] for row in rows]) for name in rows[0]}
    logits, tokens = logits_of(), tokens_of()
    got = processed(logits, tokens, **params)
    for i, row in enumerate(rows):
        alone = processed(logits, tokens, **row)
        np.testing.assert_allclose(got[i], alone[i], rtol=1e-6)


@pytest.mark.parametrize("num_prompt_tokens", [0, 5, [0, 3, T - 1, T]], ids=["none", "scalar", "by row"])
@pytest.mark.parametrize(("presence", "frequency"), [(0.7, 0.0), (0.0, 0.4), (2.0, 2.0), (-2.0, -2.0), (0.3, -1.1)])
def test_presence_and_frequency_count_what_was_generated(presence, frequency, num_prompt_tokens):
    logits, tokens, temperature = logits_of(), np.random.default_rng(2).integers(0, 6, (B, T), np.int32), 0.8
    tokens[:, -1] = -1
    wanted = by_transformers(logits, np.where(tokens < 0, tokens[:, :1], tokens), repetition_penalty=1.2)
    for row, num_prompt in enumerate(np.broadcast_to(num_prompt_tokens, B)):
        for token in range(V):
            count = tokens[row, num_prompt:].tolist().count(token)
            wanted[row, token] -= frequency * count + presence * (count > 0)
    got = processed(
        logits,
        tokens,
        temperature=temperature,
        repetition_penalty=1.2,
        presence_penalty=presence,
        frequency_penalty=frequency,
        num_prompt_tokens=jnp.asarray(num_prompt_tokens),
    )
    np.testing.assert_allclose(got, wanted / temperature, atol=1e-5)


def test_padding_is_not_penalized():
    logits, tokens = logits_of(), tokens_of()
    penalties = {"repetition_penalty": 2.0, "presence_penalty": 0.3, "frequency_penalty": 0.1}
    wanted = processed(logits, tokens[:, :-1], **penalties)
    for outside in (-1, V, -1 - V):
        tokens[:, -1] = outside
        np.testing.assert_array_equal(processed(logits, tokens, **penalties), wanted)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_thresholds_hold_for_any_float(scale):
    """top_k by bisection of the bits equals a sort: negative, tiny and huge values, zeros of both signs."""
    logits = logits_of() * np.float32(scale)
    logits[0, :3] = 0.0, -0.0, -np.inf
    logits[1] = np.where(np.arange(V) % 2, 0.0, -0.0)
    for k in (1, 5, V - 1):
        kept = np.isfinite(processed(logits, tokens_of(), top_k=k))
        wanted = logits >= np.sort(logits, axis=1)[:, [V - k]]
        np.testing.assert_array_equal(kept, wanted & np.isfinite(logits))


def test_argmax_is_the_first_of_equals():
    x = np.round(logits_of(scale=1.0))
    np.testing.assert_array_equal(argmax(jnp.asarray(x)), x.argmax(axis=1))
    assert (np.asarray(argmax(jnp.full((2, 5), jnp.nan))) < 5).all()


@jax.jit
def _draw(logits, params, seeds, position, num_tokens, previous, others):
    positions = jnp.full(len(logits), position)
    options = {"positions_B": positions, "previous_tokens_BT": previous, "num_tokens": num_tokens}
    return sample(logits, params, keys_B=row_keys(seeds), **options, **others)


def draw(logits, params: SamplingParams, *, seeds=None, position=0, num_tokens=None, previous=None, **others):
    """Chooses tokens; others: the arguments of `sample` that may be left out."""
    batch, size = logits.shape
    params = jax.tree.map(lambda value: np.broadcast_to(value, batch), params)  # a program for scalars would be another
    seeds = np.arange(batch, dtype=np.uint32)[None] if seeds is None else seeds
    previous = np.full((batch, T), -1) if previous is None else previous
    num_tokens = size if num_tokens is None else num_tokens
    return np.asarray(_draw(logits, params, seeds, position, num_tokens, previous, others))


def test_frequencies_are_those_of_the_softmax():
    """Within 4 standard deviations, each of 4 tokens, over rows and over positions."""
    logits = np.asarray([1.0, 0.0, -1.0, 2.0], np.float32)
    num_draws, temperature = 4000, 1.5
    probabilities = np.asarray(jax.nn.softmax(logits / temperature))
    deviation = np.sqrt(num_draws * probabilities * (1 - probabilities))
    params = SamplingParams(temperature=temperature)
    rows = draw(np.tile(logits, (num_draws, 1)), params)
    options = {"seeds": np.zeros((1, 1), np.uint32), "num_tokens": 4, "previous": np.full((1, 2), -1), "others": {}}
    positions = jax.vmap(lambda position: _draw(logits[None], params, position=position, **options)[0])(
        jnp.arange(num_draws)
    )
    for tokens in (rows, positions):
        off = np.bincount(tokens, minlength=4) - num_draws * probabilities
        assert (np.abs(off) < 4 * deviation).all(), off / deviation


def test_a_row_draws_the_same_among_others():
    """Others that are greedy, filtered, penalized, biased or restricted, or nothing of it."""
    logits, previous = logits_of(scale=0.5), tokens_of()
    rows = {
        "temperature": [0.9, 0.0, 1.0, 1.0],
        "top_k": [0, 0, 9, 0],
        "top_p": [1.0, 1.0, 1.0, 0.8],
        "min_p": [0.0, 0.0, 0.01, 0.0],
        "repetition_penalty": [1.0, 1.5, 1.0, 1.0],
        "presence_penalty": [0.0, 0.0, 0.5, 0.0],
        "frequency_penalty": [0.0, 0.2, 0.0, 0.0],
    }
    params = SamplingParams(**{name: np.asarray(values) for name, values in rows.items()})
    bias = {"bias_ids_BM": np.asarray([[-1], [-1], [7], [-1]]), "biases_BM": np.full((B, 1), 2.0)}
    others = {**bias, "forbidden_ids_BM": np.asarray([[-1], [3], [-1], [-1]])}
    together = [draw(logits, params, position=p, previous=previous, **others) for p in range(10)]
    for i in range(B):
        row = slice(i, i + 1)
        own_params, own_others = jax.tree.map(operator.itemgetter(row), (params, others))
        own_others |= {"seeds": np.asarray([[i]], np.uint32), "previous": previous[row]}
        alone = [draw(logits[row], own_params, position=p, **own_others) for p in range(10)]
        assert [tokens[0] for tokens in alone] == [tokens[i] for tokens in together]


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
    logits, previous = logits_of(scale=0.1), tokens_of()
    logits[:, :3] = 3.0, 2.9, 0.0
    previous[:, 0], previous[previous == 1] = 0, 2
    tokens = draw(logits, SamplingParams(temperature=0.0, repetition_penalty=2.0), previous=previous)
    assert (tokens == 1).all()


@pytest.mark.parametrize("params", [SamplingParams(temperature=0.0), SamplingParams(), SamplingParams(top_k=3)])
def test_rows_of_the_table_without_a_token_are_never_chosen(params):
    logits = logits_of(scale=0.1)
    logits[:, 60:] += 50
    for position in range(10):
        assert (np.asarray(draw(logits, params, position=position, num_tokens=60)) < 60).all()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_biases_come_before_everything_else(temperature):
    logits, previous = logits_of(scale=1.0), tokens_of()
    params = SamplingParams(temperature, top_p=0.9, repetition_penalty=1.3, frequency_penalty=0.2)
    ids = np.asarray([[0, 5, -1], [103, -1, -1], [-1, -1, -1], [-1, 9, 8]])
    biases = np.asarray([[3.0, -100.0, 50.0], [100.0, 50.0, 50.0], [50.0, 50.0, 50.0], [50.0, 2.0, -2.0]], np.float32)
    by_hand = logits.copy()
    for row, token in zip(*np.nonzero(ids >= 0), strict=True):
        by_hand[row, ids[row, token]] += biases[row, token]
    for position in range(5):
        got = draw(logits, params, position=position, previous=previous, bias_ids_BM=ids, biases_BM=biases)
        np.testing.assert_array_equal(got, draw(by_hand, params, position=position, previous=previous))
        assert got[1] == 103


@pytest.mark.parametrize("params", [SamplingParams(0.0), SamplingParams(1.5), SamplingParams(0.7, top_k=2)])
def test_forbidden_ids_are_never_chosen(params):
    logits = logits_of(scale=1.0)
    likeliest = np.argsort(-logits, axis=1)
    forbidden = likeliest[:, :2].copy()
    forbidden[1], forbidden[2, 0] = -1, -1
    free = np.stack([draw(logits, params, position=p) for p in range(20)])
    tokens = np.stack([draw(logits, params, position=p, forbidden_ids_BM=forbidden) for p in range(20)])
    assert (free[..., None] == forbidden).any()
    assert not (tokens[..., None] == forbidden).any()
    np.testing.assert_array_equal(tokens[:, 1], free[:, 1])  # nothing is forbidden there
    if params.temperature == 0:
        np.testing.assert_array_equal(tokens[0], likeliest[[0, 1, 2, 3], [2, 0, 0, 2]])


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(1e-38),
        SamplingParams(1e-6),
        SamplingParams(1e30, top_k=1),
        SamplingParams(1.0, top_p=1e-7),
        SamplingParams(2.0, min_p=1.0),
        SamplingParams(1e-38, min_p=0.5, top_p=0.5, top_k=V),
    ],
)
def test_extreme_values_take_the_likeliest(params):
    logits = logits_of()
    for position in range(5):
        np.testing.assert_array_equal(draw(logits, params, position=position), logits.argmax(axis=1))


def test_other_parameters_compile_nothing():
    logits, none = logits_of()[:3], np.full((3, 2), -1)
    others = {"bias_ids_BM": none, "biases_BM": np.zeros((3, 2)), "forbidden_ids_BM": none, "num_prompt_tokens": 0}
    num_compiled = _draw._cache_size()
    for case in CASES:
        draw(logits, SamplingParams(**{**OFF, **case}), **others)
    draw(logits, SamplingParams(presence_penalty=-1.0, frequency_penalty=2.0), **{**others, "num_prompt_tokens": 7})
    draw(logits, SamplingParams(), **{**others, "bias_ids_BM": none + 3, "forbidden_ids_BM": none + 9})
    assert _draw._cache_size() == num_compiled + 1


def depths_of_scatters(jaxpr, depth: int = 0) -> list[int]:
    """Under how many conds each scatter stands."""
    depths = [depth for equation in jaxpr.eqns if equation.primitive.name.startswith("scatter")]
    for equation in jaxpr.eqns:
        inner = depth + (equation.primitive.name == "cond")
        for sub in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(sub, "eqns"):
                depths += depths_of_scatters(getattr(sub, "jaxpr", sub), inner)
    return depths


def test_nothing_is_scattered_where_nothing_asks_for_it():
    logits, tokens = logits_of(), tokens_of()
    keys, positions = row_keys(np.zeros((1, B), np.uint32)), np.zeros(B, int)
    options = {"keys_B": keys, "positions_B": positions, "previous_tokens_BT": tokens, "num_tokens": V}
    others = {"bias_ids_BM": tokens, "biases_BM": tokens, "forbidden_ids_BM": tokens}
    plain = jax.make_jaxpr(lambda params: sample(logits, params, **options))(SamplingParams())
    full = jax.make_jaxpr(lambda params: sample(logits, params, **options, **others))(SamplingParams())
    assert depths_of_scatters(plain.jaxpr) == [1, 1]  # two kinds of penalties
    assert depths_of_scatters(full.jaxpr) == [1, 1, 1, 1]


def test_a_loop_over_a_sharded_vocabulary_chooses_the_same():
    """Every parameter at work, by row, in a while_loop whose logits come from a table sharded over its columns."""
    params = SamplingParams(
        temperature=np.asarray([0.0, 0.8, 1.0, 1.3], np.float32),
        top_k=np.asarray([0, 30, 0, 0]),
        top_p=np.asarray([1.0, 1.0, 0.9, 1.0], np.float32),
        min_p=np.asarray([0.0, 0.0, 0.0, 0.01], np.float32),
        repetition_penalty=np.asarray([1.2, 1.0, 1.0, 1.1], np.float32),
        presence_penalty=np.asarray([0.0, 0.5, 0.0, 0.0], np.float32),
        frequency_penalty=np.asarray([0.3, 0.0, 0.7, 0.0], np.float32),
    )
    others = {
        "bias_ids_BM": np.asarray([[5, -1], [-1, -1], [6, 60], [100, 1]]),
        "biases_BM": np.full((B, 2), 1.5, np.float32),
        "forbidden_ids_BM": np.asarray([[-1], [2], [90], [-1]]),
        "num_prompt_tokens": np.asarray([1, 2, 1, 1]),
    }
    table = np.random.default_rng(3).standard_normal((V, V), np.float32)

    def run(mesh):
        @jax.jit
        def loop(table_VV, params, others, history_BT):
            def step(carry):
                i, history_BT, likeliest_TBK = carry
                logits_BV = constrain(table_VV[history_BT[:, i]], ("batch", "vocab"), mesh)
                options = {"positions_B": jnp.full(B, i + 1), "previous_tokens_BT": history_BT, "num_tokens": V - 3}
                keys = row_keys(jnp.arange(B, dtype=jnp.uint32)[None])
                token_B = sample(logits_BV, params, keys_B=keys, **options, **others)
                likeliest_TBK = likeliest_TBK.at[i].set(top_logprobs(logits_BV, 3)[0])
                return i + 1, history_BT.at[:, i + 1].set(token_B), likeliest_TBK

            start = 0, history_BT, jnp.zeros((T, B, 3), jnp.int32)
            return jax.lax.while_loop(lambda carry: carry[0] < T - 1, step, start)[1:]

        history = np.full((B, T), -1, np.int32)
        history[:, 0] = range(B)
        return jax.device_get(loop(constrain(table, (None, "vocab"), mesh), params, others, history))

    tokens, likeliest = run(None)
    assert (tokens >= 0).all()
    for got, wanted in zip(run(make_mesh(data=2, model=4)), (tokens, likeliest), strict=True):
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("k", [1, 5, 20])
def test_top_logprobs_are_the_likeliest_of_the_model(k):
    for logits in (logits_of(), peaked_logits()):
        ids, logprobs = jax.jit(top_logprobs, static_argnums=1)(logits, k)
        wanted = np.argsort(-logits, axis=1, kind="stable")[:, :k]
        np.testing.assert_array_equal(ids, wanted)
        np.testing.assert_allclose(logprobs, np.take_along_axis(np.log(softmax(logits)), wanted, 1), atol=1e-5)
        assert (ids.dtype, logprobs.dtype) == (jnp.int32, jnp.float32)
