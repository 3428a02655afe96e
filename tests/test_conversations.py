"""Conversations: tokens and masks, templates and what they may not do, packing, order, runs, bad lines."""

import functools
import hashlib
import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from runs import TINY, losses_of, make_config, params_digest

from neox_jax.config import Masks
from neox_jax.data import chat
from neox_jax.data.chat import ChatTemplate
from neox_jax.data.conversations import OPEN_ROWS, open_conversations, place_in_rows
from neox_jax.errors import InputError
from neox_jax.marks import BEGINS, NO_LOSS, strip_marks
from neox_jax.model import abstract_model, init_model
from neox_jax.tokenizer import Tokenizer
from neox_jax.train import Run, train
from neox_jax.train_state import pure_params
from neox_jax.train_step import next_token_loss, read_batch
from neox_jax.tree import named_leaves

EOS = 0
INSTRUCTIONS = [{"prompt": f"add {i} and {i}: ", "completion": f"that is {2 * i}"} for i in range(40)]
TALK = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "def f():"},
        {"role": "assistant", "content": "    return"},
        {"role": "user", "content": "and {{ then }}?"},
        {"role": "assistant", "content": "pass"},
    ]
}


@pytest.fixture(scope="module")
def tokenizer(data) -> Tokenizer:
    return Tokenizer.from_file(data / "tokenizer.json")


def write_lines(path, lines) -> str:
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return str(path)


def open_lines(path, lines, tokenizer, *, seq_length=64, seed=None, template="", multiple=1):
    options = {"eos_token": EOS, "template": template, "seq_length": seq_length, "seed": seed, "multiple": multiple}
    return open_conversations(write_lines(path, lines), tokenizer=tokenizer, **options)


def all_rows(samples) -> np.ndarray:
    return samples.rows(np.arange(samples.samples_per_epoch))


def learned(row: np.ndarray) -> list[int]:
    return row[row & NO_LOSS == 0].tolist()


# --- tokens and masks ------------------------------------------------------------------------------------------------


def test_a_prompt_and_its_completion(tokenizer, tmp_path):
    """Tokenised apart, so that what is learned begins with a token of its own even where one would span both."""
    prompt, completion = "    re", "turn x"
    assert len(tokenizer.encode(prompt + completion)) < len(tokenizer.encode(prompt) + tokenizer.encode(completion))
    row = all_rows(open_lines(tmp_path / "a.jsonl", [{"prompt": prompt, "completion": completion}], tokenizer))[0]
    wanted = [*tokenizer.encode(prompt), *tokenizer.encode(completion), EOS]
    assert strip_marks(row).tolist() == wanted + [EOS] * (65 - len(wanted))
    assert learned(row) == [*tokenizer.encode(completion), EOS]
    assert np.flatnonzero(row & BEGINS).tolist() == [0, len(wanted)]


def test_turns_of_the_assistant_are_learned_with_their_ends(tokenizer, tmp_path):
    row = all_rows(open_lines(tmp_path / "a.jsonl", [TALK], tokenizer, seq_length=127))[0]
    assert learned(row) == [*tokenizer.encode("    return"), EOS, *tokenizer.encode("pass"), EOS]
    text = tokenizer.decode(strip_marks(row)[: int(np.flatnonzero(row & BEGINS)[1])].tolist())
    end = tokenizer.decode([EOS])
    assert text == (
        "<|system|>\nBe brief.\n<|user|>\ndef f():\n<|assistant|>\n    return"
        f"{end}\n<|user|>\nand {{{{ then }}}}?\n<|assistant|>\npass{end}"
    )


def test_a_template_of_ones_own(tokenizer, tmp_path):
    template = tmp_path / "template.jinja"
    template.write_text(
        "{% for m in messages if m.role != 'system' %}[{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}]{% endfor %}"
    )
    for given in (str(template), template.read_text()):
        samples = open_lines(tmp_path / "a.jsonl", [TALK], tokenizer, seq_length=127, template=given)
        row = all_rows(samples)[0]
        assert learned(row) == [*tokenizer.encode("    return"), *tokenizer.encode("pass")]
        text = tokenizer.decode(strip_marks(row).tolist()).removesuffix(tokenizer.decode([EOS]))
        assert text.startswith("[def f():][    return][and {{ then }}?][pass]" + tokenizer.decode([EOS]))


