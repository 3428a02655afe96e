"""Conversations and instructions in .jsonl files: tokenised as a run starts, packed into rows, the same on every host.

Shapes: n rows asked for, R rows in all, T tokens a row (`seq_length`) and one more. A line is {"prompt", "completion"}
or {"messages": [{"role", "content"}, ...]}. Text is tokenised in pieces, cut where what is learned begins and ends, so
that the mask's borders are borders of tokens, and a prompt has the tokens that it will have when a model is asked.
"""

import dataclasses
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from neox_jax.data.chat import BORDERS, ChatTemplate
from neox_jax.data.permutation import Permutations, mix
from neox_jax.errors import InputError
from neox_jax.marks import BEGINS, NO_LOSS
from neox_jax.tokenizer import Tokenizer

MAX_TOKENS = 1 << 29  # of all conversations, held in memory: 2 GiB
BATCH = 1024  # conversations tokenised at a time
OPEN_ROWS = 64  # that a conversation may still be put into

Pieces = list[tuple[str, bool]]


@dataclasses.dataclass(frozen=True)
class ConversationSummary:
    """What was read, and what of it was lost. tokens: in the rows. cut: conversations longer than a row, whose last
    cut_tokens tokens are gone; dropped: those of which nothing to learn was left."""

    conversations: int
    tokens: int
    counted_tokens: int
    rows: int
    row_tokens: int
    cut: int
    cut_tokens: int
    dropped: int

    def __str__(self) -> str:
        text = (
            f"{self.conversations:,} conversations, {self.tokens:,} tokens of which {self.counted_tokens:,} count, in "
            f"{self.rows:,} rows ({self.tokens / (self.rows * self.row_tokens):.0%} full)"
        )
        if self.cut:
            text += f"; {self.cut:,} were longer than {self.row_tokens} tokens and lost {self.cut_tokens:,}"
        if self.dropped:
            text += f"; {self.dropped:,} left out: in a row of {self.row_tokens} nothing of them counts"
        return text


class ConversationSamples:
    """Packed rows, in a new order each epoch, or once in the order of the files. seed: None for the latter."""

    def __init__(self, packed: np.ndarray, summary: ConversationSummary, *, seed: int | None):
        self._packed, self._seed, self.summary = packed, seed, summary
        self.samples_per_epoch = len(packed)
        self.num_samples = len(packed) if seed is None else None
        self._permutations = Permutations([len(packed)])

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """The tokens of these samples, with marks. Shapes: [n] -> [n,T+1] int32."""
        if self._seed is None:
            return self._packed[indices]
        epochs, places = np.divmod(np.asarray(indices, np.int64), len(self._packed))
        keys = mix(mix(np.full(len(epochs), self._seed, np.uint64)) ^ epochs.astype(np.uint64))
        return self._packed[self._permutations.permute(np.zeros_like(places), places, keys)]


def open_conversations(
    source: str | list[str],
    *,
    tokenizer: Tokenizer,
    eos_token: int,
    template: str,
    seq_length: int,
    seed: int | None,
    multiple: int = 1,
) -> ConversationSamples:
    """Reads, tokenises and packs all conversations of these files.

    Each ends with eos_token, which is learned where what stands before it is. What would not fit into a row is cut off
    at its end. seed: of the order of rows; None for that of the files. multiple: empty rows, in which nothing counts,
    make their number one of its multiples.
    Raises: InputError naming file and line of what is no conversation.
    """
    paths = [source] if isinstance(source, str) else list(source)
    chat = ChatTemplate(template, eos_token=tokenizer.decode([eos_token]))
    conversations, cut_tokens, cut, dropped, num_tokens = [], 0, 0, 0, 0
    for whole in _tokenized(paths, chat, tokenizer, eos_token):
        kept = whole[: seq_length + 1]
        cut, cut_tokens = cut + (len(kept) < len(whole)), cut_tokens + len(whole) - len(kept)
        if (kept & NO_LOSS).all():
            dropped += 1
            continue
        conversations.append(kept)
        num_tokens += len(kept)
        if num_tokens > MAX_TOKENS:
            raise InputError(
                f"{', '.join(paths)}: more than {MAX_TOKENS:,} tokens, which memory has to hold; give fewer of them"
            )
    if not conversations:
        raise InputError(
            f"{', '.join(paths)}: no conversations with something to learn within train.seq_length {seq_length} "
            f"({dropped} have it beyond); give some, or raise that"
        )
    places = place_in_rows([len(tokens) for tokens in conversations], seq_length + 1)
    packed = _pack(conversations, places, seq_length + 1, eos_token, multiple)
    summary = ConversationSummary(
        conversations=len(conversations),
        tokens=num_tokens,
        counted_tokens=int((packed & NO_LOSS == 0).sum()),
        rows=1 + max(row for row, _ in places),
        row_tokens=seq_length + 1,
        cut=cut,
        cut_tokens=cut_tokens,
        dropped=dropped,
    )
    return ConversationSamples(packed, summary, seed=seed)


