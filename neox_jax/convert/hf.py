"""Hugging Face folders: config.json, weights in one file or in shards with an index, tokenizer.json; no PyTorch.

Weights are read from safetensors or, where there are none, from PyTorch's .bin files; written are safetensors.

A load reads each device's part of each parameter from the files, layer by layer; a save fetches one layer of one
parameter at a time and writes it. Neither ever holds the model a second time.
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from neox_jax.config import DTYPES, ModelConfig, check_choice
from neox_jax.convert import names
from neox_jax.convert.torch_files import LazyTensor, open_torch_file
from neox_jax.errors import InputError
from neox_jax.model import NeoX, abstract_model
from neox_jax.sharding import RULES
from neox_jax.tokenizer import END_OF_TEXT, PADDING, Tokenizer
from neox_jax.tree import map_named, named_leaves

CONFIG, WEIGHTS = "config.json", "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
TORCH_WEIGHTS = "pytorch_model.bin"
STORED_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def is_hf_folder(path: str | Path) -> bool:
    """Whether this is a folder with a config.json; what is in it is for `load_hf` to judge."""
    return (Path(path) / CONFIG).is_file()


def load_hf(folder: str | Path, *, mesh=None, dtype=None) -> NeoX:
    """Loads a Hugging Face GPT-NeoX folder onto the mesh, or onto the default device.

    dtype: None keeps what is stored, else parameters are cast once. Where vocab_size does not divide over the mesh
    the tables are stored with rows of zeros behind it (config.vocab_multiple), which take part in nothing. Where both
    model.safetensors and an index are there, the former is read, as transformers does.
    Raises: InputError naming everything that is wrong with the folder.
    """
    folder = Path(folder)
    if dtype is not None:
        check_choice("dtype", dtype if isinstance(dtype, str) else jnp.dtype(dtype).name, DTYPES)
        dtype = jnp.dtype(dtype)
    config = read_config(folder)
    tensors = _find_tensors(folder, config)
    return assemble(tensors, config, mesh=mesh, dtype=_common_dtype(folder, tensors) if dtype is None else dtype)


def assemble(tensors: dict, config: ModelConfig, *, mesh, dtype) -> NeoX:
    """The model of these tensors, each device's part read by itself.

    tensors: by full Hugging Face name, objects with a `shape` and `read(slices) -> array`, in the stored layout.
    """
    if mesh is not None:
        parts = math.prod(mesh.shape.get(axis, 1) for axis in RULES["vocab"])
        if config.vocab_size % parts:
            config = dataclasses.replace(config, vocab_multiple=parts)

    def read(name, leaf):
        row = names.BY_NAME[name]
        sources = [tensors[row.hf_name(layer)] for layer in row.layers(leaf.shape)]
        read_part = functools.partial(_read_part, row, sources, leaf.shape, dtype)
        if mesh is None:
            return jnp.asarray(read_part((slice(None),) * len(leaf.shape)))
        parts = {}  # replicas on this host share one array

        def once(index):
            key = tuple((part.start, part.stop) for part in index)
            return parts[key] if key in parts else parts.setdefault(key, read_part(index))

        return jax.make_array_from_callback(leaf.shape, leaf.sharding, once, dtype=dtype)

    return map_named(read, abstract_model(config, dtype=dtype, mesh=mesh))


def save_hf(
    model: NeoX, folder: str | Path, *, tokenizer_json: str | None = None, max_shard_bytes: float = 5e9
) -> None:
    """Writes a Hugging Face folder that transformers loads, in the model's own dtype.

    model: any pytree of the model's structure (gradients too), on any mesh of this process's devices.
    tokenizer_json: the text of a tokenizer.json. Everything is written beside `folder` and renamed at the end.
    Raises: InputError if folder has something in it, or the tokenizer has ids that the model has not.
    """
    folder = Path(os.path.abspath(folder))
    require_new(folder)
    files = _text_files(model, tokenizer_json)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(folder) as partial:
        _write_weights(model, partial, max_shard_bytes)
        for name, text in files.items():
            (partial / name).write_text(text, encoding="utf-8")


def require_new(folder: Path) -> None:
    """Raises: InputError if there is a file of this name, or a folder that is not empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} already has something in it; give a new or an empty folder")


