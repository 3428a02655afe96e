"""metrics.jsonl loses no step and has none twice, whatever fails; which hosts are slow."""

import io
import json
import os
import sys
from pathlib import Path

import pytest
from mounts import python_in_a_small_disk

from neox_jax.errors import InputError
from neox_jax.metrics import MetricsWriter, read_metrics
from neox_jax.slow_hosts import slow_hosts

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


def text_of(*steps, **more) -> str:
    return "".join(json.dumps({"step": step, "loss": step / 2, **more}) + "\n" for step in steps)


def steps_of(path) -> list[int]:
    return [line["step"] for line in read_metrics(path)]


# --- from one start to the next ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "kept"),
    [
        ("", []),
        (text_of(1, 2), [1, 2]),
        (text_of(1, 2, 3, 4), [1, 2]),
        (text_of(5, 10), []),
        (text_of(1, 2) + '{"step": 3, "lo', [1, 2]),
        (text_of(1, 2) + "\0" * 50, [1, 2]),  # as a file system may leave it when its host crashes
        (text_of(1, 2).rstrip("\n"), [1, 2]),  # whole but for its end
        (text_of(1, 2, 3).rstrip("\n"), [1, 2]),
        (text_of(1) + '{"step": 1, "lo\n' + text_of(2), [1, 2]),
        (text_of(1, 2) + '{"step": 3, "lo\n[]\n{"step": "x"}\n\xff\n' + text_of(3), [1, 2]),
    ],
)
def test_each_step_is_there_once(path, before, kept):
    path.write_text(before, encoding="latin-1")
    writer = MetricsWriter(path.parent, start_step=2)
    assert writer.last == (read_metrics(path)[-1] if kept else None)
    assert steps_of(path) == kept
    for step in (3, 4):
        writer.write({"step": step, "loss": 0.25})
    assert writer.last == {"step": 4, "loss": 0.25}
    writer.close()
    assert steps_of(path) == [*kept, 3, 4]
    assert path.read_bytes().endswith(b'{"step": 3, "loss": 0.25}\n{"step": 4, "loss": 0.25}\n')


def test_a_line_that_cannot_be_read_hides_no_other(path, capsys):
    path.write_text(text_of(1) + '{"st\n{"st\n' + text_of(2, 3) + '{"step": 4')
    assert steps_of(path) == [1, 2, 3]
    assert capsys.readouterr().err == f"neox-jax: {path}: line 2 cannot be read and is left out, as are 1 more\n"


def test_a_file_that_is_as_it_should_be_is_not_touched(path):
    path.write_text(text_of(1, 2))
    os.utime(path, (5, 5))
    MetricsWriter(path.parent, start_step=2).close()
    assert path.stat().st_mtime == 5


def test_a_file_that_cannot_be_cut_off(path):
    path.mkdir()
    with pytest.raises(InputError, match=r"metrics.jsonl cannot be cut off behind step 2.*\(is a directory\)"):
        MetricsWriter(path.parent, start_step=2)


def test_flush_says_whether_all_is_on_the_disk(path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    writer = MetricsWriter(path.parent, start_step=0)
    synced.clear()
    writer.write({"step": 1})
    assert writer.flush()
    assert synced == [str(path), str(path.parent)]
    writer.close()


def test_a_file_that_was_removed_begins_anew(path):
    writer = MetricsWriter(path.parent, start_step=0)
    writer.write({"step": 1})
    path.unlink()
    writer.write({"step": 2})
    writer.close()
    assert steps_of(path) == [2]


def test_a_file_that_cannot_be_written(path, capsys):
    """A folder in its place, for a while."""
    writer = MetricsWriter(path.parent, start_step=0)
    path.mkdir()
    for step in (1, 2):
        writer.write({"step": step})
    assert not writer.flush()
    path.rmdir()
    writer.write({"step": 3})
    assert writer.flush()
    path.rename(path.with_suffix(".was"))
    path.mkdir()
    writer.write({"step": 4})
    writer.close()
    assert steps_of(path.with_suffix(".was")) == [1, 2, 3]
    assert capsys.readouterr().err.splitlines() == [
        f"neox-jax: {path} cannot be written (is a directory); its lines are kept until it can",
        f"neox-jax: {path} lacks 1 lines, steps 4 to 4, which could not be written",
    ]


# --- a full disk ------------------------------------------------------------------------------------------------------

FULL_DISK = """
import sys
from pathlib import Path
from neox_jax.errors import InputError
from neox_jax.metrics import MetricsWriter, read_metrics

disk = Path(sys.argv[1])
path, filler = disk / "run" / "metrics.jsonl", disk / "filler"
path.parent.mkdir()

def fill():
    with filler.open("ab", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            return

writer = MetricsWriter(path.parent, start_step=0)
line = {"text": "x" * 1500}
for step in range(1, 4):
    writer.write({"step": step, **line})
assert writer.flush()
fill()
for step in range(4, 12):  # some end in the middle of a line
    writer.write({"step": step, **line})
    text = path.read_bytes()
    assert text.endswith(b"}\\n"), text[-50:]
print("full", [each["step"] for each in read_metrics(path)][-1] < 11, writer.flush())
filler.unlink()
writer.write({"step": 12, **line})
print("room", [each["step"] for each in read_metrics(path)] == list(range(1, 13)), writer.flush())

fill()
before = path.read_bytes()
for step in range(13, 20):
    writer.write({"step": step, **line})
writer.close()
kept = [each["step"] for each in read_metrics(path)]
print("kept", kept == list(range(1, kept[-1] + 1)) and kept[-1] < 19)
# The next start, on the same full disk: dropping takes no room.
writer = MetricsWriter(path.parent, start_step=10)
print("next", [each["step"] for each in read_metrics(path)] == list(range(1, 11)), writer.last["step"])
filler.unlink()
writer.write({"step": 11})
writer.close()
print("end", [each["step"] for each in read_metrics(path)] == list(range(1, 12)))
"""


def test_a_full_disk(tmp_path):
    (tmp_path / "disk").mkdir()
    done = python_in_a_small_disk(tmp_path / "disk", "64k", FULL_DISK)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "full True False", "room True True", "kept True", "next True 10", "end True",
    ]  # fmt: skip
    metrics = tmp_path / "disk" / "run" / "metrics.jsonl"
    about_metrics = [line for line in done.stderr.splitlines() if "TensorBoard" not in line]  # which has its own say
    assert about_metrics[0] == (
        f"neox-jax: {metrics} cannot be written (no space left on device); its lines are kept until it can"
    )
    assert about_metrics[1].startswith(f"neox-jax: {metrics} lacks ")
    assert about_metrics[1].endswith(" to 19, which could not be written")
    assert len(about_metrics) == 2


