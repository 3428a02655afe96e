"""Conversions as a whole: exact along every path, bounded in memory, whole or not there, and accounted for."""

import dataclasses
import errno
import fcntl
import hashlib
import json
import mmap
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file, save_file
from variants import VARIANTS, random_model

import neox_jax
from neox_jax.checkpoint import tensor_files
from neox_jax.checkpoint.streamed import read_leaves
from neox_jax.cli import main
from neox_jax.config import ModelConfig
from neox_jax.convert import byte_writer, manifest, names, source, stored
from neox_jax.convert.hf import load_hf, save_hf
from neox_jax.convert.neox import save_neox
from neox_jax.convert.revisions import compare_revisions
from neox_jax.convert.safetensors_files import write_safetensors
from neox_jax.errors import InputError
from neox_jax.sharding import make_mesh

FORMATS = ("hf", "neox", "orbax")
GIB = 1 << 30


@pytest.fixture
def small(tmp_path) -> Path:
    save_hf(random_model(VARIANTS["pythia"]), tmp_path / "small")
    return tmp_path / "small"


def refused(capsys, *arguments) -> str:
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    lines = capsys.readouterr().err.strip().splitlines()
    assert code == 65, lines
    return lines[-1]


def sparse_checkpoint(folder: Path, config: ModelConfig, shard_bytes: float) -> int:
    """A sharded Hugging Face folder of float32 zeros that take no room on the disk; returns how many bytes it says."""
    shards, weight_map = [], {}
    for name, shape in stored.expected_shapes(config).items():
        num_bytes = 4 * int(np.prod(shape))
        if not shards or sum(size for _, _, size in shards[-1]) + num_bytes > shard_bytes:
            shards.append([])
        shards[-1].append((name, list(shape), num_bytes))
    folder.mkdir(parents=True)
    for i, shard in enumerate(shards, start=1):
        header, end, file = {}, 0, f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        for name, shape, num_bytes in shard:
            header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + num_bytes]}
            end, weight_map[name] = end + num_bytes, file
        text = json.dumps(header).encode()
        (folder / file).write_bytes(len(text).to_bytes(8, "little") + text)
        os.truncate(folder / file, 8 + len(text) + end)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config.to_hf()))
    return sum(size for shard in shards for _, _, size in shard)


WIDE = ModelConfig(
    num_hidden_layers=26, hidden_size=1536, num_attention_heads=16, intermediate_size=6144, vocab_size=5000
)


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """3.0 GB in two shards, each larger than the largest tensor and a GiB."""
    folder = tmp_path_factory.mktemp("large") / "source"
    num_bytes = sparse_checkpoint(folder, WIDE, 1.6e9)
    sizes = [path.stat().st_size for path in folder.glob("*.safetensors")]
    assert (len(sizes), sum(sizes) > num_bytes) == (2, True)
    assert min(sizes) > GIB + 4 * 1536 * 6144
    return folder


# ---- exactness


@pytest.mark.parametrize("name", VARIANTS)
def test_every_path_keeps_every_bit(name, tmp_path):
    save_hf(random_model(VARIANTS[name]), tmp_path / "start")
    path = [("neox", 2 if VARIANTS[name]["num_attention_heads"] % 2 == 0 else 3), ("orbax", 1), ("neox", 1), ("hf", 1)]
    here = tmp_path / "start"
    for i, (format, ranks) in enumerate(path):
        there = tmp_path / f"{i}-{format}"
        source.convert(here, there, format=format, tensor_parallel=ranks)
        here = there
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "start", here))
    assert {k: v.tobytes() for k, v in ours.items()} == {k: v.tobytes() for k, v in theirs.items()}
    for made in ("0-neox", "1-orbax", "2-neox"):
        assert stored.compare(source.open_source(tmp_path / "start"), source.open_source(tmp_path / made)) == []
    one, other = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "start", here))
    assert one == other


@pytest.mark.parametrize("format", FORMATS)
def test_a_sharded_padded_model_is_written_as_it_was_loaded(format, small, tmp_path):
    mesh = make_mesh(fsdp=2, model=4)
    model = load_hf(small, mesh=mesh)
    assert model.embed_in.embedding[...].shape == (100, 32)
    neox_jax.save_model(model, tmp_path / "out", format=format)
    assert stored.compare(source.open_source(small), source.open_source(tmp_path / "out")) == []
    again = neox_jax.load_model(tmp_path / "out")
    assert again.embed_in.embedding[...].shape == (97, 32)
    again = neox_jax.load_model(tmp_path / "out", mesh=mesh)
    assert again.embed_in.embedding[...].shape == (100, 32)
    assert source.config_of(tmp_path / "out", mesh=mesh) == again.config == model.config


