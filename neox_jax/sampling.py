"""From logits to the next token: every parameter is traced and per row, so no setting ever recompiles.

SHAPES  B batch  T tokens so far  V vocab  M ids with a bias or forbidden  K likeliest tokens
Filtered logits are -inf. The order is the one in which transformers' generate() builds its processors: bias,
repetition penalty, then temperature, top-k, top-p, min-p. Presence and frequency penalty, which transformers lacks,
stand right behind the repetition penalty; forbidden ids end up the same wherever they stand before the temperature.
"""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How to choose a token: scalars, or arrays [B]. The defaults change nothing but draw from the whole distribution.

    temperature 0 is greedy; top_k 0, top_p 1, min_p 0, repetition_penalty 1 and the other two penalties 0 are off.
    """

    temperature: jax.Array | float = 1.0
    top_k: jax.Array | int = 0
    top_p: jax.Array | float = 1.0
    min_p: jax.Array | float = 0.0
    repetition_penalty: jax.Array | float = 1.0
    presence_penalty: jax.Array | float = 0.0
    frequency_penalty: jax.Array | float = 0.0


def row_keys(seeds: jax.Array) -> jax.Array:
    """One PRNG key a row, from the row's own numbers only: the first is the seed, the others are folded in.

    Shapes: seeds [M,B] uint32 -> keys [B].
    """

    def fold(numbers_M):
        key = jax.random.key(numbers_M[0])
        for number in numbers_M[1:]:
            key = jax.random.fold_in(key, number)
        return key

    return jax.vmap(fold, in_axes=1)(seeds)


def sample(
    logits_BV: jax.Array,
    params: SamplingParams,
    *,
    keys_B: jax.Array,
    positions_B: jax.Array,
    previous_tokens_BT: jax.Array,
    num_tokens: jax.Array | int,
    num_prompt_tokens: jax.Array | int = 0,
    bias_ids_BM: jax.Array | None = None,
    biases_BM: jax.Array | None = None,
    forbidden_ids_BM: jax.Array | None = None,
) -> jax.Array:
    """Draws each row's next token, or takes the likeliest where its temperature is 0.

    The draw uses fold_in(key of the row, position), position being where in the sequence the token will stand.
    Biases are added to the logits of their ids before anything else. Forbidden ids, and those from num_tokens on (rows
    of the table that no token uses), are never chosen. The first num_prompt_tokens of the previous tokens are the
    prompt, as in `process_logits`.
    Shapes: logits [B,V] float32, keys and positions [B], previous tokens [B,T], bias ids, biases and forbidden ids
    [B,M] each with its own M (an id of -1 is padding), num_prompt_tokens a scalar or [B] -> [B] int32.
    """
    if bias_ids_BM is not None:
        biased = jnp.any(bias_ids_BM >= 0)
        logits_BV = jax.lax.cond(biased, _add_at, _unchanged, logits_BV, bias_ids_BM, biases_BM)
    if forbidden_ids_BM is not None:
        logits_BV = jax.lax.cond(jnp.any(forbidden_ids_BM >= 0), _forbid, _unchanged, logits_BV, forbidden_ids_BM)
    logits_BV = jnp.where(jnp.arange(logits_BV.shape[-1]) < num_tokens, logits_BV, -jnp.inf)
    logits_BV = _penalize(logits_BV, previous_tokens_BT, num_prompt_tokens, params)

    def draw(logits_BV):
        filtered_BV = _filter(logits_BV, params)
        keys = jax.vmap(jax.random.fold_in)(keys_B, positions_B)
        noise_BV = jax.vmap(lambda key: jax.random.gumbel(key, filtered_BV.shape[-1:]))(keys)
        return argmax(filtered_BV + jnp.where(_column(params.temperature) > 0, noise_BV, 0))

    # No filter takes away the likeliest token, so where every row is greedy none has to run.
    return jax.lax.cond(jnp.all(jnp.asarray(params.temperature) == 0), argmax, draw, logits_BV)


def process_logits(
    logits_BV: jax.Array,
    previous_tokens_BT: jax.Array,
    *,
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    min_p=0.0,
    repetition_penalty=1.0,
    presence_penalty=0.0,
    frequency_penalty=0.0,
    num_prompt_tokens=0,
) -> jax.Array:
    """The logits that a token is drawn from, equal to what transformers' processors give.

    Each parameter is a scalar or an array [B], as in SamplingParams; temperature 0 leaves the scale alone, for the
    caller to take the maximum. Previous tokens outside [0, V), such as a padding of -1, are not counted. The
    repetition penalty counts all of them; presence and frequency penalty only those from index num_prompt_tokens on,
    and take presence + frequency * count off the logit of each token that occurs there (OpenAI's formula). Tokens that
    tie with the last one kept by top-k or top-p are kept too.
    Shapes: logits [B,V], previous tokens [B,T] integers -> [B,V] float32.
    """
    params = SamplingParams(temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty)
    logits_BV = _penalize(logits_BV.astype(jnp.float32), previous_tokens_BT, num_prompt_tokens, params)
    return _filter(logits_BV, params)


def top_logprobs(logits_BV: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k likeliest tokens of each row under the model's own distribution, the likeliest first, lower ids before.

    Shapes: logits [B,V] -> (ids [B,K] int32, log probabilities [B,K] float32).
    """
    logits_BV = logits_BV.astype(jnp.float32)
    # On one CPU core, [8, 50304], k = 5 and 20: 0.6 and 0.9 ms, against 1.2 and 6.6 ms for k rounds of argmax.
    values_BK, ids_BK = jax.lax.top_k(logits_BV, k)
    return ids_BK, values_BK - jax.nn.logsumexp(logits_BV, axis=-1, keepdims=True)


def argmax(x_BV: jax.Array) -> jax.Array:
    """The first index of each row's maximum. Shapes: [B,V] -> [B] int32.

    Two plain reductions, because XLA's own argmax reduces pairs, which the CPU does not vectorise (4 times slower).
    """
    size = x_BV.shape[-1]
    at_maximum = x_BV >= jnp.max(x_BV, axis=-1, keepdims=True)
    first = jnp.min(jnp.where(at_maximum, jnp.arange(size, dtype=jnp.int32), size), axis=-1)
    return jnp.minimum(first, size - 1)  # a row of NaN has no maximum; stay within the table


def _column(parameter) -> jax.Array:
    """A scalar to [1, 1], an array [B] to [B, 1]."""
    return jnp.asarray(parameter).reshape(-1, 1)


def _unchanged(logits_BV, *_):
    return logits_BV


def _penalize(logits_BV, tokens_BT, num_prompt_tokens, params: SamplingParams):
    repetition, presence, frequency, num_prompt_tokens = map(
        _column, (params.repetition_penalty, params.presence_penalty, params.frequency_penalty, num_prompt_tokens)
    )
    logits_BV = jax.lax.cond(jnp.any(repetition != 1), _penalize_occurred, _unchanged, logits_BV, tokens_BT, repetition)
    of_generated = tokens_BT, num_prompt_tokens, presence, frequency
    used = jnp.any((presence != 0) | (frequency != 0))
    return jax.lax.cond(used, _penalize_generated, _unchanged, logits_BV, *of_generated)


def _penalize_occurred(logits_BV, tokens_BT, penalty):
    """Divides the positive logits of the tokens that occurred by the penalty, multiplies the negative ones."""
    penalized_BV = jnp.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty)
    return jnp.where(_counts(tokens_BT, logits_BV) > 0, penalized_BV, logits_BV)


