"""Tokens by units that were met before are the tokens of the library, whatever the text and the tokenizer."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neox_jax.data import unit_cache
from neox_jax.data.unit_cache import UnitCache
from neox_jax.tokenizer import Tokenizer, train_tokenizer

TEXTS = [f"Document {i}: the fox and {i * i} hounds.\r\n  né\u0000  end\n" * (i % 7 + 1) for i in range(60)]
# Spaces of every kind and what may be taken for one; what combines; ends of words that are words; special tokens.
TRAPS = [
    *" \n\r\t\x1c\x85\xa0\u180e\u2003\u2028\u3000\u200b\u0301eEsS'!_\"1½一한하\0🤗",
    "  ",
    "'ll",
    "'S",
    " fox",
    "x.1",
]
TRAPS += ["<|endoftext|>", "<|padding|>", "<|"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, vocab_size=320)


TRAPPED = st.lists(st.sampled_from([" ", *TRAPS]) | st.characters(codec="utf-8"), max_size=30).map("".join)


@settings(deadline=None, max_examples=300)
@given(texts=st.lists(TRAPPED, max_size=5))
def test_units_have_the_tokens_of_the_text(tokenizer, texts):
    cache = UnitCache(tokenizer, np.uint16)
    assert cache.can_cut
    assert cache.encode_batch(texts) == library_tokens(tokenizer, texts)


@settings(deadline=None, max_examples=300)
@given(texts=st.lists(TRAPPED, max_size=5))
def test_units_have_the_tokens_of_the_text_with_the_20b_tokenizer(real_cache, texts):
    tokenizer, cache = real_cache
    assert cache.encode_batch(texts) == library_tokens(tokenizer, texts)


@pytest.fixture(scope="module")
def real_cache(shared_data) -> tuple[Tokenizer, UnitCache]:
    tokenizer = Tokenizer.from_file(shared_data / "20B_tokenizer.json")
    cache = UnitCache(tokenizer, np.uint16)
    assert cache.can_cut
    return tokenizer, cache


def library_tokens(tokenizer, texts) -> list[bytes]:
    return [np.array(tokenizer.encode(text), np.uint16).tobytes() for text in texts]


def test_what_is_remembered_is_bounded(tokenizer, monkeypatch):
    monkeypatch.setattr(unit_cache, "MAX_CHARACTERS", 100)
    cache = UnitCache(tokenizer, np.uint16)
    for start in range(0, len(TEXTS), 5):
        assert cache.encode_batch(TEXTS[start : start + 5]) == library_tokens(tokenizer, TEXTS[start : start + 5])
        assert cache._num_characters <= 100


CHANGES = {
    "another normalizer": {"normalizer": {"type": "Lowercase"}},
    "a space in front": {
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    },
    "no splitting": {"pre_tokenizer": None},
    "a token found in normalized text": {"added_tokens": {"content": "\u00e9x", "normalized": True}},
    "spaces that take more of them": {"added_tokens": {"content": "\n", "rstrip": True}},
}


def changed(tokenizer, change) -> Tokenizer:
    """added_tokens: one more of them, in what it differs from <|endoftext|>."""
    file = json.loads(tokenizer.to_json())
    if "added_tokens" in change:
        token = {**file["added_tokens"][0], "id": tokenizer.vocab_size, **change["added_tokens"]}
        change = {"added_tokens": [*file["added_tokens"], token]}
    return Tokenizer.from_json(json.dumps({**file, **change}))


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_other_tokenizers_are_given_whole_texts(change, tokenizer):
    other = changed(tokenizer, change)
    cache = UnitCache(other, np.uint16)
    assert not cache.can_cut
    texts = [*TEXTS[:5], "e\u0301x a b", "ab \n \n  a", " A b", ""]
    assert cache.encode_batch(texts) == library_tokens(other, texts)


def test_texts_with_special_tokens_are_not_cut(tokenizer):
    other = changed(tokenizer, {"added_tokens": {"content": "e fox", "lstrip": True}})
    cache = UnitCache(other, np.uint16)
    assert cache.can_cut
    texts = [*TEXTS[:5], "a  e fox", "the fox<|endoftext|> the"]
    assert cache.encode_batch(texts) == library_tokens(other, texts)
