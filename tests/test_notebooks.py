"""The notebooks run from beginning to end, and the outputs that they are kept with are of such a run."""

import ast
import base64
import dataclasses
import json
import re
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
from runs import TEXTS

import neox_jax
from neox_jax.config import ModelConfig
from neox_jax.evaluate import score_text
from neox_jax.metrics import read_metrics

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "notebooks"))
from execute import FOLDER, NAMES, as_shown, execute, with_owner

FUNCTION = re.compile(r"^def .*\n(?:(?: {4}.*)?\n)*", re.MULTILINE)
SPEAKS = re.compile(r"^(\s*print\(|plt\.show\(|show\(|!)", re.MULTILINE)  # what leaves an output, not in a function
OF_A_MACHINE = re.compile(r"(?<![\w.])/(home|root|tmp|usr|var|work|content|Users)\b|site-packages")
MAX_IMAGE_BYTES, MAX_BYTES = 150_000, 500_000


def outputs_of(notebook) -> list:
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def text_of(notebook) -> str:
    return "".join(output.text for output in outputs_of(notebook) if output.output_type == "stream")


def images_of(notebook) -> list[bytes]:
    data = [output.get("data", {}) for output in outputs_of(notebook)]
    return [base64.b64decode(one["image/png"]) for one in data if "image/png" in one]


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_kept_and_are_of_one_clean_run(name):
    path = FOLDER / f"{name}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    silent = [cell.id for cell in cells if SPEAKS.search(FUNCTION.sub("", cell.source + "\n")) and not cell.outputs]
    assert not silent, "print, show or draw, and have no outputs: run notebooks/execute.py"
    assert {output.output_type for output in outputs_of(notebook)} <= {"stream", "display_data"}
    for output in outputs_of(notebook):
        text = json.dumps(output.get("data", {}).get("text/plain", output.get("text", "")))
        assert not OF_A_MACHINE.search(text), text
        assert not re.search(r"Warning|Traceback|\\u001b|\\r", text), text
    assert all(len(image) < MAX_IMAGE_BYTES for image in images_of(notebook))
    assert path.stat().st_size < MAX_BYTES


def test_links_are_to_one_repository():
    for path in [FOLDER / "README.md", *(FOLDER / f"{name}.ipynb" for name in NAMES)]:
        text = path.read_text(encoding="utf-8")
        assert text == with_owner(text), f"{path.name}: run notebooks/execute.py"
    for name in NAMES:
        badge, *_ = re.findall(r"colab\.research\.google\.com/github/\S+", (FOLDER / f"{name}.ipynb").read_text())
        assert badge.endswith(f'/neox_jax/blob/main/notebooks/{name}.ipynb)\\n",')


def test_text_as_a_terminal_shows_it():
    assert as_shown("\x1b[2Kbar 1/2\r\x1b[2Kbar \x1b[32m2/2\x1b[0m\r\n\x1b[?25hdone\r\n") == "bar 2/2\ndone\n"


@pytest.fixture(scope="module")
def some_model(data, tmp_path_factory) -> Path:
    """A Hugging Face folder of a small random model."""
    config = dataclasses.replace(ModelConfig.preset("tiny"), max_position_embeddings=128)
    folder = tmp_path_factory.mktemp("models") / "some-model"
    tokenizer = neox_jax.Tokenizer.from_file(data / "tokenizer.json")
    neox_jax.save_model(neox_jax.init_model(config), folder, tokenizer=tokenizer)
    return folder


def run(name: str, work: Path, **settings) -> nbformat.NotebookNode:
    """The notebook after a run in `work`, on the CPU."""
    notebook = execute(
        name, work, {"JAX_PLATFORMS": "cpu", **{f"NEOX_NOTEBOOK_{k}": str(v) for k, v in settings.items()}}
    )
    for output in outputs_of(notebook):
        assert "Warning" not in output.get("text", "")
    return notebook


def test_train_lowers_the_loss_goes_on_and_leaves_a_model(tmp_path):
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    notebook = run("train", tmp_path, TEXT="text.jsonl", PRESET="tiny", STEPS=10)
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 21))
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.5
    assert "going on from step 10 of 20 in run" in text_of(notebook)
    assert len(images_of(notebook)) == 1
    saved, trained = (neox_jax.load_model(tmp_path / folder) for folder in ("my-model", "run@20"))
    assert np.array_equal(saved.embed_out.embedding[...], trained.embed_out.embedding[...])


def test_quickstart_reads_surprise_and_activations_of_the_model(some_model, tmp_path):
    notebook = run("quickstart", tmp_path, MODEL=some_model)
    text = text_of(notebook)
    model, tokenizer = neox_jax.load_model(some_model), neox_jax.load_tokenizer(some_model)
    assert f"{model.config.num_parameters:,} parameters" in text
    source = "\n".join(cell.source for cell in notebook.cells)
    sentence = ast.literal_eval(re.search(r"^TEXT = (.+)$", source, flags=re.MULTILINE)[1])
    (bits_per_byte,) = re.findall(r"([\d.]+) bits a byte", text)
    assert float(bits_per_byte) == pytest.approx(score_text(model, tokenizer, sentence).bits_per_byte, abs=0.006)
    assert float(re.search(r"largest difference: (\S+)", text)[1]) < 1e-5
    assert len(images_of(notebook)) == 3


def test_convert_ends_where_it_began_and_notices_a_flipped_bit(some_model, tmp_path):
    text = text_of(run("convert", tmp_path, MODEL=some_model))
    assert f"{some_model} and hf: the same\n" in text
    assert f"{some_model} and hf: 1 tensor differs; not all is as it was written\n" in text
    assert text.endswith("neox and hf: the same\n")
    assert "every tensor alike: True" in text


def test_finetune_trains_adapters_that_are_the_same_everywhere(some_model, tmp_path):
    notebook = run("finetune", tmp_path, MODEL=some_model, STEPS=20, RATE="6e-3")
    lines = read_metrics(tmp_path / "adapters" / "metrics.jsonl")
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.2
    text = text_of(notebook)
    differences = dict(re.findall(r"(PEFT's files|merged|over weights in 8 bits): (\S+), logits", text))
    assert float(differences["PEFT's files"]) == 0
    assert 0 < float(differences["merged"]) < 1e-4
    assert len(images_of(notebook)) == 1
    assert (tmp_path / "peft" / "adapter_config.json").is_file()
