"""Which targets count and where documents begin: marks, weights, the step on meshes, runs, several held-out sets."""

import dataclasses
import functools
import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from runs import TEXTS, TINY, losses_of, make_config

from neox_jax.config import Config, DataConfig, Masks, TrainConfig, freeze_config
from neox_jax.continuity import changed_fields
from neox_jax.data.megatron import IndexedDatasetWriter
from neox_jax.errors import InputError
from neox_jax.loss import target_weights
from neox_jax.marks import BEGINS, NO_LOSS, counted_targets, mark_after, split_marks, strip_marks
from neox_jax.metrics import read_metrics
from neox_jax.model import abstract_model, init_model
from neox_jax.sharding import make_mesh, named_sharding
from neox_jax.tokenizer import Tokenizer
from neox_jax.train import Run, train
from neox_jax.train_state import pure_params
from neox_jax.train_step import check_fits, loss_and_gradients, next_token_loss, read_batch
from neox_jax.tree import named_leaves

EOD = 0
ONE = jax.devices()[:1]
BOTH = Masks(targets=True, documents=True)
MARKS = {Masks(True, False): NO_LOSS, Masks(False, True): BEGINS, BOTH: NO_LOSS | BEGINS}


def some_rows(batch: int = 8, length: int = 32) -> np.ndarray:
    """Documents of about eight tokens, each with its end; the last row has none, and row 1 nothing but ends."""
    rng = np.random.default_rng(3)
    rows = rng.integers(1, 512, (batch, length + 1), dtype=np.int32)
    rows[rng.random(rows.shape) < 0.12] = EOD
    rows[-1] = np.maximum(rows[-1], 1)
    rows[1] = EOD
    return rows


def losses_of_targets(model, rows, masks: Masks) -> np.ndarray:
    """-log p of each target, written out: [B,T] float64."""
    tokens = strip_marks(rows)
    ends = np.cumsum(tokens == EOD, axis=1)
    segment_ids = np.concatenate([np.zeros_like(ends[:, :1]), ends[:, :-1]], axis=1) if masks.documents else None
    logits = model(tokens[:, :-1], segment_ids=None if segment_ids is None else segment_ids[:, :-1])
    chosen = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits), np.float64), tokens[:, 1:, None], axis=-1)
    return -chosen[..., 0]


# --- marks and weights -----------------------------------------------------------------------------------------------


def test_marks_are_neoxs_loss_mask_and_documents_that_end_in_their_eod():
    rows = np.array([[5, EOD, 7, 8, EOD, EOD, 9]], np.int32)
    marked = mark_after(rows, EOD, NO_LOSS | BEGINS)
    tokens, counted, segment_ids = split_marks(jnp.asarray(marked))
    np.testing.assert_array_equal(tokens, rows)
    np.testing.assert_array_equal(strip_marks(marked), rows)
    loss_mask = np.ones((1, 6))
    loss_mask[rows[:, :-1] == EOD] = 0  # gpt-neox's, over its inputs
    np.testing.assert_array_equal(counted, loss_mask)
    assert segment_ids.tolist() == [[0, 0, 1, 1, 1, 2, 3]]
    assert counted_targets(marked).tolist() == [EOD, 8, EOD]


def test_rows_without_marks_are_their_tokens():
    rows = some_rows()
    tokens, counted, segment_ids = split_marks(jnp.asarray(rows))
    np.testing.assert_array_equal(tokens, rows)
    assert counted.all()
    assert not segment_ids.any()
    assert read_batch(rows, Masks(False, False)) == (rows, None, None)


