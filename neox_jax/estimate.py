"""Estimates a training step on TPU slices that are not there: compiles it for them and adds up what the compiler says.

Memory is the compiler's own allocation. Seconds come from the optimised HLO, an instruction at a time:
  what the compiler costs (`estimated_cycles`): cycles over the chip's clock, times the trip counts of the loops around;
  Pallas kernels, which carry no estimate: FLOPs of the blocks they visit, at KERNEL_EFFICIENCY of the peak;
  matrix products that carry none, as those with weights in 8 bits: FLOPs at MATMUL_EFFICIENCY of it;
  collectives, which carry none either: bytes over those links of the torus that the compiler says it uses
    (`chosen_rings`, `collective_seconds`), without latency and contention, so a lower bound;
  what else moves bytes and carries none: bytes read and written over the memory's bandwidth.
A collective that is started and finished by two instructions proceeds while the instructions between them run, and only
what is left of it at its end is counted; those in flight together share the links. Copies between the memory and VMEM
that the compiler started ahead (`copy-start`) are taken to be hidden. Nothing here was measured on a TPU.
"""

import collections
import dataclasses
import json
import math
import os
import re

import jax
import jax.numpy as jnp
import numpy as np

from neox_jax.config import Config
from neox_jax.errors import InputError
from neox_jax.hardware import find_chip
from neox_jax.hlo import (
    COLLECTIVES,
    Instruction,
    Module,
    arrays,
    itemsize,
    matmul_flops,
    parse_hlo,
    replica_groups,
    shape_bytes,
    trip_count,
)
from neox_jax.model import abstract_model
from neox_jax.optimizer import make_optimizer, make_schedule
from neox_jax.sharding import make_mesh, named_sharding
from neox_jax.train_state import abstract_state, pure_params
from neox_jax.train_step import make_train_step

# --- The chips and their links ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Interconnect:
    """clock: cycles/s behind `estimated_cycles`. link: bytes/s of one link in one direction; a torus dim has two links.

    clock: the peak FLOP/s over 2 x 4 units x 128 x 128 (v5e; v5p has two such cores), which is where the published peak
    comes from. What the compiler means by a cycle was measured: benchmarks/estimate_tpu.py --calibrate.
    link: 90% of Cloud's pages (v5e 400, v5p 1200, v6e 800 GB/s a chip, both directions of all links together), the
    share that "How To Scale Your Model" (jax-ml.github.io/scaling-book, "TPUs") uses and finds in all-gathers.
    wrap: a torus dim of this size, or of a multiple of it, is a ring; others are lines.
    """

    clock: float
    link: float
    wrap: int


INTERCONNECTS = {
    "TPU v5e": Interconnect(1.5e9, 45e9, 16),
    "TPU v5p": Interconnect(1.75e9, 90e9, 4),
    "TPU v6e": Interconnect(1.75e9, 90e9, 16),
}
# Of the peak, by phase: a splash kernel's softmax runs beside the matrix units, not in them. A fixed convention.
KERNEL_EFFICIENCY = {"forward": 0.5, "recomputed": 0.5, "backward": 0.4}
MATMUL_EFFICIENCY = 0.9  # of products that carry no estimate: somewhat below what the others' come to


def tpu_topology(name: str):
    """The description of an absent slice: "v5p:4x4x4", "v5e:16x16". Its devices can be compiled for, not run on.

    Raises: InputError without libtpu, or for a slice that it does not know.
    """
    from jax.experimental import topologies

    # Without these libtpu asks a metadata server what machine this is, and refuses a second process.
    for variable, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
        "TPU_LOG_DIR": "disabled",
        "TPU_ACCELERATOR_TYPE": "v5p-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }.items():
        os.environ.setdefault(variable, value)
    try:
        import libtpu  # noqa: F401
    except ImportError as error:
        raise InputError("libtpu is not on the path; `make libtpu`, then set PYTHONPATH=.libtpu") from error
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name)
    except Exception as error:  # jax.errors.JaxRuntimeError or NotImplementedError, by version
        raise InputError(f"no TPU slice {name!r} ({str(error).splitlines()[0][:200]}); try v5p:4x4x4") from error


