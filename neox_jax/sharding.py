"""The mesh, and the one table that says where each array lives on it."""

import dataclasses
import math

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from neox_jax.errors import InputError
from neox_jax.tree import named_leaves

AXES = ("data", "fsdp", "pipe", "seq", "model")

# Logical axis -> mesh axes. Parameters and activations name logical axes only; nothing else mentions the mesh.
RULES: dict[str, tuple[str, ...]] = {
    "layers": ("pipe",),  # a stage holds neighbouring layers
    "vocab": ("model",),
    "embed": ("fsdp",),
    "heads": ("model",),
    "qkv": (),
    "head_dim": (),
    "mlp": ("model",),
    "norm": (),
    "rank": (),  # of an adapter
    "batch": ("data", "fsdp"),
    "stages": ("pipe",),
    "length": (),  # of tokens, whose T + 1 divides over nothing, and of a cache
    "sequence": ("seq",),  # positions inside a layer
    "residual": ("seq", "model"),  # positions between layers, where each rank of `model` would keep a copy
    "head_positions": ("pipe", "seq"),  # positions at the output head, whose work no stage does alone
    "hidden": (),
}
UNSHARDED_SHARE = 0.02  # of the parameters' bytes; more than this is a mistake in the rules


def make_mesh(*, data: int = 1, fsdp: int = 1, pipe: int = 1, seq: int = 1, model: int = 1, devices=None) -> Mesh:
    """A mesh over the devices (all, by default); one size may be -1, which takes what is left.

    data: replicas (the optimizer's moments are sharded over them); fsdp: data parallel with sharded parameters; pipe:
    pipeline stages; seq: context parallel; model: tensor parallel.
    Raises: InputError if the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes_asked = (data, fsdp, pipe, seq, model)
    sizes = dict(zip(AXES, sizes_asked, strict=True))
    asked = " x ".join(f"{name}={size}" for name, size in sizes.items() if size != 1) or "all axes 1"
    if any(size == 0 or size < -1 for size in sizes.values()) or list(sizes.values()).count(-1) > 1:
        raise InputError(f"mesh {asked}: sizes are whole numbers above 0, and at most one is -1")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    for name, size in sizes.items():
        if size == -1:
            sizes[name] = max(1, len(devices) // fixed)
    if math.prod(sizes.values()) != len(devices):
        raise InputError(
            f"mesh {asked} is {fixed} devices{' or a multiple' if -1 in sizes_asked else ''}, but there are "
            f"{len(devices)}; set one axis to -1, or sizes that multiply to {len(devices)}"
        )
    return Mesh(np.asarray(devices).reshape(tuple(sizes.values())), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def platform(mesh: Mesh | None) -> str:
    """What it will run on, "tpu", "gpu" or "cpu": the mesh knows, be its devices here or compiled for from afar."""
    return jax.default_backend() if mesh is None else mesh.devices.flat[0].platform


def partition_spec(logical: tuple[str | None, ...], mesh: Mesh) -> PartitionSpec:
    """Maps logical axes to a PartitionSpec over this mesh's axes.

    Raises: KeyError for a logical axis not in RULES, ValueError if two dims land on one mesh axis (both are defects).
    """
    spec, used = [], set()
    for name in logical:
        axes = () if name is None else tuple(a for a in RULES[name] if mesh.shape.get(a, 1) > 1)
        if used & set(axes):
            raise ValueError(f"logical axes {logical} put two dims on one of the mesh axes {axes}")
        used |= set(axes)
        spec.append(axes if len(axes) > 1 else axes[0] if axes else None)
    return PartitionSpec(*spec)


def named_sharding(shape: tuple[int, ...], logical: tuple[str | None, ...], mesh: Mesh, what: str) -> NamedSharding:
    """The sharding of an array with these logical axes.

    Raises: InputError if a dim does not divide over its mesh axes (jax itself would replicate without a word).
    """
    for axis, size in zip(logical, shape, strict=True):
        axes = () if axis is None else [a for a in RULES[axis] if mesh.shape.get(a, 1) > 1]
        parts = math.prod(mesh.shape[a] for a in axes)
        if size % parts:
            over = " x ".join(f"{a}={mesh.shape[a]}" for a in axes)
            raise InputError(
                f"{what}: {axis} {size} does not divide over {over}; try {math.ceil(size / parts) * parts}"
            )
    return NamedSharding(mesh, partition_spec(logical, mesh))


def positions_axis(length: int, mesh: Mesh | None) -> str:
    """The logical axis of positions between layers: sharded where they divide, as training's do (`check_mesh`).

    What is generated or scored has any length, and is then kept whole.
    """
    for axis in ("residual", "sequence"):
        if mesh is not None and length % math.prod(mesh.shape.get(name, 1) for name in RULES[axis]) == 0:
            return axis
    return "length"


def constrain(x: jax.Array, logical: tuple[str | None, ...], mesh: Mesh | None) -> jax.Array:
    """Pins an activation's sharding; the identity without a mesh or on one device."""
    if mesh is None or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, named_sharding(x.shape, logical, mesh, "activation"))


def spread(sharding: NamedSharding, shape: tuple[int, ...], axis: str) -> NamedSharding:
    """The same, with the largest dim that divides cut over one more mesh axis; as it is where none does."""
    mesh = sharding.mesh
    parts = mesh.shape.get(axis, 1)
    spec = [*sharding.spec, *(None,) * (len(shape) - len(sharding.spec))]
    used = [() if entry is None else (entry,) if isinstance(entry, str) else tuple(entry) for entry in spec]
    for dim in sorted(range(len(shape)), key=lambda dim: -shape[dim]):
        if parts > 1 and shape[dim] % (parts * math.prod(mesh.shape[name] for name in used[dim])) == 0:
            spec[dim] = (*used[dim], axis)
            return NamedSharding(mesh, PartitionSpec(*spec))
    return sharding


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where a parameter lives. num_bytes: of all of it; device_bytes: on one device."""

    name: str
    shape: tuple[int, ...]
    spec: PartitionSpec
    num_bytes: int
    device_bytes: int


def report_sharding(params) -> list[Placement]:
    """Where each parameter lives, largest first; params: arrays or shapes, with shardings."""
    found = []
    for name, leaf in named_leaves(params).items():
        itemsize = np.dtype(leaf.dtype).itemsize
        whole, part = (math.prod(shape) * itemsize for shape in (leaf.shape, leaf.sharding.shard_shape(leaf.shape)))
        found.append(Placement(name, leaf.shape, leaf.sharding.spec, whole, part))
    return sorted(found, key=lambda one: -one.num_bytes)


def check_sharded(params, mesh: Mesh) -> None:
    """Raises: InputError if a mesh that shards parameters leaves more than UNSHARDED_SHARE of their bytes whole."""
    if all(mesh.shape.get(axis, 1) == 1 for axis in ("fsdp", "pipe", "model")):
        return
    report = report_sharding(params)
    whole = [one for one in report if one.device_bytes == one.num_bytes]
    share = sum(one.num_bytes for one in whole) / sum(one.num_bytes for one in report)
    if share > UNSHARDED_SHARE:
        raise InputError(
            f"{share:.1%} of the parameters' bytes are whole on every device (most {whole[0].name} "
            f"{list(whole[0].shape)}); at most {UNSHARDED_SHARE:.0%} may be: use a smaller mesh, or a larger model"
        )


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())
