"""The mesh, and the one table that says where each array lives on it."""

import math

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from neox_jax.errors import InputError

AXES = ("data", "fsdp", "pipe", "seq", "model")

# Logical axis -> mesh axes. Parameters and activations name logical axes only; nothing else mentions the mesh.
RULES: dict[str, tuple[str, ...]] = {
    "layers": (),
    "vocab": ("model",),
    "embed": ("fsdp",),
    "heads": ("model",),
    "qkv": (),
    "head_dim": (),
    "mlp": ("model",),
    "norm": (),
    "batch": ("data", "fsdp"),
    "length": (),
    "hidden": (),
}


def make_mesh(*, data: int = 1, fsdp: int = 1, pipe: int = 1, seq: int = 1, model: int = 1, devices=None) -> Mesh:
    """A mesh over the devices (all, by default); one size may be -1, which takes what is left.

    data: replicas; fsdp: data parallel with sharded parameters; model: tensor parallel.
    Raises: InputError if the sizes do not multiply to the number of devices, or for pipe or seq above 1.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = dict(zip(AXES, (data, fsdp, pipe, seq, model), strict=True))
    asked = " x ".join(f"{name}={size}" for name, size in sizes.items() if size != 1) or "all axes 1"
    if any(size == 0 or size < -1 for size in sizes.values()) or list(sizes.values()).count(-1) > 1:
        raise InputError(f"mesh {asked}: sizes are whole numbers above 0, and at most one is -1")
    for name in ("pipe", "seq"):
        if sizes[name] > 1:
            raise InputError(f"mesh {name}={sizes[name]}: only data, fsdp and model are sharded over; set {name}=1")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    for name, size in sizes.items():
        if size == -1:
            sizes[name] = max(1, len(devices) // fixed)
    if math.prod(sizes.values()) != len(devices):
        raise InputError(
            f"mesh {asked} is {fixed} devices{' or a multiple' if -1 in (data, fsdp, model) else ''}, but there are "
            f"{len(devices)}; set one axis to -1, or sizes that multiply to {len(devices)}"
        )
    return Mesh(np.asarray(devices).reshape(tuple(sizes.values())), AXES, axis_types=(AxisType.Auto,) * len(AXES))


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


def constrain(x: jax.Array, logical: tuple[str | None, ...], mesh: Mesh | None) -> jax.Array:
    """Pins an activation's sharding; the identity without a mesh or on one device."""
    if mesh is None or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, named_sharding(x.shape, logical, mesh, "activation"))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())
