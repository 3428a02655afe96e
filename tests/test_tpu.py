"""TPUs that are not there: our reading of their compiled programs adds up, and the 20B training step fits them.

What compiles for TPUs runs in processes of its own, which alone have libtpu on their path (`make libtpu`); it is
skipped where there is none. Two compilations of the 20B step, a minute or two each, are most of this file's time.
"""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from neox_jax.compiler_options import COMPILER_OPTIONS, compiler_options
from neox_jax.config import PRESETS
from neox_jax.errors import InputError
from neox_jax.estimate import (
    INTERCONNECTS,
    Accountant,
    collective_seconds,
    tpu_topology,
    visited_share,
)
from neox_jax.hardware import GIB
from neox_jax.hlo import Module, arrays, parse_hlo, replica_groups

ROOT = Path(__file__).resolve().parents[1]
LIBTPU = ROOT / ".libtpu"
needs_libtpu = pytest.mark.skipif(not (LIBTPU / "libtpu").is_dir(), reason="no TPU compiler in .libtpu: `make libtpu`")
NEOX_20B = PRESETS["gpt-neox-20b"]


def run_with_libtpu(code: str) -> dict:
    """Runs Python that prints JSON last, with libtpu on its path and no TPU looked for."""
    env = {**os.environ, "PYTHONPATH": str(LIBTPU), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


# --- Reading HLO and adding up ---


@pytest.fixture(scope="module")
def nested_scan() -> Module:
    """A real program for v5e: 5 iterations of 3 products 512^3, each after gathering its weights over 4 chips.

    From jax 0.10.2 and libtpu 0.0.42.1: scan over weights [5,512,512] in bfloat16, sharded over fsdp in dim 1, of a
    scan of 3 of tanh(x @ w), x [512,512] on a chip. Source locations and most of each configuration are cut out.
    """
    return parse_hlo((ROOT / "tests" / "nested_scan.hlo").read_text())


def fake_mesh(kind: str, coords, **axes: int):
    """What the accountant wants to know of a mesh of TPUs."""
    devices = np.empty(len(coords), object)
    devices[:] = [SimpleNamespace(device_kind=kind, coords=place) for place in coords]
    return SimpleNamespace(devices=devices.reshape(tuple(axes.values())), axis_names=tuple(axes))


def test_trip_counts_multiply_out(nested_scan):
    mesh = fake_mesh("TPU v5 lite", [(0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 0)], data=1, fsdp=4)
    costs = Accountant(nested_scan, mesh, num_layers=5).run()
    assert costs.flops["matmul forward"] == 5 * 3 * 2 * 512**3
    product = nested_scan.instructions["wide.region_1.1_spmd.sunk"]["convolution_tanh_fusion.2"]
    assert costs.seconds["matmul forward"] == pytest.approx(15 * product.cycles / 1.5e9)
    assert costs.seconds["matmul forward"] > costs.flops["matmul forward"] / 197e12
    gathers = costs.traffic["all-gather fsdp"]
    assert (gathers.count, gathers.bytes) == (15, 15 * 512 * 512 * 2)
    assert gathers.per_layer == {"forward": {"count": 3, "bytes": 3 * 512 * 512 * 2}}
    # Nothing is between the gather and what needs it; 2 x 2 v5e chips have no ring, and the compiler lays one.
    assert gathers.exposed_seconds == gathers.link_seconds == pytest.approx(gathers.bytes * 3 / 4 / (2 * 45e9))
    assert costs.total == pytest.approx(sum(costs.seconds.values()))


def test_a_loop_without_constants_is_an_error(nested_scan):
    text = (ROOT / "tests" / "nested_scan.hlo").read_text()
    unknown = text.replace("s32[]{:T(128)} constant(5)", "s32[]{:T(128)} negate(%get-tuple-element.66)")
    mesh = fake_mesh("TPU v5 lite", [(0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 0)], data=1, fsdp=4)
    with pytest.raises(ValueError, match="not compared with a constant"):
        Accountant(parse_hlo(unknown), mesh).run()


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("{{0,2},{1,3}}", [[0, 2], [1, 3]]),
        ("[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("mesh['axis_0'=2,'axis_1'=2] {'axis_0'}", [[0, 2], [1, 3]]),
        ("mesh['axis_0'=2,'axis_1'=2] {'axis_0','axis_1'}", [[0, 1, 2, 3]]),
        ("mesh['axis_0'=2,'axis_1'=2], device_ids=([2,2]T(1,0)) {'axis_1'}", [[0, 2], [1, 3]]),
        ("{}", [[0, 1, 2, 3]]),
    ],
)
def test_replica_groups_in_all_spellings(text, groups):
    assert replica_groups(f", channel_id=1, replica_groups={text}, use_global_device_ids=true", 4).tolist() == groups


