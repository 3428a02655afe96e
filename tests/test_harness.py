"""lm-evaluation-harness: every log-likelihood, greedy flag and string that its own `hf` model gives, offline."""

import csv
import dataclasses
import json
import os
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from runs import TEXTS, free_port, make_config
from test_distributed import Processes, codes_of

import neox_jax
from neox_jax.cli import main
from neox_jax.config import EvalConfig
from neox_jax.errors import InputError
from neox_jax.metrics import read_metrics
from neox_jax.tasks import Tasks, compare, scores, table
from neox_jax.tokenizer import train_tokenizer
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
    padded = dataclasses.replace(config.model, vocab_size=576)  # more rows than the tokenizer has ids
    neox_jax.save_model(neox_jax.init_model(padded, seed=5), folder / "random", tokenizer=tokenizer)
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


def test_standard_errors_are_theirs_without_a_fork(folder, monkeypatch):
    """Resampled where there is no formula; in the table with its heads."""
    from lm_eval.api.metrics import bootstrap_stderr, perplexity

    from neox_jax.harness import NeoxLM

    monkeypatch.setattr("neox_jax.tasks.BOOTSTRAPS", 2000)
    monkeypatch.setattr(os, "fork", lambda: pytest.fail("a process with jax's threads was forked"))
    lm = NeoxLM(str(folder / "trained"), dtype="float32")
    found = Tasks(["last_words"], include_path=str(folder / "tasks")).run(lm, log_samples=True, bootstrap=True)
    values = [sample["perplexity"] for sample in found["samples"]["last_words"]]
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    wanted = bootstrap_stderr(perplexity, values, 2000)
    assert found["results"]["last_words"]["perplexity_stderr,none"] == pytest.approx(wanted, rel=1e-12)
    text = table(found)
    assert re.search(r"Tasks *\|Version\|Filter\|n-shot\| *Metric *\| *\| *Value *\| *\| *Stderr *\|", text), text
    (shown,) = re.findall(r"\|perplexity\|.*\|± *\| *([\d.]+)\|", text)
    assert float(shown) == pytest.approx(wanted, abs=1e-4)


def test_by_their_own_command_line(folder, tmp_path):
    """As a script, over a mesh, and over two processes of which the first alone says and writes."""
    model = {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "JAX_NUM_CPU_DEVICES": "2"}
    tasks = ["--tasks", "choices", "--include_path", folder / "tasks", "--model", "neox_jax"]
    args = f"pretrained={folder / 'trained'},dtype=float32,mesh="
    script = os.path.join(os.path.dirname(sys.executable), "lm_eval")
    command = [script, *tasks, "--model_args", f"{args}data=-1", "--output_path", tmp_path / "script"]
    done = subprocess.run(command, env={**os.environ, **model}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "|choices|" in done.stdout

    place, processes = f"coordinator=127.0.0.1:{free_port()},num_processes=2,process_id=", Processes()
    try:
        for i in range(2):
            arguments = [*tasks, "--model_args", f"{args}data=2:model=2,{place}{i}", "--output_path", tmp_path / str(i)]
            processes.start("-m", "lm_eval", "run", *arguments, devices=2)
        outcomes = processes.wait()
    finally:
        processes.close()
    assert codes_of(outcomes) == [0, 0], outcomes
    assert ["|choices|" in out for _, out, _ in outcomes] == [True, False]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "script"]
    one, two = (
        json.loads(next((tmp_path / name).rglob("results_*.json")).read_text())["results"]["choices"]
        for name in ("script", "0")
    )
    assert one == two
    assert {"acc,none", "acc_norm,none"} <= one.keys()


def test_a_process_of_theirs_that_fails_ends_the_others(folder):
    """A model that is not there for one of two; the other is told and does not wait."""
    place, processes = f"coordinator=127.0.0.1:{free_port()},num_processes=2,process_id=", Processes()
    code = "import sys, neox_jax.harness\nfrom lm_eval.__main__ import cli_evaluate\n"
    code += "if sys.argv.pop() == '1': neox_jax.harness.load_model = None\ncli_evaluate()"
    args = f"pretrained={folder / 'trained'},dtype=float32,{place}"
    tasks = ["run", "--tasks", "choices", "--include_path", folder / "tasks", "--model", "neox_jax", "--model_args"]
    try:
        for i in range(2):
            processes.start("-c", code, *tasks, f"{args}{i}", i)
        outcomes = processes.wait()
    finally:
        processes.close()
    assert codes_of(outcomes) == [75, 1], outcomes
    assert "neox-jax: process 1 (" in outcomes[0][2]
    assert ") is gone; start it again" in outcomes[0][2]
    assert "'NoneType' object is not callable" in outcomes[1][2]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("mesh=pipe=2", "'pipe=2' is no mesh of data, fsdp, model; write data=2,model=4"),
        ("mesh=data=3", "mesh data=3 is 3 devices, but there are 8"),
        ("process_id=1", "coordinator, num_processes and process_id go together, and not with distributed"),
        ("distributed=on", "distributed is 'on'; wanted auto or off"),
    ],
)
def test_their_arguments_that_cannot_be(wrong, said, folder):
    from neox_jax.harness import NeoxLM

    with pytest.raises(InputError, match=re.escape(said)):
        NeoxLM.create_from_arg_string(f"pretrained={folder / 'trained'},{wrong}", {"batch_size": 1})


