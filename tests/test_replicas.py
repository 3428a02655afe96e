"""A device that holds other bytes than its copies is named, on every mesh; one bit is enough."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from neox_jax.config import ModelConfig, OptimizerConfig
from neox_jax.errors import NumbersError
from neox_jax.optimizer import make_optimizer
from neox_jax.peers import Alone
from neox_jax.replicas import _checksum, compare_replicas
from neox_jax.sharding import make_mesh
from neox_jax.train_state import init_state
from neox_jax.tree import named_leaves

ROOT = Path(__file__).resolve().parents[1]
HOST = socket.gethostname()
DTYPES = ["float32", "bfloat16", "float16", "int32", "uint8", "bool"]


def flip(array: jax.Array, device: int, *, word: int = 0, bit: int = 0) -> jax.Array:
    """The same array, but for one bit of what a device holds."""
    parts = []
    for shard in array.addressable_shards:
        data = np.array(shard.data)
        if shard.device.id == device:
            data.reshape(-1).view(np.uint8).reshape(data.size, -1)[word, bit // 8] ^= 1 << bit % 8
        parts.append(jax.device_put(data, shard.device))
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, parts)


def place(values, mesh, *axes) -> jax.Array:
    return jax.device_put(values, NamedSharding(mesh, PartitionSpec(*axes)))


def wrong(tree, mesh) -> str:
    with pytest.raises(NumbersError) as found:
        compare_replicas(tree, mesh, Alone())
    return str(found.value).split("; what it computes")[0]


# --- checksums --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bit_counts(dtype):
    values = (np.arange(24).reshape(2, 3, 4) % 2).astype(jnp.dtype(dtype))
    checksum = jax.jit(_checksum)
    of_values, size = int(checksum(values)), values.dtype.itemsize
    for bit in [0] if dtype == "bool" else range(8 * size):
        changed = values.copy()
        changed.reshape(-1).view(np.uint8)[7 * size + bit // 8] ^= 1 << bit % 8
        assert int(checksum(changed)) != of_values, bit


def test_eight_bytes_and_none():
    with jax.enable_x64(True):
        values = jnp.arange(6, dtype=jnp.float64)
        assert int(_checksum(values)) != int(_checksum(values.at[3].add(1e-12)))
    assert int(_checksum(jnp.zeros((0, 3)))) == 0


def test_places_count():
    """Two values that change places, also where only their sign tells them apart; and rows."""
    values = np.arange(1, 13, dtype=np.float32).reshape(3, 4)
    values[2, 3] = -values[0, 0]
    swapped, rows = values.copy(), values[[1, 0, 2]]
    swapped[2, 3], swapped[0, 0] = values[0, 0], values[2, 3]
    assert len({int(_checksum(jnp.asarray(each))) for each in (values, swapped, rows, values.T)}) == 4


# --- arrays -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_flipped_bit_is_found(dtype):
    mesh = make_mesh(data=4, model=2)
    whole = place(np.zeros((3, 5), jnp.dtype(dtype)), mesh)
    compare_replicas({"a": {"b": whole}}, mesh, Alone())
    expected = f"device 5 (process 0, {HOST}) holds other bytes than the 7 that should hold the same, in a.b"
    assert wrong({"a": {"b": flip(whole, 5, word=14)}}, mesh) == expected


def test_only_copies_are_compared():
    mesh = make_mesh(data=2, fsdp=2, model=2)
    tree = {
        "over_all": place(np.arange(8.0, dtype=np.float32), mesh, ("data", "fsdp", "model")),
        "over_model": place(np.arange(8.0, dtype=np.float32), mesh, "model"),
        "over_two": place(np.arange(8.0, dtype=np.float32).reshape(4, 2), mesh, "model", "fsdp"),
    }
    compare_replicas(tree, mesh, Alone())
    for name, times in {"over_model": 3, "over_two": 0}.items():
        found = wrong(tree | {name: flip(tree[name], 3)}, mesh)
        if times:
            assert found == (
                f"device 3 (process 0, {HOST}) holds other bytes than the {times} that should hold the same, in {name}"
            )
        else:  # two copies: nobody can say which is right
            assert found == (
                f"devices 3 (process 0, {HOST}), 7 (process 0, {HOST}) should hold the same bytes and do not, in {name}"
            )


def test_nothing_to_compare_compiles_nothing(monkeypatch):
    def refuse(*arguments):
        raise AssertionError("compiled")

    monkeypatch.setattr("neox_jax.replicas._make_checksums", refuse)
    mesh = make_mesh(fsdp=4, model=2)
    compare_replicas({"a": place(np.zeros((8, 8)), mesh, "fsdp", "model")}, mesh, Alone())
    one = make_mesh(devices=jax.devices()[:1])
    compare_replicas({"a": place(np.zeros((8, 8)), one)}, one, Alone())


def test_many_that_are_wrong_are_not_all_named():
    mesh = make_mesh(data=8)
    tree = {f"a{i}": place(np.zeros(3, np.float32), mesh) for i in range(5)}
    found = wrong({name: flip(array, 2) for name, array in tree.items()}, mesh)
    assert found.endswith(" that should hold the same, in a0, a1, a2 and 2 more")
    for device in (0, 2, 4, 5):
        tree["a0"] = flip(tree["a0"], device)
    assert wrong(tree, mesh) == (
        f"devices 0 (process 0, {HOST}), 1 (process 0, {HOST}), 2 (process 0, {HOST}) and 5 more should hold the same "
        "bytes and do not, in a0"
    )


# --- a training state -------------------------------------------------------------------------------------------------


def make_state(**axes):
    mesh = make_mesh(**axes)
    return mesh, init_state(
        ModelConfig.preset("tiny"), make_optimizer(OptimizerConfig(), 20), mesh, seed=0, dtype="float16"
    )


@pytest.mark.parametrize("axes", [{"data": 2, "fsdp": 2, "model": 2}, {"data": 2, "pipe": 2, "seq": 2}])
def test_a_training_state(axes):
    mesh, state = make_state(**axes)
    compare_replicas(state, mesh, Alone())
    leaves = named_leaves(state)
    kinds = {leaf.sharding.spec: name for name, leaf in leaves.items() if not is_cut_over_all(leaf)}
    assert len(kinds) > 1
    for name in list(kinds.values())[:3]:
        damaged = jax.tree.unflatten(
            jax.tree.structure(state), [flip(leaf, 6) if each == name else leaf for each, leaf in leaves.items()]
        )
        found = wrong(damaged, mesh)
        assert f" 6 (process 0, {HOST})" in found
        assert found.endswith(f" in {name}")


def is_cut_over_all(leaf: jax.Array) -> bool:
    return len({str(shard.index) for shard in leaf.addressable_shards}) == len(leaf.addressable_shards)


FOR_TPUS = """
import json, jax
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec
from neox_jax.replicas import _make_checksums
from neox_jax.sharding import make_mesh

