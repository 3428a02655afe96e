"""PyTorch's .bin and .pt files (the zip format of torch >= 1.6), read and written without PyTorch.

A file like this is a pickle, which is a program, in a zip. Nothing here calls what a pickle names: an interpreter of
our own knows the opcodes that tensors and plain values need, and everything else is refused, or with `allow_unknown`
replaced by a placeholder. Every bound (members, offsets, shapes) is checked before anything of that size is made, so
that memory stays within a small multiple of the file and what can be wrong with a file is an InputError.
Cases known to go wrong elsewhere: CVE-2025-32434 (code in a "weights only" load), CVE-2026-24747 (a storage shorter
than declared; SETITEM on what is no dict).

Tensors are read with pread, not mapped: a file cut short while it is open gives an error and not SIGBUS, and a
mapping's pages would add up to the whole file.
"""

import collections
import contextlib
import dataclasses
import io
import itertools
import math
import os
import pickletools
import stat
import struct
import zipfile
import zlib
from pathlib import Path

import ml_dtypes
import numpy as np

from neox_jax.errors import InputError

STORAGES = {
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "DoubleStorage": np.dtype(np.float64),
    "CharStorage": np.dtype(np.int8),
    "ShortStorage": np.dtype(np.int16),
    "IntStorage": np.dtype(np.int32),
    "LongStorage": np.dtype(np.int64),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}
MAX_PICKLE_BYTES, MAX_MEMO = 64 << 20, 1 << 20
MAX_OPCODES = 1 << 20  # a tensor takes about 45, so 23,000 tensors; an empty dict of 64 bytes takes one
MAX_DEPTH, MAX_MARKS = 64, 256
MAX_MEMBERS, MAX_DIRECTORY_BYTES = 1 << 16, 16 << 20
MAX_DIMS, MAX_NAME = 32, 256
CHUNK_BYTES = 8 << 20
ALIGNMENT, WIDE_BYTES = 64, 1 << 30  # a written member of more bytes has zip64 sizes
RESAVE = "re-save it with torch >= 1.6: torch.save(torch.load(OLD), NEW)"


def open_torch_file(source: str | Path | bytes, *, allow_unknown: bool = False) -> "TorchFile":
    """Opens a .bin or .pt file, or the bytes of one; no tensor is read yet.

    allow_unknown: what is no tensor or plain value (argparse.Namespace, numpy's RNG state, in a mp_rank_* file) becomes
    an `Unknown` in the tree; otherwise the file is refused.
    Raises: InputError, and nothing else, for whatever may be wrong with the file.
    """
    reader = _Buffer(source) if isinstance(source, bytes) else _File(Path(source))
    try:
        root, members = _read_directory(reader)
        names = {name.removeprefix(f"{root}/"): member for name, member in members.items()}
        data = _read_pickle(reader, names)
        storages = {name.removeprefix("data/"): part for name, part in names.items() if name.startswith("data/")}
        machine = _Machine(reader, storages, allow_unknown)
        _scan(data, reader.refuse)
        return TorchFile(machine.run(data), reader, storages)
    except BaseException:
        reader.close()
        raise


