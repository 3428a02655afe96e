"""EleutherAI/gpt-neox checkpoints, in both directions: PyTorch files by layer and tensor-parallel rank; no PyTorch.

Both of NeoX's layouts are read; the pipeline layout is written. What the files are is in `neox_files`, how ranks hold
a tensor in `neox_ranks`, what the configuration says in `neox_settings`.
"""

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np

from neox_jax.config import ModelConfig, check_choice
from neox_jax.convert import names
from neox_jax.convert.byte_writer import LargeFiles
from neox_jax.convert.files import join_problems, to_json, written_whole
from neox_jax.convert.neox_files import LATEST, MLP_NAMES, NeoxFiles, locate_step
from neox_jax.convert.neox_ranks import measure_drift, merge, place_of, shape_on_rank, split
from neox_jax.convert.neox_settings import (
    CONFIGS,
    EXTRA_KEYS,
    EXTRAS,
    derive_config,
    find_settings,
    read_extras,
    read_settings,
    to_settings,
    to_yaml,
)
from neox_jax.convert.stored import Digests, StoredModel, blocks, from_model, raw_parts, to_model
from neox_jax.convert.torch_files import TensorSpec, TorchWriter, save_torch_file
from neox_jax.errors import InputError
from neox_jax.model import NeoX
from neox_jax.tokenizer import Tokenizer


def load_neox(folder: str | Path, *, mesh=None, dtype=None) -> NeoX:
    """Loads a NeoX checkpoint of any tensor parallelism onto the mesh, or onto the default device.

    dtype: None keeps what is stored, else parameters are cast once. The vocabulary keeps NeoX's padded rows, which take
    part in the softmax as in NeoX. `read_neox` tells by how much the ranks' norms have drifted apart.
    Raises: InputError naming everything that is wrong with the folder.
    """
    return to_model(read_neox(folder).cast(dtype), mesh=mesh)


@dataclasses.dataclass(frozen=True)
class NeoxCheckpoint(StoredModel):
    """What a NeoX checkpoint holds; weights are still on disk.

    drift: of each tensor whose copies on the ranks differ, by Hugging Face name, the largest absolute difference; the
    mean over the ranks is what is read, as in NeoX's converters.
    """

    tensor_parallel: int = 1
    drift: dict[str, float] = dataclasses.field(default_factory=dict)


def read_neox(folder: str | Path) -> NeoxCheckpoint:
    """Reads the configuration and the headers of a NeoX checkpoint, and compares what its ranks hold copies of.

    Raises: InputError listing all that is missing, unknown, of a wrong shape or not GPT-NeoX.
    """
    folder = locate_step(Path(folder))
    problems: list[str] = []
    files = NeoxFiles.open(folder, problems)
    settings = read_settings(folder, problems)
    config = derive_config(files, settings, read_extras(folder, problems), problems)
    tensors = {} if config is None else merge(files, config, problems)
    drift = {} if problems else measure_drift(tensors, problems)
    if problems:
        raise InputError(f"{folder}: {join_problems(problems)}")
    assert config is not None
    notes = [_optimizer_note(folder)]
    if drift:
        name = max(drift, key=drift.get)
        notes.append(
            f"tensors that differ between ranks and were averaged: {len(drift)}; most {name}, by {drift[name]:.3g}"
        )
    paths = (*find_settings(folder), *files.paths)
    about = {"files": paths, "notes": tuple(notes), "tensor_parallel": len(files.ranks), "drift": drift}
    return NeoxCheckpoint(config, tensors, str(folder), **about)


def _optimizer_note(folder: Path) -> str:
    states = [path.stat().st_size for path in folder.glob("*optim_states.pt") if path.is_file()]
    there = f" ({len(states)} files, {sum(states) / 1e9:.1f} GB)" if states else ""
    return f"NeoX's optimizer states are not imported{there}"


