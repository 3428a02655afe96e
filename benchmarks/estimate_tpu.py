"""Estimated memory and time of a training step on TPU slices that are not there, from what the compiler says.

    make libtpu; export PYTHONPATH=.libtpu JAX_PLATFORMS=cpu
    .venv/bin/python benchmarks/estimate_tpu.py --config configs/gpt_neox_20b.py --topology v5p:4x4x4 \\
        [--config.mesh.fsdp=64 ...] [--xla FLAG=VALUE ...] [--breakdown] [--hlo FILE] [--output benchmarks/results]
    .venv/bin/python benchmarks/estimate_tpu.py --calibrate

Nothing is measured and no TPU is needed: `neox_jax/estimate.py` says how it adds up. The compiler's options are those
of `train.compiler_options`; --xla changes one. --breakdown lists the instructions that take most. --calibrate compiles
plain matrix products and shows how many FLOPs go into a cycle.
"""

import argparse
import dataclasses
import datetime
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from neox_jax.compiler_options import compiler_options
from neox_jax.config import load_config
from neox_jax.errors import InputError
from neox_jax.estimate import INTERCONNECTS, Estimate, estimate_step, tpu_topology
from neox_jax.hardware import GIB, find_chip
from neox_jax.hlo import parse_hlo

CALIBRATION_SLICES = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2")
CALIBRATION_SHAPES = ((8192, 8192, 8192), (16384, 16384, 16384), (8192, 6144, 24576), (8192, 24576, 6144))


def main():
    overrides = [argument.removeprefix("--config.") for argument in sys.argv[1:] if argument.startswith("--config.")]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", default="configs/gpt_neox_20b.py")
    parser.add_argument("--topology", default="v5p:4x4x4")
    parser.add_argument("--xla", action="append", default=[], metavar="FLAG=VALUE")
    parser.add_argument("--breakdown", action="store_true")
    parser.add_argument("--hlo", type=Path, help="writes the optimised HLO there")
    parser.add_argument("--output", type=Path, help="a folder for the result as JSON")
    parser.add_argument("--calibrate", action="store_true")
    args = parser.parse_args([argument for argument in sys.argv[1:] if not argument.startswith("--config.")])
    jax.config.update("jax_platforms", "cpu")  # libtpu is there to compile; no TPU is looked for
    try:
        if args.calibrate:
            calibrate()
            return
        config = load_config(args.config, [tuple(override.split("=", 1)) for override in overrides])
        changed = dict(flag.split("=", 1) for flag in args.xla)
        estimate = estimate_step(config, args.topology, compiler_options=changed)
        device_kind = tpu_topology(args.topology).devices[0].device_kind
        options = compiler_options(config.train.compiler_options, device_kind) | changed
    except InputError as error:
        print(f"estimate_tpu: {error}", file=sys.stderr)
        raise SystemExit(65) from None
    print_estimate(estimate, breakdown=args.breakdown)
    for name, value in options.items():
        print(f"option {name}={value}")
    if args.hlo:
        args.hlo.write_text(estimate.hlo)
    if args.output:
        date = datetime.date.today().isoformat()
        sizes = "-".join(f"{axis}{size}" for axis, size in dataclasses.asdict(config.mesh).items() if size != 1)
        slice_name = args.topology.replace(":", "-")
        name = f"{date}-estimate-{Path(args.config).stem}-{slice_name}-{sizes.replace('fsdp-1', 'fsdp')}.json"
        (args.output / name).write_text(
            estimate.to_json(
                date=date,
                config=args.config,
                overrides=overrides,
                mesh=dataclasses.asdict(config.mesh),
                batch_size=config.train.batch_size,
                microbatches=config.train.microbatches,
                remat=config.train.remat,
                compiler_options=options,
                jax=jax.__version__,
            )
            + "\n"
        )


def print_estimate(estimate: Estimate, *, breakdown: bool) -> None:
    print(f"{estimate.num_chips} x {estimate.chip} ({estimate.topology}), estimated, not measured:")
    print(f"  step {estimate.step_seconds:.3f} s, {estimate.tokens:,} tokens, MFU {estimate.mfu:.1%}")
    share = estimate.total_bytes / estimate.memory_bytes
    print(
        f"  memory of a chip {estimate.total_bytes / GIB:.2f} GiB = arguments {estimate.argument_bytes / GIB:.2f} + "
        f"temporaries {estimate.temporary_bytes / GIB:.2f}; {share:.0%} of {estimate.memory_bytes / GIB:.0f} GiB"
    )
    for name, seconds in estimate.seconds.items():
        if seconds:
            flops = estimate.flops.get(name)
            of_peak = f"  {flops / seconds / estimate.peak_flops:.0%} of the peak" if flops else ""
            print(f"  {name:20s} {seconds:8.4f} s {seconds / estimate.step_seconds:6.1%}{of_peak}")
    for name, traffic in estimate.traffic.items():
        layers = "; ".join(
            f"{phase} {per['count']:.3g} of {per['bytes'] / 1e6:.0f} MB a layer"
            for phase, per in traffic.per_layer.items()
        )
        print(
            f"  {name}: {traffic.count} of {traffic.bytes / 1e9:.2f} GB in all, {traffic.link_seconds:.4f} s on the "
            f"links, {traffic.exposed_seconds:.4f} s exposed{'; ' + layers if layers else ''}"
        )
    if estimate.unknown_kernels:
        print(f"  counted as 0 s, kernels without a model: {', '.join(sorted(set(estimate.unknown_kernels)))}")
    if breakdown:
        for seconds, times, name, what, op_name in estimate.largest[:50]:
            print(f"  {seconds:.4f} s {times:5d} x  {name:18s} {what}  {op_name[-70:]}")


def calibrate() -> None:
    """FLOPs a cycle of plain bfloat16 products; the best come near those of the peak at the clock of INTERCONNECTS."""
    for name in CALIBRATION_SLICES:
        devices = tpu_topology(name).devices
        chip, mesh = find_chip(devices[0].device_kind), Mesh(devices, ("rows",))
        clock = INTERCONNECTS[chip.name].clock
        for m, k, n in CALIBRATION_SHAPES:
            x, w = (
                jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec(axis)))
                for shape, axis in (((m * len(devices), k), "rows"), ((k, n), None))
            )
            compiled = jax.jit(jnp.matmul).trace(x, w).lower(lowering_platforms=("tpu",)).compile()
            module = parse_hlo(compiled.as_text())
            cycles = sum(i.cycles or 0 for i in module.computations[module.entry])
            print(
                f"{chip.name} {m} x {k} x {n}: {2 * m * k * n / cycles:,.0f} FLOPs a cycle; the peak at "
                f"{clock / 1e9} GHz is {chip.bf16_flops / clock:,.0f}"
            )


if __name__ == "__main__":
    main()
