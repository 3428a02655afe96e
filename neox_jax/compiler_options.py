"""What to tell XLA's compiler, by chip: presets for `jax.jit(..., compiler_options=...)`, never set at import.

Every TPU option is known to libtpu 0.0.42.1, which refuses others (a test); the GPU's are known to jaxlib 0.10.2. What
each does to GPT-NeoX-20B's training step was estimated, not measured: benchmarks/results.
"""

from neox_jax.config import check_choice
from neox_jax.hardware import find_chip

# Parameters are gathered while the matrix units work: a fusion of compute carries its part of the gather along.
_ASYNC_GATHER = {
    "xla_enable_async_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
    "xla_tpu_overlap_compute_collective_tc": "true",
}
COMPILER_OPTIONS: dict[str, dict[str, str]] = {
    "none": {},
    "v5p": {
        **_ASYNC_GATHER,
        # Over a 3D torus a gather otherwise becomes an all-reduce of arrays filled up with zeros: twice the bytes, not
        # overlapped with anything, and the zeros are written to memory first.
        "xla_tpu_prefer_async_allgather_to_allreduce": "true",
        # Larger tiles for matrix products and what is fused with them; the default is 16 MiB.
        "xla_tpu_scoped_vmem_limit_kib": "32768",
    },
    "v5e": {**_ASYNC_GATHER, "xla_tpu_scoped_vmem_limit_kib": "32768"},
    "v6e": {**_ASYNC_GATHER, "xla_tpu_scoped_vmem_limit_kib": "98304"},
    "h100": {
        "xla_gpu_enable_latency_hiding_scheduler": "true",
        "xla_gpu_all_gather_combine_threshold_bytes": str(128 * 2**20),
        "xla_gpu_reduce_scatter_combine_threshold_bytes": str(64 * 2**20),
        "xla_gpu_enable_pipelined_all_gather": "true",
        "xla_gpu_enable_pipelined_reduce_scatter": "true",
        "xla_gpu_enable_pipelined_all_reduce": "true",
        "xla_gpu_enable_while_loop_double_buffering": "true",
    },
}


# What "auto" takes, by the name in `hardware.CHIPS`; others have none. The GPUs' has not run on one: by name only.
PRESET_OF_CHIP = {"TPU v5p": "v5p", "TPU v5e": "v5e", "TPU v6e": "v6e"}


def preset_for(preset: str, device_kind: str) -> str:
    """The preset itself, or for "auto" the one of this kind of device. Raises: InputError naming the nearest."""
    check_choice("train.compiler_options", preset, ("auto", *COMPILER_OPTIONS))
    chip = find_chip(device_kind)
    if preset != "auto":
        return preset
    return PRESET_OF_CHIP.get(chip.name, "none") if chip else "none"


def compiler_options(preset: str, device_kind: str = "") -> dict[str, str]:
    """The options of a preset ("v5p"), each an option's name and its value. Raises: InputError naming the nearest."""
    return dict(COMPILER_OPTIONS[preset_for(preset, device_kind)])