HOSTILE = {
    "{{ ''.__class__.__mro__ }}": "attribute '__class__' of 'str' object is unsafe",
    "{{ cycler.__init__.__globals__ }}": "attribute '__init__'",
    "{{ messages.append(1) }}": "attribute 'append' of 'list' object is unsafe",
    "{% for i in range(1000000000) %}{% endfor %}": "Range too big",
    "{{ 'a' * 100000000000 }}": "* of a str and a int is not allowed",
    "{{ 9 ** 999999999 }}": "** of a int and a int is not allowed",
    "{% for i in range(99999) %}{{ 'a' | center(999) }}{% endfor %}": "more than 16777216 characters",
    "{{ raise_exception('roles must alternate') }}": "roles must alternate",
    "{{ lipsum() }}": "'lipsum' is undefined",
}


@pytest.mark.parametrize("text", HOSTILE)
def test_what_a_template_may_not_do(text, tokenizer, tmp_path):
    template = text + "{% generation %}x{% endgeneration %}"
    message = rf"a.jsonl:1: the chat template failed: .*{re.escape(HOSTILE[text])}.*; mend the line"
    with pytest.raises(InputError, match=message):
        open_lines(tmp_path / "a.jsonl", [TALK], tokenizer, template=template)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("nowhere.jinja", "data.chat_template nowhere.jinja cannot be read"),
        ("{% for %}", "data.chat_template, line 1"),
        ("{% break %}", "data.chat_template: 'break' outside loop"),
        ("{{ messages }}", "does not say what is to be learned"),
        ("{{ messages | random }}", "No filter named 'random'"),
    ],
)
def test_templates_that_are_none(template, message):
    with pytest.raises(InputError, match=message):
        ChatTemplate(template, eos_token="")


def test_without_jinja2(monkeypatch):
    chat._environment.cache_clear()
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(InputError, match="need the jinja2 package: pip install"):
        ChatTemplate("", eos_token="")


# --- packing and order -----------------------------------------------------------------------------------------------


def test_rows_hold_every_conversation_once_and_whole(tokenizer, tmp_path):
    samples = open_lines(tmp_path / "a.jsonl", INSTRUCTIONS, tokenizer)
    found = []
    for row in all_rows(samples):
        pieces = np.split(row, np.flatnonzero(row & BEGINS))
        assert len(pieces[0]) == 0  # a row begins with a conversation
        found += [strip_marks(piece).tolist() for piece in pieces[1:] if (piece & NO_LOSS == 0).any()]
    wanted = [[*tokenizer.encode(x["prompt"]), *tokenizer.encode(x["completion"]), EOS] for x in INSTRUCTIONS]
    assert sorted(found) == sorted(wanted)
    assert samples.summary.conversations == 40
    assert samples.summary.tokens == sum(map(len, wanted))
    assert samples.summary.counted_tokens == sum(len(tokenizer.encode(x["completion"])) + 1 for x in INSTRUCTIONS)


def test_places_do_not_overlap_and_fill_rows():
    sizes = np.random.default_rng(0).integers(1, 65, 3000).tolist()
    places = place_in_rows(sizes, 65)
    used = np.zeros((max(row for row, _ in places) + 1, 65), int)
    for size, (row, start) in zip(sizes, places, strict=True):
        assert start + size <= 65
        used[row, start : start + size] += 1
    assert used.max() == 1
    assert used.mean() > 0.9  # with no row but the newest open, it would be 0.75
    assert place_in_rows([65] * (2 * OPEN_ROWS), 65) == [(i, 0) for i in range(2 * OPEN_ROWS)]


