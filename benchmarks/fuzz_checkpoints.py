"""Reads mutated checkpoints for as long as you like, and says what came of it: read, refused, or a defect of ours.

    python benchmarks/fuzz_checkpoints.py --files 200000 --seed 1 --processes 2 --seconds-limit 3600

Kinds: `torch`, .bin and .pt files by themselves; and in folders of a whole tiny model `index` (the index of shards),
`safetensors`, `config` (config.json) and `neox` (latest, YAML, neox_jax.json, names and contents of files).
Each must be read or refused by an InputError of one line, within MAX_SECONDS of processor time and MEMORY_BYTES, and
nothing imported or started, opened outside its folder or written. What is read must be consistent, and equal to what it
was made from wherever that can be told. A process that dies or stands still is a defect. A defect is printed with what
makes its file again: `--kinds K --seed N --first I --files 1`. Needs PyTorch, which writes some of what is mutated.
"""

# ruff: noqa: SIM905  lists of words are split

import argparse
import collections
import contextlib
import copy
import dataclasses
import functools
import io
import itertools
import json
import math
import multiprocessing
import os
import pickletools
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from neox_jax.config import ModelConfig
from neox_jax.convert import stored
from neox_jax.convert.hf import CONFIG, INDEX, WEIGHTS, read_hf, save_hf
from neox_jax.convert.neox import read_neox, save_neox
from neox_jax.convert.neox_files import LATEST, MLP_NAMES
from neox_jax.convert.neox_ranks import how_held, place_of
from neox_jax.convert.neox_settings import CONFIGS, EXTRAS
from neox_jax.convert.stored import StoredModel, expected_shapes, whole
from neox_jax.convert.torch_files import LazyTensor, read_torch_file, save_torch_file
from neox_jax.errors import InputError

MAX_SECONDS, HANG_SECONDS, START_SECONDS = 2.0, 30.0, 300.0
MEMORY_BYTES = 1 << 30
MAX_MESSAGE = 30_000  # characters of a list of problems
REPORT_EVERY = 200  # files
EDGES = (0, 1, 0x7F, 0x80, 0xFF)


# ---- bytes


def hit(data: bytearray, start: int, rng: random.Random, end: int | None = None) -> None:
    """Changes some bytes."""
    for _ in range(rng.choice((1, 1, 1, 2, 4, 8))):
        at = rng.randrange(start, len(data) if end is None else end)
        data[at] = rng.choice((data[at] ^ (1 << rng.randrange(8)), rng.choice(EDGES), rng.randrange(256)))


