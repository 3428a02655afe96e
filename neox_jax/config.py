"""What a model and a run are: frozen dataclasses inside, `ml_collections` files at the edge.

`ModelConfig` uses Hugging Face's field names, so that a `config.json` reads as it stands. `Config` is a whole run;
`default_config()` is the same thing as a locked ConfigDict, which files in `configs/` start from.
"""

import ast
import dataclasses
import difflib
import math
import re
import runpy
import sys
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from neox_jax.errors import InputError

TANH_GELUS = ("gelu_fast", "gelu_new", "gelu_pytorch_tanh")  # one formula under three of Hugging Face's names
ACTIVATIONS = ("gelu", *TANH_GELUS)
DTYPES = ("float32", "bfloat16", "float16")
REMAT_POLICIES = ("none", "full", "dots", "save_attention")
ATTENTION_BACKENDS = ("auto", "xla", "cudnn", "splash")
SCHEDULES = ("cosine_floor", "cosine", "linear", "constant")
ORDERS = ("shuffled", "megatron", "sequential")
LORA_TARGETS = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
QUANTIZATIONS = ("int8",)
SCORING_AXES = ("data", "fsdp", "model")  # of a mesh that a model is evaluated on


def parse_scoring_mesh(text: str) -> dict[str, int]:
    """The sizes of a mesh, from "data=2,model=4", or with colons for commas. Raises: InputError."""
    sizes = dict(part.split("=", 1) if "=" in part else (part, "") for part in re.split("[,:]", text))
    if not all(name in SCORING_AXES and size.removeprefix("-").isdecimal() for name, size in sizes.items()):
        raise InputError(f"{text!r} is no mesh of {', '.join(SCORING_AXES)}; write data=2,model=4")
    return {name: int(size) for name, size in sizes.items()}


def nearest(name: str, choices) -> str:
    """Ends an error message: '; did you mean X?' where something is near, else the choices."""
    found = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.5)
    return f"; did you mean {found[0]!r}?" if found else f"; choose from {', '.join(choices)}"


def check_choice(field: str, value: str, choices) -> None:
    if value not in choices:
        raise InputError(f"{field} is {value!r}, which is not known{nearest(str(value), choices)}")


def check_positive(section: str, config: Any, *fields: str) -> None:
    for field in fields:
        value = getattr(config, field)
        if not (isinstance(value, int) and not isinstance(value, bool) and value > 0):
            raise InputError(f"{section}.{field} is {value!r}; it must be a whole number above 0")