# --- TensorBoard ------------------------------------------------------------------------------------------------------


def write_three(folder: Path) -> None:
    writer = MetricsWriter(folder, start_step=0)
    for step in (1, 2, 3):
        writer.write({"step": step, "loss": step / 2, "text": "x", "none": float("nan")})
    writer.close()
    assert steps_of(folder / "metrics.jsonl") == [1, 2, 3]


def events_of(file: Path) -> list:
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    data, events = file.read_bytes(), []
    while data:
        length = int.from_bytes(data[:8], "little")
        events.append(event_pb2.Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    return events


def test_tensorboard_gets_the_numbers(tmp_path, capsys):
    write_three(tmp_path)
    (file,) = (tmp_path / "tensorboard").iterdir()
    version, start, *lines = events_of(file)
    assert (version.file_version, start.session_log.status, start.step) == ("brain.Event:2", 1, 1)
    found = [(event.step, {value.tag: value.simple_value for value in event.summary.value}) for event in lines]
    assert [(step, values["train/loss"], sorted(values)) for step, values in found] == [
        (step, step / 2, ["train/loss", "train/none"]) for step in (1, 2, 3)
    ]
    assert capsys.readouterr().err == ""


def test_tensorboard_has_a_file_in_its_place(tmp_path, capsys):
    (tmp_path / "tensorboard").write_text("")
    write_three(tmp_path)
    said = capsys.readouterr().err
    assert said == f"neox-jax: no more is written for TensorBoard, {tmp_path / 'tensorboard'} (file exists)\n"


def test_tensorboard_is_not_installed(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX.event_file_writer", None)
    write_three(tmp_path)
    assert capsys.readouterr().err.count("no more is written for TensorBoard") == 1


def test_tensorboard_meets_a_full_disk(tmp_path, capsys, monkeypatch):
    """/dev/full instead of its file: only what is written tells."""
    record_writer = pytest.importorskip("tensorboardX.record_writer")
    monkeypatch.setattr(record_writer, "open_file", lambda path: io.BufferedWriter(io.FileIO("/dev/full", "w")))
    write_three(tmp_path)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].endswith("(no space left on device)")


# --- slow hosts -------------------------------------------------------------------------------------------------------

HOSTS = ("a", "b", "c", "d")


def rows(step=(1, 1, 1, 1), wait=(0, 0, 0, 0)) -> list[dict]:
    return [{"step_seconds": s, "data_wait_seconds": w} for s, w in zip(step, wait, strict=True)]


def test_no_host_is_slow():
    assert slow_hosts(rows(step=(1, 1.1, 1.19, 0.5)), HOSTS) == []
    assert slow_hosts(rows(wait=(1e-6, 5e-6, 9e-3, 0.19)), HOSTS) == []
    assert slow_hosts(rows()[:1], HOSTS) == []


def test_slow_hosts_are_named():
    assert slow_hosts(rows(step=(1, 1, 1.25, 1)), HOSTS) == ["process 2 (c) is slow: step 1.25 s (median 1 s)"]
    assert slow_hosts(rows(wait=(0.01, 0.3, 0.01, 0.5)), HOSTS) == [
        "process 1 (b) is slow: data wait 0.3 s (median 0.01 s)",
        "process 3 (d) is slow: data wait 0.5 s (median 0.01 s)",
    ]
    assert slow_hosts(rows(step=(1, 1, 1, 2), wait=(0, 0, 0, 0.5)), HOSTS) == [
        "process 3 (d) is slow: step 2 s (median 1 s), data wait 0.5 s (median 0 s)"
    ]
    # All wait for the disk alike: no host is to blame.
    assert slow_hosts(rows(wait=(0.5, 0.5, 0.5, 0.55)), HOSTS) == []


def test_the_slower_of_two_hosts():
    assert slow_hosts(rows(step=(1, 1.3, 0, 0))[:2], HOSTS) == ["process 1 (b) is slow: step 1.3 s (median 1 s)"]
