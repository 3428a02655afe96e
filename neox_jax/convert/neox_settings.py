"""NeoX's settings, the YAML files that it saves beside the weights, to a ModelConfig and back.

The weights say sizes only. Heads, rotary embedding, residual and activation stand in the settings, with NeoX's own
defaults for what those leave out; nothing is guessed.
Source: EleutherAI/gpt-neox, megatron/{neox_arguments/neox_args,model/activations}.py.
"""

import contextlib
import functools
import json
import math
from pathlib import Path

import yaml

from neox_jax.config import TANH_GELUS, ModelConfig
from neox_jax.convert.files import one_line, read_json
from neox_jax.convert.neox_files import STEP_FOLDER, NeoxFiles
from neox_jax.convert.neox_ranks import VOCAB_MULTIPLE
from neox_jax.errors import InputError

CONFIGS, EXTRAS = "configs", "neox_jax.json"
MAX_CONFIG_BYTES, MAX_DIGITS = 1 << 17, 100

# Settings that a plain GPT-NeoX has: (NeoX's default, the values that are one).
_REQUIRED = {
    "pos_emb": ("learned", ("rotary",)),
    "norm": ("layernorm", ("layernorm",)),
    "activation": ("gelu", ("gelu",)),
    "geglu": (False, (False,)),
    "gpt_j_tied": (False, (False,)),
    "use_qk_layernorm": (False, (False,)),
    "use_bias_in_norms": (True, (True,)),
    "use_bias_in_mlp": (True, (True,)),
    "use_mup": (False, (False,)),
    "moe_num_experts": (1, (0, 1)),
    "sliding_window_width": (None, (None,)),
    "num_unique_layers": (None, (None,)),
    "te_columnparallel": (False, (False,)),
    "te_rowparallel": (False, (False,)),
    "te_layernorm_mlp": (False, (False,)),
    "te_mha": (False, (False,)),
}
_FULL_ATTENTION = {"global", "flash"}
# PyYAML lets Python's own errors through where a tag does not fit what it is on (!!bool maybe: KeyError).
_ODD_ERRORS = (TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)
_KINDS = {bool: "true or false", int: "a whole number", float: "a number"}


class _StrictLoader(yaml.SafeLoader):
    """Plain YAML, with every key said once, and nothing in it that takes longer than its size says."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):  # a file of nine lines can have a thousand million values
            raise yaml.YAMLError("it has an alias (*name); write out what that stands for")
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str | bool | None) and not (isinstance(key, int) and abs(key) < 1 << 31):
                raise yaml.YAMLError(f"a key is {key!r:.80}; wanted a name")  # hashes of others can be made to collide
            if key in seen:
                raise yaml.YAMLError(f"key {key!r:.80} is there twice")
            seen.add(key)
        return super().construct_mapping(node, deep=deep)

    def construct_number(self, node):
        if len(node.value) > MAX_DIGITS:  # 1:30:59 is in base sixty, which takes time by the square of its length
            raise yaml.YAMLError(f"a number has {len(node.value)} digits")
        make = super().construct_yaml_int if node.tag.endswith(":int") else super().construct_yaml_float
        return make(node)


for _kind in ("int", "float"):
    _StrictLoader.add_constructor(f"tag:yaml.org,2002:{_kind}", _StrictLoader.construct_number)


def find_settings(folder: Path) -> list[Path]:
    """The YAML files in configs/, or beside the weights; empty where there are none."""
    places = [folder / CONFIGS, folder]
    if STEP_FOLDER.fullmatch(folder.name):
        places += [folder.parent / CONFIGS, folder.parent]
    for place in places:
        paths = [*place.glob("*.yml"), *place.glob("*.yaml"), *place.glob("neox_config.json")]
        if place.name == CONFIGS:
            paths = [*paths, *(path for path in place.glob("*.json") if path.name not in (EXTRAS, "neox_config.json"))]
        paths = [path for path in paths if path.is_file()]  # a pipe would block, a device never ends
        if paths:
            return sorted(paths)
    return []


def read_settings(folder: Path, problems: list[str]) -> dict | None:
    """NeoX's settings from those files; None, reported, where there are none."""
    paths = find_settings(folder)
    if paths:
        return _join_settings(paths, problems)
    problems.append(
        f"no configuration: put the run's config.yml into {folder / CONFIGS} (num_attention_heads, pos_emb, "
        "rotary_pct, gpt_j_residual, no_weight_tying, bias_gelu_fusion ...); the weights do not say these"
    )
    return None


