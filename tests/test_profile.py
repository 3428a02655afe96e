"""A run that is profiled: its trace, and what TensorBoard is told of the same run, over two starts."""

import gzip
import json
import shutil
from pathlib import Path

import jax
import pytest
from runs import make_config
from test_metrics import events_of

from neox_jax.cli import main
from neox_jax.errors import InputError
from neox_jax.metrics import MetricsWriter, read_metrics
from neox_jax.peers import Alone
from neox_jax.profiler import Profiler
from neox_jax.train import train


def config_of(data, *, steps=6):
    sets = {"code": str(data / "valid"), "short": str(data / "short")}
    return make_config(
        data,
        train={"steps": steps, "batch_size": 8, "seq_length": 16},
        data={"train": str(data / "train"), "tokenizer": str(data / "tokenizer.json"), "valid": sets},
        eval={"every": 2, "batches": 1, "sample_tokens": 0},
    )


def traces_of(folder: Path) -> dict[str, list[int]]:
    """Of each trace, the steps in it, by the name a viewer shows."""
    found = {}
    for trace in folder.glob("profile/plugins/profile/*"):
        (host,) = trace.glob("*.xplane.pb")
        assert b"train" in host.read_bytes()
        (events,) = trace.glob("*.trace.json.gz")
        assert events.name.partition(".trace")[0] == host.name.partition(".xplane")[0]
        events = json.loads(gzip.decompress(events.read_bytes()))["traceEvents"]
        found[trace.name] = [int(e["args"]["step_num"]) for e in events if e.get("name") == "train"]
        # All of the last step is there: what the devices did goes on after its call returned.
        last = max(e["ts"] + e["dur"] for e in events if e.get("name") == "train")
        assert max(e["ts"] + e["dur"] for e in events if e.get("ph") == "X") > last
    return found


def said(folder: Path, text: str) -> list[dict]:
    lines = map(json.loads, (folder / "events.jsonl").read_text().splitlines())
    return [line for line in lines if text in line["text"]]


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> Path:
    """Six steps, of which 2 to 4 are traced; then two more, whose trace cannot be written: a file is in its place."""
    folder = tmp_path_factory.mktemp("profiled") / "run"
    device = jax.devices()[:1]
    train(config_of(data), folder, devices=device, profile=range(2, 5))
    in_place = folder / "profile" / "plugins" / "profile" / "steps_7-8"
    in_place.write_text("mine")
    result = train(config_of(data, steps=8), folder, devices=device, profile=range(7, 9), accept_changes=True)
    assert (result.step, result.interrupted, in_place.read_text()) == (8, False, "mine")
    in_place.unlink()
    end_trace(in_place)
    return folder


def end_trace(folder: Path) -> None:
    """Ends what jax could not, so that the next test can trace."""
    jax.profiler.stop_trace()
    shutil.rmtree(folder)


def test_the_trace_has_the_steps(run):
    assert traces_of(run) == {"steps_2-4": [2, 3, 4]}
    (line,) = said(run, "traced")
    assert line["text"] == f"traced steps 2 to 4, in {run / 'profile'}"
    assert line["step"] == 4


def test_a_trace_that_cannot_be_written_costs_a_line(run):
    (line,) = said(run, "not profiled")
    assert line["text"].startswith("steps 7:9 are not profiled: ")
    assert "steps_7-8" in line["text"]
    assert [line["step"] for line in read_metrics(run / "metrics.jsonl")] == list(range(1, 9))


def profiler_of(folder: Path, steps: range) -> tuple[Profiler, list]:
    """A profiler, and what it says."""
    lines = []
    return Profiler(steps, folder, peers=Alone(), say=lambda text, step=None: lines.append((text, step))), lines


def test_a_start_behind_the_range_says_so(tmp_path):
    profiler, lines = profiler_of(tmp_path, range(2, 5))
    profiler.start_run(3)
    assert lines == []
    profiler.start_run(4)
    assert lines == [("nothing is profiled: the run goes on from step 4, behind --profile 2:5", 4)]


