"""Looking inside: captures are transformers' activations, patches act where they say, and a plain call pays nothing."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from variants import VARIANTS, random_model, random_reference

from neox_jax.convert.hf import load_hf
from neox_jax.convert.source import save_model
from neox_jax.errors import InputError
from neox_jax.inside import CAPTURES, IN_LAYERS
from neox_jax.model import init_model
from neox_jax.sharding import make_mesh
from neox_jax.tokenizer import train_tokenizer
from neox_jax.tree import map_named

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "interpretability.md"
TOKENS = np.random.default_rng(1).integers(0, 97, (2, 12))
PARALLEL, SEQUENTIAL = "pythia", "redpajama"  # of the variants


@pytest.fixture(scope="module")
def model():
    return random_model(VARIANTS[PARALLEL])


@pytest.fixture
def compiles():
    """A list that gets an entry whenever something is compiled."""
    found = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, duration, **_: found.append(event) if "compile" in event else None
    )
    yield found
    jax.monitoring.clear_event_listeners()


def add(vector, x):
    return x + vector


def louder(x):
    return 1.5 * x


# ---- the same as transformers


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    """twins(name): (our model, transformers' with the same weights)."""
    pytest.importorskip("torch")
    made = {}

    def get(name: str):
        if name not in made:
            folder, theirs = tmp_path_factory.mktemp(name), random_reference(VARIANTS[name])
            theirs.save_pretrained(folder)
            made[name] = load_hf(folder), theirs
        return made[name]

    return get


def run_reference(theirs, hooks=()) -> dict[str, np.ndarray]:
    """Logits and what each layer gives, by our names; hooks: (register, function), removed afterwards."""
    import torch

    outputs = {"attention": [], "mlp": []}

    def keep(name):
        return lambda module, args, out: outputs[name].append(out[0] if isinstance(out, tuple) else out)

    handles = [register(hook) for register, hook in hooks]
    for layer in theirs.gpt_neox.layers:
        handles.append(layer.attention.register_forward_hook(keep("attention")))
        handles.append(layer.mlp.register_forward_hook(keep("mlp")))
    try:
        with torch.no_grad():
            out = theirs(torch.from_numpy(TOKENS), output_hidden_states=True, output_attentions=True)
    finally:
        for handle in handles:
            handle.remove()
    return {
        **{name: np.stack(values) for name, values in outputs.items()},
        "residual": np.stack(out.hidden_states[:-1]),
        "final": out.hidden_states[-1].numpy(),
        "attention_weights": np.stack(out.attentions),
        "logits": out.logits.numpy(),
    }


@pytest.mark.parametrize("name", VARIANTS)
def test_captures_are_transformers_activations(name, twins):
    ours, theirs = twins(name)
    wanted = run_reference(theirs)
    logits, captured = ours(TOKENS, capture=CAPTURES)
    assert captured.keys() == set(CAPTURES)
    for key, got in {**captured, "logits": logits}.items():
        assert got.shape == wanted[key].shape, key
        error = np.abs(np.asarray(got) - wanted[key]).max()
        assert error <= 1e-5 * max(1, np.abs(wanted[key]).max()), key
    np.testing.assert_allclose(logits, ours(TOKENS), atol=2e-5)


@pytest.mark.parametrize("name", [PARALLEL, SEQUENTIAL])
def test_patches_are_torch_hooks(name, twins):
    """Layer 1's three arrays times 1.5, in both."""
    ours, theirs = twins(name)
    layer = theirs.gpt_neox.layers[1]
    hooks = {
        "residual": (layer.register_forward_pre_hook, lambda module, args: (1.5 * args[0], *args[1:])),
        "attention": (layer.attention.register_forward_hook, lambda module, args, out: (1.5 * out[0], *out[1:])),
        "mlp": (layer.mlp.register_forward_hook, lambda module, args, out: 1.5 * out),
    }
    plain = np.asarray(ours(TOKENS))
    for key, hook in hooks.items():
        wanted = run_reference(theirs, [hook])["logits"]
        got = np.asarray(ours(TOKENS, patch={(key, 1): louder}))
        np.testing.assert_allclose(got, wanted, atol=2e-5, err_msg=key)
        assert np.abs(got - plain).max() > 0.05, key


# ---- what a capture is


@pytest.mark.parametrize("name", [PARALLEL, SEQUENTIAL])
def test_some_are_as_all_together_and_the_logits_stay(name):
    model = random_model(VARIANTS[name])
    plain = model(TOKENS)
    together = model(TOKENS, capture=CAPTURES)[1]
    # The layers themselves run as always for the first two; the others are computed another way.
    for names, tolerance in ((("residual", "final"), 0), (("mlp",), 2e-5), (("attention_weights",), 2e-5)):
        logits, captured = model(TOKENS, capture=names)
        assert captured.keys() == set(names)
        for key in names:
            np.testing.assert_allclose(captured[key], together[key], atol=1e-5, err_msg=key)
        np.testing.assert_allclose(logits, plain, atol=tolerance, rtol=0, err_msg=str(names))


def test_the_residual_is_the_sum_of_what_layers_add(model):
    captured = model(TOKENS, capture=("residual", "attention", "mlp", "final"))[1]
    sums = captured["residual"] + captured["attention"] + captured["mlp"]
    np.testing.assert_allclose(captured["residual"][1:], sums[:-1], atol=1e-5)
    np.testing.assert_allclose(captured["final"], model.finish(sums[-1]), atol=1e-5)


def test_weights_keep_to_segments_and_positions_count(model):
    segment_ids = np.array([[0] * 5 + [1] * 7] * 2)
    positions = np.array([[*range(5), *range(7)]] * 2)
    options = {"segment_ids": segment_ids, "positions": positions, "capture": ("attention_weights",)}
    logits, captured = model(TOKENS, **options)
    weights = np.asarray(captured["attention_weights"])
    assert weights.dtype == np.float32
    seen = np.tril(segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
    assert (weights[:, ~np.broadcast_to(seen, weights.shape[1:])] == 0).all()
    assert (weights[:, np.broadcast_to(seen, weights.shape[1:])] > 0).all()
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)
    np.testing.assert_allclose(logits, model(TOKENS, segment_ids=segment_ids, positions=positions), atol=2e-5)
    alone = model(TOKENS[:, 5:], capture=("attention_weights",))[1]["attention_weights"]
    np.testing.assert_allclose(weights[..., 5:, 5:], alone, atol=1e-5)


def test_half_precision_keeps_its_dtypes(model):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model)
    logits, captured = half(TOKENS, capture=CAPTURES, patch={(name, 0): louder for name in IN_LAYERS})
    assert logits.dtype == captured["attention_weights"].dtype == jnp.float32
    assert {captured[name].dtype for name in CAPTURES if name != "attention_weights"} == {jnp.dtype(jnp.bfloat16)}
    assert jnp.isfinite(logits).all()


