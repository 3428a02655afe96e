"""One step: schedules, loss, accumulation, every mesh equal to one device, skipped updates."""

import dataclasses
import functools
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from neox_jax.checkpoint.manager import RunCheckpoints
from neox_jax.config import Config, ModelConfig, OptimizerConfig, TrainConfig, load_config
from neox_jax.errors import InputError
from neox_jax.loss import cross_entropy_sum
from neox_jax.model import abstract_model, init_model, logical_axes
from neox_jax.optimizer import make_optimizer, make_schedule, num_updates
from neox_jax.sharding import (
    check_sharded,
    constrain,
    make_mesh,
    named_sharding,
    partition_spec,
    report_sharding,
)
from neox_jax.train_state import abstract_state, init_loss_scale, init_state, pure_params, update_loss_scale
from neox_jax.train_step import check_fits, make_train_step, next_token_loss
from neox_jax.train_step import loss_and_gradients as step_gradients
from neox_jax.tree import named_leaves, num_bytes

TINY = ModelConfig.preset("tiny")
MESHES = {
    "data=8": {"data": 8},
    "fsdp=8": {"fsdp": 8},
    "model=8": {"model": 8},
    "data=2 x model=4": {"data": 2, "model": 4},
    "fsdp=4 x model=2": {"fsdp": 4, "model": 2},
    "data=2 x fsdp=4": {"data": 2, "fsdp": 4},
    "data=2 x fsdp=2 x model=2": {"data": 2, "fsdp": 2, "model": 2},
    "seq=8": {"seq": 8},
    "seq=4 x data=2": {"seq": 4, "data": 2},
    "seq=2 x model=4": {"seq": 2, "model": 4},
    "seq=2 x fsdp=2 x model=2": {"seq": 2, "fsdp": 2, "model": 2},
    "pipe=4": {"pipe": 4, "data": 2},
    "pipe=2 x data=2 x model=2": {"pipe": 2, "data": 2, "model": 2},
    "pipe=4 x fsdp=2": {"pipe": 4, "fsdp": 2},
    "pipe=2 x fsdp=2 x model=2": {"pipe": 2, "fsdp": 2, "model": 2},
    "pipe=2 x seq=2 x model=2": {"pipe": 2, "seq": 2, "model": 2},
    "pipe=2 x seq=2 x fsdp=2": {"pipe": 2, "seq": 2, "fsdp": 2},
}


def batch_of(seed: int, batch: int = 8, length: int = 32, vocab: int = 512) -> jax.Array:
    return jax.random.randint(jax.random.key(seed), (batch, length + 1), 0, vocab)


# --- schedules -----------------------------------------------------------------------------------------------------


def schedule_of(name, **fields):
    config = OptimizerConfig(learning_rate=1.0, min_learning_rate=0.1, warmup_steps=10, schedule=name, **fields)
    return make_schedule(config, 100)


def test_cosine_floor_is_the_rule_that_trained_the_20b():
    schedule = schedule_of("cosine_floor")
    for n in range(130):
        if n < 10:
            wanted = n / 10
        else:
            m = min(n, 90) - 10
            wanted = max(0.1, 0.5 * (math.cos(math.pi * m / 100) + 1))
        assert float(schedule(n)) == pytest.approx(wanted, abs=1e-6), n


def test_cosine_is_the_rule_of_neoxs_head():
    schedule = schedule_of("cosine")
    for n in range(100):
        wanted = max(1, n) / 10 if n < 10 else 0.1 + 0.9 / 2 * (math.cos(math.pi * (n - 10) / 90) + 1)
        assert float(schedule(n)) == pytest.approx(wanted, abs=1e-6), n
    assert float(schedule(150)) == pytest.approx(0.1)  # unclamped it would rise again


def test_linear_and_constant():
    linear, constant = schedule_of("linear"), schedule_of("constant")
    assert [float(linear(n)) for n in (0, 5, 10, 55, 100, 200)] == pytest.approx([0.1, 0.5, 1, 0.55, 0.1, 0.1])
    assert [float(constant(n)) for n in (0, 5, 10, 99)] == pytest.approx([0.1, 0.5, 1, 1])


def test_warmup_longer_than_the_run_is_refused():
    with pytest.raises(InputError, match="warmup_steps 10 is not between 0 and train.steps 10"):
        make_schedule(OptimizerConfig(warmup_steps=10), 10)