def test_collectives_take_the_links_of_the_torus():
    v5p = INTERCONNECTS["TPU v5p"]
    cube = np.array([(x, y, z) for x in range(4) for y in range(4) for z in range(4)])
    extents = np.array((4, 4, 4))

    def seconds(kind, group, **options):
        return collective_seconds(kind, 64e9, group, extents, v5p, **options)

    assert seconds("all-gather", cube) == pytest.approx(64e9 * 63 / 64 / (6 * 90e9))  # three rings of two directions
    assert seconds("all-gather", cube, rings=1) == pytest.approx(3 * seconds("all-gather", cube))
    assert seconds("all-reduce", cube) == pytest.approx(2 * seconds("reduce-scatter", cube))
    assert seconds("all-gather", cube[:4]) == pytest.approx(64e9 * 3 / 4 / (2 * 90e9))  # one dim, all of it: a ring
    assert seconds("all-gather", cube[:2]) == pytest.approx(64e9 / 2 / 90e9)  # half of one: a line
    assert seconds("collective-permute", cube[[0, 3]]) == pytest.approx(64e9 / 90e9)  # neighbours around the ring
    assert seconds("all-reduce", cube[:1]) == 0


def test_share_of_blocks_that_a_causal_kernel_visits():
    assert visited_share(2048, 2048, 512, 512) == (1 + 2 + 3 + 4) / 16
    assert visited_share(2048, 2048, 2048, 2048) == 1
    assert visited_share(512, 2048, 512, 512) == 1  # the last quarter of the queries sees all keys


def test_presets_name_the_nearest():
    assert compiler_options("v5p") == COMPILER_OPTIONS["v5p"]
    with pytest.raises(InputError, match=r"'v5q'.*did you mean 'v5p'"):
        compiler_options("v5q")
    compiler_options("v5p")["changed"] = "true"
    assert "changed" not in COMPILER_OPTIONS["v5p"]


def test_without_libtpu_it_says_how_to_get_it():
    with pytest.raises(InputError, match="make libtpu"):
        tpu_topology("v5p:4x4x4")


# --- Small programs, compiled for TPUs ---

SMALL_PROGRAMS = """
import dataclasses, json
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from neox_jax.compiler_options import COMPILER_OPTIONS
from neox_jax.errors import InputError
from neox_jax.estimate import Accountant, tpu_topology
from neox_jax.hlo import parse_hlo
from neox_jax.sharding import make_mesh
from neox_jax.splash import attend, make_kernel

result = {}
mesh = make_mesh(fsdp=2, model=2, devices=tpu_topology("v5e:2x2").devices)

def compile(function, *arguments, options=None):
    arrays = [jax.ShapeDtypeStruct(s, jnp.bfloat16, sharding=NamedSharding(mesh, spec)) for s, spec in arguments]
    return jax.jit(function).trace(*arrays).lower(lowering_platforms=("tpu",)).compile(compiler_options=options)

def account(compiled, num_layers=0):
    costs = Accountant(parse_hlo(compiled.as_text()), mesh, num_layers=num_layers).run()
    return {"flops": costs.flops, "seconds": costs.seconds, "unknown_kernels": costs.unknown_kernels,
            "traffic": {name: dataclasses.asdict(traffic) for name, traffic in costs.traffic.items()}}

# Seven layers: a gather over fsdp and a sum over model in each.
def layers(x, up, down):
    def body(x, weights):
        up, down = weights
        x = jax.nn.gelu(x @ jax.lax.with_sharding_constraint(up, NamedSharding(mesh, P(None, "model")))) @ down
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P("fsdp", None))), None
    return jax.lax.scan(body, x, (up, down))[0]

result["layers"] = account(compile(layers, ((4096, 1024), P("fsdp")), ((7, 1024, 4096), P(None, "fsdp", "model")),
                                   ((7, 4096, 1024), P(None, "model"))), num_layers=7)

# Two rows of 8 heads of 128 a chip, 2048 tokens: forward, and both kernels of the backward pass.
kernel = make_kernel(2048)
def attention(q, k, v):
    local = jax.shard_map(lambda q, k, v: attend(kernel, q, k, v), mesh=mesh, in_specs=P(("fsdp", "model")),
                          out_specs=P(("fsdp", "model")), check_vma=False)
    return local(q, k, v).astype(jnp.float32).sum()
rows = ((8, 2048, 8, 128), P(("fsdp", "model")))
result["attention"] = account(compile(jax.grad(attention, argnums=(0, 1, 2)), rows, rows, rows))

# Each preset's options on its own chip, one at a time, and one that is not known.
result["refused"] = {}
for preset, slice_name in (("v5p", "v5p:2x2x1"), ("v5e", "v5e:2x2"), ("v6e", "v6e:2x2")):
    mesh = make_mesh(fsdp=-1, devices=tpu_topology(slice_name).devices)
    for name, value in {**COMPILER_OPTIONS[preset], "xla_tpu_no_such_option": "true"}.items():
        try:
            compile(lambda x: x + 1, ((8, 128), P()), options={name: value})
        except jax.errors.JaxRuntimeError as error:
            result["refused"].setdefault(preset, {})[name] = str(error)
try:
    tpu_topology("v5p:3x3")
except InputError as error:
    result["unknown_slice"] = str(error)
print(json.dumps(result))
"""