# ---- what a patch does


@pytest.mark.parametrize("name", IN_LAYERS)
def test_a_patch_acts_in_its_layer_and_shows(name, model):
    plain = model(TOKENS, capture=IN_LAYERS)[1]
    patched = model(TOKENS, capture=IN_LAYERS, patch={(name, 1): louder})[1]
    np.testing.assert_allclose(patched[name][0], plain[name][0], atol=1e-6)
    np.testing.assert_allclose(patched[name][1], 1.5 * plain[name][1], atol=1e-5)
    assert (patched["residual"][:1] == plain["residual"][:1]).all()
    assert np.abs(patched["residual"][2] - plain["residual"][2]).max() > 0.05


def test_several_patches_each_in_its_layer(model):
    """Each vector added to an output is one added to a bias."""
    vectors = np.random.default_rng(2).standard_normal((4, 32), np.float32)

    def with_biases(name, x):
        if name == "layers.mlp.dense_4h_to_h.bias":
            return x.at[0].add(vectors[0]).at[2].add(vectors[1])
        return x.at[2].add(vectors[2]) if name == "layers.attention.dense.bias" else x

    patch = {
        ("mlp", 2): lambda x: x + vectors[1],
        ("mlp", 0): lambda x: x + vectors[0],
        ("attention", 2): lambda x: x + vectors[2],
    }
    got = model(TOKENS, patch=patch)
    np.testing.assert_allclose(got, map_named(with_biases, model)(TOKENS), atol=2e-5)
    assert np.abs(got - model(TOKENS)).max() > 0.1