def collective_seconds(
    kind: str, num_bytes: float, group: np.ndarray, extents, interconnect: Interconnect, *, rings: int | None = None
) -> float:
    """The least time for one collective over the links of a torus: bandwidth only, no latency.

    num_bytes: of the whole array, as every member has it before (reduce) or after (gather). group [members, dims]: the
    members' coordinates; extents: the slice's size by dim. rings: how many the compiler lays through the group at once,
    each of two directions; None: one along every torus dim that the group spans. An all-reduce is a reduce-scatter and
    an all-gather. A collective-permute's group is [2, dims], source and target: its bytes pass a link for every hop.
    """
    distances = np.abs(group[0] - group[-1])
    is_ring = np.asarray(extents) % interconnect.wrap == 0
    if kind == "collective-permute":
        hops = np.where(is_ring, np.minimum(distances, extents - distances), distances).sum()
        return float(num_bytes * hops / interconnect.link)
    members = np.array([len(np.unique(places)) for places in group.T])
    spanned = members > 1
    if not spanned.any():
        return 0.0
    links = int(np.where(is_ring & (members == extents), 2, 1)[spanned].sum())
    if rings is not None and rings < spanned.sum():  # a ring through several dims: there is one in any even rectangle
        links = 2 * rings
    passes = {"all-reduce": 2, "all-to-all": 0.25}.get(kind, 1)
    return float(passes * num_bytes * (len(group) - 1) / len(group) / (links * interconnect.link))


def chosen_rings(collective: Instruction, outer: Instruction) -> int | None:
    """How many rings the compiler says that it lays, in the configuration of a collective or of the fusion around it.

    A gather that says nothing is one that goes along with compute; all that say something on slices that large are one
    ring, so it is taken to be one too.
    """
    text = collective.attributes + outer.attributes
    if found := re.search(r'"strategy":"(\w+)".*?colors:(\d+)', text):
        return int(found[2]) // 2 or 1 if found[1].startswith("UniDirection") else int(found[2])
    if found := re.search(r'"emitter":"(\d)DAllGather', text):
        return int(found[1])
    return 1 if collective.opcode.startswith("all-gather") else None


# --- Kernels ----------------------------------------------------------------------------------------------------------

KERNEL_TARGET = 'custom_call_target="tpu_custom_call"'
# Matrix products of one block pair: scores and output; scores again, dP and dQ; scores, dV, dP and dK; all of those.
SEQUENCE_MINOR = 2  # of jax's splash_attention_kernel.QKVLayout
KERNEL_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4, "fused dkv": 5}


def visited_share(queries: int, keys: int, block_q: int, block_k: int) -> float:
    """The share of the scores in blocks that a causal mask does not leave out, for the last `queries` of `keys`.

    Where queries are sharded (context parallel), those are the device's that has the most to do.
    """
    rows = range(keys - queries, keys, block_q)
    visited = sum(math.ceil(min(start + block_q, keys) / block_k) * block_k for start in rows)
    return min(1.0, visited * block_q / (queries * keys))


def kernel_flops(instruction: Instruction, names: dict[str, Instruction]) -> int | None:
    """FLOPs of the blocks that a causal splash attention kernel visits, at the head dim it is given; None: another.

    The first operands of three dims and more are q, k and v [..., N, T, H], or [..., N, H, T]; the layout and the sizes
    of blocks stand in the kernel's metadata.
    """
    kind = re.search(r"splash_\w*?_(fwd|dq|dkv)", f"{instruction.op_name} {instruction.name}")
    if not kind:
        return None
    kind = kind[1]
    metadata = {key: int(value) for key, value in re.findall(r'(\w+)\\*": (\d+)', instruction.attributes)}
    operands = [arrays(names[n].shape)[0] for n in instruction.operands if len(arrays(names[n].shape)) == 1]
    q, k = [dims for dtype, dims in operands if len(dims) >= 3 and dtype in ("bf16", "f32")][:2]
    position = -1 if metadata.get("q_layout") == SEQUENCE_MINOR else -2
    queries, keys = q[position], k[position]
    fused = kind == "dkv" and any(len(dims) > len(q) for _, dims in arrays(instruction.shape))
    suffix = "" if kind == "fwd" else f"_{kind}"
    blocks = (metadata[f"block_q{suffix}"], metadata[f"block_kv{suffix}"])
    share = visited_share(queries, keys, *blocks)
    return round(KERNEL_PRODUCTS["fused dkv" if fused else kind] * 2 * math.prod(q) * keys * share)


