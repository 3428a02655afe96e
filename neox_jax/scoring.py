"""Log probabilities of given tokens, many requests at a time: what evaluation asks of a model.

SHAPES  B rows  T length  P scored positions  D model  V vocab
Requests that share a context share its forward pass: a row is the context, seen by all, and behind it the choices, each
of which sees the context and itself at the positions it would have alone. The head is applied only where a token is
scored, and only sums and flags leave the device. Rows are sorted by length and padded to few shapes; the next batch is
prepared while one runs.
"""

import dataclasses
import functools
from collections import deque
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from neox_jax.attention import shared_context_attention
from neox_jax.engine import batch_bucket
from neox_jax.errors import InputError
from neox_jax.model import NeoX, run_layers
from neox_jax.sampling import argmax
from neox_jax.sharding import constrain

HEAD_POSITIONS = 128  # whose logits are in memory together
BATCHES_AHEAD = 2


class RequestError(InputError):
    """A request that cannot be scored. index: which of them; reason: why."""

    def __init__(self, index: int, reason: str):
        super().__init__(f"request {index} has {reason}")
        self.index, self.reason = index, reason


@dataclasses.dataclass(frozen=True)
class Score:
    """logprob: of all the continuation's tokens, in nats. is_greedy: whether each was the likeliest there."""

    logprob: float
    is_greedy: bool


@dataclasses.dataclass
class _Row:
    """tokens as they are fed, with their positions and segments (0: the context); scored: (place, token, request)."""

    tokens: list[int]
    positions: list[int]
    segments: list[int]
    scored: list[tuple[int, int, int]] = dataclasses.field(default_factory=list)

    def add(self, context_length: int, continuation: Sequence[int], request: int) -> None:
        """Scores a continuation of the context; all but its last token are fed."""
        start = len(self.tokens)
        fed = continuation[:-1]
        segment = self.segments[-1] + 1
        self.tokens += fed
        self.positions += range(context_length, context_length + len(fed))
        self.segments += [segment] * len(fed)
        places = [context_length - 1, *range(start, start + len(fed))]
        self.scored += [(place, token, request) for place, token in zip(places, continuation, strict=True)]


def score_continuations(
    model: NeoX,
    requests: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    batch_tokens: int = 8192,
    max_length: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Score]:
    """The log probability of each continuation behind its context, both token ids, one at least in each.

    Of what is longer than the context of the model (max_length) the end counts: (context + continuation)[-(max_length +
    1):][:-1] is fed, as lm-evaluation-harness does. batch_tokens: of a forward pass, padding included. progress: called
    with the number of requests done.
    Raises: RequestError, before the first forward pass, for a continuation longer than max_length, an empty one or an
    empty context.
    """
    max_length = model.config.max_position_embeddings if max_length is None else max_length
    rows = _pack(requests, max_length)
    logprobs, greedy, waiting = [0.0] * len(requests), [True] * len(requests), deque()

    def read() -> None:
        batch, results = waiting.popleft()
        values, is_likeliest = jax.device_get(results)
        scored = (entry for row in batch for entry in row.scored)
        for (_, _, request), value, likeliest in zip(scored, values.tolist(), is_likeliest.tolist(), strict=False):
            logprobs[request] += value
            greedy[request] = greedy[request] and likeliest
        if progress is not None:
            progress(len({request for row in batch for _, _, request in row.scored}))

    for batch, length in _batches(rows, batch_tokens):
        waiting.append((batch, _score(model, *_arrays(batch, length, batch_tokens, model.mesh))))
        if len(waiting) > BATCHES_AHEAD:
            read()
    while waiting:
        read()
    return [Score(*pair) for pair in zip(logprobs, greedy, strict=True)]


