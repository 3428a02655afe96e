"""Text to token ids and back, by the `tokenizers` library; training by GPT-NeoX's own recipe.

Nothing is ever prepended or appended to a text. The id of a token comes from the file, never from a table here.
"""

import functools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import tokenizers

from neox_jax.errors import InputError

END_OF_TEXT, PADDING = "<|endoftext|>", "<|padding|>"
SPACE_RUNS = tuple(" " * n for n in range(24, 1, -1))  # the 23 last ids, longest first
MIN_VOCAB_SIZE = 2 + 256 + len(SPACE_RUNS)
INCOMPLETE = "\ufffd"  # what the library's decoder writes for bytes that are not, or not yet, UTF-8

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_RECIPE = {  # GPT-NeoX-20B's file without what is learned
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [],
    "normalizer": {"type": "NFC"},
    "pre_tokenizer": _BYTE_LEVEL,
    "post_processor": _BYTE_LEVEL,
    "decoder": _BYTE_LEVEL,
    "model": {"type": "BPE", "vocab": {}, "merges": []},
}


class Tokenizer:
    """A tokenizer.json.

    eos_token_id: the id of <|endoftext|>, else of </s>, else None, unless it is given.
    vocab_size: one more than the highest id, added tokens included.
    """

    def __init__(self, backend: tokenizers.Tokenizer, *, eos_token_id: int | None = None):
        backend.no_truncation()  # some published files carry a length limit, which would cut documents short
        backend.no_padding()
        self._backend = backend
        ids = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(ids.values(), default=-1) + 1
        self.eos_token_id = ids.get(END_OF_TEXT, ids.get("</s>")) if eos_token_id is None else eos_token_id

    @classmethod
    def from_file(cls, path: str | Path, *, eos_token_id: int | None = None) -> "Tokenizer":
        """Reads a tokenizer.json. Raises: InputError where it is missing or is no such file."""
        if not Path(path).is_file():
            raise InputError(f"no tokenizer file at {path}; give the path of a tokenizer.json")
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"), eos_token_id=eos_token_id)
        except ValueError as error:  # a UnicodeDecodeError too
            raise InputError(f"{path} is no tokenizer.json: {' '.join(str(error).split())}") from error

    @classmethod
    def from_json(cls, text: str, *, eos_token_id: int | None = None) -> "Tokenizer":
        """The inverse of `to_json`. Raises: InputError for anything else."""
        try:
            backend = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exception
            raise InputError(f"not the JSON of a tokenizer: {error}") from error
        return cls(backend, eos_token_id=eos_token_id)

    def encode(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: list[int], *, skip_special_tokens: bool = False) -> str:
        """The text of these ids, special tokens included by default; U+FFFD where their bytes are not UTF-8."""
        return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)

    @functools.cached_property
    def num_bytes(self) -> np.ndarray:
        """How many UTF-8 bytes of (normalised) text each id stands for: int32 [vocab_size]; special tokens 0.

        Raises: InputError for a tokenizer that is not byte-level, where an id has no number of bytes of its own.
        """
        decoder = json.loads(self.to_json())["decoder"] or {}
        if decoder.get("type") != "ByteLevel":
            raise InputError(
                f"bytes per token need a byte-level tokenizer; the decoder of this one is {decoder.get('type')}"
            )
        counts = np.zeros(self.vocab_size, np.int32)
        for token, i in self._backend.get_vocab(with_added_tokens=False).items():
            counts[i] = len(token)  # the byte-level alphabet: one character for each byte
        for i, token in self._backend.get_added_tokens_decoder().items():
            counts[i] = 0 if token.special else len(token.content.encode())
        return counts

    def to_json(self) -> str:
        return self._backend.to_str(pretty=True)

    def save(self, path: str | Path) -> None:
        Path(path).write_text(self.to_json(), encoding="utf-8")


class StreamDecoder:
    """Decodes ids one by one; what `push` and the final `flush` return adds up to `tokenizer.decode` of all of them.

    Text that ends in U+FFFD is held back, since the next id may complete the character. Each window is decoded behind
    the one before, because some decoders treat the first token of a text differently.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._context, self._pending, self._num_emitted = [], [], 0

    def push(self, token_id: int) -> str:
        self._pending.append(token_id)
        text = self._tokenizer.decode(self._context + self._pending)
        complete = text.rstrip(INCOMPLETE)
        new = complete[self._num_emitted :]
        self._num_emitted = max(self._num_emitted, len(complete))
        if len(complete) == len(text):
            self._context, self._pending = self._pending, []
            self._num_emitted = len(self._tokenizer.decode(self._context))
        return new

    def flush(self) -> str:
        """What was held back, as it is; the decoder then starts afresh."""
        rest = self._tokenizer.decode(self._context + self._pending)[self._num_emitted :]
        self._context, self._pending, self._num_emitted = [], [], 0
        return rest


def train_tokenizer(texts: Iterable[str], *, vocab_size: int, show_progress: bool = False) -> Tokenizer:
    """Trains a byte-level BPE with the structure of GPT-NeoX-20B's: exactly vocab_size ids.

    <|endoftext|> is 0 and <|padding|> 1; then the 256 bytes and the merges; the last 23 ids are runs of 24 down to 2
    spaces. Those are matched before BPE, so runs of spaces are left out of what the merges are learned from (the
    20B's were learned with them in, and 84 of its merged tokens can never be used).
    Raises: InputError for a vocab_size below 281, an empty corpus, or one too small to give so many merges.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise InputError(
            f"vocab_size {vocab_size} is too small: 2 special tokens, 256 bytes and {len(SPACE_RUNS)} runs of spaces "
            f"need at least {MIN_VOCAB_SIZE}"
        )
    backend = tokenizers.Tokenizer.from_str(json.dumps(_RECIPE))
    byte_level = backend.pre_tokenizer
    without_runs = tokenizers.pre_tokenizers.Split(tokenizers.Regex(" {2,24}"), behavior="removed")
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([without_runs, byte_level])
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPACE_RUNS),
        special_tokens=[tokenizers.AddedToken(t, special=True, normalized=False) for t in (END_OF_TEXT, PADDING)],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=show_progress,
    )
    counter = _CharacterCounter()
    backend.train_from_iterator(counter.count(texts), trainer)
    if not counter.num_characters:
        raise InputError("nothing to train a tokenizer on: the corpus is empty; give files with text in them")

    backend.pre_tokenizer = byte_level
    backend.add_tokens([tokenizers.AddedToken(run, normalized=True) for run in SPACE_RUNS])
    size = backend.get_vocab_size(with_added_tokens=True)
    if size != vocab_size:
        raise InputError(
            f"{counter.num_characters} characters of text give a vocabulary of {size}; wanted {vocab_size}: give more "
            f"text, or a vocab_size of at most {size}"
        )
    return Tokenizer(backend)


class _CharacterCounter:
    """Counts what passes through, so that an empty corpus is noticed without holding any of it."""

    num_characters = 0

    def count(self, texts: Iterable[str]) -> Iterator[str]:
        for text in texts:
            self.num_characters += len(text)
            yield text
