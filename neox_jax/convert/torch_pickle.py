"""The pickle of PyTorch's .bin and .pt files, which is a program: read without running it.

Nothing here calls what a pickle names: an interpreter of our own knows the opcodes that tensors and plain values need,
and everything else is refused, or with `allow_unknown` replaced by a placeholder.
"""

import io
import math
import pickletools

import ml_dtypes
import numpy as np

from neox_jax.convert.byte_reader import ByteReader, show_name
from neox_jax.convert.lazy_tensor import LazyTensor, is_representable, span
from neox_jax.convert.torch_zip import RESAVE

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
MAX_MEMO = 1 << 20
MAX_OPCODES = 1 << 20  # a tensor takes about 45, so 23,000 tensors; an empty dict of 64 bytes takes one
MAX_DEPTH, MAX_MARKS = 64, 256
MAX_DIMS, MAX_NAME = 32, 256


def read_pickle(data: bytes, reader: ByteReader, storages: dict[str, ByteReader], *, allow_unknown: bool):
    """The tree that data.pkl makes, with a `LazyTensor` for each tensor, in one of `storages`.

    reader: the file, for its size and its name. Raises: InputError.
    """
    _scan(data, reader.refuse)
    return _Machine(reader, storages, allow_unknown).run(data)


class Unknown:
    """Stands for an object of a class, or a result of a function, that is not known here; what it held is dropped."""

    __slots__ = ("name",)

    def __init__(self, name: str):
        self.name = name

    def __repr__(self) -> str:
        return f"Unknown({self.name!r})"


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


class Ordered(dict):
    """What collections.OrderedDict becomes: a dict on which BUILD is allowed."""

    __slots__ = ()


class _Known(Unknown):
    """A global that the interpreter knows what to make of. No value of a tree."""

    __slots__ = ()


class _Storage(Unknown):
    """A storage of which tensors are views. No value of a tree."""

    __slots__ = ("dtype", "member", "numel")

    def __init__(self, dtype: np.dtype, numel: int, member: ByteReader):
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

    def __init__(self, reader, storages: dict[str, ByteReader], allow_unknown: bool):
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
        if type(target) not in (dict, Ordered) or len(items) % 2:
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
                return Ordered()
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
        if type(target) is not Unknown and not (type(target) is Ordered and type(state) is dict):
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
        if offset > storage.numel or (numel and offset + span(shape, strides) > storage.numel):
            self.refuse(
                f"has a tensor of size {shape}, stride {strides} at {offset} outside its storage of {storage.numel}; "
                "do not trust this file"
            )
        if numel * storage.dtype.itemsize > self.reader.num_bytes or not is_representable(shape, storage.dtype):
            self.refuse(f"has a tensor of size {shape}, larger than the file; save it after .contiguous()")
        if numel and _overlaps(shape, strides):
            self.refuse(f"has a tensor of size {shape}, stride {strides} that overlaps itself; save its .contiguous()")
        return LazyTensor(storage.member, offset * storage.dtype.itemsize, shape, strides, storage.dtype)

    # -- the result

    def check_tree(self, tree) -> None:
        """Bounds what a walk over the tree takes: shared parts count each time, and a cycle has no bottom."""
        left, count = [(tree, 0)], 0
        while left:
            node, depth = left.pop()
            if depth > MAX_DEPTH:
                self.refuse(f"nests deeper than {MAX_DEPTH}, or holds itself; do not trust this file")
            if type(node) in (list, tuple, dict, Ordered):
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


def _overlaps(shape, strides) -> bool:
    """Whether some element may be there twice, other than by dims of stride 0."""
    inner = 1
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size > 1 and stride:
            if stride < inner:
                return True
            inner += (size - 1) * stride
    return False


def _show(text) -> str:
    """A name from a file for a message: one line, plain, not long."""
    text = text.name if isinstance(text, Unknown) else text
    if not isinstance(text, str):
        return f"a {type(text).__name__}"
    return show_name(text)
