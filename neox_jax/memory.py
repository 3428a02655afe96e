"""What training holds of each device's memory: said, and compared with what there is, before the first step."""

import math
import os

import jax
import numpy as np

from neox_jax.errors import InputError
from neox_jax.hardware import GIB, find_chip
from neox_jax.train_state import TrainState


class Memory:
    """Bytes of one device, by what they are for. frozen: parameters beside those of the state, or None.

    state, frozen: of ShapeDtypeStructs or arrays, with shardings.
    """

    def __init__(self, state: TrainState, frozen: dict | None, device):
        self.parts = {"parameters": _bytes(state.params if frozen is None else frozen)}
        if frozen is not None:
            self.parts["adapters"] = _bytes(state.params)
        self.parts["optimizer"] = _bytes(state.optimizer_state)
        self.limit = device_memory(device)

    def check(self) -> None:
        """Raises: InputError where there is no room for what stays from step to step."""
        if self.limit is not None and sum(self.parts.values()) > self.limit:
            raise InputError(f"this run does not fit a device: {self.describe()}; {_ADVICE}")

    def see(self, compiled) -> None:
        """Learns from a compiled step what it needs besides. Raises: InputError where there is no room for all."""
        found = compiled.memory_analysis()
        if found is None:  # not every backend says
            return
        total = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
        total += found.temp_size_in_bytes
        self.parts["gradients, activations and the rest"] = max(0, total - sum(self.parts.values()))
        self.check()

    def describe(self) -> str:
        """ "parameters 1.2 GiB, optimizer 2.4 GiB, ...: 5.1 GiB of 16 GiB"."""
        parts = ", ".join(f"{name} {_text(size)}" for name, size in self.parts.items())
        there = "" if self.limit is None else f" of {_text(self.limit)}"
        return f"{parts}: {_text(sum(self.parts.values()))}{there}"


_ADVICE = "lower train.batch_size or raise train.microbatches, set train.remat to full, or use more devices (mesh.fsdp)"


def device_memory(device) -> int | None:
    """The bytes that a program may use of a device; of a CPU its share of the machine's. None where it is not known."""
    if device.platform == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // jax.local_device_count(backend="cpu")
    stats = device.memory_stats() if device.process_index == jax.process_index() else None
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    chip = find_chip(device.device_kind)
    return None if chip is None else int(chip.memory_bytes)


def _text(size: float) -> str:
    return f"{size / GIB:.3g} GiB" if size >= GIB else f"{size / 2**20:.3g} MiB"


def _bytes(tree) -> int:
    def of(leaf) -> int:
        return math.prod(leaf.sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize

    return sum(map(of, jax.tree.leaves(tree)))
