"""The 20B file's golden ids, the training recipe, bytes per token, and decoding as a stream."""

import json
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neox_jax.errors import InputError
from neox_jax.tokenizer import MIN_VOCAB_SIZE, StreamDecoder, Tokenizer, train_tokenizer

TEXT = "def f(x):\n    return x + 1\n\n\nThe quick brown fox jumps over the lazy dog; again and again.\n" * 50


@pytest.fixture(scope="module")
def neox(shared_data) -> Tokenizer:
    return Tokenizer.from_file(shared_data / "20B_tokenizer.json")


@pytest.fixture(scope="module")
def small() -> Tokenizer:
    return train_tokenizer([TEXT], vocab_size=320)


GOLDEN = [
    ("Hello world", [12092, 1533]),
    ("  x", [50276, 89]),
    ("def f():\n    return 1\n", [1545, 269, 14850, 187, 50274, 2309, 337, 187]),
    (" " * 32, [50254, 50270]),
    ("<|endoftext|>hi", [0, 5801]),
    *((" " * n, [50278 - n]) for n in range(2, 25)),
]


@pytest.mark.parametrize(("text", "ids"), GOLDEN, ids=[repr(text) for text, _ in GOLDEN])
def test_20b_file_gives_golden_ids(neox, text, ids):
    assert neox.encode(text) == ids
    assert neox.decode(ids) == text


def test_20b_file_has_its_sizes(neox):
    assert (neox.vocab_size, neox.eos_token_id) == (50277, 0)
    assert neox.num_bytes.shape == (50277,)
    assert neox.num_bytes[[0, 1, 12092, 50254, 50276]].tolist() == [0, 0, 5, 24, 2]


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=200))
def test_num_bytes_adds_up_to_the_normalised_text(small, text):
    assert small.num_bytes[small.encode(text)].sum() == len(unicodedata.normalize("NFC", text).encode())


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(max_size=50), max_size=5))
def test_batches_encode_as_single_texts_and_decode_back(small, texts):
    batch = small.encode_batch(texts)
    assert batch == [small.encode(text) for text in texts]
    assert [small.decode(ids) for ids in batch] == [unicodedata.normalize("NFC", text) for text in texts]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 319), max_size=40))
def test_stream_adds_up_to_decode(small, ids):
    stream = StreamDecoder(small)
    assert "".join([*map(stream.push, ids), stream.flush()]) == small.decode(ids)


def test_stream_holds_back_unfinished_characters(small):
    stream = StreamDecoder(small)
    pushed = [stream.push(i) for i in small.encode("añ🦊b")]
    assert all("\ufffd" not in text for text in pushed)
    assert "".join(pushed) == "añ🦊b"
    assert pushed.count("") >= 4  # the first byte of ñ, the first three of the fox
    stream.push(small.encode("🦊")[0])
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""


def structure(tokenizer: Tokenizer) -> dict:
    """Everything in the file but what is learned and what newer versions of the library add."""
    file = json.loads(tokenizer.to_json())
    file["added_tokens"] = [{k: v for k, v in token.items() if k != "id"} for token in file["added_tokens"]]
    for key in ("pre_tokenizer", "post_processor", "decoder"):
        assert file[key].pop("use_regex", True) is True
    added = {"vocab", "merges", "byte_fallback", "ignore_merges"}
    file["model"] = {k: v for k, v in file["model"].items() if k not in added}
    return file


def test_trained_tokenizer_has_the_structure_of_the_20b_file(neox, small):
    assert structure(small) == structure(neox)


def test_trained_tokenizer_has_exactly_the_ids_of_the_recipe(small):
    assert small.vocab_size == 320
    assert small.encode("<|endoftext|><|padding|>") == [0, 1]
    assert [small.encode(" " * n) for n in range(2, 25)] == [[321 - n] for n in range(2, 25)]
    vocab = json.loads(small.to_json())["model"]["vocab"]
    assert sorted(vocab.values()) == list(range(320 - 23))
    assert not [token for token in vocab if len(token) > 1 and set(token) == {"Ġ"}]  # those could never be used


def test_training_twice_gives_the_same_file(small):
    assert train_tokenizer(iter([TEXT]), vocab_size=320).to_json() == small.to_json()


def test_file_round_trip(small, tmp_path):
    small.save(tmp_path / "tokenizer.json")
    again = Tokenizer.from_file(tmp_path / "tokenizer.json")
    assert again.to_json() == small.to_json()
    assert again.eos_token_id == 0
    assert Tokenizer.from_file(tmp_path / "tokenizer.json", eos_token_id=7).eos_token_id == 7


def test_length_limits_in_a_file_do_not_cut_text(small, tmp_path):
    file = json.loads(small.to_json())
    file["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(file))
    assert Tokenizer.from_file(tmp_path / "tokenizer.json").encode(TEXT) == small.encode(TEXT)


def test_eos_is_taken_from_the_file(small):
    file = json.loads(small.to_json())
    for name, wanted in (("</s>", 0), ("<eot>", None)):
        file["added_tokens"][0]["content"] = name
        file["model"]["vocab"] = {
            (name if token == "<|endoftext|>" else token): i
            for token, i in json.loads(small.to_json())["model"]["vocab"].items()
        }
        assert Tokenizer.from_json(json.dumps(file)).eos_token_id == wanted


def test_bytes_of_a_tokenizer_that_is_not_byte_level_are_refused(small):
    file = json.loads(small.to_json()) | {"decoder": {"type": "Fuse"}}
    with pytest.raises(InputError, match="byte-level tokenizer; the decoder of this one is Fuse"):
        Tokenizer.from_json(json.dumps(file)).num_bytes  # noqa: B018


def test_missing_and_bad_files_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"no tokenizer file at .*nothing.json"):
        Tokenizer.from_file(tmp_path / "nothing.json")
    for content in (b"{}", b"not json", b"\xff\xfe"):
        (tmp_path / "bad.json").write_bytes(content)
        with pytest.raises(InputError, match=r"bad.json is no tokenizer.json"):
            Tokenizer.from_file(tmp_path / "bad.json")


def test_training_refuses_what_it_cannot_do():
    with pytest.raises(InputError, match=r"vocab_size 280 is too small.* at least 281"):
        train_tokenizer([TEXT], vocab_size=MIN_VOCAB_SIZE - 1)
    with pytest.raises(InputError, match="wanted 5000: give more text, or a vocab_size of at most"):
        train_tokenizer([TEXT], vocab_size=5000)
    for empty in ([], ["", ""]):
        with pytest.raises(InputError, match="the corpus is empty"):
            train_tokenizer(empty, vocab_size=MIN_VOCAB_SIZE)
