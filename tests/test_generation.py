"""Generation: the same tokens as transformers and as the full forward, on any mesh, in any batch; text, stops, limits;
what it compiles and how much memory a block takes."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from variants import VARIANTS, random_model, random_reference

from neox_jax.config import ModelConfig
from neox_jax.convert.hf import load_hf
from neox_jax.errors import InputError
from neox_jax.generation import Completion, generate
from neox_jax.model import abstract_model
from neox_jax.sharding import make_mesh
from neox_jax.tokenizer import train_tokenizer
from neox_jax.tree import map_named

CONFIG = ModelConfig.from_hf(VARIANTS["pythia"])
EIGHT_HEADS = dataclasses.replace(CONFIG, hidden_size=64, num_attention_heads=8, vocab_size=96)


def prompts_of(config: ModelConfig = CONFIG, lengths=(5, 1, 17, 9), seed: int = 0) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [random.integers(0, config.vocab_size, length).tolist() for length in lengths]


def tokens_of(completions: list[Completion]) -> list[list[int]]:
    return [completion.tokens for completion in completions]


def sharded(config: ModelConfig, mesh, **options):
    """The same random model as without a mesh, laid out on it."""
    place = jax.tree.map(lambda leaf: leaf.sharding, abstract_model(config, mesh=mesh))
    values = jax.tree.leaves(random_model(config, **options))
    return jax.tree.unflatten(jax.tree.structure(place), list(map(jax.device_put, values, jax.tree.leaves(place))))


@pytest.fixture(scope="module")
def model():
    return random_model(CONFIG)


@pytest.fixture(scope="module")
def tok():
    corpus = ["the cat sat on the mat and the dog sat on the log, said the man to the cat. " * 3, "żółć gęślą jaźń 🙂"]
    return train_tokenizer(corpus, vocab_size=290)


@pytest.fixture(scope="module")
def text_model(tok):
    return random_model(dataclasses.replace(CONFIG, vocab_size=304))


# ---- the same tokens


@pytest.mark.parametrize(
    ("name", "ranks"),
    [
        *(("pythia", ranks) for ranks in (1, 2, 4)), ("20b", 2), ("pythia-2.8b", 1), ("redpajama", 4), ("polyglot", 2),
        ("wide-heads", 1), ("tied", 1), ("no-attention-bias", 2), ("sequential-tied", 2),
    ],
)  # fmt: skip
def test_greedy_is_that_of_transformers(name, ranks, tmp_path):
    """Token for token in one ragged batch, up to the end-of-text id where it comes; tensor parallel too."""
    torch = pytest.importorskip("torch")

    fields = VARIANTS[name]
    reference = random_reference(fields)
    reference.save_pretrained(tmp_path)
    model = load_hf(tmp_path, mesh=make_mesh(model=ranks, devices=jax.devices()[:ranks]) if ranks > 1 else None)
    prompts = prompts_of(model.config)
    completions = generate(model, None, prompts, max_new_tokens=24, temperature=0)
    for prompt, completion in zip(prompts, completions, strict=True):
        with torch.no_grad():
            ids = torch.tensor([prompt])
            wanted = reference.generate(ids, do_sample=False, max_new_tokens=24, pad_token_id=0, eos_token_id=0)
        wanted = wanted[0, len(prompt) :].tolist()
        stopped = wanted[-1] == 0
        assert completion.tokens == (wanted[:-1] if stopped else wanted)
        assert completion.finish_reason == ("stop" if stopped else "length")


def test_greedy_with_repetition_penalty_is_that_of_transformers(tmp_path):
    torch = pytest.importorskip("torch")

    reference = random_reference(VARIANTS["pythia"], seed=3)
    reference.save_pretrained(tmp_path)
    model = load_hf(tmp_path)
    prompt = prompts_of()[2]
    wanted = reference.generate(
        torch.tensor([prompt]), do_sample=False, max_new_tokens=30, repetition_penalty=1.5, pad_token_id=0
    )[0, len(prompt) :].tolist()
    options = {"max_new_tokens": 30, "temperature": 0, "ignore_eos": True}
    assert tokens_of(generate(model, None, [prompt], repetition_penalty=1.5, **options)) == [wanted]
    assert tokens_of(generate(model, None, [prompt], **options)) != [wanted]


def logits_after(model, prompts: list[list[int]], completions: list[Completion]) -> list[np.ndarray]:
    """The full forward's logits [V] for each generated token, by row: [[tokens, V], ...]."""
    padded = np.zeros((len(prompts), 64), np.int32)
    for row, prompt, completion in zip(padded, prompts, completions, strict=True):
        row[: len(prompt) + len(completion.tokens)] = prompt + completion.tokens
    logits = np.asarray(model(jnp.asarray(padded)))
    pairs = zip(logits, prompts, completions, strict=True)
    return [row[len(prompt) - 1 :][: len(completion.tokens)] for row, prompt, completion in pairs]


