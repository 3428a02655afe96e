"""Texts to tokens by units that were met before: much faster than the tokenizers library alone, and the same tokens."""

import array
import json
import re

import numpy as np

from neox_jax.tokenizer import Tokenizer

MAX_CHARACTERS = 1 << 22  # of units that are remembered: some 100 MB for a process
SPACES = " \t\n\r\f\v"
# Spaces, and what follows them: letters, digits, or marks. No unit ends before a character beyond ASCII, which may be
# of any kind and combine with others, nor in 's, 't, 'm, 'd, 're, 'll and 've: it goes on to where spaces follow.
UNIT = re.compile(
    r"""
    [SPACES]*+
    (?: [A-Za-z]++ (?![^\x00-\x7f])
      | [0-9]++ (?![^\x00-\x7f])
      | [^A-Za-z0-9SPACES\x80-\U0010ffff]++ (?: (?<!') | (?![stmdrlv]) ) (?![^\x00-\x7f])
      | .*?\S (?=[SPACES]|\Z)
    )
    | .+
    """.replace("SPACES", r"\ \t\n\r\f\v"),
    re.DOTALL | re.VERBOSE,
)


class UnitCache:
    """A tokenizer's tokens, as bytes of a dtype.

    GPT-NeoX's splitting into words, which is GPT-2's, starts anew at the end of each UNIT, and so does all else in such
    a tokenizer: the tokens of a text are those of its units, one behind the other. Texts repeat their units, so most
    are looked up. A text is one unit where a special token is in it, or with another kind of tokenizer (`can_cut`).
    """

    def __init__(self, tokenizer: Tokenizer, dtype: np.dtype):
        self._tokenizer, self._dtype = tokenizer, np.dtype(dtype)
        file = json.loads(tokenizer.to_json())
        self.can_cut = _can_cut(file)
        self._special = [token["content"] for token in file["added_tokens"] if token["content"].strip(SPACES)]
        self._tokens: dict[str, bytes] = {}
        self._num_characters = 0

    def encode_batch(self, texts: list[str]) -> list[bytes]:
        """The tokens of each text."""
        texts_units = list(map(self._cut, texts))
        new = [unit for unit in set().union(*texts_units) if unit not in self._tokens]
        for unit, ids in zip(new, self._tokenizer.encode_batch(new), strict=True):
            self._tokens[unit] = array.array(self._dtype.char, ids).tobytes()
        encoded = [b"".join(map(self._tokens.__getitem__, units)) for units in texts_units]
        self._num_characters += sum(map(len, new))
        if self._num_characters > MAX_CHARACTERS:
            self._tokens, self._num_characters = {}, 0
        return encoded

    def _cut(self, text: str) -> list[str]:
        if not self.can_cut or any(token in text for token in self._special):
            return [text]
        return UNIT.findall(text)


def _can_cut(file: dict) -> bool:
    """Whether a tokenizer.json is of GPT-NeoX's kind: NFC, GPT-2's splitting, BPE, and added tokens that are spaces, or
    are looked for in the text as it is."""
    splitter = {"add_prefix_space": True, **(file["pre_tokenizer"] or {"type": None})}
    return (
        (file["normalizer"] or {"type": "NFC"})["type"] == "NFC"
        and (splitter["type"], splitter.get("use_regex"), splitter["add_prefix_space"]) == ("ByteLevel", True, False)
        and (file["post_processor"] or {"type": "ByteLevel"})["type"] == "ByteLevel"
        and (file["model"]["type"], file["model"].get("dropout")) == ("BPE", None)
        and all(
            not (token["lstrip"] or token["rstrip"] or token["single_word"])
            if not token["content"].strip(SPACES)
            else not token["normalized"]
            for token in file["added_tokens"]
        )
    )