class TorchFile:
    """An open file. `tree` is what was saved, of dict, list, tuple, str, int, float, bool, None, bytes, `LazyTensor`
    and `Unknown`; a torch.Size is a tuple there, a torch.device and a dtype are str ("cpu", "torch.float16")."""

    def __init__(self, tree, reader, storages):
        self.tree = tree
        self._reader, self._storages = reader, storages

    def __enter__(self) -> "TorchFile":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Its tensors cannot be read from now on."""
        self._reader.close()

    def verify(self) -> None:
        """Reads every storage once and compares checksums, where torch wrote them.

        Raises: InputError if one differs.
        """
        for key, member in self._storages.items():
            crc = 0
            for start in range(0, member.num_bytes, CHUNK_BYTES):
                crc = zlib.crc32(
                    self._reader.read(member.start + start, min(CHUNK_BYTES, member.num_bytes - start)), crc
                )
            if member.crc not in (0, crc):
                self._reader.refuse(f"storage {_show(key)} is damaged (its checksum differs); download it again")


class LazyTensor:
    """A tensor in a file: `shape`, `dtype` and a way to read all or part of it."""

    __slots__ = ("_reader", "_start", "_strides", "dtype", "shape")

    def __init__(self, reader, start: int, shape: tuple[int, ...], strides: tuple[int, ...], dtype: np.dtype):
        self.shape, self.dtype = shape, dtype
        self._reader, self._start, self._strides = reader, start, strides  # start in bytes, strides in elements

    def __repr__(self) -> str:
        return f"LazyTensor(shape={self.shape}, dtype={self.dtype.name})"

    def fetch(self) -> np.ndarray:
        """All of it, under the name by which writers ask."""
        return self.read()

    def read(self, index: tuple[slice, ...] | slice = ()) -> np.ndarray:
        """A new C-contiguous array of tensor[index]; index: a slice, or one for each of the first dims, steps >= 1.

        Of a contiguous tensor only the bytes of the slice are read; of another at most CHUNK_BYTES are held at a time.
        Raises: InputError if the file is no longer as it was when it was opened.
        """
        index = (index,) if isinstance(index, slice) else tuple(index)
        if len(index) > len(self.shape):
            raise IndexError(f"{len(index)} slices of a tensor with {len(self.shape)} dims")
        start, shape, strides = self._start, [], []
        for axis, (size, stride) in enumerate(zip(self.shape, self._strides, strict=True)):
            part = range(size)[index[axis]] if axis < len(index) else range(size)
            if part.step < 1:
                raise IndexError("a slice's step must be 1 or more")
            if len(part):
                start += part.start * stride * self.dtype.itemsize
            shape.append(len(part))
            strides.append(stride * part.step)
        # A dim of stride 0 (torch's expand) is in the file once.
        once = [size if stride else min(size, 1) for size, stride in zip(shape, strides, strict=True)]
        stored = np.dtype(np.uint8) if self.dtype == np.bool_ else self.dtype
        out = np.empty(once, stored)
        if out.size:
            self._fill(out, start, strides)
        if self.dtype == np.bool_:
            out = out != 0  # a byte that is neither 0 nor 1 is no numpy bool
        return out if once == shape else np.array(np.broadcast_to(out, shape), order="C")

    def _fill(self, out: np.ndarray, start: int, strides: list[int]) -> None:
        itemsize = out.dtype.itemsize
        if out.flags.c_contiguous and _is_contiguous(out.shape, strides):
            self._reader.read_into(start, out.reshape(-1).view(np.uint8))
            return
        num_bytes = _span(out.shape, strides) * itemsize
        if num_bytes <= CHUNK_BYTES:
            flat = np.frombuffer(self._reader.read(start, num_bytes), out.dtype)
            out[...] = np.lib.stride_tricks.as_strided(flat, out.shape, [stride * itemsize for stride in strides])
            return
        # Halving at least, along the outermost dim in the file: dims do not overlap, so nothing is read twice.
        axis = max((axis for axis, size in enumerate(out.shape) if size > 1), key=lambda axis: strides[axis])
        step_bytes = strides[axis] * itemsize
        step = max(1, min(CHUNK_BYTES // step_bytes, out.shape[axis] // 2))
        for first in range(0, out.shape[axis], step):
            part = (slice(None),) * axis + (slice(first, first + step),)
            self._fill(out[part], start + first * step_bytes, strides)


class Unknown:
    """Stands for an object of a class, or a result of a function, that is not known here; what it held is dropped."""

    __slots__ = ("name",)

    def __init__(self, name: str):
        self.name = name

    def __repr__(self) -> str:
        return f"Unknown({self.name!r})"


# ---- bytes


class _Buffer:
    """Bounds-checked reads of bytes in memory."""

    def __init__(self, data: bytes):
        self._data, self.name, self.num_bytes = memoryview(data), "the given bytes", len(data)

    def refuse(self, why: str):
        raise InputError(f"{self.name}: {why}")

    def read(self, start: int, num_bytes: int) -> bytearray:
        out = bytearray(num_bytes)
        self.read_into(start, out)
        return out

    def read_into(self, start: int, out) -> None:
        memoryview(out)[:] = self._data[start : start + len(out)]

    def close(self) -> None:
        pass  # nothing to give back


class _File(_Buffer):
    """The same of a regular file; nothing else (a pipe would block, a device never ends)."""

    def __init__(self, path: Path):
        self.name = ascii(str(path))[1:-1]
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError as error:
            raise InputError(f"{self.name} is not there; check the path, or download it again") from error
        except (OSError, ValueError) as error:  # ValueError: a NUL in the name
            raise InputError(f"{self.name} cannot be opened: {getattr(error, 'strerror', error)}") from error
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            os.close(descriptor)
            raise InputError(f"{self.name} is no regular file; wanted a .bin or .pt file")
        self._file = io.FileIO(descriptor)  # closes itself when nothing holds it
        self.num_bytes = status.st_size

    def read_into(self, start: int, out) -> None:
        left = memoryview(out)
        while left:
            try:
                num_read = os.preadv(self._file.fileno(), [left], start)
            except OSError as error:
                raise InputError(f"{self.name} cannot be read: {error}") from error
            if not num_read:
                self.refuse("became shorter while it was open; download it again")
            start, left = start + num_read, left[num_read:]

    def close(self) -> None:
        self._file.close()


def _show(text) -> str:
    """A name from a file for a message: one line, plain, not long."""
    text = text.name if isinstance(text, Unknown) else text
    if not isinstance(text, str):
        return f"a {type(text).__name__}"
    return ascii(text[:80] + "..." if len(text) > 80 else text)


# ---- zip


@dataclasses.dataclass(frozen=True, slots=True)
class _Member:
    """Where a member's bytes are; crc is 0 where torch was told to compute none."""

    start: int
    num_bytes: int
    crc: int