def test_a_run_in_many_chunks_keeps_every_bit(small, tmp_path, monkeypatch):
    """Written from rows as they come, and from a run with other chunks; read back by Orbax and by rows."""
    folders = [small]
    for chunk_bytes in (1500, 5000, 700):
        monkeypatch.setattr(tensor_files, "CHUNK_BYTES", chunk_bytes)
        folders.append(tmp_path / str(chunk_bytes))
        source.convert(folders[-2], folders[-1], format="orbax")
    arrays = read_leaves(folders[1] / "checkpoints/0/params")
    kernels = [array for name, array in arrays.items() if name.endswith("kernel")]
    assert len(kernels) == 4
    assert all(one.chunk_layout.read_chunk.shape[1:] != one.shape[1:] for one in kernels)
    model = source.open_source(small)
    for folder in folders[1:]:
        assert stored.compare(model, source.open_source(folder)) == []
        save_hf(neox_jax.load_model(folder), tmp_path / "again" / folder.name)
        assert stored.compare(model, source.open_source(tmp_path / "again" / folder.name)) == []


@pytest.mark.parametrize("chunk_bytes", [1500, 1 << 20])
def test_files_of_a_converted_run_are_the_tensors_and_an_ending(chunk_bytes, small, tmp_path, monkeypatch):
    """The sums that were made on the way are the files'; Orbax alone restores the arrays."""
    monkeypatch.setattr(tensor_files, "CHUNK_BYTES", chunk_bytes)
    source.convert(small, tmp_path / "run", format="orbax")
    step = tmp_path / "run/checkpoints/0"
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=step, check=True)
    wanted = load_file(small / "model.safetensors")
    for row in names.ROWS:
        for layer in row.layers((2,)):
            (file,) = (step / "params" / row.name).glob("c.0*" if layer is None else f"c.{layer}.*")
            tensor = wanted[row.hf_name(layer)].tobytes()
            assert file.read_bytes().startswith(tensor)
            assert len(file.read_bytes()) > len(tensor)
    restored = ocp.PyTreeCheckpointer().restore(step / "params")
    kernel = wanted["gpt_neox.layers.1.attention.query_key_value.weight"]
    found = restored["layers"]["attention"]["query_key_value"]["kernel"]
    np.testing.assert_array_equal(found[1], kernel.T.reshape(found.shape[1:]))
    np.testing.assert_array_equal(restored["embed_out"]["embedding"], wanted["embed_out.weight"])


@pytest.mark.parametrize("shape", [(1, 1), (7, 300), (256, 512), (257, 255), (300, 700)])
def test_transposed_copies(shape):
    matrix = np.random.default_rng(0).integers(0, 2**16, shape, np.uint16)
    out = names.from_stored(matrix, ((1,), (0,)), shape[::-1])
    np.testing.assert_array_equal(out, matrix.T)
    assert out.flags.c_contiguous


def test_a_run_on_a_mesh_converts_without_its_padding(small, tmp_path):
    """What training saves: padded tables, sharded arrays, an optimizer beside them."""
    from neox_jax.checkpoint.manager import RunCheckpoints
    from neox_jax.config import CheckpointConfig, OptimizerConfig
    from neox_jax.optimizer import make_optimizer
    from neox_jax.train_state import init_state, pure_params

    mesh = make_mesh(fsdp=2, model=4)
    model = load_hf(small, mesh=mesh)
    optimizer = make_optimizer(OptimizerConfig(), 100)
    state = init_state(model.config, optimizer, mesh, seed=0, params=pure_params(model))
    checkpoints = RunCheckpoints(tmp_path / "run", CheckpointConfig())
    checkpoints.save(3, state, model.config, force=True)
    checkpoints.close()
    run = source.open_source(tmp_path / "run")
    assert stored.compare(source.open_source(small), run) == []
    assert run.notes == ("the run's optimizer state is not converted",)


