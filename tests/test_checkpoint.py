"""Checkpoints that can be trusted: sums, damage of every kind, full and read-only disks, kills, policies, the verbs."""

import concurrent.futures
import dataclasses
import errno
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from checkpoint_worker import MODEL, MOMENTS, make_abstract, make_state
from mounts import in_a_small_disk
from runs import train_arguments

import neox_jax
from neox_jax.checkpoint import commit, manager
from neox_jax.checkpoint.digest import digest_arrays, digest_step
from neox_jax.checkpoint.manager import RunCheckpoints, is_due, steps_to_remove
from neox_jax.checkpoint.steps import META_FILE, TEMPORARY, DamagedError, list_steps, read_meta
from neox_jax.checkpoint.streamed import StreamedHandler
from neox_jax.checkpoint.sums import SUMS, find_problems, hash_files, write_sums
from neox_jax.cli import main
from neox_jax.config import CheckpointConfig, ModelConfig
from neox_jax.errors import InputError
from neox_jax.sharding import make_mesh
from neox_jax.tree import named_leaves

ROOT = Path(__file__).resolve().parents[1]
WORKER = Path(__file__).with_name("checkpoint_worker.py")


def digest_state(state) -> dict[str, str]:
    """As `digest_step`, of what is in memory."""
    rest = {"step": state.step, "state": state.optimizer_state}
    arrays = {"params": named_leaves(state.params), "optimizer": named_leaves(rest)}
    return digest_arrays({item: {k: np.asarray(v) for k, v in one.items()} for item, one in arrays.items()})


class Said(list):
    def __call__(self, text: str, step: int) -> None:
        self.append(text)


