"""PyTorch's .bin and .pt files (the zip format of torch >= 1.6), read and written without PyTorch.

A file like this is a pickle, which is a program (`torch_pickle`), in a zip (`torch_zip`). Nothing that a file names is
looked up, imported or called. Every bound (members, offsets, shapes) is checked before anything of that size is made,
so that memory stays within a small multiple of the file and what can be wrong with a file is an InputError.
Cases known to go wrong elsewhere: CVE-2025-32434 (code in a "weights only" load), CVE-2026-24747 (a storage shorter
than declared; SETITEM on what is no dict).
"""

import collections
import contextlib
import dataclasses
import io
import math
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from neox_jax.convert.byte_reader import ByteReader, FileReader
from neox_jax.convert.byte_writer import LargeFiles
from neox_jax.convert.lazy_tensor import LazyTensor, contiguous_strides, cut
from neox_jax.convert.torch_pickle import STORAGES, Ordered, Unknown, read_pickle
from neox_jax.convert.torch_zip import RESAVE, Member, ZipWriter, read_directory
from neox_jax.disk import sync

__all__ = ["LazyTensor", "Unknown", "read_torch_file", "save_torch_file"]
MAX_PICKLE_BYTES = 64 << 20


def read_torch_file(source: str | Path | bytes, *, allow_unknown: bool = False):
    """What was saved in a .bin or .pt file, or in the bytes of one; a tensor is read when it is asked for.

    Returns a tree of dict, list, tuple, str, int, float, bool, None, bytes, `LazyTensor` and `Unknown`; a torch.Size is
    a tuple there, a torch.device and a dtype are str ("cpu", "torch.float16"). A storage is compared with its checksum
    at the first read of a tensor in it, which a damaged file does not survive.
    allow_unknown: what is no tensor or plain value (argparse.Namespace, numpy's RNG state, in a mp_rank_* file) becomes
    an `Unknown`; otherwise the file is refused.
    Raises: InputError, and nothing else, for whatever may be wrong with the file.
    """
    reader = ByteReader(source) if isinstance(source, bytes) else FileReader(Path(source))
    root, members = read_directory(reader)
    names = {name.removeprefix(f"{root}/"): member for name, member in members.items()}
    data = _read_data(reader, names)
    storages = {name.removeprefix("data/"): part for name, part in names.items() if name.startswith("data/")}
    return read_pickle(data, reader, storages, allow_unknown=allow_unknown)


def _read_data(reader: ByteReader, names: dict[str, Member]) -> bytes:
    """The bytes of data.pkl, from a file that is of tensors and little-endian."""
    if "constants.pkl" in names or any(name.startswith("code/") for name in names):
        reader.refuse("is a TorchScript archive; save its weights: torch.save(torch.jit.load(OLD).state_dict(), NEW)")
    if "data.pkl" not in names:
        reader.refuse(f"is a zip file without data.pkl; wanted one of torch.save's; {RESAVE}")
    small = {"data.pkl": MAX_PICKLE_BYTES, "byteorder": 16}  # torch < 2.1 wrote no byteorder
    found = {}
    for name in small.keys() & names.keys():
        num_bytes = names[name].num_bytes
        if num_bytes > small[name]:
            reader.refuse(f"{name} has {num_bytes} bytes, wanted at most {small[name]}; {RESAVE}")
        found[name] = bytes(names[name].read(0, num_bytes))
    order = found.get("byteorder", b"little")
    if order != b"little":
        reader.refuse(f"byte order is {order!r}, wanted b'little'; re-save it on a little-endian machine")
    return found["data.pkl"]


