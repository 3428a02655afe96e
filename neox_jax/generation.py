"""From prompts to completions: one prefill, then blocks of decoding steps that stay on the device.

SHAPES  B batch (rows)  T prompt length  S cached length  D model  V vocab  L layers  N heads  H head dim  K steps
Programs are compiled per (rows, prompt bucket, cache bucket) and for nothing else: sampling parameters, seeds, stop
ids and the number of tokens wanted are all traced. The host reads one block at a time, to stream and to look for stop
strings.
"""

import dataclasses
import functools
import math
import zlib
from collections import Counter
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from neox_jax.attention import cached_attention, causal_attention
from neox_jax.config import ModelConfig
from neox_jax.errors import InputError
from neox_jax.kv_cache import KVCache
from neox_jax.model import NeoX, mask_padding
from neox_jax.sampling import SamplingParams, row_keys, sample
from neox_jax.sharding import constrain
from neox_jax.tokenizer import StreamDecoder

BLOCK_STEPS = 16  # tokens a row between two looks of the host: enough to hide its work, few enough to stream
SMALLEST_BUCKET = 16
STOP_ID_BUCKET = 8
NO_TOKEN = -1


@dataclasses.dataclass(frozen=True)
class Completion:
    """What was generated for one prompt: the prompt and the stop id are not in it.

    logprobs: of each token under the model's own distribution, before temperature and filters. finish_reason: "stop"
    (a stop id or string) or "length".
    """

    text: str
    tokens: list[int]
    logprobs: list[float]
    finish_reason: str


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """Everything about a batch between two steps, on the device.

    last_tokens [B] are sampled but not in the cache yet. history [B,S]: prompt and generated tokens by position, -1
    where there are none. remaining [B]: tokens still wanted; done [B]. The rest never changes: seeds [3,B] (of
    `sampling.row_keys`), params, stop_ids [M] (-1 is padding), num_tokens: ids below it may be sampled.
    """

    cache: KVCache
    last_tokens: jax.Array
    history: jax.Array
    remaining: jax.Array
    done: jax.Array
    seeds: jax.Array
    params: SamplingParams
    stop_ids: jax.Array
    num_tokens: jax.Array


def generate(
    model: NeoX,
    tok,
    prompts: Sequence[str | Sequence[int]],
    *,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    stop: str | int | Sequence[str | int] = (),
    ignore_eos: bool = False,
    n: int = 1,
    stream: Callable[[int, str], None] | None = None,
    batch_size: int = 64,
) -> list[Completion]:
    """Continues each prompt n times; the completions stand prompt by prompt, len(prompts) * n of them.

    prompts: strings or lists of token ids; tok may be None where all are ids and no stop is a string (text is then
    ""). temperature 0 is greedy. stop: strings or ids, besides the end-of-text id (the tokenizer's, else the
    config's), which ignore_eos turns off; text ends before a stop string, while tokens keep the one that completed it.
    stream(i, piece) is called with text of completion i as soon as it is certain; the pieces add up to its text.
    batch_size: at most so many completions are decoded together.
    A completion depends on its prompt and on seed, not on the other prompts or on where it stands among them; of
    equal prompts, each draws its own.
    Raises: InputError for anything out of range, and for a prompt that with max_new_tokens is over the context.
    """
    _check_parameters(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        n=n,
        batch_size=batch_size,
    )
    stop_ids, stop_strings = _split_stops(stop, tok, model.config)
    ids = _encode_prompts(prompts, tok, model.config, max_new_tokens)
    eos = model.config.eos_token_id if tok is None or tok.eos_token_id is None else tok.eos_token_id
    if eos is not None and not ignore_eos:
        stop_ids.add(eos)
    params = SamplingParams(
        temperature=np.float32(temperature),
        top_k=np.int32(min(top_k, model.config.vocab_size)),
        top_p=np.float32(top_p),
        min_p=np.float32(min_p),
        repetition_penalty=np.float32(repetition_penalty),
    )
    num_tokens = model.config.vocab_size if tok is None else min(tok.vocab_size, model.config.vocab_size)

    seen, numbered = Counter(), []
    for prompt in ids:
        numbered += [(prompt, seen[tuple(prompt)] + i) for i in range(n)]
        seen[tuple(prompt)] += n
    rows = []
    for i, (prompt, sample_number) in enumerate(numbered):
        text = _TextSoFar(tok, stop_strings, functools.partial(stream, i) if stream else _ignore)
        rows.append(_Row(prompt, sample_number, text, frozenset(stop_ids), max_new_tokens))
    for first in range(0, len(rows), batch_size):
        _run(model, rows[first : first + batch_size], params, seed=seed, num_tokens=num_tokens)
    return [Completion(row.text.certain, row.tokens, row.logprobs, row.finish_reason) for row in rows]