def _join_settings(paths: list[Path], problems: list[str]) -> dict:
    """All files' settings under names with underscores; a setting may stand in two files if it says the same."""
    settings, origin = {}, {}
    for path in paths:
        try:
            if path.stat().st_size > MAX_CONFIG_BYTES:
                raise yaml.YAMLError(f"it is larger than {MAX_CONFIG_BYTES} bytes")
            values = yaml.load(path.read_text(encoding="utf-8"), _StrictLoader)  # a SafeLoader
        except (OSError, ValueError, yaml.YAMLError, *_ODD_ERRORS) as error:
            problems.append(f"{path.name} cannot be read as YAML: {one_line(error)}")
            continue
        if not isinstance(values, dict):
            problems.append(f"{path.name} holds a {type(values).__name__}; wanted NeoX's settings by name")
            continue
        for key, value in values.items():
            name = str(key).replace("-", "_")
            if name in settings and settings[name] != value:
                problems.append(
                    f"{name:.80} is {settings[name]!r:.80} in {origin[name]}, but {value!r:.80} in {path.name}"
                )
            settings[name], origin[name] = value, path.name
    return settings


EXTRA_KEYS = ("vocab_size", "hidden_act", "bos_token_id", "eos_token_id", "init_method")


def read_extras(folder: Path, problems: list[str]) -> dict:
    """What `save_neox` keeps of a model that NeoX has no setting for."""
    path = folder / CONFIGS / EXTRAS
    if not path.is_file():
        return {}
    try:
        extras = read_json(path)
    except InputError as error:
        problems.append(str(error))
        return {}
    like = {key: getattr(ModelConfig, key) for key in EXTRA_KEYS}
    if not isinstance(extras, dict) or any(type(extras[key]) is not type(like.get(key, ())) for key in extras):
        problems.append(f"{path.name} is not as it was written; wanted an object of {', '.join(EXTRA_KEYS)}")
        return {}
    return extras


def derive_config(files: NeoxFiles, settings: dict | None, extras: dict, problems: list[str]) -> ModelConfig | None:
    """The model's configuration, from the shapes, NeoX's settings and ours; None, reported, where that fails."""
    if settings is None:
        return None
    before = len(problems)
    get = functools.partial(_setting, settings, problems)
    _check_settings(settings, get, problems)
    num_ranks, asked = len(files.ranks), get("model_parallel_size", int, None)
    if asked is not None and max(asked, 1) != num_ranks:
        problems.append(
            f"model_parallel_size is {asked} in the configuration, but the files are of {num_ranks} ranks; download "
            "all files of one checkpoint, or correct the configuration"
        )
    table, hidden = files.shape(0, "word_embeddings.weight"), files.shape(2, "mlp.dense_h_to_4h.weight")
    for what, shape in (("layer 0's word_embeddings.weight", table), ("layer 2's mlp.dense_h_to_4h.weight", hidden)):
        if shape is None or len(shape) != 2:
            problems.append(f"{what} is {'missing' if shape is None else list(shape)}; wanted a matrix")
    heads = get("num_attention_heads", int, None)
    if heads is None:
        problems.append("the configuration does not say num_attention_heads, nor do the weights; add it")
    elif heads <= 0 or heads % num_ranks:
        problems.append(f"num_attention_heads {heads} does not divide over the {num_ranks} ranks of the files")
    length = get("max_position_embeddings", int, get("seq_length", int, None))
    if length is None:
        problems.append("the configuration says neither max_position_embeddings nor seq_length; add one")
    if files.num_layers is None:
        problems.append("neither a final norm nor a transformer layer's input_layernorm is there; download all files")
    if len(problems) > before:
        return None

    tanh = get("bias_gelu_fusion", bool, False) or get("openai_gelu", bool, False)
    values = {
        "vocab_size": table[0] * num_ranks,
        "hidden_size": table[1],
        "num_hidden_layers": files.num_layers,
        "num_attention_heads": heads,
        "intermediate_size": hidden[0] * num_ranks,
        # NeoX's fused GELU is the tanh form; its unfused one is exact.
        "hidden_act": "gelu_fast" if tanh else "gelu",
        "rotary_pct": get("rotary_pct", float, 1.0),
        "rotary_emb_base": get("rotary_emb_base", float, 10000.0),
        "max_position_embeddings": length,
        "use_parallel_residual": get("gpt_j_residual", bool, False),
        "layer_norm_eps": get("layernorm_epsilon", float, 1e-5),
        "tie_word_embeddings": not get("no_weight_tying", bool, False),
        "attention_bias": get("use_bias_in_attn_linear", bool, True),
    }
    if "hidden_act" in extras and (extras["hidden_act"] in TANH_GELUS) != tanh:
        problems.append(f"{EXTRAS} says hidden_act {extras['hidden_act']!r}, but bias_gelu_fusion is {tanh}")
    rows = values["vocab_size"]
    if extras.get("vocab_size", rows) > rows:
        problems.append(f"{EXTRAS} says vocab_size {extras['vocab_size']}, but the tables have {rows} rows")
    for key, field in (("num_layers", "num_hidden_layers"), ("hidden_size",) * 2, ("intermediate_size",) * 2):
        if get(key, int, values[field]) != values[field]:
            problems.append(f"{key} is {settings[key]} in the configuration, but {values[field]} by the weights")
    if len(problems) > before:
        return None
    try:
        return ModelConfig(**{**values, **extras})
    except InputError as error:
        problems.append(str(error))
    return None


