"""What the model means: causality, masks, dtypes, initialisation; what it costs: compiles; and which way imports go."""

import ast
import dataclasses
import math
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neox_jax.config import PRESETS, ModelConfig
from neox_jax.model import abstract_model, init_model, logical_axes
from neox_jax.tree import is_decayed, map_named, named_leaves, num_bytes, num_elements

PACKAGE = Path(__file__).resolve().parents[1] / "neox_jax"
TINY = ModelConfig.preset("tiny")
VARIANTS = {
    "parallel": TINY,
    "sequential": dataclasses.replace(TINY, use_parallel_residual=False),
    "tied": dataclasses.replace(TINY, tie_word_embeddings=True),
    "no attention bias": dataclasses.replace(TINY, attention_bias=False),
    "all dims rotate": dataclasses.replace(TINY, rotary_pct=1.0),
    "no dims rotate": dataclasses.replace(TINY, rotary_pct=0.0),
    "padded vocabulary": dataclasses.replace(TINY, vocab_size=500, vocab_multiple=128),
    "heads of 256": dataclasses.replace(TINY, hidden_size=512, num_attention_heads=2, num_hidden_layers=2),
}


@pytest.fixture(scope="module")
def model():
    return init_model(TINY, seed=1)


def tokens_of(config: ModelConfig, batch: int = 2, length: int = 12, seed: int = 0) -> jax.Array:
    return jax.random.randint(jax.random.key(seed), (batch, length), 0, config.vocab_size)


@pytest.mark.parametrize("name", PRESETS)
def test_parameter_count_is_that_of_the_arrays(name):
    config = ModelConfig.preset(name)
    assert num_elements(abstract_model(config)) == config.num_parameters


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
def test_parameter_count_of_variants(config):
    assert num_elements(abstract_model(config)) == config.num_parameters


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
def test_causality_by_gradients(config):
    """No logit depends on the embedding of a later token; each depends on its own and on the first."""
    model = init_model(config, seed=2)
    tokens = tokens_of(config, batch=1, length=6)

    def logits_of(embedded_BTD, position):
        tables = model.rotary_tables(jnp.arange(6))
        from neox_jax.attention import causal_attention

        def body(x, layer):
            return layer(x, tables, causal_attention, None)[0], None

        x, _ = jax.lax.scan(body, embedded_BTD, model.layers)
        return jnp.sum(model.unembed(model.final_layer_norm(x))[0, position, : config.vocab_size] ** 2)

    for position in range(6):
        gradient = jax.grad(logits_of)(model.embed(tokens), position)
        reached = np.abs(np.asarray(gradient)).max(axis=(0, 2)) > 0
        assert reached.tolist() == [i <= position for i in range(6)]


def test_a_change_of_a_later_token_changes_no_earlier_logit(model):
    tokens = tokens_of(TINY)
    other = tokens.at[:, 7].set((tokens[:, 7] + 1) % TINY.vocab_size)
    same = np.asarray(model(tokens) == model(other)).all(axis=(0, 2))
    assert same[:7].all()
    assert not same[7:].any()


def test_second_eager_call_compiles_nothing(model):
    tokens = tokens_of(TINY)
    model(tokens).block_until_ready()
    compiles = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, duration, **_: compiles.append(event) if "compile" in event else None
    )
    try:
        model(tokens).block_until_ready()
        assert compiles == []
        model(tokens[:, :5]).block_until_ready()  # another shape must compile: the listener does listen
        assert compiles
    finally:
        jax.monitoring.clear_event_listeners()


def test_segments_are_separate_texts(model):
    first, second = tokens_of(TINY, 1, 5, seed=1), tokens_of(TINY, 1, 7, seed=2)
    packed = jnp.concatenate([first, second], axis=1)
    segment_ids = jnp.array([[0] * 5 + [1] * 7])
    positions = jnp.array([[*range(5), *range(7)]])
    logits = model(packed, segment_ids=segment_ids, positions=positions)
    np.testing.assert_allclose(logits[:, :5], model(first), atol=2e-6)
    np.testing.assert_allclose(logits[:, 5:], model(second), atol=2e-6)


def test_only_differences_of_positions_matter(model):
    tokens = tokens_of(TINY)
    np.testing.assert_allclose(model(tokens, positions=jnp.arange(12)[None] + 3), model(tokens), atol=5e-6)
    spread = model(tokens, positions=2 * jnp.arange(12)[None])
    assert jnp.abs(spread - model(tokens)).max() > 1e-4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
def test_dtypes_run_without_nan(config, dtype):
    model = init_model(config, seed=3)
    tokens = tokens_of(config)
    cast = jax.tree.map(lambda x: x.astype(dtype), model)
    logits = cast(tokens)[..., : config.vocab_size]
    assert logits.dtype == jnp.float32
    assert jnp.isfinite(logits).all()
    reference = model(tokens)[..., : config.vocab_size]
    tolerance = {"float32": 0, "bfloat16": 0.05, "float16": 0.01}[dtype]
    assert jnp.abs(logits - reference).max() <= tolerance * jnp.abs(reference).max()


def test_float16_survives_scores_beyond_its_range():
    """Trap of the small Pythias: q.k above 65504 is infinite in float16, so scores are float32."""
    model = init_model(TINY, seed=4)
    loud = map_named(lambda name, x: 60 * x if name.endswith("query_key_value.kernel") else x, model)
    loud = jax.tree.map(lambda x: x.astype(jnp.float16), loud)
    qkv = loud.layers.attention.query_key_value.kernel[...]
    assert jnp.isfinite(qkv).all()
    assert jnp.isfinite(loud(tokens_of(TINY))).all()


