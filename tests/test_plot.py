"""Pictures of runs: what is drawn is what metrics.jsonl says."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

from neox_jax.cli import main
from neox_jax.errors import InputError
from neox_jax.plot import plot, read_runs

pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install neox_jax[viz]")

from matplotlib import image
from matplotlib.figure import Figure


def lines_of(number=10, *, every=1, skips=(), sets=(), **fields) -> list[dict]:
    lines = []
    for step in range(every, every * number + 1, every):
        line = {"step": step, "loss": 6 - step / 100, "grad_norm": 1.0, "learning_rate": 1e-3}
        line |= {"tokens": step * 512, "tokens_per_second": 1e6, "step_seconds": 36.0, "mfu": 0.5}
        line |= {"skipped_updates": sum(skip <= step for skip in skips), "batch_sha256": "ab"}
        if step % (2 * every) == 0:
            line |= {"valid_loss": 5.0, **{f"valid_loss/{name}": 4.0 + place for place, name in enumerate(sets)}}
        lines.append({**line, **fields})
    return lines


def write(folder: Path, lines: list[dict]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """A function of what `plot` takes, which gives the figure that it made a picture of."""
    figures, real = [], Figure.savefig

    def save(figure, *args, **kwargs):
        figures.append(figure)
        real(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", save)

    def draw(*paths, **options):
        plot(read_runs(paths), tmp_path / "picture.png", **options)
        assert np.ptp(image.imread(tmp_path / "picture.png")) > 0.5  # a real picture, not all of one colour
        return figures[-1]

    return draw


def titles_of(figure) -> list[str]:
    return [axis.get_title(loc="left") for axis in figure.axes]


def curves_of(axis) -> list[tuple[list, list]]:
    """Lines in the axis's own units."""
    lines = [line for line in axis.lines if line.get_transform() == axis.transData and len(line.get_xdata())]
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in lines]


def keys_of(axis) -> list[str]:
    legend = axis.get_legend()
    return [] if legend is None else [text.get_text() for text in legend.get_texts()]


def test_a_run(tmp_path, drawn):
    figure = drawn(write(tmp_path / "run", lines_of(4, skips=(3, 3))))
    assert titles_of(figure) == [
        "loss (nats per token)", "gradient norm, before clipping", "learning rate", "tokens per second", "MFU",
    ]  # fmt: skip
    assert figure.get_suptitle() == "run"
    loss = figure.axes[0]
    assert keys_of(loss) == ["training", "held out", "updates skipped"]
    assert curves_of(loss) == [([1, 2, 3, 4], [5.99, 5.98, 5.97, 5.96]), ([2, 4], [5.0, 5.0])]
    assert [list(line.get_xdata()) for line in loss.lines if line.get_marker() == "x"] == [[3]]
    assert curves_of(figure.axes[4]) == [([1, 2, 3, 4], [0.5] * 4)]
    figure.canvas.draw()
    assert "1,000,000" in [label.get_text() for label in figure.axes[3].get_yticklabels()]
    assert "50%" in [label.get_text() for label in figure.axes[4].get_yticklabels()]


def test_runs_are_told_apart(tmp_path, drawn):
    folders = [write(tmp_path / place, lines_of(3)) for place in ("a/run", "b/run", "other")]
    (tmp_path / "alone.jsonl").write_text((folders[0] / "metrics.jsonl").read_text())
    figure = drawn(
        *folders, folders[0] / "metrics.jsonl", tmp_path / "b" / ".." / "b" / "run", tmp_path / "alone.jsonl"
    )
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["a/run", "b/run", "other", "alone.jsonl"]
    assert len({line.get_color() for line in legend.get_lines()}) == 4
    assert len(curves_of(figure.axes[1])) == 4


@pytest.mark.parametrize("number", [28, 29])
def test_many_runs(tmp_path, drawn, number):
    folders = [write(tmp_path / f"run-{place}", lines_of(2)) for place in range(number)]
    (legend,) = drawn(*folders, metrics=["loss"]).legends
    looks = {(str(line.get_color()), str(line._dash_pattern)) for line in legend.get_lines()}
    assert len(looks) == number


def test_heldout_sets_have_a_panel(tmp_path, drawn):
    figure = drawn(write(tmp_path / "run", lines_of(4, sets=("code", "talks"))))
    assert titles_of(figure)[:2] == ["loss (nats per token)", "held-out loss (nats per token)"]
    assert curves_of(figure.axes[1]) == [([2, 4], [4.0, 4.0]), ([2, 4], [5.0, 5.0])]
    assert keys_of(figure.axes[1]) == ["code", "talks"]
    assert figure.axes[1].get_xlim() == figure.axes[0].get_xlim()


