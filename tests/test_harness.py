"""lm-evaluation-harness: every log-likelihood, greedy flag and string that its own `hf` model gives, offline."""

import csv
import dataclasses
import json
import os
import subprocess
import sys

import jax
import pytest
from runs import ROOT, TEXTS, make_config

import neox_jax
from neox_jax.cli import main
from neox_jax.config import EvalConfig
from neox_jax.errors import InputError
from neox_jax.metrics import read_metrics
from neox_jax.tasks import Tasks, compare, scores
from neox_jax.train import train

lm_eval = pytest.importorskip("lm_eval", reason="the [eval] extra is not installed")
pytest.importorskip("torch")
QUESTIONS = [
    {"question": f"def f{i}(x):\n    return x", "choices": [" + 1", "", " * 2", " if x else None"], "answer": i % 4}
    for i in range(6)
]
QUESTIONS[1]["choices"][1] = "\n\n\ndef g(): ..."
QUESTIONS[2]["choices"][1] = " "
for question in QUESTIONS:
    question["choices"] = [choice or "()" for choice in question["choices"]]
TASKS = {
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "last_words": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[0]}}",
        "metric_list": [{"metric": "acc"}, {"metric": "perplexity"}],
    },
    "whole_text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "written": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["\n", "def"], "max_gen_toks": 12},
        "metric_list": [{"metric": "exact_match"}],
    },
}


@pytest.fixture(scope="module")
def folder(data, tmp_path_factory):
    """A briefly trained model as a Hugging Face folder, and four local tasks of all request types."""
    folder = tmp_path_factory.mktemp("harness")
    config = make_config(data, train={"steps": 30, "batch_size": 8, "seq_length": 64}, checkpoint={"every": 100})
    train(config, folder / "run")
    tokenizer = neox_jax.load_tokenizer(folder / "run")
    neox_jax.save_model(neox_jax.load_model(folder / "run"), folder / "trained", tokenizer=tokenizer)
    neox_jax.save_model(neox_jax.init_model(config.model, seed=5), folder / "random", tokenizer=tokenizer)
    lines = [{**question, "text": TEXTS[i][: 150 + 700 * i]} for i, question in enumerate(QUESTIONS)]
    (folder / "docs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "tasks").mkdir()
    for name, fields in TASKS.items():
        source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "docs.jsonl")}}}
        task = {"task": name, **source, "test_split": "test", **fields, "metadata": {"version": 1}}
        (folder / "tasks" / f"{name}.yaml").write_text(json.dumps(task))  # JSON is YAML
    return folder


@pytest.fixture(scope="module", params=["trained", "random"])
def both(request, folder):
    """(theirs, ours) of the same weights."""
    from lm_eval.models.huggingface import HFLM

    from neox_jax.harness import NeoxLM

    source = str(folder / request.param)
    return HFLM(pretrained=source, dtype="float32", device="cpu", batch_size=4), NeoxLM(source, dtype="float32")


def instances(kind: str, arguments) -> list:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, pair, i, metadata=("local", i, 1)) for i, pair in enumerate(arguments)]


def test_log_likelihoods(both):
    """Shared contexts, trailing spaces, empty contexts, choices of one token, texts longer than the model's context."""
    theirs, ours = both
    pairs = [(question["question"], choice) for question in QUESTIONS for choice in question["choices"]]
    pairs += [("", "def main():"), ("", "x"), ("a text that ends in spaces   ", "and goes on"), ("x ", " y")]
    pairs += [
        (TEXTS[0][:3000], " = 1"),
        (TEXTS[1][:2000], TEXTS[2][:100]),
        ("<|endoftext|>", "a"),
        ("", "<|endoftext|>b"),
    ]
    wanted = theirs.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True)
    got = ours.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True)
    for pair, one, other in zip(pairs, got, wanted, strict=True):
        assert one[0] == pytest.approx(other[0], abs=1e-4), pair
        assert one[1] == other[1], pair


def test_whole_texts(both):
    theirs, ours = both
    texts = [(TEXTS[0][:20],), (TEXTS[1][:4000],), ("x",), (TEXTS[3],)]
    wanted = theirs.loglikelihood_rolling(instances("loglikelihood_rolling", texts), disable_tqdm=True)
    got = ours.loglikelihood_rolling(instances("loglikelihood_rolling", texts), disable_tqdm=True)
    assert got == pytest.approx(wanted, rel=1e-5, abs=1e-4)


def test_strings(both):
    theirs, ours = both
    asked = [(question["question"], {"until": ["\n", "return"], "max_gen_toks": 16}) for question in QUESTIONS]
    asked += [("import ", {"until": [], "max_gen_toks": 24}), ("class A", {"until": ["e"], "max_gen_toks": 8})]
    asked += [(TEXTS[0][:3000], {"until": ["\n\n"], "max_gen_toks": 10})]
    wanted = theirs.generate_until(instances("generate_until", asked), disable_tqdm=True)
    assert ours.generate_until(instances("generate_until", asked), disable_tqdm=True) == wanted
    assert any(wanted)