def prefill(model: NeoX, tokens_BT: jax.Array, lengths_B: jax.Array, *, cache_length: int) -> tuple[jax.Array, KVCache]:
    """Runs the prompts, padded on the right, of which the first lengths[b] tokens count.

    Shapes: tokens [B,T], lengths [B] -> (float32 logits [B,V] behind each prompt's last token, the cache).
    """
    config, mesh = model.config, model.mesh
    tables = model.rotary_tables(jnp.arange(tokens_BT.shape[1]))

    def body(x_BTD, layer):
        return layer(x_BTD, tables, causal_attention, mesh)

    x_BTD, (keys_LBTNH, values_LBTNH) = jax.lax.scan(body, model.embed(tokens_BT), model.layers)
    last_BD = jnp.take_along_axis(x_BTD, (lengths_B - 1)[:, None, None], axis=1)[:, 0]
    cache = KVCache.zeros(
        layers=config.num_hidden_layers,
        batch=len(tokens_BT),
        heads=config.num_attention_heads,
        head_dim=config.head_dim,
        length=cache_length,
        dtype=keys_LBTNH.dtype,
        mesh=mesh,
    )
    cache = cache.fill(keys_LBTNH, values_LBTNH, lengths_B, mesh)
    return next_token_logits(model, last_BD), cache


def decode_step(model: NeoX, cache: KVCache, tokens_B: jax.Array, *, active_B: jax.Array) -> tuple[jax.Array, KVCache]:
    """Runs one token more of each row. Rows that are not active compute as well, but their length stays.

    Shapes: tokens [B], active [B] booleans -> (float32 logits [B,V], the cache).
    """
    mesh = model.mesh
    tables = model.rotary_tables(cache.lengths[:, None])

    def body(x_BTD, scanned):
        layer, keys_BNHS, values_BNHS = scanned
        attend = functools.partial(
            cached_attention, keys_BNHS=keys_BNHS, values_BNHS=values_BNHS, lengths_B=cache.lengths
        )
        return layer(x_BTD, tables, attend, mesh)

    scanned = (model.layers, cache.keys, cache.values)
    x_BTD, (keys_LBTNH, values_LBTNH) = jax.lax.scan(body, model.embed(tokens_B[:, None]), scanned)
    cache = cache.append(keys_LBTNH[:, :, 0], values_LBTNH[:, :, 0], active_B.astype(jnp.int32), mesh)
    return next_token_logits(model, x_BTD[:, 0]), cache


def next_token_logits(model: NeoX, x_BD: jax.Array) -> jax.Array:
    """The head on one position a row: what `model.unembed` gives, with the table as the left operand.

    On the CPU that reads the table at memory speed from 2 rows on (3.2 ms against 4.7 at Pythia-70m's shape and 8
    rows). Without the barrier XLA folds the transpose back into the product and swaps its operands.
    Shapes: [B,D] before the final norm -> float32 [B,V].
    """
    x_BD = model.final_layer_norm(x_BD)
    logits_VB = jnp.einsum("VD,BD->VB", model.head.astype(x_BD.dtype), x_BD, preferred_element_type=jnp.float32)
    return mask_padding(jax.lax.optimization_barrier(logits_VB).T, model.config)


