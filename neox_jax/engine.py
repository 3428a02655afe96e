"""Decoding over slots: prompts are prefilled, inserted into free slots, and all slots decode in blocks on the device.

SHAPES  B slots  R rows prefilled together  T prompt length, or tokens fed in a step (the last one and what is drafted)
        S cached length  D model  V vocab  L layers  N heads  H head dim  K steps of a block  M stop ids
Programs are compiled per (rows, prompt bucket) and per engine, and for nothing else: sampling parameters, seeds, stop
ids, biases and the number of tokens wanted are all traced, slot by slot. What a slot gives depends on its own request
alone, whatever its neighbours are. Speculation changes no token: what is drafted is kept only where it is what would
have been sampled anyway, from the same noise.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from neox_jax.attention import cached_attention
from neox_jax.errors import InputError
from neox_jax.kv_cache import KVCache
from neox_jax.model import NeoX
from neox_jax.sampling import SamplingParams, row_keys, sample, top_logprobs
from neox_jax.sharding import constrain, platform

BLOCK_STEPS = 16  # between two looks of the host: enough to hide its work, few enough to stream
SMALLEST_BUCKET = 16
PREFILL_TOKENS = 8192  # of one call, padding included: bounds its memory
SCORED_POSITIONS = 128  # of a row, whose logits are in memory together where a prompt's log probabilities are wanted
MAX_STOP_IDS, MAX_BIASES = 32, 300
NO_TOKEN = -1
LOOKUP_TOKENS = 2  # what prompt lookup looks for: the last so many


@dataclasses.dataclass(frozen=True)
class Request:
    """What is wanted behind a prompt.

    sampling: of plain numbers. seeds: three whole numbers below 2^32 that determine the draws. stop_ids: each ends the
    row; none comes before min_tokens are there. biases: by token id, added to its logit.
    """

    max_new_tokens: int
    sampling: SamplingParams = dataclasses.field(default_factory=SamplingParams)
    seeds: tuple[int, int, int] = (0, 0, 0)
    stop_ids: Sequence[int] = ()
    min_tokens: int = 0
    biases: dict[int, float] = dataclasses.field(default_factory=dict)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Wanted:
    """Requests as arrays, a row each: what the device has to know of them."""

    remaining: jax.Array
    min_tokens: jax.Array
    sampling: SamplingParams
    seeds: jax.Array
    stop_ids: jax.Array
    bias_ids: jax.Array
    biases: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """Everything about all slots between two steps, on the device.

    cache, draft_cache: of the model and of a model that drafts. last_tokens [B] are sampled but not cached yet.
    history [B,S]: prompt and generated tokens by position, -1 where there are none; prompt_lengths [B]. wanted: as it
    was asked, but remaining [B], tokens still wanted; done [B]. num_tokens: ids below it may be sampled.
    """

    cache: KVCache
    draft_cache: KVCache | None
    last_tokens: jax.Array
    history: jax.Array
    prompt_lengths: jax.Array
    wanted: Wanted
    done: jax.Array
    num_tokens: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scores:
    """log probabilities of some tokens [..., M] under the model's own distribution, and of the likeliest there.

    tokens: NO_TOKEN where there is none. top_ids, top_logprobs [..., M, top]: largest first; None where top is 0.
    """

    tokens: jax.Array
    logprobs: jax.Array
    top_ids: jax.Array | None = None
    top_logprobs: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prefilled:
    """Rows that have been through the model, to be inserted into slots, each once or more often.

    tokens [R,T]; lengths [R]; keys, values [L,R,T,N,H], of a drafting model too; logits [R,V] behind the last token.
    scores: of the tokens from the second on [R,T-1], where they were asked for.
    """

    tokens: jax.Array
    lengths: jax.Array
    keys_values: tuple[jax.Array, jax.Array]
    draft_keys_values: tuple[jax.Array, jax.Array] | None
    logits: jax.Array
    scores: Scores | None


class Engine:
    """A model with num_slots rows that decode together, each for a request of its own.

    max_length: of prompt and new tokens; num_tokens: ids below it may be sampled (default: all of the vocabulary).
    top_logprobs: how many of the likeliest tokens come with each. int8_cache: keys and values in 8 bits, with a scale
    for each head of each position. num_drafted: tokens guessed ahead in each step, by `draft`, a smaller model of the
    same tokenizer on the same mesh, or where there is none by looking up what followed the last tokens before.
    Calls return before the device is done; `jax.device_get` of what they return waits. One thread at a time.
    Raises: InputError for sizes that do not fit the model or its mesh.
    """

    def __init__(
        self,
        model: NeoX,
        *,
        num_slots: int,
        max_length: int,
        num_tokens: int | None = None,
        top_logprobs: int = 0,
        int8_cache: bool = False,
        draft: NeoX | None = None,
        num_drafted: int = 0,
        block_steps: int = BLOCK_STEPS,
    ):
        config = model.config
        context = min(one.config.max_position_embeddings for one in (model, draft) if one is not None)
        if not 1 <= max_length <= context:
            raise InputError(f"max_length is {max_length}; wanted 1 to {context}, the model's context")
        if draft is not None and num_drafted < 1:
            raise InputError(f"num_drafted is {num_drafted}; with a model that drafts it must be at least 1")
        if not 0 <= top_logprobs <= config.vocab_size:
            raise InputError(f"top_logprobs is {top_logprobs}; wanted 0 to {config.vocab_size}")
        self.model, self.num_slots, self.max_length = model, num_slots, max_length
        self._models = (model, draft)
        self._options = {"top": top_logprobs, "num_drafted": num_drafted}
        self._block_steps = block_steps
        self._context = context
        num_rows = max(num_slots, least_rows(model))
        self._stopped = np.zeros(num_rows, bool)
        self._slots = _empty_slots(
            self._models,
            np.int32(config.vocab_size if num_tokens is None else num_tokens),
            batch=num_rows,
            # What is drafted is written behind the last token that is wanted.
            length=length_bucket(max_length, context) + num_drafted,
            int8_cache=int8_cache,
        )

    def prefill(self, prompts: Sequence[Sequence[int]], *, scores: bool = False) -> Prefilled:
        """Runs prompts of token ids, one at least in each. scores: their own log probabilities too.

        How many fit in one call depends on the longest (`prefill_rows`).
        Raises: InputError for a prompt that leaves no room for a token within max_length.
        """
        longest = max(map(len, prompts))
        if longest >= self.max_length:
            raise InputError(f"a prompt has {longest} tokens, and max_length is {self.max_length}; it must be shorter")
        rows = batch_bucket(len(prompts), self.model.mesh)
        length = length_bucket(longest, self._context)
        tokens, lengths = np.zeros((rows, length), np.int32), np.ones(rows, np.int32)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)], lengths[row] = prompt, len(prompt)
        top = self._options["top"] if scores else None
        return _prefill(self._models, tokens, lengths, top=top)

    def prefill_rows(self, length: int) -> int:
        """How many prompts of at most this length one call of `prefill` should take."""
        return max(1, PREFILL_TOKENS // length_bucket(length, self._context))

    def insert(
        self, prefilled: Prefilled, slots: Sequence[int], requests: Sequence[Request], rows: Sequence[int] | None = None
    ) -> Scores:
        """Puts rows of what was prefilled (default: the first ones) into slots, whatever was there.

        What is wanted beyond the length of a slot is not generated.
        Returns each one's first token: Scores of [R, 1], one entry a request.
        """
        rows = range(len(slots)) if rows is None else rows
        size = len(prefilled.lengths)
        # Repeated up to a size that is compiled already: to write the first one again changes nothing.
        filled = [list(part) + [part[0]] * (size - len(part)) for part in (rows, slots, requests)]
        self._stopped[list(slots)] = False
        wanted = as_arrays(filled[2])
        places = np.asarray(filled[:2], np.int32)
        self._slots, scores = _insert(self.model, self._slots, prefilled, places, wanted, **self._options)
        return scores

    def decode_block(self) -> Scores:
        """Up to block_steps steps of all slots, fewer when all are done. Returns Scores of [B, K * (1 + num_drafted)].

        A row's tokens are in order, with NO_TOKEN between and behind them. There may be a row more than slots.
        """
        stopped, self._stopped = self._stopped, np.zeros_like(self._stopped)
        self._slots, scores = _decode_block(
            self._models, self._slots, stopped, block_steps=self._block_steps, **self._options
        )
        return scores

    def free(self, slots: Sequence[int]) -> None:
        """Ends what these slots are doing; those that are done are free already."""
        self._stopped[list(slots)] = True

    def warm_up(self, *, rows: Sequence[int] = (1,)) -> None:
        """Compiles everything for prompts of any length, prefilled in calls of so many rows. All slots must be free."""
        lengths = {length_bucket(n, self._context) for n in range(1, self.max_length)}
        for length in sorted(lengths):
            for size in rows:
                prefilled = self.prefill([[0] * min(length, self.max_length - 1)] * size)
                self.insert(prefilled, range(size), [Request(1)] * size)
        self.decode_block()


def length_bucket(length: int, context: int) -> int:
    """The length that arrays are made for: the next power of two, from 16 up to the context."""
    return min(max(SMALLEST_BUCKET, 1 << (length - 1).bit_length()), context)


def batch_bucket(rows: int, mesh) -> int:
    """Rows rounded up to a power of two or, from 8 on, a multiple of 8; then to what divides over the mesh."""
    bucket = 1 << (rows - 1).bit_length() if rows < 8 else math.ceil(rows / 8) * 8
    parts = 1 if mesh is None else mesh.shape.get("data", 1) * mesh.shape.get("fsdp", 1)
    return math.ceil(bucket / parts) * parts


def least_rows(model: NeoX) -> int:
    """How many rows a step should have at least: two, where what is made of a single one is a poor program.

    TPU's compiler copies the fused QKV weights of all layers into another layout for one row (2.2 GB a chip of 20B on
    v5e-8, in every block), and the CPU's products of a 16-bit or int8 matrix with one vector are far slower.
    """
    one_is_fine = platform(model.mesh) == "gpu" or (
        platform(model.mesh) == "cpu" and model.embed_in.embedding.dtype == jnp.float32 and not model.quantization
    )
    return 1 if one_is_fine else 2


def as_arrays(requests: Sequence[Request]) -> Wanted:
    """Raises: InputError for more stop ids or biases than there is room for."""

    def padded(lists, size, what, dtype, padding):
        longest = max(map(len, lists))
        if longest > size:
            raise InputError(f"{longest} {what} are too many; at most {size} are taken")
        return np.asarray([[*one, *[padding] * (size - len(one))] for one in lists], dtype)

    fields = [field.name for field in dataclasses.fields(SamplingParams)]
    dtypes = {"top_k": np.int32}
    sampling = {
        name: np.asarray([getattr(one.sampling, name) for one in requests], dtypes.get(name, np.float32))
        for name in fields
    }
    biases = [list(one.biases.items()) for one in requests]
    return Wanted(
        remaining=np.asarray([one.max_new_tokens for one in requests], np.int32),
        min_tokens=np.asarray([one.min_tokens for one in requests], np.int32),
        sampling=SamplingParams(**sampling),
        seeds=np.asarray([one.seeds for one in requests], np.uint32),
        stop_ids=padded([sorted(one.stop_ids) for one in requests], MAX_STOP_IDS, "stop ids", np.int32, NO_TOKEN),
        bias_ids=padded([[k for k, _ in one] for one in biases], MAX_BIASES, "biases", np.int32, NO_TOKEN),
        biases=padded([[v for _, v in one] for one in biases], MAX_BIASES, "biases", np.float32, 0),
    )


def forward_prompts(model: NeoX, tokens_RT: jax.Array):
    """Runs whole rows. Shapes: [R,T] -> ([R,T,D] before the final norm, (rotated keys, values) [L,R,T,N,H])."""
    tables, attend = model.rotary_tables(jnp.arange(tokens_RT.shape[1])), model.attend()

    def body(x_RTD, layer):
        return layer(x_RTD, tables, attend, model.mesh)

    return jax.lax.scan(body, model.embed(tokens_RT), model.layers)


def extend(model: NeoX, cache: KVCache, tokens_BT: jax.Array):
    """Runs T tokens more of each row behind its cached ones, which are only read.

    Shapes: [B,T] -> ([B,T,D] before the final norm, (rotated keys, values) [L,B,T,N,H]).
    """
    tables = model.rotary_tables(cache.lengths[:, None] + jnp.arange(tokens_BT.shape[1]))

    def body(x_BTD, scanned):
        layer, (keys, values, key_scales, value_scales) = scanned
        attend = functools.partial(
            cached_attention,
            keys_BNHS=keys,
            values_BNHS=values,
            key_scales_BNS=key_scales,
            value_scales_BNS=value_scales,
            lengths_B=cache.lengths,
        )
        return layer(x_BTD, tables, attend, model.mesh)

    return jax.lax.scan(body, model.embed(tokens_BT), (model.layers, cache.layers))


def next_token_logits(model: NeoX, x_BD: jax.Array) -> jax.Array:
    """The head on one position a row: what `model.unembed` gives, with the table as the left operand.

    On the CPU that reads the table at memory speed from 2 rows on (3.2 ms against 4.7 at Pythia-70m's shape and 8
    rows). Without the barrier XLA folds the transpose back into the product and swaps its operands.
    Shapes: [B,D] before the final norm -> float32 [B,V].
    """
    x_BD = model.final_layer_norm(x_BD)
    logits_VB = jnp.einsum("VD,BD->VB", model.head_table.astype(x_BD.dtype), x_BD, preferred_element_type=jnp.float32)
    return model.finish_logits(jax.lax.optimization_barrier(logits_VB).T)


@functools.partial(jax.jit, static_argnames=("batch", "length", "int8_cache"))
def _empty_slots(models, num_tokens, *, batch: int, length: int, int8_cache: bool) -> Slots:
    model, draft = models

    def cache(model: NeoX | None) -> KVCache | None:
        if model is None:
            return None
        config = model.config
        return KVCache.zeros(
            layers=config.num_hidden_layers,
            batch=batch,
            heads=config.num_attention_heads,
            head_dim=config.head_dim,
            length=length,
            dtype=jnp.int8 if int8_cache else model.embed_in.embedding.dtype,
            mesh=model.mesh,
        )

    wanted = jax.tree.map(jnp.asarray, as_arrays([Request(0)] * batch))
    slots = Slots(
        cache=cache(model),
        draft_cache=cache(draft),
        last_tokens=jnp.zeros(batch, jnp.int32),
        history=jnp.full((batch, length), NO_TOKEN, jnp.int32),
        prompt_lengths=jnp.zeros(batch, jnp.int32),
        wanted=wanted,
        done=jnp.ones(batch, bool),
        num_tokens=num_tokens,
    )
    return _pin(slots, model.mesh)


@functools.partial(jax.jit, static_argnames="top")
def _prefill(models, tokens_RT, lengths_R, *, top: int | None) -> Prefilled:
    """top: None where the prompts' own scores are not wanted, else how many of the likeliest tokens."""
    model, draft = models
    x_RTD, keys_values = forward_prompts(model, tokens_RT)
    last_RD = jnp.take_along_axis(x_RTD, (lengths_R - 1)[:, None, None], axis=1)[:, 0]
    scores = None if top is None else _score_prompts(model, x_RTD, tokens_RT, lengths_R, top)
    return Prefilled(
        tokens=tokens_RT,
        lengths=lengths_R,
        keys_values=keys_values,
        draft_keys_values=None if draft is None else forward_prompts(draft, tokens_RT)[1],
        logits=next_token_logits(model, last_RD),
        scores=_everywhere(scores, model.mesh),
    )