def test_dtype_is_cast_once_and_float16_does_not_overflow(small, tmp_path, capsys):
    source.convert(small, tmp_path / "half", format="neox", dtype="float16", tensor_parallel=2)
    wanted = load_hf(small, dtype="float16")
    assert stored.compare(stored.from_model(wanted), source.open_source(tmp_path / "half")) == []

    model = load_hf(small)
    kernel = model.layers.mlp.dense_4h_to_h.kernel
    model.layers.mlp.dense_4h_to_h.kernel = type(kernel)(kernel[...].at[1, 0, 0].set(7e4))
    save_hf(model, tmp_path / "big")
    message = refused(capsys, "convert", tmp_path / "big", tmp_path / "out", "--to", "hf", "--dtype", "float16")
    assert "gpt_neox.layers.1.mlp.dense_4h_to_h.weight has values beyond 65504, the largest of float16" in message
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="values beyond 65504"):
        neox_jax.load_model(tmp_path / "big", dtype="float16")


# ---- memory

WATCHED = """
import sys
from neox_jax.convert import source
print("imported", flush=True)
sys.stdin.readline()
source.convert(sys.argv[1], sys.argv[2], format=sys.argv[3], tensor_parallel=2 if sys.argv[3] == "neox" else 1)
"""


def anonymous_bytes(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("RssAnon")), 0)


@pytest.mark.parametrize("format", FORMATS)
def test_memory_is_bounded_by_a_tensor_and_not_by_the_model(format, large, tmp_path):
    command = [sys.executable, "-c", WATCHED, large, tmp_path / "out", format]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=_environment()) as child:
        assert child.stdout.readline() == b"imported\n"
        before = peak = anonymous_bytes(child.pid)
        assert before > 0
        child.stdin.write(b"go\n")
        child.stdin.flush()
        while child.poll() is None:
            peak = max(peak, anonymous_bytes(child.pid))
            time.sleep(0.005)
    assert child.returncode == 0
    largest = max(map(stored.num_bytes, source.open_source(large).tensors.values()))
    assert peak - before <= largest + GIB
    written = sum(path.stat().st_size for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert written > 2.9e9
    shutil.rmtree(tmp_path / "out")


def _environment(**more) -> dict[str, str]:
    return {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).resolve().parents[1]), **more}


# ---- whole or not at all


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda sent: sent.name)
def test_an_interrupted_conversion_leaves_nothing_that_looks_finished(sent, format, large, tmp_path, capsys):
    command = [sys.executable, "-m", "neox_jax.cli", "convert", large, tmp_path / "out", "--to", format]
    with subprocess.Popen(command, stderr=subprocess.PIPE, env=_environment()) as child:
        while not _bytes_under(tmp_path) > 50e6:
            assert child.poll() is None, child.stderr.read()
            time.sleep(0.01)
        child.send_signal(sent)
        _, errors = child.communicate(timeout=60)
    wanted = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}
    assert child.returncode == wanted[sent], errors
    assert b"Traceback" not in errors
    assert not (tmp_path / "out").exists()
    left = [path.name for path in tmp_path.iterdir()]
    if sent == signal.SIGKILL:
        assert left == [f".out.partial-{child.pid}"]
        for place in ("", "global_step0", "checkpoints"):
            with pytest.raises(InputError):
                source.locate(tmp_path / left[0] / place)
        save_hf(random_model(VARIANTS["pythia"]), tmp_path / "small")
        assert main(["convert", str(tmp_path / "small"), str(tmp_path / "out"), "--to", format]) == 0
        assert f"{left[0]} is of a conversion that was killed, or is still at work" in capsys.readouterr().err
    else:
        assert left == []


def _bytes_under(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue
    return total


@pytest.mark.parametrize("format", FORMATS)
def test_no_room_is_said_before_anything_is_written(format, tmp_path, capsys):
    free = shutil.disk_usage(tmp_path).free
    rows = free // (4 * 1024) + 1
    config = ModelConfig(
        num_hidden_layers=1, hidden_size=1024, num_attention_heads=16, intermediate_size=1024, vocab_size=rows
    )
    sparse_checkpoint(tmp_path / "huge", config, 1e18)
    message = refused(capsys, "convert", tmp_path / "huge", tmp_path / "out", "--to", format)
    assert "/out needs " in message
    assert "GB free; make room, or give a folder on another disk" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["huge"]


@pytest.mark.parametrize("format", FORMATS)
def test_room_that_runs_out_leaves_nothing(format, large, tmp_path):
    """The kernel refuses to let a file grow beyond a limit: for a writer the same as a full disk."""
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20 << 20, 20 << 20))\n"
        "from neox_jax.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "convert", large, tmp_path / "out", "--to", format]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=_environment(), check=False)
    assert done.returncode == 65, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert "out cannot be written: File too large; nothing of it was kept" in last
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


