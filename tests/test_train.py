"""Whole runs through real files: resume, checkpoints, metrics, other meshes, what is refused before it starts."""

import dataclasses
import json
import math
import os
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from runs import TEXTS, TINY, losses_of, make_config, params_digest, run_cli, train_arguments, wait_for_step

import neox_jax
from neox_jax.checkpoint.steps import list_steps, read_meta
from neox_jax.convert.source import FORMATS
from neox_jax.data.megatron import IndexedDatasetWriter
from neox_jax.errors import InputError
from neox_jax.evaluate import score_text
from neox_jax.metrics import MetricsWriter, read_metrics
from neox_jax.model import init_model
from neox_jax.train import Run, train
from neox_jax.tree import named_leaves


@pytest.fixture(scope="module")
def straight(data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "straight"
    train(make_config(data), folder)
    return folder


def test_a_run_folder(straight, data):
    assert list_steps(straight / "checkpoints") == [0, 2, 4]
    assert (straight / "tokenizer.json").read_text() == (data / "tokenizer.json").read_text()
    assert json.loads((straight / "model.json").read_text()) == dataclasses.asdict(TINY)
    assert json.loads((straight / "config.json").read_text())["train"]["steps"] == 4
    assert any((straight / "tensorboard").iterdir())
    assert read_meta(straight / "checkpoints" / "4") == (TINY, "float32")


def test_metrics_lines(straight, data):
    lines = read_metrics(straight / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    wanted = "step loss grad_norm learning_rate tokens tokens_per_second step_seconds data_wait_seconds mfu"
    for n, line in enumerate(lines):
        assert set(line) == {*wanted.split(), "skipped_updates", "batch_sha256"}
        assert line["tokens"] == (n + 1) * 8 * 32
        assert line["skipped_updates"] == 0
        assert all(math.isfinite(v) for v in line.values() if isinstance(v, float))
        assert 0 < line["mfu"] < 2
    assert lines[0]["learning_rate"] == 0.0  # the first update of cosine_floor's warm-up
    tokens = Run(make_config(data), straight).train_loader.host_batch(0)
    log_probs = jax.nn.log_softmax(neox_jax.load_model(f"{straight}@0")(tokens[:, :-1]))
    nats = -np.take_along_axis(np.asarray(log_probs), tokens[:, 1:, None], axis=-1).mean()
    assert lines[0]["loss"] == pytest.approx(nats, rel=1e-5)
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert len({line["batch_sha256"] for line in lines}) == 4


def test_four_steps_are_two_and_a_restart_and_two(data, straight, tmp_path):
    config, half = make_config(data), tmp_path / "half"
    train(config, half)
    shutil.rmtree(half / "checkpoints" / "4")  # as if the process had been killed after the checkpoint of step 2
    train(config, half)
    assert params_digest(half, 4) == params_digest(straight, 4)
    assert losses_of(half) == losses_of(straight)
    digests = [[line["batch_sha256"] for line in read_metrics(f / "metrics.jsonl")] for f in (half, straight)]
    assert digests[0] == digests[1]


@pytest.mark.parametrize("mesh", [{"data": 8}, {"fsdp": 4, "model": 2, "data": 1}, {"data": 2, "fsdp": 2, "model": 2}])
def test_other_meshes_train_alike(data, straight, tmp_path, mesh):
    train(make_config(data, mesh=mesh), tmp_path / "run")
    np.testing.assert_allclose(losses_of(tmp_path / "run"), losses_of(straight), atol=1e-4)


def test_a_run_says_how_it_is_laid_out(data, tmp_path):
    mesh = {"data": 1, "fsdp": 2, "pipe": 2, "model": 2}
    run = Run(make_config(data, mesh=mesh, train={"microbatches": 4}), tmp_path / "run")
    run.compiler_preset = "v5p"  # as on a TPU: these are CPUs, whose compiler does not take it
    lines = run.describe()
    assert lines[0] == "mesh fsdp=2 x pipe=2 x model=2 (cpu)"
    assert lines[1].startswith("pipeline: every stage waits for 20.0% of a step")  # (2 - 1) / (4 + 2 - 1)
    assert "compiler option xla_tpu_scoped_vmem_limit_kib=32768 (v5p)" in lines
    kernel = next(line for line in lines if line.startswith("layers.attention.query_key_value.kernel "))
    assert kernel.endswith(" over ('pipe', 'fsdp', 'model', None, None): 12.50% on a device")
    assert Run(make_config(data, mesh={"data": 8}), tmp_path / "run").describe()[0] == "mesh data=8 (cpu)"


def test_options_that_the_compiler_does_not_know_are_refused(data, tmp_path):
    config = make_config(data, mesh={"data": 8}, train={"compiler_options": "v5p"})  # TPU's, and these are CPUs
    with pytest.raises(InputError, match=r"does not take train.compiler_options 'v5p' .*set it to none"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match=r"'v5pp'.*did you mean 'v5p'"):
        Run(make_config(data, mesh={"data": 8}, train={"compiler_options": "v5pp"}), tmp_path / "other")


def test_going_on_over_another_mesh(data, straight, tmp_path):
    config = make_config(data, mesh={"fsdp": 8, "data": 1})
    train(config, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    train(make_config(data, mesh={"model": 8, "data": 1}), tmp_path / "run")
    np.testing.assert_allclose(losses_of(tmp_path / "run"), losses_of(straight), atol=1e-4)


def test_a_finished_run_is_left_alone(data, straight):
    before = (straight / "metrics.jsonl").read_text()
    result = train(make_config(data), straight)
    assert (result.step, result.interrupted) == (4, False)
    assert (straight / "metrics.jsonl").read_text() == before


def test_heldout_loss_is_that_of_the_text(data, tmp_path):
    """Bits per byte in training and by `eval` count the same bytes: both equal a direct computation."""
    config = make_config(data, data={"valid": str(data / "valid")}, eval={"every": 2, "batches": 2, "sample_tokens": 8})
    result = train(config, tmp_path / "run")
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [("valid_loss" in line) for line in lines] == [False, True, False, True]
    assert lines[-1]["valid_loss"] == pytest.approx(result.valid_loss)
    assert result.sample
    model, tokenizer = neox_jax.load_model(tmp_path / "run"), neox_jax.load_tokenizer(tmp_path / "run")
    tokens = np.fromfile(data / "valid.bin", np.uint16)[: 16 * 32 + 1].astype(np.int32)
    rows = np.stack([tokens[i * 32 : i * 32 + 33] for i in range(16)])
    log_probs = jax.nn.log_softmax(model(rows[:, :-1]))
    nats = -np.take_along_axis(np.asarray(log_probs), rows[:, 1:, None], axis=-1).mean()
    assert result.valid_loss == pytest.approx(nats, rel=1e-5)
    text = tokenizer.decode([t for t in rows[:, 1:].ravel() if t != tokenizer.eos_token_id])
    assert result.valid_bits_per_byte == pytest.approx(
        nats * rows[:, 1:].size / math.log(2) / len(text.encode()), rel=1e-5
    )


@pytest.mark.parametrize("stride", [5, 15])
def test_score_text_in_windows_that_overlap(straight, stride):
    """Each token once, behind as much as its window has."""
    model, tokenizer = neox_jax.load_model(straight), neox_jax.load_tokenizer(straight)
    text = TEXTS[0][:300]
    tokens = [tokenizer.eos_token_id, *tokenizer.encode(text)]
    nats, end = 0.0, 0
    for start in range(0, len(tokens), stride):
        window = tokens[start : start + 17]
        log_probs = np.asarray(jax.nn.log_softmax(model(np.array([window[:-1]]))))[0]
        nats -= sum(log_probs[i, t] for i, t in enumerate(window[1:]) if start + i >= end)
        end = start + 16
        if end >= len(tokens) - 1:
            break
    score = score_text(model, tokenizer, text, seq_length=16, stride=stride, batch_size=4)
    assert score.nats == pytest.approx(nats, rel=1e-5)
    assert score.num_tokens == len(tokens) - 1
    with pytest.raises(InputError, match="stride is 17; wanted 1 to the window's 16 tokens"):
        score_text(model, tokenizer, text, seq_length=16, stride=17)


def test_score_text_equals_a_direct_computation(straight):
    model, tokenizer = neox_jax.load_model(straight), neox_jax.load_tokenizer(straight)
    text = TEXTS[0][:700]
    score = score_text(model, tokenizer, text, seq_length=16, batch_size=4)
    tokens = [tokenizer.eos_token_id, *tokenizer.encode(text)]
    nats = 0.0
    for start in range(0, len(tokens) - 1, 16):
        window = tokens[start : start + 17]
        log_probs = np.asarray(jax.nn.log_softmax(model(np.array([window[:-1]]))))[0]
        nats -= sum(log_probs[i, t] for i, t in enumerate(window[1:]))
    assert score.nats == pytest.approx(nats, rel=1e-5)
    assert (score.num_tokens, score.num_bytes) == (len(tokens) - 1, len(text.encode()))


def test_init_from_starts_where_the_source_is(data, straight, tmp_path):
    other = dataclasses.replace(TINY, num_hidden_layers=2)
    config = dataclasses.replace(make_config(data, model=other), init_from=str(straight))
    train(config, tmp_path / "run")
    assert params_digest(tmp_path / "run", 0) == params_digest(straight, 4)
    assert read_meta(tmp_path / "run" / "checkpoints" / "4")[0] == TINY
    gone = dataclasses.replace(config, init_from="nowhere/at-all", train=dataclasses.replace(config.train, steps=5))
    assert train(gone, tmp_path / "run").step == 5  # the source is needed once


def test_policies(data, tmp_path):
    config = make_config(data, train={"steps": 9}, checkpoint={"every": 2, "keep": 1, "keep_every": 4, "steps": (1,)})
    train(config, tmp_path / "run")
    assert list_steps(tmp_path / "run" / "checkpoints") == [0, 1, 4, 8, 9]


# --- refused ---------------------------------------------------------------------------------------------------------


def test_a_run_folder_of_another_model(data, straight):
    before = {p: p.stat().st_mtime_ns for p in straight.rglob("*")}
    other = dataclasses.replace(TINY, num_hidden_layers=2)
    with pytest.raises(InputError, match=r"another model \(num_hidden_layers 4, not 2\)"):
        train(make_config(data, model=other), straight)
    assert {p: p.stat().st_mtime_ns for p in straight.rglob("*")} == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": {"batch_size": 12}}, "batch 12 does not divide over data=8; try 16"),
        ({"train": {"microbatches": 4}}, "batch 2 does not divide over data=8; try 8"),
        ({"mesh": {"data": 3}}, "there are 8"),
        ({"data": {"train": "nowhere/at_all"}}, "nowhere/at_all"),
        ({"data": {"tokenizer": "nowhere.json"}}, "no tokenizer file at nowhere.json"),
        ({"model": dataclasses.replace(TINY, vocab_size=256)}, "512 ids, model.vocab_size is 256"),
        ({"optimizer": {"warmup_steps": 4}}, "warmup_steps 4"),
        ({"data": {"train": "{data}/valid", "order": "sequential"}, "train": {"steps": 400}}, "wanted at least 3200"),
        ({"data": {"train": "{data}/train", "valid": "{data}/short"}}, "data.valid has 7 samples of 32 tokens"),
    ],
)
def test_nothing_is_written_for_bad_input(data, tmp_path, change, message):
    change = {**change}
    if "data" in change:
        change["data"] = {k: v.replace("{data}", str(data)) for k, v in change["data"].items()}
    with pytest.raises(InputError, match=message):
        train(make_config(data, **{"mesh": {"data": 8}, **change}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_token_beyond_the_vocabulary(data, tmp_path):
    with IndexedDatasetWriter(tmp_path / "bad", np.uint16) as writer:
        writer.add_document([1, 2, 3] * 200)
        writer.add_document([5, 6, 999] + [7] * 600)
    config = make_config(data, data={"train": str(tmp_path / "bad"), "order": "sequential"})
    with pytest.raises(InputError, match="token 999 at position 2 of document 1 is not in the vocabulary of 512"):
        train(config, tmp_path / "run")


def test_a_checkpoint_of_another_shape(data, straight):
    abstract = jax.eval_shape(
        lambda: init_model(dataclasses.replace(TINY, num_hidden_layers=2, tie_word_embeddings=True))
    )
    from neox_jax.checkpoint.trees import read_tree
    from neox_jax.train_state import pure_params

    with pytest.raises(
        InputError, match=r"embed_out.embedding is not part.*dense.bias is float32\[4, 64\], wanted float32\[2"
    ):
        read_tree(straight / "checkpoints" / "4" / "params", pure_params(abstract))


# --- sources ---------------------------------------------------------------------------------------------------------


def test_every_kind_of_source_is_recognised(straight, tmp_path):
    model, tokenizer = neox_jax.load_model(straight), neox_jax.load_tokenizer(straight)
    for format in FORMATS:
        neox_jax.save_model(model, tmp_path / format, format=format, tokenizer=tokenizer)
    wanted = named_leaves(model)
    sources = [f"{straight}@4", straight / "checkpoints" / "4", *(tmp_path / format for format in FORMATS)]
    for source in sources:
        found = named_leaves(neox_jax.load_model(source))
        assert found.keys() == wanted.keys()
        assert all((found[name] == wanted[name]).all() for name in wanted), source
        assert neox_jax.load_tokenizer(source).encode("def f():\n    pass") == tokenizer.encode("def f():\n    pass")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtypes_are_kept_on_disk(straight, tmp_path, dtype):
    model = neox_jax.load_model(straight, dtype=dtype)
    for format in FORMATS:
        neox_jax.save_model(model, tmp_path / format, format=format)
        again = named_leaves(neox_jax.load_model(tmp_path / format))
        for name, leaf in named_leaves(model).items():
            assert again[name].dtype == dtype
            assert (again[name] == leaf).all()


@pytest.mark.parametrize("sizes", [{"data": 8}, {"fsdp": 2, "model": 4}])
def test_load_onto_a_mesh(straight, sizes):
    mesh = neox_jax.make_mesh(**sizes)
    sharded = neox_jax.load_model(straight, mesh=mesh)
    tokens = jax.random.randint(jax.random.key(0), (8, 12), 0, 512)
    np.testing.assert_allclose(sharded(tokens), neox_jax.load_model(straight)(tokens), atol=1e-5)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{tmp}/nothing", "no model at"),
        ("{tmp}", "is no model: wanted a Hugging Face folder"),
        ("{run}@3", "no checkpoint of step 3; it has 0, 2, 4"),
        ("{tmp}/empty_run", "holds no complete checkpoint yet"),
        ("{tmp}/neox", "global_step10"),
    ],
)
def test_what_is_no_source(straight, tmp_path, source, message):
    (tmp_path / "empty_run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "neox").mkdir()
    (tmp_path / "neox" / "latest").write_text("global_step10")
    with pytest.raises(InputError, match=message):
        neox_jax.load_model(source.format(tmp=tmp_path, run=straight))


def test_save_model_never_overwrites(straight, tmp_path):
    model = neox_jax.load_model(straight)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("mine")
    for format in FORMATS:
        with pytest.raises(InputError, match="already has something in it"):
            neox_jax.save_model(model, tmp_path / "there", format=format)
    with pytest.raises(InputError, match="did you mean 'orbax'"):
        neox_jax.save_model(model, tmp_path / "x", format="orbx")
    assert os.listdir(tmp_path / "there") == ["file"]


# --- interruptions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 75), (signal.SIGKILL, -9)])
def test_interrupted_and_started_again(data, tmp_path, number, code):
    """The same command goes on; the end is bitwise that of a run that nobody stopped."""
    overrides = {"train.steps": 160, "checkpoint.every": 20, "checkpoint.keep": 100}
    arguments = train_arguments(data, tmp_path / "run", **overrides)
    process = run_cli(*arguments)
    wait_for_step(tmp_path / "run", 50)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    stopped_at = list_steps(tmp_path / "run" / "checkpoints")[-1]
    # A kill may cut off the save of step 40, but that began only when the one of step 20 was complete.
    assert (20 if number == signal.SIGKILL else 50) <= stopped_at < 160
    if code == 75:
        assert f"stopped and saved at step {stopped_at}" in out
    process = run_cli(*arguments)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert f"going on from step {stopped_at} of 160" in out
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 161))
    if number == signal.SIGKILL:  # once is enough: the straight run takes as long as both halves
        straight = train_arguments(data, tmp_path / "straight", **overrides)
        assert run_cli(*straight).wait(timeout=300) == 0
        assert params_digest(tmp_path / "run", 160) == params_digest(tmp_path / "straight", 160)


def test_a_save_that_was_cut_off_is_not_seen(data, straight, tmp_path):
    config = make_config(data)
    train(config, tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    (checkpoints / "4").rename(checkpoints / "4.orbax-checkpoint-tmp")
    assert list_steps(checkpoints) == [0, 2]
    train(config, tmp_path / "run")
    assert list_steps(checkpoints) == [0, 2, 4]
    assert not list(checkpoints.glob("*tmp*"))
    assert params_digest(tmp_path / "run", 4) == params_digest(straight, 4)


def test_a_line_that_was_cut_off_is_written_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.5}\n{"step": 3, "lo')
    writer = MetricsWriter(tmp_path, start_step=2)
    writer.write({"step": 3, "loss": 1.0})
    writer.close()
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3]
