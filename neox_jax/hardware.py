"""Chips: peak matrix FLOP/s, memory and bandwidth, each with its source."""

import dataclasses
import time


@dataclasses.dataclass(frozen=True)
class Chip:
    """One jax device. bf16_flops in FLOP/s (dense), memory_bytes, bandwidth in bytes/s."""

    name: str
    bf16_flops: float
    memory_bytes: float
    bandwidth: float
    source: str


GIB = 2**30
# Keyed by the start of jax's device_kind in lower case; the longest match wins.
CHIPS = {
    "tpu v4": Chip("TPU v4", 275e12, 32 * GIB, 1228e9, "Google Cloud TPU v4 page"),
    "tpu v5 lite": Chip("TPU v5e", 197e12, 16 * GIB, 819e9, "Google Cloud TPU v5e page"),
    "tpu v5e": Chip("TPU v5e", 197e12, 16 * GIB, 819e9, "Google Cloud TPU v5e page"),
    "tpu v5": Chip("TPU v5p", 459e12, 95 * GIB, 2765e9, "Google Cloud TPU v5p page"),
    "tpu v6": Chip("TPU v6e", 918e12, 32 * GIB, 1640e9, "Google Cloud TPU v6e page"),
    "nvidia a100-sxm4-40gb": Chip("A100 40GB", 312e12, 40e9, 1555e9, "NVIDIA A100 datasheet"),
    "nvidia a100-sxm4-80gb": Chip("A100 80GB", 312e12, 80e9, 2039e9, "NVIDIA A100 datasheet"),
    "nvidia h100": Chip("H100 SXM", 989e12, 80e9, 3350e9, "NVIDIA H100 datasheet"),
    "nvidia h200": Chip("H200", 989e12, 141e9, 4800e9, "NVIDIA H200 datasheet"),
}


def find_chip(device_kind: str) -> Chip | None:
    """The chip of a jax `device.device_kind`, or None where it is not in the table (a CPU, for one)."""
    kind = device_kind.lower()
    matches = [key for key in CHIPS if kind.startswith(key)]
    return CHIPS[max(matches, key=len)] if matches else None


def peak_flops(device, dtype: str) -> tuple[float, str]:
    """Peak matrix FLOP/s of one device at this dtype, and where the figure comes from.

    From the table for known chips (float32 is given bfloat16's peak: it runs through the same units in passes);
    measured by a matrix product elsewhere.
    """
    chip = find_chip(device.device_kind)
    if chip is not None:
        return chip.bf16_flops, chip.source
    return _measured_flops(device, dtype), "measured: a 2048 x 2048 matrix product"


def memory_bandwidth(device) -> tuple[float, str]:
    """Bytes/s that one device reads from its memory, and where the figure comes from; measured on unknown chips."""
    chip = find_chip(device.device_kind)
    if chip is not None:
        return chip.bandwidth, chip.source
    return _measured_bandwidth(device), "measured: the sum of 512 MiB"


def _best_seconds(function, argument, repeats: int) -> float:
    function(argument).block_until_ready()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        function(argument).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _measured_flops(device, dtype: str) -> float:
    import jax
    import jax.numpy as jnp

    size = 2048
    x = jax.device_put(jax.random.normal(jax.random.key(0), (size, size), jnp.dtype(dtype)), device)
    return 2 * size**3 / _best_seconds(jax.jit(lambda x: x @ x), x, repeats=4)


def _measured_bandwidth(device) -> float:
    import jax
    import jax.numpy as jnp

    x = jax.device_put(jnp.ones((256, 512, 1024), jnp.float32), device)
    return x.nbytes / _best_seconds(jax.jit(lambda x: jnp.sum(x, axis=(0, 2))), x, repeats=4)
