"""The command line as a person meets it: its words and its exit codes, in real processes where that adds anything."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import neox_jax
from neox_jax.cli import main
from neox_jax.config import ModelConfig
from neox_jax.convert.torch_files import read_torch_file, save_torch_file
from neox_jax.model import init_model
from neox_jax.tokenizer import train_tokenizer

ROOT = Path(__file__).resolve().parents[1]
VERBS = ("train", "generate", "eval", "convert", "checkpoint", "revisions", "tokenize", "merge-shards")
VERBS += ("train-tokenizer", "corpus", "data", "bench", "plot")
TEXT = (ROOT / "neox_jax" / "model.py").read_text(encoding="utf-8")


def neox(*arguments, check=True) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "neox_jax.cli", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert not check or done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """text.txt, tokenizer.json and tokens.{bin,idx} by the verbs, and a saved tiny model."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    neox("train-tokenizer", folder / "text.txt", "--vocab-size", 512, "--output", folder / "tokenizer.json")
    out = neox(
        "tokenize", folder / "text.txt", "--tokenizer", folder / "tokenizer.json", "--append-eod",
        "--output", folder / "tokens",
    )  # fmt: skip
    assert "1 documents" in out.stdout
    model = init_model(ModelConfig.preset("tiny"), seed=1)
    neox_jax.save_model(model, folder / "model", tokenizer=neox_jax.load_tokenizer(folder / "tokenizer.json"))
    return folder


def refused(capsys, *arguments) -> str:
    """Runs the verb in this process; what it printed, which must be one line, with exit code 65."""
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    lines = capsys.readouterr().err.strip().splitlines()
    assert (code, len(lines)) == (65, 1), lines
    assert lines[0].startswith("neox-jax: ")
    return lines[0]


def test_help_and_version():
    assert neox("--version").stdout.strip() == f"neox-jax {neox_jax.__version__}"
    text = neox("--help").stdout
    for verb in VERBS:
        assert verb in text
        assert "--debug" in neox(verb, "--help").stdout


def test_help_needs_no_jax():
    code = (
        "import sys\nfrom neox_jax.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\nprint('jax' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip().endswith("False")


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("trian",),
        ("train",),
        ("bench", "train"),
        ("generate", "--model", "x"),
        ("train", "--config", "x", "--wrkdir", "y"),
    ],
)
def test_bad_usage_is_2(arguments, capsys):
    try:
        code = main(list(arguments))
    except SystemExit as error:  # argparse's own way
        code = error.code
    assert code == 2
    assert capsys.readouterr().err


def test_tokenize_round_trip(work):
    tokens = np.fromfile(work / "tokens.bin", np.uint16)
    tokenizer = neox_jax.load_tokenizer(work / "tokenizer.json")
    assert tokens[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(tokens[:-1].tolist()) == TEXT


def test_a_tokenizer_beside_a_damaged_config(work, tmp_path):
    tokenizer = neox_jax.load_tokenizer(work / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_json())
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 5}))
    assert neox_jax.load_tokenizer(tmp_path).vocab_size == tokenizer.vocab_size
    (tmp_path / "config.json").write_text('{"eos_token_id": ')
    with pytest.raises(neox_jax.InputError, match="config.json cannot be read as JSON"):
        neox_jax.load_tokenizer(tmp_path)


def test_train_generate_eval_convert(work):
    run = work / "run"
    fields = {"data.train": work / "tokens", "data.valid": work / "tokens", "data.tokenizer": work / "tokenizer.json"}
    fields |= {"eval.prompt": "def ", "eval.sample_tokens": 8, "eval.batches": 2}
    overrides = [f"--config.{name}={value}" for name, value in fields.items()]
    out = neox("train", "--config", "configs/tiny.py", "--workdir", run, *overrides)
    assert "held-out loss after step 20:" in out.stdout
    assert "bits per byte" in out.stdout
    assert "a sample of what it writes:" in out.stdout
    assert "training 20/20  loss" in out.stderr  # plain lines where there is no terminal
    greedy = ["--prompt", "class ", "--temperature", 0, "--max-new-tokens", 8]
    text = neox("generate", "--model", run, *greedy).stdout
    assert neox("generate", "--model", f"{run}@20", *greedy).stdout == text
    out = neox("convert", run, work / "exported", "--to", "hf")
    assert "265,600 parameters" in out.stdout
    assert neox("generate", "--model", work / "exported", *greedy).stdout == text
    scores = [
        json.loads(neox("eval", "--model", source, "--text", work / "text.txt", "--json").stdout)
        for source in (run, work / "exported")
    ]
    assert scores[0]["num_bytes"] == len(TEXT.encode())
    assert scores[0] == pytest.approx(scores[1])
    assert 0 < scores[0]["bits_per_byte"] < 8


