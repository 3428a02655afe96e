"""`neox-jax data`: the batch that a step was trained on, and where a text was."""

import os
import subprocess
import sys

import numpy as np
import pytest
from runs import ROOT, make_config, train_arguments
from token_data import write

from neox_jax.cli import main
from neox_jax.data.loader import Loader
from neox_jax.data.show import TrainingData
from neox_jax.errors import InputError
from neox_jax.metrics import read_metrics


def show(capsys, *arguments, code=0) -> str:
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == code
    streams = capsys.readouterr()
    return streams.err if code else streams.out


def data_arguments(data, *arguments, **overrides):
    fields = train_arguments(data, "", **overrides)
    return ["data", *arguments, *fields[1:3], *fields[5:]]


def test_a_batch_is_the_one_that_the_run_was_trained_on(data, tmp_path, capsys):
    settings = {"train.steps": 2, "log.every": 1, "log.batch_digest": "true"}
    main([str(argument) for argument in train_arguments(data, tmp_path / "run", **settings)])
    for line in read_metrics(tmp_path / "run" / "metrics.jsonl"):
        shown = show(capsys, *data_arguments(data, "batch", "--step", line["step"] - 1, **settings))
        assert f"batch_sha256 {line['batch_sha256']}\n" in shown


def test_no_device_is_needed(data):
    arguments = [sys.executable, "-m", "neox_jax.cli", *map(str, data_arguments(data, "batch", "--step", 0))]
    environment = {**os.environ, "JAX_PLATFORMS": "absent"}  # which fails where jax starts a backend
    done = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("step 0: ")


def test_rows_are_shown_with_their_documents(tmp_path, capsys, data):
    write(tmp_path / "set", [[1, 2, 3], [], [4] * 5, [5] * 5])
    config = make_config(
        data,
        train={"steps": 2, "batch_size": 2, "seq_length": 5},
        data={"train": str(tmp_path / "set"), "order": "sequential", "tokenizer": ""},
    )
    shown = TrainingData(config)
    digest = Loader(shown.samples, batch_size=2, seq_length=5).digest(0)
    assert list(shown.describe(0)) == [
        f"step 0: 2 rows of 6 tokens, samples 0 to 1, batch_sha256 {digest}",
        "\n=== row 0, sample 0",
        f"--- {tmp_path}/set, document 0 from token 0",
        "1 2 3",
        f"--- {tmp_path}/set, document 2 from token 0",
        "4 4 4",
        "\n=== row 1, sample 1",
        f"--- {tmp_path}/set, document 2 from token 2",
        "4 4 4",
        f"--- {tmp_path}/set, document 3 from token 0",
        "5 5 5",
    ]
    assert list(shown.describe(0, row=1))[1:] == list(shown.describe(0))[6:]
    with pytest.raises(InputError, match="row 2 is not in the batch; it has rows 0 to 1"):
        list(shown.describe(0, row=2))
    with pytest.raises(InputError, match="wanted sample 3"):
        list(shown.describe(1))
    with pytest.raises(InputError, match=r"set data.tokenizer"):
        list(shown.find("text", range(1)))


@pytest.mark.parametrize("order", ["shuffled", "megatron", "sequential"])
def test_documents_of_a_row_are_its_tokens(data, order):
    shown = TrainingData(make_config(data, data={"train": str(data / "train"), "order": order, "tokenizer": ""}))
    dataset = shown.samples.parts[0].dataset
    for sample, row in enumerate(shown.batch(0)):
        pieces = [dataset[p.document][p.offset : p.offset + p.length] for p in shown.samples.pieces(sample)]
        np.testing.assert_array_equal(np.concatenate(pieces), row)


def test_text_and_token_ids(data):
    shown = TrainingData(make_config(data))
    texts, ids = (list(shown.describe(0, row=1, ids=flag))[3::2] for flag in (False, True))
    row = shown.batch(0)[1].tolist()
    assert "".join(texts) == shown.tokenizer.decode(row)
    assert [int(number) for line in ids for number in line.split()] == row


def test_a_text_is_found_in_every_row_that_has_it(data, capsys):
    shown = TrainingData(make_config(data))
    needle = "return"
    wanted = [
        (step, row)
        for step in range(20)
        for row, tokens in enumerate(shown.batch(step).tolist())
        if needle in shown.tokenizer.decode(tokens)
    ]
    found = list(shown.find(needle, range(20)))
    assert wanted
    assert [(one.step, one.row) for one in found] == wanted
    assert all(needle in one.text and one.sample == 8 * one.step + one.row for one in found)
    assert list(shown.find("is nowhere, we hope, zqzqzq", range(3))) == []
    out = show(capsys, *data_arguments(data, "find", needle, "--steps", "0:3"))
    assert out.splitlines()[-1].endswith(" rows in steps 0 to 2")


@pytest.mark.parametrize(
    "arguments", [("batch",), ("find", "x"), ("batch", "--step", "-1"), ("find", "x", "--steps", "3:3")]
)
def test_bad_usage(arguments, data, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(list(map(str, data_arguments(data, *arguments))))
    assert stopped.value.code == 2


def test_overrides_are_checked(data, capsys):
    message = show(capsys, *data_arguments(data, "batch", "--step", 0, **{"data.ordr": "x"}), code=65)
    assert "did you mean 'order'" in message