def save_neox(
    model: NeoX | StoredModel,
    folder: str | Path,
    *,
    tensor_parallel: int = 1,
    mlp_names: str = "dense",
    step: int = 0,
    config_extra: dict | None = None,
    tokenizer_json: str | None = None,
    digests: Digests | None = None,
    finish: Callable[[Path], None] | None = None,
) -> None:
    """Writes a NeoX checkpoint in the pipeline layout, in the model's own dtype.

    model: a model that is stored somewhere, or any pytree of a model's structure (gradients too) on any mesh of this
    process's devices. mlp_names: dense (dense_h_to_4h: what 20B and Pythia have) or linear (linear1: what today's NeoX
    has). config_extra: more settings for the YAML file, in NeoX's names. tokenizer_json: the text of a tokenizer.json.
    digests: gets the tensors'. finish: called with the folder that all is in before it gets its name.
    The tables get rows of zeros up to a multiple of 128 a rank, as NeoX pads them; in NeoX they take part in the
    softmax, and loading here leaves them out again.
    Raises: InputError if folder has something in it, there is no room, or the model does not divide over the ranks.
    """
    stored = model if isinstance(model, StoredModel) else from_model(model)
    config = stored.config
    check_choice("mlp_names", mlp_names, MLP_NAMES)
    if not (isinstance(tensor_parallel, int) and 0 < tensor_parallel < 100):
        raise InputError(f"tensor_parallel is {tensor_parallel!r}; it must be a whole number between 1 and 99")
    for what, size in (("heads", config.num_attention_heads), ("intermediate size", config.intermediate_size)):
        if size % tensor_parallel:
            divisors = [str(n) for n in range(1, min(size, 99) + 1) if _divides(n, config)]
            raise InputError(f"{size} {what} do not divide over {tensor_parallel} ranks; try {', '.join(divisors)}")
    if tokenizer_json is not None and Tokenizer.from_json(tokenizer_json).vocab_size > config.vocab_size:
        raise InputError("the tokenizer has more ids than the model has rows; give the one that belongs to this model")
    settings = to_settings(config, tensor_parallel)
    again = sorted(settings.keys() & (config_extra or {}).keys())
    if again:
        raise InputError(f"config_extra sets {', '.join(again)}, which the model itself says; leave it out")
    settings |= config_extra or {}

    with written_whole(Path(folder), stored.num_bytes) as partial:
        step_folder = partial / f"global_step{step}"
        (step_folder / CONFIGS).mkdir(parents=True)
        _write_layers(stored, step_folder, tensor_parallel, MLP_NAMES[mlp_names], digests)
        for rank in range(tensor_parallel):
            state = _rank_state(config, step, tensor_parallel)
            save_torch_file(step_folder / f"mp_rank_{rank:02d}_model_states.pt", state)
        (step_folder / CONFIGS / "config.yml").write_text(to_yaml(settings), encoding="utf-8")
        extras = {key: getattr(config, key) for key in EXTRA_KEYS}
        (step_folder / CONFIGS / EXTRAS).write_text(to_json(extras), encoding="utf-8")
        if tokenizer_json is not None:
            (partial / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
        if finish is not None:
            finish(partial)
        (partial / LATEST).write_text(step_folder.name, encoding="utf-8")


def _divides(num_ranks: int, config: ModelConfig) -> bool:
    return config.num_attention_heads % num_ranks == 0 and config.intermediate_size % num_ranks == 0


def _write_layers(
    stored: StoredModel, folder: Path, num_ranks: int, renamed: dict[str, str], digests: Digests | None
) -> None:
    """Writes every layer's files, those of all ranks at once, so that each tensor is read once."""
    places = place_of(stored.config)
    layers: dict[int, dict[str, names.Row]] = {}  # in the order in which they are stored
    for name in stored.tensors:
        row, number = places[name]
        layers.setdefault(number, {})[name] = row
    with LargeFiles(num_ranks) as files:
        for number, rows in layers.items():
            specs = {}
            for name, row in rows.items():
                neox_name, tensor = row.neox_name, stored.tensors[name]
                for dense, other in renamed.items():
                    neox_name = neox_name.replace(dense, other)
                specs[neox_name] = TensorSpec(shape_on_rank(row, tensor.shape, num_ranks, stored.config), tensor.dtype)
            with contextlib.ExitStack() as opened:
                writers = []
                for rank in range(num_ranks):
                    path = folder / f"layer_{number:02d}-model_{rank:02d}-model_states.pt"
                    writers.append(opened.enter_context(TorchWriter(opened.enter_context(files.create(path)), specs)))
                for name, row in rows.items():
                    _write_tensor(stored, name, row, files, writers, digests)


def _write_tensor(
    stored: StoredModel,
    name: str,
    row: names.Row,
    files: LargeFiles,
    writers: list[TorchWriter],
    digests: Digests | None,
) -> None:
    """Writes each rank's part of a tensor, and hashes all of it."""
    tensor, updated = stored.tensors[name], []
    if digests is not None:
        raw = raw_parts(tensor) or []
        updated = [digests.begin(name), *(digests.of_file(raw[0]) if len(raw) == 1 else [])]
    with contextlib.ExitStack() as opened:
        members = [opened.enter_context(writer.next_tensor()) for writer in writers]
        for rank, piece in split(row, tensor, files.hashed(blocks(tensor), updated), len(writers), stored.config):
            members[rank].write(piece.reshape(-1).view(np.uint8).data)


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