@pytest.fixture(scope="module")
def small_programs() -> dict:
    return run_with_libtpu(SMALL_PROGRAMS)


@needs_libtpu
def test_flops_seconds_and_bytes_of_a_scan(small_programs):
    layers = small_programs["layers"]
    flops = 7 * 2 * 2 * 2048 * 1024 * 2048  # of one chip: half of the rows, half of the middle dim
    assert layers["flops"]["matmul forward"] == flops
    assert flops / 197e12 < layers["seconds"]["matmul forward"] < 2 * flops / 197e12
    assert layers["traffic"]["all-gather fsdp"]["bytes"] == 7 * 1024 * 2048 * 2
    assert layers["traffic"]["all-reduce model"]["bytes"] == 7 * 2048 * 1024 * 2
    per_layer = {"count": 1, "bytes": 2048 * 1024 * 2}
    assert layers["traffic"]["all-reduce model"]["per_layer"] == {"forward": per_layer}


@needs_libtpu
def test_kernels_are_counted_by_the_blocks_they_visit(small_programs):
    attention = small_programs["attention"]
    assert attention["unknown_kernels"] == []
    product = 2 * 2 * 8 * 2048 * 2048 * 128 * visited_share(2048, 2048, 512, 512)  # one of q k, p v ...
    assert attention["flops"]["kernel forward"] == 2 * product
    assert attention["flops"]["kernel backward"] == (3 + 4) * product
    assert attention["seconds"]["kernel backward"] == pytest.approx(7 * product / 197e12 / 0.4)


@needs_libtpu
def test_presets_name_options_that_the_compiler_knows(small_programs):
    for preset in ("v5p", "v5e", "v6e"):
        assert list(small_programs["refused"][preset]) == ["xla_tpu_no_such_option"]
        assert "No such compile option" in small_programs["refused"][preset]["xla_tpu_no_such_option"]
    assert "v5p:4x4x4" in small_programs["unknown_slice"]


# --- The training step of configs/gpt_neox_20b.py ---

STEP = """
import dataclasses, json
from pathlib import Path
from neox_jax.compiler_options import compiler_options
from neox_jax.config import load_config
from neox_jax.estimate import estimate_step

config = load_config("configs/gpt_neox_20b.py", {overrides!r})
estimate = estimate_step(config, {topology!r}, compiler_options={options!r})
Path({hlo!r}).write_text(estimate.hlo)
print(estimate.to_json().replace("\\n", ""))
"""


@dataclasses.dataclass(frozen=True)
class Step:
    """The 20B step on one slice. rows: sequences of a data shard; vocab: columns of the logits on a chip."""

    estimate: dict
    module: Module
    rows: int
    vocab: int