def test_python_starts_without_lm_eval(tmp_path):
    """Where what is started is not lm_eval the file that names our models for it does nothing, as in `pip install`."""
    code = "import sys; print({'lm_eval', 'neox_jax'} & set(sys.modules))"
    (tmp_path / "pip").write_text(code)
    for command in (["-c", code, "lm_eval"], [tmp_path / "pip", "install", "lm_eval"]):
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=60)
        assert (done.stdout, done.stderr) == ("set()\n", ""), command


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


def write_task(folder, name: str, **fields) -> None:
    """A task of one question in a folder of its own."""
    folder.mkdir(exist_ok=True)
    (folder / "one.jsonl").write_text(json.dumps({"question": "def", "answer": " f" * 100}) + "\n")
    source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "one.jsonl")}}}
    task = {"task": name, **source, "test_split": "test", "doc_to_text": "{{question}}", "doc_to_target": "{{answer}}"}
    (folder / f"{name}.yaml").write_text(json.dumps({**task, **fields}))


def test_refused_before_anything_is_computed(folder, tmp_path, capsys, monkeypatch):
    """Each is one line that says which task it is; nothing has been generated or scored by then."""
    writes = {"output_type": "generate_until", "metric_list": [{"metric": "exact_match"}]}
    write_task(tmp_path, "writes", **writes, generation_kwargs={"max_gen_toks": 4})
    write_task(tmp_path, "writes_much", **writes, generation_kwargs={"max_gen_toks": 64})
    write_task(tmp_path, "with_beams", **writes, generation_kwargs={"num_beams": 4})
    write_task(tmp_path, "too_long", output_type="loglikelihood", metric_list=[{"metric": "acc"}])
    length = len(neox_jax.load_tokenizer(folder / "trained").encode("def" + " f" * 100)) - 1
    train_tokenizer(TEXTS, vocab_size=600).save(tmp_path / "large.json")
    (tmp_path / "text.txt").write_text("def f(x):")
    tasks = ["--include-path", str(tmp_path), "--tasks"]
    text = ["--text", str(tmp_path / "text.txt")]
    many = "the tokenizer has 600 ids, the model's vocabulary has 512; use the model's own"
    for wrong, line in (
        ([*tasks, "writes,too_long"], f"task too_long: question 0 has a continuation of {length} tokens; the model's"),
        ([*tasks, "writes,writes_much"], "task writes_much: max_gen_toks is 64; it must be below the model's context"),
        ([*tasks, "writes,with_beams"], "task with_beams: num_beams is not known for generation; known are do_sample"),
        ([*tasks, "writes", "--tokenizer", str(tmp_path / "large.json")], many),
        ([*text, "--tokenizer", str(tmp_path / "large.json")], many),
        ([*text, "--seq-length", "65"], "seq-length is 65; wanted 1 to 64, the model's context"),
        ([*text, "--seq-length", "9", "--stride", "10"], "stride is 10; wanted 1 to the window's 9 tokens"),
        ([*text, "--mesh", "data=3"], "mesh data=3 is 3 devices, but there are 8"),
        ([*tasks, "writes", "--output", str(tmp_path / "text.txt")], f"--output {tmp_path}/text.txt cannot be written"),
        (["--include-path", "nowhere", "--tasks", "writes"], "--include-path nowhere is no folder"),
    ):
        if "tokenizer" in line:
            monkeypatch.setattr(neox_jax, "load_model", lambda *a, **k: pytest.fail("the weights were read"))
            monkeypatch.setattr("neox_jax.harness.load_model", neox_jax.load_model)
        assert main(["eval", "--model", str(folder / "trained"), *wrong]) == 65, wrong
        monkeypatch.undo()
        out, err = capsys.readouterr()
        assert out == ""
        assert err.splitlines()[-1].startswith(f"neox-jax: {line}"), err
        assert not [word for word in ("generating", "scoring") if word in err], err
    for wrong, line in (
        (["--tasks", "a", "--stride", "3"], "--stride does not go with --tasks"),
        (["--text", "a", "--limit", "3"], "--limit does not go with --text"),
        (["--tasks", "a", "--mesh", "pipe=2"], "'pipe=2' is no mesh of data, fsdp, model; write data=2,model=4"),
        (["--tasks", "a", "--limit", "0"], "'0' is no number above 0"),
        (["--text", "a", "--process-id", "0"], "eval takes --coordinator, --num-processes and --process-id together"),
    ):
        try:
            code = main(["eval", "--model", "x", *wrong])
        except SystemExit as error:  # argparse's own way
            code = error.code
        assert (code, line in capsys.readouterr().err) == (2, True), wrong