def test_what_does_not_fit_is_cut_and_told(tokenizer, tmp_path):
    lines = [*INSTRUCTIONS[:2], {"prompt": "x", "completion": " y" * 100}, {"prompt": "x " * 100, "completion": "y"}]
    summary = open_lines(tmp_path / "a.jsonl", lines, tokenizer, seq_length=32).summary
    sizes = [len(tokenizer.encode(x["prompt"])) + len(tokenizer.encode(x["completion"])) + 1 for x in lines[2:]]
    assert (summary.conversations, summary.cut, summary.dropped) == (3, 2, 1)
    assert summary.cut_tokens == sum(sizes) - 2 * 33
    assert f"2 were longer than 33 tokens and lost {summary.cut_tokens}; 1 left out" in str(summary)


def test_packing_has_no_cross_talk(tokenizer, tmp_path):
    """The gradients of two conversations in one row are the sum of those of each alone."""
    lines = [INSTRUCTIONS[3], {"messages": TALK["messages"][1:3]}]
    graphdef, params = nnx.split(abstract_model(TINY))[0], pure_params(init_model(TINY, seed=1))

    @jax.jit
    def summed(params, row):
        tokens, segment_ids, weights = read_batch(row, Masks(targets=True, documents=True))
        loss = next_token_loss(nnx.merge(graphdef, params), tokens, segment_ids, (weights > 0).astype(jnp.float32))
        return loss * weights.size

    def gradients_of(name, lines):
        rows = all_rows(open_lines(tmp_path / name, lines, tokenizer, seq_length=63))
        assert len(rows) == 1
        loss, gradients = jax.value_and_grad(summed)(params, jnp.asarray(rows))
        return float(loss), named_leaves(gradients)

    loss, packed = gradients_of("both.jsonl", lines)
    alone = [gradients_of(f"{i}.jsonl", [line]) for i, line in enumerate(lines)]
    assert loss == pytest.approx(sum(one for one, _ in alone), rel=1e-6)
    for name, gradient in packed.items():
        wanted = sum(np.asarray(one[name]) for _, one in alone)
        np.testing.assert_allclose(gradient, wanted, atol=1e-5 * max(1, np.abs(wanted).max()), err_msg=name)


def test_epochs_have_each_row_once_in_another_order(tokenizer, tmp_path):
    samples = open_lines(tmp_path / "a.jsonl", INSTRUCTIONS, tokenizer, seed=5)
    n = samples.samples_per_epoch
    epochs = [samples.rows(np.arange(e * n, (e + 1) * n)).tolist() for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1])
    assert epochs[0] != epochs[1]
    across = samples.rows(np.arange(n - 2, n + 2)).tolist()  # any rows, in any sequence: what a host reads
    assert across == epochs[0][-2:] + epochs[1][:2]
    assert samples.rows(np.array([n + 1, 0])).tolist() == [epochs[1][1], epochs[0][0]]


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def talks(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("talks")
    write_lines(folder / "train.jsonl", [*INSTRUCTIONS, TALK] * 2)
    write_lines(folder / "valid.jsonl", INSTRUCTIONS[:5])
    sources = {"train": str(folder / "train.jsonl"), "valid": {"talks": str(folder / "valid.jsonl")}}
    make = functools.partial(make_config, data, data=sources, optimizer={"schedule": "constant"})
    make = functools.partial(make, train={"steps": 4, "batch_size": 8, "seq_length": 64})
    train(make(), folder / "run", devices=jax.devices()[:1])
    return make, folder


def test_a_run_on_conversations(talks):
    make, folder = talks
    config = make()
    run = Run(config, folder / "run", jax.devices()[:1])
    rows = run.train_loader.host_batch(0)
    ids = np.cumsum(rows & BEGINS != 0, axis=1)
    logits = init_model(TINY, seed=config.train.seed)(strip_marks(rows)[:, :-1], segment_ids=ids[:, :-1])
    targets = strip_marks(rows)[:, 1:]
    losses = -np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), targets[..., None], axis=-1)[..., 0]
    assert losses_of(folder / "run")[0] == pytest.approx(losses[rows[:, 1:] & NO_LOSS == 0].mean(), rel=1e-6)
    events = (folder / "run" / "events.jsonl").read_text()
    assert re.search(r"data.train: 82 conversations, [\d,]+ tokens of which [\d,]+ count, in \d+ rows", events)