def test_x_axes(tmp_path, drawn):
    run = write(tmp_path / "run", lines_of(3, every=10))
    for x, wanted, label in (
        ("step", [10, 20, 30], "step"),
        ("tokens", [5120, 10240, 15360], "tokens"),
        ("hours", [0.1, 0.2, 0.3], "hours of training"),
    ):
        (axis,) = drawn(run, x=x, metrics=["grad_norm"]).axes
        assert curves_of(axis)[0][0] == pytest.approx(wanted)
        assert axis.get_xlabel() == label
    (axis,) = drawn(write(run, lines_of(3, every=10**7)), x="tokens", metrics=["loss"]).axes
    assert axis.get_xlabel() == "tokens (billions)"
    write(run, [{k: v for k, v in line.items() if k != "tokens"} for line in lines_of(3)])
    with pytest.raises(InputError, match="run run has lines of metrics without tokens; take --x step"):
        drawn(run, x="tokens")


def test_metrics_are_panels_in_their_order(tmp_path, drawn):
    run = write(tmp_path / "run", lines_of(4))
    figure = drawn(run, metrics=["valid_loss", "step_seconds", "valid_loss"])
    assert titles_of(figure) == ["held-out loss (nats per token)", "step seconds"]
    assert curves_of(figure.axes[0]) == [([2, 4], [5.0, 5.0])]


def test_smoothing(tmp_path, drawn):
    values = [1.0, 2.0, 6.0, math.nan, 4.0]
    run = write(tmp_path / "run", [{"step": step, "loss": y} for step, y in enumerate(values, start=1)])
    (axis,) = drawn(run, metrics=["loss"], smooth=3).axes
    raw, smooth = curves_of(axis)
    np.testing.assert_array_equal(raw[1], values)
    np.testing.assert_allclose(smooth[1], [1.5, 3, 4, 5, 4])
    (axis,) = drawn(run, metrics=["loss"], smooth=1000).axes
    assert curves_of(axis)[1][1] == pytest.approx([3, 3.25, 3.25, 3.25, 4], abs=1)
    assert len(curves_of(axis)[1][1]) == 5


def test_what_varies_widely_has_a_logarithmic_axis(tmp_path, drawn):
    lines = [{"step": step, "grad_norm": 10.0**-step, "loss": 2.0 + step, "mfu": 10.0**-step} for step in range(1, 4)]
    figure = drawn(write(tmp_path / "run", lines))
    scales = dict(zip(titles_of(figure), [axis.get_yscale() for axis in figure.axes], strict=True))
    assert scales == {"loss (nats per token)": "linear", "gradient norm, before clipping": "log", "MFU": "linear"}


def test_numbers_that_are_none(tmp_path, drawn):
    """A run whose loss was never finite is drawn all the same."""
    figure = drawn(
        write(tmp_path / "run", [{"step": step, "loss": math.nan, "grad_norm": math.inf} for step in (1, 2)])
    )
    assert len(figure.axes) == 2


def test_the_verb(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = [str(write(tmp_path / name, lines_of(3))) for name in ("a", "b")]
    assert main(["plot", *runs]) == 0
    assert capsys.readouterr().out == "2 runs in metrics.png\n"
    assert (
        main(["plot", runs[0], "--output", "new/one.png", "--x", "hours", "--metrics", "loss, mfu", "--smooth", "2"])
        == 0
    )
    assert capsys.readouterr().out == "1 run in new/one.png\n"
    assert Path("new/one.png").read_bytes()[:4] == Path("metrics.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none"], "no run at none: wanted a run folder, with metrics.jsonl, or such a file"),
        (["folder"], "no run at folder: wanted"),
        (["run", "empty"], "empty/metrics.jsonl has no line of metrics; leave it out until it has one"),
        (["run", "--metrics", "loss,accuracy"], "no run has numbers of accuracy; there are loss, grad_norm, learn"),
        (["run", "--metrics", "batch_sha256"], "no run has numbers of batch_sha256"),
        (["run", "--output", "x.pdf"], "--output x.pdf is to be a PNG; call it x.pdf.png"),
        (["run", "--output", "run/metrics.jsonl/x.png"], "cannot be written: "),
    ],
)
def test_bad_input_is_one_line_and_65(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    write(Path("run"), lines_of(2))
    write(Path("empty"), [])
    Path("folder").mkdir()
    assert main(["plot", *arguments]) == 65
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("neox-jax: ")
    assert message in line
    assert not list(Path().rglob("*.png"))


@pytest.mark.parametrize("arguments", [["--smooth", "0"], ["--metrics", "loss,,mfu"], ["--x", "days"], []])
def test_bad_usage_is_2(capsys, arguments):
    with pytest.raises(SystemExit) as error:
        main(["plot", *(["run", *arguments] if arguments else [])])
    assert error.value.code == 2
    assert capsys.readouterr().err


def test_without_matplotlib(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["plot", str(write(tmp_path / "run", lines_of(2))), "--output", str(tmp_path / "x.png")]) == 65
    wanted = "neox-jax: plot needs the matplotlib package: pip install 'neox_jax[viz]'\n"
    assert capsys.readouterr().err == wanted
