"""From logits to the next token: every parameter is traced and per row, so no setting ever recompiles.

SHAPES  B batch  T tokens so far  V vocab
Filtered logits are -inf. The order is transformers': repetition penalty, temperature, top-k, top-p, min-p.
"""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How to choose a token: scalars, or arrays [B]. The defaults change nothing but draw from the whole distribution.

    temperature 0 is greedy; top_k 0, top_p 1, min_p 0 and repetition_penalty 1 are off.
    """

    temperature: jax.Array | float = 1.0
    top_k: jax.Array | int = 0
    top_p: jax.Array | float = 1.0
    min_p: jax.Array | float = 0.0
    repetition_penalty: jax.Array | float = 1.0


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
) -> jax.Array:
    """Draws each row's next token, or takes the likeliest where its temperature is 0.

    The draw uses fold_in(key of the row, position), position being where in the sequence the token will stand.
    Ids from num_tokens on (rows of the table that no token uses) are never chosen.
    Shapes: logits [B,V] float32, keys and positions [B], previous tokens [B,T] (-1 is padding) -> [B] int32.
    """
    logits_BV = jnp.where(jnp.arange(logits_BV.shape[-1]) < num_tokens, logits_BV, -jnp.inf)

    def greedy(logits_BV):
        return argmax(logits_BV)

    def general(logits_BV):
        processed_BV = process_logits(logits_BV, previous_tokens_BT, **_fields(params))
        keys = jax.vmap(jax.random.fold_in)(keys_B, positions_B)
        noise_BV = jax.vmap(lambda key: jax.random.gumbel(key, processed_BV.shape[-1:]))(keys)
        return argmax(processed_BV + jnp.where(_column(params.temperature) > 0, noise_BV, 0))

    plain = jnp.all(jnp.asarray(params.temperature) == 0) & jnp.all(jnp.asarray(params.repetition_penalty) == 1)
    return jax.lax.cond(plain, greedy, general, logits_BV)


def process_logits(
    logits_BV: jax.Array,
    previous_tokens_BT: jax.Array,
    *,
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    min_p=0.0,
    repetition_penalty=1.0,
) -> jax.Array:
    """The logits that a token is drawn from, equal to what transformers' processors give.

    Each parameter is a scalar or an array [B], as in SamplingParams; temperature 0 leaves the scale alone, for the
    caller to take the maximum. Previous tokens outside [0, V), such as a padding of -1, are not counted. Tokens that
    tie with the last one kept by top-k or top-p are kept too.
    Shapes: logits [B,V], previous tokens [B,T] integers -> [B,V] float32.
    """
    logits_BV = logits_BV.astype(jnp.float32)
    temperature, top_k, top_p, min_p, penalty = map(_column, (temperature, top_k, top_p, min_p, repetition_penalty))
    logits_BV = jax.lax.cond(jnp.any(penalty != 1), _penalize, _unchanged, logits_BV, previous_tokens_BT, penalty)
    logits_BV = logits_BV / jnp.where(temperature > 0, temperature, 1)
    logits_BV = jax.lax.cond(jnp.any(top_k > 0), _keep_top_k, _unchanged, logits_BV, top_k)
    logits_BV = jax.lax.cond(jnp.any(top_p < 1), _keep_top_p, _unchanged, logits_BV, top_p)
    threshold = jnp.max(logits_BV, axis=-1, keepdims=True) + jnp.log(min_p)  # log(0) = -inf keeps everything
    return jnp.where(logits_BV >= threshold, logits_BV, -jnp.inf)


def argmax(x_BV: jax.Array) -> jax.Array:
    """The first index of each row's maximum. Shapes: [B,V] -> [B] int32.

    Two plain reductions, because XLA's own argmax reduces pairs, which the CPU does not vectorise (4 times slower).
    """
    size = x_BV.shape[-1]
    at_maximum = x_BV >= jnp.max(x_BV, axis=-1, keepdims=True)
    first = jnp.min(jnp.where(at_maximum, jnp.arange(size, dtype=jnp.int32), size), axis=-1)
    return jnp.minimum(first, size - 1)  # a row of NaN has no maximum; stay within the table


def _fields(params: SamplingParams) -> dict:
    return {field.name: getattr(params, field.name) for field in dataclasses.fields(params)}


def _column(parameter) -> jax.Array:
    """A scalar to [1, 1], an array [B] to [B, 1]."""
    return jnp.asarray(parameter).reshape(-1, 1)


def _unchanged(logits_BV, *_):
    return logits_BV


def _penalize(logits_BV, previous_tokens_BT, penalty):
    """Divides the positive logits of the tokens that occurred by the penalty, multiplies the negative ones."""
    batch, size = logits_BV.shape
    # Negative indices would count from the end; past the end, "drop" ignores them.
    tokens_BT = jnp.where(previous_tokens_BT < 0, size, previous_tokens_BT)
    occurred_BV = jnp.zeros((batch, size), bool)
    occurred_BV = occurred_BV.at[jnp.arange(batch)[:, None], tokens_BT].set(True, mode="drop")
    return jnp.where(occurred_BV, jnp.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty), logits_BV)


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
    """float32 to uint32 in the same order."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
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