@pytest.mark.parametrize("rows", [0, 1, 2, 8])
def test_weights_make_the_mean_that_is_wanted(rows):
    counted = np.random.default_rng(1).random((8, 16)) < 0.4
    counted[:2] = False
    losses = np.random.default_rng(2).random((8, 16))
    groups = np.split(np.arange(8), 8 // rows) if rows else [np.arange(8)]
    means = [losses[group][counted[group]].mean() for group in groups if counted[group].any()]
    weights = np.asarray(target_weights(jnp.asarray(counted), rows=rows))
    assert (losses * weights).mean() == pytest.approx(np.mean(means), rel=1e-6)
    assert (weights > 0).tolist() == counted.tolist()
    assert (target_weights(jnp.ones((8, 16), bool), rows=rows) == 1).all()
    assert not target_weights(jnp.zeros((8, 16), bool), rows=rows).any()


# --- the step --------------------------------------------------------------------------------------------------------

LAYOUTS = {  # mesh and microbatches
    "one device": ({}, 1),
    "accumulated": ({}, 4),
    "data=2 x model=2": ({"data": 2, "model": 2}, 2),
    "seq=2 x fsdp=2": ({"seq": 2, "fsdp": 2}, 2),
    "pipe=2 x data=2": ({"pipe": 2, "data": 2}, 4),
}


@functools.cache
def masked_gradients(layout: str):
    sizes, microbatches = LAYOUTS[layout]
    mesh = make_mesh(**sizes, devices=jax.devices()[: int(np.prod(list(sizes.values()), dtype=int))])
    graphdef, params = nnx.split(abstract_model(TINY, mesh=mesh))[0], pure_params(init_model(TINY, seed=1, mesh=mesh))
    rows = mark_after(some_rows(), EOD, NO_LOSS | BEGINS)
    rows = jax.device_put(rows, named_sharding(rows.shape, ("batch", "length"), mesh, "batch"))

    @jax.jit
    def both(params, rows):
        batch = read_batch(rows, BOTH, loss_rows=2)
        options = {"dtype": jnp.float32, "remat": "none", "microbatches": microbatches, "mesh": mesh}
        return loss_and_gradients(graphdef, params, *batch, **options)

    loss, gradients = both(params, rows)
    return float(loss), jax.device_get(named_leaves(gradients))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_and_gradients_are_those_written_out(layout):
    """The loss against one that is written out, gradients against those of one device, on which it is a plain sum."""
    loss, gradients = masked_gradients(layout)
    losses = losses_of_targets(init_model(TINY, seed=1), some_rows(), BOTH)
    assert loss == pytest.approx(mean_written_out(losses, BOTH, loss_rows=2), rel=1e-6)
    for name, wanted in masked_gradients("one device")[1].items():
        assert np.abs(gradients[name] - wanted).max() <= 1e-5 * np.abs(wanted).max() + 1e-8, name


@pytest.mark.parametrize("loss_rows", [0, 1])
@pytest.mark.parametrize("masks", MARKS)
def test_every_mask_counts_what_it_says(masks, loss_rows):
    model = init_model(TINY, seed=1)
    batch = read_batch(jnp.asarray(mark_after(some_rows(), EOD, MARKS[masks])), masks, loss_rows=loss_rows)
    wanted = mean_written_out(losses_of_targets(model, some_rows(), masks), masks, loss_rows)
    assert float(jitted_loss(model, *batch)) == pytest.approx(wanted, rel=1e-6)


jitted_loss = jax.jit(next_token_loss)


def mean_written_out(losses: np.ndarray, masks: Masks, loss_rows: int) -> float:
    counted = some_rows()[:, :-1] != EOD if masks.targets else np.ones_like(losses, bool)
    groups = [slice(i, i + loss_rows) for i in range(0, 8, loss_rows)] if loss_rows else [slice(None)]
    return np.mean([losses[group][counted[group]].mean() for group in groups if counted[group].any()])


def test_without_marks_the_weights_are_ones_to_the_bit():
    model, rows = init_model(TINY, seed=1), jnp.asarray(some_rows())
    _, _, weights = read_batch(rows, Masks(True, False))
    assert float(jitted_loss(model, rows, None, weights)) == float(jitted_loss(model, rows))


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lines(data, tmp_path_factory) -> dict:
    """Two sets of short documents, the lines of this project's source."""
    folder, tokenizer = tmp_path_factory.mktemp("lines"), Tokenizer.from_file(data / "tokenizer.json")
    for name, texts in (("train", TEXTS[2:8]), ("valid", TEXTS[:2])):
        with IndexedDatasetWriter(folder / name, np.uint16) as writer:
            for line in "".join(texts).splitlines():
                writer.add_document([*tokenizer.encode(line), EOD])
    return {name: str(folder / name) for name in ("train", "valid")}


@pytest.fixture(scope="module")
def masked(data, lines, tmp_path_factory):
    folder = tmp_path_factory.mktemp("masked") / "run"
    config = make_config(
        data,
        train={"steps": 2, "batch_size": 8, "seq_length": 64, "eod_mask_loss": True, "document_masks": True},
        data={"train": lines["train"], "valid": {"code": lines["valid"], "same": lines["train"]}},
        eval={"every": 2, "batches": 1, "sample_tokens": 0},
        optimizer={"schedule": "constant"},
    )
    return config, folder, train(config, folder, devices=ONE)


def test_a_run_counts_what_its_masks_say(masked):
    config, folder, _ = masked
    rows = Run(config, folder, ONE).train_loader.host_batch(0)
    counted = rows[:, 1:] & NO_LOSS == 0
    np.testing.assert_array_equal(counted, strip_marks(rows)[:, :-1] != EOD)
    assert 0.01 < 1 - counted.mean() < 0.5  # of this project's own text, which changes
    losses = losses_of_targets(init_model(TINY, seed=config.train.seed), rows, BOTH)
    assert losses_of(folder)[0] == pytest.approx(losses[counted].mean(), rel=1e-6)


def test_marks_change_no_digest_and_no_order(masked):
    config, folder, _ = masked
    train_config = dataclasses.replace(config.train, eod_mask_loss=False, document_masks=False)
    plain = Run(dataclasses.replace(config, train=train_config), folder.parent / "plain", ONE).train_loader
    for step, line in enumerate(read_metrics(folder / "metrics.jsonl")):
        tokens = plain.host_batch(step)
        assert tokens.max() < TINY.vocab_size
        assert line["batch_sha256"] == plain.digest(step) == hashlib.sha256(tokens.astype("<i4").tobytes()).hexdigest()


def test_a_batch_in_which_nothing_counts_has_no_loss_and_no_gradient(masked, tmp_path):
    run = Run(masked[0], tmp_path, ONE)
    state, metrics = run.compile_step()(run.init_state(), jnp.asarray(some_rows(length=64) | NO_LOSS))
    assert (float(metrics["loss"]), float(metrics["grad_norm"]), int(metrics["skipped"])) == (0, 0, 0)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


def test_sets_of_heldout_data_by_name(masked):
    _, folder, result = masked
    line = read_metrics(folder / "metrics.jsonl")[-1]
    names = {f"{kind}/{name}" for kind in ("valid_loss", "valid_bits_per_byte") for name in ("code", "same")}
    assert set(result.valid_sets) == names
    assert result.valid_sets == pytest.approx({name: line[name] for name in names})
    for kind in ("valid_loss", "valid_bits_per_byte"):
        mean = (line[f"{kind}/code"] + line[f"{kind}/same"]) / 2
        assert getattr(result, kind) == pytest.approx(mean) == line[kind]


def test_heldout_loss_is_a_mean_of_what_counts(masked):
    """Over all its tokens alike, however many of them each batch has, and its bytes are theirs."""
    config, folder, _ = masked
    eval_config = dataclasses.replace(config.eval, batches=3)
    run = Run(dataclasses.replace(config, eval=eval_config), folder, ONE)
    model = init_model(TINY, seed=config.train.seed)
    loader, nats, counted = run.valid_loaders["code"], [], []
    for step in range(3):
        rows = loader.host_batch(step)
        mask = rows[:, 1:] & NO_LOSS == 0
        nats += losses_of_targets(model, rows, BOTH)[mask].tolist()
        counted += strip_marks(rows)[:, 1:][mask].tolist()
    metrics = run.heldout.measure(run.init_state().params, lambda what: None)
    assert metrics["valid_loss/code"] == pytest.approx(np.mean(nats), abs=1e-5)
    num_bytes = run.tokenizer.num_bytes[counted].sum()
    assert metrics["valid_bits_per_byte/code"] == pytest.approx(sum(nats) / np.log(2) / num_bytes, rel=1e-5)


def test_fields_that_make_it_another_run():
    config = Config(model=TINY, train=TrainConfig(seq_length=32), data=DataConfig(train="x", tokenizer="a.json"))
    before = json.loads(json.dumps(dataclasses.asdict(config)))
    masked = dataclasses.replace(config, train=dataclasses.replace(config.train, eod_mask_loss=True))
    other = dataclasses.replace(masked, data=dataclasses.replace(config.data, tokenizer="b.json"))
    assert changed_fields(before, dataclasses.asdict(masked)) == ["train.eod_mask_loss is True, was False"]
    between = json.loads(json.dumps(dataclasses.asdict(masked)))
    assert changed_fields(between, dataclasses.asdict(other)) == ["data.tokenizer is 'b.json', was 'a.json'"]


# --- refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"train": {"loss_rows": 3}}, "train.loss_rows is 3; wanted 0 .* or a divisor of train.batch_size 8"),
        ({"data": {"valid": {"a/b": "x"}}}, "data.valid has 'a/b': 'x'; wanted a name of letters"),
        ({"data": {"valid": {"a": ""}}}, "data.valid has 'a': ''; wanted .* and what it is of"),
        ({"data": {"eod_token": -2}}, "data.eod_token is -2"),
        ({"train": {"document_masks": True}, "data": {"tokenizer": ""}}, "set data.tokenizer to one that has"),
        ({"train": {"document_masks": True}, "data": {"eod_token": 512}}, "eod_token is 512; wanted an id below"),
        ({"data": {"valid": {"a": "{data}/valid", "b": "{data}/short"}}}, "data.valid.b has 7 samples of 32 tokens"),
        ({"data": {"train": ["a.jsonl", "tokens"]}}, "named alone"),
    ],
)
def test_settings_that_will_not_do(data, tmp_path, sections, message):
    sections = json.loads(json.dumps(sections).replace("{data}", str(data)))
    with pytest.raises(InputError, match=message):
        train(make_config(data, **sections), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_cudnn_in_a_pipeline_takes_no_document_masks():
    config = Config(model=TINY, train=TrainConfig(batch_size=8, seq_length=32, document_masks=True, attention="cudnn"))
    with pytest.raises(InputError, match="cudnn takes no document masks with mesh.pipe above 1"):
        check_fits(config, make_mesh(pipe=2, data=4))


def test_named_sets_come_through_a_config_file():
    values = {"model": {"preset": "tiny"}, "train": {"seq_length": 32}, "data": {"valid": {"a": "x", "b": ["y"]}}}
    assert freeze_config(values).data.valid_sets == {"a": "x", "b": ["y"]}
