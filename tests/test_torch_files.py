"""PyTorch's files: bit-equal to torch in both directions, and nothing hostile does more than be refused."""

import argparse
import collections
import concurrent.futures
import io
import math
import os
import pickle
import random
import struct
import subprocess
import sys
import time
import tracemalloc
import zipfile

import ml_dtypes
import numpy as np
import pytest
import torch

from neox_jax.convert import lazy_tensor, torch_files, torch_zip
from neox_jax.convert.byte_reader import CHUNK_BYTES, ByteReader, FileReader
from neox_jax.convert.torch_files import LazyTensor, Unknown, read_torch_file, save_torch_file
from neox_jax.convert.torch_pickle import STORAGES
from neox_jax.errors import InputError

torch.set_num_threads(1)
DTYPES = [dtype.name for dtype in STORAGES.values()]


def saved(tree, protocol=2) -> bytes:
    buffer = io.BytesIO()
    torch.save(tree, buffer, pickle_protocol=protocol)
    return buffer.getvalue()


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach().contiguous()
    return (
        tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if tensor.dtype == torch.bfloat16 else tensor.numpy()
    )


def assert_same(ours, theirs):
    """The same structure and, in tensors, the same bits."""
    if isinstance(theirs, torch.Tensor):
        assert isinstance(ours, LazyTensor)
        want, got = to_numpy(theirs), ours.read()
        assert (got.dtype, got.shape, ours.shape) == (want.dtype, want.shape, want.shape)
        assert got.tobytes() == want.tobytes()
        assert got.flags.c_contiguous
    elif isinstance(theirs, dict):
        assert list(ours) == list(theirs)
        for key in theirs:
            assert_same(ours[key], theirs[key])
    elif isinstance(theirs, (list, tuple)):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            assert_same(a, b)
    else:
        assert type(ours) is type(theirs)
        assert ours == theirs