_LOCAL, _CENTRAL, _END = struct.Struct("<4s5H3I2H"), struct.Struct("<4s6H3I5H2I"), struct.Struct("<4s4H2IH")
_END64, _LOCATOR = struct.Struct("<4sQ2H2I4Q"), struct.Struct("<4sIQI")
_DAMAGED = "is cut short, damaged or no file of torch.save's; download it again"


def _read_directory(reader) -> tuple[str, dict[str, _Member]]:
    """The folder that everything in the zip is in, and its members by full name.

    Stricter than zip: no comment, nothing before or after, between directory and end nothing, nothing compressed,
    encrypted, overlapping or twice. zipfile would read more kinds of damage, and raise more kinds of exceptions.
    """
    refuse = reader.refuse
    magic = bytes(reader.read(0, min(4, reader.num_bytes)))
    if not magic:
        refuse("is empty; download it again")
    if magic[:1] == b"\x80":
        refuse(f"is in the format from before torch 1.6, which is not read here; {RESAVE}")
    if magic != b"PK\x03\x04":
        refuse(f"starts with {magic!r}, wanted a zip file of torch.save's; if it is from before torch 1.6, {RESAVE}")
    num_members, start, num_bytes = _read_end(reader)
    if num_members > MAX_MEMBERS or num_bytes > MAX_DIRECTORY_BYTES:
        refuse(f"has {num_members} members in {num_bytes} bytes of directory; wanted at most {MAX_MEMBERS}")
    directory = bytes(reader.read(start, num_bytes))
    members, headers, root, position = {}, [], None, 0
    for _ in range(num_members):
        if position + _CENTRAL.size > num_bytes:
            refuse(_DAMAGED)
        fields = _CENTRAL.unpack_from(directory, position)
        sig, _, _, flags, method, _, _, crc, packed, size, name_size, extra_size, comment_size, disk, _, _, at = fields
        position += _CENTRAL.size
        raw_name = directory[position : position + name_size]
        extra = directory[position + name_size : position + name_size + extra_size]
        position += name_size + extra_size + comment_size
        if sig != b"PK\x01\x02" or position > num_bytes:
            refuse(_DAMAGED)
        name = _check_name(raw_name, refuse)
        size, packed, at = _widen([size, packed, at], extra, refuse)
        if flags & ~0x0808 or disk:  # those two: sizes follow the data, names are UTF-8
            refuse(f"member {_show(name)} is encrypted or otherwise unusual (flags {flags:#x}); {RESAVE}")
        if method or packed != size:
            refuse(f"member {_show(name)} is compressed; torch.save stores only: unpack and re-save it with torch")
        if name in members:
            refuse(f"member {_show(name)} is there twice; get the file from somebody you trust")
        folder = name.split("/", 1)[0]
        if "/" not in name or folder != (root or folder):
            refuse(f"member {_show(name)} is not in the one folder that torch.save makes; {RESAVE}")
        root = folder
        first = _find_data(reader, raw_name, at, size, packed, flags, start)
        members[name] = _Member(first, size, crc)
        headers.append((at, first + size, name))
    if position != num_bytes or not members:
        refuse(_DAMAGED)
    headers.sort()
    for (_, end, name), (after, _, other) in itertools.pairwise(headers):
        if end > after:
            refuse(f"members {_show(name)} and {_show(other)} overlap; get the file from somebody you trust")
    return root, members


def _read_end(reader) -> tuple[int, int, int]:
    """(number of members, start and size of the directory) from the last bytes, plain or zip64."""
    refuse, end_at = reader.refuse, reader.num_bytes - _END.size
    if end_at < 0:
        refuse(_DAMAGED)
    sig, disk, other_disk, here, count, num_bytes, start, comment = _END.unpack(reader.read(end_at, _END.size))
    if sig != b"PK\x05\x06" or comment or disk or other_disk or here != count:
        refuse(_DAMAGED)
    plain, full = (count, num_bytes, start), (0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF)
    locator_at = end_at - _LOCATOR.size
    if locator_at >= 0:
        sig, disk, end64_at, num_disks = _LOCATOR.unpack(reader.read(locator_at, _LOCATOR.size))
        if sig == b"PK\x06\x07":
            end_at = locator_at - _END64.size
            if disk or num_disks != 1 or end_at < 0 or end64_at != end_at:
                refuse(_DAMAGED)
            fields = _END64.unpack(reader.read(end_at, _END64.size))
            sig, size, _, _, disk, other_disk, here, count, num_bytes, start = fields
            wide = (count, num_bytes, start)
            agree = all(a in (b, limit) for a, b, limit in zip(plain, wide, full, strict=True))
            if sig != b"PK\x06\x06" or size != _END64.size - 12 or disk or other_disk or here != count or not agree:
                refuse(_DAMAGED)
    if start + num_bytes != end_at:
        refuse(_DAMAGED)
    return count, start, num_bytes


