"""What decoding takes of TPU slices that are not there: memory of a chip, and collectives of a layer.

    make libtpu; export PYTHONPATH=.libtpu JAX_PLATFORMS=cpu
    .venv/bin/python benchmarks/decode_tpu.py [--preset gpt-neox-20b] [--output benchmarks/results]

Compiles the engine's block of steps for each slice of SLICES, tensor parallel over all of its chips, with bfloat16 and
int8 weights and caches. Nothing runs. Memory is the compiler's allocation for a chip; collectives are those of one step
of one layer, and those of a step beside its layers. The least time of a step is what a chip reads (weights and all of
the cache) over its memory's bandwidth, without what passes between chips.
"""

import argparse
import dataclasses
import json
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from machine import describe_machine

from neox_jax import engine
from neox_jax.config import ModelConfig
from neox_jax.estimate import tpu_topology
from neox_jax.hardware import GIB, find_chip
from neox_jax.hlo import COLLECTIVES, parse_hlo, trip_count
from neox_jax.model import abstract_model
from neox_jax.sharding import make_mesh
from neox_jax.tree import num_bytes

SLICES = ("v5e:2x4", "v5p:2x2x1")
LENGTH = 2048


def compile_block(preset: str, topology: str, *, batch: int, quantization: str, int8_cache: bool, num_drafted: int = 0):
    """(compiled block, slots, mesh) for a slice; heads and the feed-forward over all of its chips."""
    devices = tpu_topology(topology).devices
    mesh = make_mesh(model=len(devices), devices=devices)
    config = dataclasses.replace(ModelConfig.preset(preset), vocab_multiple=128 * len(devices))
    model = abstract_model(config, dtype=jnp.bfloat16, mesh=mesh, quantization=quantization)
    models, rows = (model, None), max(batch, engine.least_rows(model))
    empty = engine._empty_slots.trace(
        models, np.int32(config.vocab_size), batch=rows, length=LENGTH + num_drafted, int8_cache=int8_cache
    ).lower(lowering_platforms=("tpu",))
    shardings = empty.compile().output_shardings
    slots = jax.tree.map(
        lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), empty.out_info, shardings
    )
    options = {"block_steps": engine.BLOCK_STEPS, "top": 0, "num_drafted": num_drafted}
    lowered = engine._decode_block.trace(models, slots, np.zeros(rows, bool), **options)
    return lowered.lower(lowering_platforms=("tpu",)).compile(), slots, mesh, model


def collectives(compiled, layers: int) -> dict[str, dict[str, int]]:
    """How many of each kind, by where: in a layer, or in a step beside its layers."""
    module = parse_hlo(compiled.as_text())
    found = {"layer": Counter(), "step": Counter()}

    def visit(computation: str, where: str) -> None:
        for instruction in module.computations[computation]:
            kind = instruction.opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                found[where][kind] += 1
            inner = "layer" if _times(module, instruction, computation) == layers else where
            for called in instruction.called.values():
                visit(called, inner)

    visit(module.entry, "step")
    return {where: dict(kinds) for where, kinds in found.items()}


def _times(module, instruction, computation: str) -> int | None:
    """How often a loop runs; None for what is no loop, or one that ends when it may."""
    try:
        return trip_count(module, instruction, computation) if instruction.opcode == "while" else None
    except (ValueError, StopIteration):
        return None


def describe(preset: str, topology: str, **options) -> dict:
    compiled, slots, mesh, model = compile_block(preset, topology, **options)
    memory, chip = compiled.memory_analysis(), find_chip(mesh.devices.flat[0].device_kind)
    weights, cache = num_bytes(model) // mesh.size, num_bytes(slots.cache) // mesh.size
    table = 0 if model.embed_out is None else num_bytes(model.embed_in) // mesh.size
    total = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    seconds = (weights - table + cache) / chip.bandwidth
    return {
        "topology": topology,
        "chips": mesh.size,
        **options,
        "weight_bytes": weights,
        "cache_bytes": cache,
        "temporary_bytes": memory.temp_size_in_bytes,
        "temporary_share_of_cache": memory.temp_size_in_bytes / cache,
        "total_bytes": total,
        "memory_bytes": chip.memory_bytes,
        "fits": total < chip.memory_bytes,
        "collectives": collectives(compiled, model.config.num_hidden_layers),
        "least_step_seconds": seconds,
        "most_tokens_per_second": options["batch"] / seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="gpt-neox-20b")
    parser.add_argument("--output", type=Path, help="a folder for the result as JSON")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")  # libtpu is there to compile; no TPU is looked for
    found = []
    for topology in SLICES:
        for quantization, int8_cache in (("", False), ("int8", False), ("int8", True)):
            for batch in (1, 32):
                one = describe(args.preset, topology, batch=batch, quantization=quantization, int8_cache=int8_cache)
                found.append(one)
                print(
                    f"{topology}, batch {batch}, weights {quantization or 'bfloat16'}, cache "
                    f"{'int8' if int8_cache else 'bfloat16'}: {one['total_bytes'] / GIB:.2f} of "
                    f"{one['memory_bytes'] / GIB:.0f} GiB, temporaries {one['temporary_share_of_cache']:.2%} of the "
                    f"cache, {one['collectives']['layer']} a layer, < {one['most_tokens_per_second']:,.0f} tokens/s",
                    flush=True,
                )
    result = {**describe_machine(), "jax": jax.__version__, "preset": args.preset, "length": LENGTH, "compiled": found}
    if args.output:
        path = args.output / f"{result['date']}-decode-tpu-{args.preset}.json"
        path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