def _pack(requests, max_length: int) -> list[_Row]:
    """Rows that hold every request once, longest first."""
    choices: dict[tuple[int, ...], list[int]] = {}
    for i, (context, continuation) in enumerate(requests):
        if not context or not continuation:
            raise RequestError(i, f"an empty {'context' if not context else 'continuation'}; nothing to score")
        if len(continuation) > max_length:
            raise RequestError(i, f"a continuation of {len(continuation)} tokens; the model's context is {max_length}")
        kept = tuple(context)[-(max_length + 1 - len(continuation)) :]
        choices.setdefault(kept, []).append(i)
    rows = []
    for context, members in choices.items():
        row = None
        for i in members:
            continuation = list(requests[i][1])
            if row is None or len(row.tokens) + len(continuation) - 1 > max_length:
                row = _Row(list(context), list(range(len(context))), [0] * len(context))
                rows.append(row)
            row.add(len(context), continuation, i)
    return sorted(rows, key=lambda row: -len(row.tokens))


def _batches(rows: list[_Row], batch_tokens: int):
    """(rows, length) of each forward pass."""
    while rows:
        length = length_bucket(len(rows[0].tokens))
        size = max(1, batch_tokens // length)
        yield rows[:size], length
        rows = rows[size:]


def length_bucket(length: int) -> int:
    """The length that a row is padded to: a power of two or one and a half of one, from 16 on."""
    power = max(16, 1 << (length - 1).bit_length())
    return power * 3 // 4 if length <= power * 3 // 4 and power > 16 else power


def _arrays(batch: list[_Row], length: int, batch_tokens: int, mesh) -> tuple[np.ndarray, ...]:
    """tokens, positions, segments [B,T]; places [P] in B x T and targets [P], padded; how many of those count."""
    size = batch_bucket(min(len(batch), max(1, batch_tokens // length)), mesh)
    arrays = np.zeros((3, size, length), np.int32)
    arrays[2] = -1
    for b, row in enumerate(batch):
        arrays[:, b, : len(row.tokens)] = row.tokens, row.positions, row.segments
    scored = [(b * length + place, token) for b, row in enumerate(batch) for place, token, _ in row.scored]
    room = HEAD_POSITIONS
    while room < len(scored):
        room *= 4
    padded = np.zeros((2, room), np.int32)
    padded[:, : len(scored)] = np.asarray(scored, np.int32).T
    return (*arrays, *padded, np.int32(len(scored)))


@jax.jit
def _score(model: NeoX, tokens_BT, positions_BT, segments_BT, places_P, targets_P, num_scored):
    """Log probabilities and whether each is the likeliest, [P] each, on every device; nothing behind num_scored."""
    attend = functools.partial(shared_context_attention, segment_ids_BT=segments_BT)
    tables = model.rotary_tables(positions_BT)
    x_BTD = run_layers(model.layers, model.embed(tokens_BT), tables, attend, model.mesh, remat="none")
    x_PD = model.finish(x_BTD).reshape(-1, x_BTD.shape[-1])[places_P]

    def score(i, found):
        start = i * HEAD_POSITIONS
        x_CD = jax.lax.dynamic_slice_in_dim(x_PD, start, HEAD_POSITIONS)
        targets_C = jax.lax.dynamic_slice_in_dim(targets_P, start, HEAD_POSITIONS)
        logits_CV = model.unembed(x_CD)
        chosen_C = jnp.take_along_axis(logits_CV, targets_C[:, None], axis=1)[:, 0]
        new = chosen_C - jax.nn.logsumexp(logits_CV, axis=-1), argmax(logits_CV) == targets_C
        return tuple(
            jax.lax.dynamic_update_slice_in_dim(old, part, start, axis=0) for old, part in zip(found, new, strict=True)
        )

    found = jnp.zeros(len(places_P), jnp.float32), jnp.zeros(len(places_P), bool)
    found = jax.lax.fori_loop(0, -(-num_scored // HEAD_POSITIONS), score, found)
    return tuple(constrain(x, (None,), model.mesh) for x in found)