mesh = make_mesh(data=2, fsdp=2, model=2, devices=topologies.get_topology_desc("v5e:2x4", "tpu").devices)
specs = (PartitionSpec(None, "fsdp", "model"), PartitionSpec(), PartitionSpec(None, "fsdp", None, "model"))
shapes = (24, 2048, 8192), (50304, 2048), (24, 2048, 3, 2048)
arrays = [
    jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
    for shape, spec, dtype in zip(shapes, specs, ("float32", "bfloat16", "float32"))
]
compiled = _make_checksums(mesh, specs).lower(arrays).compile()
memory = compiled.memory_analysis()
print(json.dumps([memory.temp_size_in_bytes, memory.argument_size_in_bytes, compiled.as_text()]))
"""
COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")


@pytest.mark.skipif(not (ROOT / ".libtpu" / "libtpu").is_dir(), reason="no TPU compiler in .libtpu: `make libtpu`")
def test_on_tpus_it_needs_no_collective_and_no_memory():
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / '.libtpu'}:{ROOT}", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", FOR_TPUS], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    temporary, arguments, program = json.loads(done.stdout.splitlines()[-1])
    assert temporary < arguments / 1000
    assert not any(operation in program for operation in COLLECTIVES)


# --- two processes ----------------------------------------------------------------------------------------------------

WORKER = """
import sys
import numpy as np
from neox_jax.distributed import Place, joined

address, process_id, device = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
with joined(Place(address, 2, process_id), facts={}, timeout_seconds=60) as peers:
    import jax
    from jax.sharding import NamedSharding, PartitionSpec
    from neox_jax.replicas import compare_replicas
    from neox_jax.sharding import make_mesh

    mesh = make_mesh(data=2, model=2)
    def make(spec, device):
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        parts = []
        for number, index in sharding.addressable_devices_indices_map((4, 6)).items():
            data = np.arange(24, dtype=np.float32).reshape(4, 6)[index].copy()
            if number.process_index * 10 + number.local_hardware_id == device:
                data[0, 0] += 1
            parts.append(jax.device_put(data, number))
        return jax.make_array_from_single_device_arrays((4, 6), sharding, parts)
    compare_replicas({"whole": make((), -1), "cut": make(("model",), -1)}, mesh, peers)
    print("equal", flush=True)
    compare_replicas({"whole": make((), device), "cut": make(("model",), -1)}, mesh, peers)
"""


def test_two_processes(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
    children = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, address, str(i), "11"],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for i in range(2)
    ]  # fmt: skip
    try:
        outcomes = [(*child.communicate(timeout=60), child.returncode) for child in children]
    finally:
        for child in children:
            child.kill()
    for out, err, code in outcomes:
        assert (out, code) == ("equal\n", 70), err
        assert f"process 1, {HOST}) holds other bytes than the 3 that should hold the same, in whole; " in err
    assert json.dumps(outcomes).count("Traceback") == 0