# --- Adding up --------------------------------------------------------------------------------------------------------

# What takes no time of its own: names, views, and copies that run ahead beside the rest.
VIEWS = frozenset(("parameter", "constant", "bitcast", "tuple", "get-tuple-element", "iota"))
FREE = VIEWS | {"after-all", "partition-id", "replica-id", "opt-barrier", "add-dependency", "copy-start", "copy-done"}
FREE |= {"slice-start", "slice-done"}
LAYOUT = frozenset(("copy", "transpose", "reshape", "reverse", "slice", "pad", "concatenate"))
LAYOUT |= {"dynamic-slice", "dynamic-update-slice"}
CHANNEL = re.compile(r"channel_id=(\d+)")
BRANCHES = re.compile(r"(?:branch_computations=\{|true_computation=|false_computation=)([^}]*?)(?:\}|, )")
CATEGORIES = (
    *(f"{what} {phase}" for what in ("matmul", "kernel") for phase in ("forward", "backward", "recomputed")),
    *COLLECTIVES,
    "copies",
    "broadcasts",
    "other",
)


def category(module: Module, instruction: Instruction) -> str:
    """Which of CATEGORIES an instruction that is no collective belongs to. A fusion around a matmul is a matmul.

    copies: moves elements and calculates no more than a conversion. Of a fusion only what is about as large as its
    result counts, so that indices do not.
    """
    inner = [i for i, _ in module.within(instruction, {}) if i.opcode not in COLLECTIVES]
    if any(i.opcode in ("convolution", "dot") for i in inner):
        return f"matmul {instruction.phase}"
    size = shape_bytes(instruction.shape)
    working = {i.opcode for i in inner if shape_bytes(i.shape) * 8 > size} - VIEWS
    if working == {"broadcast"}:
        return "broadcasts"
    return "copies" if working & LAYOUT and working <= LAYOUT | {"convert", "broadcast"} else "other"


@dataclasses.dataclass
class Traffic:
    """Collectives of one kind over the same axes of the mesh. bytes: of the whole arrays, as in `collective_seconds`.

    count: in a step. link_seconds: on the links; exposed_seconds: of these, not hidden behind compute. per_layer: count
    and bytes within one iteration of the loops over the layers, by phase.
    """

    kind: str
    axes: tuple[str, ...]
    count: int = 0
    bytes: float = 0
    link_seconds: float = 0
    exposed_seconds: float = 0
    per_layer: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Costs:
    """What a program takes on one chip. seconds by category add up; flops of matmuls and kernels by phase.

    largest: (seconds in all, times, category, instruction, op_name), most first. unknown_kernels: counted as 0 seconds.
    """

    seconds: dict[str, float]
    traffic: dict[str, Traffic]
    flops: dict[str, float]
    largest: list[tuple[float, int, str, str, str]]
    unknown_kernels: list[str]

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