# --- loss ----------------------------------------------------------------------------------------------------------


def plain_loss(hidden, head, targets, weights, vocab_size):
    logits = jnp.einsum("BTD,VD->BTV", hidden, head)[..., :vocab_size]
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
    return -jnp.sum(chosen * weights)


@pytest.mark.parametrize("chunk_bytes", [1, 4 * 3 * 64 * 8, 2**30])
@pytest.mark.parametrize("vocab_size", [64, 50])
def test_loss_and_gradients_in_chunks(monkeypatch, chunk_bytes, vocab_size):
    monkeypatch.setattr("neox_jax.loss.CHUNK_BYTES", chunk_bytes)
    keys = jax.random.split(jax.random.key(0), 4)
    hidden, head = jax.random.normal(keys[0], (3, 12, 16)), jax.random.normal(keys[1], (64, 16))
    targets = jax.random.randint(keys[2], (3, 12), 0, vocab_size)
    weights = (jax.random.uniform(keys[3], (3, 12)) > 0.3).astype(jnp.float32)
    chunked = functools.partial(cross_entropy_sum, vocab_size=vocab_size)
    assert float(chunked(hidden, head, targets, weights)) == pytest.approx(
        float(plain_loss(hidden, head, targets, weights, vocab_size)), rel=1e-6
    )
    ours = jax.grad(lambda h, w: 3 * chunked(h, w, targets, weights), argnums=(0, 1))(hidden, head)
    wanted = jax.grad(lambda h, w: 3 * plain_loss(h, w, targets, weights, vocab_size), argnums=(0, 1))(hidden, head)
    for a, b in zip(ours, wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_no_array_of_all_logits_at_20b():
    """[B, T, V] float32 at the 20B's shape would be 412 MB a sequence; the largest buffer is a chunk of it."""
    hidden = jax.ShapeDtypeStruct((4, 2048, 64), jnp.bfloat16)
    head = jax.ShapeDtypeStruct((50432, 64), jnp.bfloat16)
    targets = jax.ShapeDtypeStruct((4, 2048), jnp.int32)
    weights = jax.ShapeDtypeStruct((4, 2048), jnp.float32)
    loss = jax.jit(jax.value_and_grad(functools.partial(cross_entropy_sum, vocab_size=50432), argnums=(0, 1)))
    analysis = loss.lower(hidden, head, targets, weights).compile().memory_analysis()
    assert analysis.temp_size_in_bytes < 4 * 2048 * 50432 * 4 / 4


# --- meshes --------------------------------------------------------------------------------------------------------


def some_documents(batch: int = 8, length: int = 32) -> np.ndarray:
    """Segment ids of documents that begin anywhere, another place in each row."""
    starts = np.random.default_rng(5).random((batch, length + 1)) < 0.15
    return np.cumsum(starts, axis=1, dtype=np.int32)


@functools.cache
def loss_and_gradients(mesh_name: str, microbatches: int = 1, remat: str = "none", documents: bool = False):
    sizes = MESHES.get(mesh_name)
    mesh = make_mesh(devices=jax.devices()[:1]) if sizes is None else make_mesh(**sizes)
    params = pure_params(init_model(TINY, seed=1, mesh=mesh))
    # A fresh model's biases are zero and its norms one: move them, so that a mistake in them shows.
    params = jax.tree.map(lambda x: x + 0.01 * jnp.sin(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape), params)
    graphdef = nnx.split(abstract_model(TINY, mesh=mesh))[0]
    sharding = named_sharding((8, 33), ("batch", "length"), mesh, "batch")
    batch = jax.device_put(batch_of(3), sharding)
    segment_ids = jax.device_put(some_documents(), sharding) if documents else None

    @jax.jit
    def both(params, tokens, segment_ids):
        options = {"dtype": jnp.float32, "remat": remat, "microbatches": microbatches, "mesh": mesh}
        return step_gradients(graphdef, params, tokens, segment_ids, **options)

    loss, gradients = both(params, batch, segment_ids)
    return float(loss), jax.device_get(named_leaves(gradients))


def assert_same(ours, wanted):
    (loss, gradients), (wanted_loss, wanted_gradients) = ours, wanted
    assert loss == pytest.approx(wanted_loss, abs=2e-6)
    assert gradients.keys() == wanted_gradients.keys()
    for name, gradient in gradients.items():
        limit = 1e-5 * np.abs(wanted_gradients[name]).max() + 1e-8
        assert np.abs(gradient - wanted_gradients[name]).max() <= limit, name


@pytest.mark.parametrize("mesh_name", MESHES)
def test_every_mesh_equals_one_device(mesh_name):
    microbatches = 4 if "pipe" in mesh_name else 1
    assert_same(loss_and_gradients(mesh_name, microbatches), loss_and_gradients("one device"))


@pytest.mark.parametrize("mesh_name", MESHES)
def test_every_mesh_equals_one_device_with_documents_and_accumulation(mesh_name):
    wanted = loss_and_gradients("one device", documents=True)
    assert wanted[0] != loss_and_gradients("one device")[0]
    sizes = MESHES[mesh_name]
    microbatches = min(2, 8 // (sizes.get("data", 1) * sizes.get("fsdp", 1)))  # a row for each device
    assert_same(loss_and_gradients(mesh_name, microbatches, "full", documents=True), wanted)


def test_accumulation_equals_one_batch():
    assert_same(loss_and_gradients("one device", 4), loss_and_gradients("one device"))


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_remat_changes_nothing_but_memory(remat):
    assert_same(loss_and_gradients("one device", 1, remat), loss_and_gradients("one device"))


def test_remat_saves_memory():
    config = dataclasses.replace(TINY, num_hidden_layers=16)
    sizes = {}
    for remat in ("none", "dots", "full"):
        model = abstract_model(config)
        tokens = jax.ShapeDtypeStruct((16, 65), jnp.int32)
        gradient = jax.jit(jax.grad(functools.partial(next_token_loss, remat=remat)))
        sizes[remat] = gradient.lower(model, tokens).compile().memory_analysis().temp_size_in_bytes
    assert sizes["full"] < sizes["dots"] < sizes["none"]


def test_where_parameters_live():
    mesh = make_mesh(fsdp=2, model=4)
    leaves = named_leaves(init_model(TINY, mesh=mesh))
    spec = {name: tuple(leaf.sharding.spec) for name, leaf in leaves.items()}
    assert spec["layers.attention.query_key_value.kernel"] == (None, "fsdp", "model", None, None)
    assert spec["layers.attention.dense.kernel"] == (None, "model", None, "fsdp")
    assert spec["layers.mlp.dense_h_to_4h.kernel"] == (None, "fsdp", "model")
    assert spec["layers.mlp.dense_4h_to_h.kernel"] == (None, "model", "fsdp")
    assert spec["embed_in.embedding"] == spec["embed_out.embedding"] == ("model", "fsdp")
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves.values())
    assert held < 1.1 * sum(leaf.nbytes for leaf in leaves.values()) / 8  # norms and some biases are everywhere


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 3}, r"mesh data=3 is 3 devices, but there are 8"),
        ({"data": -1, "model": 3}, "or a multiple"),
        ({"data": -1, "fsdp": -1}, "at most one is -1"),
        ({"data": 0}, "above 0"),
        ({"pipe": 3, "seq": -1}, r"mesh pipe=3 x seq=-1 is 3 devices or a multiple, but there are 8"),
    ],
)
def test_meshes_that_cannot_be(sizes, message):
    with pytest.raises(InputError, match=message):
        make_mesh(**sizes)