# ---- accounted for


@pytest.mark.parametrize("refuses", ["nothing", "direct writes", "direct writes, when they come"])
def test_large_files_hold_what_was_written(refuses, tmp_path, monkeypatch):
    """Of every size around its buffer, in pieces; also on file systems that cannot write past the page cache."""
    set_flags, write = fcntl.fcntl, os.write

    def refuse_flag(descriptor, command, value=0):
        if command == fcntl.F_SETFL and value & os.O_DIRECT:
            raise OSError(errno.EINVAL, "not here")
        return set_flags(descriptor, command, value)

    def refuse_write(descriptor, data):
        if set_flags(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "not aligned for this disk")
        return write(descriptor, data)

    if refuses == "direct writes":
        monkeypatch.setattr(byte_writer.fcntl, "fcntl", refuse_flag)
    elif refuses != "nothing":
        monkeypatch.setattr(byte_writer.os, "write", refuse_write)
    size = byte_writer.BUFFER_BYTES
    for num_bytes in (0, 1, 4095, 4096, size - 1, size, size + 1, 9 * size + 4097):
        data = np.random.default_rng(num_bytes).bytes(num_bytes)
        with byte_writer.LargeFiles() as files:
            for name in ("one", "other"):
                with files.create(tmp_path / name) as file:
                    for start in range(0, num_bytes, 700_001):
                        file.write(data[start : start + 700_001])
        assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes() == data