def test_tasks_that_cannot_be_together(monkeypatch):
    with pytest.raises(InputError, match="arc_challenge is asked for twice, with other numbers of examples"):
        Tasks(["card", "leaderboard"])
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(InputError, match="LOCAL_RANK is 1, where lm_eval gives no results; unset it"):
        Tasks(["piqa"])


@pytest.mark.parametrize(("seq_length", "stride"), [(None, None), (None, 20), (33, 32), (40, 7)])
def test_plain_text_is_what_transformers_says(folder, tmp_path, capsys, seq_length, stride):
    """Every token once, in windows that are made here."""
    import torch
    from transformers import AutoTokenizer, GPTNeoXForCausalLM

    text = TEXTS[1][:1500] + "\n# naïve — 数"
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    theirs = GPTNeoXForCausalLM.from_pretrained(folder / "trained", dtype=torch.float32)
    ids = [0, *AutoTokenizer.from_pretrained(folder / "trained")(text)["input_ids"]]
    size, nats, num_scored = seq_length or 64, 0.0, 0
    for start in range(0, len(ids), stride or size):
        window = torch.tensor(ids[start : start + size + 1])
        if start + len(window) <= num_scored + 1:
            break
        with torch.no_grad():
            logprobs = theirs(window[None, :-1]).logits[0].log_softmax(-1)
        chosen = logprobs[torch.arange(len(window) - 1), window[1:]]
        nats -= float(chosen[num_scored - start :].double().sum())
        num_scored = start + len(window) - 1
    assert num_scored == len(ids) - 1
    arguments = ["eval", "--model", folder / "trained", "--text", tmp_path / "text.txt", "--dtype", "float32", "--json"]
    windows = [f"--{name}={value}" for name, value in (("seq-length", seq_length), ("stride", stride)) if value]
    for mesh in ([], ["--mesh", "data=2,fsdp=2,model=-1"]):
        assert main([*map(str, arguments), *windows, *mesh]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["nats_per_token"] == pytest.approx(nats / (len(ids) - 1), rel=1e-5)
        assert found["bits_per_byte"] == pytest.approx(nats / np.log(2) / len(text.encode()), rel=1e-5)
        assert (found["num_tokens"], found["num_bytes"]) == (len(ids) - 1, len(text.encode()))


def test_two_processes_are_one(folder, tmp_path):
    """Over a mesh of both: the scores of one process, written and said by the first alone."""
    coordinator, processes = f"127.0.0.1:{free_port()}", Processes()
    options = ["--model", folder / "trained", "--dtype", "float32", "--mesh", "data=2,model=2", "--batch-size", "auto"]
    options += ["--tasks", "choices,written", "--include-path", folder / "tasks", "--log-samples"]
    try:
        for i in range(2):
            place = ["--coordinator", coordinator, "--num-processes", 2, "--process-id", i]
            output = ["--output", tmp_path / str(i)]
            processes.start("-m", "neox_jax.cli", "eval", *options, *output, *place, devices=2)
        outcomes = processes.wait()
    finally:
        processes.close()
    assert codes_of(outcomes) == [0, 0], outcomes
    said = [[line for line in out.splitlines() if not line.startswith("[Gloo]")] for _, out, _ in outcomes]
    assert any("|choices" in line for line in said[0])
    assert (said[1], outcomes[1][2]) == ([], "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0"]
    found = json.loads((tmp_path / "0" / "results.json").read_text())
    from neox_jax.harness import NeoxLM

    lm = NeoxLM(str(folder / "trained"), dtype="float32")
    wanted = Tasks(["choices", "written"], include_path=str(folder / "tasks")).run(lm, log_samples=True)
    assert [one.value for one in scores(found)] == [one.value for one in scores(wanted)]
    answers = {"choices": [], "written": []}
    for line in (tmp_path / "0" / "samples.jsonl").read_text().splitlines():
        sample = json.loads(line)
        answers[sample["task"]].append(sample["filtered_resps"])
    wanted_answers = {task: [one["filtered_resps"] for one in several] for task, several in wanted["samples"].items()}
    assert answers["written"] == wanted_answers["written"]
    assert any(text for (text,) in answers["written"])
    logprobs, wanted_logprobs = (
        [[float(logprob) for logprob, _ in choices] for choices in one["choices"]] for one in (answers, wanted_answers)
    )
    np.testing.assert_allclose(logprobs, wanted_logprobs, atol=1e-4)


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
