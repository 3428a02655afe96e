"""Sizes against the published table, FLOPs, config files, overrides and what is refused."""

import dataclasses
import math
from pathlib import Path

import pytest

from neox_jax.config import PRESETS, Config, ModelConfig, OptimizerConfig, TrainConfig, flatten, load_config
from neox_jax.errors import InputError

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
PUBLISHED = {
    "pythia-14m": (6, 128, 4, 50304, 14_067_712),
    "pythia-31m": (6, 256, 8, 50304, 30_494_720),
    "pythia-70m": (6, 512, 8, 50304, 70_426_624),
    "pythia-160m": (12, 768, 12, 50304, 162_322_944),
    "pythia-410m": (24, 1024, 16, 50304, 405_334_016),
    "pythia-1b": (16, 2048, 8, 50304, 1_011_781_632),
    "pythia-1.4b": (24, 2048, 16, 50304, 1_414_647_808),
    "pythia-2.8b": (32, 2560, 32, 50304, 2_775_208_960),
    "pythia-6.9b": (32, 4096, 32, 50432, 6_857_302_016),
    "pythia-12b": (36, 5120, 40, 50688, 11_846_072_320),
    "gpt-neox-20b": (44, 6144, 64, 50432, 20_554_567_680),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_preset_is_the_published_model(name):
    config = ModelConfig.preset(name)
    layers, hidden, heads, vocab, parameters = PUBLISHED[name]
    assert config.num_hidden_layers == layers
    assert (config.hidden_size, config.num_attention_heads, config.vocab_size) == (hidden, heads, vocab)
    assert config.num_parameters == parameters


def test_rotary_dims_of_20b():
    config = ModelConfig.preset("gpt-neox-20b")
    assert (config.head_dim, config.rotary_dim) == (96, 24)


@pytest.mark.parametrize("preset", ["tiny", "pythia-70m"])
def test_flops_count_each_matrix_product_once(preset):
    """Counted independently, product by product, with the causal half of the scores."""
    config, length = ModelConfig.preset(preset), 64
    d, f = config.hidden_size, config.intermediate_size
    products = 0
    for position in range(length):
        for _ in range(config.num_hidden_layers):
            products += 2 * d * 3 * d + 2 * d * d + 2 * d * f + 2 * f * d
            products += 2 * (2 * d * (position + 1))  # scores and weighted values, of the keys seen so far
        products += 2 * d * config.padded_vocab_size
    assert config.forward_flops_per_token(length) * length == products
    assert config.training_flops_per_token(length) == 3 * config.forward_flops_per_token(length)


def test_20b_training_flops_are_near_six_per_parameter():
    config = ModelConfig.preset("gpt-neox-20b")
    assert 6.0 < config.training_flops_per_token(2048) / config.num_parameters < 6.5


def test_hf_dict_round_trip_and_both_spellings():
    for config in PRESETS.values():
        hf = config.to_hf()
        assert dataclasses.replace(ModelConfig.from_hf(hf), init_method=config.init_method) == config
        old = {k: v for k, v in hf.items() if k != "rope_parameters"}
        new = {k: v for k, v in hf.items() if k not in ("rotary_pct", "rotary_emb_base")}
        assert ModelConfig.from_hf(old) == ModelConfig.from_hf(new) == ModelConfig.from_hf(hf)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"model_type": "gpt_neox_japanese"}, "only 'gpt_neox'"),
        ({"hidden_act": "swiglu"}, "hidden_act is 'swiglu'"),
        ({"num_key_value_heads": 1}, "grouped queries"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rotary scaling 'linear'"),
        ({"auto_map": {"AutoModel": "x.y"}}, "auto_map"),
        ({"hidden_size": 65}, "does not divide over 8 heads; try 72"),
        ({"rotary_pct": 0.4, "rope_parameters": None}, "rotates 3 of 8 dims"),
    ],
)
def test_what_is_no_gpt_neox_is_refused(change, message):
    with pytest.raises(InputError, match=message):
        ModelConfig.from_hf({**ModelConfig.preset("tiny").to_hf(), **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 10**12}, "hidden_size is 1000000000000; it must be at most 2147483647"),
        ({"num_hidden_layers": 10**4000}, r"num_hidden_layers is 10{79}; it"),
        ({"max_position_embeddings": True}, "max_position_embeddings is True; it must be a whole number"),
        ({"eos_token_id": [0, 2]}, r"eos_token_id is \[0, 2\]; it must be a whole number"),
        ({"attention_bias": "false"}, "attention_bias is 'false'; it must be true or false"),
        ({"use_parallel_residual": 1}, "use_parallel_residual is 1; it must be true or false"),
        ({"layer_norm_eps": "1e-5"}, "layer_norm_eps is '1e-5'; it must be a number"),
        ({"layer_norm_eps": math.nan}, "layer_norm_eps is nan; it must be at most"),
        ({"layer_norm_eps": -1e-5}, "must be above 0, the other not below"),
        ({"rope_parameters": {"rope_theta": 0}}, "rotary_emb_base is 0 "),
        ({"rope_parameters": {"partial_rotary_factor": math.inf}}, "rotary_pct is inf"),
        ({"rope_parameters": {"partial_rotary_factor": [0.25]}}, "rotary_pct is .0.25.; it must be a number"),
        ({"model_type": "x" * 10**6}, "model_type is 'x{79}; only"),
        ({"hidden_act": ["gelu"]}, "hidden_act is .'gelu'.; known"),
    ],
)
def test_values_that_no_model_has_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        ModelConfig.from_hf({**ModelConfig.preset("tiny").to_hf(), **change})