def change_bytes(original: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """Bytes changed, cut off, or replaced by a piece of another file."""
    data, how = bytearray(original), rng.randrange(4)
    if not data or how == 0:
        return bytes(data[: rng.randrange(len(data) + 1)])
    if how == 1:
        other = rng.choice(others) or b"\0"
        start, size, at = rng.randrange(len(other)), rng.choice((1, 4, 16, 64, 512)), rng.randrange(len(data))
        data[at : at + rng.choice((0, size))] = other[start : start + size]
    else:
        hit(data, 0, rng)
    return bytes(data)


# ---- JSON, in which a key may be there twice and a value be anything


class Pairs(list):
    """A JSON object: [key, value] lists."""


class Raw(str):
    """Text that stands for itself."""

    __slots__ = ()


def parse(text: str | bytes):
    return json.loads(text, object_pairs_hook=lambda pairs: Pairs(map(list, pairs)))


def dump(node) -> str:
    if isinstance(node, Raw):
        return node
    if isinstance(node, Pairs):
        return "{" + ", ".join(f"{dump(key)}: {dump(value)}" for key, value in node) + "}"
    if isinstance(node, list):
        return "[" + ", ".join(map(dump, node)) + "]"
    return json.dumps(node)


NUMBERS = (
    *(0, 1, -1, 2, 3, 7, 255, 2**31 - 1, 2**31, 2**32, 2**63, 2**64, 10**9, 10**12, 10**30, 10**4000),
    *(0.5, 1.0, 1e-5, -0.0, 1e308, math.nan, math.inf, -math.inf),
)
OTHERS = (
    *(None, True, False, "", "a", "0", "float32", "a" * 100_000, "\ud800", "\0", "\n", "\x1b[2J", "\u2028", "\u202e"),
    *map(Raw, ("1e999", "-1e999", "1" * 5000, "01", "", "'x'", "x", "[" * 100, "[" * 50_000 + "]" * 50_000)),
    *(Raw('{"a":' * 5000 + "1" + "}" * 5000), [], Pairs(), [1, 2], ["a"], [[]], [None] * 1000, Pairs([["type", "x"]])),
)


def odd_value(rng: random.Random, more: tuple = ()):
    return copy.deepcopy(rng.choice(rng.choice((NUMBERS, OTHERS, *([more, more] if more else [])))))


def change_json(tree, rng: random.Random, values: tuple = (), keys: tuple = ()):
    """Another tree: values and keys replaced, exchanged, moved by little, taken out or put in."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places, left = [], [tree]
        while left:
            node = left.pop()
            if isinstance(node, list):
                places += [(node, i) for i in range(len(node))]
                left += [item[1] for item in node] if isinstance(node, Pairs) else node
        if not places or rng.random() < 0.01:
            return odd_value(rng, values)
        node, i = rng.choice(places)
        holder, at = (node[i], 1) if isinstance(node, Pairs) else (node, i)
        how = rng.randrange(8)
        if how == 0:
            del node[i]
        elif how == 1:
            node.insert(rng.randrange(len(node) + 1), copy.deepcopy(node[i]))
        elif how == 2:
            other, j = rng.choice(places)
            there, j = (other[j], 1) if isinstance(other, Pairs) else (other, j)
            if not isinstance(holder[at], list) and not isinstance(there[j], list):
                holder[at], there[j] = there[j], holder[at]
        elif how == 3 and isinstance(node, Pairs):
            name = rng.choice((*keys, "a", "", "\ud800", "a" * 1000, "\n", str(rng.choice(node)[0]) + "x"))
            node[i][0] = name if rng.random() < 0.9 else rng.choice(node)[0]
        elif how == 4 and isinstance(node, Pairs) and keys:
            node.insert(i, [rng.choice(keys), odd_value(rng, values)])
        elif how == 5 and type(holder[at]) in (int, float):
            holder[at] += rng.choice((-1, 1, 2, 8, -8, 2**32))
        else:
            holder[at] = odd_value(rng, values)
    return tree


# ---- PyTorch's files by themselves

CHECKED = ("anywhere", "cut", "splice", "directory")  # of which the checksums tell
# What an attacker or a broken disk would put into a pickle, to be spliced in between opcodes.
PIECES = [
    *(bytes([code]) for code in b"()0123NRbtusae}].\x81\x85\x86\x87\x88\x89\x8f\x90\x91\x92\x93\x94\x95Qq\x00h\x01"),
    b"cos\nsystem\n",
    b"cbuiltins\neval\n",
    b"X\x04\x00\x00\x00true\x85R",
    b"j\xff\xff\xff\x7f",
    b"r\xff\xff\xff\x7f",
    b"\x8d" + b"\xff" * 8,
    b"\x8b\xff\xff\xff\x7f",
    b"\x8a\x08" + b"\xff" * 7 + b"\x7f",
    b"J\xff\xff\xff\xff",
    b"](" * 70,
    b"ccollections\nOrderedDict\n)R",
    b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"ctorch\nDoubleStorage\n",
]


def make_torch_seeds() -> list[bytes]:
    """Small files of torch.save's: state dicts, tied and strided tensors, checkpoints like NeoX's."""
    import torch

    torch.manual_seed(0)

    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    tied = torch.ones(3, 2, dtype=torch.bfloat16)
    state = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2)).state_dict()
    trees = [
        state,
        {"a": base, "t": base.t(), "s": base[1:, ::2], "e": base[:1].expand(3, 6), "one": tied, "two": tied},
        {"x": [1, 2**40, 1.5, None, True, "text", (1, (2, 3))], "p": torch.nn.Parameter(tied), "n": torch.tensor(3)},
        {
            "module": state,
            "args": argparse.Namespace(lr=0.1),
            "rng": np.random.RandomState(0).get_state(),
            "d": torch.float16,
        },
        {f"layers.{i}.weight": torch.full((2, 2), i, dtype=torch.int8) for i in range(12)},
    ]
    files = []
    for i, tree in enumerate(trees):
        for protocol in (2, 4 + i % 2):
            buffer = io.BytesIO()
            torch.save(tree, buffer, pickle_protocol=protocol)
            files.append(buffer.getvalue())
    return files


def change_torch(seed: bytes, others: list[bytes], how: str, rng: random.Random) -> bytes:
    data = bytearray(seed)
    if how == "cut":
        del data[rng.randrange(len(data)) :]
    elif how == "anywhere":
        hit(data, 0, rng)
    elif how == "splice":
        other = rng.choice(others)
        start, size = rng.randrange(len(other)), rng.choice((1, 4, 16, 64, 512))
        at = rng.randrange(len(data))
        data[at : at + rng.choice((0, size))] = other[start : start + size]
    elif how == "directory":
        hit(data, max(0, data.rfind(b"PK\x05\x06") - 900), rng)
    else:
        data = _with_pickle(seed, lambda pickle: _change_pickle(pickle, how, rng))
    return bytes(data)


def _change_pickle(pickle: bytes, how: str, rng: random.Random) -> bytes:
    data = bytearray(pickle)
    if how == "pickle":
        hit(data, 0, rng)
        return bytes(data)
    # Whole opcodes taken out, put in or moved: what remains can mostly be parsed, and is run until it goes wrong.
    starts = [position for _, _, position in pickletools.genops(pickle)]
    opcodes = [pickle[start:end] for start, end in itertools.pairwise([*starts, len(pickle)])]
    for _ in range(rng.choice((1, 1, 2, 3))):
        first = rng.randrange(1, len(opcodes))
        piece = rng.choice(([rng.choice(PIECES)], opcodes[first : first + rng.choice((1, 2, 8, 40))]))
        at = rng.randrange(1, len(opcodes))
        opcodes[at : at + rng.choice((0, 0, 1, len(piece)))] = piece
    return b"".join(opcodes)


def _with_pickle(file: bytes, change) -> bytes:
    """The same file with another data.pkl and right checksums: a check of sums must not hide what comes after it."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(file)) as source, zipfile.ZipFile(out, "w") as target:
        for name in source.namelist():
            data = source.read(name)
            target.writestr(zipfile.ZipInfo(name), change(data) if name.endswith("data.pkl") else data)
    return out.getvalue()


def _read_all(data: bytes, allow_unknown: bool) -> list:
    """What is in a file, with the bits of each tensor, to be compared."""
    values, left = [], [read_torch_file(data, allow_unknown=allow_unknown)]
    while left:
        node = left.pop()
        if isinstance(node, dict):
            values.append([*map(repr, node)])
            left += node.values()
        elif isinstance(node, (list, tuple)):
            values.append(len(node))
            left += node
        elif isinstance(node, LazyTensor):
            array = node.read()
            assert array.shape == node.shape
            assert array.nbytes <= len(data)
            values.append((array.shape, array.dtype.name, array.tobytes()))
        else:
            values.append(repr(node))
    return values


NOWHERE = Path("/nowhere")


class TorchFiles:
    """Mutated files in memory. hows: the kinds of mutations."""

    hows = (*CHECKED, "pickle", "opcodes")

    def __init__(self, folder: Path):
        self.seeds = make_torch_seeds()

    def valid(self) -> list[tuple[Callable, Path]]:
        """What reads the seeds, and where it may read."""
        return [(lambda seed=seed: _read_all(seed, True), NOWHERE) for seed in self.seeds]

    def make(self, how: str, rng: random.Random):
        """A context manager of what reads one such file, and where it may read."""
        seed, allow_unknown = rng.choice(self.seeds), rng.random() < 0.5
        data = change_torch(seed, self.seeds, how, rng)

        def read():
            values = _read_all(data, allow_unknown)
            assert how not in CHECKED or values == _read_all(seed, allow_unknown), "read wrong values"

        return contextlib.nullcontext((read, NOWHERE))


# ---- folders of a tiny model


@dataclasses.dataclass(frozen=True)
class Array:
    """An array in memory as a stored tensor."""

    array: np.ndarray

    @property
    def shape(self):
        return self.array.shape

    @property
    def dtype(self):
        return self.array.dtype

    def read(self, slices):
        return self.array[slices]


TINY = ModelConfig(
    vocab_size=12,
    hidden_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=16,
    rotary_pct=0.5,
    max_position_embeddings=16,
)


def tiny_model(dtype=np.float32, **fields) -> StoredModel:
    config, rng = dataclasses.replace(TINY, **fields), np.random.default_rng(0)
    shapes = expected_shapes(config)
    return StoredModel(config, {k: Array(rng.standard_normal(v).astype(dtype)) for k, v in shapes.items()}, "tiny")


@dataclasses.dataclass(frozen=True)
class Link:
    """A symbolic link, as what a folder has under a name."""

    target: str


PIPE, FOLDER = object(), object()
Entry = bytes | Link | object | None


def put(path: bytes, entry: Entry) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if isinstance(entry, bytes):
        with open(path, "wb") as file:
            file.write(entry)
    elif isinstance(entry, Link):
        os.symlink(entry.target, path)
    elif entry is PIPE:
        os.mkfifo(path)
    else:
        os.makedirs(path, exist_ok=True)


def take(path: bytes) -> None:
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    elif os.path.lexists(path):
        os.unlink(path)


def list_files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Seed:
    """A model's folder, which is on disk as it is, and changed for a moment; outside/ beside it is not to be opened."""

    def __init__(self, folder: Path, files: dict[str, Entry], read: Callable, outside: dict[str, Entry] = ()):
        self.folder, self.files, self._read = folder / "model", files, read
        for name, entry in files.items():
            put(os.fsencode(self.folder / name), entry)
        for name, entry in dict(outside).items():
            put(os.fsencode(folder / "outside" / name), entry)
        model = read(self.folder)
        self.config, self.values = model.config, {name: whole(tensor) for name, tensor in model.tensors.items()}

    @contextlib.contextmanager
    def changed(self, changes: dict[str, Entry], *, same_values: bool):
        """Gives what reads the folder, and the folder, with other entries under some names; None takes one out.

        same_values: what is read must have the values of the seed, wherever their meaning is the same.
        """
        paths = {name: os.path.join(os.fsencode(self.folder), os.fsencode(name)) for name in changes}
        try:
            for name, entry in changes.items():
                take(paths[name])
                if entry is not None:
                    put(paths[name], entry)
            yield lambda: self.check(self._read(self.folder), same_values), self.folder
        finally:
            for path in paths.values():
                take(path)
            for name in self.files.keys() & changes.keys():
                put(paths[name], self.files[name])

    def check(self, model: StoredModel, same_values: bool) -> None:
        """Reads everything. Raises: AssertionError where it is inconsistent, or not what is in the folder."""
        config = model.config
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            assert type(value) in ((int, float) if field.type is float else (field.type,)), (field.name, value)
            assert type(value) is not float or 0 <= value < math.inf, (field.name, value)
        wanted = expected_shapes(config)
        assert model.tensors.keys() == wanted.keys()
        rows = place_of(config)
        for name, tensor in model.tensors.items():
            array = whole(tensor)
            assert array.shape == tensor.shape == wanted[name], name
            assert array.dtype == tensor.dtype, name
            is_same = how_held(rows[name][0], config) == how_held(rows[name][0], self.config)
            if same_values and is_same:  # a vocabulary may have more or fewer rows
                num_rows = min(len(array), len(self.values[name]))
                assert array[:num_rows].tobytes() == self.values[name][:num_rows].tobytes(), f"wrong values of {name}"
        assert all(path.is_relative_to(self.folder) for path in model.files)


CONFIG_KEYS = (
    *(field.name for field in dataclasses.fields(ModelConfig)),
    *("model_type", "rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor", "rope_type", "type"),
    *("num_key_value_heads", "quantization_config", "auto_map", "torch_dtype", "a", ""),
)


class Configs:
    """config.json beside weights that are as they were."""

    hows = ("bytes", "structure")

    def __init__(self, folder: Path):
        self.seeds = []
        for i, fields in enumerate(({}, {"tie_word_embeddings": True, "attention_bias": False})):
            save_hf(tiny_model(**fields), folder / "made")
            self.seeds.append(Seed(folder / str(i), list_files(folder / "made"), read_hf))
            shutil.rmtree(folder / "made")

    def valid(self) -> list[tuple[Callable, Path]]:
        return [(lambda seed=seed: seed.check(read_hf(seed.folder), True), seed.folder) for seed in self.seeds]

    def make(self, how: str, rng: random.Random):
        seed = rng.choice(self.seeds)
        text = seed.files[CONFIG]
        if how == "bytes":
            data = change_bytes(text, [text], rng)
        else:
            data = dump(change_json(parse(text), rng, ("gelu_fast", "gpt_neox", "normal"), CONFIG_KEYS)).encode()
        return seed.changed({CONFIG: data}, same_values=True)


class Safetensors:
    """model.safetensors."""

    hows = ("bytes", "header", "length", "structure", "values")

    def __init__(self, folder: Path):
        self.seeds = []
        for i, dtype in enumerate((np.float32, np.float16)):
            save_hf(tiny_model(dtype), folder / "made")
            self.seeds.append(Seed(folder / str(i), list_files(folder / "made"), read_hf))
            shutil.rmtree(folder / "made")

    valid = Configs.valid

    def make(self, how: str, rng: random.Random):
        seed = rng.choice(self.seeds)
        file = seed.files[WEIGHTS]
        size = int.from_bytes(file[:8], "little")
        header, rest = file[8 : 8 + size], file[8 + size :]
        if how == "bytes":
            data = change_bytes(file, [other.files[WEIGHTS] for other in self.seeds], rng)
        elif how == "header":
            changed = bytearray(file)
            hit(changed, 8, rng, 8 + size)
            data = bytes(changed)
        elif how == "length":
            other = rng.choice((size + rng.randrange(-9, 9), rng.choice((0, 1, 2, 7)), 1 << rng.randrange(64)))
            data = max(other, 0).to_bytes(8, "little") + file[8:]
        elif how == "values":
            changed = bytearray(file)
            hit(changed, 8 + size, rng)
            data = bytes(changed)
        else:
            names = (*(pair[0] for pair in parse(header)), "dtype", "shape", "data_offsets", "__metadata__")
            values = ("F64", "F16", "BF16", "BOOL", "U8", "F8_E4M3", "F4", "C64", [0, 4], [4, 4], [4, 0], [2**62, 0])
            text = dump(change_json(parse(header), rng, values, names)).encode("utf-8", "surrogatepass")
            text += b" " * (-len(text) % 8)
            data = len(text).to_bytes(8, "little") + text + rest
        return seed.changed({WEIGHTS: data}, same_values=False)


class Indexes:
    """The index of shards that are as they were, or have changed places; pipes, links and folders lie beside them."""

    hows = ("bytes", "structure", "paths", "shards")

    def __init__(self, folder: Path):
        special = {"pipe": PIPE, "dir/x": b"", "zero": Link("/dev/zero"), "loop": Link("loop"), "gone": Link("absent")}
        self.seeds = []
        for kind in ("safetensors", "torch"):
            model = tiny_model()
            save_hf(model, folder / "made", max_shard_bytes=1200)
            files = list_files(folder / "made")
            shutil.rmtree(folder / "made")
            if kind == "torch":
                files = self._as_torch(files, model, folder)
            shards = [name for name in files if "-of-" in name]
            outside = {name: files[name] for name in shards}
            link = {"link": Link(f"../outside/{shards[0]}"), shards[-1] + ".copy": files[shards[-1]]}
            self.seeds.append(Seed(folder / kind, {**files, **special, **link}, read_hf, outside))

    @staticmethod
    def _as_torch(files: dict, model: StoredModel, folder: Path) -> dict:
        index = json.loads(files.pop(INDEX))
        names = {shard: shard.replace("safetensors", "bin") for shard in files if "-of-" in shard}
        weight_map = {key: names[shard] for key, shard in index["weight_map"].items()}
        for shard, name in names.items():
            del files[shard]
            held = {key: model.tensors[key].array for key in weight_map if weight_map[key] == name}
            save_torch_file(folder / "made.bin", held)
            files[name] = (folder / "made.bin").read_bytes()
        (folder / "made.bin").unlink()
        files["pytorch_model.bin.index.json"] = json.dumps({"weight_map": weight_map}).encode()
        return files

    valid = Configs.valid

    def make(self, how: str, rng: random.Random):
        seed = rng.choice(self.seeds)
        index = next(name for name in seed.files if name.endswith(".index.json"))
        shards = tuple(name for name in seed.files if "-of-" in name)
        text, changes, is_same = seed.files[index], {}, True
        if how == "bytes":
            changes[index] = change_bytes(text, [text], rng)
        elif how == "shards":
            for _ in range(rng.choice((1, 1, 2))):
                name, other, of_bytes = rng.choice(shards), rng.choice(shards), rng.choice(TorchFiles.hows)
                if name.endswith(".bin"):
                    data = change_torch(seed.files[name], [text], of_bytes, rng)
                else:
                    data = change_bytes(seed.files[name], [text], rng)
                is_same = is_same and name.endswith(".bin") and of_bytes in CHECKED
                links = map(Link, (f"../outside/{other}", name, other, "/dev/zero", "/dev/null"))
                changes[name] = rng.choice((*[data] * 5, seed.files[other], b"", None, PIPE, FOLDER, *links))
        elif how == "paths":
            tree, name = parse(text), rng.choice(shards)
            weight_map = next(value for key, value in tree if key == "weight_map")
            # fmt: off
            odd = (
                *(f"../outside/{name}", f"{seed.folder.parent}/outside/{name}", f"../model/{name}", f"./{name}"),
                *(f"{name}.copy", f"{name}/", name.upper(), f"..\\outside\\{name}", f"..\u2215outside\u2215{name}"),
                *(f"..\uff0f{name}", f"{name}\n", f"{name} ", f"{name}\0", f"\u202e{name}", f"~/{name}", "a" * 300),
                *("a" * 100_000, *shards, index, "file:///dev/zero", "//dev/zero"),
                *(".", "..", "", "/", "\0", "\ud800", "\x1b[31m", "$HOME", "/dev/stdin"),
                *("dir", "dir/x", "pipe", "zero", "loop", "gone", "link", "con", "/proc/self/mem", CONFIG),
            )
            # fmt: on
            value = rng.choice(odd)
            for pair in weight_map if rng.random() < 0.2 else rng.sample(weight_map, rng.choice((1, 1, 2))):
                if rng.random() < 0.5 or pair[1] == name:
                    pair[1] = value
            changes[index] = dump(tree).encode()
        else:
            tree = parse(text)
            keys = tuple(pair[0] for pair in next(value for key, value in tree if key == "weight_map"))
            changes[index] = dump(change_json(tree, rng, (*shards, *keys), (*keys, "weight_map", "metadata"))).encode()
        return seed.changed(changes, same_values=is_same)


# ---- NeoX checkpoints

BOMB = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in itertools.pairwise("abcdefghi")
)
MERGES = "a: &a {x: 1}\n" + "".join(
    f"{b}: &{b} {{<<: [{', '.join([f'*{a}'] * 10)}], {b}: 1}}\n" for a, b in itertools.pairwise("abcdefgh")
)
# fmt: off
# CANARY is replaced by the name of a file.
YAML_VALUES = (
    *r"""
&a [1]|*a|&a [*a]|!!python/name:os.system ''|!!python/module:os ''|!!python/tuple [1]|!!python/object:os.x {}
!!python/object/apply:os.system ['touch CANARY']|!!python/object/new:os.system ['touch CANARY']|!!x y|!<x> y|!!binary x
!!binary ''|!!timestamp foo|2001-99-99|2001-12-14 21:59:43.10 -5|2001-12-14|!!int foo|!!int ''|!!float x|!!float ''
!!bool maybe|!!null x|!!set {a, b}|!!omap [a: 1]|!!pairs [a: 1]|!!map [1]|!!seq {a: 1}|!!str {a: 1}|!!omap [1]|!!set [1]
1:59:59|1:59:59.5|0o7|010|1_000|0x|1e999|.inf|-.inf|.nan|~|yes|None|True|-1|1e-5|'1e-5'|relu|swiglu|rotary|a: b|@|`|=
<<|{[1]: 2}|{{a: 1}: 2}|? [a]|{? a}|"\ud800"|"\x1b[2J"|"\0"|"\u2028"|{<<: 1}|{<<: {a: 1}}|{<<: [{a: 1}, {b: 2}]}
{<<: [1]}|{1: 2, 1: 3}|{1: 2, 1.0: 3}|{2001-12-14: 1}|{.nan: 1}|[[[global], 1]]|[[[global, local], 1]]|[[global]]
""".strip().replace("\n", "|").split("|"),
    *("0x" + "f" * 5000, "0b" + "1" * 5000, "9" * 5000, "1:" * 500 + "1", "1:" * 500 + "1.5", "\t", "|\n  x\n", ">\n"),
    *("[" * 2000, "[" * 400 + "]" * 400, "[" * 2000 + "]" * 2000, "{a: " * 300 + "1" + "}" * 300, "'a\n\n  b'", ""),
)
YAML_LINES = (
    *(BOMB, MERGES, f"{BOMB}attention_config: *i\n", "--- {}\n", "...\n", "%YAML 9.9\n---\n", "%TAG ! x:y\n---\n"),
    *("\ufeff", "\0", "\x1b", "- a\n", "? x\n", "? [x]\n: 1\n", "num-layers: 1\n", "num_layers: 1\n", "<<: {a: 1}\n"),
    *("- " * 1500 + "a\n", "a: 1\na: 1\n", "".join(f"k{i}: {i}\n" for i in range(2000))),
    "".join(f"{i * (2**61 - 1)}: 1\n" for i in range(500)),  # hashes that collide
)
NEOX_KEYS = """
num_layers num-layers hidden_size num_attention_heads model_parallel_size pos_emb norm activation rotary_pct geglu a
rotary_emb_base max_position_embeddings seq_length gpt_j_residual no_weight_tying bias_gelu_fusion openai_gelu
gpt_j_tied attention_config num_kv_heads intermediate_size layernorm_epsilon use_bias_in_attn_linear moe_num_experts
sliding_window_width use_bias_in_norms
""".split()
EXTRA_NAMES = "vocab_size hidden_act bos_token_id eos_token_id init_method vocab_multiple x hidden_size".split()
LAYER_NUMBERS = "00 01 02 03 04 05 06 99 999 9999 99999 000 0002 \u0662\u0662".split()
RANK_NUMBERS = "00 00 01 02 10 99 999 1000 000 \u0660\u0660".split()
OF_LATEST = (
    *(b"", b"global_step8", b"global_step7/../..", b"../outside", b"/", b"\0", b"global_step7\0", b"\xff" * 300, None),
    *(b"global_step" + b"9" * 300, "global_step\u0667".encode(), b"global_step7\nglobal_step8", b"\x1b[2J"),
    *(PIPE, FOLDER, Link("latest"), Link("/dev/zero"), Link("/dev/null")),
)
# fmt: on