def test_a_head_without_weights_is_one_without_an_output(model):
    def without_head(name, x):
        return x.at[1, 2].set(0) if name == "layers.attention.dense.kernel" else x

    got = model(TOKENS, patch={("attention_weights", 1): lambda weights: weights.at[:, 2].set(0)})
    np.testing.assert_allclose(got, map_named(without_head, model)(TOKENS), atol=2e-5)
    assert np.abs(got - model(TOKENS)).max() > 0.05


def test_gradients_go_through_captures_and_patches(model):
    """The gradient for a vector added to layer 1's feed-forward is that for its bias, found without a patch."""
    random = np.random.default_rng(3)
    score_logits = random.standard_normal((2, 12, 97), np.float32)
    score_residual = random.standard_normal((2, 12, 32), np.float32)

    def score(vector):
        patch = {("mlp", 1): lambda x: x + vector}
        logits, captured = model(TOKENS, capture=("residual",), patch=patch)
        return jnp.vdot(logits, score_logits) + jnp.vdot(captured["residual"][2], score_residual)

    def plain_score(bias):
        moved = map_named(lambda name, x: bias if name == "layers.mlp.dense_4h_to_h.bias" else x, model)
        residual = moved(TOKENS, capture=("residual",))[1]["residual"][2]
        return jnp.vdot(moved(TOKENS), score_logits) + jnp.vdot(residual, score_residual)

    for_vector = jax.jit(jax.grad(score))(jnp.zeros(32))
    wanted = jax.jit(jax.grad(plain_score))(model.layers.mlp.dense_4h_to_h.bias[...])[1]
    np.testing.assert_allclose(for_vector, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())


def test_under_jit_and_vmap(model):
    def steered(model, tokens, vector):
        return model(tokens, capture=("final",), patch={("residual", 1): lambda x: x + vector})

    vectors = np.random.default_rng(5).standard_normal((2, 32), np.float32)
    logits, captured = jax.jit(jax.vmap(steered, in_axes=(None, None, 0)))(model, TOKENS, vectors)
    for i in range(2):
        wanted, one = steered(model, TOKENS, vectors[i])
        np.testing.assert_allclose(logits[i], wanted, atol=2e-5)
        np.testing.assert_allclose(captured["final"][i], one["final"], atol=2e-5)
    assert np.abs(logits[1] - logits[0]).max() > 0.05


# ---- over a mesh

FSDP, PIPE = {"data": 2, "fsdp": 2, "model": 2}, {"seq": 2, "model": 2, "pipe": 2}


@pytest.mark.parametrize(
    ("sizes", "length", "capture"),
    [(FSDP, 12, CAPTURES), (PIPE, 12, CAPTURES), (FSDP, 7, ("residual",))],  # 7 positions divide over nothing
    ids=["fsdp", "pipe", "7 positions"],
)
def test_a_mesh_gives_the_same(sizes, length, capture):
    config = random_model({**VARIANTS[PARALLEL], "num_hidden_layers": 4, "vocab_size": 96}).config
    tokens = np.resize(TOKENS, (4, length))
    patch = {("residual", 1): jax.tree_util.Partial(add, np.linspace(-1, 1, 32, dtype=np.float32))}
    if capture == CAPTURES:
        patch |= {("attention", 3): louder, ("mlp", 0): louder}
        patch |= {("attention_weights", 2): lambda weights: weights.at[:, 1].set(0)}
    one, many = (init_model(config, seed=1, mesh=mesh) for mesh in (None, make_mesh(**sizes)))
    wanted, wanted_inside = one(tokens, capture=capture, patch=patch)
    logits, captured = many(tokens, capture=capture, patch=patch)
    np.testing.assert_allclose(logits, wanted, atol=1e-5)
    for name in capture:
        np.testing.assert_allclose(captured[name], wanted_inside[name], atol=1e-5, err_msg=name)


# ---- what it costs