def _score_prompts(model: NeoX, x_RTD, tokens_RT, lengths_R, top: int) -> Scores:
    """Scores of tokens 1 to T - 1, a few positions at a time."""
    length = tokens_RT.shape[1] - 1
    size = min(SCORED_POSITIONS, length + 1)
    targets_RT = jnp.roll(tokens_RT, -1, axis=1)

    def score(_, chunk):
        x_RCD, tokens_RC = chunk
        logits = model.unembed(model.final_layer_norm(x_RCD)).reshape(tokens_RC.size, -1)
        scores = _scores(logits, tokens_RC.reshape(-1), top)
        return None, jax.tree.map(lambda part: part.reshape(*tokens_RC.shape, *part.shape[1:]), scores)

    chunks = [
        jnp.swapaxes(x.reshape(len(x), -1, size, *x.shape[2:]), 0, 1)
        for x in (_pad_to(x_RTD, size), _pad_to(targets_RT, size))
    ]
    _, scores = jax.lax.scan(score, None, tuple(chunks))
    scores = jax.tree.map(
        lambda part: jnp.swapaxes(part, 0, 1).reshape(len(tokens_RT), -1, *part.shape[3:])[:, :length], scores
    )
    counts_RT = jnp.arange(1, length + 1) < lengths_R[:, None]
    return dataclasses.replace(scores, tokens=jnp.where(counts_RT, scores.tokens, NO_TOKEN))