def test_fields_of_ours_are_not_read_from_a_hugging_face_config():
    hf = {**ModelConfig.preset("tiny").to_hf(), "vocab_multiple": 10**9, "init_method": "normal"}
    assert ModelConfig.from_hf(hf) == ModelConfig.preset("tiny")


def test_every_problem_is_named_at_once():
    with pytest.raises(InputError, match=r"model_type is 'x'.*hidden_act is 'y'"):
        ModelConfig.from_hf({"model_type": "x", "hidden_act": "y"})


@pytest.mark.parametrize("path", sorted(p for p in CONFIGS.glob("*.py") if p.stem != "pythia"), ids=lambda p: p.stem)
def test_config_files_are_valid_lab_notes(path):
    config = load_config(str(path))
    assert config.train.steps > config.optimizer.warmup_steps
    assert f"configs/{path.name}" in path.read_text()  # the command that runs it


def test_pythia_files_follow_the_table():
    rates = {"14m": 1e-3, "31m": 1e-3, "70m": 1e-3, "160m": 6e-4, "410m": 3e-4, "1b": 3e-4, "1_4b": 2e-4}
    rates |= {"2_8b": 1.6e-4, "6_9b": 1.2e-4, "12b": 1.2e-4}
    for size, rate in rates.items():
        config = load_config(str(CONFIGS / f"pythia_{size}.py"))
        assert config.optimizer.learning_rate == rate
        assert config.optimizer.min_learning_rate == pytest.approx(rate / 10)
        assert config.train.batch_size * config.train.seq_length == 2_097_152
        assert config.model == ModelConfig.preset(f"pythia-{size.replace('_', '.')}")
        assert (config.train.steps, config.optimizer.warmup_steps, config.optimizer.weight_decay) == (
            143_000,
            1430,
            0.1,
        )


def test_overrides_keep_types():
    overrides = [
        ("train.steps", "7"),
        ("optimizer.learning_rate", "1"),
        ("data.train", "a/b"),
        ("data.valid", "[('x', 0.5), ('y', 2)]"),
        ("checkpoint.steps", "(1, 2)"),
        ("log.batch_digest", "true"),
        ("model.num_hidden_layers", "2"),
    ]
    config = load_config(str(CONFIGS / "tiny.py"), overrides)
    assert config.train.steps == 7
    assert config.optimizer.learning_rate == 1.0
    assert config.data.train == "a/b"
    assert [tuple(pair) for pair in config.data.valid] == [("x", 0.5), ("y", 2)]
    assert config.checkpoint.steps == (1, 2)
    assert config.log.batch_digest is True
    assert config.model.num_hidden_layers == 2
    assert config.model.hidden_size == 64  # the rest of the preset stays


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("optimizer.lerning_rate", "1", "did you mean 'learning_rate'"),
        ("optimiser.eps", "1", "did you mean 'optimizer'"),
        ("train.steps", "many", "takes a int; got 'many'"),
        ("log.batch_digest", "maybe", "takes a bool"),
        ("train", "1", "is a section"),
        ("train.steps.x", "1", "no config field 'train.steps.x'"),
        ("train.dtype", "bfloat61", "did you mean 'bfloat16'"),
        ("train.remat", "ful", "did you mean 'full'"),
        ("model.preset", "pythia-70n", "did you mean 'pythia-70m'"),
        ("model.hidden_act", "gelu_fsat", "did you mean 'gelu_fast'"),
        ("optimizer.schedule", "cosin", "did you mean 'cosine'"),
        ("data.order", "random", "choose from shuffled"),
        ("train.microbatches", "3", "does not divide into train.microbatches 3; try a batch_size of 9"),
        ("train.seq_length", "65", "longer than the model's context"),
        ("train.steps", "0", "above 0"),
    ],
)
def test_bad_fields_are_named(name, value, message):
    with pytest.raises(InputError, match=message):
        load_config(str(CONFIGS / "tiny.py"), [(name, value)])


def test_a_typo_in_a_file_names_the_nearest(tmp_path):
    path = tmp_path / "typo.py"
    path.write_text((CONFIGS / "tiny.py").read_text().replace("warmup_steps", "warm_up_steps"))
    with pytest.raises(InputError, match=r'Did you mean "warmup_steps"'):
        load_config(str(path))


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(InputError, match="no config file"):
        load_config(str(tmp_path / "none.py"))
    (tmp_path / "empty.py").write_text("x = 1\n")
    with pytest.raises(InputError, match="get_config"):
        load_config(str(tmp_path / "empty.py"))
    (tmp_path / "broken.py").write_text("def get_config(:\n")
    with pytest.raises(InputError, match="syntax"):
        load_config(str(tmp_path / "broken.py"))


def test_every_field_is_read_by_something():
    """A field that nothing reads is a promise that nothing keeps."""
    sources = [p.read_text() for p in (CONFIGS.parent / "neox_jax").rglob("*.py") if p.name != "config.py"]
    config = (CONFIGS.parent / "neox_jax" / "config.py").read_text()
    for section in dataclasses.fields(Config):
        if section.name in ("init_from", "mesh"):
            continue
        for field in dataclasses.fields(section.type):
            read = any(f".{field.name}" in text for text in sources) or f"self.{field.name}" in config
            assert read, f"{section.name}.{field.name} is never read"


def test_defaults_are_checked_too():
    assert TrainConfig().batch_size % TrainConfig().microbatches == 0
    assert OptimizerConfig().schedule == "cosine_floor"


def test_flatten():
    assert flatten({"a": {"b": 1, "c": (2,)}, "d": None}, "x.") == {"x.a.b": 1, "x.a.c": (2,), "x.d": None}