MAX_NUMBER = 2**31 - 1  # what an index of a dim can be
_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a name"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A GPT-NeoX model, in the field names of Hugging Face's GPTNeoXConfig.

    vocab_size counts the rows that take part in the softmax (a tokenizer may use fewer). vocab_multiple rounds the
    stored rows up further, so that they divide over a mesh; those extra rows never take part in anything.
    init_method: small_init (with wang_init for output projections; 20B and most Pythias) or normal (N(0, 0.02), output
    projections over sqrt(2 L); Pythia 6.9b and 12b).
    Raises: InputError for values that are no GPT-NeoX.
    """

    vocab_size: int = 50432
    hidden_size: int = 6144
    num_hidden_layers: int = 44
    num_attention_heads: int = 64
    intermediate_size: int = 24576
    hidden_act: str = "gelu"
    rotary_pct: float = 0.25
    rotary_emb_base: float = 10000.0
    max_position_embeddings: int = 2048
    use_parallel_residual: bool = True
    layer_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    attention_bias: bool = True
    bos_token_id: int = 0
    eos_token_id: int = 0
    init_method: str = "small_init"
    vocab_multiple: int = 1

    _OURS: ClassVar = ("init_method", "vocab_multiple")  # Hugging Face's config has none of them

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if type(value) not in ((int, float) if field.type is float else (field.type,)):
                raise InputError(f"model.{field.name} is {value!r:.80}; it must be {_KINDS[field.type]}")
            if field.type in (int, float) and not abs(value) <= MAX_NUMBER:  # nor is NaN
                raise InputError(f"model.{field.name} is {value!r:.80}; it must be at most {MAX_NUMBER}")
        check_positive("model", self, "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
        check_positive("model", self, "intermediate_size", "max_position_embeddings", "vocab_multiple")
        if not (self.rotary_emb_base > 0 and self.layer_norm_eps >= 0):
            raise InputError(
                f"model.rotary_emb_base is {self.rotary_emb_base} and layer_norm_eps {self.layer_norm_eps}; "
                "the one must be above 0, the other not below"
            )
        check_choice("model.hidden_act", self.hidden_act, ACTIVATIONS)
        check_choice("model.init_method", self.init_method, ("small_init", "normal"))
        if self.hidden_size % self.num_attention_heads:
            raise InputError(
                f"model.hidden_size {self.hidden_size} does not divide over {self.num_attention_heads} heads; "
                f"try {self.num_attention_heads * math.ceil(self.hidden_size / self.num_attention_heads)}"
            )
        if not 0 <= self.rotary_pct <= 1 or self.rotary_dim % 2:
            raise InputError(
                f"model.rotary_pct {self.rotary_pct} rotates {self.rotary_dim} of {self.head_dim} dims a head; "
                "it must be between 0 and 1 and give an even number"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def rotary_dim(self) -> int:
        return int(self.head_dim * self.rotary_pct)

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding and of the head as stored: vocab_size rounded up to vocab_multiple."""
        return math.ceil(self.vocab_size / self.vocab_multiple) * self.vocab_multiple

    @property
    def num_parameters(self) -> int:
        """All parameters, embeddings included; with vocab_multiple 1, the published counts."""
        d, f, v = self.hidden_size, self.intermediate_size, self.padded_vocab_size
        attention = 4 * d * d + (4 * d if self.attention_bias else 0)
        layer = attention + 2 * d * f + f + d + 4 * d
        embeddings = (1 if self.tie_word_embeddings else 2) * v * d
        return embeddings + self.num_hidden_layers * layer + 2 * d

    def forward_flops_per_token(self, seq_length: int) -> int:
        """FLOPs of one forward pass per token at this sequence length.

        Matrix products only (2 FLOPs a multiply-add), the head included. Causal attention is counted once: a token
        sees (seq_length + 1) / 2 keys on average, half of what an uncausal count would say.
        """
        d, f = self.hidden_size, self.intermediate_size
        layer = 2 * (4 * d * d + 2 * d * f) + self._attention_flops_per_token(seq_length)
        return self.num_hidden_layers * layer + 2 * d * self.padded_vocab_size

    def _attention_flops_per_token(self, seq_length: int) -> int:
        """Of a layer's products without weights."""
        return 2 * 2 * self.hidden_size * (seq_length + 1) // 2

    def training_flops_per_token(self, seq_length: int, *, adapters: bool = False) -> int:
        """Three forward passes: the model's own FLOPs, recomputation (remat) not counted.

        adapters: only those are trained, so that weights have no gradients; their own FLOPs are not counted.
        """
        forward = self.forward_flops_per_token(seq_length)
        if adapters:
            return 2 * forward + self.num_hidden_layers * self._attention_flops_per_token(seq_length)
        return 3 * forward

    @classmethod
    def preset(cls, name: str) -> "ModelConfig":
        """A named size: every Pythia, gpt-neox-20b, tiny, quickstart. Raises: InputError naming the nearest."""
        check_choice("model.preset", name, PRESETS)
        return PRESETS[name]

    @classmethod
    def from_hf(cls, hf: dict) -> "ModelConfig":
        """Reads the dict of a Hugging Face config.json, in the old or the new (rope_parameters) spelling.

        Raises: InputError listing everything about it that is no GPT-NeoX.
        """
        problems = []
        if hf.get("model_type") != "gpt_neox":
            problems.append(f"model_type is {hf.get('model_type')!r:.80}; only 'gpt_neox' is read here")
        if hf.get("hidden_act", "gelu") not in ACTIVATIONS:
            problems.append(f"hidden_act is {hf['hidden_act']!r:.80}; known are {', '.join(ACTIVATIONS)}")
        problems += [
            f"{key} is set: this is not a plain GPT-NeoX" for key in ("auto_map", "quantization_config") if hf.get(key)
        ]
        rope = hf.get("rope_parameters") or {}
        for spelling in (rope, hf.get("rope_scaling") or {}):
            rope_type = spelling.get("rope_type") or spelling.get("type") or "default"
            if rope_type != "default":
                problems.append(f"rotary scaling {rope_type!r:.80} is not supported; only plain rotary embedding is")
        heads = hf.get("num_attention_heads", cls.num_attention_heads)
        if hf.get("num_key_value_heads", heads) != heads:
            problems.append("num_key_value_heads differs from num_attention_heads: grouped queries are not GPT-NeoX")
        if problems:
            raise InputError("config.json: " + "; ".join(problems))
        names = [field.name for field in dataclasses.fields(cls) if field.name not in cls._OURS]
        values = {name: hf[name] for name in names if hf.get(name) is not None}
        values.setdefault("eos_token_id", 2)  # transformers' own default for a config.json that leaves it out
        if "partial_rotary_factor" in rope:
            values["rotary_pct"] = rope["partial_rotary_factor"]
        if "rope_theta" in rope:
            values["rotary_emb_base"] = rope["rope_theta"]
        return cls(**values)

    def to_hf(self) -> dict:
        """The dict of a config.json that transformers 4 and 5 both read (both spellings of the rotary fields)."""
        values = {k: v for k, v in dataclasses.asdict(self).items() if k not in self._OURS}
        return {
            "architectures": ["GPTNeoXForCausalLM"],
            "model_type": "gpt_neox",
            **values,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": self.rotary_emb_base,
                "partial_rotary_factor": self.rotary_pct,
            },
        }