def test_tensorboard_has_each_step_once_and_in_groups(run):
    """As a viewer reads it: a new start makes it forget that step and later ones."""
    seen = {}
    for file in sorted((run / "tensorboard").iterdir(), key=lambda file: file.stat().st_mtime):
        for event in events_of(file):
            if event.HasField("session_log"):
                seen = {step: values for step, values in seen.items() if step < event.step}
            elif event.step:
                assert event.step not in seen
                seen[event.step] = {value.tag: value.simple_value for value in event.summary.value}
    lines = read_metrics(run / "metrics.jsonl")
    assert list(seen) == [line["step"] for line in lines]
    for line in lines:
        tags = seen[line["step"]]
        assert len(tags) == sum(isinstance(value, (int, float)) for value in line.values()) - 1
        assert tags["train/loss"] == pytest.approx(line["loss"])
        for tag in ("train/grad_norm", "train/learning_rate", "train/tokens", "train/skipped_updates"):
            assert tags[tag] == pytest.approx(line[tag.partition("/")[2]])
        for tag in ("speed/tokens_per_second", "speed/mfu", "speed/step_seconds", "speed/data_wait_seconds"):
            assert tags[tag] == pytest.approx(line[tag.partition("/")[2]])
        held_out = {tag for tag in tags if tag.startswith("valid/")}
        names = {f"valid/{what}{of}" for what in ("loss", "bits_per_byte") for of in ("", "/code", "/short")}
        names.remove("valid/bits_per_byte/short")  # its one token is no text
        assert held_out == (names if line["step"] % 2 == 0 else set())
        assert tags.get("valid/loss/code") == pytest.approx(line.get("valid_loss/code"))


def test_steps_that_are_cut_off_are_forgotten(tmp_path):
    """A crash after step 4, and a start from step 2: steps 3 and 4 of the first start are not to be shown."""
    for start, loss in ((0, 1.0), (2, 2.0)):
        writer = MetricsWriter(tmp_path, start_step=start)
        for step in range(start + 1, 5):
            writer.write({"step": step, "loss": loss})
        writer.close()
    starts = [
        [event.step for event in events_of(file) if event.HasField("session_log")]
        for file in (tmp_path / "tensorboard").iterdir()
    ]
    assert sorted(starts) == [[1], [3]]


def test_a_start_in_the_middle_traces_the_rest(tmp_path):
    profiler, lines = profiler_of(tmp_path, range(2, 6))
    profiler.start_run(3)
    double, state = jax.jit(lambda x: x + x), jax.numpy.ones(4)
    for step in (4, 5, 6):
        with profiler.step(step, state):
            state = double(state)
        if profiler.is_due(step):
            profiler.finish(state)
    assert traces_of(tmp_path) == {"steps_4-5": [4, 5]}
    assert lines == [(f"traced steps 4 to 5, in {tmp_path / 'profile'}", 5)]


def test_one_process_of_a_host_traces(tmp_path):
    peers, asked = Alone(), []
    peers.hosts = ("a", "b", "a", "b")
    for peers.process_id in range(4):
        profiler = Profiler(range(1, 2), tmp_path, peers=peers, say=print)
        with profiler.step(1, ()):
            asked.append(profiler.is_due(1))
        profiler.close()
    assert asked == [True, True, False, False]


def test_a_trace_that_cannot_be_begun_costs_a_line(tmp_path):
    (tmp_path / "profile").write_text("mine")
    profiler, lines = profiler_of(tmp_path, range(1, 3))
    for step in (1, 2):
        with profiler.step(step, ()):
            assert not profiler.is_due(step)
    profiler.close()
    ((text, _),) = lines
    assert text.startswith("steps 1:3 are not profiled: ")
    assert "File exists" in text
    assert (tmp_path / "profile").read_text() == "mine"


def test_a_range_beyond_the_run(data, tmp_path):
    with pytest.raises(InputError, match=r"--profile 4:8 is steps 4 to 7; wanted steps of 1 to 6 \(train.steps\)"):
        train(config_of(data), tmp_path / "run", profile=range(4, 8))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("text", ["0:3", "3:3", "4:3", "3", ":3", "3:", "-1:3", "a:b", "1:2:3"])
def test_bad_ranges_are_bad_usage(text, capsys):
    with pytest.raises(SystemExit) as error:
        main(["train", "--config", "x", "--workdir", "y", f"--profile={text}"])
    assert error.value.code == 2
    assert "--profile" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["tokenize", "x", "--tokenizer", "none.json", "--output", "y", "--workers", "0"], 2),
        (["tokenize", "x", "--tokenizer", "none.json", "--output", "y", "--workers", "1"], 65),
        (["data", "batch", "--config", "none.py", "--step", "-1"], 2),
        (["data", "batch", "--config", "none.py", "--step", "0", "--row", "0"], 65),
    ],
)
def test_counts_are_from_1_and_indexes_from_0(arguments, code):
    try:
        found = main(arguments)
    except SystemExit as error:  # argparse's own way
        found = error.code
    assert found == code
