"""Hugging Face folders: config.json, weights in one file or in shards with an index, tokenizer.json; no PyTorch.

Weights are read from safetensors or, where there are none, from PyTorch's .bin files; written are safetensors.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from neox_jax.config import DTYPES, ModelConfig
from neox_jax.convert import names
from neox_jax.convert.files import join_problems, one_line, read_json, to_json, written_whole
from neox_jax.convert.lazy_tensor import LazyTensor
from neox_jax.convert.safetensors_files import open_safetensors, write_safetensors
from neox_jax.convert.stored import (
    Digests,
    StoredModel,
    StoredTensor,
    expected_shapes,
    from_model,
    num_bytes,
    to_model,
    zip_rows,
)
from neox_jax.convert.torch_files import read_torch_file
from neox_jax.errors import InputError
from neox_jax.model import NeoX
from neox_jax.tokenizer import END_OF_TEXT, PADDING, Tokenizer

CONFIG, WEIGHTS = "config.json", "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
TORCH_WEIGHTS = "pytorch_model.bin"


def is_hf_folder(path: str | Path) -> bool:
    """Whether this is a folder with a config.json; what is in it is for `load_hf` to judge."""
    return (Path(path) / CONFIG).is_file()


def load_hf(folder: str | Path, *, mesh=None, dtype=None) -> NeoX:
    """Loads a Hugging Face GPT-NeoX folder onto the mesh, or onto the default device.

    dtype: None keeps what is stored, else parameters are cast once.
    Raises: InputError naming everything that is wrong with the folder.
    """
    return to_model(read_hf(folder).cast(dtype), mesh=mesh)


def read_hf(folder: str | Path) -> StoredModel:
    """The configuration and the tensors of a Hugging Face folder; weights are still on disk.

    Where both model.safetensors and an index are there, the former is read, as transformers does.
    Raises: InputError listing all that is missing, unknown, of a wrong shape or badly indexed.
    """
    folder = Path(folder)
    config = read_config(folder)
    files, held, problems, explained = _list_tensors(folder)
    if config.num_hidden_layers > len(held) + len(explained):  # before anything is made of that size
        problems.append(
            f"num_hidden_layers is {config.num_hidden_layers}, but there are {len(held)} tensors in all; download the "
            f"{CONFIG} that belongs to them"
        )
        raise InputError(f"{folder}: {join_problems(problems)}")
    wanted = expected_shapes(config)
    found = _match(held, config, wanted, problems)
    absent = wanted.keys() - found.keys() - explained
    problems += [f"{name} {list(shape)} is missing" for name, shape in wanted.items() if name in absent]
    if problems:
        raise InputError(f"{folder}: {join_problems(problems)}")
    tensors = {name: one.tensor for name, one in found.items() if name in wanted}  # as they are in the files
    return StoredModel(config, tensors, str(folder), (folder / CONFIG, *files))


def save_hf(
    model: NeoX | StoredModel,
    folder: str | Path,
    *,
    tokenizer_json: str | None = None,
    max_shard_bytes: float = 5e9,
    digests: Digests | None = None,
    finish: Callable[[Path], None] | None = None,
) -> None:
    """Writes a Hugging Face folder that transformers loads, in the model's own dtype.

    model: a model that is stored somewhere, or any pytree of a model's structure (gradients too) on any mesh of this
    process's devices. tokenizer_json: the text of a tokenizer.json. digests: gets the tensors'. finish: called with the
    folder that all is in before it gets its name.
    Raises: InputError if folder has something in it, there is no room, or the tokenizer has ids that the model has not.
    """
    stored = model if isinstance(model, StoredModel) else from_model(model)
    files = _text_files(stored, tokenizer_json)
    with written_whole(Path(folder), stored.num_bytes) as partial:
        _write_weights(stored, partial, max_shard_bytes, digests)
        if finish is not None:
            finish(partial)
        for name, text in files.items():
            (partial / name).write_text(text, encoding="utf-8")


# ---- reading


def read_config(folder: Path) -> ModelConfig:
    """Reads config.json. Raises: InputError where it is missing, invalid, or of another kind of model."""
    path = folder / CONFIG
    if not path.is_file():
        raise InputError(f"{folder} has no {CONFIG}; give a Hugging Face model folder")
    values = read_json(path)
    if not isinstance(values, dict):
        raise InputError(f"{path} holds a {type(values).__name__}; wanted a JSON object")
    try:
        return ModelConfig.from_hf(values)
    except InputError as error:
        raise InputError(f"{folder}: {error}") from error
    except (TypeError, AttributeError) as error:  # a string where a number belongs, and the like
        raise InputError(f"{path} has a value of the wrong type: {one_line(error)}") from error


@dataclasses.dataclass(frozen=True)
class _Held:
    """A tensor in a file, under its name there."""

    file: Path
    key: str
    tensor: LazyTensor


def _match(
    held: list[_Held], config: ModelConfig, wanted: dict[str, tuple[int, ...]], problems: list[str]
) -> dict[str, _Held]:
    """Maps the full Hugging Face name of each parameter to its tensor; reports what is unknown, twice or wrong."""
    found = {}
    for one in held:
        if names.is_buffer(one.key):
            continue
        name = names.full_hf_name(one.key)
        if name in found:
            problems.append(f"both {found[name].key!r:.100} and {one.key!r:.100} are there; remove one")
        found[name] = one

    head, table = "embed_out.weight", "gpt_neox.embed_in.weight"
    if config.tie_word_embeddings and head in found:
        tied = found.pop(head)
        is_table = table in found and found[table].tensor.shape == wanted[table]
        if is_table and not _same_values(found[table].tensor, tied.tensor):
            problems.append(f"tie_word_embeddings is true, but {head} differs from {table}; set it to false")
    for name, one in found.items():
        if name not in wanted:
            problems.append(f"{one.key!r:.100} is no parameter of this config")
        elif one.tensor.shape != wanted[name]:
            problems.append(f"{one.key} is {list(one.tensor.shape)}, wanted {list(wanted[name])}")
        elif one.tensor.dtype.name not in DTYPES:
            problems.append(f"{one.key} is {one.tensor.dtype.name}, wanted one of {', '.join(DTYPES)}")
    return found


def _list_tensors(folder: Path) -> tuple[list[Path], list[_Held], list[str], set[str]]:
    """The files of the folder, their tensors, what is wrong with its index and shards, and the full names of the
    tensors whose absence that explains. Raises: InputError where nothing can be read at all."""
    for weights, read_header in ((WEIGHTS, open_safetensors), (TORCH_WEIGHTS, _open_torch)):
        path, index_path = folder / weights, folder / f"{weights}.index.json"
        if path.is_file():
            return [path], [_Held(path, key, tensor) for key, tensor in read_header(path).items()], [], set()
        if index_path.is_file():
            return _list_shards(index_path, read_header)
    raise InputError(_no_weights(folder))


def _list_shards(index_path: Path, read_header) -> tuple[list[Path], list[_Held], list[str], set[str]]:
    """`_list_tensors` for shards: the index and they must say the same."""
    folder, index_name = index_path.parent, index_path.name
    index = read_json(index_path)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index_path} has no weight_map; download it again")

    found, problems, explained, declared = {}, [], set(), {}
    for key, shard in weight_map.items():
        if not _is_bare_name(shard):
            problems.append(f"{index_name}: {key!r:.100} is in {shard!r:.100}, which is no bare file name")
            explained.add(names.full_hf_name(key))
        else:
            declared.setdefault(shard, set()).add(key)
    for shard, keys in sorted(declared.items()):
        try:
            held = read_header(folder / shard)
        except InputError as error:
            problems.append(str(error))
            explained |= {names.full_hf_name(key) for key in keys}
            continue
        for key, tensor in held.items():
            if key in found:
                problems.append(f"{key!r:.100} is in two shards, {found[key].file.name} and {shard}")
            elif key not in keys:
                problems.append(f"{shard} holds {key!r:.100}, which {index_name} does not say")
            found[key] = _Held(folder / shard, key, tensor)
        for key in sorted(keys - held.keys()):
            problems.append(f"{index_name} says that {key!r:.100} is in {shard}, but it is not")
            explained.add(names.full_hf_name(key))
    files = [index_path, *(folder / shard for shard in sorted(declared))]
    return files, list(found.values()), problems, explained


def _is_bare_name(name) -> bool:
    """Whether this names a file in a folder, and nothing outside it."""
    is_text = isinstance(name, str) and name.isprintable() and len(name.encode()) <= 255
    return is_text and name not in ("", ".", "..") and not any(mark in name for mark in "/\\")


def _open_torch(path: Path) -> dict[str, LazyTensor]:
    """What a .bin file holds, by the restricted reader. Raises: InputError where it is missing, damaged or hostile."""
    if not path.is_file():
        raise InputError(f"{path} is not there; download it again")
    tree = read_torch_file(path)
    if not isinstance(tree, dict):
        raise InputError(f"{path} holds a {type(tree).__name__}; wanted a dict of tensors")
    others = [key for key, tensor in tree.items() if not (isinstance(key, str) and isinstance(tensor, LazyTensor))]
    if others:
        raise InputError(f"{path}: {others[0]!r:.100} is no tensor; wanted a dict of tensors")
    return tree


def _no_weights(folder: Path) -> str:
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    if shards:
        return f"{folder} has {shards[0]!r:.100} but neither {WEIGHTS} nor {INDEX}; download the index too"
    return f"{folder} has neither {WEIGHTS} nor {TORCH_WEIGHTS}, and no index of shards of either; download the weights"


def _same_values(one: StoredTensor, other: StoredTensor) -> bool:
    return one.shape == other.shape and all(np.array_equal(a, b) for a, b in zip_rows(one, other))


# ---- writing


def _write_weights(stored: StoredModel, folder: Path, max_shard_bytes: float, digests: Digests | None) -> None:
    shards, shard_bytes = [], 0
    for name, tensor in stored.tensors.items():
        if not shards or shard_bytes + num_bytes(tensor) > max_shard_bytes:
            shards.append({})
            shard_bytes = 0
        shards[-1][name] = tensor
        shard_bytes += num_bytes(tensor)
    stem, suffix = WEIGHTS.split(".")
    weight_map = {}
    for i, shard in enumerate(shards, start=1):
        file = WEIGHTS if len(shards) == 1 else f"{stem}-{i:05d}-of-{len(shards):05d}.{suffix}"
        weight_map |= dict.fromkeys(shard, file)
        write_safetensors(folder / file, shard, digests)
    if len(shards) > 1:
        index = {"metadata": {"total_size": stored.num_bytes}, "weight_map": weight_map}
        (folder / INDEX).write_text(to_json(index), encoding="utf-8")


def _text_files(stored: StoredModel, tokenizer_json: str | None) -> dict[str, str]:
    """The small files by name, config.json last: a folder without one is none."""
    config = stored.config
    files = {}
    if tokenizer_json is not None:
        files["tokenizer.json"] = tokenizer_json
        files["tokenizer_config.json"] = to_json(_tokenizer_config(tokenizer_json, config))
    ends = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    files["generation_config.json"] = to_json(ends)
    dtype = stored.dtype.name
    files[CONFIG] = to_json({**config.to_hf(), "dtype": dtype, "torch_dtype": dtype})  # transformers 5's name, and 4's
    return files


def _tokenizer_config(tokenizer_json: str, config: ModelConfig) -> dict:
    """What makes AutoTokenizer give the same ids as tokenizer.json does alone.

    tokenizer_class is the plain one: GPTNeoXTokenizer rebuilds the pipeline from vocabulary and merges, which changes
    the ids of tokenizers that are not built like 20B's, and adds tokens that they have not (tried, 5.23).
    """
    tokenizer = Tokenizer.from_json(tokenizer_json)
    if tokenizer.vocab_size > config.vocab_size:
        raise InputError(
            f"the tokenizer has ids up to {tokenizer.vocab_size - 1}, but the model's vocab_size is "
            f"{config.vocab_size}; give the tokenizer that belongs to this model"
        )
    known = json.loads(tokenizer.to_json())
    tokens = {token["content"] for token in known["added_tokens"]}
    end = next((token for token in (END_OF_TEXT, "</s>") if token in tokens), None)
    special = {"bos_token": end, "eos_token": end}
    special["unk_token"] = END_OF_TEXT if end == END_OF_TEXT else None
    special["pad_token"] = PADDING if PADDING in tokens else None
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],  # else transformers 4 adds token_type_ids
        "model_max_length": config.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
        **{role: token for role, token in special.items() if token is not None},
    }