def test_logprobs_are_of_the_unprocessed_distribution(model):
    prompts = prompts_of()
    options = {"temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.2, "ignore_eos": True}
    completions = generate(model, None, prompts, max_new_tokens=24, **options)
    for logits, completion in zip(logits_after(model, prompts, completions), completions, strict=True):
        wanted = jax.nn.log_softmax(logits)[np.arange(24), np.asarray(completion.tokens)]
        np.testing.assert_allclose(completion.logprobs, wanted, atol=1e-4)


@pytest.mark.parametrize("axes", [{"model": 8}, {"data": 2, "model": 4}, {"fsdp": 2, "model": 2}])
def test_a_mesh_gives_the_same_tokens(axes):
    """Three rows, which data x fsdp does not divide; greedy and sampled."""
    devices = jax.devices()[: int(np.prod(list(axes.values())))]
    mesh = make_mesh(**axes, devices=devices)
    prompts = prompts_of(EIGHT_HEADS, (5, 1, 17))
    for options in ({"temperature": 0}, {"temperature": 0.8, "top_k": 30, "top_p": 0.9, "repetition_penalty": 1.1}):
        wanted = generate(random_model(EIGHT_HEADS), None, prompts, max_new_tokens=36, ignore_eos=True, **options)
        got = generate(sharded(EIGHT_HEADS, mesh), None, prompts, max_new_tokens=36, ignore_eos=True, **options)
        assert tokens_of(got) == tokens_of(wanted)
        np.testing.assert_allclose(got[2].logprobs, wanted[2].logprobs, atol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_generates(dtype):
    """What a 16-bit model finds likely is what its float32 twin does, within its precision."""
    model = random_model(CONFIG, dtype=dtype)
    twin = map_named(lambda _, leaf: leaf.astype(jnp.float32), model)
    prompts = prompts_of()
    completions = generate(model, None, prompts, temperature=0, max_new_tokens=24, ignore_eos=True)
    for logits, completion in zip(logits_after(twin, prompts, completions), completions, strict=True):
        wanted = np.asarray(jax.nn.log_softmax(logits))
        chosen = wanted[np.arange(24), np.asarray(completion.tokens)]
        np.testing.assert_allclose(completion.logprobs, chosen, atol=0.2)
        np.testing.assert_allclose(chosen, wanted.max(axis=1), atol=0.2)


# ---- sampling


def test_a_completion_does_not_depend_on_the_others(model):
    """Alone, in a batch, at another place in it, in batches of three: the same; with another seed: another."""
    prompts = prompts_of()
    options = {"max_new_tokens": 20, "temperature": 1.2, "seed": 5, "ignore_eos": True}
    together = tokens_of(generate(model, None, prompts, **options))
    assert [tokens_of(generate(model, None, [prompt], **options))[0] for prompt in prompts] == together
    assert tokens_of(generate(model, None, prompts[::-1], **options)) == together[::-1]
    assert tokens_of(generate(model, None, prompts, batch_size=3, **options)) == together
    others = tokens_of(generate(model, None, prompts, **{**options, "seed": 6}))
    assert all(one != other for one, other in zip(together, others, strict=True))


def test_samples_of_one_prompt_differ(model):
    first, second, *_ = prompts_of()
    options = {"max_new_tokens": 20, "temperature": 1.0, "seed": 1, "ignore_eos": True}
    samples = tokens_of(generate(model, None, [first, second], n=4, **options))
    assert len(samples) == 8
    assert len(set(map(tuple, samples))) == 8
    assert tokens_of(generate(model, None, [first, second], n=3, **options)) == samples[:3] + samples[4:7]
    equal = tokens_of(generate(model, None, [first] * 4 + [second], **options))
    assert equal == samples[:5]  # equal prompts are samples as well


def test_top_k_of_one_is_greedy(model):
    options = {"max_new_tokens": 20, "ignore_eos": True}
    greedy = generate(model, None, prompts_of(), temperature=0, **options)
    assert tokens_of(generate(model, None, prompts_of(), temperature=3.0, top_k=1, **options)) == tokens_of(greedy)


def test_only_ids_with_a_token_are_sampled(tok):
    """Neither rows beyond the tokenizer's ids nor the mesh's padding, however likely; logprobs count the former."""
    config = dataclasses.replace(CONFIG, vocab_size=300, vocab_multiple=128)
    model = random_model(config)
    likely = jnp.where(jnp.arange(384)[:, None] < 290, 1, 100) * model.head  # about half of those logits are huge
    model = map_named(lambda name, leaf: likely if name.startswith("embed_out") else leaf, model)
    prompts = prompts_of(config)
    for temperature in (0, 5.0):
        completions = generate(model, tok, prompts, max_new_tokens=20, temperature=temperature, ignore_eos=True)
        assert max(max(completion.tokens) for completion in completions) < tok.vocab_size
        assert min(min(completion.logprobs) for completion in completions) < -20
    without = generate(model, None, prompts, max_new_tokens=20, temperature=0, ignore_eos=True)
    assert 290 <= max(max(completion.tokens) for completion in without) < 300


# ---- ends


def test_stops_at_ids(model):
    prompt = prompts_of()[0]
    free = generate(model, None, [prompt], temperature=0, max_new_tokens=40, ignore_eos=True)[0]
    assert free.finish_reason == "length"
    assert len(free.tokens) == len(free.logprobs) == 40
    end = next(i for i in range(2, 40) if free.tokens[i] not in free.tokens[:i])
    stop_id = free.tokens[end]
    for options in ({"stop": stop_id}, {"stop": [stop_id]}, {"stop": [stop_id, "text"], "tok": True}):
        fake = dataclasses.make_dataclass("Tok", [("eos_token_id", int), ("vocab_size", int)])(stop_id, 97)
        fake.encode, fake.decode = list, lambda ids: ""
        tok = fake if options.pop("tok", False) else None
        got = generate(model, tok, [prompt], temperature=0, max_new_tokens=40, ignore_eos=True, **options)[0]
        assert (got.tokens, got.finish_reason) == (free.tokens[:end], "stop")
        assert len(got.logprobs) == end
    eos = random_model(dataclasses.replace(CONFIG, eos_token_id=stop_id))
    got = generate(eos, None, [prompt], temperature=0, max_new_tokens=40)[0]
    assert (got.tokens, got.finish_reason) == (free.tokens[:end], "stop")
    assert generate(eos, None, [prompt], temperature=0, max_new_tokens=40, ignore_eos=True) == [free]


def test_the_tokenizers_end_of_text_comes_before_the_configs(text_model, tok):
    """Greedy from many prompts, with the id that came third as the tokenizer's end of text."""
    free = generate(text_model, tok, ["the cat"], temperature=0, max_new_tokens=20, ignore_eos=True)[0]
    end = next(i for i in range(2, 20) if free.tokens[i] not in free.tokens[:i])
    other = train_tokenizer(["the cat sat on the mat and the dog sat on the log, said the man " * 3], vocab_size=290)
    other.encode, other.eos_token_id = tok.encode, free.tokens[end]
    got = generate(text_model, other, ["the cat"], temperature=0, max_new_tokens=20)[0]
    assert (got.tokens, got.finish_reason) == (free.tokens[:end], "stop")


def test_a_stop_id_as_the_very_first_token(model):
    prompt = prompts_of()[0]
    first = generate(model, None, [prompt], temperature=0, max_new_tokens=1, ignore_eos=True)[0].tokens
    got = generate(model, None, [prompt], temperature=0, max_new_tokens=9, stop=first)
    assert got == [Completion("", [], [], "stop")]


class ByteTok:
    """One id a byte: any text can be put into the model's mouth by `speaking`."""

    vocab_size, eos_token_id = 256, None

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")


def speaking(texts: list[str]):
    """A model of one layer that, greedy, goes from each token to the next of its text (no byte may occur twice)."""
    config = dataclasses.replace(CONFIG, vocab_size=256, hidden_size=256, num_attention_heads=4, num_hidden_layers=1)
    successor = np.zeros((256, 256), np.float32)
    for text in texts:
        spoken = text.encode()
        assert len(set(spoken)) == len(spoken)
        successor[list(spoken[1:]), list(spoken[:-1])] = 1
    values = {"embed_in.embedding": np.eye(256, dtype=np.float32), "embed_out.embedding": successor}

    def value(name, leaf):
        ones = name == "final_layer_norm.scale"
        return jnp.asarray(values.get(name, np.full(leaf.shape, float(ones), leaf.dtype)))

    return map_named(value, abstract_model(config))


def spoken(text: str, **options) -> tuple[Completion, list[str]]:
    pieces = []
    got = generate(
        speaking([text]),
        ByteTok(),
        [text[0]],
        temperature=0,
        max_new_tokens=len(text.encode()) - 1,
        stream=lambda row, piece: pieces.append(piece),
        **options,
    )
    assert "".join(pieces) == got[0].text
    return got[0], pieces


def test_text_is_streamed_as_it_becomes_certain():
    got, pieces = spoken("Abc żó🙂")
    assert got.text == "bc żó🙂"
    assert pieces == list(got.text)  # two, two and four bytes: never a part of a character
    assert (got.finish_reason, len(got.tokens)) == ("length", 11)


def test_an_unfinished_character_is_flushed_at_the_end():
    text = "Ab🙂"
    got = generate(speaking([text]), ByteTok(), ["A"], temperature=0, max_new_tokens=3)
    assert got[0].text == "b\ufffd"
    assert bytes(got[0].tokens) == text.encode()[1:4]


@pytest.mark.parametrize(
    ("stop", "text", "num_tokens"),
    [
        ("fgh", "bcde", 7),
        (["xyz", "h", "fgh"], "bcde", 7),  # both are there at once: the earlier start
        (["ef", "de"], "bc", 4),
        (["defX", "fg"], "bcde", 6),  # the beginning of one was held back in vain
        ("b", "", 1),
        ("k", "bcdefghij", 10),
        ("kl", "bcdefghijk", 10),  # the end comes first: what was held back is text
    ],
)
def test_stop_strings(stop, text, num_tokens):
    got, _ = spoken("Abcdefghijk", stop=stop)
    assert got.text == text
    assert bytes(got.tokens) == b"bcdefghijk"[:num_tokens]
    assert got.finish_reason == ("length" if stop == "kl" else "stop")
    assert len(got.logprobs) == num_tokens


def test_the_beginning_of_a_stop_string_is_held_back():
    _, pieces = spoken("Abcdefghijk", stop="defX")
    assert pieces == ["b", "c", "defg", "h", "i", "j", "k"]


def test_a_stopped_row_leaves_the_others_alone():
    """Rows that end by a string, by an id and by length, in different blocks."""
    texts = ["Abcdefghijklmnopqrstuvwxyz", "0123456789", "BCDEFGHIJKLMNOPQRSTUVWXYZ[]^_{|}~"]
    pieces = {0: "", 1: "", 2: ""}

    def collect(row, piece):
        pieces[row] += piece

    options = {"temperature": 0, "max_new_tokens": 32, "stop": ["uv", ord("5")], "stream": collect}
    got = generate(speaking(texts), ByteTok(), [text[0] for text in texts], **options)
    assert [one.text for one in got] == ["bcdefghijklmnopqrst", "1234", texts[2][1:]]
    assert [one.finish_reason for one in got] == ["stop", "stop", "length"]
    assert [pieces[i] for i in range(3)] == [one.text for one in got]


def test_text_with_a_real_tokenizer(text_model, tok):
    pieces = ["", ""]

    def collect(row, piece):
        pieces[row] += piece

    options = {"max_new_tokens": 40, "seed": 2, "ignore_eos": True}
    got = generate(text_model, tok, ["the cat", "żółć"], stream=collect, **options)
    assert [tok.decode(one.tokens) for one in got] == [one.text for one in got] == pieces
    by_ids = generate(text_model, tok, [tok.encode("the cat"), tok.encode("żółć")], **options)
    assert by_ids == got
    stop = next(re.finditer("[a-z ]{2}", got[0].text[2:])).group()
    stopped = generate(text_model, tok, ["the cat", "żółć"], stop=stop, **options)[0]
    assert stopped.text == got[0].text[: got[0].text.index(stop)]
    assert stopped.tokens == got[0].tokens[: len(stopped.tokens)]
    assert stop in tok.decode(stopped.tokens)
    assert stop not in tok.decode(stopped.tokens[:-1])


# ---- refusals


def test_no_prompts_no_completions(model):
    assert generate(model, None, []) == []


def test_up_to_the_last_position_of_the_context(model):
    assert len(generate(model, None, [[1] * 34], max_new_tokens=30, ignore_eos=True)[0].tokens) == 30
    with pytest.raises(InputError, match=r"prompt 1 has 35 tokens, which with max_new_tokens 30 is over .* 64"):
        generate(model, None, [[1] * 34, [1] * 35], max_new_tokens=30)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[1, 97]], {}, "prompt 0 has token id 97; ids are from 0 to 96"),
        ([[1], [-1]], {}, "prompt 1 has token id -1"),
        ([[1.5]], {}, "token id 1.5"),
        ([[1], []], {}, "prompt 1 is empty"),
        ([1, 2, 3], {}, "list of prompts"),
        ("text", {}, "list of prompts"),
        (["text"], {}, "needs a tokenizer"),
        ([[1]], {"temperature": -0.1}, "temperature is -0.1"),
        ([[1]], {"temperature": float("nan")}, "temperature is nan"),
        ([[1]], {"temperature": "hot"}, "temperature is 'hot'"),
        ([[1]], {"top_p": 0}, "top_p is 0"),
        ([[1]], {"top_p": 1.1}, "top_p is 1.1"),
        ([[1]], {"top_k": -1}, "top_k is -1"),
        ([[1]], {"top_k": 2.5}, "top_k is 2.5"),
        ([[1]], {"min_p": -0.1}, "min_p is -0.1"),
        ([[1]], {"min_p": 1.1}, "min_p is 1.1"),
        ([[1]], {"repetition_penalty": 0}, "repetition_penalty is 0"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ([[1]], {"n": 0}, "n is 0"),
        ([[1]], {"n": True}, "n is True"),
        ([[1]], {"batch_size": 0}, "batch_size is 0"),
        ([[1]], {"seed": -1}, "seed is -1"),
        ([[1]], {"seed": 2**32}, "seed is 4294967296"),
        ([[1]], {"stop": "text"}, "needs a tokenizer"),
        ([[1]], {"stop": [97]}, "stop 97"),
        ([[1]], {"stop": ""}, "stop ''"),
        ([[1]], {"stop": [1.5]}, "stop 1.5"),
    ],
)
def test_refusals(model, prompts, options, message):
    with pytest.raises(InputError, match=message) as raised:
        generate(model, None, prompts, **{"max_new_tokens": 8, **options})
    assert "\n" not in str(raised.value)


def test_an_empty_text_is_refused(text_model, tok):
    with pytest.raises(InputError, match="prompt 0 is empty"):
        generate(text_model, tok, [""])


def test_damaged_weights_are_no_text(model):
    broken = map_named(lambda name, leaf: leaf * jnp.nan if name == "final_layer_norm.scale" else leaf, model)
    with pytest.raises(InputError, match="not numbers"):
        generate(broken, None, [[1]], max_new_tokens=8)