@functools.partial(jax.jit, static_argnames="cache_length")
def _start(model: NeoX, tokens_BT, lengths_B, wanted: dict, *, cache_length: int):
    """Prefill and the first token. Returns (state, tokens [B,1], logprobs [B,1]).

    wanted: the fields of DecodeState that the host knows; rows with nothing remaining are padding.
    """
    logits_BV, cache = prefill(model, tokens_BT, lengths_B, cache_length=cache_length)
    batch, length = tokens_BT.shape
    history_BS = jnp.full((batch, cache_length), NO_TOKEN, jnp.int32)
    prompt_BT = jnp.where(jnp.arange(length) < lengths_B[:, None], tokens_BT, NO_TOKEN)
    state = DecodeState(
        cache=cache,
        last_tokens=jnp.zeros(batch, jnp.int32),
        history=jax.lax.dynamic_update_slice(history_BS, prompt_BT, (0, 0)),
        done=wanted["remaining"] == 0,
        **wanted,
    )
    state, token_B, logprob_B = _choose(state, logits_BV, model.mesh)
    return state, token_B[:, None], logprob_B[:, None]


@functools.partial(jax.jit, donate_argnames="state")
def _decode_block(model: NeoX, state: DecodeState, stopped_B):
    """Up to BLOCK_STEPS tokens a row, fewer when all rows are done.

    stopped: rows that the host has ended. Returns (state, tokens [B,K], logprobs [B,K]), NO_TOKEN where a row was
    done before.
    """
    state = dataclasses.replace(state, done=state.done | stopped_B)
    batch = len(state.done)
    tokens_KB = jnp.full((BLOCK_STEPS, batch), NO_TOKEN, jnp.int32)
    logprobs_KB = jnp.zeros((BLOCK_STEPS, batch), jnp.float32)

    def go_on(carry):
        i, state, *_ = carry
        return (i < BLOCK_STEPS) & ~jnp.all(state.done)

    def step(carry):
        i, state, tokens_KB, logprobs_KB = carry
        logits_BV, cache = decode_step(model, state.cache, state.last_tokens, active_B=~state.done)
        state, token_B, logprob_B = _choose(dataclasses.replace(state, cache=cache), logits_BV, model.mesh)
        return i + 1, state, tokens_KB.at[i].set(token_B), logprobs_KB.at[i].set(logprob_B)

    _, state, tokens_KB, logprobs_KB = jax.lax.while_loop(go_on, step, (0, state, tokens_KB, logprobs_KB))
    return state, tokens_KB.T, logprobs_KB.T


def _choose(state: DecodeState, logits_BV, mesh):
    """Samples behind the last cached token. Returns (state, tokens [B], their log probabilities [B])."""
    positions_B = state.cache.lengths
    token_B = sample(
        logits_BV,
        state.params,
        keys_B=row_keys(state.seeds),
        positions_B=positions_B,
        previous_tokens_BT=state.history,
        num_tokens=state.num_tokens,
    )
    token_B = constrain(token_B, ("batch",), mesh)
    logprob_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=1)[:, 0] - jax.nn.logsumexp(logits_BV, axis=-1)
    remaining_B = state.remaining - ~state.done
    stopped_B = jnp.any(token_B[:, None] == state.stop_ids, axis=1)
    here_BS = jnp.arange(state.history.shape[1]) == positions_B[:, None]
    history_BS = jnp.where(here_BS & ~state.done[:, None], token_B[:, None], state.history)
    # Pinned, so that a state that went through a block has the shardings that the block was compiled for.
    chosen = dataclasses.replace(
        state,
        last_tokens=token_B,
        history=constrain(history_BS, ("batch", "length"), mesh),
        remaining=constrain(remaining_B, ("batch",), mesh),
        done=constrain(state.done | stopped_B | (remaining_B == 0), ("batch",), mesh),
    )
    return chosen, jnp.where(state.done, NO_TOKEN, token_B), logprob_B


