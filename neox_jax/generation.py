"""From prompts to completions: text, stops and limits, over the slots of an `Engine`."""

import dataclasses
import functools
import math
import zlib
from collections import Counter, deque
from collections.abc import Callable, Collection, Sequence

import jax
import numpy as np

from neox_jax.config import ModelConfig
from neox_jax.engine import NO_TOKEN, Engine, Request, Scores, batch_bucket, length_bucket
from neox_jax.errors import InputError
from neox_jax.model import NeoX
from neox_jax.sampling import SamplingParams
from neox_jax.tokenizer import StreamDecoder

MAX_TOP_LOGPROBS = 100


@dataclasses.dataclass(frozen=True)
class Completion:
    """What was generated for one prompt: the prompt and the stop id are not in it.

    logprobs: of each token under the model's own distribution, before temperature and filters. finish_reason: "stop"
    (a stop id or string) or "length". top_logprobs: for each token the likeliest ones there, id to log probability,
    largest first. prompt_logprobs, prompt_top_logprobs: the same of the prompt's tokens, None for the first. All None
    where they were not asked for.
    """

    text: str
    tokens: list[int]
    logprobs: list[float]
    finish_reason: str
    top_logprobs: list[dict[int, float]] | None = None
    prompt_logprobs: list[float | None] | None = None
    prompt_top_logprobs: list[dict[int, float] | None] | None = None


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
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    logit_bias: dict[int, float] | None = None,
    seed: int = 0,
    stop: str | int | Sequence[str | int] = (),
    ignore_eos: bool = False,
    min_tokens: int = 0,
    n: int = 1,
    top_logprobs: int = 0,
    prompt_logprobs: bool = False,
    stream: Callable[[int, str], None] | None = None,
    done: Callable[[int, Completion], None] | None = None,
    skip: Collection[int] = (),
    batch_size: int = 64,
    int8_cache: bool = False,
    draft: NeoX | None = None,
    num_drafted: int = 0,
) -> list[Completion]:
    """Continues each prompt n times; the completions stand prompt by prompt, len(prompts) * n of them.

    prompts: strings or lists of token ids; tok may be None where all are ids and no stop is a string (text is then
    ""). temperature 0 is greedy. presence_penalty and frequency_penalty count what was generated; logit_bias is added
    by token id. stop: strings or ids, besides the end-of-text id (the tokenizer's, else the config's), which
    ignore_eos turns off; text ends before a stop string, while tokens keep the one that completed it; no stop id comes
    before min_tokens are there. top_logprobs: so many of the likeliest tokens beside each; prompt_logprobs: those of
    the prompt as well.
    stream(i, piece) is called with text of completion i as soon as it is certain; the pieces add up to its text.
    done(i, completion) is called when it is complete, in the order in which they become so. skip: numbers of
    completions that are not to be made; the others are what they would have been, and stand in the list alone.
    batch_size: at most so many completions are decoded together. int8_cache: half the memory and traffic of a 16-bit
    KV cache. num_drafted: tokens guessed ahead, by a smaller model of the same tokenizer (draft) or by looking up what
    followed before; that changes the speed and no token.
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
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        seed=seed,
        min_tokens=min_tokens,
        n=n,
        top_logprobs=top_logprobs,
        batch_size=batch_size,
        num_drafted=num_drafted,
    )
    stop_ids, stop_strings = _split_stops(stop, tok, model.config)
    ids = _encode_prompts(prompts, tok, model.config, max_new_tokens)
    eos = model.config.eos_token_id if tok is None or tok.eos_token_id is None else tok.eos_token_id
    if eos is not None and not ignore_eos:
        stop_ids.add(eos)
    request = Request(
        max_new_tokens,
        SamplingParams(
            temperature=temperature,
            top_k=min(top_k, model.config.vocab_size),
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
        ),
        stop_ids=frozenset(stop_ids),
        min_tokens=min_tokens,
        biases=_check_biases(logit_bias, model.config),
    )
    seen, rows = Counter(), []
    for i, prompt in enumerate(prompt for prompt in ids for _ in range(n)):
        # The row's draws depend on the prompt, on how many equal ones came before, and on the seed.
        seeds = (seed, zlib.crc32(np.asarray(prompt, "<u4").tobytes()), seen[tuple(prompt)])
        seen[tuple(prompt)] += 1
        if i not in skip:
            text = _TextSoFar(tok, stop_strings, functools.partial(stream, i) if stream else _ignore)
            ended = functools.partial(done, i) if done else _ignore
            rows.append(_Row(prompt, dataclasses.replace(request, seeds=seeds), text, ended, top_logprobs > 0))
    if not rows:
        return []
    engine = Engine(
        model,
        num_slots=batch_bucket(min(len(rows), batch_size), model.mesh),
        max_length=max(map(len, ids)) + max_new_tokens,
        num_tokens=model.config.vocab_size if tok is None else min(tok.vocab_size, model.config.vocab_size),
        top_logprobs=top_logprobs,
        int8_cache=int8_cache,
        draft=draft,
        num_drafted=num_drafted,
    )
    run(engine, rows, scores=prompt_logprobs)
    return [row.completion() for row in rows]


def run(engine: Engine, rows: Sequence["_Row"], *, scores: bool) -> None:
    """Keeps the engine's slots filled with rows until all are finished. scores: of the prompts too.

    What the device gave is read one call late, so that it never waits for the host.
    """
    waiting, free, taken = deque(rows), list(range(engine.num_slots)), {}
    in_flight = deque()  # (Scores on the device, which row each of its rows is)
    while waiting or taken:
        while waiting and free:
            group = _next_group(engine, waiting, len(free))
            slots = [free.pop(0) for _ in group]
            prompts = {tuple(row.prompt): i for i, row in enumerate({tuple(r.prompt): r for r in group}.values())}
            prefilled = engine.prefill([list(prompt) for prompt in prompts], scores=scores)
            places = [prompts[tuple(row.prompt)] for row in group]
            size = len(prefilled.lengths)
            for first in range(0, len(group), size):
                part = slice(first, first + size)
                given = engine.insert(prefilled, slots[part], [row.request for row in group[part]], places[part])
                in_flight.append((given, list(enumerate(group[part]))))
            if scores:
                for row, place in zip(group, places, strict=True):
                    row.take_prompt(jax.tree.map(lambda part, place=place: part[place], prefilled.scores))
            taken |= dict(zip(slots, group, strict=True))
        in_flight.append((engine.decode_block(), list(taken.items())))
        while len(in_flight) > 1:
            given, readers = in_flight.popleft()
            _read(given, [reader for reader in readers if not reader[1].finish_reason])
        ended = [slot for slot, row in taken.items() if row.finish_reason]
        engine.free(ended)
        for slot in ended:
            del taken[slot]
        free += ended


def _next_group(engine: Engine, waiting: deque, num_free: int) -> list["_Row"]:
    """The rows to prefill next: the first one that waits, and others whose prompts go into the same length."""
    context = engine.model.config.max_position_embeddings
    bucket = length_bucket(len(waiting[0].prompt), context)
    most = min(num_free, engine.prefill_rows(bucket))
    group = [row for row in waiting if length_bucket(len(row.prompt), context) == bucket][:most]
    chosen = set(map(id, group))
    rest = [row for row in waiting if id(row) not in chosen]
    waiting.clear()
    waiting.extend(rest)
    return group


def _read(given: Scores, readers: list[tuple[int, "_Row"]]) -> None:
    if not readers:
        return
    given = jax.device_get(given)
    for i, row in readers:
        row.take(jax.tree.map(lambda part, i=i: part[i], given))


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
    request: Request
    text: _TextSoFar
    ended: Callable[[Completion], None]
    with_top: bool
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    top_logprobs: list[dict[int, float]] = dataclasses.field(default_factory=list)
    prompt_scores: Scores | None = None
    finish_reason: str = ""

    def take_prompt(self, scores: Scores) -> None:
        """scores: of the prompt from its second token on, on the device."""
        self.prompt_scores = scores

    def take(self, scores: Scores) -> None:
        """Reads what the device gave, up to the first reason to stop. Shapes: [M]."""
        for i, token in enumerate(scores.tokens.tolist()):
            if self.finish_reason:
                return
            if token == NO_TOKEN:
                continue
            logprob = float(scores.logprobs[i])
            if math.isnan(logprob):
                raise InputError("the model gives logits that are not numbers; check its weights, or try float32")
            if token in self.request.stop_ids:
                self._finish("stop")
                return
            self.tokens.append(token)
            self.logprobs.append(logprob)
            if self.with_top:
                self.top_logprobs.append(_as_dict(scores, i))
            self.text.push(token)
            if self.text.stopped:
                self._finish("stop")
            elif len(self.tokens) == self.request.max_new_tokens:
                self._finish("length")

    def completion(self) -> Completion:
        scores = None if self.prompt_scores is None else jax.device_get(self.prompt_scores)
        places = range(len(self.prompt) - 1)
        return Completion(
            self.text.certain,
            self.tokens,
            self.logprobs,
            self.finish_reason,
            self.top_logprobs if self.with_top else None,
            None if scores is None else [None, *(float(scores.logprobs[i]) for i in places)],
            [None, *(_as_dict(scores, i) for i in places)] if scores is not None and self.with_top else None,
        )

    def _finish(self, reason: str) -> None:
        self.text.finish()
        self.finish_reason = "stop" if self.text.stopped else reason
        self.ended(self.completion())


def _as_dict(scores: Scores, i: int) -> dict[int, float]:
    return dict(zip(scores.top_ids[i].tolist(), scores.top_logprobs[i].tolist(), strict=True))


def _check_parameters(**values) -> None:
    least = {"max_new_tokens": 1, "top_k": 0, "n": 1, "batch_size": 1, "seed": 0, "min_tokens": 0, "num_drafted": 0}
    for name, lowest in {**least, "top_logprobs": 0}.items():
        if not _is_whole(values[name]) or values[name] < lowest:
            raise InputError(f"{name} is {values[name]!r}; it must be a whole number, at least {lowest}")
    for name, highest in {"min_tokens": values["max_new_tokens"], "top_logprobs": MAX_TOP_LOGPROBS}.items():
        if values[name] > highest:
            raise InputError(f"{name} is {values[name]}; it must be at most {highest}")
    if values["seed"] >= 2**32:
        raise InputError(f"seed is {values['seed']}; it must be below 2**32")
    ranges = {
        "temperature": (lambda x: 0 <= x < math.inf, "0 (greedy) or above"),
        "top_p": (lambda x: 0 < x <= 1, "above 0, at most 1 (off)"),
        "min_p": (lambda x: 0 <= x <= 1, "from 0 (off) to 1"),
        "repetition_penalty": (lambda x: 0 < x < math.inf, "above 0; 1 is off"),
        "presence_penalty": (math.isfinite, "that is finite; 0 is off"),
        "frequency_penalty": (math.isfinite, "that is finite; 0 is off"),
    }
    for name, (holds, wanted) in ranges.items():
        value = values[name]
        if not isinstance(value, (int, float, np.number)) or isinstance(value, bool) or not holds(value):
            raise InputError(f"{name} is {value!r}; it must be a number {wanted}")


def _is_whole(value) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _check_biases(logit_bias: dict[int, float] | None, config: ModelConfig) -> dict[int, float]:
    for token, bias in (logit_bias or {}).items():
        if not _is_whole(token) or not 0 <= token < config.vocab_size:
            raise InputError(f"logit_bias has token id {token!r}; ids are from 0 to {config.vocab_size - 1}")
        if not isinstance(bias, (int, float, np.number)) or not math.isfinite(bias):
            raise InputError(f"logit_bias of token {token} is {bias!r}; it must be a finite number")
    return dict(logit_bias or {})


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


def _ignore(_) -> None:
    pass