class Accountant:
    """Walks a module's schedule and adds up what it takes on one chip of a mesh of TPUs.

    num_layers: loops with so many iterations are those over the layers.
    """

    def __init__(self, module: Module, mesh, *, num_layers: int = 0):
        devices = list(mesh.devices.flat)
        self.module, self.num_layers = module, num_layers
        self.axes, self.axis_sizes = mesh.axis_names, mesh.devices.shape
        self.chip = find_chip(devices[0].device_kind)
        self.interconnect = INTERCONNECTS[self.chip.name]
        self.coordinates = np.array([device.coords for device in devices])  # [partitions, dims]
        self.extents = self.coordinates.max(axis=0) + 1
        self.costs = Costs(dict.fromkeys(CATEGORIES, 0.0), {}, collections.Counter(), [], [])

    def run(self) -> Costs:
        self._walk(self.module.entry, times=1, layer_phase=None)
        self.costs.largest.sort(reverse=True)
        return self.costs

    def _walk(self, computation: str, *, times: int, layer_phase: str | None) -> float:
        """Seconds of running a computation once; what is added to the costs is multiplied by `times`."""
        names = self.module.instructions[computation]
        now, links_free = 0.0, 0.0
        ends: dict[str, tuple[float, Traffic]] = {}  # of collectives in flight
        for instruction in self.module.computations[computation]:
            if instruction.opcode in ("while", "call", "conditional"):
                now += self._walk_called(instruction, computation, times=times, layer_phase=layer_phase)
                continue
            role, collective, key = collective_role(self.module, instruction)
            if role in ("start", "whole"):
                traffic, seconds = self._count(collective, instruction, times, layer_phase)
                began = now
                if traffic.kind != "collective-permute":  # those go to a neighbour, each over links of its own
                    began = max(now, links_free)
                    links_free = began + seconds
                if role == "start":
                    ends[key] = (began + seconds, traffic)
                else:
                    now += self._expose(traffic, began + seconds - now, times, instruction)
            elif role == "end" and key in ends:  # else it was started before the loop, and had an iteration's time
                end, traffic = ends.pop(key)
                now += self._expose(traffic, max(0.0, end - now), times, instruction)
            elif role in ("none", "carry"):
                now += self._compute(instruction, names, times)
        return now

    def _walk_called(self, instruction: Instruction, computation: str, *, times: int, layer_phase) -> float:
        if instruction.opcode == "while":
            trips = trip_count(self.module, instruction, computation)
            phase = instruction.phase if trips == self.num_layers else layer_phase
            return trips * self._walk(instruction.called["body"], times=times * trips, layer_phase=phase)
        if instruction.opcode == "call":
            return self._walk(instruction.called["to_apply"], times=times, layer_phase=layer_phase)
        # Of a conditional the dearest branch is taken; the others' costs stay in the sums, which errs upwards.
        branches = re.findall(r"%([\w.-]+)", " ".join(BRANCHES.findall(instruction.attributes)))
        return max(self._walk(branch, times=times, layer_phase=layer_phase) for branch in branches)

    def _count(self, collective: Instruction, outer: Instruction, times: int, layer_phase: str | None):
        """Adds the bytes of a collective in the instruction `outer`; returns its Traffic and seconds on the links."""
        kind = collective.opcode.removesuffix("-start")
        size = collective_bytes(collective)
        if kind == "collective-permute":
            pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", collective.attributes)[1]
            groups = np.array([[int(n) for n in pair.split(",")] for pair in re.findall(r"\d+,\d+", pairs)])
        else:
            groups = replica_groups(collective.attributes, len(self.coordinates))
        if kind == "reduce-scatter" and "dimensions=" in collective.attributes:
            size *= groups.shape[1]
        rings = chosen_rings(collective, outer)
        seconds = max(
            collective_seconds(kind, size, self.coordinates[group], self.extents, self.interconnect, rings=rings)
            for group in (groups if kind == "collective-permute" else groups[:1])
        )
        varying = [len(np.unique(ids)) > 1 for ids in np.unravel_index(groups[0], self.axis_sizes)]
        axes = tuple(axis for axis, varies in zip(self.axes, varying, strict=True) if varies)
        traffic = self.costs.traffic.setdefault(" ".join((kind, *axes)), Traffic(kind, axes))
        traffic.count += times
        traffic.bytes += size * times
        traffic.link_seconds += seconds * times
        if layer_phase:
            layer = traffic.per_layer.setdefault(layer_phase, {"count": 0, "bytes": 0})
            layer["count"] += times / self.num_layers
            layer["bytes"] += size * times / self.num_layers
        return traffic, seconds

    def _expose(self, traffic: Traffic, seconds: float, times: int, instruction: Instruction) -> float:
        traffic.exposed_seconds += seconds * times
        return self._add(traffic.kind, seconds, times, instruction)

    def _add(self, name: str, seconds: float, times: int, instruction: Instruction) -> float:
        self.costs.seconds[name] += seconds * times
        if seconds:
            what = f"{instruction.name} {instruction.shape.lstrip('(')[:48]}"
            self.costs.largest.append((seconds * times, times, name, what, instruction.op_name))
        return seconds

    def _compute(self, instruction: Instruction, names: dict[str, Instruction], times: int) -> float:
        """Seconds of an instruction that is no collective."""
        if instruction.opcode in FREE:
            return 0.0
        if KERNEL_TARGET in instruction.attributes:
            flops = kernel_flops(instruction, names)
            if flops is None:
                self.costs.unknown_kernels.append(instruction.name)
                return 0.0
            name = f"kernel {instruction.phase}"
            self.costs.flops[name] += flops * times
            return self._add(
                name, flops / self.chip.bf16_flops / KERNEL_EFFICIENCY[instruction.phase], times, instruction
            )
        name = category(self.module, instruction)
        if name.startswith("matmul"):
            flops = sum(
                matmul_flops(inner, scope)
                for inner, scope in self.module.within(instruction, names)
                if inner.opcode in ("convolution", "dot")
            )
            self.costs.flops[name] += times * flops
            if instruction.cycles is None:  # of products with 8 bits the compiler does not say
                return self._add(name, flops / self.chip.bf16_flops / MATMUL_EFFICIENCY, times, instruction)
        if instruction.cycles is not None:
            return self._add(name, instruction.cycles / self.interconnect.clock, times, instruction)
        if instruction.opcode == "custom-call":  # markers and allocations
            return 0.0
        # In place, an update writes its second operand only.
        updates = instruction.opcode == "dynamic-update-slice"
        moved = names[instruction.operands[1]].shape if updates else instruction.shape
        return self._add(name, 2 * shape_bytes(moved) / self.chip.bandwidth, times, instruction)