def test_what_is_left_goes_to_minus_one():
    assert dict(make_mesh(data=-1, model=2).shape) == {"data": 4, "fsdp": 1, "pipe": 1, "seq": 1, "model": 2}


def test_rules_are_checked():
    mesh = make_mesh(fsdp=2, model=4)
    with pytest.raises(KeyError):
        partition_spec(("head",), mesh)
    with pytest.raises(ValueError, match="two dims"):
        partition_spec(("heads", "mlp"), mesh)
    with pytest.raises(InputError, match="batch 3 does not divide over fsdp=2; try 4"):
        constrain(jnp.ones((3, 2)), ("batch", "length"), mesh)
    heads = dataclasses.replace(TINY, hidden_size=60, num_attention_heads=6, rotary_pct=0.2)
    with pytest.raises(InputError, match=r"heads 6 does not divide over model=4; try 8"):
        abstract_model(heads, mesh=mesh)


# --- the step ------------------------------------------------------------------------------------------------------


def make_run(eps=1e-8, mesh=None, **train):
    defaults = {"steps": 20, "batch_size": 8, "seq_length": 32}
    config = Config(
        model=TINY,
        train=TrainConfig(**{**defaults, **train}),
        optimizer=OptimizerConfig(
            learning_rate=1e-2, min_learning_rate=1e-3, warmup_steps=2, schedule="cosine", eps=eps
        ),
    )
    mesh = make_mesh(devices=jax.devices()[:1]) if mesh is None else mesh
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    dtype = config.train.dtype
    state = init_state(TINY, optimizer, mesh, seed=1, dtype=dtype)
    step = make_train_step(
        config,
        optimizer=optimizer,
        schedule=make_schedule(config.optimizer, config.train.steps),
        mesh=mesh,
        state_shardings=jax.tree.map(lambda x: x.sharding, abstract_state(TINY, optimizer, mesh, dtype=dtype)),
    )
    return config, state, step