def place_in_rows(sizes: list[int], row_tokens: int) -> list[tuple[int, int]]:
    """(row, first token in it) for each: into the first of the newest OPEN_ROWS rows that has room, else a new one."""
    places, free, first_open = [], [], 0
    for size in sizes:
        i = next((i for i, room in enumerate(free) if room >= size), len(free))
        if i == len(free):
            free.append(row_tokens)
        places.append((first_open + i, row_tokens - free[i]))
        free[i] -= size
        if len(free) > OPEN_ROWS:
            del free[0]
            first_open += 1
    return places


def _pack(conversations: list[np.ndarray], places, row_tokens: int, eos_token: int, multiple: int) -> np.ndarray:
    """Rows [R,T+1]; what is left of a row is a document of ends of text, in which nothing counts."""
    num_rows = max(row for row, _ in places) + 1
    packed = np.full((-(-num_rows // multiple) * multiple, row_tokens), eos_token | NO_LOSS, np.int32)
    used = np.zeros(len(packed), np.int64)
    for tokens, (row, start) in zip(conversations, places, strict=True):
        packed[row, start : start + len(tokens)] = tokens
        used[row] = start + len(tokens)
    has_room = np.flatnonzero(used < row_tokens)
    packed[has_room, used[has_room]] |= BEGINS
    return packed


def _tokenized(paths: list[str], chat: ChatTemplate, tokenizer: Tokenizer, eos_token: int) -> Iterator[np.ndarray]:
    """Each conversation's tokens with their marks, int32. Its first token is predicted from nothing: never counted."""
    conversations = (pieces for path in paths for pieces in _read_conversations(path, chat))
    while batch := list(itertools.islice(conversations, BATCH)):
        encoded = iter(tokenizer.encode_batch([text for pieces in batch for text, _ in pieces]))
        for pieces in batch:
            ids, marks = [], []
            for (_, learned), piece in zip(pieces, encoded, strict=False):
                ids += piece
                marks += [0 if learned else NO_LOSS] * len(piece)
            if not ids or ids[-1] != eos_token:
                ids.append(eos_token)
                marks.append(0 if pieces[-1][1] else NO_LOSS)
            marks[0] = NO_LOSS | BEGINS
            yield np.array(ids, np.int32) | np.array(marks, np.int32)


def _read_conversations(path: str, chat: ChatTemplate) -> Iterator[Pieces]:
    if not Path(path).is_file():
        raise InputError(f"no file {path}; wanted conversations, a JSON object a line")
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                if line.strip():
                    yield parse_conversation(line.decode("utf-8"), chat)
            except (ValueError, RecursionError) as error:  # a UnicodeDecodeError too
                raise InputError(f"{path}:{number}: {error}; mend the line or take it out") from error


def parse_conversation(line: str, chat: ChatTemplate) -> Pieces:
    """A line as pieces of text, each with whether it is learned. Raises: ValueError saying what is wrong with it."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error})") from error
    keys = set(value) if isinstance(value, dict) else set()
    if {"prompt", "completion"} <= keys:
        pieces = [(_text(value[name], name), name == "completion") for name in ("prompt", "completion")]
        return [piece for piece in pieces if piece[0] or piece[1]]
    if "messages" not in keys:
        got = f"the keys {', '.join(sorted(keys))}" if keys else f"a {type(value).__name__} without any"
        raise ValueError(f"wanted prompt and completion, or messages, got {got}")
    messages = value["messages"]
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ValueError("messages: wanted a list of objects with role and content")
    for i, message in enumerate(messages):
        for name in ("role", "content"):
            _text(message.get(name), f"{name} of message {i}")
    pieces = chat.pieces(messages)
    if not any(learned for _, learned in pieces):
        raise ValueError(f"nothing to learn: the roles are {', '.join(m['role'] for m in messages) or 'none'}")
    return pieces


def _text(value, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name}: wanted a string, got {'nothing' if value is None else f'a {type(value).__name__}'}")
    if any(border in value for border in BORDERS):
        raise ValueError(f"{name}: U+FDD0 and U+FDD1 are no characters of a text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name}: half a surrogate pair at character {error.start} is no text") from error
    return value
