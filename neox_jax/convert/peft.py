"""PEFT's LoRA adapters: adapter_config.json and adapter_model.safetensors (read from .bin too), without PEFT.

Source: peft 0.21, tuners/lora/config.py and utils/save_and_load.py.
"""

import re
from pathlib import Path

import numpy as np

from neox_jax.config import LORA_TARGETS, LoraConfig
from neox_jax.convert.adapter import Adapter, Base
from neox_jax.convert.files import join_problems, read_json, to_json, written_whole
from neox_jax.convert.safetensors_files import open_safetensors, write_safetensors
from neox_jax.convert.stored import StoredTensor, whole
from neox_jax.convert.torch_files import read_torch_file
from neox_jax.errors import InputError

CONFIG, WEIGHTS, TORCH_WEIGHTS = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
# What is read here, or says nothing of what an adapter computes.
READ = {"peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "base_model_name_or_path"}
READ |= {"bias", "init_lora_weights", "revision"}
SAYS_NOTHING = {"task_type", "auto_mapping", "peft_version", "inference_mode", "megatron_core"}
SAYS_NOTHING |= {"qalora_group_size", "runtime_config", "loftq_config", "layers_pattern"}
# Ways to begin that leave the model's own weights as they are; the others (pissa, olora, loftq ...) change them.
INITS = (True, False, "gaussian", "eva", "orthogonal")
_KEY = re.compile(r"base_model\.model\.gpt_neox\.layers\.(\d+)\.(?:attention|mlp)\.(\w+)\.lora_([AB])\.weight")


def is_peft_folder(path: str | Path) -> bool:
    """Whether this is a folder with an adapter_config.json; what is in it is for `read_peft` to judge."""
    return (Path(path) / CONFIG).is_file()


def read_peft(folder: str | Path) -> Adapter:
    """The adapters of PEFT's folder. Raises: InputError naming everything about it that is not supported or wrong."""
    folder = Path(folder)
    values = read_json(folder / CONFIG)
    if not isinstance(values, dict):
        raise InputError(f"{folder / CONFIG} holds a {type(values).__name__}; wanted a JSON object")
    problems = _unsupported(values)
    if problems:
        raise InputError(f"{folder / CONFIG}: {join_problems(problems)}")
    path, tensors = _open(folder)
    factors, rank, targets = _read_factors(path, tensors)
    if rank != values.get("r"):
        raise InputError(f"{path} has factors of rank {rank}, and {CONFIG} says r {values.get('r')!r}")
    try:
        lora = LoraConfig(
            rank=rank,
            alpha=values.get("lora_alpha", 8),
            targets=targets,
            dropout=values.get("lora_dropout", 0.0),
            rslora=bool(values.get("use_rslora")),
        )
    except InputError as error:
        raise InputError(f"{folder / CONFIG}: {error}") from error
    base = Base(str(values.get("base_model_name_or_path") or ""), revision=values.get("revision"))
    return Adapter(lora, factors, base, str(folder), (folder / CONFIG, path))


def save_peft(adapter: Adapter, folder: str | Path) -> None:
    """Writes what PEFT loads, in float32. Raises: InputError where the folder has something in it, or for no room."""
    tensors = {name: _InMemory(factor) for name, factor in sorted(adapter.factors.items())}
    lora = adapter.lora
    values = {
        "base_model_name_or_path": adapter.base.source or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": lora.rank,
        "revision": adapter.base.revision,
        "target_modules": list(lora.targets),
        "task_type": "CAUSAL_LM",
        "use_rslora": lora.rslora,
    }
    with written_whole(Path(folder), sum(factor.array.nbytes for factor in tensors.values())) as partial:
        write_safetensors(partial / WEIGHTS, tensors)
        (partial / CONFIG).write_text(to_json(values), encoding="utf-8")


class _InMemory:
    def __init__(self, array: np.ndarray):
        self.array, self.shape, self.dtype = array, array.shape, array.dtype

    def read(self, slices: tuple[slice, ...]) -> np.ndarray:
        return self.array[slices]


def _unsupported(values: dict) -> list[str]:
    """What an adapter_config.json asks for that is not done here."""
    problems = []
    if values.get("peft_type") != "LORA":
        problems.append(f"peft_type is {values.get('peft_type')!r:.80}; only LORA is read here")
    if values.get("bias", "none") != "none":
        problems.append(f"bias {values['bias']!r:.80} is not supported; only none is")
    if values.get("init_lora_weights", True) not in INITS:
        problems.append(
            f"init_lora_weights {values['init_lora_weights']!r:.80} changes the model's own weights; save the adapter "
            "as plain LoRA (PEFT's path_initial_model_for_weight_conversion)"
        )
    for key, value in values.items():
        if key not in READ | SAYS_NOTHING and value not in (None, False, {}, [], ""):
            problems.append(f"{key} {value!r:.80} is not supported")
    return problems


def _open(folder: Path) -> tuple[Path, dict[str, StoredTensor]]:
    if (folder / WEIGHTS).is_file():
        return folder / WEIGHTS, open_safetensors(folder / WEIGHTS)
    path = folder / TORCH_WEIGHTS
    if not path.is_file():
        raise InputError(f"{folder} has neither {WEIGHTS} nor {TORCH_WEIGHTS}; download the adapter's weights")
    tree = read_torch_file(path)
    if not isinstance(tree, dict) or not all(hasattr(tensor, "shape") for tensor in tree.values()):
        raise InputError(f"{path} is no dict of tensors; download it again")
    return path, tree


def _read_factors(path: Path, tensors: dict[str, StoredTensor]) -> tuple[dict[str, np.ndarray], int, tuple[str, ...]]:
    """(the factors by name, their rank, the targets that have some)."""
    problems, ranks, layers = [], set(), {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None or match[2] not in LORA_TARGETS or len(tensor.shape) != 2:
            problems.append(f"{key!r:.100} {list(tensor.shape)} is no factor of a layer's {', '.join(LORA_TARGETS)}")
            continue
        ranks.add(tensor.shape[0 if match[3] == "A" else 1])
        layers.setdefault(f"lora_{match[3]} of {match[2]}", set()).add(int(match[1]))
    every = set(range(max((max(there) for there in layers.values()), default=-1) + 1))
    for factor, there in sorted(layers.items()):
        if there != every:
            problems.append(f"{factor} is missing in layers {', '.join(map(str, sorted(every - there)))}")
    if len(ranks) > 1:
        problems.append(f"factors have the ranks {', '.join(map(str, sorted(ranks)))}; one rank is supported")
    if not layers and not problems:
        problems.append("it has no factor of a GPT-NeoX layer")
    if problems:
        raise InputError(f"{path}: {join_problems(problems)}")
    factors = {key: whole(tensor).astype(np.float32) for key, tensor in tensors.items()}
    targets = tuple(target for target in LORA_TARGETS if f"lora_A of {target}" in layers)
    return factors, ranks.pop(), targets