class Neox:
    """NeoX checkpoints: latest, YAML, neox_jax.json, and the names and contents of files."""

    hows = ("latest", "yaml bytes", "yaml values", "yaml lines", "extras", "names", "contents", "tensors")

    def __init__(self, folder: Path):
        self.seeds, self.canary = [], str(folder / "canary")
        kinds = [(1, "layers", {}), (2, "layers", {"use_parallel_residual": False}), (2, "ranks", {})]
        for i, (num_ranks, layout, fields) in enumerate(kinds):
            save_neox(tiny_model(**fields), folder / "made", tensor_parallel=num_ranks, step=7)
            if layout == "ranks":
                self._to_ranks(folder / "made" / "global_step7", num_ranks)
            self.seeds.append(Seed(folder / str(i), list_files(folder / "made"), read_neox))
            shutil.rmtree(folder / "made")

    @staticmethod
    def _to_ranks(step: Path, num_ranks: int) -> None:
        """Turns the pipeline layout into the sequential one."""
        for rank in range(num_ranks):
            module = {}
            for path in step.glob(f"layer_*-model_{rank:02d}-model_states.pt"):
                number = int(path.name[6:8])
                module |= {f"sequential.{number}.{name}": t.read() for name, t in read_torch_file(path).items()}
                path.unlink()
            save_torch_file(step / f"mp_rank_{rank:02d}_model_states.pt", {"module": module, "iteration": 7})

    def valid(self) -> list[tuple[Callable, Path]]:
        return [(lambda seed=seed: seed.check(read_neox(seed.folder), True), seed.folder) for seed in self.seeds]

    def make(self, how: str, rng: random.Random):
        seed = rng.choice(self.seeds)
        step = "global_step7/"
        yaml_name, extras_name = f"{step}{CONFIGS}/config.yml", f"{step}{CONFIGS}/{EXTRAS}"
        weights = sorted(name for name in seed.files if name.endswith("model_states.pt"))
        text, changes, is_same = seed.files[yaml_name], {}, how not in ("names", "tensors")
        if how == "latest":
            changes[LATEST] = rng.choice((*OF_LATEST, change_bytes(seed.files[LATEST], [text], rng)))
            if rng.random() < 0.3:
                name = rng.choice(("global_step8", "global_step\u0667", "global_step", "global_step-1", "global_stepx"))
                changes[name] = rng.choice((FOLDER, b"", Link("global_step7"), Link("..")))
        elif how == "yaml bytes":
            changes[yaml_name] = change_bytes(text, [text], rng)
        elif how == "yaml values":
            tree = change_json(parse(text), rng, tuple(map(Raw, YAML_VALUES)), NEOX_KEYS)
            changes[yaml_name] = dump(tree).replace("CANARY", self.canary).encode()
        elif how == "yaml lines":
            lines = [f"{key}: {dump(value)}\n" for key, value in parse(text)]
            for _ in range(rng.choice((1, 1, 2))):
                line = rng.choice((*YAML_LINES, f"{rng.choice(NEOX_KEYS)}: {rng.choice(YAML_VALUES)}\n"))
                lines.insert(rng.randrange(len(lines) + 1), line)
            encoding = rng.choice(("utf-8", "utf-8", "utf-8", "utf-8", "utf-16", "latin-1"))
            name = rng.choice((yaml_name, yaml_name, f"{step}{CONFIGS}/more.json", f"{step}other.yaml"))
            data = rng.choice(("".join(lines), lines[0])).replace("CANARY", self.canary)
            changes[name] = data.encode(encoding, "replace")
        elif how == "extras":
            extras = seed.files[extras_name]
            other = dump(change_json(parse(extras), rng, ("gelu_fast", "normal"), EXTRA_NAMES)).encode()
            changes[extras_name] = rng.choice((other, other, other, change_bytes(extras, [text], rng)))
        elif how == "names":
            for _ in range(rng.choice((1, 1, 2, 3))):
                name = rng.choice(weights)
                number, rank = rng.choice(LAYER_NUMBERS), rng.choice(RANK_NUMBERS)
                new = rng.choice((
                    *(f"layer_{number}-model_{rank}-model_states.pt", f"mp_rank_{rank}_model_states.pt"),
                    *(name.removeprefix(step), f"{name.removeprefix(step)}\n", rng.choice(weights).removeprefix(step)),
                    *("x.yml", f"{CONFIGS}/y.yml", f"{CONFIGS}/\udcff.yml", "\udcff_model_states.pt"),
                    f"zero_pp_rank_0_mp_rank_{rank}_optim_states.pt",
                ))  # fmt: skip
                data = seed.files[name]
                if rng.random() < 0.5:
                    changes[name] = None
                changes[step + new] = rng.choice(
                    (data, data, data, b"", PIPE, FOLDER, Link("/dev/zero"), Link("absent"))
                )
        elif how == "contents":
            name, of_bytes = rng.choice(weights), rng.choice(TorchFiles.hows)
            changes[name] = change_torch(seed.files[name], [seed.files[other] for other in weights], of_bytes, rng)
            is_same = of_bytes in CHECKED
            if rng.random() < 0.2:
                changes[name], is_same = rng.choice((seed.files[rng.choice(weights)], b"", None)), False
        else:
            name = rng.choice(weights)
            changes[name] = self._change_tensors(seed, name, rng)
        return seed.changed(changes, same_values=is_same)

    @staticmethod
    def _change_tensors(seed: Seed, name: str, rng: random.Random) -> bytes:
        """Another file that is well formed: tensors and other values under names that are right or nearly so."""
        tree = read_torch_file(seed.files[name])
        module = tree["module"] if isinstance(tree.get("module"), dict) else tree
        keys = [*module, "module", "norm.weight", "final_linear.weight", "a", "", "\n", "a" * 10_000, 1, None]
        keys += [f"sequential.{name}" for name in ("0.word_embeddings.weight", "00.word_embeddings.weight", "9999.a")]
        keys += ["attention.rotary_emb.inv_freq"]
        keys += [str(key).replace(*pair) for key in module for pair in MLP_NAMES["linear"].items()]
        shape = rng.choice(((), (0,), (8,), (8, 8), (0, 8), (1 << 40, 0), (12, 8), (3, 0, 2)))
        other = np.ones(shape, rng.choice(("f4", "f2", "i8", "?")))
        for _ in range(rng.choice((1, 1, 2, 3))):
            held = rng.choice((tree, module, module))
            key, values = rng.choice(keys), [*module.values()]
            if rng.random() < 0.3:
                held.pop(key, None)
            else:
                held[key] = rng.choice((*values, other, other, None, 1, "a", [], {}, (1, 2)))
        tree = rng.choice((tree,) * 8 + ([], other, {"module": tree}, None))
        path = seed.folder.parent / "made.pt"
        save_torch_file(path, tree)
        data = path.read_bytes()
        path.unlink()
        return data


