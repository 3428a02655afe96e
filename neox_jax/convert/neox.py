"""EleutherAI/gpt-neox checkpoints, in both directions: PyTorch files by layer and tensor-parallel rank; no PyTorch.

Two layouts are read: pipeline (`global_stepN/layer_XX-model_YY-model_states.pt`) and sequential (all layers of a rank
in `mp_rank_YY_model_states.pt`); the former is written. In both the layers are numbered alike: 0 is the embedding, 2 to
L+1 are the transformer's, L+3 is the final norm and L+4 the output head (absent where it is tied).

The weights say sizes only. Heads, rotary embedding, residual and activation stand in the YAML files that NeoX saves
beside them, with NeoX's own defaults for what those leave out; nothing is guessed.
Source: EleutherAI/gpt-neox, megatron/{checkpointing,neox_arguments/neox_args,model/activations}.py.
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import yaml

from neox_jax.config import DTYPES, TANH_GELUS, ModelConfig, check_choice
from neox_jax.convert import hf, names
from neox_jax.convert.names import COPIES, INPUTS, OUTPUTS, SHARES
from neox_jax.convert.torch_files import open_torch_file, save_torch_file
from neox_jax.errors import InputError
from neox_jax.model import NeoX, abstract_model
from neox_jax.tokenizer import Tokenizer
from neox_jax.tree import named_leaves

LATEST, CONFIGS, EXTRAS = "latest", "configs", "neox_jax.json"
# At most four digits: what is not there is counted up to the highest number.
LAYER_FILE = re.compile(r"layer_(\d{2,4})-model_(\d{2,3})-model_states\.pt")
RANK_FILE = re.compile(r"mp_rank_(\d{2,3})_model_states\.pt")
STEP_FOLDER = re.compile(r"global_step\d+")
VOCAB_MULTIPLE = 128  # NeoX's make_vocab_size_divisible_by; a vocabulary is padded to this many rows a rank
MLP_NAMES = {"dense": {}, "linear": {"dense_h_to_4h": "linear1", "dense_4h_to_h": "linear2"}}
MAX_CONFIG_BYTES = 1 << 20

_BUFFER = re.compile(r".*rotary_emb\.inv_freq|.*_extra_state")

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
_KINDS = {bool: "true or false", int: "a whole number", float: "a number"}


def is_neox_folder(path: str | Path) -> bool:
    """Whether this is a NeoX checkpoint folder: of several steps, of one, or of bare model files."""
    path = Path(path)
    if not path.is_dir():
        return False
    if _model_files(path) or any(STEP_FOLDER.fullmatch(child.name) for child in path.iterdir() if child.is_dir()):
        return True
    return (path / LATEST).is_file() and STEP_FOLDER.fullmatch(_read_latest(path / LATEST)) is not None


def load_neox(folder: str | Path, *, mesh=None, dtype=None) -> NeoX:
    """Loads a NeoX checkpoint of any tensor parallelism onto the mesh, or onto the default device.

    dtype: None keeps what is stored, else parameters are cast once. The vocabulary keeps NeoX's padded rows, which take
    part in the softmax as in NeoX. `read_neox` tells by how much the ranks' norms have drifted apart.
    Raises: InputError naming everything that is wrong with the folder.
    """
    return read_neox(folder).load(mesh=mesh, dtype=dtype)


@dataclasses.dataclass(frozen=True)
class NeoxCheckpoint:
    """What a NeoX checkpoint holds; weights are still on disk.

    folder: of the step. tensors: by full Hugging Face name. drift: of each tensor whose copies on the ranks differ, by
    Hugging Face name, the largest absolute difference; the mean over the ranks is what loads, as in NeoX's converters.
    """

    folder: Path
    config: ModelConfig
    tensor_parallel: int
    tensors: dict[str, "_Merged"]
    drift: dict[str, float]

    def load(self, *, mesh=None, dtype=None) -> NeoX:
        """The model, read a part of a parameter at a time; see `load_neox`."""
        if dtype is None:
            found = sorted({tensor.dtype.name for tensor in self.tensors.values()})
            if len(found) > 1:
                raise InputError(
                    f"{self.folder} stores parameters as {' and '.join(found)}; pass a dtype to cast them all to"
                )
            dtype = jnp.dtype(found[0])
        else:
            check_choice("dtype", dtype if isinstance(dtype, str) else jnp.dtype(dtype).name, DTYPES)
            dtype = jnp.dtype(dtype)
        return hf.assemble(self.tensors, self.config, mesh=mesh, dtype=dtype)


def read_neox(folder: str | Path) -> NeoxCheckpoint:
    """Reads the configuration and the headers of a NeoX checkpoint, and compares what its ranks hold copies of.

    Raises: InputError listing all that is missing, unknown, of a wrong shape or not GPT-NeoX.
    """
    folder = locate_step(Path(folder))
    problems: list[str] = []
    files = _Files.open(folder, problems)
    settings = _read_settings(folder, problems)
    config = _derive_config(files, settings, _read_extras(folder, problems), problems)
    tensors = {} if config is None else _merge(files, config, problems)
    drift = {} if problems else _measure_drift(tensors, problems)
    if problems:
        text = f"{folder}: {'; '.join(problems)}"
        raise InputError(" ".join(text.split()))  # names from files may have line breaks in them
    assert config is not None
    return NeoxCheckpoint(folder, config, len(files.ranks), tensors, drift)


def locate_step(folder: Path) -> Path:
    """The folder of the model files: this one, the one that `latest` names, or the only step.

    Raises: InputError where there is none, or no telling which.
    """
    if _model_files(folder):
        return folder
    steps = sorted(child.name for child in folder.iterdir() if child.is_dir() and STEP_FOLDER.fullmatch(child.name))
    if (folder / LATEST).is_file():
        name = _read_latest(folder / LATEST)
        if not STEP_FOLDER.fullmatch(name):
            raise InputError(f"{folder / LATEST} says {name[:80]!r}; wanted the name of a folder, global_stepN")
        if not (folder / name).is_dir():
            raise InputError(f"{folder / LATEST} says {name}, which is not there; it has {', '.join(steps) or 'none'}")
    elif len(steps) == 1:
        name = steps[0]
    elif steps:
        raise InputError(f"{folder} has {len(steps)} steps and no file `latest`; give one: {', '.join(steps)}")
    else:
        raise InputError(f"{folder} is no NeoX checkpoint: no global_stepN and no *_model_states.pt in it")
    if not _model_files(folder / name):
        raise InputError(f"{folder / name} has neither layer_XX-model_YY- nor mp_rank_YY_model_states.pt files")
    return folder / name


def save_neox(
    model: NeoX,
    folder: str | Path,
    *,
    tensor_parallel: int = 1,
    mlp_names: str = "dense",
    step: int = 0,
    config_extra: dict | None = None,
    tokenizer_json: str | None = None,
) -> None:
    """Writes a NeoX checkpoint in the pipeline layout, in the model's own dtype.

    model: any pytree of the model's structure (gradients too), on any mesh of this process's devices. mlp_names: dense
    (dense_h_to_4h: what 20B and Pythia have) or linear (linear1: what today's NeoX has). config_extra: more settings
    for the YAML file, in NeoX's names. tokenizer_json: the text of a tokenizer.json.
    The tables get rows of zeros up to a multiple of 128 a rank, as NeoX pads them; in NeoX they take part in the
    softmax, and loading here leaves them out again. Holds one layer on the host; everything is written beside `folder`
    and renamed at the end.
    Raises: InputError if folder has something in it, or the model does not divide over the ranks.
    """
    folder = Path(os.path.abspath(folder))
    hf.require_new(folder)
    config = model.config
    check_choice("mlp_names", mlp_names, MLP_NAMES)
    if not (isinstance(tensor_parallel, int) and 0 < tensor_parallel < 100):
        raise InputError(f"tensor_parallel is {tensor_parallel!r}; it must be a whole number between 1 and 99")
    for what, size in (("heads", config.num_attention_heads), ("intermediate size", config.intermediate_size)):
        if size % tensor_parallel:
            divisors = [str(n) for n in range(1, min(size, 99) + 1) if _divides(n, config)]
            raise InputError(f"{size} {what} do not divide over {tensor_parallel} ranks; try {', '.join(divisors)}")
    if tokenizer_json is not None and Tokenizer.from_json(tokenizer_json).vocab_size > config.vocab_size:
        raise InputError("the tokenizer has more ids than the model has rows; give the one that belongs to this model")
    settings = _to_settings(config, tensor_parallel)
    again = sorted(settings.keys() & (config_extra or {}).keys())
    if again:
        raise InputError(f"config_extra sets {', '.join(again)}, which the model itself says; leave it out")
    settings |= config_extra or {}

    folder.parent.mkdir(parents=True, exist_ok=True)
    with hf.written_whole(folder) as partial:
        step_folder = partial / f"global_step{step}"
        (step_folder / CONFIGS).mkdir(parents=True)
        _write_layers(model, step_folder, tensor_parallel, MLP_NAMES[mlp_names])
        for rank in range(tensor_parallel):
            state = _rank_state(config, step, tensor_parallel)
            save_torch_file(step_folder / f"mp_rank_{rank:02d}_model_states.pt", state)
        (step_folder / CONFIGS / "config.yml").write_text(_to_yaml(settings), encoding="utf-8")
        extras = {key: getattr(config, key) for key in _EXTRA_KEYS}
        (step_folder / CONFIGS / EXTRAS).write_text(json.dumps(extras, indent=2) + "\n", encoding="utf-8")
        if tokenizer_json is not None:
            (partial / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
        (partial / LATEST).write_text(step_folder.name, encoding="utf-8")


# ---- the files


def _model_files(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if LAYER_FILE.fullmatch(path.name) or RANK_FILE.fullmatch(path.name)]


def _read_latest(path: Path) -> str:
    with open(path, "rb") as file:
        return file.read(256).decode("utf-8", errors="replace").strip()


@dataclasses.dataclass(frozen=True)
class _Files:
    """All tensors of a step. found: (layer's number, name in the layer) -> rank -> tensor, names in the older spelling.

    absent: (layer's number, rank) of the files that are not there or not readable, already reported; every tensor of
    theirs is missing for that reason.
    """

    ranks: range
    found: dict[tuple[int, str], dict[int, object]]
    absent: set[tuple[int, int]]

    @classmethod
    def open(cls, folder: Path, problems: list[str]) -> "_Files":
        layer_files = {}
        for path in _model_files(folder):
            if match := LAYER_FILE.fullmatch(path.name):
                layer_files[int(match[1]), int(match[2])] = path
        if layer_files:
            return cls._open_layers(layer_files, problems)
        rank_files = {int(RANK_FILE.fullmatch(path.name)[1]): path for path in _model_files(folder)}
        return cls._open_ranks(rank_files, problems)

    @classmethod
    def _open_layers(cls, paths: dict[tuple[int, int], Path], problems: list[str]) -> "_Files":
        files = cls(range(max(rank for _, rank in paths) + 1), {}, set())
        for number in sorted({number for number, _ in paths}):
            for rank in files.ranks:
                name = f"layer_{number:02d}-model_{rank:02d}-model_states.pt"
                if (number, rank) not in paths:
                    problems.append(f"{name} is missing; download it")
                    files.absent.add((number, rank))
                    continue
                try:
                    tree = open_torch_file(paths[number, rank], allow_unknown=True).tree
                except InputError as error:
                    problems.append(str(error))
                    files.absent.add((number, rank))
                    continue
                files._add(name, number, rank, tree, problems)
        return files

    @classmethod
    def _open_ranks(cls, paths: dict[int, Path], problems: list[str]) -> "_Files":
        files = cls(range(max(paths) + 1), {}, set())
        for rank in files.ranks:
            name = f"mp_rank_{rank:02d}_model_states.pt"
            if rank not in paths:
                problems.append(f"{name} is missing; download it")
                files.absent.add((-1, rank))
                continue
            try:
                tree = open_torch_file(paths[rank], allow_unknown=True).tree
            except InputError as error:
                problems.append(str(error))
                files.absent.add((-1, rank))
                continue
            module = tree.get("module") if isinstance(tree, dict) else None
            if not isinstance(module, dict):
                problems.append(f"{name} has no weights under 'module', and there are no layer files; download those")
                files.absent.add((-1, rank))
                continue
            layers: dict[int, dict] = {}
            for key, value in module.items():
                match = re.fullmatch(r"sequential\.(\d{1,4})\.(.+)", str(key), re.DOTALL)
                if match:
                    layers.setdefault(int(match[1]), {})[match[2]] = value
                else:
                    problems.append(f"{name}: {str(key)[:100]!r} is no parameter of a GPT-NeoX")
            for number, layer in sorted(layers.items()):
                files._add(name, number, rank, layer, problems)
        return files

    def _add(self, file: str, number: int, rank: int, tree, problems: list[str]) -> None:
        if not isinstance(tree, dict):
            problems.append(f"{file} holds a {type(tree).__name__}; wanted the tensors of a layer by name")
            self.absent.add((number, rank))
            return
        for key, tensor in tree.items():
            if _BUFFER.fullmatch(str(key)):
                continue
            name = str(key)
            for old, new in MLP_NAMES["linear"].items():
                name = re.sub(rf"^mlp\.{new}\.", f"mlp.{old}.", name)
            ranks = self.found.setdefault((number, name), {})
            if not hasattr(tensor, "read"):
                problems.append(f"{file}: {name[:100]!r} is no tensor; wanted nothing but tensors there")
            elif rank in ranks:
                problems.append(f"{file} holds {name} under both its older and its newer name; remove one")
            ranks[rank] = tensor

    def missing(self, number: int, rank: int) -> bool:
        """Whether the file that would hold this layer is known to be missing."""
        return (number, rank) in self.absent or (-1, rank) in self.absent

    def shape(self, number: int, name: str) -> tuple[int, ...] | None:
        """The shape of a tensor on the first rank that has it."""
        shapes = [tensor.shape for tensor in self.found.get((number, name), {}).values() if hasattr(tensor, "shape")]
        return tuple(shapes[0]) if shapes else None

    @property
    def num_layers(self) -> int | None:
        """By the number of the final norm, else by that of the last transformer layer."""
        norms = [number - 3 for number, name in self.found if name == "norm.weight"]
        layers = [number - 1 for number, name in self.found if name == "input_layernorm.weight"]
        return max(norms or layers, default=None)


# ---- the tensors of all ranks as one


@dataclasses.dataclass(frozen=True)
class _Merged:
    """One tensor of the model over its ranks. shape: of the whole, without rows that only pad the vocabulary."""

    ranks: tuple
    how: str
    shape: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.ranks[0].dtype)

    def read(self, slices: tuple[slice, ...]) -> np.ndarray:
        """Part of the whole tensor; slices have plain bounds."""
        if self.how in (OUTPUTS, INPUTS):
            return self._join(slices, 0 if self.how == OUTPUTS else 1)
        parts = [tensor.read(slices) for tensor in self.ranks]
        if len(parts) == 1:
            return parts[0]
        total = _sum(parts)
        return (total if self.how == SHARES else total / len(parts)).astype(self.dtype)

    def _join(self, slices: tuple[slice, ...], dim: int) -> np.ndarray:
        parts, width = [], self.ranks[0].shape[dim]
        for i, tensor in enumerate(self.ranks):
            start, stop = max(slices[dim].start - i * width, 0), min(slices[dim].stop - i * width, width)
            if start < stop:
                parts.append(tensor.read((*slices[:dim], slice(start, stop), *slices[dim + 1 :])))
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=dim)


def _sum(parts: list[np.ndarray]) -> np.ndarray:
    """In float64, in the order of the ranks."""
    total = parts[0].astype(np.float64)
    for part in parts[1:]:
        total = total + part.astype(np.float64)
    return total


def _number(row: names.Row, layer: int | None, num_layers: int) -> int:
    """The number of the layer file that holds it."""
    if layer is not None:
        return layer + 2
    return {"word_embeddings.weight": 0, "final_linear.weight": num_layers + 4}.get(row.neox_name, num_layers + 3)


def _merge(files: _Files, config: ModelConfig, problems: list[str]) -> dict[str, _Merged]:
    """Maps the full Hugging Face name of each parameter to its tensor; reports what is missing, unknown or wrong."""
    merged, wanted, unseen = {}, set(), set()
    numbers = {number for number, _ in files.found} | {number for number, _ in files.absent}
    table_rows = files.shape(0, "word_embeddings.weight")[0]
    for name, leaf in named_leaves(abstract_model(config)).items():
        row = names.BY_NAME[name]
        shape = names.stored_shape(leaf.shape[1:] if row.stacked else leaf.shape, row.dims)
        how = COPIES if row.ranks == SHARES and not config.use_parallel_residual else row.ranks
        on_rank = (table_rows, *shape[1:]) if row.is_table else _shape_on_rank(shape, how, len(files.ranks))
        for layer in row.layers(leaf.shape):
            number = _number(row, layer, config.num_hidden_layers)
            wanted.add((number, row.neox_name))
            if number not in numbers and -1 not in numbers:
                unseen.add(number)
                continue
            held = files.found.get((number, row.neox_name), {})
            if _check_ranks(f"layer {number}'s {row.neox_name}", held, on_rank, files, number, problems):
                merged[row.hf_name(layer)] = _Merged(tuple(held[rank] for rank in files.ranks), how, shape)
    problems += [f"layer {number} is missing on every rank; download its files" for number in sorted(unseen)]
    for number, name in sorted(files.found.keys() - wanted):
        tied = " (no_weight_tying is false)" if name == "final_linear.weight" else ""
        problems.append(f"layer {number}'s {name[:100]!r} is no parameter of this configuration{tied}")
    return merged


def _shape_on_rank(shape: tuple[int, ...], how: str, num_ranks: int) -> tuple[int, ...]:
    if how == OUTPUTS:
        return (shape[0] // num_ranks, *shape[1:])
    return (shape[0], shape[1] // num_ranks) if how == INPUTS else shape


def _check_ranks(what: str, held: dict, shape: tuple[int, ...], files: _Files, number: int, problems) -> bool:
    """Whether every rank holds the tensor, alike and in this shape; reports it where not."""
    missing = [rank for rank in files.ranks if rank not in held and not files.missing(number, rank)]
    if missing:
        on = "" if len(missing) == len(files.ranks) else f" on rank {', '.join(map(str, missing))}"
        problems.append(f"{what} is missing{on}")
    tensors = {rank: tensor for rank, tensor in sorted(held.items()) if hasattr(tensor, "read")}
    wrong = {rank: tuple(tensor.shape) for rank, tensor in tensors.items() if tuple(tensor.shape) != shape}
    if wrong:
        got = next(iter(wrong.values()))
        on = "every rank" if len(wrong) == len(files.ranks) else f"rank {', '.join(map(str, wrong))}"
        problems.append(f"{what} is {list(got)} on {on}, wanted {list(shape)}")
    dtypes = sorted({np.dtype(tensor.dtype).name for tensor in tensors.values()})
    if len(dtypes) > 1:
        problems.append(f"{what} is {' and '.join(dtypes)} on different ranks; wanted one dtype")
    problems += [f"{what} is {dtype}, wanted one of {', '.join(DTYPES)}" for dtype in dtypes if dtype not in DTYPES]
    return len(tensors) == len(files.ranks) and not wrong and len(dtypes) == 1 and dtypes[0] in DTYPES


def _measure_drift(tensors: dict[str, _Merged], problems: list[str]) -> dict[str, float]:
    """The largest difference between the ranks' copies, where they differ.

    Norms drift a little in training, and so may the biases of a model with sequential residual. Biases that have
    nothing to do with each other are no copies.
    """
    drift = {}
    for name, tensor in tensors.items():
        if tensor.how != COPIES or len(tensor.ranks) == 1:
            continue
        copies = [copy.read() for copy in tensor.ranks]
        if all(copy.tobytes() == copies[0].tobytes() for copy in copies):
            continue
        stack = np.stack([copy.astype(np.float64) for copy in copies])
        drift[name] = float(np.max(np.max(stack, axis=0) - np.min(stack, axis=0)))
        if name.endswith((".attention.dense.bias", ".mlp.dense_4h_to_h.bias")) and not drift[name] <= 0.5 * np.max(
            np.abs(stack)
        ):
            problems.append(
                f"{name} differs between the ranks by {drift[name]:.3g}: with gpt_j_residual false they hold copies; "
                "set it to true if the residual is parallel, or download all ranks of the same step"
            )
    return drift


# ---- the configuration


class _StrictLoader(yaml.SafeLoader):
    """Plain YAML, with every key said once."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = sorted({str(key) for key in keys if keys.count(key) > 1})
        if twice:
            raise yaml.YAMLError(f"key {twice[0]!r} is there twice")
        return super().construct_mapping(node, deep=deep)


def _read_settings(folder: Path, problems: list[str]) -> dict | None:
    """NeoX's settings from the YAML files in configs/, or beside the weights; None, reported, where there are none."""
    places = [folder / CONFIGS, folder]
    if STEP_FOLDER.fullmatch(folder.name):
        places += [folder.parent / CONFIGS, folder.parent]
    for place in places:
        paths = [*place.glob("*.yml"), *place.glob("*.yaml"), *place.glob("neox_config.json")]
        if place.name == CONFIGS:
            paths = [*paths, *(path for path in place.glob("*.json") if path.name not in (EXTRAS, "neox_config.json"))]
        if paths:
            return _join_settings(sorted(paths), problems)
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
        except (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
            problems.append(f"{path.name} cannot be read as YAML: {hf.one_line(error)}")
            continue
        if not isinstance(values, dict):
            problems.append(f"{path.name} holds a {type(values).__name__}; wanted NeoX's settings by name")
            continue
        for key, value in values.items():
            name = str(key).replace("-", "_")
            if name in settings and settings[name] != value:
                problems.append(f"{name} is {settings[name]!r} in {origin[name]}, but {value!r} in {path.name}")
            settings[name], origin[name] = value, path.name
    return settings


_EXTRA_KEYS = ("vocab_size", "hidden_act", "bos_token_id", "eos_token_id", "init_method")


def _read_extras(folder: Path, problems: list[str]) -> dict:
    """What `save_neox` keeps of a model that NeoX has no setting for."""
    path = folder / CONFIGS / EXTRAS
    if not path.is_file():
        return {}
    try:
        extras = hf.read_json(path)
    except InputError as error:
        problems.append(str(error))
        return {}
    like = {key: getattr(ModelConfig, key) for key in _EXTRA_KEYS}
    if not isinstance(extras, dict) or any(type(extras[key]) is not type(like.get(key)) for key in extras):
        problems.append(f"{path.name} is not as it was written; wanted an object of {', '.join(_EXTRA_KEYS)}")
        return {}
    return extras


def _derive_config(files: _Files, settings: dict | None, extras: dict, problems: list[str]) -> ModelConfig | None:
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
            told = repr(value) if key in settings else f"not said, and {value!r} by NeoX's default"
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
    return set() if value is None or isinstance(value, int) else {str(value)}


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
    problem = f"{key} is {value!r} in the configuration; wanted {_KINDS[kind]}"
    if problem not in problems:
        problems.append(problem)
    return default


# ---- writing


def _divides(num_ranks: int, config: ModelConfig) -> bool:
    return config.num_attention_heads % num_ranks == 0 and config.intermediate_size % num_ranks == 0


def _write_layers(model: NeoX, folder: Path, num_ranks: int, renamed: dict[str, str]) -> None:
    config = model.config
    layers: dict[int, list[tuple[names.Row, hf.Tensor]]] = {}
    places = {
        row.hf_name(layer): (_number(row, layer, config.num_hidden_layers), row)
        for row in names.ROWS
        for layer in (range(config.num_hidden_layers) if row.stacked else [None])
    }
    for tensor in hf.stored_tensors(model):
        number, row = places[tensor.name]
        layers.setdefault(number, []).append((row, tensor))
    for number, held in sorted(layers.items()):
        ranks: list[dict[str, np.ndarray]] = [{} for _ in range(num_ranks)]
        for row, tensor in held:
            name = row.neox_name
            for dense, other in renamed.items():
                name = name.replace(dense, other)
            for rank, part in zip(ranks, _split(row, tensor.fetch(), num_ranks, config), strict=True):
                rank[name] = part
        for i, rank in enumerate(ranks):
            save_torch_file(folder / f"layer_{number:02d}-model_{i:02d}-model_states.pt", rank)


def _split(row: names.Row, whole: np.ndarray, num_ranks: int, config: ModelConfig) -> list[np.ndarray]:
    """What each rank holds of a stored tensor."""
    if row.ranks == COPIES or (row.ranks == SHARES and not config.use_parallel_residual):
        return [whole] * num_ranks
    if row.ranks == SHARES:
        return _share(whole, num_ranks)
    if row.is_table:
        whole = np.pad(whole, ((0, -len(whole) % (VOCAB_MULTIPLE * num_ranks)), (0, 0)))
    return [np.ascontiguousarray(part) for part in np.split(whole, num_ranks, axis=0 if row.ranks == OUTPUTS else 1)]


def _share(bias: np.ndarray, num_ranks: int) -> list[np.ndarray]:
    """Equal shares of a bias, whose sum is the bias to the bit.

    The shares are equal, as NeoX's own converter and NeoX's training make them, where that is exact: always for a power
    of two, but for the smallest numbers. Where it is not, rank 0 takes the rounding error too, and if even that does
    not sum up (an infinity, a number that underflows) the whole, the others nothing.
    """
    if num_ranks == 1:
        return [bias]
    with np.errstate(invalid="ignore", over="ignore"):
        share = (bias.astype(np.float64) / num_ranks).astype(bias.dtype)
        first = (bias.astype(np.float64) - (num_ranks - 1) * share.astype(np.float64)).astype(bias.dtype)
        first = np.where(bias == 0, bias, first)  # minus zero stays what it is
        total = _sum([first, *[share] * (num_ranks - 1)]).astype(bias.dtype)
    exact = total == bias
    first, share = np.where(exact, first, bias), np.where(exact, share, np.zeros_like(bias))
    return [first] + [share] * (num_ranks - 1)


def _rank_state(config: ModelConfig, step: int, num_ranks: int) -> dict:
    """What DeepSpeed and NeoX look for in a rank's file, plain values only; no optimizer, no random state."""
    return {
        "module": None,
        "iteration": step,
        "global_steps": step,
        "global_samples": 0,
        "skipped_steps": 0,
        "dp_world_size": 1,
        "mp_world_size": num_ranks,
        "args": {
            "num_layers": config.num_hidden_layers,
            "hidden_size": config.hidden_size,
            "num_attention_heads": config.num_attention_heads,
            "max_position_embeddings": config.max_position_embeddings,
            "model_parallel_size": num_ranks,
        },
    }


def _to_settings(config: ModelConfig, num_ranks: int) -> dict:
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


def _to_yaml(settings: dict) -> str:
    """As NeoX's own files are: JSON, which is YAML, but for numbers like 1e-05, which YAML 1.1 takes for strings."""
    lines = []
    for key, value in settings.items():
        text = json.dumps(value)
        if isinstance(value, float) and "e" in text and "." not in text:
            text = text.replace("e", ".0e")
        lines.append(f"  {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"