def test_step_follows_adamw_by_hand():
    """Two steps against AdamW written out, the decay mask and the clip included."""
    config, state, step = make_run(eps=1e-3)  # a large eps, so that gradients of mere noise do not decide an update
    o = config.optimizer
    schedule = make_schedule(o, config.train.steps)
    graphdef = nnx.split(abstract_model(TINY))[0]
    params = jax.device_get(named_leaves(state.params))
    m = {k: np.zeros_like(v) for k, v in params.items()}
    v = {k: np.zeros_like(x) for k, x in params.items()}
    for n in range(2):
        gradients = jax.grad(lambda p, t: next_token_loss(nnx.merge(graphdef, p), t))(state.params, batch_of(n))
        g = jax.device_get(named_leaves(gradients))
        norm = math.sqrt(sum(float((x.astype(np.float64) ** 2).sum()) for x in g.values()))
        state, metrics = step(state, batch_of(n))
        assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-5)
        lr = float(schedule(n))
        assert float(metrics["learning_rate"]) == pytest.approx(lr)
        for k in params:
            x = g[k] * min(1, o.clip_norm / norm)
            m[k] = o.b1 * m[k] + (1 - o.b1) * x
            v[k] = o.b2 * v[k] + (1 - o.b2) * x**2
            update = (m[k] / (1 - o.b1 ** (n + 1))) / (np.sqrt(v[k] / (1 - o.b2 ** (n + 1))) + o.eps)
            decay = 0 if k.endswith(("bias", "scale")) else o.weight_decay
            params[k] = params[k] - lr * (update + decay * params[k])
    for k, leaf in jax.device_get(named_leaves(state.params)).items():
        np.testing.assert_allclose(leaf, params[k], atol=1e-6, err_msg=k)


def test_it_learns_one_batch():
    _, state, step = make_run()
    losses = []
    for _ in range(20):
        state, metrics = step(state, batch_of(0))
        losses.append(float(metrics["loss"]))
    assert losses[0] == pytest.approx(math.log(512), abs=0.3)
    assert losses[-1] < losses[0] - 1