KINDS = {"torch": TorchFiles, "index": Indexes, "safetensors": Safetensors, "config": Configs, "neox": Neox}


# ---- trying


class Late(BaseException):
    """MAX_SECONDS are over. No Exception, which somebody would take for a damaged file."""


FORBIDDEN = ("open", "import", "exec", "compile", "os.", "subprocess.", "socket.", "shutil.", "ctypes.", "pickle.")
LISTING = ("os.listdir", "os.scandir")
_folder: str | None = None  # what may be read, while something is watched
_seen: list[str] = []


def _watch(event: str, args) -> None:
    if _folder is None or not event.startswith(FORBIDDEN):
        return
    if event in ("open", *LISTING) and isinstance(args[0], (str, bytes)):
        path = os.path.normpath(os.fsdecode(args[0]))
        is_inside = path == _folder or path.startswith(_folder + os.sep)
        if is_inside and (event != "open" or not args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
            return
    _seen.append(f"{event} {ascii(args)[:200]}")


sys.addaudithook(_watch)


def _stop(*_):
    raise Late


def attempt(read: Callable, folder: Path) -> str:
    """Calls it: "read", "refused", or what is wrong with us. folder: where it may read files."""
    global _folder
    _seen.clear()
    before, start = signal.signal(signal.SIGPROF, _stop), time.process_time()
    signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS)
    _folder = str(folder)
    try:
        read()
        result = "read"
    except InputError as error:
        message = str(error)
        is_plain = message.isprintable() and len(message) < MAX_MESSAGE
        result = "refused" if is_plain else f"a message that is not one line, or long: {ascii(message)[:200]}"
    except (Exception, Late) as error:
        _folder = None  # the traceback's files are read
        where = traceback.extract_tb(error.__traceback__)[-1]
        result = f"{type(error).__name__}: {ascii(str(error))[:200]}; {where.filename}:{where.lineno}"
    finally:
        _folder = None
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
    if _seen:
        return f"did {_seen[0]}"
    seconds = time.process_time() - start
    return f"took {seconds:.1f} s" if result in ("read", "refused") and seconds > MAX_SECONDS else result