def test_convert_through_neox(work, tmp_path):
    neox("convert", work / "model", tmp_path / "neox", "--to", "neox", "--tensor-parallel", 2)
    assert (tmp_path / "neox" / "latest").read_text().startswith("global_step")
    out = neox("convert", tmp_path / "neox", tmp_path / "back", "--to", "hf")
    assert "265,600 parameters" in out.stdout
    files = [folder / "model.safetensors" for folder in (work / "model", tmp_path / "back")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert (tmp_path / "back" / "tokenizer.json").read_text() == (work / "model" / "tokenizer.json").read_text()


def test_verify_compares_any_two_formats(work, tmp_path, capsys):
    model = neox_jax.load_model(work / "model")
    for format in ("neox", "orbax"):
        neox_jax.save_model(model, tmp_path / format, format=format)
        assert main(["convert", str(work / "model"), str(tmp_path / format), "--verify"]) == 0
        assert capsys.readouterr().out.endswith(": the same\n")
    kernel = model.layers.mlp.dense_4h_to_h.kernel
    model.layers.mlp.dense_4h_to_h.kernel = type(kernel)(kernel[...].at[2, 0, 0].add(0.5))
    neox_jax.save_model(model, tmp_path / "changed")
    assert main(["convert", str(work / "model"), str(tmp_path / "changed"), "--verify"]) == 65
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("gpt_neox.layers.2.mlp.dense_4h_to_h.weight differs, by at most 0.5")
    assert lines[1].endswith("1 tensor differs")
    half = neox_jax.load_model(work / "model", dtype="float16")
    neox_jax.save_model(half, tmp_path / "half")
    assert main(["convert", str(work / "model"), str(tmp_path / "half"), "--verify"]) == 65
    assert "float32[512, 64] and float16[512, 64]" in capsys.readouterr().out


def test_convert_says_how_far_ranks_drifted(work, tmp_path, capsys):
    assert main(["convert", str(work / "model"), str(tmp_path / "neox"), "--to", "neox", "--tensor-parallel", "2"]) == 0
    assert "between ranks" not in capsys.readouterr().out
    path = next((tmp_path / "neox").glob("global_step*/layer_03-model_01-model_states.pt"))
    tree = {name: tensor.read() for name, tensor in read_torch_file(path).items()}
    tree["input_layernorm.weight"] = tree["input_layernorm.weight"] + np.float32(0.25)
    save_torch_file(path, tree)
    assert main(["convert", str(tmp_path / "neox"), str(tmp_path / "back"), "--to", "hf"]) == 0
    out = capsys.readouterr().out
    assert (
        "tensors that differ between ranks and were averaged: 1; most gpt_neox.layers.1.input_layernorm.weight, by 0.25"
        in out
    )
    scale = neox_jax.load_model(tmp_path / "back").layers.input_layernorm.scale[...]
    np.testing.assert_array_equal(scale[1], np.full(64, 1.125, np.float32))


def test_generate_from_a_file(work):
    lines = [{"prompt": "def f", "id": 7}, {"prompt": "class A", "id": 8}]
    (work / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    files = ["--input", work / "prompts.jsonl", "--output", work / "out.jsonl"]
    neox("generate", "--model", work / "model", *files, "--max-new-tokens", 5, "--temperature", 0)
    out = [json.loads(line) for line in (work / "out.jsonl").read_text().splitlines()]
    assert [(line["prompt"], line["id"]) for line in out] == [("def f", 7), ("class A", 8)]
    assert all(line["finish_reason"] in ("length", "stop") for line in out)
    alone = neox(
        "generate", "--model", work / "model", "--prompt", "class A", "--max-new-tokens", 5, "--temperature", 0
    )
    assert alone.stdout == out[1]["completion"] + "\n"


@pytest.mark.parametrize("what", ["train", "decode", "prefill"])
def test_bench_says_what_it_measured(what):
    shape = ["--preset", "tiny", "--batch-size", 2, "--seq-length", 16, "--steps", 1]
    result = json.loads(neox("bench", what, *shape, "--json").stdout)
    assert {"step_seconds", "tokens_per_second", "device", "jax"} <= result.keys()
    share = result["bandwidth_share" if what == "decode" else "mfu"]
    assert 0 < share < 2
    assert "tokens_per_second" in neox("bench", what, *shape).stdout


BAD = {
    "no model": (["generate", "--model", "{w}/none", "--prompt", "x"], "no model at"),
    "a folder that is no model": (["generate", "--model", "{w}", "--prompt", "x"], "is no model"),
    "prompt over the context": (
        ["generate", "--model", "{w}/model", "--prompt", "x y z " * 50],
        "over the model's context of 64",
    ),
    "empty prompt": (["generate", "--model", "{w}/model", "--prompt", ""], "is empty"),
    "temperature": (["generate", "--model", "{w}/model", "--prompt", "x", "--temperature", "-1"], "temperature is -1"),
    "bad prompts": (["generate", "--model", "{w}/model", "--input", "{w}/text.txt", "--output", "{w}/o"], "line 1"),
    "no config": (["train", "--config", "none.py", "--workdir", "{w}/new"], "no config file at none.py"),
    "misspelt field": (
        ["train", "--config", "configs/tiny.py", "--workdir", "{w}/new", "--config.optimizer.lerning_rate=1"],
        "did you mean 'learning_rate'?",
    ),
    "no data": (["train", "--config", "configs/tiny.py", "--workdir", "{w}/new"], "data.train is ''"),
    "mesh": (
        ["train", "--config", "configs/tiny.py", "--workdir", "{w}/new", "--config.mesh.model=3",
         "--config.data.train={w}/tokens"],
        "but there are 8",
    ),
    "token beyond the vocabulary": (
        ["train", "--config", "configs/tiny.py", "--workdir", "{w}/new", "--config.model.vocab_size=256",
         "--config.data.train={w}/tokens"],
        "is not in the vocabulary of 256",
    ),
    "empty corpus": (["train-tokenizer", "{w}/empty.txt", "--vocab-size", "512", "--output", "{w}/t.json"], "empty"),
    "corpus too small": (["train-tokenizer", "{w}/text.txt", "--vocab-size", "9999", "--output", "{w}/t"], "at most"),
    "nothing to tokenize": (
        ["tokenize", "{w}/empty.txt", "--tokenizer", "{w}/tokenizer.json", "--output", "{w}/nothing"],
        "no documents",
    ),
    "no such input": (
        ["tokenize", "{w}/none.txt", "--tokenizer", "{w}/tokenizer.json", "--output", "{w}/nothing"],
        "none.txt",
    ),
    "no tokenizer": (["tokenize", "{w}/text.txt", "--tokenizer", "{w}/none.json", "--output", "{w}/x"], "none.json"),
    "destination in use": (["convert", "{w}/model", "{w}", "--to", "hf"], "already has something in it"),
    "no text": (["eval", "--model", "{w}/model", "--text", "{w}/none.txt"], "cannot read"),
    "preset": (["bench", "train", "--preset", "pythia-70n"], "did you mean 'pythia-70m'?"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_65(work, name, capsys):
    (work / "empty.txt").write_text("")
    arguments, message = BAD[name]
    before = sorted(work.iterdir())
    assert message in refused(capsys, *[a.format(w=work) for a in arguments])
    if name != "token beyond the vocabulary":  # known only when the row is read
        assert sorted(work.iterdir()) == before


def test_a_real_process_exits_with_65(work):
    arguments = ["generate", "--model", work / "none", "--prompt", "x"]
    done = neox(*arguments, check=False)
    assert (done.returncode, len(done.stderr.strip().splitlines())) == (65, 1), done.stderr
    done = neox(*arguments, "--debug", check=False)
    assert done.returncode != 0
    assert "Traceback" in done.stderr
    assert "no model at" in done.stderr


def test_a_tokenizer_larger_than_the_model(work, tmp_path, capsys):
    train_tokenizer([TEXT], vocab_size=520).save(tmp_path / "big.json")
    arguments = ["eval", "--model", work / "model", "--text", work / "text.txt", "--tokenizer", tmp_path / "big.json"]
    assert "the model's vocabulary has 512" in refused(capsys, *arguments)


def test_what_is_compiled_is_kept(work, tmp_path):
    """A second process compiles nothing that took long: the cache folder stays as it is."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("JAX_")}
    env |= {"XDG_CACHE_HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "neox_jax.cli", "generate", "--model", str(work / "model"), "--prompt", "def f"]

    def kept() -> set[str]:
        subprocess.run([*command, "--max-new-tokens", "3"], env=env, cwd=ROOT, check=True, capture_output=True)
        (folder,) = (tmp_path / "neox_jax").iterdir()
        return {path.name for path in folder.iterdir() if path.name.endswith("-cache")}

    first = kept()
    assert len(first) >= 3  # prefill, insertion, a block
    assert kept() == first


def test_help_comes_at_once():
    """Neither jax nor numpy is loaded for it."""
    loaded = "import sys, neox_jax.cli; neox_jax.cli._parser(); print('jax' in sys.modules, 'numpy' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", loaded], cwd=ROOT, check=True, capture_output=True, text=True)
    assert out.stdout.split() == ["False", "False"]