def open_run(folder: Path, **config) -> tuple[RunCheckpoints, Said]:
    said = Said()
    return RunCheckpoints(folder, CheckpointConfig(**config), say=said), said


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A run with steps 1 and 2."""
    folder = tmp_path_factory.mktemp("saved") / "run"
    checkpoints, said = open_run(folder, every=1)
    for step in (1, 2):
        checkpoints.save(step, make_state(step), MODEL)
    checkpoints.close()
    assert said == []
    return folder


@pytest.fixture
def run(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "run"))


@pytest.fixture(scope="module")
def wanted() -> dict[int, dict[str, str]]:
    return {step: digest_state(make_state(step)) for step in (1, 2)}


def listing(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# ---- sums


def test_sums_are_of_every_file_and_sha256sum_reads_them(saved):
    for step in (1, 2):
        folder = saved / "checkpoints" / str(step)
        subprocess.run(["sha256sum", "--check", "--strict", "--quiet", SUMS], cwd=folder, check=True)
        named = {line.split("  ")[1] for line in (folder / SUMS).read_text().splitlines()}
        assert named == {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} - {SUMS}
        assert find_problems(folder) == []


def test_a_model_alone_has_sums_too(saved, tmp_path):
    neox_jax.save_model(neox_jax.load_model(saved), tmp_path / "model", format="orbax")
    assert find_problems(tmp_path / "model" / "checkpoints" / "0") == []
    digests = digest_step(tmp_path / "model" / "checkpoints" / "0")
    assert digests == {"params": digest_step(saved / "checkpoints" / "2")["params"]}


def test_processes_share_the_files(saved):
    """All shares together read every file once."""
    folder, seen = saved / "checkpoints" / "2", []
    for part in range(3):
        assert find_problems(folder, part=(part, 3), progress=lambda done, total: seen.append((done, total))) == []
    read = sum(total for done, total in seen if done == total)
    assert read == sum(p.stat().st_size for p in folder.rglob("*") if p.is_file() and p.name != SUMS)


def test_orbax_reads_what_is_written(saved):
    with ocp.CheckpointManager(saved / "checkpoints") as other:
        assert list(other.all_steps()) == [1, 2]
        found = other.restore(2, args=ocp.args.Composite(params=ocp.args.StandardRestore()))
    for name, leaf in named_leaves(make_state(2).params).items():
        np.testing.assert_array_equal(named_leaves(found.params)[name], leaf)


# ---- damage


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def zero_page(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    start = (len(raw) // 2) // 4096 * 4096
    raw[start : start + 4096] = bytes(len(raw[start : start + 4096]))
    path.write_bytes(raw)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size * 2 // 3)


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b" ")


WAYS = {"flip": flip, "zero": zero_page, "truncate": truncate, "append": append, "delete": Path.unlink}


@pytest.mark.parametrize("way", WAYS)
def test_any_file_damaged_in_any_way_is_found(run, way):
    folder = run / "checkpoints" / "2"
    for path in [p for p in folder.rglob("*") if p.is_file()]:
        before = path.read_bytes()
        WAYS[way](path)
        problems = find_problems(folder)
        assert problems, path
        if path.name != SUMS:
            assert problems[0].startswith(f"{path.relative_to(folder)}: ")
        path.write_bytes(before)
    assert find_problems(folder) == []


def test_sums_cut_off_at_a_line_and_a_file_too_many(run):
    folder = run / "checkpoints" / "2"
    lines = (folder / SUMS).read_text().splitlines(keepends=True)
    (folder / SUMS).write_text("".join(lines[:-1]))
    assert find_problems(folder) == [f"{lines[-1].split()[1]}: not in {SUMS}"]
    for text in ("", f"{'0' * 64}  /dev/zero\n", f"{'0' * 64}  ../../secret\n", "garbage\n"):
        (folder / SUMS).write_text(text)
        assert find_problems(folder) == [f"{SUMS}: not as it was written"]


KINDS = {
    "data": lambda step: max((step / "params").rglob("d/*"), key=lambda path: path.stat().st_size),
    "optimizer": lambda step: max((step / "optimizer").rglob("d/*"), key=lambda path: path.stat().st_size),
    "manifest": lambda step: step / "params" / "manifest.ocdbt",
    "tree": lambda step: step / "params" / "_METADATA",
    "meta": lambda step: step / META_FILE,
    "sums": lambda step: step / SUMS,
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_step_is_moved_aside_and_the_one_before_taken(run, wanted, kind):
    path = KINDS[kind](run / "checkpoints" / "2")
    way = dict(zip(KINDS, [flip, zero_page, truncate, append, flip, Path.unlink], strict=True))[kind]
    way(path)
    before = listing(run / "checkpoints" / "2")
    checkpoints, said = open_run(run)
    step, state = checkpoints.restore_newest(make_abstract())
    assert (step, digest_state(state)) == (1, wanted[1])
    assert listing(run / "damaged_checkpoints" / "2") == before
    assert list_steps(run / "checkpoints") == [1]
    name = path.relative_to(run / "checkpoints" / "2")
    assert len(said) == 1
    assert said[0].startswith(f"the checkpoint of step 2 is damaged, {name}: ")
    assert said[0].endswith(f"; moved to {run / 'damaged_checkpoints' / '2'}")


def test_a_step_is_saved_again_and_damaged_again(run):
    """Where a step was moved aside its number is free; a second damaged one goes beside the first."""
    for number in ("2", "2.1"):
        flip(KINDS["data"](run / "checkpoints" / "2"))
        checkpoints, said = open_run(run, every=1)
        assert checkpoints.restore_newest(make_abstract())[0] == 1
        assert checkpoints.save(2, make_state(2), MODEL)
        checkpoints.close()
        assert find_problems(run / "checkpoints" / "2") == []
        assert (run / "damaged_checkpoints" / number).is_dir()
        assert len(said) == 1


def test_every_step_damaged(run):
    shutil.rmtree(run / "checkpoints" / "1" / "params")
    flip(KINDS["data"](run / "checkpoints" / "2"))
    before = listing(run)
    checkpoints, said = open_run(run)
    with pytest.raises(
        InputError, match=r"every checkpoint .*step 2 is damaged, params/.*step 1 is damaged, params/.*"
    ):
        checkpoints.restore_newest(make_abstract())
    assert (listing(run), said) == (before, [])


def without_sums(step: Path) -> None:
    """Makes a step as older versions wrote it."""
    (step / SUMS).unlink()
    meta = json.loads((step / META_FILE).read_text())
    del meta["has_sums"]
    (step / META_FILE).write_text(json.dumps(meta))


def test_a_step_of_an_older_version(run, wanted):
    without_sums(run / "checkpoints" / "2")
    checkpoints, said = open_run(run)
    step, state = checkpoints.restore_newest(make_abstract())
    assert (step, digest_state(state)) == (2, wanted[2])
    assert said == [f"the checkpoint of step 2 has no {SUMS} (of an older version): it is not verified"]
    for path in (KINDS["manifest"], KINDS["tree"], KINDS["meta"]):
        before = path(run / "checkpoints" / "2").read_bytes()
        truncate(path(run / "checkpoints" / "2"))
        checkpoints, said = open_run(run)
        assert checkpoints.restore_newest(make_abstract())[0] == 1
        assert len(said) == 2
        (run / "damaged_checkpoints" / "2").rename(run / "checkpoints" / "2")
        path(run / "checkpoints" / "2").write_bytes(before)


def test_a_step_that_orbax_itself_wrote(tmp_path, wanted):
    """What older versions left to its manager: compressed, with other files."""
    state = make_state(1, make_mesh(fsdp=4, model=2))
    rest = {"step": state.step, "state": state.optimizer_state}
    meta = {"format": 1, "model": dataclasses.asdict(MODEL), "dtype": "float32"}
    with ocp.CheckpointManager(tmp_path / "checkpoints") as other:
        items = {"params": ocp.args.StandardSave(state.params), "optimizer": ocp.args.StandardSave(rest)}
        other.save(1, args=ocp.args.Composite(**items, meta=ocp.args.JsonSave(meta)))
    assert digest_step(tmp_path / "checkpoints" / "1") == wanted[1]
    checkpoints, said = open_run(tmp_path)
    step, state = checkpoints.restore_newest(make_abstract(make_mesh(fsdp=2, model=4)))
    assert (step, digest_state(state), len(said)) == (1, wanted[1], 1)


def test_what_is_no_damage_moves_nothing(run):
    folder = run / "checkpoints" / "2"
    before = listing(run)
    other = dataclasses.replace(MODEL, num_hidden_layers=4)
    checkpoints, said = open_run(run)
    with pytest.raises(InputError, match=r"layers.mlp.dense_4h_to_h.bias is float32\[2, 64\], wanted float32\[4, 64\]"):
        checkpoints.restore_newest(make_abstract(model=other))
    narrower = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, "float16", sharding=leaf.sharding), make_abstract().params
    )
    with pytest.raises(InputError, match=r"embed_in.embedding is float32\[512, 64\], wanted float16\[512, 64\]"):
        checkpoints.restore_newest(make_abstract().replace(params=narrower))
    assert listing(run) == before
    meta = json.loads((folder / META_FILE).read_text())
    (folder / META_FILE).write_text(json.dumps({**meta, "format": 2}))
    (folder / SUMS).unlink()
    write_sums(folder, beside_training=False)
    before = listing(run)
    with pytest.raises(InputError, match="checkpoint format 2, and this version reads 1; update neox_jax") as caught:
        checkpoints.restore_newest(make_abstract())
    assert not isinstance(caught.value, DamagedError)
    assert (listing(run), said) == (before, [])


def test_a_model_is_loaded_from_the_newest_whole_step(run, capsys):
    shutil.copytree(run / "checkpoints" / "2", run / "checkpoints" / "3")
    path = KINDS["data"](run / "checkpoints" / "3")
    flip(path)
    (run / "checkpoints" / f"9{TEMPORARY}").mkdir()
    before = listing(run)
    model = neox_jax.load_model(run)
    error = capsys.readouterr().err
    assert f"3 is damaged ({path.relative_to(run / 'checkpoints' / '3')}: not as it was written" in error
    assert error.endswith("; taking step 2\n")
    for name, leaf in named_leaves(make_state(2).params).items():
        np.testing.assert_array_equal(named_leaves(model)[name], leaf)
    with pytest.raises(InputError, match="3 is damaged"):
        neox_jax.load_model(f"{run}@3")
    assert listing(run) == before
    assert (run / "checkpoints" / f"9{TEMPORARY}").is_dir()
    flip(KINDS["optimizer"](run / "checkpoints" / "2"))  # which a model is not made of
    neox_jax.load_model(f"{run}@2")


# ---- saving


def test_what_is_saved_is_the_state_of_then(tmp_path, monkeypatch):
    """The next steps donate the state that is being written."""
    release, real = threading.Event(), manager.StepWriter._write
    monkeypatch.setattr(manager.StepWriter, "_write", lambda self, handlers: (release.wait(60), real(self, handlers)))
    checkpoints, _ = open_run(tmp_path, every=1)
    state = make_state(3, make_mesh(data=2, fsdp=2, model=2))
    before = digest_state(state)
    step = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    checkpoints.save(3, state, MODEL)
    for _ in range(4):
        state = step(state)
    jax.block_until_ready(state)
    release.set()
    checkpoints.close()
    assert digest_step(tmp_path / "checkpoints" / "3") == before
    assert digest_state(state) != before


MESHES = [{"data": 2, "fsdp": 2, "model": 2}, {"fsdp": 4, "pipe": 2}, {"data": 8}, {"model": 8}, {}]


def test_any_mesh_to_any_other(tmp_path, wanted):
    for index, sizes in enumerate(MESHES):
        mesh = make_mesh(**sizes, devices=None if sizes else jax.devices()[:1])
        checkpoints, _ = open_run(tmp_path, every=1)
        if index == 0:
            state = make_state(1, mesh)
        else:
            step, state = checkpoints.restore_newest(make_abstract(mesh))
            assert step == index
        assert digest_state(state) == wanted[1]
        checkpoints.save(index + 1, state, MODEL, force=True)
        assert digest_step(tmp_path / "checkpoints" / str(index + 1)) == wanted[1]


def test_policies():
    config = CheckpointConfig(every=20, steps=(1, 7), keep=2, keep_every=40)
    assert [step for step in range(101) if is_due(step, config)] == [0, 1, 7, 20, 40, 60, 80, 100]
    assert not any(is_due(step, CheckpointConfig(every=0)) for step in range(9))
    assert steps_to_remove([0, 1, 7, 20, 40, 50, 60], 2, 40, (1, 7)) == [20]
    assert steps_to_remove([0, 20, 40], 1, 0) == [0, 20]
    assert steps_to_remove([20], 3, 0) == []


def test_policies_go_on_after_a_restart_and_a_fallback(tmp_path):
    state = make_state(0)

    def go(first: int, last: int) -> list[int]:
        checkpoints, _ = open_run(tmp_path, every=2, keep=2, keep_every=6, steps=(3,))
        for step in range(first, last + 1):
            checkpoints.save(step, state, MODEL)
        checkpoints.save(last, state, MODEL, force=True)
        checkpoints.close()
        return list_steps(tmp_path / "checkpoints")

    assert go(0, 5) == [0, 3, 4, 5]
    assert go(6, 9) == [0, 3, 6, 8, 9]
    flip(KINDS["data"](tmp_path / "checkpoints" / "9"))
    checkpoints, _ = open_run(tmp_path)
    assert checkpoints.restore_newest(make_abstract())[0] == 8
    assert go(9, 11) == [0, 3, 6, 10, 11]
    assert all(find_problems(tmp_path / "checkpoints" / str(step)) == [] for step in (0, 3, 6, 10, 11))


def test_the_last_one_stays_until_the_next_has_its_sums(tmp_path, monkeypatch):
    checkpoints, said = open_run(tmp_path, every=1, keep=1)
    state, folder = make_state(0), tmp_path / "checkpoints"
    checkpoints.save(1, state, MODEL, force=True)
    reached, release, real = threading.Event(), threading.Event(), commit.write_sums

    def slow(folder: Path, **options) -> None:
        reached.set()
        release.wait(60)
        real(folder, **options)

    monkeypatch.setattr(commit, "write_sums", slow)
    checkpoints.save(2, state, MODEL)
    assert reached.wait(60)
    assert list_steps(folder) == [1]
    release.set()
    checkpoints.close()
    assert list_steps(folder) == [2]
    assert find_problems(folder / "2") == []

    def broken(folder: Path, **_) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(commit, "write_sums", broken)
    assert checkpoints.save(3, state, MODEL)
    checkpoints.close()
    assert os.listdir(folder) == ["2"]
    assert said == [
        "the checkpoint of step 3 could not be written: No space left on device; nothing of it was kept, the next one "
        "due tries again"
    ]
    with pytest.raises(InputError, match=r"step 4 could not be saved: No space left.*goes on from step 2$"):
        checkpoints.save(4, state, MODEL, force=True)
    monkeypatch.setattr(commit, "write_sums", real)
    assert checkpoints.save(5, state, MODEL, force=True)
    assert os.listdir(folder) == ["5"]


def test_what_killed_saves_left_goes_when_a_run_starts(run):
    for name in (f"3{TEMPORARY}", f"1.removed{TEMPORARY}"):
        (run / "checkpoints" / name / "params").mkdir(parents=True)
    for verb in ("list", "verify", "inspect", "hash"):
        assert main(["checkpoint", verb, str(run)]) == 0
    assert len(os.listdir(run / "checkpoints")) == 4
    open_run(run)
    assert sorted(os.listdir(run / "checkpoints")) == ["1", "2"]


# ---- processes, disks


ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(ROOT),
    "JAX_PLATFORMS": "cpu",
    "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
}


def worker(*arguments, **environment) -> subprocess.Popen:
    command, environment = [sys.executable, str(WORKER), *map(str, arguments)], {**ENVIRONMENT, **environment}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_failed_save_leaves_nothing_though_orbax_still_writes(tmp_path, monkeypatch):
    """Its metadata, for one, which it does not stop writing where the arrays have no room."""
    checkpoints, said = open_run(tmp_path, every=1)
    save, thread = ocp.PyTreeCheckpointHandler.async_save, concurrent.futures.ThreadPoolExecutor(1)

    def write_late(folder: Path) -> None:
        time.sleep(0.3)
        folder.mkdir(parents=True, exist_ok=True)

    async def save_and_more(self, directory, **options):
        return [*await save(self, directory, **options), thread.submit(write_late, Path(directory) / "late")]

    def no_room(self, values, infos) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "async_save", save_and_more)
    monkeypatch.setattr(StreamedHandler, "_write", no_room)
    assert checkpoints.save(1, make_state(0), MODEL)
    checkpoints.close()
    thread.shutdown()
    assert os.listdir(tmp_path / "checkpoints") == []
    assert "could not be written: No space left on device" in said[0]


def outcome(child: subprocess.Popen) -> tuple[int, str, str]:
    try:
        out, err = child.communicate(timeout=120)
    finally:
        child.kill()
    return child.returncode, out, err


def test_killed_at_any_moment(tmp_path, wanted):
    code, _, err = outcome(worker("killed", tmp_path))
    assert code == 0, err
    for moment in MOMENTS:
        whole = 2 if moment in ("named", "removing") else 1
        checkpoints, said = open_run(tmp_path / moment)
        step, state = checkpoints.restore_newest(make_abstract())
        assert (step, digest_state(state), said) == (whole, wanted[whole], []), moment
        assert not list((tmp_path / moment).rglob("*tmp*"))


def test_a_full_disk():
    done = in_a_small_disk("/mnt", "16m", sys.executable, WORKER, "full", "/mnt")
    assert done.returncode == 0, done.stderr
    assert (done.stdout, done.stderr) == ("survived 4\n", "")


def test_a_run_on_a_disk_with_room_for_one(data):
    """Step 2 has no room and training goes on; neither has the last one, and that is where the command ends."""
    arguments = train_arguments(data, "/mnt/run", **{"train.steps": 4, "checkpoint.every": 2})
    done = in_a_small_disk("/mnt", "6m", sys.executable, "-m", "neox_jax.cli", *arguments)
    err = done.stderr
    assert done.returncode == 65, err
    assert "no checkpoint of step 2: 0.004" in done.stdout
    (line,) = [line for line in err.splitlines() if "checkpoint" in line]
    assert line.startswith("neox-jax: the checkpoint of step 4 could not be saved: 0.004")
    assert line.endswith("make room, or lower checkpoint.keep; mend that, and the same command goes on from step 0")
    assert "Traceback" not in err


def test_a_folder_that_cannot_be_written_to(saved):
    script = f"cp -r {saved} /mnt/run && mount -o remount,ro /mnt && {sys.executable} {WORKER} read_only /mnt/run"
    done = in_a_small_disk("/mnt", "32m", "sh", "-c", script)
    code, out, err = done.returncode, done.stdout, done.stderr
    assert code == 0, err
    assert err == "neox-jax: /mnt/run/checkpoints/1 cannot be removed: Read-only file system\n"
    assert "\nno checkpoint of step 3: /mnt/run/checkpoints: Read-only file system; training goes on" in out
    assert "step 3 could not be saved: /mnt/run/checkpoints: Read-only file system; mend that, and the same" in out


def test_two_processes_and_one_and_two(tmp_path, wanted):
    """Process 1 has no room for step 2: nobody waits for it, and the run goes on."""

    def together(what: str) -> list[tuple[int, str, str]]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            place = f"127.0.0.1:{probe.getsockname()[1]}"
        devices = {"JAX_NUM_CPU_DEVICES": "2"}
        children = [worker("together", place, 2, i, tmp_path, what, **devices) for i in range(2)]
        return [outcome(child) for child in children]

    (code, out, err), (other, _, error) = together("save")
    assert (code, other) == (0, 0), err + error
    host = socket.gethostname()
    assert f"step 2 could not be written: process 1 ({host}) could not write its part; nothing of it" in out
    assert "process 1: the checkpoint of step 2 could not be written: No space left on device" in error
    assert list_steps(tmp_path / "checkpoints") == [1, 3, 4]
    digests = digest_state(make_state(4))
    assert digest_step(tmp_path / "checkpoints" / "4") == digests
    checkpoints, _ = open_run(tmp_path)
    step, state = checkpoints.restore_newest(make_abstract())
    assert (step, digest_state(state)) == (4, digests)
    checkpoints.save(5, state, MODEL, force=True)
    assert digest_step(tmp_path / "checkpoints" / "5") == digests
    shutil.copytree(tmp_path / "checkpoints" / "5", tmp_path / "checkpoints" / "6")
    flip(KINDS["optimizer"](tmp_path / "checkpoints" / "6"))
    (code, out, err), (other, _, error) = together("go on")
    assert (code, other) == (0, 0), err + error
    assert out.count("step 6 is damaged, optimizer/") == 1
    assert digest_step(tmp_path / "checkpoints" / "6") == digests
    assert read_meta(tmp_path / "checkpoints" / "6") == (MODEL, "float32")


# ---- the verbs


def said_by(capsys, *arguments) -> tuple[int, str, str]:
    code = main(["checkpoint", *map(str, arguments)])
    return code, *capsys.readouterr()


def test_list_and_inspect(run, capsys):
    code, out, _ = said_by(capsys, "list", run)
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == ["1", "2"]
    assert all(line.endswith("can be verified") for line in out.splitlines())
    without_sums(run / "checkpoints" / "1")
    assert f"no {SUMS}: cannot be verified" in said_by(capsys, "list", f"{run}@1")[1]
    code, out, _ = said_by(capsys, "inspect", run)
    assert code == 0
    assert out.startswith(f"step 2: {MODEL.num_parameters:,} parameters in float32\nvocab_size 512, hidden_size 64")
    (line,) = [line for line in out.splitlines() if line.split()[0] == "layers.mlp.dense_4h_to_h.kernel"]
    assert line.split(maxsplit=4)[1:] == ["float32", "131.1", "kB", "[2, 256, 64]"]


def test_verify(run, capsys):
    code, out, _ = said_by(capsys, "verify", run)
    assert (code, out) == (0, "as they were written: step 1, 2; damaged: step none\n")
    path = KINDS["data"](run / "checkpoints" / "1")
    flip(path)
    (run / "checkpoints" / "1" / "_CHECKPOINT_METADATA").unlink()
    before = listing(run)
    code, out, _ = said_by(capsys, "verify", run)
    assert code == 65
    name = path.relative_to(run / "checkpoints" / "1")
    assert f"step 1: {name}: not as it was written (SHA-256 differs)\n" in out
    assert "step 1: _CHECKPOINT_METADATA: missing\n" in out
    assert out.endswith("as they were written: step 2; damaged: step 1\n")
    assert said_by(capsys, "verify", f"{run}@2")[0] == 0
    assert listing(run) == before
    without_sums(run / "checkpoints" / "2")
    code, out, _ = said_by(capsys, "verify", f"{run}@2")
    assert (code, out.splitlines()[0]) == (0, "step 2: not verified, an older version wrote it without checksums")


def test_hash(run, wanted, capsys):
    for place, step in ((run, 2), (f"{run}@1", 1)):
        code, out, _ = said_by(capsys, "hash", place)
        assert (code, out) == (0, f"{wanted[step]['state']}  state\n{wanted[step]['params']}  params\n")
    neox_jax.save_model(neox_jax.load_model(run), run.parent / "model", format="orbax")
    assert said_by(capsys, "hash", run.parent / "model")[1] == f"{wanted[2]['params']}  params\n"
    truncate(KINDS["manifest"](run / "checkpoints" / "2"))
    code, out, err = said_by(capsys, "hash", run)
    assert (code, out, err.count("\n")) == (65, "", 1)


def test_prune(run, capsys, monkeypatch):
    for step in (3, 4, 5):
        shutil.copytree(run / "checkpoints" / "2", run / "checkpoints" / str(step))
    flip(KINDS["data"](run / "checkpoints" / "5"))
    code, out, _ = said_by(capsys, "prune", run, "--keep", 1, "--keep-every", 2, "--dry-run")
    assert (code, out) == (0, "would remove step 1\nwould remove step 3\n3 of 5 checkpoints stay\n")
    assert list_steps(run / "checkpoints") == [1, 2, 3, 4, 5]
    code, out, _ = said_by(capsys, "prune", run, "--keep", 1)
    assert (code, out.splitlines()[-1]) == (0, "2 of 5 checkpoints stay")
    assert list_steps(run / "checkpoints") == [4, 5], "5 is damaged, so 4 stays"
    from neox_jax.checkpoint import inspection

    monkeypatch.setattr(inspection, "held_by", lambda folder: "process 7 on here")
    code, _, err = said_by(capsys, "prune", run, "--keep", 1)
    assert (code, "is in use (process 7 on here)" in err) == (65, True)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["list", "{tmp}/nothing"], 65, "holds no checkpoints; wanted a run folder"),
        (["verify", "{run}@7"], 65, "has no checkpoint of step 7; it has 1, 2"),
        (["hash", "{run}@x"], 65, "holds no checkpoints"),
        (["prune", "{run}"], 2, "prune takes --keep N"),
        (["list", "{run}", "--keep", "1"], 2, "prune takes --keep N"),
        (["prune", "{run}", "--keep", "0"], 65, "at least one is kept"),
    ],
)
def test_what_the_verbs_refuse(saved, tmp_path, capsys, arguments, code, message):
    found = said_by(capsys, *[one.format(tmp=tmp_path, run=saved) for one in arguments])
    assert (found[0], found[1], message in found[2], found[2].count("\n")) == (code, "", True, 1)


def test_hashing_is_bounded_and_quick(tmp_path):
    """A piece at a time, with hashlib's own digests; benchmarks/checkpoint_cost.py has the speed."""
    path = tmp_path / "file"
    path.write_bytes(np.random.default_rng(0).bytes(3 * (1 << 20) + 17))
    pieces = []
    (digest,) = hash_files([path], pieces.append).values()
    assert digest == subprocess.run(["sha256sum", path], capture_output=True, text=True).stdout.split()[0]
    assert pieces == [1 << 20, 1 << 20, 1 << 20, 17]


def test_digests_are_of_names_dtypes_shapes_and_values():
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    changed = [{"b": array}, {"a": array.reshape(3, 2)}, {"a": array.astype("int32")}, {"a": array + 1}]
    digests = {digest_arrays({"params": one})["params"] for one in [{"a": array}, *changed]}
    assert len(digests) == 5
    assert digest_arrays({"params": {"a": array}}) == digest_arrays({"params": {"a": np.asfortranarray(array)}})


def test_models_are_told_apart_by_their_meta(saved):
    assert read_meta(saved / "checkpoints" / "1") == (MODEL, "float32")
    assert ModelConfig.preset("tiny") != MODEL