def test_a_table_of_tasks(folder, both):
    """simple_evaluate over local tasks: the same results."""
    theirs, ours = both
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
    options = {"tasks": list(TASKS), "task_manager": manager, "bootstrap_iters": 0, "num_fewshot": 0}
    wanted, got = (lm_eval.simple_evaluate(model=one, **options)["results"] for one in (theirs, ours))
    for task in TASKS:
        for name, value in wanted[task].items():
            if isinstance(value, float):
                assert got[task][name] == pytest.approx(value, rel=1e-5), (task, name)


def test_by_their_own_command_line(folder, tmp_path):
    command = [sys.executable, "-m", "neox_jax.harness", "run", "--model", "neox_jax", "--tasks", "choices"]
    command += [
        "--model_args",
        f"pretrained={folder / 'trained'},dtype=float32",
        "--include_path",
        str(folder / "tasks"),
    ]
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "|choices|" in done.stdout


def test_the_verb(folder, tmp_path, capsys):
    """Tables, files, every step of a run, and what is published beside."""
    arguments = ["eval", "--model", str(folder / "run"), "--include-path", str(folder / "tasks"), "--dtype", "float32"]
    arguments += ["--tasks", "choices,whole_text", "--limit", "4", "--output", str(tmp_path / "out")]
    assert main([*arguments, "--steps", "all", "--log-samples", "--compare", "pythia-70m"]) == 0, (
        capsys.readouterr().err
    )
    out = capsys.readouterr().out
    assert out.count("|choices") == 2
    assert out.count("nothing of these tasks is published") == 2
    results = json.loads((tmp_path / "out" / "30" / "results.json").read_text())
    assert results["results"]["choices"]["acc,none"] in (0, 0.25, 0.5, 0.75, 1)
    assert len((tmp_path / "out" / "30" / "samples.jsonl").read_text().splitlines()) == 8
    rows = list(csv.DictReader((tmp_path / "out" / "scores.csv").open()))
    assert {row["step"] for row in rows} == {"0", "30"}
    perplexity = {row["step"]: float(row["value"]) for row in rows if row["metric"] == "bits_per_byte"}
    assert perplexity["30"] < perplexity["0"]  # it has learned something
    assert (tmp_path / "out" / "scores.png").read_bytes().startswith(b"\x89PNG")
    for wrong, code, text in (
        (["--tasks", "choises"], 65, "task 'choises' is not known; did you mean choices"),
        (["--tasks", "sciq"], 65, "the data of task sciq cannot be had ("),
        (
            ["--tasks", "choices", "--compare", "gpt-4"],
            65,
            "nothing published of 'gpt-4' is known; wanted one of gpt-neox",
        ),
        (["--tasks", "choices", "--steps", "7", "--output", "x"], 65, "--steps 7: wanted all, or some of 0, 30"),
        (["--tasks", "choices", "--log-samples"], 2, "--log-samples goes with --output DIR"),
        (["--text", "a", "--tasks", "choices"], 2, "eval takes --tasks A,B or --text FILE..."),
    ):
        assert main([*arguments[:5], *wrong]) == code
        err = capsys.readouterr().err.splitlines()
        assert [line for line in err if line.startswith(f"neox-jax: {text}")], err


@pytest.mark.parametrize("mesh", [{}, {"data": 2, "fsdp": 2, "model": 2}])
def test_while_a_run_trains(data, folder, tmp_path, mesh):
    """Lines of metrics have the scores that the checkpoint of their step has."""
    tasks = {"tasks": ("choices", "written"), "tasks_every": 2, "tasks_path": str(folder / "tasks"), "sample_tokens": 0}
    config = make_config(data, mesh=mesh, train={"steps": 3, "batch_size": 8, "seq_length": 32}, eval=tasks)
    train(config, tmp_path / "run", devices=jax.devices()[: 8 if mesh else 1])
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    names = {"tasks/choices/acc", "tasks/choices/acc_norm", "tasks/written/exact_match"}
    assert [names <= line.keys() for line in lines] == [False, True, True]
    from neox_jax.harness import NeoxLM

    found = Tasks(["choices"], include_path=tasks["tasks_path"]).run(NeoxLM(str(tmp_path / "run"), dtype="float32"))
    assert lines[-1]["tasks/choices/acc"] == found["results"]["choices"]["acc,none"]
    with pytest.raises(InputError, match="task 'choises' is not known"):
        train(dataclasses.replace(config, eval=EvalConfig(tasks=("choises",))), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_metric_under_several_filters_stays_several():
    """As gsm8k has it: neither in a comparison nor in a curve does one take the other's place."""
    values = {"exact_match,strict-match": 0.02, "exact_match_stderr,strict-match": 0.004}
    values |= {"exact_match,flexible-extract": 0.03, "exact_match_stderr,flexible-extract": "N/A", "alias": "gsm8k"}
    results = {"results": {"gsm8k": values}, "n-shot": {"gsm8k": 5}}
    found = {one.metric_name: (one.value, one.stderr) for one in scores(results)}
    assert found == {"exact_match/strict-match": (0.02, 0.004), "exact_match/flexible-extract": (0.03, None)}
    first, second = compare(results, "gpt-neox-20b")
    assert first.startswith("gsm8k exact_match/strict-match (5 shots): 0.0200 ± 0.0040, published 0.0243 (-0.0043; ")
    assert second.startswith("gsm8k exact_match/flexible-extract (5 shots): 0.0300, published 0.0243 (+0.0057; ")
    assert compare(results, "pythia-70m") == []