class _TextSoFar:
    """The text of one completion: hands out what is certain, holds back what may yet become a stop string."""

    def __init__(self, tok, stop_strings: Sequence[str], emit: Callable[[str], None]):
        self.certain = ""
        self.stopped = False
        self._held = ""
        self._stop_strings = stop_strings
        self._emit = emit
        self._decoder = None if tok is None else StreamDecoder(tok)

    def push(self, token: int) -> None:
        if self._decoder is not None:
            self._add(self._decoder.push(token))

    def finish(self) -> None:
        """Ends the text: nothing more can complete what was held back."""
        if self._decoder is not None and not self.stopped:
            self._add(self._decoder.flush())
            self._release(len(self._held))

    def _add(self, piece: str) -> None:
        self._held += piece
        found = [at for at in map(self._held.find, self._stop_strings) if at >= 0]
        if found:
            self._release(min(found))
            self._held, self.stopped = "", True
        else:
            self._release(len(self._held) - self._num_undecided())

    def _num_undecided(self) -> int:
        """How many last characters are the beginning of a stop string."""
        longest = max(map(len, self._stop_strings), default=1) - 1
        for size in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-size:]) for stop in self._stop_strings):
                return size
        return 0

    def _release(self, size: int) -> None:
        piece, self._held = self._held[:size], self._held[size:]
        if piece:
            self.certain += piece
            self._emit(piece)


@dataclasses.dataclass
class _Row:
    """One completion on the host while it is being generated; finish_reason is empty until it is done."""

    prompt: list[int]
    sample_number: int
    text: _TextSoFar
    stop_ids: frozenset[int]
    max_new_tokens: int
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    finish_reason: str = ""

    def take(self, tokens: Sequence[int], logprobs: Sequence[float]) -> None:
        """Reads what the device gave, up to the first reason to stop."""
        for token, logprob in zip(tokens, logprobs, strict=True):
            if self.finish_reason or token == NO_TOKEN:
                return
            if math.isnan(logprob):
                raise InputError("the model gives logits that are not numbers; check its weights, or try float32")
            if token in self.stop_ids:
                self._finish("stop")
                return
            self.tokens.append(token)
            self.logprobs.append(logprob)
            self.text.push(token)
            if self.text.stopped:
                self.finish_reason = "stop"
            elif len(self.tokens) == self.max_new_tokens:
                self._finish("length")

    def _finish(self, reason: str) -> None:
        self.text.finish()
        self.finish_reason = "stop" if self.text.stopped else reason


def _run(model: NeoX, rows: list[_Row], params: SamplingParams, *, seed: int, num_tokens: int) -> None:
    """Generates for these rows together until all are done."""
    context = model.config.max_position_embeddings
    batch = _batch_bucket(len(rows), model.mesh)
    longest, max_new_tokens = max(len(row.prompt) for row in rows), rows[0].max_new_tokens
    tokens_BT = np.zeros((batch, length_bucket(longest, context)), np.int32)
    lengths_B, remaining_B = np.ones(batch, np.int32), np.zeros(batch, np.int32)
    seeds = np.zeros((3, batch), np.uint32)
    seeds[0] = seed
    for i, row in enumerate(rows):
        tokens_BT[i, : len(row.prompt)] = row.prompt
        lengths_B[i], remaining_B[i] = len(row.prompt), max_new_tokens
        seeds[1:, i] = zlib.crc32(np.asarray(row.prompt, "<i4").tobytes()), row.sample_number
    stop_ids = sorted(rows[0].stop_ids)
    stop_ids += [NO_TOKEN] * (-len(stop_ids) % STOP_ID_BUCKET if stop_ids else STOP_ID_BUCKET)
    wanted = {
        "remaining": remaining_B,
        "seeds": seeds,
        "params": params,
        "stop_ids": np.asarray(stop_ids, np.int32),
        "num_tokens": np.int32(num_tokens),
    }
    cache_length = length_bucket(longest + max_new_tokens, context)
    state, *given = _start(model, tokens_BT, lengths_B, wanted, cache_length=cache_length)
    while True:
        tokens_BK, logprobs_BK = jax.device_get(given)
        for row, tokens, logprobs in zip(rows, tokens_BK.tolist(), logprobs_BK.tolist(), strict=False):
            row.take(tokens, logprobs)
        stopped_B = np.asarray([i >= len(rows) or rows[i].finish_reason != "" for i in range(batch)])
        if stopped_B.all():
            return
        state, *given = _decode_block(model, state, stopped_B)


