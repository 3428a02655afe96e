"""Prompts of a file: in order, resumed to the byte, with other options begun again; and what is typed."""

import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from runs import ROOT
from test_generation import CONFIG
from variants import random_model

import neox_jax
from neox_jax.errors import InputError
from neox_jax.prompts import complete_file, converse, read_prompts
from neox_jax.tokenizer import train_tokenizer

OPTIONS = {"max_new_tokens": 6, "temperature": 0.9, "ignore_eos": True, "batch_size": 4}


@pytest.fixture(scope="module")
def tok():
    return train_tokenizer(
        ["the cat sat on the mat and the dog sat on the log, said the man to the cat. " * 3], vocab_size=290
    )


@pytest.fixture(scope="module")
def model():
    return random_model(dataclasses.replace(CONFIG, vocab_size=304))


@pytest.fixture
def asked(tmp_path):
    """A file of nine prompts, some of them equal."""
    lines = [{"prompt": f"the {'cat ' * (i % 4)}sat", "id": i} for i in range(9)]
    path = tmp_path / "asked.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def read(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines_in_order(model, tok, asked, tmp_path):
    assert complete_file(model, tok, asked, tmp_path / "out" / "a.jsonl", **OPTIONS) == 9
    lines = read(tmp_path / "out" / "a.jsonl")
    assert [line["id"] for line in lines] == list(range(9))
    wanted = neox_jax.generate(model, tok, [line["prompt"] for line in lines], **OPTIONS)
    assert [line["completion"] for line in lines] == [one.text for one in wanted]
    assert lines[0]["prompt"] == lines[4]["prompt"]
    assert lines[0]["completion"] != lines[4]["completion"]  # equal prompts are samples
    assert os.listdir(tmp_path / "out") == ["a.jsonl"]


@pytest.mark.parametrize("torn", [False, True])
def test_goes_on_where_it_was_ended(model, tok, asked, tmp_path, torn, monkeypatch):
    complete_file(model, tok, asked, tmp_path / "whole.jsonl", **OPTIONS)
    whole = (tmp_path / "whole.jsonl").read_text()

    class EndedError(Exception):
        pass

    def ended(self):
        raise EndedError

    monkeypatch.setattr("neox_jax.prompts._Lines.finish", ended)
    with pytest.raises(EndedError):
        complete_file(model, tok, asked, tmp_path / "out.jsonl", **OPTIONS)
    monkeypatch.undo()
    partial = tmp_path / "out.jsonl.partial"
    first, *lines = partial.read_text().splitlines(keepends=True)
    assert "".join(lines) == whole
    marked = [line.replace('"finish_reason": "length"', '"finish_reason": "kept"') for line in lines[:5]]
    partial.write_text("".join([first, *marked, lines[5][:20] if torn else ""]))
    complete_file(model, tok, asked, tmp_path / "out.jsonl", **OPTIONS)
    out = (tmp_path / "out.jsonl").read_text()
    assert [line["finish_reason"] for line in read(tmp_path / "out.jsonl")] == ["kept"] * 5 + ["length"] * 4
    assert out.replace('"kept"', '"length"') == whole
    assert not partial.exists()
    partial.write_text("".join([first, *marked]))
    complete_file(model, tok, asked, tmp_path / "out.jsonl", **{**OPTIONS, "seed": 1})  # another seed: all anew
    assert "kept" not in (tmp_path / "out.jsonl").read_text()


def test_log_probabilities_in_lines(model, tok, asked, tmp_path):
    complete_file(model, tok, asked, tmp_path / "out.jsonl", top_logprobs=2, **OPTIONS)
    for line in read(tmp_path / "out.jsonl"):
        assert len(line["tokens"]) == len(line["logprobs"]) == len(line["top_logprobs"]) == 6
        assert all(len(top) == 2 for top in line["top_logprobs"])


def test_a_real_process_is_killed_and_goes_on(tok, model, tmp_path):
    neox_jax.save_model(model, tmp_path / "model", tokenizer=tok)
    (tmp_path / "asked.jsonl").write_text("".join(f'{{"prompt": "the cat {i}"}}\n' for i in range(400)))
    files = ["--input", tmp_path / "asked.jsonl", "--output", tmp_path / "out.jsonl"]
    options = ["--max-new-tokens", 32, "--batch-size", 8, "--temperature", 0]
    command = [sys.executable, "-m", "neox_jax.cli", "generate", "--model", tmp_path / "model", *files, *options]
    command = list(map(str, command))
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    partial, deadline = tmp_path / "out.jsonl.partial", time.monotonic() + 120
    while time.monotonic() < deadline and not (partial.exists() and len(partial.read_text().splitlines()) > 20):
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    kept = partial.read_text().splitlines()[1:-1]
    assert kept
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"400 completions in {tmp_path / 'out.jsonl'}"
    assert (tmp_path / "out.jsonl").read_text().splitlines()[: len(kept)] == kept
    assert [line["prompt"] for line in read(tmp_path / "out.jsonl")] == [f"the cat {i}" for i in range(400)]


def test_what_is_typed_is_continued(model, tok, monkeypatch, capsys):
    """A line stands behind what was written before; an empty one forgets it."""
    options = {"max_new_tokens": 6, "temperature": 0, "ignore_eos": True}
    monkeypatch.setattr(sys, "stdin", io.StringIO("the cat\n on the\n\nthe cat\n"))
    converse(model, tok, **options)
    first, second, third = capsys.readouterr().out.splitlines()

    def alone(text: str) -> str:
        return neox_jax.generate(model, tok, [text], **options)[0].text

    assert first == third == alone("the cat")
    assert second == alone("the cat" + first + " on the")
    monkeypatch.setattr(sys, "stdin", io.StringIO("the cat sat on the mat. " * 30 + "\n"))
    converse(model, tok, **options)  # longer than the context: its end counts
    assert capsys.readouterr().out
    with pytest.raises(InputError, match="max_new_tokens 64 leaves no room in a context of 64"):
        converse(model, tok, max_new_tokens=64)


def test_files_that_are_no_prompts(tmp_path, model, tok, asked):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"text": "b"}\n')
    with pytest.raises(InputError, match=r'bad.jsonl, line 2: wanted {"prompt": TEXT}, got \'{"text": "b"}\''):
        read_prompts(tmp_path / "bad.jsonl")
    with pytest.raises(InputError, match="cannot read .*none.jsonl: No such file or directory"):
        read_prompts(tmp_path / "none.jsonl")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file/out.jsonl.partial cannot be written: "):
        complete_file(model, tok, asked, tmp_path / "file" / "out.jsonl", **OPTIONS)