def _pad_to(x, size: int):
    """Up to a multiple in the second dim."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % size), *((0, 0),) * (x.ndim - 2)))


@functools.partial(jax.jit, donate_argnames="slots", static_argnames=("top", "num_drafted"))
def _insert(model: NeoX, slots: Slots, prefilled: Prefilled, places, wanted: Wanted, *, top: int, num_drafted: int):
    """places [2,R]: which row of what was prefilled, and the slot that it goes to."""
    mesh, (rows_R, slots_R) = model.mesh, places
    tokens_RT, lengths_R, logits_RV = (
        constrain(part[rows_R], (None,) * part.ndim, mesh)
        for part in (prefilled.tokens, prefilled.lengths, prefilled.logits)
    )

    def filled(cache: KVCache | None, keys_values) -> KVCache | None:
        if cache is None:
            return None
        logical = ("layers", None, "length", "heads", "head_dim")
        keys, values = (constrain(part[:, rows_R], logical, mesh) for part in keys_values)
        return cache.insert(keys, values, lengths_R, slots_R, mesh)

    length = slots.history.shape[1]
    prompts_RT = jnp.where(jnp.arange(tokens_RT.shape[1]) < lengths_R[:, None], tokens_RT, NO_TOKEN)
    history_RS = jnp.full((len(slots_R), length), NO_TOKEN, jnp.int32)
    history_RS = jax.lax.dynamic_update_slice(history_RS, prompts_RT, (0, 0))
    token_R = _sample(
        logits_RV, wanted, positions=lengths_R, history=history_RS, prompt_lengths=lengths_R, num=slots.num_tokens
    )
    remaining_R = jnp.minimum(wanted.remaining, length - num_drafted - lengths_R) - 1
    stopped_R = jnp.any(token_R[:, None] == wanted.stop_ids, axis=1)
    history_RS = history_RS.at[jnp.arange(len(slots_R)), lengths_R].set(token_R)
    new = {
        "last_tokens": token_R,
        "history": history_RS,
        "prompt_lengths": lengths_R,
        "wanted": dataclasses.replace(wanted, remaining=remaining_R),
        "done": stopped_R | (remaining_R <= 0),
    }
    written = jax.tree.map(
        lambda old, rows: old.at[slots_R].set(rows), {name: getattr(slots, name) for name in new}, new
    )
    slots = dataclasses.replace(
        slots,
        cache=filled(slots.cache, prefilled.keys_values),
        draft_cache=filled(slots.draft_cache, prefilled.draft_keys_values),
        **written,
    )
    scores = jax.tree.map(lambda part: part[:, None], _scores(logits_RV, token_R, top))
    return _pin(slots, mesh), _everywhere(scores, mesh)


@functools.partial(jax.jit, donate_argnames="slots", static_argnames=("block_steps", "top", "num_drafted"))
def _decode_block(models, slots: Slots, stopped_B, *, block_steps: int, top: int, num_drafted: int):
    """stopped: rows that the host has ended. Returns (slots, Scores [B, K * T])."""
    slots = dataclasses.replace(slots, done=slots.done | stopped_B)
    given = jax.eval_shape(lambda: _step(models, slots, top=top, num_drafted=num_drafted)[1])
    scores = jax.tree.map(lambda part: jnp.zeros((block_steps, *part.shape), part.dtype), given)
    scores = dataclasses.replace(scores, tokens=jnp.full_like(scores.tokens, NO_TOKEN))

    def go_on(carry):
        i, slots, _ = carry
        return (i < block_steps) & ~jnp.all(slots.done)

    def step(carry):
        i, slots, scores = carry
        slots, given = _step(models, slots, top=top, num_drafted=num_drafted)
        return i + 1, slots, jax.tree.map(lambda part, new: part.at[i].set(new), scores, given)

    _, slots, scores = jax.lax.while_loop(go_on, step, (0, slots, scores))
    scores = jax.tree.map(lambda part: jnp.moveaxis(part, 0, 1).reshape(len(stopped_B), -1, *part.shape[3:]), scores)
    return slots, _everywhere(scores, models[0].mesh)


def _step(models, slots: Slots, *, top: int, num_drafted: int) -> tuple[Slots, Scores]:
    """The last tokens and what is drafted behind them go through the model; each position then samples what it would
    without a draft, and what was drafted counts as far as it is that. Returns (slots, Scores [B,T])."""
    model, draft = models
    batch, mesh = len(slots.done), model.mesh
    drafts_BT, draft_cache = _draft(draft, slots, num_drafted)
    fed_BT = jnp.concatenate([slots.last_tokens[:, None], drafts_BT], axis=1)
    x_BTD, keys_values = extend(model, slots.cache, fed_BT)
    logits_BTV = next_token_logits(model, x_BTD.reshape(-1, x_BTD.shape[-1]))

    # Position by position as rows of their own, each with what is before it.
    num = 1 + num_drafted
    positions_BT = slots.cache.lengths[:, None] + 1 + jnp.arange(num)
    history_BTS = _history(slots.history, slots.cache.lengths, drafts_BT)
    rows = functools.partial(jnp.repeat, repeats=num, axis=0, total_repeat_length=batch * num)
    token_BT = _sample(
        logits_BTV,
        jax.tree.map(rows, slots.wanted) if num_drafted else slots.wanted,
        positions=positions_BT.reshape(-1),
        history=history_BTS.reshape(batch * num, -1),
        prompt_lengths=rows(slots.prompt_lengths) if num_drafted else slots.prompt_lengths,
        num=slots.num_tokens,
    )
    scores = _scores(logits_BTV, token_BT, top)
    scores = jax.tree.map(lambda part: part.reshape(batch, num, *part.shape[1:]), scores)
    token_BT = scores.tokens

    agreed_BT = jnp.cumprod(token_BT[:, :-1] == drafts_BT, axis=1)
    stops_BT = jnp.any(token_BT[:, :, None] == slots.wanted.stop_ids[:, None], axis=2)
    before_stop_BT = jnp.cumsum(stops_BT, axis=1) - stops_BT == 0  # up to the first stop id
    kept_BT = before_stop_BT & (jnp.arange(num) < slots.wanted.remaining[:, None]) & ~slots.done[:, None]
    kept_BT = kept_BT.at[:, 1:].set(kept_BT[:, 1:] & (agreed_BT == 1))
    num_kept_B = kept_BT.sum(axis=1)
    remaining_B = slots.wanted.remaining - num_kept_B
    last_B = jnp.take_along_axis(token_BT, jnp.maximum(num_kept_B - 1, 0)[:, None], axis=1)[:, 0]
    history_BS = slots.history
    for t in range(num):
        here_BS = (jnp.arange(history_BS.shape[1]) == positions_BT[:, t, None]) & kept_BT[:, t, None]
        history_BS = jnp.where(here_BS, token_BT[:, t, None], history_BS)
    cache = slots.cache.append(*keys_values, num_kept_B, mesh)
    slots = dataclasses.replace(
        slots,
        cache=cache,
        # What is behind a row's length is never read, so what was guessed wrongly is taken back by the length.
        draft_cache=None if draft is None else dataclasses.replace(draft_cache, lengths=cache.lengths),
        last_tokens=jnp.where(num_kept_B > 0, last_B, slots.last_tokens),
        history=history_BS,
        wanted=dataclasses.replace(slots.wanted, remaining=remaining_B),
        done=slots.done | jnp.any(stops_BT & kept_BT, axis=1) | (remaining_B <= 0),
    )
    return _pin(slots, mesh), dataclasses.replace(scores, tokens=jnp.where(kept_BT, token_BT, NO_TOKEN))


def _history(history_BS, lengths_B, drafts_BT) -> jax.Array:
    """What is before each position that is sampled, were the drafts right: [B,T,S]."""
    num_drafted = drafts_BT.shape[1]
    places_S = jnp.arange(history_BS.shape[1])
    for t in range(num_drafted):
        history_BS = jnp.where(places_S == lengths_B[:, None] + 1 + t, drafts_BT[:, t, None], history_BS)
    if not num_drafted:
        return history_BS[:, None]
    ends_BT = lengths_B[:, None] + 1 + jnp.arange(1 + num_drafted)
    return jnp.where(places_S < ends_BT[:, :, None], history_BS[:, None], NO_TOKEN)


def _draft(draft: NeoX | None, slots: Slots, num_drafted: int) -> tuple[jax.Array, KVCache | None]:
    """Guesses [B, num_drafted] behind the last tokens, and the drafting model's cache with all that it was fed.

    It draws with the noise and the parameters of the request, and so what the large model will, wherever the two
    distributions are alike.
    """
    if draft is None:
        return _look_up(slots.history, slots.cache.lengths + 1, num_drafted), None

    def guess(carry, _):
        cache, token_B, history_BS = carry
        x_BTD, (keys, values) = extend(draft, cache, token_B[:, None])
        cache = cache.append(keys, values, jnp.ones_like(token_B), draft.mesh)
        token_B = _sample(
            next_token_logits(draft, x_BTD[:, 0]),
            slots.wanted,
            positions=cache.lengths,
            history=history_BS,
            prompt_lengths=slots.prompt_lengths,
            num=slots.num_tokens,
        )
        here_BS = jnp.arange(history_BS.shape[1]) == cache.lengths[:, None]
        return (cache, token_B, jnp.where(here_BS, token_B[:, None], history_BS)), token_B

    # Once more than it guesses, so that the last guess is cached too.
    start = slots.draft_cache, slots.last_tokens, slots.history
    (cache, *_), drafts_TB = jax.lax.scan(guess, start, length=num_drafted + 1)
    return drafts_TB[:-1].T, cache


def _look_up(history_BS, lengths_B, num_drafted: int) -> jax.Array:
    """What followed the last LOOKUP_TOKENS of each row where they stood before; zeros where they did not.

    The latest time that as many tokens follow as are wanted, else the latest.
    """
    batch, size = history_BS.shape
    if not num_drafted:
        return jnp.zeros((batch, 0), jnp.int32)
    places_S = jnp.arange(size)
    last_B = lengths_B[:, None] - 1
    matches_BS = places_S < last_B
    for i in range(LOOKUP_TOKENS):
        wanted_B = jnp.take_along_axis(history_BS, jnp.maximum(last_B - i, 0), axis=1)
        matches_BS &= jnp.roll(history_BS, i, axis=1) == wanted_B
    is_enough_BS = places_S <= last_B - num_drafted
    found_B = jnp.max(jnp.where(matches_BS, places_S + size * is_enough_BS, 0), axis=1) % size
    drafts_BT = jnp.take_along_axis(history_BS, found_B[:, None] + 1 + jnp.arange(num_drafted), axis=1, mode="clip")
    return jnp.maximum(drafts_BT, 0)


def _sample(logits_BV, wanted: Wanted, *, positions, history, prompt_lengths, num) -> jax.Array:
    too_few_B = positions - prompt_lengths < wanted.min_tokens
    return sample(
        logits_BV,
        wanted.sampling,
        keys_B=row_keys(wanted.seeds.T),
        positions_B=positions,
        previous_tokens_BT=history,
        num_tokens=num,
        num_prompt_tokens=prompt_lengths,
        bias_ids_BM=wanted.bias_ids,
        biases_BM=wanted.biases,
        forbidden_ids_BM=jnp.where(too_few_B[:, None], wanted.stop_ids, NO_TOKEN),
    )


def _scores(logits_BV, tokens_B, top: int) -> Scores:
    """Shapes: [B,V], [B] -> Scores of [B]."""
    chosen_B = jnp.take_along_axis(logits_BV, tokens_B[:, None], axis=1)[:, 0]
    logprobs_B = chosen_B - jax.nn.logsumexp(logits_BV, axis=-1)
    return Scores(tokens_B, logprobs_B, *(top_logprobs(logits_BV, top) if top else (None, None)))


def _everywhere(scores: Scores | None, mesh) -> Scores | None:
    """On every device, so that each of several processes can read them."""
    return jax.tree.map(lambda part: constrain(part, (None,) * part.ndim, mesh), scores)


def _pin(slots: Slots, mesh) -> Slots:
    """Slots after any call have the shardings that the next call was compiled for."""

    def pin(part):
        return constrain(part, ("batch",) + (None,) * (part.ndim - 1), mesh)

    by_slot = {
        name: jax.tree.map(pin, getattr(slots, name))
        for name in ("last_tokens", "history", "prompt_lengths", "wanted", "done")
    }
    return dataclasses.replace(slots, **by_slot)