def repacked(file: bytes, changes: dict, *, compress=zipfile.ZIP_STORED) -> bytes:
    """The file with members replaced (or, for None, left out), and right checksums. Names are inside the folder."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(file)) as source, zipfile.ZipFile(out, "w") as target:
        members = {name.partition("/")[2]: source.read(name) for name in source.namelist()} | changes
        for name, data in members.items():
            if data is not None:
                target.writestr(zipfile.ZipInfo(f"archive/{name}"), data, compress_type=compress)
    return out.getvalue()


def with_pickle(program: bytes, *, storage=b"\0" * 16) -> bytes:
    """A file with this data.pkl and one storage."""
    return repacked(saved({}), {"data.pkl": program, "data/0": storage})


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    return b"\x8a\x08" + struct.pack("<q", value)


def big(value: int) -> bytes:
    return b"\x8a\x10" + value.to_bytes(16, "little", signed=True)


def tensor_program(
    *, numel=4, offset=0, shape=(4,), strides=(1,), key="0", cls="FloatStorage", kind="storage"
) -> bytes:
    many = lambda values: b"(" + b"".join(map(number, values)) + b"t"  # noqa: E731
    pid = b"(" + text(kind) + f"ctorch\n{cls}\n".encode() + text(key) + text("cpu") + number(numel) + b"tQ"
    call = b"ctorch._utils\n_rebuild_tensor_v2\n(" + pid + number(offset) + many(shape) + many(strides)
    return b"\x80\x02" + call + b"\x89}tR."


def refused(source, match=None, **options) -> str:
    """The message of the InputError; it is one line, and not long."""
    with pytest.raises(InputError, match=match) as caught:
        read_torch_file(source, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 700
    return message


# ---- what torch writes


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_reads_what_torch_saves(protocol, tmp_path):
    torch.manual_seed(0)
    tied = torch.randn(4, 3)
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.LayerNorm(5))
    tree = {
        "dtypes": {name: (torch.randn(3, 4) * 50).to(getattr(torch, name)) for name in DTYPES},
        "state": model.state_dict(),  # an OrderedDict with _metadata: BUILD
        "tied": [tied, tied, tied.view(-1), tied[1:], tied[:, 1], tied.t(), tied[::2, 1:]],
        "views": (torch.randn(2, 3, 4).permute(2, 0, 1), torch.ones(1, 3).expand(4, 3), torch.eye(4).diagonal()),
        "parameter": torch.nn.Parameter(torch.randn(2, dtype=torch.bfloat16)),
        "small": [torch.tensor(7), torch.zeros(0), torch.zeros(3, 0, 2), torch.tensor(2.5).to(torch.bfloat16)],
        "nested": {"a": {1: [None, True, False, 1.5, -1, 2**31, -(2**40), 2**70, "ü", ""], -2: ()}, None: {}},
        "long": list(range(2500)),  # APPENDS in batches
        "wide": {f"key{i}": i for i in range(1500)},
    }
    path = tmp_path / "state.pt"
    torch.save(tree, path, pickle_protocol=protocol)
    assert_same(read_torch_file(path), tree)
    assert_same(read_torch_file(path.read_bytes()), tree)


def test_plain_values_of_torch_become_plain_values():
    tree = read_torch_file(saved({"s": torch.Size([2, 3]), "d": torch.device("cpu"), "t": torch.bfloat16}))
    assert tree == {"s": (2, 3), "d": "cpu", "t": "torch.bfloat16"}


def test_tensors_with_attributes():
    tensor, parameter = torch.arange(3), torch.nn.Parameter(torch.ones(2))
    tensor.partition_dim = parameter.model_parallel = 1  # as Megatron marks them
    tree = {"t": tensor, "p": parameter}
    assert_same(read_torch_file(saved(tree)), tree)


def test_old_files_without_byteorder_and_checksums():
    tree = {"a": torch.arange(5.0)}
    torch.serialization.set_crc32_options(False)
    try:
        data = saved(tree)
    finally:
        torch.serialization.set_crc32_options(True)
    assert_same(read_torch_file(data), tree)
    at = data.index(np.arange(5, dtype=np.float32).tobytes())
    damaged = read_torch_file(data[:at] + b"\0\0\xc0\x7f" + data[at + 4 :])  # which cannot be told
    assert np.isnan(damaged["a"].read()).tolist() == [True, False, False, False, False]
    assert_same(read_torch_file(repacked(saved(tree), {"byteorder": None, "version": b"3\n"})), tree)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_checkpoint_of_neox(protocol):
    tree = {
        "module": {"sequential.0.word_embeddings.weight": torch.ones(2, 2)},
        "args": argparse.Namespace(lr=0.1, dtype=torch.half, itself=None),
        "random": [random.getstate(), np.random.get_state(), torch.get_rng_state()],
        "numpy": np.float32(1),
        "set": {1, 2},
        "default": collections.defaultdict(list, a=[1]),
        "iteration": 3,
        "u16": torch.ones(2, dtype=torch.uint16),
        "complex": torch.ones(2, dtype=torch.complex64),
        (1, 2): "odd key",
    }
    data = saved(tree, protocol)
    refused(data, "argparse.Namespace")
    got = read_torch_file(data, allow_unknown=True)
    assert_same(got["module"], tree["module"])
    assert_same(got["random"][2], tree["random"][2])
    assert got["iteration"] == 3
    assert isinstance(got["args"], Unknown)
    assert got["args"].name == "argparse.Namespace"
    assert "numpy" in got["random"][1][1].name or protocol == 2
    assert {type(got[name]) for name in ("numpy", "set", "default", "u16", "complex")} == {Unknown}
    assert len(got) == len(tree)


def test_reads_slices(tmp_path):
    whole = torch.arange(5 * 6 * 7, dtype=torch.float32).reshape(5, 6, 7)
    views = {"plain": whole, "permuted": whole.permute(2, 0, 1), "expanded": whole[:, :1, :].expand(5, 4, 7)}
    path = tmp_path / "x.pt"
    torch.save(views, path)
    indices = [
        (),
        slice(1, 3),
        (slice(0, 2), slice(3, 4)),
        (slice(None), slice(1, None, 2), slice(-3, 99)),
        slice(3, 3),
    ]
    tree = read_torch_file(path)
    for name, view in views.items():
        want = to_numpy(view)
        for index in indices:
            np.testing.assert_array_equal(tree[name].read(index), want[index])
    with pytest.raises(IndexError):
        tree["plain"].read((slice(None),) * 4)
    with pytest.raises(IndexError):
        tree["plain"].read(slice(None, None, -1))


@pytest.mark.parametrize("chunk", [16, 64, 300])
def test_reads_strided_tensors_in_chunks(chunk, monkeypatch):
    monkeypatch.setattr(lazy_tensor, "CHUNK_BYTES", chunk)
    monkeypatch.setattr(torch_zip, "CHUNK_BYTES", chunk)
    whole = torch.arange(4 * 6 * 5, dtype=torch.int32).reshape(4, 6, 5)
    tree = [whole, whole.permute(2, 0, 1), whole.permute(1, 2, 0), whole[::2, ::3, ::2], whole[:, :, 1].t()]
    assert_same(read_torch_file(saved(tree)), tree)


@pytest.fixture
def sizes_read(monkeypatch):
    """How many bytes of files each read so far has asked for."""
    sizes, original = [], FileReader.read_into

    def read_into(self, start, out):
        sizes.append(len(out))
        original(self, start, out)

    monkeypatch.setattr(FileReader, "read_into", read_into)
    return sizes


def test_reads_only_what_is_asked_for(tmp_path, sizes_read):
    path = tmp_path / "x.pt"
    torch.save({"plain": torch.ones(64, 1 << 18), "turned": torch.ones(64, 1 << 18).t()}, path)  # 64 MiB each
    tree = read_torch_file(path)
    for expected in (66 << 20, 2 << 20):  # the first read also compares the storage's checksum
        sizes_read.clear()
        tree["plain"].read((slice(3, 5),))
        assert sum(sizes_read) == expected
    sizes_read.clear()
    tracemalloc.start()
    part = tree["turned"].read((slice(0, 1 << 17), slice(0, 4)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < part.nbytes + 2 * CHUNK_BYTES
    assert max(sizes_read) <= CHUNK_BYTES


def test_a_storage_read_whole_is_read_once(tmp_path, sizes_read):
    path = tmp_path / "x.pt"
    tree = {"a": torch.randn(3 << 20), "b": torch.arange(5)}
    torch.save(tree, path)
    ours = read_torch_file(path)
    for _ in range(2):
        sizes_read.clear()
        assert_same(ours, tree)
        assert sum(sizes_read) == (12 << 20) + 40


# ---- readers and lazy tensors by themselves


def test_contiguous_lazy_tensors_need_no_strides(tmp_path):
    array = np.arange(2 * 3 * 4, dtype=np.int16).reshape(2, 3, 4)
    path = tmp_path / "x"
    path.write_bytes(b"header" + array.tobytes())
    for reader in (FileReader(path), ByteReader(path.read_bytes())):
        tensor = LazyTensor(reader, 6, (2, 3, 4), None, array.dtype)
        np.testing.assert_array_equal(np.concatenate([*tensor.blocks()]), array)
        np.testing.assert_array_equal(tensor.read((slice(1, 2), slice(0, 2))), array[1:2, :2])
        assert LazyTensor(reader, 6, (), None, array.dtype).read() == 0
        assert LazyTensor(reader, 6, (3, 0), None, array.dtype).read().shape == (3, 0)


def test_readers_refuse_what_is_not_there(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"0123456789")
    for reader in (FileReader(path), ByteReader(path.read_bytes())):
        assert reader.num_bytes == 10
        assert reader.read(8, 2) == b"89"
        for start, num_bytes in ((9, 2), (10, 1), (1 << 40, 1), (-1, 1), (0, 1 << 63)):
            with pytest.raises(InputError):
                reader.read(start, num_bytes)
    archive = written([("x/a", b"aaaa"), ("x/b", b"bbbb")])
    member = torch_zip.read_directory(ByteReader(archive))[1]["x/a"]
    assert member.read(1, 3) == b"aaa"
    for start in (-1, 1, 4):  # the bytes are there, and are another's
        with pytest.raises(InputError, match="member 'x/a' is too short"):
            member.read(start, 4)


# ---- what we write


def sample_tree():
    rng = np.random.default_rng(0)
    tied = rng.standard_normal((4, 3)).astype(np.float32)
    kinds = [*STORAGES.values()]
    return {
        "dtypes": {dtype.name: rng.integers(0, 2, (3, 5)).astype(dtype) for dtype in kinds},
        "ordered": collections.OrderedDict(b=tied, a=tied),
        "small": [np.array(3, np.float32), np.zeros((0, 2), np.int8), np.asfortranarray(tied), tied[:, ::2]],
        "plain": [None, True, False, 1, -1, 2**31, -(2**31) - 1, 2**63, -(2**200), 1.5, "ü", "", (), (1, (2,)), [], {}],
        "keys": {1: 2, -5: None, None: "x"},
    }


def test_torch_reads_what_we_save(tmp_path):
    tree, path = sample_tree(), tmp_path / "new" / "x.bin"
    save_torch_file(path, tree)
    for options in ({}, {"mmap": True}):
        theirs = torch.load(path, weights_only=True, **options)
        assert_same(read_torch_file(path), theirs)
        for name, array in tree["dtypes"].items():
            assert to_numpy(theirs["dtypes"][name]).tobytes() == array.tobytes()
        assert theirs["plain"] == tree["plain"]
        assert theirs["keys"] == tree["keys"]
        assert isinstance(theirs["ordered"], collections.OrderedDict)
        assert theirs["ordered"]["a"].data_ptr() == theirs["ordered"]["b"].data_ptr()
        np.testing.assert_array_equal(to_numpy(theirs["small"][2]), tree["small"][2])
        np.testing.assert_array_equal(to_numpy(theirs["small"][3]), tree["small"][3])
        assert theirs["small"][0].shape == ()
    assert_aligned(path)
    assert zipfile.ZipFile(path).testzip() is None
    save_torch_file(tmp_path / "again.bin", read_torch_file(path))  # LazyTensors can be written as they are
    assert (tmp_path / "again.bin").stat().st_size >= path.stat().st_size
    assert_same(read_torch_file(tmp_path / "again.bin"), theirs)
    assert os.listdir(tmp_path / "new") == ["x.bin"]


def assert_aligned(path):
    members = torch_zip.read_directory(FileReader(path))[1]
    starts = [member.start for name, member in members.items() if "/data/" in name]
    assert starts
    assert all(start % 64 == 0 for start in starts)


def test_zip64(tmp_path, monkeypatch):
    """Members of more than a GiB have 64-bit sizes; here, of more than 100 bytes."""
    monkeypatch.setattr(torch_zip, "WIDE_BYTES", 100)
    tree = {"a": np.arange(100, dtype=np.int32), "b": np.ones(2, np.int8)}
    save_torch_file(tmp_path / "x.pt", tree)
    theirs = torch.load(tmp_path / "x.pt", weights_only=True)
    assert theirs["a"].tolist() == list(range(100))
    assert_same(read_torch_file(tmp_path / "x.pt"), theirs)
    assert_aligned(tmp_path / "x.pt")


def test_reads_beyond_4_gib(tmp_path):
    """A sparse file with a storage that starts and ends beyond 32 bits: zip64 offsets and sizes in the directory."""
    path, giant = tmp_path / "x.pt", (1 << 32) + 64
    pickler = torch_files._Pickler()
    tree = {"big": _Fake((giant,), np.int8), "last": _Fake((3,), np.float32)}
    parts = {"data.pkl": pickler.dump(tree), "data/0": giant, "data/1": np.arange(3, dtype="<f4").tobytes()}
    central = b""
    with open(path, "wb") as file:
        for name, data in parts.items():
            raw, size, at = f"x/{name}".encode(), data if isinstance(data, int) else len(data), file.tell()
            wide = [value for value in (size, size, at) if value >= 0xFFFFFFFF]
            narrow = [min(value, 0xFFFFFFFF) for value in (size, size, at)]
            extra = struct.pack(f"<2H{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
            file.write(struct.pack("<4s5H3I2H", b"PK\x03\x04", 45, 8, 0, 0, 0, 0, 0, 0, len(raw), 0) + raw)
            file.seek(data, 1) if isinstance(data, int) else file.write(data)
            head = struct.pack("<4s6H3I", b"PK\x01\x02", 45, 45, 8, 0, 0, 0, 0, *narrow[:2])
            central += head + struct.pack("<5H2I", len(raw), len(extra), 0, 0, 0, 0, narrow[2]) + raw + extra
        at = file.tell()
        file.write(central)
        file.write(struct.pack("<4sQ2H2I4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, 3, 3, len(central), at))
        file.write(struct.pack("<4sIQI", b"PK\x06\x07", 0, at + len(central), 1))
        file.write(struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 3, 3, len(central), 0xFFFFFFFF, 0))
    got = read_torch_file(path)
    assert got["last"].read().tolist() == [0, 1, 2]
    assert got["big"].read(slice(giant - 2, giant)).tolist() == [0, 0]


class _Fake:
    def __init__(self, shape, dtype, *parts):
        self.shape, self.dtype, self.parts = shape, np.dtype(dtype), parts

    def blocks(self):
        yield from self.parts


@pytest.mark.parametrize("shape", [(1 << 16, 1 << 10), (1, 1 << 26)])
def test_saving_holds_a_block_at_a_time(shape, tmp_path):
    """256 MiB from a file that is one hole."""
    (tmp_path / "zeros").touch()
    os.truncate(tmp_path / "zeros", 1 << 28)
    tensor = LazyTensor(FileReader(tmp_path / "zeros"), 0, shape, None, np.dtype(np.float32))
    tracemalloc.start()
    try:
        save_torch_file(tmp_path / "x.pt", {"a": tensor})
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert CHUNK_BYTES <= peak < 3 * CHUNK_BYTES
    assert torch.load(tmp_path / "x.pt", weights_only=True, mmap=True)["a"].shape == shape


@pytest.mark.parametrize("chunk", [16, 64, 300])
def test_blocks_make_no_difference_to_what_is_written(chunk, tmp_path, monkeypatch):
    whole = np.arange(4 * 6 * 5, dtype=np.int32).reshape(4, 6, 5)
    tree = sample_tree() | {"turned": whole.transpose(2, 0, 1), "big-endian": whole.astype(">i4")}
    save_torch_file(tmp_path / "x.pt", tree)
    monkeypatch.setattr(lazy_tensor, "CHUNK_BYTES", chunk)
    save_torch_file(tmp_path / "arrays.pt", tree)
    save_torch_file(tmp_path / "lazy.pt", read_torch_file(tmp_path / "x.pt"))
    assert (tmp_path / "arrays.pt").read_bytes() == (tmp_path / "x.pt").read_bytes()
    theirs = torch.load(tmp_path / "x.pt", weights_only=True)
    assert_same(read_torch_file(tmp_path / "lazy.pt"), theirs)
    np.testing.assert_array_equal(theirs["turned"], whole.transpose(2, 0, 1))
    np.testing.assert_array_equal(theirs["big-endian"], whole)


def test_blocks_are_small_and_in_order(monkeypatch):
    monkeypatch.setattr(lazy_tensor, "CHUNK_BYTES", 64)
    for shape in [(), (1,), (0, 3), (3, 0), (5, 3), (1, 100), (3, 40), (2, 3, 17), (2, 1, 64), (1 << 60, 0)]:
        array = np.arange(math.prod(shape), dtype=np.float32).reshape(shape)
        tensor = LazyTensor(ByteReader(array.tobytes()), 0, shape, None, array.dtype)
        blocks = [*tensor.blocks()]
        assert all(block.nbytes <= 64 and block.flags.c_contiguous for block in blocks)
        assert b"".join(block.tobytes() for block in blocks) == array.tobytes()
        assert len(blocks) <= max(1, array.nbytes // 32 + 1)


def test_failed_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.pt"
    save_torch_file(path, {"a": 1})
    for tree, error in [
        ({"a": _Fake((2,), np.int8, np.zeros(3, np.int8))}, ValueError),
        ({"a": _Fake((2,), np.int8, np.zeros(1, np.int8))}, ValueError),
        ({"a": _Fake((2,), np.int8, np.zeros(2, np.int8), np.zeros(1, np.int8))}, ValueError),
        ({"a": _Fake((2,), np.int8, np.zeros(2, np.uint8))}, ValueError),
        ({"a": object()}, TypeError),
        ({(1,): 1}, TypeError),
        ({"a": np.zeros(2, np.complex64)}, TypeError),
        ({"a": np.zeros(2, "U3")}, TypeError),
    ]:
        with pytest.raises(error):
            save_torch_file(path, tree)
    assert os.listdir(tmp_path) == ["x.pt"]
    assert read_torch_file(path) == {"a": 1}


# ---- hostile pickles


class _Reduce:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("allow_unknown", [False, True])
def test_nothing_runs(protocol, allow_unknown, tmp_path):
    canary = tmp_path / "canary"
    touch = f"__import__('pathlib').Path({str(canary)!r}).touch()"
    calls = [
        (os.system, (f"touch {canary}",)),
        (eval, (touch,)),
        (exec, (touch,)),
        (getattr, ("", "join")),
        (__import__, ("os",)),
        (open, (str(canary), "w")),
        (np.load, (str(canary),)),
        (torch.load, (str(canary),)),
        (torch.hub.load, ("x", "y")),
    ]
    for call in calls:
        for tree in (_Reduce(*call), {"a": torch.ones(2), "b": [_Reduce(*call)]}):
            program = pickle.dumps(tree if isinstance(tree, _Reduce) else {"b": tree["b"]}, protocol=protocol)
            data = with_pickle(program)
            if allow_unknown:
                got = read_torch_file(data, allow_unknown=True)
                assert isinstance(got if isinstance(tree, _Reduce) else got["b"][0], Unknown)
            else:
                refused(data, "which is no tensor or plain value")
    assert not canary.exists()


EVAL, LONG = b"cbuiltins\neval\n", 1 << 62
TENSOR, ORDERED, FLOATS = (
    b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"ccollections\nOrderedDict\n",
    b"ctorch\nFloatStorage\n",
)
HOSTILE = {
    "stack_global": text("os") + text("system") + b"\x93" + text("id") + b"\x85R.",
    "stack_global of dotted names": text("torch._utils") + text("os.system") + b"\x93.",
    "stack_global of no text": b"K\x01K\x02\x93.",
    "stack_global of tensors": b"]]\x93.",
    "inst": b"(ios\nsystem\n.",
    "obj": b"(" + EVAL + b"o.",
    "extension": b"\x82\x01.",
    "text persistent id": b"P0\n.",
    "memo bomb": b"Nr\xff\xff\xff\x7f.",
    "memo bomb, signed": b"Nr\xff\xff\xff\xff.",
    "memo get beyond": b"j\xff\xff\xff\x7f.",
    "memo get absent": b"h\x05.",
    "deep lists": b"]" * 100_000 + b"a" * 99_999 + b".",
    "deep tuples": b")" + b"\x85" * 150_000 + b".",
    "deep tuple as key": b"})" + b"\x85" * 150_000 + b"Ns.",
    "deep dicts": b"}" + b"K\x01}" * 100_000 + b"s" * 100_000 + b".",
    "deep marks": b"(" * 100_000 + b".",
    "holds itself": b"]q\x00h\x00a.",
    "billion laughs": b"]q\x00" + b"".join(b"](" + b"h%c" % i * 10 + b"eq%c" % (i + 1) for i in range(40)) + b".",
    "huge LONG4": b"\x8b\xff\xff\xff\x7f.",
    "negative LONG4": b"\x8b\xff\xff\xff\xff.",
    "LONG1 of 2040 bits": b"\x8a\xff" + b"\x7f" * 255 + b".",
    "decimal": b"L" + b"9" * 100_000 + b"L\n.",
    "huge BINUNICODE8": b"\x8d" + b"\xff" * 7 + b"\x7f.",
    "huge BINUNICODE": b"X\xff\xff\xff\x7f.",
    "huge BINBYTES8": b"\x8e" + b"\xff" * 7 + b"\x7f.",
    "huge BYTEARRAY8": b"\x96" + struct.pack("<Q", 1 << 40) + b".",
    "buffers": b"\x97.",
    "too many opcodes": b"N0" * 530_000 + b"N.",
    "too many memos": b"N" + b"\x94" * ((1 << 20) + 1) + b".",
    "lone surrogate": b"X\x03\x00\x00\x00\xed\xa0\x80.",
    "no UTF-8": b"X\x01\x00\x00\x00\xff.",
    "setitem on a list": b"]K\x00Ns.",
    "setitem on a tensor": tensor_program()[2:-1] + b"K\x00Ns.",
    "setitems on a number": b"K\x01(K\x00Nu.",
    "setitem on a function": ORDERED + b"K\x00Ns.",
    "append to a dict": b"}Na.",
    "appends to a tuple": b")(NNe.",
    "append to a tensor": tensor_program()[2:-1] + b"Na.",
    "additems to a list": b"](N\x90.",
    "odd setitems": b"}(Nu.",
    "list as key": b"}]Ns.",
    "dict as key": b"}}Ns.",
    "keys that collide": b"}(" + b"".join(big(i * ((1 << 61) - 1)) + b"N" for i in range(1, 50_000)) + b"u.",
    "float keys": b"}G" + struct.pack(">d", 1e300) + b"Ns.",
    "build on a dict": b"}}b.",
    "build on a tensor": tensor_program()[2:-1] + b"}b.",
    "build on a function": TENSOR + b"}b.",
    "build with no dict": ORDERED + b")RNb.",
    "newobj": ORDERED + b")\x81.",
    "newobj of a number": b"K\x01)\x81.",
    "call of a number": b"K\x01)R.",
    "call of text": text("os.system") + b")R.",
    "call with a list": ORDERED + b"]R.",
    "call of a storage class": FLOATS + b")R.",
    "ordered dict of pairs": ORDERED + b"]\x85R.",
    "class in the tree": FLOATS + b".",
    "storage in the tree": b"(" + text("storage") + FLOATS + text("0") + text("cpu") + b"K\x04tQ.",
    "tensor of nothing": TENSOR + b")R.",
    "tensor of numbers": TENSOR + b"(NNNNNNtR.",
    "parameter of a number": b"ctorch._utils\n_rebuild_parameter\n(K\x01\x89NtR.",
    "from_type of eval": b"ctorch._tensor\n_rebuild_from_type_v2\n(" + ORDERED + b"ctorch\nTensor\n)NtR.",
    "size of a huge tuple": b"ctorch\nSize\n(" + b"K\x01" * 1000 + b"t\x85R.",
    "device of a number": b"ctorch\ndevice\nK\x01\x85R.",
    "long class name": b"c" + b"a" * 1000 + b"\nb\n.",
    "class name with escapes": b"ctorch\\x2e\\8\nSize\n.",
    "pid of 4": b"(" + text("storage") + FLOATS + text("0") + text("cpu") + b"tQ.",
    "pid of text": text("storage") + b"Q.",
    "pid of a list": b"]Q.",
    "pid of another kind": tensor_program(kind="module")[2:],
    "pid of another class": tensor_program(cls="Size")[2:],
    "pid with a negative numel": tensor_program(numel=-4)[2:],
    "pid with true": b"(" + text("storage") + FLOATS + text("0") + text("cpu") + b"\x88tQ.",
    "no such storage": tensor_program(key="1")[2:],
    "storage outside": tensor_program(key="../data.pkl")[2:],
    "storage larger than declared": tensor_program(numel=3, shape=(3,))[2:],
    "storage smaller than declared (CVE-2026-24747)": tensor_program(numel=1 << 40)[2:],
    "storage of another type": tensor_program(cls="DoubleStorage")[2:],
    "offset beyond": tensor_program(offset=1)[2:],
    "offset far beyond": tensor_program(offset=LONG, shape=(0,))[2:],
    "negative offset": tensor_program(offset=-1)[2:],
    "size beyond": tensor_program(shape=(5,))[2:],
    "negative size": tensor_program(shape=(-1,))[2:],
    "stride beyond": tensor_program(shape=(2,), strides=(4,))[2:],
    "negative stride": tensor_program(offset=3, strides=(-1,))[2:],
    "sizes that overflow": tensor_program(shape=(1 << 33, 1 << 33), strides=(0, 0))[2:],
    "larger than the file": tensor_program(shape=(1 << 40,), strides=(0,))[2:],
    "empty and too large": tensor_program(shape=(0, LONG // 2), strides=(1, 1))[2:],
    "overlapping": tensor_program(shape=(3, 2), strides=(1, 1))[2:],
    "fewer strides": tensor_program(shape=(2, 2), strides=(1,))[2:],
    "100 dims": tensor_program(shape=(1,) * 100, strides=(1,) * 100)[2:],
    "empty": b"",
    "no end": b"N",
    "nothing at the end": b".",
    "two values at the end": b"NN.",
    "a mark at the end": b"(N.",
    "bytes after the end": b"N.N",
    "protocol 1": b"\x80\x01N.",
    "protocol 200": b"\x80\xc8N.",
    "pops from nothing": b"0.",
    "mark from nothing": b"t.",
    "tuple from nothing": b"\x87.",
    "noise": bytes(range(256)),
}


@pytest.mark.parametrize("allow_unknown", [False, True])
@pytest.mark.parametrize("name", HOSTILE)
def test_refuses_hostile_pickles(name, allow_unknown):
    data = with_pickle(b"\x80\x02" + HOSTILE[name])
    harmless = ("stack_global", "stack_global of dotted names", "list as key", "dict as key", "deep tuple as key",
                "keys that collide", "float keys", "class in the tree", "storage in the tree", "newobj",
                "long", "setitem on a function", "class name with escapes")  # fmt: skip
    start = time.perf_counter()
    tracemalloc.start()
    try:
        if allow_unknown and name in harmless:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(os, "system", lambda *_: pytest.fail("ran"))
                open_or_refuse(data)
        else:
            refused(data, allow_unknown=allow_unknown)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert time.perf_counter() - start < 30  # with tracemalloc on; 2 s without
    assert peak < 100e6 + 10 * len(data)


def open_or_refuse(data):
    try:
        return read_torch_file(data, allow_unknown=True)
    except InputError:
        return None


def test_the_memo_does_not_multiply_work():
    """What is repeated through the memo is neither copied nor walked: 100,000 uses of 4 MB, in seconds."""
    large = b"X" + struct.pack("<I", 4_000_000) + b"a" * 4_000_000 + b"q\x00" + b"(" + b"N" * 100_000 + b"tq\x01"
    for use in (
        b"h\x00h\x00\x930",  # a class name
        b"ctorch\ndevice\nh\x00\x85R0",
        b"ctorch\nSize\nh\x01\x85R0",
        b"ctorch\nSize\nh\x01R0",
        b"(" + text("storage") + FLOATS + b"h\x00h\x00K\x04tQ0",
        b"}h\x00Ns0",
    ):
        start = time.perf_counter()
        open_or_refuse(with_pickle(b"\x80\x02" + large + use * 100_000 + b"N."))
        assert time.perf_counter() - start < 10


# ---- hostile zips


GOOD = saved({"a": torch.arange(100.0), "b": torch.ones(2, 2, dtype=torch.bfloat16)})


def written(members: list[tuple[str, bytes]], compress=zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compress) as archive:
        for name, data in members:
            archive.writestr(zipfile.ZipInfo(name), data, compress_type=compress)
    return out.getvalue()


def test_refuses_compressed_members_and_bombs():
    refused(repacked(GOOD, {}, compress=zipfile.ZIP_DEFLATED), "compressed")
    bomb = repacked(GOOD, {"data/0": b"\0" * 50_000_000}, compress=zipfile.ZIP_DEFLATED)
    assert len(bomb) < 200_000
    tracemalloc.start()
    refused(bomb, "compressed")
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("archive/data/0", "twice"),
        ("archive/../x", r"\.\."),
        ("../x", r"\.\."),
        ("/archive/x", "relative"),
        ("archive\\x", "relative"),
        ("C:/x", "relative"),
        ("archive//x", "relative"),
        ("archive/./x", "relative"),
        ("archive/x/", "relative"),
        ("archive/\n", "relative"),
        ("other/x", "one folder"),
        ("x", "one folder"),
    ],
)
def test_refuses_names(name, match):
    members = [("archive/data.pkl", b"\x80\x02N."), ("archive/data/0", b""), (name, b"")]
    if "\\" in name:  # which zipfile does not write
        data = written([*members[:2], (name.replace("\\", "/"), b"")]).replace(b"archive/x", b"archive\\x")
    else:
        data = written(members)
    refused(data, match)


def test_refuses_zips_that_are_not_as_torch_writes_them():
    central = GOOD.index(b"PK\x01\x02")

    def changed(at, value, data=GOOD):
        return data[:at] + value + data[at + len(value) :]

    refused(changed(central + 8, b"\x09\x08"), "encrypted")
    refused(changed(central + 10, b"\x08\x00"), "compressed")
    refused(changed(central + 20, b"\0\0"), "compressed")
    refused(changed(central + 42, b"\x10\0\0\0"), "damaged")
    refused(changed(central + 42, b"\xff\xff\xff\xff"), "damaged")  # zip64, without its field
    refused(changed(8, b"\x08\x00"), "damaged")
    refused(changed(4 + 26, b"xx"))
    refused(changed(31, b"X"), "in one place and not in another")
    refused(b"x" + GOOD)
    refused(GOOD + b"x", "damaged")
    refused(changed(len(GOOD) - 2, b"\x01\x00"), "damaged")
    at = central  # two members at the same place
    second = GOOD.index(b"PK\x01\x02", central + 4)
    local = GOOD[second + 42 : second + 46]
    refused(changed(at + 42, local))


def test_refuses_overlapping_members():
    """The first member's data holds the second member whole."""
    inner = written([("archive/data/0", b"\0" * 16)])
    inner = inner[: inner.index(b"PK\x01\x02")]
    data = bytearray(written([("archive/data.pkl", b"\x80\x02N."), ("archive/data/1", inner), ("archive/data/0", b"")]))
    last = data.rindex(b"PK\x01\x02")
    data[last + 42 : last + 46] = struct.pack("<I", data.index(inner))
    data[last + 20 : last + 28] = struct.pack("<2I", 16, 16)
    refused(bytes(data), "overlap")