def test_few_conversations_are_held_out_in_whole_batches(talks):
    """Rows in which nothing counts fill the last batch; the loss is that of all five."""
    make, folder = talks
    run = Run(make(), folder / "run", jax.devices()[:1])
    loader = run.valid_loaders["talks"]
    assert loader.num_batches == 1
    rows = loader.host_batch(0)
    assert (rows[-1] & NO_LOSS != 0).all()
    assert np.isfinite(run.heldout.measure(run.init_state().params, lambda what: None)["valid_loss/talks"])


def test_a_run_on_conversations_goes_on_to_the_bit(talks, tmp_path):
    make, folder = talks
    train(make(train={"steps": 2, "batch_size": 8, "seq_length": 64}), tmp_path / "run", devices=jax.devices()[:1])
    train(make(), tmp_path / "run", devices=jax.devices()[:1])
    assert params_digest(tmp_path / "run", 4) == params_digest(folder / "run", 4)


def test_a_host_that_has_some_of_the_devices_reads_their_rows_of_the_same_batch(talks):
    make, folder = talks
    loader = Run(make(mesh={"data": 2, "fsdp": 2, "model": 2}), folder / "other").train_loader
    np.testing.assert_array_equal(loader.batch(3), loader.host_batch(3))
    tokens = strip_marks(loader.host_batch(3)).astype("<i4").tobytes()
    assert loader.digest(3) == hashlib.sha256(tokens).hexdigest()


def test_conversations_beside_another_order(talks, data):
    make, folder = talks
    for fields in ({"order": "megatron"}, {"split": "9,1"}):
        with pytest.raises(InputError, match="conversations, which data.order=megatron and data.split are not for"):
            Run(make(data={"train": str(folder / "train.jsonl"), **fields}), folder / "other")
    with pytest.raises(InputError, match="data.train holds conversations, which are tokenised .* set data.tokenizer"):
        Run(make(data={"train": str(folder / "train.jsonl"), "tokenizer": ""}), folder / "other")


# --- bad lines -------------------------------------------------------------------------------------------------------

BAD_LINES = {
    "{": "not JSON",
    "[1]": "wanted prompt and completion, or messages, got a list without any",
    '{"prompt": "x"}': "wanted prompt and completion, or messages, got the keys prompt",
    '{"prompt": 1, "completion": "x"}': "prompt: wanted a string, got a int",
    '{"prompt": "x", "completion": null}': "completion: wanted a string, got nothing",
    '{"messages": "x"}': "messages: wanted a list of objects",
    '{"messages": []}': "nothing to learn: the roles are none",
    '{"messages": [{"role": "user"}]}': "content of message 0: wanted a string, got nothing",
    '{"messages": [{"role": "user", "content": "x"}]}': "nothing to learn: the roles are user",
    '{"prompt": "\\ud800", "completion": "x"}': "prompt: half a surrogate pair",
    '{"prompt": "x", "completion": "\\ufdd0"}': "completion: U+FDD0 and U+FDD1 are no characters",
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_lines_that_are_no_conversation(line, tokenizer, tmp_path):
    with pytest.raises(InputError, match=f"a.jsonl:3: {re.escape(BAD_LINES[line])}.*; mend the line or take it out"):
        open_lines(tmp_path / "a.jsonl", [INSTRUCTIONS[0], "", line], tokenizer)


def test_files_that_are_none(tokenizer, tmp_path):
    with pytest.raises(InputError, match="no file nowhere.jsonl"):
        open_conversations(["nowhere.jsonl"], tokenizer=tokenizer, eos_token=EOS, template="", seq_length=8, seed=None)
    with pytest.raises(InputError, match=r"something to learn within train.seq_length 8 \(1 have it beyond\)"):
        open_lines(tmp_path / "a.jsonl", ["", TALK], tokenizer, seq_length=8)
    (tmp_path / "b.jsonl").write_bytes(b'{"prompt": "\xff"}\n')
    with pytest.raises(InputError, match="b.jsonl:1: 'utf-8' codec can't decode"):
        open_conversations(
            str(tmp_path / "b.jsonl"), tokenizer=tokenizer, eos_token=EOS, template="", seq_length=8, seed=None
        )