def collective_role(module: Module, instruction: Instruction) -> tuple[str, Instruction | None, str]:
    """(start, end, whole, carry or none; the collective itself; what a start and its end have in common).

    Besides HLO's own pairs of -start and -done, TPUs have fusions that start a collective, fusions of compute that
    carry it along, and fusions that finish it; and a reduce-scatter may be a fusion around an all-reduce.
    """
    opcode = instruction.opcode
    kind = opcode.removesuffix("-start").removesuffix("-done")
    if kind in COLLECTIVES or kind == "async":
        if opcode.endswith("-done"):
            return "end", instruction, instruction.operands[0]
        found = instruction
        if kind == "async":
            found = next((i for i, _ in module.within(instruction, {}) if i.opcode in COLLECTIVES), None)
        role = "none" if found is None else "start" if opcode.endswith("-start") else "whole"
        return role, found, instruction.name
    if opcode != "fusion":
        return "none", None, ""
    inner = [i for i, _ in module.within(instruction, {})]
    found = next((i for i in inner if i.opcode in COLLECTIVES), None)
    if found is None:
        return "none", None, ""
    channel = CHANNEL.search(found.attributes)
    key = channel[1] if channel else instruction.name
    targets = " ".join(i.attributes for i in inner if i.opcode == "custom-call")
    if found.opcode == "all-reduce" and "scatter" in instruction.called["calls"]:
        found = dataclasses.replace(found, opcode="reduce-scatter")
    if "AsyncCollectiveStart" in targets:
        return "start", found, key
    if "AsyncCollectiveDone" in targets:
        return "end", found, key
    return ("carry" if "async_collective" in instruction.called["calls"] else "whole"), found, key


def collective_bytes(collective: Instruction) -> int:
    """Bytes of a collective's result. A -start's is a tuple: what goes in, what comes out, flags."""
    results = arrays(collective.shape)
    if collective.opcode.endswith("-start") and collective.opcode != "all-reduce-start":
        inputs = len(collective.operands)
        results = results[inputs : 2 * inputs]
    return sum(round(itemsize(dtype) * math.prod(dims)) for dtype, dims in results)