@pytest.mark.parametrize("format", FORMATS)
def test_manifest_says_what_was_read_and_written(format, small, tmp_path):
    source.convert(small, tmp_path / "out", format=format, dtype="bfloat16")
    manifest = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert manifest["written"] == {"format": format, "tensor_parallel": 1}
    files = manifest["source"]["files"]
    assert sorted(files) == ["config.json", "model.safetensors"]
    for name, about in files.items():
        raw = (small / name).read_bytes()
        assert about == {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    source.convert(tmp_path / "out", tmp_path / "hf", format="hf")
    read = json.loads((tmp_path / "hf" / "conversion.json").read_text())["source"]
    for name, about in read["files"].items():
        found = [path.read_bytes() for path in (tmp_path / "out").rglob(f"**/{name}")]
        assert about in [{"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()} for raw in found], name
    written = load_file(tmp_path / "hf" / "model.safetensors")
    assert manifest["tensors"].keys() == written.keys()
    for name, about in manifest["tensors"].items():
        digest = hashlib.sha256(written[name].tobytes()).hexdigest()
        assert about == {"dtype": "bfloat16", "shape": list(written[name].shape), "sha256": digest}


@pytest.mark.parametrize("format", FORMATS)
def test_tensors_hashed_as_they_are_written_have_the_digests_of_whole_ones(format, small, tmp_path, monkeypatch):
    """In many blocks, and whatever the format that they are read from."""
    source.convert(small, tmp_path / "first", format=format)
    monkeypatch.setattr(stored, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(byte_writer, "BUFFER_BYTES", 2 * mmap.PAGESIZE)
    source.convert(tmp_path / "first", tmp_path / "again", format="hf")
    found = json.loads((tmp_path / "again" / "conversion.json").read_text())["tensors"]
    wanted = load_file(small / "model.safetensors")
    assert list(found) == list(source.open_source(small).tensors)
    assert {name: about["sha256"] for name, about in found.items()} == {
        name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in wanted.items()
    }


def test_a_manifest_of_a_folder_named_from_here(small, tmp_path, monkeypatch):
    """Relative to the working directory, of a checkpoint whose own files are and of one whose are not."""
    monkeypatch.chdir(tmp_path)
    source.convert("small", "run", format="orbax")
    source.convert("run", "again", format="hf")
    source.convert("run/checkpoints/0", "more", format="hf")
    one, other = (json.loads(Path(name, "conversion.json").read_text())["source"] for name in ("again", "more"))
    assert one["files"] == other["files"]
    assert "_METADATA" in one["files"]


@pytest.mark.parametrize("order", ["by name", "backwards", "half of them cast", "layers mixed"])
def test_files_have_their_digests_in_whatever_order_they_are_read(order, small, tmp_path):
    """Sorted by name, as the library writes them, with an old export's buffers between the parameters, or in no order
    that anybody writes; read as they are in the file, or not, or by layers."""
    folder, arrays = tmp_path / "sorted", load_file(small / "model.safetensors")
    folder.mkdir()
    for layer in (0, 1):
        arrays[f"gpt_neox.layers.{layer}.attention.masked_bias"] = np.full((), -1e9, np.float32)
    if order == "half of them cast":
        arrays = {name: array.astype(np.float16) if ".mlp." in name else array for name, array in arrays.items()}
    save_file(arrays, folder / "model.safetensors")
    shutil.copy(small / "config.json", folder)
    if order == "layers mixed":
        tensors = source.open_source(folder).tensors
        mixed = {name: tensors[name] for name in sorted(tensors, key=lambda name: name.split(".")[::-1])}
        write_safetensors(tmp_path / "mixed", mixed)
        (tmp_path / "mixed").rename(folder / "model.safetensors")
    model = source.open_source(folder).cast("float32")
    assert list(model.tensors) != list(source.open_source(small).tensors)
    if order == "backwards":
        model = dataclasses.replace(model, tensors=dict(reversed(model.tensors.items())))
    for save, options in ((save_hf, {}), (save_neox, {"tensor_parallel": 2})):
        there = tmp_path / save.__name__
        with manifest.Hashing(model) as hashing:
            save(model, there, digests=hashing.digests, finish=hashing.write, **options)
        found = json.loads((there / "conversion.json").read_text())
        for name in ("config.json", "model.safetensors"):
            raw = (folder / name).read_bytes()
            assert found["source"]["files"][name] == {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
        assert found["tensors"] == manifest.hash_tensors(source.open_source(there))


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("file", ["layer_00", "layer_02"])
def test_a_flipped_bit_in_a_torch_file_is_met_while_it_is_streamed(file, ranks, small, tmp_path, capsys):
    """In the last byte of the largest tensor: rows that only pad a table, which are not written, or a kernel's."""
    source.convert(small, tmp_path / "neox", format="neox", tensor_parallel=ranks)
    path = tmp_path / f"neox/global_step0/{file}-model_00-model_states.pt"
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
    raw = bytearray(path.read_bytes())
    name_size, extra_size = struct.unpack_from("<2H", raw, largest.header_offset + 26)
    raw[largest.header_offset + 30 + name_size + extra_size + largest.file_size - 1] ^= 1
    path.write_bytes(raw)
    for format in FORMATS:
        message = refused(capsys, "convert", tmp_path / "neox", tmp_path / "out", "--to", format)
        assert "is damaged (its checksum differs); download it again" in message
        assert {one.name for one in tmp_path.iterdir()} == {"small", "neox"}


def test_verify_finds_what_changed_since_it_was_written(small, tmp_path, capsys):
    source.convert(small, tmp_path / "out", format="hf")
    assert main(["convert", str(small), str(tmp_path / "out"), "--verify"]) == 0
    path = tmp_path / "out" / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-5] ^= 1
    path.write_bytes(raw)
    capsys.readouterr()
    assert main(["convert", str(tmp_path / "out"), str(tmp_path / "out"), "--verify"]) == 65
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("/out: embed_out.weight has changed since it was written (conversion.json)")
    assert lines[-1].endswith("the same; not all is as it was written")
    (tmp_path / "out" / "conversion.json").write_text('{"format": 7}')
    message = refused(capsys, "convert", tmp_path / "out", small, "--verify")
    assert "conversion.json is not as this version writes it" in message


def test_verify_holds_no_model(large, tmp_path):
    """Comparing 3 GB with itself, within a few blocks of what the imports take."""
    code = (
        "import sys; from neox_jax.convert import source, stored; a = source.open_source(sys.argv[1])\n"
        "import tracemalloc; tracemalloc.start()\n"
        "assert stored.compare(a, source.open_source(sys.argv[1])) == []\n"
        "print(tracemalloc.get_traced_memory()[1])"
    )
    command = [sys.executable, "-c", code, large]
    done = subprocess.run(command, capture_output=True, text=True, env=_environment(), check=True)
    assert int(done.stdout) < 200e6


def test_neox_optimizer_states_are_said_not_to_be_imported(tmp_path, capsys):
    save_neox(random_model(VARIANTS["pythia"]), tmp_path / "neox", tensor_parallel=2)
    state = tmp_path / "neox" / "global_step0" / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    state.write_bytes(b"never opened" * 10**6)
    assert main(["convert", str(tmp_path / "neox"), str(tmp_path / "out"), "--to", "hf"]) == 0
    assert "NeoX's optimizer states are not imported (1 files, 0.0 GB)" in capsys.readouterr().out


def test_a_revision_of_the_hub_from_the_cache_alone(small, tmp_path):
    """convert ORGANISATION/NAME --revision step1000, with what an earlier download has left and no network."""
    cache = tmp_path / "home" / "hub" / "models--org--name"
    other = tmp_path / "other"
    model = load_hf(small)
    save_hf(jax.tree.map(lambda x: x + 1, model), other)
    for revision, folder, commit in (("main", small, "a" * 40), ("step1000", other, "b" * 40)):
        shutil.copytree(folder, cache / "snapshots" / commit)
        (cache / "refs").mkdir(parents=True, exist_ok=True)
        (cache / "refs" / revision).write_text(commit)
    environment = _environment(HF_HOME=str(tmp_path / "home"), HF_HUB_OFFLINE="1")
    command = [sys.executable, "-m", "neox_jax.cli", "convert", "org/name", tmp_path / "out", "--to", "neox"]
    done = subprocess.run(
        [*command, "--revision", "step1000"], capture_output=True, text=True, env=environment, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    assert stored.compare(source.open_source(other), source.open_source(tmp_path / "out")) == []
    done = subprocess.run(
        [*command[:-3], tmp_path / "none", "--to", "hf", "--revision", "step7"],
        capture_output=True, text=True, env=environment, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert done.returncode == 65
    assert "org/name at revision step7" in done.stderr
    assert not (tmp_path / "none").exists()


# ---- revisions


def test_revisions_with_the_same_weights_are_named(small, tmp_path, capsys):
    """A folder of models in three formats: two are the same, a third shares all but one tensor with them."""
    model = load_hf(small)
    folder = tmp_path / "models"
    neox_jax.save_model(model, folder / "step1", format="orbax")
    neox_jax.save_model(model, folder / "step2", format="neox", tensor_parallel=2)
    model.final_layer_norm.bias = type(model.final_layer_norm.bias)(model.final_layer_norm.bias[...] + 1)
    neox_jax.save_model(model, folder / "step3")
    (folder / "notes").mkdir()
    found = compare_revisions([str(folder)])
    assert found.identical() == [[str(folder / "step1"), str(folder / "step2")]]
    shared = dict(found.shared())
    assert "gpt_neox.final_layer_norm.bias" not in shared
    assert shared["gpt_neox.embed_in.weight"] == [str(folder / f"step{i}") for i in (1, 2, 3)]

    assert main(["revisions", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"identical (2): {folder}/step1, {folder}/step2"
    assert lines[-1] == "3 revisions, 2 different weights"
    assert main(["revisions", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["identical"] == found.identical()


def test_revisions_of_a_run_and_of_neox_steps(small, tmp_path, capsys):
    model = load_hf(small)
    for step in (1, 2, 10):
        save_neox(model, tmp_path / f"at{step}", step=step)
        shutil.move(tmp_path / f"at{step}" / f"global_step{step}", tmp_path / "neox" / f"global_step{step}")
    found = compare_revisions([str(tmp_path / "neox")])
    assert [Path(name).name for name in found.weights] == ["global_step1", "global_step2", "global_step10"]
    assert len(found.identical()) == 1
    neox_jax.save_model(model, tmp_path / "run", format="orbax")
    found = compare_revisions([str(tmp_path / "run"), str(tmp_path / "neox" / "global_step2")])
    assert list(found.weights) == [f"{tmp_path}/run@0", f"{tmp_path}/neox/global_step2"]
    assert found.num_different() == 1
    assert "named twice" in refused(capsys, "revisions", small, small)
    assert "no model at" in refused(capsys, "revisions", tmp_path / "none")


def test_tensors_are_in_the_order_of_the_forward_pass():
    """So that a file of ours holds whole layers, and what reads one after the other reads files once."""
    config = ModelConfig.preset("tiny")
    names = list(stored.expected_shapes(config))
    assert (names[0], names[-1]) == ("gpt_neox.embed_in.weight", "embed_out.weight")
    layers = [int(name.split(".")[2]) for name in names if ".layers." in name]
    assert layers == sorted(layers)
    assert len(names) == 12 * config.num_hidden_layers + 4
