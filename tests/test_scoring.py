"""Log probabilities of continuations: each what the model alone says, however they are packed, cut and sharded."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_generation import CONFIG, EIGHT_HEADS, sharded
from variants import random_model

from neox_jax.errors import InputError
from neox_jax.scoring import _pack, length_bucket, score_continuations
from neox_jax.sharding import make_mesh


@pytest.fixture(scope="module")
def model():
    return random_model(CONFIG)


def alone(model, context, continuation) -> tuple[float, bool]:
    """From the whole logits of (context + continuation)[-65:][:-1]."""
    limit = model.config.max_position_embeddings
    fed = [*context, *continuation][-(limit + 1) :][:-1]
    padded = np.zeros(limit, np.int32)
    padded[: len(fed)] = fed
    logits = np.asarray(model(jnp.asarray(padded[None])))[0, len(fed) - len(continuation) : len(fed)]
    logprobs = jax.nn.log_softmax(logits)[np.arange(len(continuation)), np.asarray(continuation)]
    return float(logprobs.sum()), bool((logits.argmax(-1) == continuation).all())


def some_requests(model, seed: int = 0) -> list[tuple[list[int], list[int]]]:
    """Questions with choices that share a context, single ones, one-token ones, ones that are too long, greedy ones."""
    random = np.random.default_rng(seed)

    def tokens(length: int) -> list[int]:
        return random.integers(1, model.config.vocab_size, length).tolist()

    requests = []
    for length in (1, 5, 9, 30, 60):
        context = tokens(length)
        requests += [(context, tokens(size)) for size in (1, 1, 3, 7, 12)]
    requests += [(tokens(80), tokens(4)), (tokens(64), tokens(1)), (tokens(70), tokens(64)), (tokens(3), tokens(60))]
    context = tokens(6)
    likeliest = int(np.asarray(model(jnp.asarray([context])))[0, -1].argmax())
    requests += [(context, [likeliest]), (context, [likeliest, 1])]
    random.shuffle(requests)
    return requests


@pytest.mark.parametrize("batch_tokens", [64, 500])
def test_scores_are_those_of_each_alone(model, batch_tokens):
    requests = some_requests(model)
    done = []
    scores = score_continuations(model, requests, batch_tokens=batch_tokens, progress=done.append)
    for request, score in zip(requests, scores, strict=True):
        logprob, is_greedy = alone(model, *request)
        assert score.logprob == pytest.approx(logprob, abs=1e-4)
        assert score.is_greedy == is_greedy
    assert any(score.is_greedy for score in scores)
    assert sum(done) >= len(requests)


def test_choices_share_their_context(model):
    """One row for a question; of a continuation only what is before its last token is fed."""
    context, choices = list(range(1, 31)), [[40], [41], [50, 51, 52], [60, 61]]
    (row,) = _pack([(context, choice) for choice in choices], 64)
    assert row.tokens == [*context, 50, 51, 60]
    assert row.positions == [*range(30), 30, 31, 30]
    assert len(row.scored) == 7
    rows = _pack([(context, choice * 10) for choice in choices], 64)  # more than the context of the model together
    assert [len(row.tokens) <= 64 for row in rows] == [True] * len(rows)
    assert len(rows) > 1


@pytest.mark.parametrize("axes", [{"model": 8}, {"data": 2, "fsdp": 2, "model": 2}])
def test_a_mesh_gives_the_same(axes):
    plain = random_model(EIGHT_HEADS)
    requests = some_requests(plain)
    wanted = score_continuations(plain, requests)
    got = score_continuations(sharded(EIGHT_HEADS, make_mesh(**axes)), requests)
    np.testing.assert_allclose([one.logprob for one in got], [one.logprob for one in wanted], atol=1e-4)
    assert [one.is_greedy for one in got] == [one.is_greedy for one in wanted]


def test_few_shapes_are_compiled(model):
    assert {length_bucket(n) for n in range(1, 2049)} == {16, *(b for p in range(5, 12) for b in (2**p * 3 // 4, 2**p))}


def test_refusals(model):
    for request, text in (
        (([], [1]), "request 0 has an empty context"),
        (([1], []), "request 0 has an empty continuation"),
        (([1], [1] * 65), "request 0 has a continuation of 65 tokens; the model's context is 64"),
    ):
        with pytest.raises(InputError, match=text):
            score_continuations(model, [request])
    assert score_continuations(model, []) == []
    assert dataclasses.asdict(score_continuations(model, [([1], [2])])[0]).keys() == {"logprob", "is_greedy"}