# ---- reading


def read_json(path: Path):
    """Parses a JSON file. Raises: InputError if it cannot be read or parsed, or says a key twice."""
    try:
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as JSON: {one_line(error)}") from error


def _unique(pairs: list) -> dict:
    keys = [key for key, _ in pairs]
    twice = sorted({key for key in keys if keys.count(key) > 1}) if len(set(keys)) < len(keys) else []
    if twice:
        raise ValueError(f"key {twice[0]!r} is there twice")
    return dict(pairs)


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
class _Stored:
    """A tensor in a safetensors file, under its name there; dtype is the file's own word where it is none of ours."""

    file: Path
    key: str
    dtype: str
    shape: tuple[int, ...]

    def read(self, slices: tuple[slice, ...]) -> np.ndarray:
        # Opened anew for each part: the pages of a mapping that stays would add up to the whole file.
        with safe_open(self.file, framework="numpy") as file:
            return file.get_slice(self.key)[slices]


@dataclasses.dataclass(frozen=True)
class _StoredTorch(_Stored):
    """A tensor in a .bin file."""

    tensor: LazyTensor

    def read(self, slices: tuple[slice, ...]) -> np.ndarray:
        return self.tensor.read(slices)


def _find_tensors(folder: Path, config: ModelConfig) -> dict[str, _Stored]:
    """Maps the full Hugging Face name of each parameter to its tensor.

    Raises: InputError listing all that is missing, unknown, of a wrong shape or badly indexed.
    """
    stored, problems, explained = _list_tensors(folder)
    found = {}
    for tensor in stored:
        if names.is_buffer(tensor.key):
            continue
        name = names.full_hf_name(tensor.key)
        if name in found:
            problems.append(f"both {found[name].key!r} and {tensor.key!r} are there; remove one")
        found[name] = tensor

    head, table = "embed_out.weight", "gpt_neox.embed_in.weight"
    if config.tie_word_embeddings and head in found:
        tied = found.pop(head)
        if table in found and not _same_values(found[table], tied):
            problems.append(f"tie_word_embeddings is true, but {head} differs from {table}; set it to false")
    wanted = _wanted_shapes(config)
    for name, tensor in found.items():
        if name not in wanted:
            problems.append(f"{tensor.key!r} is no parameter of this config")
        elif tensor.shape != wanted[name]:
            problems.append(f"{tensor.key} is {list(tensor.shape)}, wanted {list(wanted[name])}")
        elif tensor.dtype not in DTYPES:
            problems.append(f"{tensor.key} is {tensor.dtype}, wanted one of {', '.join(DTYPES)}")
    absent = wanted.keys() - found.keys() - explained
    problems += [f"{name} {list(shape)} is missing" for name, shape in wanted.items() if name in absent]
    if problems:
        raise InputError(f"{folder}: {'; '.join(problems)}")
    return found


