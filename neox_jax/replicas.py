"""Whether the devices that should hold the same bytes do."""

import collections
import functools
import hashlib
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from neox_jax.errors import NumbersError
from neox_jax.tree import named_leaves

MAX_NAMED = 3


def compare_replicas(tree, mesh: Mesh, peers) -> None:
    """Compares all copies of every array in `tree`, or of its shards, through a checksum of each copy's bits.

    tree: arrays with NamedShardings on the mesh, of 1, 2, 4 or 8 bytes an element. To be called by all processes alike.
    Where no array has copies nothing is compiled or computed.
    Raises: NumbersError, the same in all processes, that names devices and arrays.
    """
    arrays = {name: array for name, array in named_leaves(tree).items() if _copied_over(array, mesh)}
    if not arrays:
        return
    specs = tuple(array.sharding.spec for array in arrays.values())
    checksums = _make_checksums(mesh, specs)(list(arrays.values()))
    local = {str(shard.device.id): jax.device_get(shard.data).ravel() for shard in checksums.addressable_shards}

    # First one digest for all arrays that are copied alike, so that little is sent: most often nothing is wrong.
    kinds = collections.defaultdict(list)
    for number, array in enumerate(arrays.values()):
        kinds[_copied_over(array, mesh)].append(number)
    digests = {i: [_digest(sums[numbers]) for numbers in kinds.values()] for i, sums in local.items()}
    found = _merge(peers.gather("the digests of replicas", digests))
    suspects = {
        str(device.id)
        for place, axes in enumerate(kinds)
        for copies in _copies(mesh, axes)
        if len({found[str(device.id)][place] for device in copies}) > 1
        for device in copies
    }
    if suspects:
        sums = {i: sums.tolist() for i, sums in local.items() if i in suspects}
        _report(arrays, mesh, _merge(peers.gather("the checksums of replicas", sums)), peers.hosts)


def _copied_over(array: jax.Array, mesh: Mesh) -> tuple[str, ...]:
    """The mesh axes along which each of its shards has copies."""
    entries = [() if entry is None else (entry,) if isinstance(entry, str) else entry for entry in array.sharding.spec]
    used = {axis for entry in entries for axis in entry}
    return tuple(axis for axis, size in mesh.shape.items() if size > 1 and axis not in used)


def _copies(mesh: Mesh, axes: tuple[str, ...]) -> np.ndarray:
    """The devices as [shards, copies along these axes]."""
    places = [mesh.axis_names.index(axis) for axis in axes]
    last = np.moveaxis(mesh.devices, places, range(-len(places), 0))
    return last.reshape(-1, math.prod(mesh.shape[axis] for axis in axes))


def _digest(checksums: np.ndarray) -> str:
    return hashlib.sha256(checksums.tobytes()).hexdigest()[:16]


def _merge(found: list[dict]) -> dict:
    """What each process found by device, of all processes."""
    return {device: value for each in found for device, value in each.items()}


@functools.lru_cache(maxsize=4)
def _make_checksums(mesh: Mesh, specs: tuple[PartitionSpec, ...]):
    """A function of arrays with these specs: uint32 [*mesh, arrays], where each device has those of its own shards.

    One program for all devices, without a collective: manual sharding takes what is on a device as it is.
    """
    axes = tuple(mesh.axis_names)

    def of_device(shards):
        return jnp.stack([_checksum(shard) for shard in shards]).reshape(*(1 for _ in axes), len(shards))

    # check_vma: it would have to know that copies are equal, which is the question.
    return jax.jit(
        jax.shard_map(of_device, mesh=mesh, in_specs=(list(specs),), out_specs=PartitionSpec(*axes), check_vma=False)
    )


def _checksum(x: jax.Array) -> jax.Array:
    """uint32 [] of the bits and their places. A change of any one word of 32 bits is always seen, since each is mixed
    by a bijection of its own before they are summed."""
    bits = _words(x)
    place = jnp.zeros(bits.shape, jnp.uint32)
    for dim, size in enumerate(bits.shape):  # not by flattening, for which a device would copy the array
        place = place * jnp.uint32(size) + lax.broadcasted_iota(jnp.uint32, bits.shape, dim)
    mixed = bits ^ (place * jnp.uint32(0x9E3779B9))
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):  # the end of MurmurHash3
        mixed = (mixed ^ (mixed >> shift)) * jnp.uint32(factor)
    return jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)


def _words(x: jax.Array) -> jax.Array:
    """The bits of each element as uint32; of 8 bytes two, in a new last dim."""
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    width = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
    return lax.bitcast_convert_type(x, width).astype(jnp.uint32)


def _report(arrays: dict, mesh: Mesh, checksums: dict, hosts: tuple[str, ...]) -> None:
    """Raises: NumbersError. checksums: by device, of each array; of the devices that are in question at least."""
    wrong, unclear = collections.defaultdict(list), collections.defaultdict(list)
    for number, (name, array) in enumerate(arrays.items()):
        for copies in _copies(mesh, _copied_over(array, mesh)):
            if any(str(device.id) not in checksums for device in copies):
                continue
            sums = [checksums[str(device.id)][number] for device in copies]
            (usual, times), *others = collections.Counter(sums).most_common()
            if others and times > len(sums) / 2:
                for device, found in zip(copies, sums, strict=True):
                    if found != usual:
                        wrong[device, times].append(name)
            elif others:
                unclear[tuple(copies)].append(name)
    lines = [
        f"device {_place(device, hosts)} holds other bytes than the {times} that should hold the same, in "
        f"{_some(names)}"
        for (device, times), names in wrong.items()
    ]
    lines += [
        f"devices {_some([_place(device, hosts) for device in devices])} should hold the same bytes and do not, in "
        f"{_some(names)}"
        for devices, names in unclear.items()
    ]
    raise NumbersError(
        f"{_some(lines, '; ')}; what it computes is not to be trusted, nor are checkpoints since the last comparison: "
        "go on from one before, without that host"
    )


def _place(device, hosts: tuple[str, ...]) -> str:
    return f"{device.id} (process {device.process_index}, {hosts[device.process_index]})"


def _some(texts: list[str], separator: str = ", ") -> str:
    more = f" and {len(texts) - MAX_NAMED} more" if len(texts) > MAX_NAMED else ""
    return separator.join(texts[:MAX_NAMED]) + more