def test_the_plain_call_has_nothing_of_it(model):
    """Its scan over layers has one output, the residual, and no captures beside it."""

    def scans(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "scan":
                yield equation
            for inner in jaxprs_in_params(equation.params):
                yield from scans(inner)

    def outputs(**options):
        (scan,) = scans(jax.make_jaxpr(lambda tokens: model(tokens, **options))(TOKENS).jaxpr)
        return len(scan.outvars)

    assert outputs() == 1
    assert outputs(patch={("residual", 0): louder}) == 1
    assert outputs(capture=("residual", "mlp")) == 3


def test_second_call_compiles_nothing(model, compiles):
    tokens = jnp.asarray(TOKENS[:, :9])
    first, second = jnp.zeros(32), jnp.arange(32.0)  # a norm would not see one value added to all
    partial = jax.tree_util.Partial

    def call(model, vector):
        model(tokens, capture=("residual", "mlp"))
        model(tokens, patch={("mlp", 1): louder})
        return model(tokens, patch={("residual", 1): partial(add, vector), ("residual", 2): louder})

    other = jax.tree.map(lambda x: 2 * x, model)  # as another revision is
    before = np.asarray(call(model, first))
    compiles.clear()
    after = np.asarray(call(model, second))
    call(other, second)
    assert compiles == []
    assert np.abs(after - before).max() > 0.05
    model(tokens, patch={("mlp", 1): lambda x: 1.5 * x})  # another function must compile: the listener does listen
    assert compiles


# ---- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capture": "residual"}, r"capture 'residual': wanted a tuple of names; write ('residual',)"),
        (
            {"capture": ("residuals",)},
            "capture 'residuals': wanted one of residual, attention, mlp, attention_weights, final",
        ),
        ({"patch": {"mlp": louder}}, "patch 'mlp': wanted a layer from 0 to 2"),
        ({"patch": {("mlp", 3): louder}}, "patch ('mlp', 3): wanted a layer from 0 to 2"),
        ({"patch": {("mlp", -1): louder}}, "patch ('mlp', -1): wanted a layer from 0 to 2"),
        (
            {"patch": {("final", 0): louder}},
            "patch ('final', 0): wanted (NAME, LAYER) with a name of residual, attention, mlp, attention_weights",
        ),
        ({"patch": {("mlp", 1): 3}}, "patch ('mlp', 1): got a int, wanted a function of the layer's array"),
        (
            {"patch": {("mlp", 1): lambda x: x[:, :3]}},
            "patch ('mlp', 1): its function gave float32[2, 3, 32], wanted float32[2, 12, 32], as it was given",
        ),
        (
            {"patch": {("residual", 0): lambda x: x.astype(jnp.bfloat16)}},
            "patch ('residual', 0): its function gave bfloat16[2, 12, 32], wanted float32[2, 12, 32], as it was given",
        ),
        (
            {"patch": {("attention_weights", 2): lambda x: None}},
            "patch ('attention_weights', 2): its function gave NoneType, wanted float32[2, 4, 12, 12], as it was given",
        ),
    ],
)
def test_refusals(options, message, model):
    with pytest.raises(InputError) as caught:
        model(TOKENS, **options)
    assert str(caught.value) == message


# ---- the page


def test_the_examples_of_the_page_run(tmp_path):
    """As they stand there, in one process, with a small model in the hub's cache and no network."""
    pytest.importorskip("huggingface_hub", reason="the page loads from the hub: pip install neox_jax[hub]")
    text = PAGE.read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    (repo_id,) = set(re.findall(r"EleutherAI/[\w.-]+", "".join(blocks)))
    prompts = re.findall(r'encode\("(.*?)"\)', text)
    tokenizer = train_tokenizer([text, *prompts * 50], vocab_size=600)  # whole words are tokens, as in the real one
    config = {**VARIANTS[PARALLEL], "vocab_size": tokenizer.vocab_size}
    cache = tmp_path / "hub" / f"models--{repo_id.replace('/', '--')}"
    (cache / "refs").mkdir(parents=True)
    revisions = dict.fromkeys(["main", *re.findall(r"step\d+", "".join(blocks))])
    for seed, revision in enumerate(revisions):
        commit = str(seed) * 40
        save_model(random_model(config, seed=seed), cache / "snapshots" / commit, tokenizer=tokenizer)
        (cache / "refs" / revision).write_text(commit)
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu"}
    environment.pop("HF_HUB_CACHE", None)
    script = tmp_path / "page.py"
    script.write_text("\n".join(blocks))
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, env=environment, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(blocks) >= 4