def test_padded_rows_take_no_part():
    config = VARIANTS["padded vocabulary"]
    model = init_model(config, seed=5)
    logits = model(tokens_of(config))
    assert logits.shape[-1] == config.padded_vocab_size == 512
    assert (logits[..., 500:] < -1e29).all()
    assert jnp.exp(jax.nn.log_softmax(logits))[..., 500:].max() == 0


def test_which_parameters_are_decayed():
    names = named_leaves(abstract_model(TINY))
    decayed = {name for name in names if is_decayed(name)}
    assert decayed == {
        "embed_in.embedding",
        "embed_out.embedding",
        "layers.attention.dense.kernel",
        "layers.attention.query_key_value.kernel",
        "layers.mlp.dense_4h_to_h.kernel",
        "layers.mlp.dense_h_to_4h.kernel",
    }
    assert {name.rsplit(".", 1)[1] for name in names.keys() - decayed} == {"bias", "scale"}


def test_every_parameter_names_its_axes():
    model = abstract_model(TINY)
    axes = logical_axes(model)
    for name, leaf in named_leaves(model).items():
        assert len(axes[name]) == len(leaf.shape), name


@pytest.mark.parametrize("method", ["small_init", "normal"])
def test_initialisation_follows_the_recipe(method):
    config = dataclasses.replace(TINY, hidden_size=256, intermediate_size=1024, init_method=method)
    leaves = named_leaves(init_model(config, seed=6))
    small, wang = math.sqrt(2 / (5 * 256)), 2 / (4 * math.sqrt(256))
    if method == "normal":
        small, wang = 0.02, 0.02 / math.sqrt(2 * 4)
    for name, leaf in leaves.items():
        last = name.rsplit(".", 1)[1]
        if last in ("bias", "scale"):
            assert (leaf == (1 if last == "scale" else 0)).all()
            continue
        wanted = wang if name in ("layers.attention.dense.kernel", "layers.mlp.dense_4h_to_h.kernel") else small
        assert float(jnp.std(leaf)) == pytest.approx(wanted, rel=0.02), name
        assert abs(float(jnp.mean(leaf))) < wanted * 5 / math.sqrt(leaf.size), name


def test_seeds_and_sizes():
    same, other = init_model(TINY, seed=7), init_model(TINY, seed=8)
    assert (same.embed_in.embedding[...] == init_model(TINY, seed=7).embed_in.embedding[...]).all()
    assert not (same.embed_in.embedding[...] == other.embed_in.embedding[...]).all()
    assert num_bytes(same) == 4 * TINY.num_parameters


LEVELS = {
    0: ["errors", "disk", "config", "tree", "hardware", "compiler_options", "hlo", "tokenizer", "hub", "peers"],
    0.5: ["sampling", "run_lock", "watchdog", "slow_hosts", "marks"],
    1: ["distributed", "sharding", "replicas", "rotary", "splash", "attention", "tensor_parallel", "kv_cache", "loss"],
    2: ["lora", "inside", "model", "quantize", "pipeline", "optimizer"],
    3: ["train_state", "train_step", "engine", "generation", "scoring"],
    3.5: ["data"],
    4: ["checkpoint", "convert", "metrics", "events", "health", "continuity", "meter", "supervision", "heldout"],
    4.5: ["profiler", "memory"],
    5: ["evaluate", "harness", "published", "tasks", "train", "bench", "estimate", "plot", "prompts"],
    6: ["verbs", "cli"],
}


def imports_of(path: Path) -> set[str]:
    """The rooms of neox_jax that a file imports, at its top or inside functions."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names = (
                [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "neox_jax" else [node.module]
            )
        rooms |= {name.split(".")[1] for name in names if name.startswith("neox_jax.")}
    return rooms


def test_imports_go_one_way():
    order = [(level, place, room) for level, rooms in LEVELS.items() for place, room in enumerate(rooms)]
    rank = {room: (level, place) for level, place, room in order}
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if room == "__init__":
            continue
        for imported in imports_of(path) - {room}:
            assert rank[imported] < rank[room], f"{path.name} ({room}) imports {imported}, which is not below it"


HEAVY = ("lm_eval", "numba", "torch", "transformers", "tensorflow", "ray", "ml_collections")
HEAVY += ("tensorboardX", "matplotlib")


def test_import_loads_nothing_heavy():
    rooms = sorted(p.relative_to(PACKAGE.parent).with_suffix("").as_posix() for p in PACKAGE.rglob("*.py"))
    modules = [room.replace("/", ".").removesuffix(".__init__") for room in rooms]
    modules.remove("neox_jax.harness")  # which is lm_eval's, and loaded for it alone
    modules.remove("neox_jax.data.index_loops")  # which is numba's, and loaded where an index is made
    code = (
        f"import importlib, sys\nfor name in {modules!r}: importlib.import_module(name)\n"
        "import neox_jax\n[getattr(neox_jax, name) for name in neox_jax.__all__]\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    assert out.stdout.strip() == "[]"


def test_generate_stays_a_function_when_modules_are_imported():
    code = "import neox_jax, neox_jax.train, neox_jax.cli; assert callable(neox_jax.generate)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)