class Fuzzer:
    """The seeds of some kinds in a new folder inside of one; a context manager."""

    def __init__(self, kinds: list[str], inside: Path):
        self.folder = Path(tempfile.mkdtemp(dir=inside))
        # Tracing the same model again is half of the time, and not what is tried here.
        self._abstract_model = stored.abstract_model
        stored.abstract_model = functools.lru_cache(64)(stored.abstract_model)
        self.kinds = {}
        for kind in kinds:
            (self.folder / kind).mkdir()
            self.kinds[kind] = KINDS[kind](self.folder / kind)
        for made in self.kinds.values():
            for read, folder in made.valid():
                attempt(read, folder)  # imports what is imported late
                result = attempt(read, folder)
                assert result == "read", result
        self._entries = self._list()

    def __enter__(self) -> "Fuzzer":
        return self

    def __exit__(self, *_) -> None:
        stored.abstract_model = self._abstract_model
        shutil.rmtree(self.folder)

    def _list(self) -> set[str]:
        return {*os.listdir(self.folder)}.union(*(os.listdir(self.folder / kind) for kind in self.kinds))

    def try_one(self, seed: int, index: int) -> tuple[str, str, str]:
        """(kind, how, result) of a file that these two numbers make."""
        rng = random.Random(f"{seed}/{index}")
        kind = rng.choice([*self.kinds])
        made = self.kinds[kind]
        how = rng.choice(made.hows)
        with made.make(how, rng) as (read, folder):
            result = attempt(read, folder)
        if self._list() != self._entries:
            result = f"made {self._list() - self._entries}"
            self._entries = self._list()
        return kind, how, result

    def run(self, *, seed: int, first: int, stride: int, end: int, seconds_limit: float, report=None):
        """Tries files first, first+stride, ...: (Counter of (kind, how, result), list of (file, kind, how, defect)).

        report: called with the number of the next file, before it, and now and then with what has been found so far.
        """
        counts, defects, start = collections.Counter(), [], time.perf_counter()
        for done, index in enumerate(range(first, end, stride)):
            if report is not None and report(index, counts, defects, done % REPORT_EVERY == 0):
                counts, defects = collections.Counter(), []
            kind, how, result = self.try_one(seed, index)
            is_known = result in ("read", "refused")
            counts[kind, how, result if is_known else "defect"] += 1
            if not is_known:
                defects.append((index, kind, how, result))
            if time.perf_counter() - start > seconds_limit:
                break
        return counts, defects