# --- The step ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A training step on a slice, estimated and not measured. Bytes are of one chip; seconds by category add up.

    total_bytes: arguments (the state), what is not given back in place, and temporaries. flops: of one chip, by phase,
    recomputation included. mfu: the model's own FLOPs (`Config.flops_per_token`) over step_seconds and the peak.
    """

    topology: str
    chip: str
    num_chips: int
    peak_flops: float
    argument_bytes: int
    temporary_bytes: int
    total_bytes: int
    memory_bytes: float
    seconds: dict[str, float]
    step_seconds: float
    tokens: int
    mfu: float
    flops: dict[str, float]
    traffic: dict[str, Traffic]
    unknown_kernels: list[str]
    largest: list[tuple[float, int, str, str, str]]
    hlo: str = dataclasses.field(repr=False, default="")

    def to_json(self, **more) -> str:
        """Everything but the program, with `more` before it."""
        values = {name: value for name, value in dataclasses.asdict(self).items() if name not in ("hlo", "largest")}
        return json.dumps({**more, "estimated": values}, indent=1)


def compile_step(config: Config, topology_name: str, compiler_options: dict | None = None):
    """The training step of a run, compiled for an absent slice: (compiled, its mesh).

    Raises: InputError where the slice is unknown, the mesh or batch does not fit it, or its memory does not suffice.
    """
    topology = tpu_topology(topology_name)
    mesh = make_mesh(**dataclasses.asdict(config.mesh), devices=topology.devices)
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    lora, dtype = config.adapters, config.train.dtype
    state = abstract_state(config.model, optimizer, mesh, dtype=dtype, lora=lora)
    frozen = ()
    if lora is not None:
        frozen = (pure_params(abstract_model(config.model, dtype=dtype, mesh=mesh, quantization=lora.quantize)),)
    step = make_train_step(
        config,
        optimizer=optimizer,
        schedule=make_schedule(config.optimizer, config.train.steps),
        mesh=mesh,
        state_shardings=jax.tree.map(lambda leaf: leaf.sharding, state),
    )
    shape = (config.train.batch_size, config.train.seq_length + 1)
    tokens = jax.ShapeDtypeStruct(
        shape, jnp.int32, sharding=named_sharding(shape, ("batch", "length"), mesh, "train.batch_size")
    )
    lowered = step.trace(state, tokens, *frozen).lower(lowering_platforms=("tpu",))
    try:
        return lowered.compile(compiler_options=compiler_options), mesh
    except jax.errors.JaxRuntimeError as error:
        text = " ".join(str(error).split())
        if "RESOURCE_EXHAUSTED" not in text:
            raise
        needed = re.search(r"[Uu]sed ([\d.]+\w) of ([\d.]+\w)", text)
        found = f"needs {needed[1]} of {needed[2]} a chip" if needed else text[:200]
        raise InputError(f"the step does not fit {topology_name}: it {found}; lower train.batch_size") from error


def estimate_step(config: Config, topology_name: str, *, compiler_options: dict | None = None) -> Estimate:
    """Compiles a run's training step for a slice ("v5p:4x4x4") and adds up memory and seconds: a minute or two."""
    compiled, mesh = compile_step(config, topology_name, compiler_options)
    return estimate_compiled(compiled, config, topology_name, mesh)


def estimate_compiled(compiled, config: Config, topology_name: str, mesh) -> Estimate:
    chip = find_chip(mesh.devices.flat[0].device_kind)
    text = compiled.as_text()
    costs = Accountant(parse_hlo(text), mesh, num_layers=config.model.num_hidden_layers).run()
    memory = compiled.memory_analysis()
    tokens = config.train.batch_size * config.train.seq_length
    flops = config.flops_per_token * tokens
    given_back = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Estimate(
        topology=topology_name,
        chip=chip.name,
        num_chips=mesh.size,
        peak_flops=chip.bf16_flops,
        argument_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        total_bytes=memory.argument_size_in_bytes + memory.temp_size_in_bytes + given_back,
        memory_bytes=chip.memory_bytes,
        seconds=costs.seconds,
        step_seconds=costs.total,
        tokens=tokens,
        mfu=flops / mesh.size / costs.total / chip.bf16_flops,
        flops=dict(costs.flops),
        traffic=costs.traffic,
        unknown_kernels=costs.unknown_kernels,
        largest=costs.largest,
        hlo=text,
    )