def test_refuses_other_kinds_of_files(tmp_path):
    model = torch.nn.Linear(2, 2)
    legacy = io.BytesIO()
    torch.save(model.state_dict(), legacy, _use_new_zipfile_serialization=False)
    refused(legacy.getvalue(), "before torch 1.6.*re-save")
    refused(repacked(GOOD, {"constants.pkl": b"\x80\x02)."}), "TorchScript")
    refused(repacked(GOOD, {"byteorder": b"big"}), "byte order is b'big'")
    refused(repacked(GOOD, {"byteorder": b"little" * 99}), "byteorder has")
    refused(repacked(GOOD, {"data.pkl": None}), "without data.pkl")
    refused(repacked(GOOD, {"data/0": None}), "not in the file")
    refused(b"", "empty")
    refused(b"\x08\0\0\0\0\0\0\0{}      ", "wanted a zip file")
    refused(tmp_path, "no regular file")
    refused(tmp_path / "absent", "is not there")
    refused(tmp_path / "a\0b", "cannot be opened")
    refused(tmp_path / ("a" * 300), "cannot be opened")
    refused("/dev/zero", "no regular file")
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "no regular file")
    (tmp_path / "empty.pt").touch()
    assert "empty.pt" in refused(tmp_path / "empty.pt", "is empty")