def length_bucket(length: int, context: int) -> int:
    """The length that arrays are made for: the next power of two, from 16 up to the context."""
    return min(max(SMALLEST_BUCKET, 1 << (length - 1).bit_length()), context)


def _batch_bucket(rows: int, mesh) -> int:
    """Rows rounded up to a power of two or, from 8 on, a multiple of 8; then to what divides over the mesh."""
    bucket = 1 << (rows - 1).bit_length() if rows < 8 else math.ceil(rows / 8) * 8
    parts = 1 if mesh is None else mesh.shape.get("data", 1) * mesh.shape.get("fsdp", 1)
    return math.ceil(bucket / parts) * parts


def _check_parameters(**values) -> None:
    for name, least in {"max_new_tokens": 1, "top_k": 0, "n": 1, "batch_size": 1, "seed": 0}.items():
        if not _is_whole(values[name]) or values[name] < least:
            raise InputError(f"{name} is {values[name]!r}; it must be a whole number, at least {least}")
    if values["seed"] >= 2**32:
        raise InputError(f"seed is {values['seed']}; it must be below 2**32")
    ranges = {
        "temperature": (lambda x: 0 <= x < math.inf, "0 (greedy) or above"),
        "top_p": (lambda x: 0 < x <= 1, "above 0, at most 1 (off)"),
        "min_p": (lambda x: 0 <= x <= 1, "from 0 (off) to 1"),
        "repetition_penalty": (lambda x: 0 < x < math.inf, "above 0; 1 is off"),
    }
    for name, (holds, wanted) in ranges.items():
        value = values[name]
        if not isinstance(value, (int, float, np.number)) or isinstance(value, bool) or not holds(value):
            raise InputError(f"{name} is {value!r}; it must be a number {wanted}")


def _is_whole(value) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _split_stops(stop, tok, config: ModelConfig) -> tuple[set[int], list[str]]:
    stops = [stop] if isinstance(stop, str) or _is_whole(stop) else list(stop)
    ids, strings = set(), []
    for item in stops:
        if isinstance(item, str) and item:
            strings.append(item)
        elif _is_whole(item) and 0 <= item < config.vocab_size:
            ids.add(int(item))
        else:
            raise InputError(f"stop {item!r} is neither a text nor a token id from 0 to {config.vocab_size - 1}")
    if strings and tok is None:
        raise InputError(f"stop {strings[0]!r} is a text, which needs a tokenizer; give tok, or stop at token ids")
    return ids, strings


def _encode_prompts(prompts, tok, config: ModelConfig, max_new_tokens: int) -> list[list[int]]:
    if isinstance(prompts, str) or any(map(_is_whole, prompts)):
        raise InputError("prompts is a single prompt; it must be a list of prompts: put it in brackets")
    encoded = []
    for i, prompt in enumerate(prompts):
        if isinstance(prompt, str) and tok is None:
            raise InputError(f"prompt {i} is a text, which needs a tokenizer; give tok, or a list of token ids")
        ids = tok.encode(prompt) if isinstance(prompt, str) else list(prompt)
        if not ids:
            raise InputError(f"prompt {i} is empty; it must have at least one token to go on from")
        wrong = [token for token in ids if not _is_whole(token) or not 0 <= token < config.vocab_size]
        if wrong:
            raise InputError(f"prompt {i} has token id {wrong[0]!r}; ids are from 0 to {config.vocab_size - 1}")
        if len(ids) + max_new_tokens > config.max_position_embeddings:
            raise InputError(
                f"prompt {i} has {len(ids)} tokens, which with max_new_tokens {max_new_tokens} is over the model's "
                f"context of {config.max_position_embeddings}; shorten the prompt or lower max_new_tokens"
            )
        encoded.append([int(token) for token in ids])
    return encoded


def _ignore(piece: str) -> None:
    pass