def _check_name(raw: bytes, refuse) -> str:
    try:
        name = raw.decode("utf-8")
    except UnicodeDecodeError:
        name = ""
    parts = name.split("/")
    drive = name[1:2] == ":"
    if not name.isprintable() or drive or "\\" in name or any(part in ("", ".", "..") for part in parts):
        refuse(f"a member is called {raw[:80]!r}, wanted a relative path without '..'; do not trust this file")
    return name


def _widen(fields: list[int], extra: bytes, refuse) -> list[int]:
    """Replaces fields that are full by those of the zip64 extra field, in its order."""
    if 0xFFFFFFFF not in fields:
        return fields
    position = 0
    while position + 4 <= len(extra):
        kind, size = struct.unpack_from("<2H", extra, position)
        body = extra[position + 4 : position + 4 + size]
        if kind == 1 and len(body) == size:
            wide = [value for (value,) in struct.iter_unpack("<Q", body[: size // 8 * 8])]
            if fields.count(0xFFFFFFFF) <= len(wide):
                return [wide.pop(0) if field == 0xFFFFFFFF else field for field in fields]
        position += 4 + size
    return refuse(_DAMAGED)


def _find_data(reader, raw_name: bytes, at: int, size: int, packed: int, flags: int, limit: int) -> int:
    """Where a member's data starts, which its local header says; all of it lies before `limit`."""
    if at + _LOCAL.size > limit:
        reader.refuse(_DAMAGED)
    sig, _, local_flags, method, _, _, _, local_packed, local_size, name_size, extra_size = _LOCAL.unpack(
        reader.read(at, _LOCAL.size)
    )
    first = at + _LOCAL.size + name_size + extra_size
    if sig != b"PK\x03\x04" or local_flags != flags or method or name_size != len(raw_name) or first + size > limit:
        reader.refuse(_DAMAGED)
    later = (0, 0xFFFFFFFF) if flags & 8 else (0xFFFFFFFF,)
    if (local_packed != packed and local_packed not in later) or (local_size != size and local_size not in later):
        reader.refuse(_DAMAGED)
    if reader.read(at + _LOCAL.size, name_size) != raw_name:
        reader.refuse(f"a member is called {raw_name[:80]!r} in one place and not in another; do not trust this file")
    return first


def _read_pickle(reader, names: dict[str, _Member]) -> bytes:
    """The bytes of data.pkl, from a file that is of tensors and little-endian."""
    if "constants.pkl" in names or any(name.startswith("code/") for name in names):
        reader.refuse("is a TorchScript archive; save its weights: torch.save(torch.jit.load(OLD).state_dict(), NEW)")
    if "data.pkl" not in names:
        reader.refuse(f"is a zip file without data.pkl; wanted one of torch.save's; {RESAVE}")
    small = {"data.pkl": MAX_PICKLE_BYTES, "byteorder": 16}  # torch < 2.1 wrote no byteorder
    found = {}
    for name in small.keys() & names.keys():
        member = names[name]
        if member.num_bytes > small[name]:
            reader.refuse(f"{name} has {member.num_bytes} bytes, wanted at most {small[name]}; {RESAVE}")
        found[name] = bytes(reader.read(member.start, member.num_bytes))
        if member.crc not in (0, zlib.crc32(found[name])):
            reader.refuse(f"{name} is damaged (its checksum differs); download it again")
    order = found.get("byteorder", b"little")
    if order != b"little":
        reader.refuse(f"byte order is {order!r}, wanted b'little'; re-save it on a little-endian machine")
    return found["data.pkl"]


# ---- pickle


_PUSHED = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_NUMBERS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"}
_TEXTS = {"BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
_BYTES = {"BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"}
_PUTS, _GETS = {"BINPUT", "LONG_BINPUT", "MEMOIZE"}, {"BINGET", "LONG_BINGET"}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_OTHERS = (
    "PROTO FRAME STOP MARK POP POP_MARK EMPTY_DICT EMPTY_LIST EMPTY_SET TUPLE APPEND APPENDS SETITEM SETITEMS ADDITEMS "
    "FROZENSET GLOBAL STACK_GLOBAL REDUCE NEWOBJ NEWOBJ_EX BUILD BINPERSID"
)
OPCODES = {*_PUSHED, *_NUMBERS, *_TEXTS, *_BYTES, *_PUTS, *_GETS, *_TUPLES, *_OTHERS.split()}


_TABLE = {opcode.code.encode("latin-1"): opcode for opcode in pickletools.opcodes}


def _opcodes(data: bytes, refuse):
    """Yields (name, argument, position) of each opcode, as pickletools.genops does with the same table.

    Unlike genops it looks whether an opcode is allowed before it reads its argument (text of UNICODE, say, imports a
    codec: found by fuzzing), and takes a GLOBAL's names as they are, without escapes. No argument is longer than data.
    """
    stream, name = io.BytesIO(data), ""
    while name != "STOP":
        position = stream.tell()
        code = stream.read(1)
        if code not in _TABLE:
            refuse("data.pkl is cut short or damaged; download it again")
        opcode = _TABLE[code]
        name, arg = opcode.name, None
        if name not in OPCODES:
            refuse(f"data.pkl uses {name}, which files of tensors do not; do not trust this file")
        try:
            if name == "GLOBAL":
                arg = f"{_read_line(stream)} {_read_line(stream)}"
            elif opcode.arg is not None:
                arg = opcode.arg.reader(stream)
        except ValueError as error:
            refuse(f"data.pkl is damaged ({_show(str(error))}); download it again")
        yield name, arg, position


def _read_line(stream: io.BytesIO) -> str:
    line = stream.readline()
    if not line.endswith(b"\n"):
        raise ValueError("a name without an end")
    return line[:-1].decode("utf-8")


def _scan(data: bytes, refuse) -> None:
    """Looks at every opcode before the first is interpreted."""
    num_memo = 0
    for count, (name, arg, position) in enumerate(_opcodes(data, refuse), start=1):
        if count > MAX_OPCODES:
            refuse(f"data.pkl has more than {MAX_OPCODES} opcodes; save tensors in fewer, larger pieces")
        num_memo += name == "MEMOIZE"
        if max(num_memo, arg if name in ("LONG_BINPUT", "LONG_BINGET") else 0) > MAX_MEMO:
            refuse(f"data.pkl has a memo index above {MAX_MEMO}; do not trust this file")
        if name == "PROTO" and not 2 <= arg <= 5:
            refuse(f"data.pkl is of pickle protocol {arg}, wanted 2 to 5; {RESAVE}")
        if name == "LONG1" and arg.bit_length() > 256:
            refuse("data.pkl has a number of more than 256 bits; do not trust this file")
        if name == "STOP" and position + 1 != len(data):
            refuse("data.pkl has bytes after its end; do not trust this file")


class _OrderedDict(dict):
    """What collections.OrderedDict becomes: a dict on which BUILD is allowed."""

    __slots__ = ()


class _Known(Unknown):
    """A global that the interpreter knows what to make of. No value of a tree."""

    __slots__ = ()


class _Storage(Unknown):
    """A storage of which tensors are views. No value of a tree."""

    __slots__ = ("dtype", "member", "numel")

    def __init__(self, dtype: np.dtype, numel: int, member: _Member):
        super().__init__("torch.storage")
        self.dtype, self.numel, self.member = dtype, numel, member


_TENSOR, _PARAMETER = "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter"
_PARAMETER_WITH_STATE, _FROM_TYPE = f"{_PARAMETER}_with_state", "torch._tensor._rebuild_from_type_v2"
_ORDERED_DICT = "collections.OrderedDict"
_CLASSES = {"torch.Tensor", "torch.nn.parameter.Parameter"}
_FUNCTIONS = {_TENSOR, _PARAMETER, _PARAMETER_WITH_STATE, _FROM_TYPE, _ORDERED_DICT, "torch.Size", "torch.device"}
_KNOWN = {*_FUNCTIONS, *_CLASSES, *(f"torch.{name}" for name in STORAGES)}
_DTYPES = {
    f"torch.{name}" for name in (*(dtype.name for dtype in STORAGES.values()), "half", "float", "double", "int", "long")
}
_LEAVES = {str, int, float, bool, bytes, type(None), LazyTensor}
_SCALARS = {str, bool, type(None)}


class _Machine:
    """Interprets a pickle whose opcodes `_scan` has passed. It makes values of its own and calls nothing.

    An argument that the memo can repeat (a long tuple, a long text) must not be copied or walked each time: a pickle
    of a few bytes an opcode would take days. So whatever is looked into is bounded first.
    """

    def __init__(self, reader, storages: dict[str, _Member], allow_unknown: bool):
        self.reader, self.storages, self.allow_unknown = reader, storages, allow_unknown
        self.stack, self.marked, self.memo, self.globals = [], [], {}, {}

    def refuse(self, why: str):
        self.reader.refuse(f"data.pkl {why}")

    def unknown(self, name: str) -> Unknown:
        if not self.allow_unknown:
            self.refuse(
                f"holds {_show(name)}, which is no tensor or plain value known here; re-save only the tensors: "
                "torch.save(model.state_dict(), NEW)"
            )
        return Unknown(name)

    def run(self, data: bytes):
        """The tree."""
        for name, arg, _ in _opcodes(data, self.reader.refuse):
            if name in _PUSHED:
                self.stack.append(_PUSHED[name])
            elif name in _NUMBERS:
                self.stack.append(arg)
            elif name in _TEXTS:
                self.stack.append(self.text(arg))
            elif name in _BYTES:
                self.stack.append(bytes(arg))
            elif name in _PUTS:
                self.memo[len(self.memo) if name == "MEMOIZE" else arg] = self.top()
            elif name in _GETS:
                if arg not in self.memo:
                    self.refuse(f"gets memo {arg}, which is not there; do not trust this file")
                self.stack.append(self.memo[arg])
            elif name in _TUPLES:
                self.stack.append(tuple(reversed([self.pop() for _ in range(_TUPLES[name])])))
            elif name == "STOP":
                break
            elif name not in ("PROTO", "FRAME"):
                getattr(self, f"do_{name.lower()}")(arg)
        if self.marked or len(self.stack) != 1:
            self.refuse("does not end with one value; download it again")
        self.check_tree(self.stack[0])
        return self.stack[0]

    # -- the stack

    def pop(self):
        self.top()
        return self.stack.pop()

    def top(self):
        if not self.stack:
            self.refuse("takes a value where there is none; download it again")
        return self.stack[-1]

    def pop_mark(self) -> list:
        if not self.marked:
            self.refuse("takes a mark where there is none; download it again")
        items, self.stack = self.stack, self.marked.pop()
        return items

    def do_mark(self, _) -> None:
        if len(self.marked) == MAX_MARKS:
            self.refuse(f"nests deeper than {MAX_MARKS} marks; do not trust this file")
        self.marked.append(self.stack)
        self.stack = []

    def do_pop(self, _) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.pop_mark()

    def do_pop_mark(self, _) -> None:
        self.pop_mark()

    # -- values

    def text(self, value: str) -> str:
        try:
            value.isascii() or value.encode()
        except UnicodeEncodeError:  # half a surrogate pair, which whoever prints it would stumble over
            self.refuse("has text that is no UTF-8; download it again")
        return value

    def do_empty_dict(self, _) -> None:
        self.stack.append({})

    def do_empty_list(self, _) -> None:
        self.stack.append([])

    def do_empty_set(self, _) -> None:
        self.stack.append(self.unknown("builtins.set"))

    def do_tuple(self, _) -> None:
        items = self.pop_mark()
        self.stack.append(tuple(items))

    def do_frozenset(self, _) -> None:
        self.pop_mark()
        self.stack.append(self.unknown("builtins.frozenset"))

    def do_additems(self, _) -> None:
        self.pop_mark()
        if type(self.top()) is not Unknown:
            self.refuse(f"adds items to {_show(self.top())}, wanted a set; do not trust this file")

    def do_append(self, _) -> None:
        self.extend([self.pop()])

    def do_appends(self, _) -> None:
        self.extend(self.pop_mark())

    def extend(self, items: list) -> None:
        target = self.top()
        if type(target) is list:
            target.extend(items)
        elif type(target) is not Unknown:
            self.refuse(f"appends to {_show(target)}, wanted a list; do not trust this file")

    def do_setitem(self, _) -> None:
        value, key = self.pop(), self.pop()
        self.set_items([key, value])

    def do_setitems(self, _) -> None:
        self.set_items(self.pop_mark())

    def set_items(self, items: list) -> None:
        target = self.top()
        if type(target) is Unknown:
            return
        if type(target) not in (dict, _OrderedDict) or len(items) % 2:
            self.refuse(f"sets items of {_show(target)}, wanted pairs in a dict; do not trust this file")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[self.key(key)] = value

    def key(self, key):
        """A key whose hash is quick, and cannot be chosen to collide with thousands of others."""
        if type(key) in _SCALARS or (type(key) is int and abs(key) <= MAX_MEMO):
            return key
        if type(key) is Unknown:
            return key
        return self.unknown(f"a dict key of type {type(key).__name__}")

    # -- what would call something in an unpickler

    def do_global(self, arg: str) -> None:
        self.push_global(*arg.split(" ", 1))

    def do_stack_global(self, _) -> None:
        name, module = self.pop(), self.pop()
        if type(name) is not str or type(module) is not str:
            self.refuse("names a class by what is no text; do not trust this file")
        self.push_global(module, name)

    def push_global(self, module: str, name: str) -> None:
        if max(len(module), len(name)) > MAX_NAME:
            self.refuse(f"has a class name of more than {MAX_NAME} characters; do not trust this file")
        if (module, name) not in self.globals:
            full = f"{module}.{name}"
            found = full if full in _DTYPES else _Known(full) if full in _KNOWN else self.unknown(full)
            self.globals[module, name] = found
        self.stack.append(self.globals[module, name])

    def do_reduce(self, _) -> None:
        args, function = self.pop(), self.pop()
        if type(args) is not tuple or not isinstance(function, Unknown):
            self.refuse(f"calls {_show(function)} with {_show(args)}; do not trust this file")
        self.stack.append(self.reduce(function, args))

    def reduce(self, function: Unknown, args: tuple):
        name = function.name
        if type(function) is Unknown:
            return function
        if type(function) is _Known and len(args) <= 8:
            if name == _FROM_TYPE and len(args) == 4 and isinstance(args[1], Unknown):
                inner, cls, args, _ = args  # a tensor with attributes, or of a subclass: the call inside, and no state
                if type(cls) is Unknown:
                    return cls
                known = type(inner) is _Known and inner.name in (_TENSOR, _PARAMETER) and cls.name in _CLASSES
                name = inner.name if known and type(args) is tuple else ""
            if name == _ORDERED_DICT and not args:
                return _OrderedDict()
            if name == _TENSOR and len(args) in (6, 7):
                return self.tensor(*args)
            if (
                name in (_PARAMETER, _PARAMETER_WITH_STATE)
                and len(args) >= 3
                and type(args[0]) in (LazyTensor, Unknown)
            ):
                return args[0]
            if name == "torch.Size" and len(args) == 1 and _are_sizes(args[0]):
                return args[0]
            if name == "torch.device" and len(args) in (1, 2) and type(args[0]) is str and len(args[0]) <= MAX_NAME:
                return args[0]  # and not its index
        return self.refuse(f"calls {_show(function.name)} as torch does not; do not trust this file")

    def do_newobj(self, _) -> None:
        self.pop()
        self.new_object(self.pop())

    def do_newobj_ex(self, _) -> None:
        self.pop(), self.pop()
        self.new_object(self.pop())

    def new_object(self, cls) -> None:
        if not isinstance(cls, Unknown):
            self.refuse(f"makes an object of {_show(cls)}, wanted a class; do not trust this file")
        self.stack.append(self.unknown(cls.name))

    def do_build(self, _) -> None:
        state, target = self.pop(), self.top()
        # An OrderedDict's state is a state dict's _metadata, of which nothing is needed.
        if type(target) is not Unknown and not (type(target) is _OrderedDict and type(state) is dict):
            self.refuse(f"sets the state of {_show(target)}; do not trust this file")

    def do_binpersid(self, _) -> None:
        which = self.pop()
        if type(which) is not tuple or len(which) != 5:
            self.refuse("has a persistent id that is not torch's; do not trust this file")
        kind, cls, key, location, numel = which
        if not (type(kind) is type(key) is type(location) is str) or kind != "storage" or not _are_sizes((numel,)):
            self.refuse("has a persistent id that is not torch's; do not trust this file")
        dtype = STORAGES.get(cls.name.removeprefix("torch.")) if type(cls) is _Known else None
        if type(cls) is Unknown:  # complex or quantised: so is each tensor of it
            self.stack.append(cls)
            return
        if dtype is None:
            name = cls.name if isinstance(cls, Unknown) else cls
            self.refuse(f"has a storage of {_show(name)}, wanted torch.{', '.join(STORAGES)}")
        if key not in self.storages:
            self.refuse(f"names storage {_show(key)}, which is not in the file; download it again")
        member = self.storages[key]
        if numel * dtype.itemsize != member.num_bytes:
            self.refuse(
                f"says that storage {_show(key)} has {numel} x {dtype.name}, but it has {member.num_bytes} bytes; do "
                "not trust this file"
            )
        self.stack.append(_Storage(dtype, numel, member))

    def tensor(self, storage, offset, shape, strides, _requires_grad, _hooks, metadata=None) -> LazyTensor | Unknown:
        """Checks that the view lies in its storage and touches no element twice."""
        if type(storage) is Unknown:
            return storage
        if type(storage) is not _Storage or not (_are_sizes((offset,)) and _are_sizes(shape) and _are_sizes(strides)):
            self.refuse("has a tensor whose storage, offset, size or stride are none; do not trust this file")
        if len(shape) != len(strides) or metadata:
            self.refuse(
                "has a tensor with more or fewer strides than sizes, or with its conj or neg bit set; re-save it plain"
            )
        numel = math.prod(shape)
        if offset > storage.numel or (numel and offset + _span(shape, strides) > storage.numel):
            self.refuse(
                f"has a tensor of size {shape}, stride {strides} at {offset} outside its storage of {storage.numel}; "
                "do not trust this file"
            )
        if numel * storage.dtype.itemsize > self.reader.num_bytes:
            self.refuse(f"has a tensor of size {shape}, larger than the file; save it after .contiguous()")
        if numel and _overlaps(shape, strides):
            self.refuse(f"has a tensor of size {shape}, stride {strides} that overlaps itself; save its .contiguous()")
        start = storage.member.start + offset * storage.dtype.itemsize
        return LazyTensor(self.reader, start, shape, strides, storage.dtype)

    # -- the result

    def check_tree(self, tree) -> None:
        """Bounds what a walk over the tree takes: shared parts count each time, and a cycle has no bottom."""
        left, count = [(tree, 0)], 0
        while left:
            node, depth = left.pop()
            if depth > MAX_DEPTH:
                self.refuse(f"nests deeper than {MAX_DEPTH}, or holds itself; do not trust this file")
            if type(node) in (list, tuple, dict, _OrderedDict):
                count += len(node)
                if count > MAX_OPCODES:
                    self.refuse(f"holds more than {MAX_OPCODES} values, shared ones counted each time")
                left += [(item, depth + 1) for item in (node.values() if isinstance(node, dict) else node)]
            elif type(node) not in _LEAVES and not (self.allow_unknown and isinstance(node, Unknown)):
                name = node.name if isinstance(node, Unknown) else type(node).__name__
                self.refuse(f"holds {_show(name)}, which is no tensor or plain value; {RESAVE}")


def _are_sizes(values) -> bool:
    return (
        type(values) is tuple
        and len(values) <= MAX_DIMS
        and all(type(value) is int and 0 <= value < 1 << 62 for value in values)
    )


def _span(shape, strides) -> int:
    """The number of elements from the first of a view that is not empty to its last."""
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def _overlaps(shape, strides) -> bool:
    """Whether some element may be there twice, other than by dims of stride 0."""
    inner = 1
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size > 1 and stride:
            if stride < inner:
                return True
            inner += (size - 1) * stride
    return False


def _is_contiguous(shape, strides) -> bool:
    inner = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size > 1 and stride != inner:
            return False
        inner *= size
    return True


# ---- writing


def save_torch_file(path: str | Path, tree) -> None:
    """Writes what `torch.load(path, weights_only=True)` reads, under another name until all of it is on disk.

    tree: of dict, list, tuple, str, int, float, bool, None, numpy arrays, and objects with shape, dtype and
    fetch() -> array, which are fetched one at a time. An object that is there twice is stored once, as tied weights.
    Raises: TypeError for anything else in it.
    """
    path = Path(os.path.abspath(path))
    pickler = _Pickler()
    data = pickler.dump(tree)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with open(partial, "wb") as file:
            with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
                _write_member(archive, "data.pkl", len(data), [data])
                _write_member(archive, "byteorder", 6, [b"little"])
                for key, tensor in enumerate(pickler.tensors):
                    num_bytes = math.prod(tensor.shape) * np.dtype(tensor.dtype).itemsize
                    _write_member(archive, f"data/{key}", num_bytes, _chunks(tensor))
                _write_member(archive, "version", 2, [b"3\n"])
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            partial.unlink()
        raise
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_member(archive: zipfile.ZipFile, name: str, num_bytes: int, chunks) -> None:
    """Writes a stored member whose data starts at a multiple of ALIGNMENT, by padding as torch's."""
    info = zipfile.ZipInfo(f"archive/{name}")  # with zip's first date, 1980: equal trees give equal files
    info.file_size = num_bytes
    wide = num_bytes > WIDE_BYTES
    start = archive.fp.tell() + _LOCAL.size + len(info.filename) + 20 * wide + 4
    num_padding = -start % ALIGNMENT
    info.extra = b"FB" + struct.pack("<H", num_padding) + b"Z" * num_padding
    with archive.open(info, "w", force_zip64=wide) as member:
        for chunk in chunks:
            member.write(chunk)


def _chunks(tensor):
    array = tensor if isinstance(tensor, np.ndarray) else np.asarray(tensor.fetch())
    if array.shape != tuple(tensor.shape) or array.dtype != tensor.dtype:
        raise ValueError(f"fetch() gave {array.dtype} {array.shape}, wanted {tensor.dtype} {tuple(tensor.shape)}")
    array = array.astype(array.dtype.newbyteorder("<"), order="C", copy=False)
    flat = array.reshape(-1).view(np.uint8)
    for start in range(0, flat.size, CHUNK_BYTES):
        yield flat[start : start + CHUNK_BYTES].data


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
        elif hasattr(value, "dtype") and (isinstance(value, np.ndarray) or hasattr(value, "fetch")):
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
        ordered = isinstance(value, collections.OrderedDict | _OrderedDict)
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
        strides = tuple(math.prod(size or 1 for size in shape[axis + 1 :]) for axis in range(len(shape)))
        for item in (0, shape, strides, False, collections.OrderedDict()):
            self.value(item)
        self.out.write(b"tR")
