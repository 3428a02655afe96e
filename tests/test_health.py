"""What a run does where its numbers go bad: updates skipped, spikes said, an end with exit 70."""

import dataclasses
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from runs import TINY, make_config, params_digest, run_cli, train_arguments

import neox_jax
from neox_jax.checkpoint.steps import list_steps
from neox_jax.continuity import changed_fields
from neox_jax.data.megatron import IndexedDatasetWriter
from neox_jax.errors import InputError, NumbersError
from neox_jax.health import LAG, WINDOW_LEAST, Health
from neox_jax.metrics import read_metrics
from neox_jax.model import init_model
from neox_jax.train import train

BAD = 500  # a token whose embedding is infinite: every batch that has it gives numbers that are not finite


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory):
    """A model with one infinite row, and tokens that have it in batches 2 and 3 (of 8 rows of 33) alone."""
    folder = tmp_path_factory.mktemp("poisoned")
    model = init_model(TINY, seed=1)
    graph, state = nnx.split(model)
    params = nnx.to_pure_dict(state)
    params["embed_in"]["embedding"] = params["embed_in"]["embedding"].at[BAD].set(jnp.inf)
    neox_jax.save_model(nnx.merge(graph, params), folder / "model", format="orbax")
    tokens = np.random.default_rng(0).integers(0, BAD, 10 * 8 * 33)
    tokens[2 * 8 * 33 + 5] = tokens[3 * 8 * 33 + 5] = BAD
    with IndexedDatasetWriter(folder / "train", np.uint16) as writer:
        writer.add_document(tokens)
    return folder


def poisoned_config(folder, **sections):
    data = {"train": str(folder / "train"), "order": "sequential", "tokenizer": ""}
    steps = {"train": {"steps": 6, "batch_size": 8, "seq_length": 32}, "data": data}
    return dataclasses.replace(make_config(folder, **{**steps, **sections}), init_from=str(folder / "model"))


def test_updates_that_are_not_finite_are_skipped(poisoned, tmp_path, capsys):
    train(poisoned_config(poisoned), tmp_path / "run")
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [math.isfinite(line["loss"]) for line in lines] == [True, True, False, False, True, True]
    assert [line["skipped_updates"] for line in lines] == [0, 0, 1, 2, 2, 2]
    rates = [line["learning_rate"] for line in lines]
    assert rates[2] == rates[3] == rates[4] != rates[5]  # the schedule counts updates that were made
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    skips = [event for event in events if "skipped" in event["text"]]
    assert [event["step"] for event in skips] == [3, 4]
    assert skips[0]["text"].endswith("(not finite); rows 16 to 23 of data.train")
    assert skips[0]["text"] in capsys.readouterr().out


def test_too_many_in_a_row_end_the_run(poisoned, tmp_path):
    config = poisoned_config(poisoned, safety={"max_skipped": 2}, checkpoint={"every": 1})
    with pytest.raises(NumbersError, match=r"2 updates in a row were skipped, the last at step 4 \(not finite\)"):
        train(config, tmp_path / "run")
    steps = list_steps(tmp_path / "run" / "checkpoints")
    assert steps
    assert all(np.isfinite(params_without_bad_row(tmp_path / "run", step)).all() for step in steps)


def params_without_bad_row(folder, step):
    table = np.array(neox_jax.load_model(f"{folder}@{step}").embed_in.embedding)
    return np.delete(table, BAD, axis=0)


def test_exit_70_in_one_line(poisoned, tmp_path):
    fields = {"train.steps": 6, "train.batch_size": 8, "train.seq_length": 32, "data.order": "sequential"}
    fields |= {"init_from": poisoned / "model", "safety.max_skipped": 2, "data.tokenizer": ""}
    process = run_cli(*train_arguments(poisoned, tmp_path / "run", **fields))
    _, err = process.communicate(timeout=120)
    assert process.returncode == 70, err
    assert [line for line in err.splitlines() if line.startswith("neox-jax: 2 updates in a row were skipped")]
    assert "Traceback" not in err


def test_updates_above_the_norm_are_skipped(data, tmp_path):
    sections = {"train": {"steps": 6}, "checkpoint": {"every": 1, "keep": 9}}
    train(make_config(data, **sections), tmp_path / "straight")
    norms = [line["grad_norm"] for line in read_metrics(tmp_path / "straight" / "metrics.jsonl")]
    worst = norms.index(max(norms))
    limit = (sorted(norms)[-1] + sorted(norms)[-2]) / 2
    train(make_config(data, **sections, safety={"skip_grad_norm": limit}), tmp_path / "run")
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["skipped_updates"] for line in lines][: worst + 1] == [0] * worst + [1]
    assert params_digest(tmp_path / "run", worst) == params_digest(tmp_path / "run", worst + 1)


def see(health: Health, losses: list[float], **metrics) -> None:
    base = {"grad_norm": jnp.float32(1), "skipped": jnp.int32(0)}
    for step, loss in enumerate(losses, start=1):
        health.see(step, base | {"loss": jnp.float32(loss)} | metrics)
    health.finish()


def test_a_spike_is_said_once(data):
    said = []
    health = Health(make_config(data), lambda text, step: said.append((step, text)))
    losses = [3 + 0.01 * (i % 7) for i in range(WINDOW_LEAST + 20)]
    losses[WINDOW_LEAST + 5] = 4.5
    see(health, losses)
    assert [step for step, _ in said] == [WINDOW_LEAST + 6]
    assert "loss 4.5 is a spike" in said[0][1]


def test_overflows_end_a_run_only_at_the_smallest_scale(data):
    health = Health(make_config(data), lambda *_: pytest.fail("an overflow is routine"))
    see(health, [math.inf] * 50, overflowed=jnp.int32(1), loss_scale=jnp.float32(2))
    with pytest.raises(NumbersError, match="float16 gradients overflow at the smallest loss scale"):
        see(health, [math.inf], overflowed=jnp.int32(1), loss_scale=jnp.float32(1))


def test_it_looks_late_so_that_steps_are_not_waited_for(data):
    said = []
    health = Health(make_config(data), lambda text, step: said.append(step))
    bad = {"loss": jnp.float32(math.nan), "grad_norm": jnp.float32(1), "skipped": jnp.int32(1)}
    for step in range(1, LAG + 1):
        health.see(step, bad)
    assert said == []
    health.see(LAG + 1, bad)
    assert said == [1]


# --- a configuration that is not the run's ---------------------------------------------------------------------------


def test_a_changed_field_is_named(data, tmp_path):
    train(make_config(data), tmp_path / "run")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")}
    changed = make_config(data, train={"steps": 6, "batch_size": 16}, optimizer={"learning_rate": 2e-2})
    with pytest.raises(
        InputError,
        match=r"train.batch_size is 16, was 8; optimizer.learning_rate is 0.02, was 0.01\).*--accept-changes",
    ):
        train(changed, tmp_path / "run")
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")} == before
    assert train(changed, tmp_path / "run", accept_changes=True).step == 6
    events = (tmp_path / "run" / "events.jsonl").read_text()
    assert "another configuration from here on: train.batch_size is 16, was 8" in events


def test_what_may_change(data):
    before = dataclasses.asdict(make_config(data))
    free = make_config(
        data, mesh={"data": 8}, train={"steps": 9, "microbatches": 2, "remat": "full"}, checkpoint={"every": 3}
    )
    assert changed_fields(before, dataclasses.asdict(free)) == []
    before["data"]["order"] = "megatron"
    longer = make_config(data, train={"steps": 9}, data={"order": "megatron"})
    assert changed_fields(before, dataclasses.asdict(longer)) == ["train.steps is 9, was 4"]