def _check_settings(settings: dict, get, problems: list[str]) -> None:
    """Reports every setting that makes it another kind of model."""
    for key, (default, allowed) in _REQUIRED.items():
        value = settings.get(key)
        value = default if value is None else value
        if value not in allowed:
            told = f"{value!r:.80}" if key in settings else f"not said, and {value!r} by NeoX's default"
            problems.append(f"{key} is {told}; only {allowed[-1]!r} is supported")
    heads, groups = get("num_attention_heads", int, None), get("num_kv_heads", int, None)
    if groups is not None and groups != heads:
        problems.append(f"num_kv_heads is {groups}, but there are {heads} heads: grouped queries are not supported")
    others = sorted(_attention_types(settings.get("attention_config")) - _FULL_ATTENTION)
    if others:
        problems.append(f"attention_config has {', '.join(others)}; only full attention (global, flash) is supported")


def _attention_types(value) -> set[str]:
    """The names in NeoX's nested lists, [[["global", "local"], 6]]; the numbers say how often."""
    if isinstance(value, list):
        return set().union(*map(_attention_types, value))
    return set() if value is None or isinstance(value, int) else {f"{value!s:.80}"}


def _setting(settings: dict, problems: list[str], key: str, kind: type, default):
    """A setting as a bool, int or float; the default where it is not there or null. Reports another type."""
    value = settings.get(key)
    if value is None:
        return default
    if kind is float and not isinstance(value, bool):  # YAML 1.1 takes 1e-5, without a dot, for a string
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            if math.isfinite(float(value)):
                return float(value)
    elif isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    problem = f"{key} is {value!r:.80} in the configuration; wanted {_KINDS[kind]}"
    if problem not in problems:
        problems.append(problem)
    return default


# ---- back


def to_settings(config: ModelConfig, num_ranks: int) -> dict:
    """The model in NeoX's settings."""
    base = config.rotary_emb_base
    small = config.init_method == "small_init"
    settings = {
        "pipe_parallel_size": 1,
        "model_parallel_size": num_ranks,
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "seq_length": config.max_position_embeddings,
        "max_position_embeddings": config.max_position_embeddings,
        "norm": "layernorm",
        "layernorm_epsilon": float(config.layer_norm_eps),
        "pos_emb": "rotary",
        "rotary_pct": float(config.rotary_pct),
        "rotary_emb_base": int(base) if base == int(base) else base,
        "no_weight_tying": not config.tie_word_embeddings,
        "gpt_j_residual": config.use_parallel_residual,
        "output_layer_parallelism": "column",
        "activation": "gelu",
        "bias_gelu_fusion": config.hidden_act in TANH_GELUS,
        "make_vocab_size_divisible_by": VOCAB_MULTIPLE,
        "init_method": "small_init" if small else "normal",
        "output_layer_init_method": "wang_init" if small else "scaled_normal",
    }
    # NeoX 1.0, which 20B and Pythia were trained with, has not these, and stops at a name that it does not know.
    if config.intermediate_size != 4 * config.hidden_size:
        settings["intermediate_size"] = config.intermediate_size
    if not config.attention_bias:
        settings["use_bias_in_attn_linear"] = False
    return settings


def to_yaml(settings: dict) -> str:
    """As NeoX's own files are: JSON, which is YAML, but for numbers like 1e-05, which YAML 1.1 takes for strings."""
    lines = []
    for key, value in settings.items():
        text = json.dumps(value)
        if isinstance(value, float) and "e" in text and "." not in text:
            text = text.replace("e", ".0e")
        lines.append(f"  {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"