def test_refuses_a_pickle_of_more_than_64_mib(monkeypatch):
    monkeypatch.setattr(torch_files, "MAX_PICKLE_BYTES", 100)
    refused(GOOD, "data.pkl has")


def test_refuses_truncated_files(tmp_path):
    lengths = {*range(0, 200), *range(0, len(GOOD), 37), *range(len(GOOD) - 200, len(GOOD))}
    for length in sorted(lengths):
        refused(GOOD[:length])
    path = tmp_path / "cut.pt"
    for length in (1, 100, len(GOOD) // 2, len(GOOD) - 1):
        path.write_bytes(GOOD[:length])
        assert "cut.pt" in refused(path)


@pytest.mark.parametrize("chunk", [64, CHUNK_BYTES])
@pytest.mark.parametrize("damage", [0, 40, 399])
def test_damage_shows_at_the_first_read(damage, chunk, tmp_path, monkeypatch):
    """Of whatever part of whatever tensor of a storage, in memory and on disk, and at each read from then on."""
    monkeypatch.setattr(torch_zip, "CHUNK_BYTES", chunk)
    whole = torch.arange(100.0)
    views = {"a": whole, "part": whole[50:51], "turned": whole.view(10, 10).t(), "empty": whole[:0]}
    data = saved({**views, "b": whole + 1})
    at = data.index(to_numpy(whole).tobytes()) + damage
    bad = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
    path = tmp_path / "x.bin"
    path.write_bytes(bad)
    reads = [("a", ()), ("a", slice(20, 21)), ("part", ()), ("turned", ()), ("turned", (slice(2), slice(3)))]
    for name, index in reads:
        for source, called in ((path, "x.bin"), (bad, "the given bytes")):
            tree = read_torch_file(source)
            for _ in range(2):
                with pytest.raises(InputError, match=f"{called}: member 'archive/data/0' is damaged"):
                    tree[name].read(index)
            assert_same(tree["b"], whole + 1)
            assert tree["empty"].read().shape == (0,)


def test_damage_of_the_pickle_shows_when_the_file_is_opened():
    at = GOOD.index(b"_rebuild")
    refused(GOOD[:at] + b"X" + GOOD[at + 1 :], "member 'archive/data.pkl' is damaged .its checksum")


def test_many_threads_read_one_storage(tmp_path):
    path, whole = tmp_path / "x.bin", np.random.default_rng(0).standard_normal((64, 1 << 16)).astype(np.float32)
    save_torch_file(path, {"a": whole})
    for _ in range(5):
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            tensor = read_torch_file(path)["a"]
            parts = pool.map(lambda i, tensor=tensor: tensor.read(slice(i, i + 1)), range(64))
            np.testing.assert_array_equal(np.concatenate([*parts]), whole)


def test_a_file_cut_while_it_is_open(tmp_path):
    path = tmp_path / "x.pt"
    path.write_bytes(GOOD)
    tree = read_torch_file(path)
    os.truncate(path, len(GOOD) // 8)
    with pytest.raises(InputError, match="became shorter"):
        tree["a"].read()


def test_a_file_that_is_another_while_it_is_open(tmp_path):
    path, other = tmp_path / "x.pt", tmp_path / "other"
    path.write_bytes(GOOD)

    def replace():
        other.write_bytes(GOOD)
        other.replace(path)

    def write_over():
        os.utime(path, ns=(0, 0))  # the clock of the file system may not have moved since
        path.write_bytes(GOOD)

    for change in (replace, write_over, lambda: path.write_bytes(GOOD + b"x")):
        tree = read_torch_file(path)
        assert_same(tree, torch.load(path))
        change()
        for _ in range(2):
            with pytest.raises(InputError, match="x.pt: changed while it was read; try again"):
                tree["a"].read()
        path.write_bytes(GOOD)
    tree = read_torch_file(path)
    path.unlink()
    with pytest.raises(InputError, match="is not there"):
        tree["a"].read()
    os.mkfifo(path)
    with pytest.raises(InputError, match="became shorter"):
        tree["a"].read()


def test_a_change_in_the_middle_of_a_read(tmp_path, monkeypatch):
    path = tmp_path / "x.pt"
    path.write_bytes(GOOD)
    tree, preadv = read_torch_file(path), os.preadv

    def change_then_read(*args):
        path.write_bytes(GOOD + b"x")
        return preadv(*args)

    monkeypatch.setattr(os, "preadv", change_then_read)
    with pytest.raises(InputError, match="changed while it was read"):
        tree["a"].read()


def test_more_files_than_a_process_may_open(tmp_path):
    for i in range(100):
        save_torch_file(tmp_path / f"{i}.pt", {"a": np.full(3, i)})
    program = """if True:
        import resource, sys
        from neox_jax.convert.torch_files import read_torch_file
        resource.setrlimit(resource.RLIMIT_NOFILE, (40, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        trees = [read_torch_file(f"{sys.argv[1]}/{i}.pt") for i in range(100)]
        assert [tree["a"].read().tolist() for tree in trees] == [[i] * 3 for i in range(100)]
        """
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, timeout=120)


def test_a_relative_path_is_of_the_folder_that_it_was(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    save_torch_file(tmp_path / "x.pt", {"a": np.arange(3)})
    monkeypatch.chdir(tmp_path)
    tree = read_torch_file("x.pt")
    monkeypatch.chdir("a")
    assert tree["a"].read().tolist() == [0, 1, 2]


def test_bytes_that_are_no_booleans():
    data = with_pickle(tensor_program(cls="BoolStorage"), storage=b"\x00\x01\x02\xff")
    got = read_torch_file(data).read()
    assert got.tobytes() == b"\x00\x01\x01\x01"