# ---- in processes of their own, which may die


def _work(kinds, inside, options, at, channel) -> None:
    def report(index, counts, defects, now):
        at.value = index
        if now:
            channel.send((counts, defects))
        return now

    with Fuzzer(kinds, inside) as fuzzer:
        with open("/proc/self/statm") as file:
            in_use = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (in_use + MEMORY_BYTES, in_use + MEMORY_BYTES))
        channel.send(fuzzer.run(**options, report=report))
        channel.send((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, None))


class Worker:
    """One process, started again behind a file on which it died or stood still."""

    def __init__(self, kinds: list[str], inside: Path, options: dict):
        self.kinds, self.inside, self.options = kinds, inside, options
        self.counts, self.defects, self.is_done, self.peak_mib = collections.Counter(), [], False, 0
        self.deadline = time.perf_counter() + options["seconds_limit"]
        self._start(options["first"])

    def _start(self, first: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._at, self._moved = context.Value("q", -1, lock=False), time.perf_counter()
        self._last = -1
        self._channel, theirs = context.Pipe(duplex=False)
        options = {**self.options, "first": first, "seconds_limit": max(0.0, self.deadline - time.perf_counter())}
        self._process = context.Process(
            target=_work, args=(self.kinds, self.inside, options, self._at, theirs), daemon=True
        )
        self._process.start()
        theirs.close()

    def look(self) -> None:
        """Takes what it has found, and starts it again where it has died or stands still."""
        exitcode = self._process.exitcode  # before the last is taken
        with contextlib.suppress(EOFError):
            while self._channel.poll():
                counts, defects = self._channel.recv()
                if defects is None:
                    self.is_done, self.peak_mib = True, counts
                else:
                    self.counts.update(counts)
                    self.defects += defects
        now = time.perf_counter()
        if self._at.value != self._last:
            self._last, self._moved = self._at.value, now
        is_stuck = now - self._moved > (HANG_SECONDS if self._last >= 0 else START_SECONDS)
        if self.is_done or not (is_stuck or exitcode is not None):
            return
        if self._last < 0:
            raise RuntimeError(f"a process ended by {exitcode} before its first file")
        self._process.kill()
        self._process.join()
        what = "stood still" if is_stuck else f"died by {exitcode}"
        self.defects.append((self._last, "any", "any", what))
        self._start(self._last + self.options["stride"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", default=",".join(KINDS), help="which to make (%(default)s)")
    parser.add_argument("--files", type=int, default=200_000, help="how many to make (%(default)s)")
    parser.add_argument("--first", type=int, default=0, help="number of the first file, to see one again")
    parser.add_argument("--seed", type=int, default=1, help="the same seed makes the same files (%(default)s)")
    parser.add_argument("--processes", type=int, default=1, help="how many share the files (%(default)s)")
    parser.add_argument("--seconds-limit", type=float, default=600, help="to stop before the last (%(default)s)")
    args = parser.parse_args()
    kinds = args.kinds.split(",")
    if args.processes < 1 or not set(kinds) <= KINDS.keys():
        parser.error(f"--processes must be 1 or more, --kinds some of {', '.join(KINDS)}")
    start = time.perf_counter()
    options = {"seed": args.seed, "stride": args.processes, "end": args.first + args.files}
    options["seconds_limit"] = args.seconds_limit
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=memory if memory.is_dir() else None) as inside:
        workers = [Worker(kinds, Path(inside), {**options, "first": args.first + i}) for i in range(args.processes)]
        while not all(worker.is_done for worker in workers):
            time.sleep(0.05)
            for worker in workers:
                worker.look()
    seconds = time.perf_counter() - start
    counts = sum((worker.counts for worker in workers), collections.Counter())
    defects = sorted(defect for worker in workers for defect in worker.defects)
    for index, kind, how, defect in defects:
        print(f"DEFECT --kinds {args.kinds} --seed {args.seed} --first {index} --files 1 ({kind}, {how}): {defect}")
    for (kind, how, result), count in sorted(counts.items()):
        print(f"{kind:12} {how:12} {result:8} {count:9,}")
    total = counts.total()
    summary = {"files": total, "seconds": round(seconds, 1), "files_per_second": round(total / seconds)}
    peak = max(worker.peak_mib for worker in workers)
    print(json.dumps({**summary, "defects": len(defects), "seed": args.seed, "peak_rss_mib": peak}))
    return 1 if defects else 0


if __name__ == "__main__":
    sys.exit(main())
