"""Reads optimised HLO text (`compiled.as_text()`): instructions, loops' trip counts, matmuls' FLOPs, replica groups."""

import dataclasses
import functools
import math
import re

import numpy as np

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
ARRAY = re.compile(r"\b(pred|bf16|[sufc]\d+(?:e\d+m\d+\w*)?)\[([\d,]*)\]")
CALLED = re.compile(r"\b(calls|body|condition|to_apply)=%([\w.-]+)")
UNKNOWN_CYCLES = 2**62


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of HLO: `name = shape opcode(operands), attributes`; shape and attributes are text."""

    name: str
    opcode: str
    shape: str
    operands: tuple[str, ...]
    literal: str
    attributes: str

    @functools.cached_property
    def called(self) -> dict[str, str]:
        """calls, body, condition, to_apply -> the computation's name."""
        return dict(CALLED.findall(self.attributes))

    @functools.cached_property
    def cycles(self) -> int | None:
        """The compiler's estimate for running it once, on one core or on a chip's two together; None where it has
        none, which it also says by the largest number there is."""
        found = re.search(r'"estimated_cycles":"(-?\d+)"', self.attributes)
        return max(0, int(found[1])) if found and int(found[1]) < UNKNOWN_CYCLES else None

    @functools.cached_property
    def op_name(self) -> str:
        """Where it comes from in the program: "jit(train_step)/transpose(jvp())/while/body/...". Fusions keep one."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    @property
    def phase(self) -> str:
        """forward, backward or recomputed. The head's gradient is made in the forward pass, and counted there."""
        if "rematted_computation" in self.op_name:
            return "recomputed"
        return "backward" if "transpose(" in self.op_name else "forward"


@dataclasses.dataclass(frozen=True)
class Module:
    """computations: name -> its instructions in the order they run (the compiler's schedule)."""

    entry: str
    computations: dict[str, tuple[Instruction, ...]]

    @functools.cached_property
    def instructions(self) -> dict[str, dict[str, Instruction]]:
        return {name: {i.name: i for i in body} for name, body in self.computations.items()}

    def within(self, instruction: Instruction, names: dict[str, Instruction]):
        """(instruction, the names around it) of what a fusion calls, all the way down; itself, if it calls nothing."""
        called = instruction.called.get("calls")
        if called is None:
            yield instruction, names
        for inner in self.computations.get(called, ()):
            yield from self.within(inner, self.instructions[called])


def _close(text: str, start: int) -> int:
    """The index behind the bracket that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        if text[i] in "({[":
            depth += 1
        elif text[i] in ")}]":
            depth -= 1
            if depth == 0:
                return i + 1
    raise ValueError(f"no closing bracket in {text[start : start + 80]!r}")


def parse_instruction(line: str) -> Instruction:
    name, rest = line.strip().removeprefix("ROOT ").split(" = ", 1)
    end = _close(rest, 0) if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opcode, _, _ = rest.partition("(")
    end = _close(rest, len(opcode))
    inside = rest[len(opcode) + 1 : end - 1]
    operands = () if opcode == "constant" else tuple(re.findall(r"%([\w.-]+)", inside))
    return Instruction(name.lstrip("%"), opcode, shape, operands, inside, rest[end:])


def parse_hlo(text: str) -> Module:
    """Reads what `compiled.as_text()` gives. A kernel's metadata may go over several lines."""
    entry, name, computations, lines = "", "", {}, []
    for line in text.splitlines():
        if line == "}":
            computations[name] = tuple(parse_instruction(line) for line in lines)
            lines = []
        elif re.match(r"  (ROOT )?%", line):
            lines.append(line)
        elif header := re.match(r"(ENTRY )?%([\w.-]+) \(.*\{$", line):
            name = header[2]
            entry = name if header[1] else entry
        elif lines:
            lines[-1] += line
    if not entry:
        raise ValueError("the text has no ENTRY computation; it is not an HLO module")
    return Module(entry, computations)


def arrays(shape: str) -> list[tuple[str, tuple[int, ...]]]:
    """(dtype, dims) of an array's shape, or of each member of a tuple's."""
    return [(dtype, tuple(int(n) for n in dims.split(",") if n)) for dtype, dims in ARRAY.findall(shape)]


def shape_bytes(shape: str) -> int:
    """Bytes of the elements; the padding of tiles is not counted."""
    return sum(itemsize(dtype) * math.prod(dims) for dtype, dims in arrays(shape))


def itemsize(dtype: str) -> float:
    if dtype == "pred":
        return 1
    return int(re.search(r"\d+", dtype)[0]) / 8


def trip_count(module: Module, loop: Instruction, computation: str) -> int:
    """How often a while loop runs, from the constants it starts at, steps by and is compared with.

    Raises: ValueError where they are not constants.
    """
    condition = module.instructions[loop.called["condition"]]
    body = module.computations[loop.called["body"]]
    root = next(i for i in condition.values() if i.opcode == "compare" and i.shape.startswith("pred[]"))
    for counter, limit in (root.operands, root.operands[::-1]):
        index = _tuple_index(condition[counter])
        end = _constant(module, loop, computation, condition[limit])
        if index is not None and end is not None:
            break
    else:
        raise ValueError(f"the loop {loop.name} is not compared with a constant: {root}")
    if f"direction={'LT' if counter == root.operands[0] else 'GT'}" not in root.attributes:
        raise ValueError(f"the loop {loop.name} is not compared with <: {root}")
    start = _loop_operand(module, loop, computation, index)
    names = module.instructions[loop.called["body"]]
    updated = _through_copies(names, names[body[-1].operands[index]])
    steps = [_constant(module, loop, computation, names[name]) for name in updated.operands]
    step = next((value for value in steps if value is not None), None)
    if start is None or step is None or updated.opcode != "add":
        raise ValueError(f"the loop {loop.name} does not count from a constant by a constant: {updated}")
    return max(0, math.ceil((end - start) / step))