def save_torch_file(path: str | Path, tree) -> None:
    """Writes what `torch.load(path, weights_only=True)` reads, under another name until all of it is on disk.

    tree: of dict, list, tuple, str, int, float, bool, None, numpy arrays, and objects with shape, dtype and
    blocks() -> arrays, which one after the other are its elements in C order: no more than a block is held. An object
    that is there twice is stored once, as tied weights.
    Raises: TypeError for anything else in it.
    """
    path = Path(os.path.abspath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with LargeFiles() as files, files.create(partial) as file, TorchWriter(file, tree) as writer:
            for tensor in writer.tensors:
                with writer.next_tensor() as member:
                    for chunk in _chunks(tensor):
                        member.write(chunk)
        sync(partial)
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            partial.unlink()
        raise
    sync(path.parent)


@dataclasses.dataclass(frozen=True, eq=False)
class TensorSpec:
    """A tensor that is written by somebody else."""

    shape: tuple[int, ...]
    dtype: np.dtype


class TorchWriter:
    """Writes a file as `save_torch_file` does, into something with a `write`, but for its tensors, which come from
    outside: for each of `tensors`, in order, all of its bytes (C order, little-endian) in `next_tensor()`."""

    def __init__(self, file, tree):
        """tree: as for `save_torch_file`; `TensorSpec`s too. Raises: TypeError."""
        pickler = _Pickler()
        data = pickler.dump(tree)
        self.tensors, self._num_written, self._zip = pickler.tensors, 0, ZipWriter(file)
        self._write("data.pkl", data)
        self._write("byteorder", b"little")

    def _write(self, name: str, data: bytes) -> None:
        with self._zip.member(name, len(data)) as member:
            member.write(data)

    def __enter__(self) -> "TorchWriter":
        return self

    def __exit__(self, kind, *rest) -> None:
        with self._zip:
            if kind is None:
                assert self._num_written == len(self.tensors), "tensors have not been written"
                self._write("version", b"3\n")

    @contextlib.contextmanager
    def next_tensor(self):
        """Something with a `write`. Raises: ValueError where more or less is written than the tensor has."""
        tensor = self.tensors[self._num_written]
        num_bytes = math.prod(tensor.shape) * np.dtype(tensor.dtype).itemsize
        with self._zip.member(f"data/{self._num_written}", num_bytes) as member:
            self._num_written += 1
            yield member


def _chunks(tensor) -> Iterator[memoryview]:
    """The tensor's bytes, little-endian, in pieces. Raises: ValueError if its blocks are of another type or size."""
    dtype, left = np.dtype(tensor.dtype), math.prod(tensor.shape)
    is_array = isinstance(tensor, np.ndarray)
    for block in (tensor[part] for part in cut(tensor.shape, dtype.itemsize)) if is_array else tensor.blocks():
        left -= block.size
        if block.dtype != dtype or left < 0:
            raise ValueError(f"a block of {block.dtype} {block.shape} in a tensor of {dtype} {tuple(tensor.shape)}")
        yield np.ascontiguousarray(block, dtype.newbyteorder("<")).reshape(-1).view(np.uint8).data
    if left:
        raise ValueError(f"{left} elements are missing in a tensor of {dtype} {tuple(tensor.shape)}")


class _Pickler:
    """Writes a tree as a pickle of protocol 2, torch's, and lists the tensors in it, in the order of their keys."""

    def __init__(self):
        self.tensors, self.keys, self.out = [], {}, io.BytesIO()
        self.storage_names = {dtype: name for name, dtype in STORAGES.items()}

    def dump(self, tree) -> bytes:
        self.out.write(b"\x80\x02")
        self.value(tree)
        self.out.write(b".")
        return self.out.getvalue()

    def value(self, value) -> None:
        write = self.out.write
        if value is None or isinstance(value, bool):
            write({None: b"N", True: b"\x88", False: b"\x89"}[value])
        elif type(value) is int:
            self.integer(value)
        elif type(value) is float:
            write(b"G" + struct.pack(">d", value))
        elif type(value) is str:
            text = value.encode("utf-8")
            write(b"X" + struct.pack("<I", len(text)) + text)
        elif isinstance(value, dict):
            self.dictionary(value)
        elif type(value) in (list, tuple):
            write(b"](" if type(value) is list else b"(")
            for item in value:
                self.value(item)
            write(b"e" if type(value) is list else b"t")
        elif isinstance(value, np.ndarray | TensorSpec) or (hasattr(value, "dtype") and hasattr(value, "blocks")):
            self.tensor(value)
        else:
            raise TypeError(f"a {type(value).__name__} cannot be saved; wanted arrays and plain values")

    def integer(self, value: int) -> None:
        if -(1 << 31) <= value < 1 << 31:
            self.out.write(b"J" + struct.pack("<i", value))
        else:
            raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
            if len(raw) > 32:
                raise TypeError("a number of more than 256 bits cannot be saved")
            self.out.write(b"\x8a" + bytes([len(raw)]) + raw)

    def dictionary(self, value: dict) -> None:
        ordered = isinstance(value, collections.OrderedDict | Ordered)
        self.out.write(b"ccollections\nOrderedDict\n)R(" if ordered else b"}(")
        for key, item in value.items():
            if type(key) not in (str, int, bool, type(None)):
                raise TypeError(f"a dict key of type {type(key).__name__} cannot be saved; wanted str or int")
            self.value(key)
            self.value(item)
        self.out.write(b"u")

    def tensor(self, value) -> None:
        dtype = np.dtype(value.dtype).newbyteorder("=")
        if dtype not in self.storage_names:
            raise TypeError(f"a tensor of {dtype} cannot be saved; wanted {', '.join(map(str, self.storage_names))}")
        if id(value) not in self.keys:
            self.keys[id(value)] = len(self.tensors)
            self.tensors.append(value)  # which keeps its id from being given to another
        shape = tuple(int(size) for size in value.shape)
        self.out.write(b"ctorch._utils\n_rebuild_tensor_v2\n((")
        self.value("storage")
        self.out.write(f"ctorch\n{self.storage_names[dtype]}\n".encode())
        for item in (str(self.keys[id(value)]), "cpu", math.prod(shape)):
            self.value(item)
        self.out.write(b"tQ")
        strides = contiguous_strides(shape)
        for item in (0, shape, strides, False, collections.OrderedDict()):
            self.value(item)
        self.out.write(b"tR")