def _wanted_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The stored shape of each tensor of such a model, by full name."""
    shapes = {}
    for name, leaf in named_leaves(abstract_model(dataclasses.replace(config, vocab_multiple=1))).items():
        row = names.BY_NAME[name]
        shape = names.stored_shape(leaf.shape[1:] if row.stacked else leaf.shape, row.dims)
        shapes |= {row.hf_name(layer): shape for layer in row.layers(leaf.shape)}
    return shapes


def _list_tensors(folder: Path) -> tuple[list[_Stored], list[str], set[str]]:
    """All tensors of the folder, what is wrong with its index and shards, and the full names of the tensors whose
    absence that explains. Raises: InputError where nothing can be read at all."""
    for weights, read_header in ((WEIGHTS, _read_safetensors), (TORCH_WEIGHTS, _read_torch)):
        if (folder / weights).is_file():
            return read_header(folder / weights), [], set()
        index_path = folder / f"{weights}.index.json"
        if index_path.is_file():
            return _list_shards(index_path, read_header)
    raise InputError(_no_weights(folder))


def _list_shards(index_path: Path, read_header) -> tuple[list[_Stored], list[str], set[str]]:
    """`_list_tensors` for shards: the index and they must say the same."""
    folder, index_name = index_path.parent, index_path.name
    index = read_json(index_path)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index_path} has no weight_map; download it again")

    tensors, problems, explained, declared = {}, [], set(), {}
    for key, shard in weight_map.items():
        if not isinstance(shard, str) or shard in ("", ".", "..") or any(mark in shard for mark in "/\\\0"):
            problems.append(f"{index_name}: {key!r} is in {shard!r}, which is no bare file name")
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
        for tensor in held:
            if tensor.key in tensors:
                problems.append(f"{tensor.key!r} is in two shards, {tensors[tensor.key].file.name} and {shard}")
            elif tensor.key not in keys:
                problems.append(f"{shard} holds {tensor.key!r}, which {index_name} does not say")
            tensors[tensor.key] = tensor
        for key in sorted(keys - {tensor.key for tensor in held}):
            problems.append(f"{index_name} says that {key!r} is in {shard}, but it is not")
            explained.add(names.full_hf_name(key))
    return list(tensors.values()), problems, explained


def _read_safetensors(path: Path) -> list[_Stored]:
    """What a safetensors file holds. Raises: InputError where it is missing or damaged."""
    try:
        with safe_open(path, framework="numpy"):  # the library checks everything but keys said twice
            pass
        with open(path, "rb") as file:
            num_bytes = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(num_bytes), object_pairs_hook=_unique)
    except FileNotFoundError as error:
        raise InputError(f"{path} is not there; download it again") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path} is damaged or no safetensors file ({one_line(error)}); download it again") from error
    header.pop("__metadata__", None)
    return [
        _Stored(path, key, STORED_DTYPES.get(spec["dtype"], spec["dtype"]), tuple(spec["shape"]))
        for key, spec in header.items()
    ]


def _read_torch(path: Path) -> list[_Stored]:
    """What a .bin file holds, by the restricted reader. Raises: InputError where it is missing, damaged or hostile."""
    if not path.is_file():
        raise InputError(f"{path} is not there; download it again")
    tree = open_torch_file(path).tree
    if not isinstance(tree, dict):
        raise InputError(f"{path} holds a {type(tree).__name__}; wanted a dict of tensors")
    others = [key for key, tensor in tree.items() if not (isinstance(key, str) and isinstance(tensor, LazyTensor))]
    if others:
        raise InputError(f"{path}: {others[0]!r} is no tensor; wanted a dict of tensors")
    return [_StoredTorch(path, key, np.dtype(t.dtype).name, tuple(t.shape), t) for key, t in tree.items()]


def _no_weights(folder: Path) -> str:
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    if shards:
        return f"{folder} has {shards[0]} but neither {WEIGHTS} nor {INDEX}; download the index too"
    return f"{folder} has neither {WEIGHTS} nor {TORCH_WEIGHTS}, and no index of shards of either; download the weights"


def _same_values(one: _Stored, other: _Stored, *, rows: int = 4096) -> bool:
    if one.shape != other.shape:
        return False
    parts = [(slice(start, min(start + rows, one.shape[0])),) for start in range(0, one.shape[0], rows)]
    return all(np.array_equal(one.read(part), other.read(part)) for part in parts)


def _common_dtype(folder: Path, tensors: dict[str, _Stored]):
    found = sorted({tensor.dtype for tensor in tensors.values()})
    if len(found) > 1:
        raise InputError(f"{folder} stores parameters as {' and '.join(found)}; pass a dtype to cast them all to")
    return jnp.dtype(found[0])


def _read_part(row: names.Row, sources: list[_Stored], shape, dtype, index: tuple[slice, ...]) -> np.ndarray:
    """Part of a parameter, in our layout. Table rows beyond those stored, which only pad it, are zeros."""
    bounds = [part.indices(size)[:2] for part, size in zip(index, shape, strict=True)]
    out = np.zeros([stop - start for start, stop in bounds], dtype)
    if row.stacked:
        for i, source in enumerate(sources[slice(*bounds[0])]):
            out[i] = _read_tensor(row, source, shape[1:], bounds[1:])
        return out
    num_rows = sources[0].shape[0]
    start, stop = (min(end, num_rows) for end in bounds[0])
    if start < stop:
        out[: stop - start] = _read_tensor(row, sources[0], shape, [(start, stop), *bounds[1:]])
    return out


def _read_tensor(row: names.Row, source: _Stored, shape, bounds: list[tuple[int, int]]) -> np.ndarray:
    stored = source.read(names.stored_slices(bounds, shape, row.dims))
    return names.from_stored(stored, row.dims, tuple(stop - start for start, stop in bounds))


# ---- writing


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor as it is to be stored; `fetch` brings it to the host."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    fetch: Callable[[], np.ndarray]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def stored_tensors(model: NeoX) -> list[Tensor]:
    """The model's tensors under Hugging Face's names and layout, without rows beyond config.vocab_size.

    model: any pytree of the model's structure. Nothing is fetched yet.
    """
    tensors = []
    for name, leaf in named_leaves(model).items():
        row = names.BY_NAME[name]
        shape = leaf.shape[1:] if row.stacked else leaf.shape
        if row.is_table:
            shape = (model.config.vocab_size, *shape[1:])
        for layer in row.layers(leaf.shape):
            fetch = functools.partial(_fetch, leaf, layer, shape, row)
            stored = names.stored_shape(shape, row.dims)
            tensors.append(Tensor(row.hf_name(layer), stored, np.dtype(leaf.dtype), fetch))
    return tensors


def _fetch(leaf, layer: int | None, shape: tuple[int, ...], row: names.Row) -> np.ndarray:
    if isinstance(leaf, jax.Array) and layer is not None:
        leaf = _take_layer(leaf, layer)
    elif layer is not None:
        leaf = leaf[layer]
    return names.to_stored(np.asarray(leaf)[: shape[0]], row.dims)


# Traced, so that one program serves every layer, and the devices' other layers stay where they are.
@jax.jit
def _take_layer(leaf, layer):
    return jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False)


def _write_weights(model: NeoX, folder: Path, max_shard_bytes: float) -> None:
    shards, num_bytes = [], 0
    for tensor in stored_tensors(model):
        if not shards or num_bytes + tensor.num_bytes > max_shard_bytes:
            shards.append([])
            num_bytes = 0
        shards[-1].append(tensor)
        num_bytes += tensor.num_bytes
    stem, suffix = WEIGHTS.split(".")
    weight_map = {}
    for i, shard in enumerate(shards, start=1):
        file = WEIGHTS if len(shards) == 1 else f"{stem}-{i:05d}-of-{len(shards):05d}.{suffix}"
        weight_map |= dict.fromkeys((tensor.name for tensor in shard), file)
        _write_safetensors(folder / file, shard)
    if len(shards) > 1:
        total = sum(tensor.num_bytes for shard in shards for tensor in shard)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(_to_json(index), encoding="utf-8")


def _write_safetensors(path: Path, tensors: list[Tensor]) -> None:
    """Writes a safetensors file a tensor at a time; the library's own writer wants all of a shard in memory."""
    codes = {name: code for code, name in STORED_DTYPES.items()}
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for tensor in tensors:
        start, end = end, end + tensor.num_bytes
        spec = {"dtype": codes[tensor.dtype.name], "shape": list(tensor.shape), "data_offsets": [start, end]}
        header[tensor.name] = spec
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data are aligned
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            file.write(np.ascontiguousarray(tensor.fetch()).reshape(-1).view(np.uint8).data)


def _text_files(model: NeoX, tokenizer_json: str | None) -> dict[str, str]:
    """The small files by name, config.json last: a folder without one is none."""
    config = model.config
    files = {}
    if tokenizer_json is not None:
        files["tokenizer.json"] = tokenizer_json
        files["tokenizer_config.json"] = _to_json(_tokenizer_config(tokenizer_json, config))
    ends = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    files["generation_config.json"] = _to_json(ends)
    dtype = np.dtype(model.embed_in.embedding.dtype).name
    files[CONFIG] = _to_json({**config.to_hf(), "dtype": dtype, "torch_dtype": dtype})  # transformers 5's name, and 4's
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


@contextlib.contextmanager
def written_whole(folder: Path):
    """Gives a new folder beside `folder`, which takes its name once all its files are on disk."""
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        for path in [*partial.rglob("*"), partial]:
            _sync(path)
        partial.rename(folder)  # onto an empty folder too
        _sync(folder.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _to_json(values: dict) -> str:
    return json.dumps(values, indent=2) + "\n"


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