def compile_20b(folder: Path, topology: str, *, fsdp: int, model: int, batch_size: int, remat: str) -> Step:
    hlo = folder / f"{topology.replace(':', '-')}.hlo"
    overrides = [("mesh.fsdp", str(fsdp)), ("mesh.model", str(model)), ("train.batch_size", str(batch_size))]
    overrides += [("train.microbatches", "1"), ("train.remat", remat), ("train.compiler_options", "none")]
    # Larger tiles in VMEM change neither memory in HBM nor collectives, and take several times as long to compile.
    options = {k: v for k, v in compiler_options(topology[:3]).items() if k != "xla_tpu_scoped_vmem_limit_kib"}
    code = STEP.format(overrides=overrides, topology=topology, options=options, hlo=str(hlo))
    estimate = run_with_libtpu(code)["estimated"]
    return Step(estimate, parse_hlo(hlo.read_text()), batch_size // fsdp, NEOX_20B.padded_vocab_size // model)


@pytest.fixture(scope="module")
def v5p_step(tmp_path_factory) -> Step:
    """64 chips, parameters sharded over all of them."""
    return compile_20b(tmp_path_factory.mktemp("v5p"), "v5p:4x4x4", fsdp=64, model=1, batch_size=256, remat="dots")


@pytest.fixture(scope="module")
def v5e_step(tmp_path_factory) -> Step:
    """256 chips, four to a layer."""
    return compile_20b(tmp_path_factory.mktemp("v5e"), "v5e:16x16", fsdp=64, model=4, batch_size=256, remat="full")


def arrays_of_logits(step: Step) -> list[str]:
    """Instructions with a float32 array of as many logits as a data shard's tokens have."""
    tokens = step.rows * NEOX_20B.max_position_embeddings
    vocab = {NEOX_20B.padded_vocab_size, step.vocab}
    return [
        f"{instruction.name} {instruction.shape}"
        for body in step.module.computations.values()
        for instruction in body
        for dtype, dims in arrays(instruction.shape)
        if dtype == "f32" and vocab & set(dims) and np.prod(dims, dtype=float) >= tokens * step.vocab
    ]


def recomputed_attention(module: Module) -> list[str]:
    """Names of attention's kernels, and of products with scores, that the backward pass runs a second time.

    Empty is what a policy that saves attention's output promises.
    """
    return [
        instruction.op_name
        for body in module.computations.values()
        for instruction in body
        if "rematted_computation" in instruction.op_name
        and re.search(r"splash_\w*fwd|BN?TN?H,BN?SN?H->|BNTS,", instruction.op_name)
        and (instruction.opcode in ("convolution", "dot") or "tpu_custom_call" in instruction.attributes)
    ]


@needs_libtpu
@pytest.mark.timeout(1500)
def test_20b_fits_v5p(v5p_step):
    estimate = v5p_step.estimate
    assert estimate["num_chips"] == 64
    assert estimate["total_bytes"] < 55 * GIB < estimate["memory_bytes"] == 95 * GIB
    # The state: parameters and two moments in float32, over 64 chips. Heads of 96, and a 64th of 6144 columns, which is
    # 96 too, are padded to 128 in a third of them: 12%.
    assert 1 <= estimate["argument_bytes"] / (12 * NEOX_20B.num_parameters / 64) < 1.13
    assert arrays_of_logits(v5p_step) == []


@needs_libtpu
@pytest.mark.timeout(1500)
def test_20b_runs_no_attention_twice_where_it_is_saved(v5p_step, v5e_step):
    assert recomputed_attention(v5p_step.module) == []
    assert recomputed_attention(v5e_step.module) != []  # remat full


@needs_libtpu
@pytest.mark.timeout(1500)
def test_20b_gathers_each_layer_once_a_pass(v5p_step):
    """A layer's six kernels (query, key and value each for itself) forward and backward; gradients are summed once."""
    traffic = v5p_step.estimate["traffic"]
    layer = 2 * 12 * NEOX_20B.hidden_size**2  # bytes of a layer's kernels in bfloat16
    assert {name.split()[0] for name in traffic} <= {"all-gather", "all-reduce", "reduce-scatter"}
    gathers = traffic["all-gather fsdp"]["per_layer"]
    assert gathers["forward"] == gathers["backward"] == {"count": pytest.approx(6), "bytes": pytest.approx(layer)}
    sums = [per["bytes"] for name, t in traffic.items() if "reduce" in name for per in t["per_layer"].values()]
    assert sum(sums) == pytest.approx(layer, rel=0.01)
    # The head: gathered once for the forward pass, and not for each chunk of the loss.
    assert traffic["all-gather fsdp"]["bytes"] < 44 * 2 * layer + 3 * 2 * NEOX_20B.padded_vocab_size * 6144


@needs_libtpu
@pytest.mark.timeout(1500)
def test_20b_fits_v5e(v5e_step):
    estimate = v5e_step.estimate
    assert estimate["num_chips"] == 256
    assert estimate["total_bytes"] < 6 * GIB < estimate["memory_bytes"] == 16 * GIB
    assert arrays_of_logits(v5e_step) == []


@needs_libtpu
@pytest.mark.timeout(1500)
def test_20b_communicates_once_a_layer_and_direction_over_model(v5e_step):
    """Parallel residual: attention's and the feed-forward's partial sums are added up before they are communicated.

    A gather and a reduce-scatter of the activations forward, the same of their gradients backward; and with remat full
    the layer's input is gathered again, to compute from.
    """
    activations = 2 * v5e_step.rows * NEOX_20B.max_position_embeddings * NEOX_20B.hidden_size
    traffic = v5e_step.estimate["traffic"]
    once = {"count": pytest.approx(1), "bytes": pytest.approx(activations)}
    twice = {"count": pytest.approx(2), "bytes": pytest.approx(2 * activations)}
    assert traffic["reduce-scatter model"]["per_layer"] == {"forward": once, "backward": once}
    assert traffic["all-gather model"]["per_layer"] == {"forward": once, "backward": twice}
    assert not any("permute" in name or "all-to-all" in name for name in traffic)
    for name, others in traffic.items():  # gradients of norms and biases
        if "model" in others["axes"] and name not in ("reduce-scatter model", "all-gather model"):
            assert sum(per["bytes"] for per in others["per_layer"].values()) < 2**20