def test_bfloat16_keeps_float32_masters():
    _, state, step = make_run(dtype="bfloat16")
    state, metrics = step(state, batch_of(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    _, reference, reference_step = make_run()
    _, wanted = reference_step(reference, batch_of(0))
    assert float(metrics["loss"]) == pytest.approx(float(wanted["loss"]), abs=0.02)


def test_a_step_that_is_not_finite_changes_nothing_but_the_count():
    _, state, step = make_run()
    state, _ = step(state, batch_of(0))
    before = jax.device_get(state)
    broken = jax.tree.map(jnp.copy, state)
    broken.params["final_layer_norm"]["scale"] = broken.params["final_layer_norm"]["scale"] * jnp.inf
    poisoned = jax.device_get(broken)
    after, metrics = step(broken, batch_of(1))
    assert int(metrics["skipped"]) == 1
    assert int(after.step) == int(before.step) + 1
    for a, b in zip(jax.tree.leaves(after.params), jax.tree.leaves(poisoned.params), strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(jax.tree.leaves(after.optimizer_state), jax.tree.leaves(before.optimizer_state), strict=True):
        np.testing.assert_array_equal(a, b)
    assert int(num_updates(after.optimizer_state)) == 1


def test_one_compile_for_all_steps():
    _, state, step = make_run()
    for n in range(3):
        state, _ = step(state, batch_of(n))
    assert step._cache_size() == 1


def test_moments_live_with_their_parameters_and_are_cut_over_replicas():
    """ZeRO-1: with data=2 a device holds half of what it holds of the parameters."""
    optimizer = make_optimizer(OptimizerConfig(warmup_steps=2), 20)
    state = init_state(TINY, optimizer, make_mesh(fsdp=2, model=4), seed=1)
    adam = optax.tree.get(state.optimizer_state, "mu")
    for (name, moment), param in zip(named_leaves(adam).items(), jax.tree.leaves(state.params), strict=True):
        assert moment.sharding == param.sharding, name
    assert logical_axes(abstract_model(TINY)).keys() == named_leaves(state.params).keys()

    state = init_state(TINY, optimizer, make_mesh(data=2, fsdp=2, model=2), seed=1)
    for tree in ("mu", "nu"):
        moments = named_leaves(optax.tree.get(state.optimizer_state, tree))
        for (name, moment), param in zip(moments.items(), jax.tree.leaves(state.params), strict=True):
            held, whole = (x.addressable_shards[0].data.size for x in (moment, param))
            assert 2 * held == whole, (name, moment.sharding.spec, param.sharding.spec)


def test_sharding_report_and_its_limit():
    mesh = make_mesh(fsdp=2, model=4)
    params = abstract_state(TINY, make_optimizer(OptimizerConfig(warmup_steps=2), 20), mesh).params
    report = report_sharding(params)
    assert [one.num_bytes for one in report] == sorted((one.num_bytes for one in report), reverse=True)
    assert sum(one.num_bytes for one in report) == num_bytes(params)
    by_name = {one.name: one for one in report}
    kernel = by_name["layers.mlp.dense_h_to_4h.kernel"]
    assert (kernel.device_bytes, tuple(kernel.spec)) == (kernel.num_bytes // 8, (None, "fsdp", "model"))
    check_sharded(params, mesh)
    narrow = dataclasses.replace(
        TINY, hidden_size=16, num_attention_heads=4, intermediate_size=16, vocab_size=16, rotary_pct=0.5
    )
    params = pure_params(abstract_model(narrow, mesh=mesh))
    with pytest.raises(InputError, match=r"5\.7% of the parameters' bytes are whole on every device \(most layers"):
        check_sharded(params, mesh)
    check_sharded(pure_params(abstract_model(narrow, mesh=make_mesh(data=8))), make_mesh(data=8))


FITS = {
    "layers": ({"pipe": 8}, {}, "model.num_hidden_layers 4 does not divide over mesh.pipe = 8; try 4 there"),
    "heads": (
        {"model": 8},
        {"num_attention_heads": 4},
        "model.num_attention_heads 4 does not divide over mesh.model = 8",
    ),
    "rows": (
        {"data": 8},
        {"batch_size": 12},
        "train.batch_size 12 does not divide over mesh.data x mesh.fsdp x train.mi",
    ),
    "positions": (
        {"seq": 8},
        {"seq_length": 30},
        "train.seq_length 30 does not divide over mesh.seq = 8; try 6 there, or",
    ),
}


@pytest.mark.parametrize("name", FITS)
def test_a_run_that_does_not_fit_its_mesh_is_refused(name):
    sizes, fields, message = FITS[name]
    train = {"batch_size": 8, "seq_length": 32, "steps": 2} | {k: v for k, v in fields.items() if "_heads" not in k}
    model = dataclasses.replace(TINY, **{k: v for k, v in fields.items() if "_heads" in k})
    with pytest.raises(InputError, match=re.escape(message)):
        check_fits(Config(model=model, train=TrainConfig(**train)), make_mesh(**sizes))


@functools.cache
def four_steps(mesh_name: str) -> list[float]:
    sizes = MESHES.get(mesh_name)
    mesh = make_mesh(devices=jax.devices()[:1]) if sizes is None else make_mesh(**sizes)
    _, state, step = make_run(mesh=mesh, microbatches=2 if "pipe" in mesh_name else 1)
    sharding = named_sharding((8, 33), ("batch", "length"), mesh, "batch")
    losses = []
    for n in range(4):
        state, metrics = step(state, jax.device_put(batch_of(n), sharding))
        losses.append(float(metrics["loss"]))
    return losses


@pytest.mark.parametrize("mesh_name", MESHES)
def test_four_steps_are_the_same_on_every_mesh(mesh_name):
    np.testing.assert_allclose(four_steps(mesh_name), four_steps("one device"), atol=1e-4)


# --- float16 -------------------------------------------------------------------------------------------------------


def test_loss_scale_follows_deepspeeds_rule():
    """Against the rule written out in plain Python, over a run with overflows in every place that matters."""
    overflows = {0, 1, 2, 5, 1006, 1007, 1008, *range(2100, 2140)}
    state, update = init_loss_scale(), jax.jit(update_loss_scale)
    scale, hysteresis, last = 4096.0, 2, -1
    for n in range(3300):
        state = update(state, jnp.bool_(n not in overflows))
        if n in overflows:
            if hysteresis == 1:
                scale = max(scale / 2, 1.0)
            else:
                hysteresis -= 1
            last = n
        elif (n - last) % 1000 == 0:
            hysteresis, scale = 2, scale * 2
        assert (float(state.scale), int(state.hysteresis)) == (scale, hysteresis), n
    assert scale == 2.0


def test_float16_trains_as_float32_does():
    _, state, step = make_run(dtype="float16")
    _, wanted_state, wanted_step = make_run()
    for n in range(4):
        state, metrics = step(state, batch_of(n))
        wanted_state, wanted = wanted_step(wanted_state, batch_of(n))
        assert float(metrics["loss"]) == pytest.approx(float(wanted["loss"]), abs=0.01)
        assert float(metrics["grad_norm"]) == pytest.approx(float(wanted["grad_norm"]), rel=0.02)
        assert (int(metrics["overflowed"]), float(metrics["loss_scale"])) == (0, 4096)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}


def test_an_overflow_in_float16_lowers_the_scale_and_changes_no_weight():
    _, state, step = make_run(dtype="float16")
    state, _ = step(state, batch_of(0))
    state = state.replace(loss_scale=state.loss_scale.replace(scale=jnp.float32(2.0**30)))
    before = jax.device_get(state)
    for wanted in (2.0**30, 2.0**29):  # the first is borne, the second is not
        state, metrics = step(state, batch_of(1))
        assert (int(metrics["overflowed"]), int(metrics["skipped"])) == (1, 0)
        assert float(state.loss_scale.scale) == wanted
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(before.params), strict=True):
        np.testing.assert_array_equal(a, b)
    assert int(num_updates(state.optimizer_state)) == 1


def test_loss_scale_is_saved_and_restored(tmp_path):
    config, state, step = make_run(dtype="float16")
    state, _ = step(state, batch_of(0))
    checkpoints = RunCheckpoints(tmp_path, config.checkpoint)
    checkpoints.save(1, state, config.model, force=True)
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    abstract = abstract_state(TINY, optimizer, make_mesh(devices=jax.devices()[:1]), dtype="float16")
    checkpoints.close()
    again = RunCheckpoints(tmp_path, config.checkpoint).restore(1, abstract)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_20b_is_the_same_code():
    """GPT-NeoX-20B's published step, traced and lowered for a mesh without an array of it being made."""
    config = load_config(str(Path(__file__).resolve().parents[1] / "configs" / "gpt_neox_20b.py"))
    mesh = make_mesh(fsdp=4, model=2)
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    abstract = abstract_state(config.model, optimizer, mesh)
    step = make_train_step(
        config,
        optimizer=optimizer,
        schedule=make_schedule(config.optimizer, config.train.steps),
        mesh=mesh,
        state_shardings=jax.tree.map(lambda x: x.sharding, abstract),
    )
    lowered = step.lower(abstract, jax.ShapeDtypeStruct((1536, 2049), jnp.int32))
    assert num_bytes(abstract.params) == 4 * 20_554_567_680
    held = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(abstract.params))
    assert held < 20_554_567_680 / 8 * 1.001
    assert "tensor<44x6144x" in lowered.as_text()