def _through_copies(names: dict[str, Instruction], instruction: Instruction) -> Instruction:
    while instruction.opcode in ("copy", "bitcast", "copy-done", "copy-start"):
        instruction = names[instruction.operands[0]]
    return instruction


def _tuple_index(instruction: Instruction) -> int | None:
    if instruction.opcode != "get-tuple-element":
        return None
    return int(re.search(r"index=(\d+)", instruction.attributes)[1])


def _constant(module: Module, loop: Instruction, computation: str, instruction: Instruction) -> int | None:
    """A scalar's value inside a loop, where it is a constant there or one carried in unchanged."""
    if instruction.opcode == "constant" and re.fullmatch(r"-?\d+", instruction.literal):
        return int(instruction.literal)
    index = _tuple_index(instruction)
    if index is None:
        return None
    names = module.instructions[loop.called["body"]]
    carried = names[module.computations[loop.called["body"]][-1].operands[index]]
    if _tuple_index(_through_copies(names, carried)) != index:
        return None
    return _loop_operand(module, loop, computation, index)


def _loop_operand(module: Module, loop: Instruction, computation: str, index: int) -> int | None:
    names = module.instructions[computation]
    start = names[loop.operands[0]]
    if start.opcode != "tuple":
        return None
    value = _through_copies(names, names[start.operands[index]])
    return int(value.literal) if value.opcode == "constant" and value.literal.lstrip("-").isdigit() else None


def matmul_flops(instruction: Instruction, names: dict[str, Instruction]) -> int:
    """FLOPs (2 a multiply-add) of a dot or a convolution, which is what TPUs make of every dot.

    A batched product is a convolution over padded or dilated windows: positions that meet no element are not counted.
    """
    (_, out), lhs, rhs = arrays(instruction.shape)[0], *(arrays(names[n].shape)[0][1] for n in instruction.operands[:2])
    if instruction.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)[1]
        return 2 * math.prod(out) * math.prod(lhs[int(d)] for d in contracted.split(",") if d)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    window = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    options = dict(part.split("=") for part in window[1].split()) if window else {}
    pairs = 1
    for position, digit in enumerate(sorted(c for c in labels[1] if c.isdigit())):
        option = {key: value.split("x")[position] for key, value in options.items()}
        pairs *= _window_pairs(
            size=int(option.get("size", 1)),
            stride=int(option.get("stride", 1)),
            pad=int(option.get("pad", "0_0").split("_")[0]),
            lhs_dilate=int(option.get("lhs_dilate", 1)),
            rhs_dilate=int(option.get("rhs_dilate", 1)),
            inputs=lhs[labels[1].index(digit)],
            outputs=out[labels[3].index(digit)],
        )
    batch, features = out[labels[3].index("b")], out[labels[3].index("f")]
    return 2 * batch * features * rhs[labels[2].index("i")] * pairs


@functools.lru_cache
def _window_pairs(*, size, stride, pad, lhs_dilate, rhs_dilate, inputs, outputs) -> int:
    """Pairs of an output position and a window position that meet an input element."""
    if (size, stride, pad, lhs_dilate) == (1, 1, 0, 1):
        return outputs
    at = np.arange(outputs)[:, None] * stride + np.arange(size)[None, :] * rhs_dilate - pad
    return int(((at >= 0) & (at % lhs_dilate == 0) & (at // lhs_dilate < inputs)).sum())


def replica_groups(attributes: str, num_partitions: int) -> np.ndarray:
    """Members [groups, members] by partition, from any of HLO's four spellings."""
    text = attributes[attributes.index("replica_groups=") + len("replica_groups=") :]
    ids = r"(?:\[([\d,]+)\](?:T\(([\d,]+)\))?)"
    if mesh := re.match(r"mesh\[([^\]]*)\](?:, device_ids=\(" + ids + r"\))? \{([^}]*)\}", text):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        devices = _iota(mesh[2] or str(num_partitions), mesh[3]).reshape(tuple(sizes.values()))
        if ":" in mesh[4]:
            raise ValueError(f"replica groups over part of an axis are not read: {mesh[0]}")
        axes = [list(sizes).index(name) for name in re.findall(r"'(\w+)'", mesh[4])]
        last = np.moveaxis(devices, axes, range(-len(axes), 0))
        return last.reshape(-1, math.prod(devices.shape[a] for a in axes))
    if iota := re.match(r"\[(\d+),(\d+)\]<=" + ids, text):
        return _iota(iota[3], iota[4]).reshape(int(iota[1]), int(iota[2]))
    if text.startswith("{}"):
        return np.arange(num_partitions)[None]
    groups = re.findall(r"\{([\d,]+)\}", text[: text.index("}}") + 1])
    return np.array([[int(n) for n in group.split(",")] for group in groups])


def _iota(dims: str, transpose: str | None) -> np.ndarray:
    shape = tuple(int(n) for n in dims.split(","))
    ids = np.arange(math.prod(shape)).reshape(shape)
    return ids.transpose([int(n) for n in transpose.split(",")]) if transpose else ids