def _pythia(layers: int, hidden: int, heads: int, vocab: int = 50304, **fields) -> ModelConfig:
    return ModelConfig(
        num_hidden_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
        vocab_size=vocab,
        **fields,
    )


# hidden_act follows the published config.json files, not what the models were trained with (Pythia: the tanh form).
PRESETS = {
    "pythia-14m": _pythia(6, 128, 4),
    "pythia-31m": _pythia(6, 256, 8),
    "pythia-70m": _pythia(6, 512, 8),
    "pythia-160m": _pythia(12, 768, 12),
    "pythia-410m": _pythia(24, 1024, 16),
    "pythia-1b": _pythia(16, 2048, 8),
    "pythia-1.4b": _pythia(24, 2048, 16),
    "pythia-2.8b": _pythia(32, 2560, 32),
    "pythia-6.9b": _pythia(32, 4096, 32, 50432, init_method="normal"),
    "pythia-12b": _pythia(36, 5120, 40, 50688, init_method="normal"),
    "gpt-neox-20b": _pythia(44, 6144, 64, 50432, hidden_act="gelu_fast"),
    "tiny": _pythia(4, 64, 8, 512, hidden_act="gelu_fast", max_position_embeddings=64),
    "quickstart": _pythia(4, 192, 3, 4096, hidden_act="gelu_fast", max_position_embeddings=256),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Sizes of the mesh axes; at most one may be -1, which takes the devices that are left."""

    data: int = -1
    fsdp: int = 1
    pipe: int = 1
    seq: int = 1
    model: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """batch_size: sequences a step over all hosts. microbatches: the step is divided into so many; with mesh.pipe above
    1 they fill the pipeline, else their gradients are summed in float32. dtype: of the computation; master weights are
    float32, and float16 has NeoX's dynamic loss scale. remat: what of a layer is kept for the backward pass: all
    (none), nothing (full), what products and attention give (dots), or attention's output (save_attention). attention:
    which implementation; auto is splash on TPU, cudnn on GPU in 16 bits, else xla. compiler_options: a preset of
    `neox_jax.compiler_options`, auto by the TPU's kind. seed initialises the parameters.

    eod_mask_loss: what is predicted from an end of document does not count. document_masks: attention stays within a
    document. loss_rows: the loss is the mean over all counted targets of the batch (0), or, of each so many consecutive
    rows, the mean of their own means: gpt-neox's, with its train_micro_batch_size_per_gpu.
    """

    steps: int = 1000
    batch_size: int = 32
    seq_length: int = 2048
    microbatches: int = 1
    seed: int = 1234
    dtype: str = "float32"
    remat: str = "none"
    attention: str = "auto"
    compiler_options: str = "auto"
    eod_mask_loss: bool = False
    document_masks: bool = False
    loss_rows: int = 0

    def __post_init__(self):
        check_positive("train", self, "steps", "batch_size", "seq_length", "microbatches")
        check_choice("train.dtype", self.dtype, DTYPES)
        check_choice("train.remat", self.remat, REMAT_POLICIES)
        check_choice("train.attention", self.attention, ATTENTION_BACKENDS)
        if self.batch_size % self.microbatches:
            raise InputError(
                f"train.batch_size {self.batch_size} does not divide into train.microbatches {self.microbatches}; "
                f"try a batch_size of {math.ceil(self.batch_size / self.microbatches) * self.microbatches}"
            )
        if self.loss_rows and (self.loss_rows < 0 or self.batch_size % self.loss_rows):
            raise InputError(
                f"train.loss_rows is {self.loss_rows}; wanted 0 (all rows together) or a divisor of train.batch_size "
                f"{self.batch_size}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with a global-norm clip; schedules are described in `neox_jax.optimizer`."""

    learning_rate: float = 1e-3
    min_learning_rate: float = 1e-4
    warmup_steps: int = 10
    schedule: str = "cosine_floor"
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0

    def __post_init__(self):
        check_choice("optimizer.schedule", self.schedule, SCHEDULES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters, trained instead of the weights, which stay; rank 0: none.

    A target's product x W becomes x W + alpha / rank x A B (rslora: alpha / sqrt(rank)): A has `rank` columns, and B,
    zeros at first, so many rows. targets: any of query_key_value, dense (attention's), dense_h_to_4h, dense_4h_to_h.
    dropout: of what goes into A, while training. quantize: int8 holds the weights that stay in 8 bits (QLoRA); else
    they are in train.dtype.
    """

    rank: int = 0
    alpha: float = 16.0
    targets: tuple[str, ...] = ("query_key_value",)
    dropout: float = 0.0
    rslora: bool = False
    quantize: str = ""

    def __post_init__(self):
        if not (isinstance(self.rank, int) and not isinstance(self.rank, bool) and 0 <= self.rank <= MAX_NUMBER):
            raise InputError(f"lora.rank is {self.rank!r}; it must be 0 (no adapters) or a whole number above")
        if not (isinstance(self.alpha, (int, float)) and 0 < self.alpha <= MAX_NUMBER):
            raise InputError(f"lora.alpha is {self.alpha!r}; it must be a number above 0")
        if not (isinstance(self.dropout, (int, float)) and 0 <= self.dropout < 1):
            raise InputError(f"lora.dropout is {self.dropout!r}; it must be a share, from 0 to below 1")
        if not self.targets or len(set(self.targets)) != len(self.targets):
            raise InputError(f"lora.targets is {self.targets!r}; wanted some of {', '.join(LORA_TARGETS)}, each once")
        for target in self.targets:
            check_choice("lora.targets", target, LORA_TARGETS)
        check_choice("lora.quantize", self.quantize, ("", *QUANTIZATIONS))

    @property
    def scale(self) -> float:
        """What the product with both factors is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """train, valid: a prefix of .bin/.idx files, or a list of prefixes or of (prefix, weight) pairs; or one or several
    .jsonl files of conversations. valid may also be several such sets by name, {"code": ..., "prose": ...}.

    split: "969, 30, 1" cuts `train` into train, valid and test documents where valid is empty. order: shuffled,
    megatron (gpt-neox's own) or sequential (pre-shuffled files, as Pythia's). seed orders the data. num_samples: of
    order=megatron; 0 means train.steps x train.batch_size. tokenizer: the tokenizer.json that made the files.
    eod_token: the id that ends a document; -1 means the tokenizer's. chat_template: of conversations, a file or its
    text (`neox_jax.data.chat`).
    """

    train: Any = ""
    valid: Any = ""
    split: str = ""
    order: str = "shuffled"
    seed: int = 1234
    num_samples: int = 0
    tokenizer: str = ""
    eod_token: int = -1
    chat_template: str = ""

    def __post_init__(self):
        check_choice("data.order", self.order, ORDERS)
        if not (isinstance(self.eod_token, int) and self.eod_token >= -1):
            raise InputError(f"data.eod_token is {self.eod_token!r}; wanted the id of a token, or -1 (the tokenizer's)")
        for name, source in self.valid.items() if isinstance(self.valid, dict) else ():
            if not re.fullmatch(r"[A-Za-z0-9_-]+", str(name)) or not source:
                raise InputError(
                    f"data.valid has {name!r}: {source!r}; wanted a name of letters, digits, _ and -, and what it is of"
                )

    @property
    def valid_sets(self) -> dict[str, Any]:
        """The sources of `valid` by name; one without names has the name ""."""
        return dict(self.valid) if isinstance(self.valid, dict) else {"": self.valid}


def is_conversations(source: Any) -> bool:
    """Whether a source of data is .jsonl files of conversations, and not tokens. Raises: InputError for a mixture."""
    entries = [source] if isinstance(source, str) else list(source)
    names = [entry[0] if isinstance(entry, (tuple, list)) and entry else entry for entry in entries]
    found = [str(name).endswith(".jsonl") for name in names]
    if any(found) and not (all(found) and names == entries):
        raise InputError(
            f"data has {source!r}; .jsonl files of conversations are named alone: without weights or token files beside"
        )
    return any(found)


class Masks(NamedTuple):
    """What the marks of a batch (`neox_jax.marks`) are read for.

    targets: some do not count. documents: attention stays within them.
    """

    targets: bool
    documents: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Saves at every `every`-th step (0: never), at the listed steps, and at the last. keep: the newest so many stay,
    besides those at multiples of keep_every (0: none besides) and the listed ones."""

    every: int = 1000
    steps: tuple[int, ...] = ()
    keep: int = 3
    keep_every: int = 0

    def __post_init__(self):
        check_positive("checkpoint", self, "keep")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Held-out loss every `every` steps (0: only at the end) over `batches` batches of each set; prompt: what the
    sample of text at the end goes on from, sample_tokens long (0: no sample). tasks: of lm-evaluation-harness, scored
    every tasks_every steps (0: only at the end), tasks_limit questions of each (0: all); tasks_path: a folder of
    more."""

    every: int = 0
    batches: int = 10
    prompt: str = ""
    sample_tokens: int = 128
    tasks: tuple[str, ...] = ()
    tasks_every: int = 0
    tasks_limit: int = 0
    tasks_path: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogConfig:
    """A line of metrics every `every` steps; batch_digest adds the SHA-256 of each logged global batch."""

    every: int = 10
    batch_digest: bool = False

    def __post_init__(self):
        check_positive("log", self, "every")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SafetyConfig:
    """What a run bears before it stops; 0 means never.

    skip_grad_norm: an update whose gradient norm, before clipping, is above it is skipped, as one that is not finite
    always is. max_skipped: so many skipped in a row end the run. step_seconds: a step that takes longer ends it, to be
    started again; so does a batch of an evaluation, the first with its compilation, or the start of a save.
    compare_replicas: every so many steps copies that should be equal are compared. slow_hosts: every so many steps the
    hosts' times are compared.
    """

    skip_grad_norm: float = 0.0
    max_skipped: int = 20
    step_seconds: int = 1800
    compare_replicas: int = 1000
    slow_hosts: int = 50

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not (isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0):
                raise InputError(f"safety.{field.name} is {value!r}; it must be 0 (never) or above")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run. init_from: a SOURCE whose weights and model fields replace `model` (its optimizer starts afresh)."""

    model: ModelConfig
    init_from: str = ""
    mesh: MeshConfig = MeshConfig()
    train: TrainConfig = TrainConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    lora: LoraConfig = LoraConfig()
    data: DataConfig = DataConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    log: LogConfig = LogConfig()
    safety: SafetyConfig = SafetyConfig()

    def __post_init__(self):
        if not self.init_from:  # else the model is known only when the source has been read
            self.check_seq_length()
        if self.lora.rank and not self.init_from:
            raise InputError("lora.rank is set without init_from; name the model that the adapters are for")
        if self.lora.quantize and not self.lora.rank:
            raise InputError("lora.quantize is set without lora.rank; weights in 8 bits are not trained")

    @property
    def adapters(self) -> LoraConfig | None:
        """Of the adapters that are trained, if any are."""
        return self.lora if self.lora.rank else None

    @property
    def flops_per_token(self) -> int:
        """Of a training step, recomputation not counted."""
        return self.model.training_flops_per_token(self.train.seq_length, adapters=self.adapters is not None)

    def masks(self, source: Any) -> Masks:
        """Of batches from this source of data."""
        conversations = is_conversations(source)
        return Masks(self.train.eod_mask_loss or conversations, self.train.document_masks or conversations)

    def check_seq_length(self) -> None:
        if self.train.seq_length > self.model.max_position_embeddings:
            raise InputError(
                f"train.seq_length {self.train.seq_length} is longer than the model's context, "
                f"max_position_embeddings {self.model.max_position_embeddings}; lower the one or raise the other"
            )


def flatten(values: dict, prefix: str = "") -> dict:
    """Nested dicts as one: "train.steps" to its value. prefix: before each name, as "config."."""
    flat = {}
    for name, value in values.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


SECTIONS = {
    "mesh": MeshConfig,
    "train": TrainConfig,
    "optimizer": OptimizerConfig,
    "lora": LoraConfig,
    "data": DataConfig,
    "checkpoint": CheckpointConfig,
    "eval": EvalConfig,
    "log": LogConfig,
    "safety": SafetyConfig,
}


def default_config():
    """The default run as a locked ml_collections.ConfigDict, for files in `configs/` to start from.

    `config.model` has `preset` and every ModelConfig field, unset; a field that is set overrides the preset's.
    """
    import ml_collections

    config = ml_collections.ConfigDict()
    config.model = ml_collections.ConfigDict({"preset": ""})
    for field in dataclasses.fields(ModelConfig):
        config.model[field.name] = ml_collections.config_dict.placeholder(field.type)
    config.init_from = ""
    for name, section in SECTIONS.items():
        config[name] = ml_collections.ConfigDict(dataclasses.asdict(section()))
    for key in ("train", "valid"):  # a string or a list
        config.data[key] = ml_collections.config_dict.placeholder(object)
        config.data[key] = ""
    return config.lock()


def freeze_config(config) -> Config:
    """Turns a ConfigDict, or the same as plain dicts, into a checked `Config`. Raises: InputError."""
    values = config.to_dict() if hasattr(config, "to_dict") else config
    model = {k: v for k, v in values["model"].items() if v is not None}
    preset = model.pop("preset", "")
    base = dataclasses.asdict(ModelConfig.preset(preset)) if preset else {}
    sections = {name: section(**values[name]) for name, section in SECTIONS.items() if name in values}
    return Config(model=ModelConfig(**{**base, **model}), init_from=values.get("init_from", ""), **sections)


def load_config(path: str, overrides: list[tuple[str, str]] = ()) -> Config:
    """Runs a config file's `get_config()` and applies `a.b=value` overrides.

    Raises: InputError for a file that is missing or wrong, an unknown field (naming the nearest) or a bad value.
    """
    if not Path(path).is_file():
        raise InputError(f"no config file at {path}")
    sys.path.insert(0, str(Path(path).parent))  # a config file may start from a neighbour
    try:
        config = runpy.run_path(path)["get_config"]()
    except KeyError as error:
        raise InputError(f"{path}: {error} is missing; a config file defines get_config()") from error
    except (AttributeError, TypeError, SyntaxError, NameError, ImportError) as error:
        raise InputError(f"{path}: {' '.join(str(error).split())}") from error
    finally:
        sys.path.pop(0)
    for name, text in overrides:
        _override(config, name, text)
    return freeze_config(config)


def _override(config, name: str, text: str) -> None:
    *parents, last = name.split(".")
    section = config
    for depth, key in enumerate([*parents, last]):
        if not hasattr(section, "keys") or key not in section:
            known = list(section.keys()) if hasattr(section, "keys") else []
            path = ".".join([*parents, last][: depth + 1])
            raise InputError(f"no config field {path!r}{nearest(key, known)}")
        if depth < len(parents):
            section = section[key]
    if hasattr(section[last], "keys"):
        raise InputError(f"config field {name!r} is a section; set one of {', '.join(section[last].keys())}")
    wanted = section.get_type(last)
    if wanted is bool:
        value = {"true": True, "1": True, "false": False, "0": False}.get(text.lower())
    elif wanted in (int, float):
        try:
            value = wanted(text)
        except ValueError:
            value = None
    elif wanted is str:
        value = text
    else:  # a tuple, or a string or list
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
        if wanted is tuple:
            value = tuple(value) if isinstance(value, (tuple, list)) else None
    if value is None:
        raise InputError(f"config field {name!r} takes a {wanted.__name__}; got {text!r}")
    section[last] = value