def _penalize_generated(logits_BV, tokens_BT, num_prompt_tokens, presence, frequency):
    is_generated_BT = jnp.arange(tokens_BT.shape[1]) >= num_prompt_tokens
    counts_BV = _counts(jnp.where(is_generated_BT, tokens_BT, -1), logits_BV)
    return logits_BV - jnp.where(counts_BV > 0, presence + frequency * counts_BV, 0)


def _counts(tokens_BT, logits_BV):
    return _add_at(jnp.zeros_like(logits_BV), tokens_BT, jnp.ones(tokens_BT.shape))


def _forbid(logits_BV, ids_BM):
    return _add_at(logits_BV, ids_BM, jnp.full(ids_BM.shape, -jnp.inf))


def _add_at(x_BV, ids_BM, values_BM):
    """Adds each value to its row at its id; ids outside [0, V) are dropped."""
    # Negative indices would count from the end; past the end, "drop" ignores them.
    ids_BM = jnp.where(ids_BM < 0, x_BV.shape[-1], ids_BM)

    def add(x_V, ids_M, values_M):
        return x_V.at[ids_M].add(values_M, mode="drop")

    # By vmap: with the rows' numbers as a second index, XLA gathers ids and values that are sharded over the rows.
    return jax.vmap(add)(x_BV, ids_BM, values_BM.astype(x_BV.dtype))


def _filter(logits_BV, params: SamplingParams):
    temperature, top_k, top_p, min_p = map(_column, (params.temperature, params.top_k, params.top_p, params.min_p))
    # At less than 1e-30, which is greedy already, quotients would be infinite and thereby equal.
    logits_BV = logits_BV / jnp.where(temperature > 0, jnp.maximum(temperature, 1e-30), 1)
    logits_BV = jax.lax.cond(jnp.any(top_k > 0), _keep_top_k, _unchanged, logits_BV, top_k)
    logits_BV = jax.lax.cond(jnp.any(top_p < 1), _keep_top_p, _unchanged, logits_BV, top_p)
    threshold = jnp.max(logits_BV, axis=-1, keepdims=True) + jnp.log(min_p)  # log(0) = -inf keeps everything
    return jnp.where(logits_BV >= threshold, logits_BV, -jnp.inf)


def _keep_top_k(logits_BV, top_k):
    ordered_BV = _ordered_bits(logits_BV)

    def enough(threshold):
        return jnp.sum(ordered_BV >= threshold, axis=-1, keepdims=True) >= top_k

    return jnp.where((top_k == 0) | (ordered_BV >= _last_threshold(enough, len(logits_BV))), logits_BV, -jnp.inf)


def _keep_top_p(logits_BV, top_p):
    ordered_BV = _ordered_bits(logits_BV)
    probabilities_BV = jax.nn.softmax(logits_BV, axis=-1)

    def enough(threshold):
        return jnp.sum(jnp.where(ordered_BV >= threshold, probabilities_BV, 0), axis=-1, keepdims=True) >= top_p

    return jnp.where((top_p >= 1) | (ordered_BV >= _last_threshold(enough, len(logits_BV))), logits_BV, -jnp.inf)


def _ordered_bits(x: jax.Array) -> jax.Array:
    """float32 to uint32 in the same order, zeros of both signs to the same number."""
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _last_threshold(enough, batch: int) -> jax.Array:
    """The highest uint32 threshold at which a row still has enough, found bit by bit; 0 where it never has.

    Instead of a sort: 32 sums over the row against 50,000 log 50,000 comparisons, and a row sharded over its
    vocabulary stays where it is. Shapes: enough maps [B,1] to booleans [B,1] -> [B,1].
    """

    def set_bit(i, threshold):
        candidate = threshold | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        return jnp.where(enough(candidate), candidate, threshold)

    return jax.lax.fori_loop(0, 32, set_bit, jnp.zeros((batch, 1), jnp.uint32))
