"""Curves of runs, from their metrics.jsonl, as a picture; matplotlib is imported here alone, when it is asked for."""

import dataclasses
import io
import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from neox_jax.errors import InputError
from neox_jax.metrics import read_metrics

METRICS_FILE = "metrics.jsonl"
PANELS = ("loss", "grad_norm", "learning_rate", "tokens_per_second", "mfu")
X_AXES = {"step": "step", "tokens": "tokens", "hours": "hours of training"}
TITLES = {
    "loss": "loss (nats per token)",
    "grad_norm": "gradient norm, before clipping",
    "learning_rate": "learning rate",
    "tokens_per_second": "tokens per second",
    "mfu": "MFU",
    "valid_loss": "held-out loss (nats per token)",
    "valid_bits_per_byte": "held-out bits per byte",
}
HELD_OUT = "valid_loss"
EXACT = ("learning_rate", "tokens", "skipped_updates")  # which no smoothing makes clearer
FROM_ZERO = ("learning_rate", "tokens_per_second", "mfu", "step_seconds", "data_wait_seconds", "skipped_updates")
LOG_RATIO = 20  # greatest to least value: above, a linear axis hides what is small
UNITS = ((1e12, "trillions"), (1e9, "billions"), (1e6, "millions"))
# Okabe and Ito's colours, which the colour-blind tell apart, without the yellow that white paper swallows.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
MARKERS = "os^Dvp*<>h"
STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
}
PANEL_INCHES = (6.4, 3.4)
LEGEND_CHARACTERS, KEY_CHARACTERS = 85, 60  # that fit into a panel's width, and beside its title
LEGEND_LINE_INCHES = 0.22
FEW_POINTS = 40  # so many are marked one by one


@dataclasses.dataclass(frozen=True)
class Curves:
    """A run's lines of metrics, and the name it goes by."""

    name: str
    lines: list[dict]

    def points(self, metric: str, x: str) -> tuple[np.ndarray, np.ndarray]:
        """x and y of each line that has a number of `metric`."""
        has = np.array([_is_number(line.get(metric)) for line in self.lines], bool)
        return self._x(x)[has], self._values(metric)[has]

    def skips(self, x: str) -> np.ndarray:
        """x of each line before which updates were skipped."""
        return self._x(x)[np.diff(np.nan_to_num(self._values("skipped_updates")), prepend=0) > 0]

    def _x(self, x: str) -> np.ndarray:
        if x != "hours":
            return self._whole(x)
        return np.cumsum(np.diff(self._whole("step"), prepend=0) * self._whole("step_seconds")) / 3600

    def _values(self, metric: str) -> np.ndarray:
        found = (line.get(metric) for line in self.lines)
        return np.array([value if _is_number(value) else math.nan for value in found], float)

    def _whole(self, metric: str) -> np.ndarray:
        values = self._values(metric)
        if np.isnan(values).any():
            raise InputError(f"run {self.name} has lines of metrics without {metric}; take --x step")
        return values


def read_runs(paths: Sequence[str | Path]) -> list[Curves]:
    """paths: run folders, or files as their metrics.jsonl; what is given twice is read once.

    Raises: InputError where there is nothing to read.
    """
    files = []
    for path in map(Path, paths):
        file = path / METRICS_FILE if path.is_dir() else path
        if not file.is_file():
            raise InputError(f"no run at {path}: wanted a run folder, with {METRICS_FILE}, or such a file")
        if file.resolve() not in files:
            files.append(file.resolve())
    runs = []
    for file, name in zip(files, _names(files), strict=True):
        try:
            lines = read_metrics(file)
        except OSError as error:
            raise InputError(f"{file} cannot be read: {error.strerror}") from error
        if not lines:
            raise InputError(f"{file} has no line of metrics; leave it out until it has one")
        runs.append(Curves(name, lines))
    return runs


def plot(
    runs: Sequence[Curves], output: str | Path, *, x: str = "step", metrics: Sequence[str] = (), smooth: int = 1
) -> None:
    """Writes a PNG with a panel for each metric, and in each a curve for each run.

    x: one of X_AXES; hours are those that steps took, whatever was between them. metrics: names as in metrics.jsonl;
    without any, those of PANELS that there are, and the held-out sets. smooth: so many neighbouring lines are averaged.
    Raises: InputError.
    """
    output = Path(output)
    if output.suffix != ".png":
        raise InputError(f"--output {output} is to be a PNG; call it {output.name}.png")
    present = _present(runs)
    missing = [name for name in metrics if name not in present]
    if missing:
        raise InputError(f"no run has numbers of {', '.join(missing)}; there are {', '.join(present)}")
    panels = list(dict.fromkeys(metrics)) or [name for name in PANELS if name in present] or present
    sets = [] if metrics else [name for name in present if name.startswith(f"{HELD_OUT}/")]
    if sets:
        panels.insert(1, HELD_OUT)
    picture = _draw(runs, panels, sets, x=x, smooth=smooth)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_bytes(picture)
    except OSError as error:
        raise InputError(f"{output} cannot be written: {error.strerror}") from error


def _names(files: list[Path]) -> list[str]:
    """Of each file its folder, with as many folders above as tell it from the others."""
    places = [file.parent if file.name == METRICS_FILE else file for file in files]
    names, depth = [place.name for place in places], 1
    while len(set(names)) < len(names):
        depth += 1
        names = [
            "/".join(place.parts[-depth:]) if names.count(name) > 1 else name
            for place, name in zip(places, names, strict=True)
        ]
    return names


def _present(runs: Sequence[Curves]) -> list[str]:
    """What lines have numbers of, in their order."""
    names = dict.fromkeys(k for run in runs for line in run.lines for k, v in line.items() if _is_number(v))
    return [name for name in names if name != "step"]


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _draw(runs: Sequence[Curves], panels: list[str], sets: list[str], *, x: str, smooth: int) -> bytes:
    try:
        import matplotlib
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
    except ImportError as error:
        raise InputError("plot needs the matplotlib package: pip install 'neox_jax[viz]'") from error
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    per_line = min(len(runs), columns * LEGEND_CHARACTERS // (max(len(run.name) for run in runs) + 12) or 1)
    legend_inches = LEGEND_LINE_INCHES * (-(-len(runs) // per_line) + 1)
    styles = _styles(len(runs))
    with matplotlib.rc_context(STYLE):
        size = (PANEL_INCHES[0] * columns, PANEL_INCHES[1] * rows + legend_inches)
        figure = Figure(figsize=size, dpi=140, layout="constrained")
        axes = list(figure.subplots(rows, columns, squeeze=False).flat)
        for axis in axes[len(panels) :]:
            axis.remove()
        for metric, axis in zip(panels, axes, strict=False):
            draw = _draw_sets if metric == HELD_OUT and sets else _draw_loss if metric == "loss" else _draw_curves
            draw(axis, runs, styles, metric=metric, sets=sets, x=x, smooth=smooth)
            _dress(axis, metric, x)
        for axis in axes[1 : len(panels)]:
            axis.sharex(axes[0])
        if len(runs) == 1:
            figure.suptitle(runs[0].name, fontweight="bold")
        else:
            lines = [Line2D([], [], label=run.name, **style) for run, style in zip(runs, styles, strict=True)]
            figure.legend(handles=lines, loc="outside lower center", ncols=per_line, handlelength=2.5)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", bbox_inches="tight", pad_inches=0.1)
    return buffer.getvalue()


def _styles(number: int) -> list[dict]:
    """For so many runs: colours, then other dashes in the same colours, and of very many a scale in their order."""
    from matplotlib import colormaps

    if number <= len(COLOURS) * len(DASHES):
        pairs = itertools.islice(itertools.product(DASHES, COLOURS), number)
        return [{"color": colour, "linestyle": dash, "linewidth": 1.3} for dash, colour in pairs]
    shades = colormaps["viridis"](np.linspace(0, 0.9, number))  # its last tenth is too light for white paper
    return [{"color": shade, "linestyle": "-", "linewidth": 1.2} for shade in shades]


def _draw_curves(axis, runs, styles, *, metric, sets, x, smooth) -> None:
    for run, style in zip(runs, styles, strict=True):
        places, values = run.points(metric, x)
        if smooth > 1 and metric not in EXACT:
            axis.plot(places, values, color=style["color"], linewidth=0.8, alpha=0.25)
            values = _running_mean(values, smooth)
        marked = {"marker": "o", "markersize": 3} if len(places) <= FEW_POINTS else {}
        axis.plot(places, values, **style, **marked)


def _draw_loss(axis, runs, styles, *, metric, sets, x, smooth) -> None:
    """The loss, with held-out losses as points and skipped updates at the foot."""
    _draw_curves(axis, runs, styles, metric=metric, sets=sets, x=x, smooth=smooth)
    keys = [_key("training", linestyle="-")]
    if sum(_draw_heldout(axis, run, style, HELD_OUT, "o", x=x) for run, style in zip(runs, styles, strict=True)):
        keys.append(_key("held out", marker="o"))
    if sum(_draw_skips(axis, run, style, x=x) for run, style in zip(runs, styles, strict=True)):
        keys.append(_key("updates skipped", marker="x"))
    if len(keys) > 1:
        _explain(axis, keys)


def _draw_sets(axis, runs, styles, *, metric, sets, x, smooth) -> None:
    """Each held-out set by its own marker."""
    keys = []
    for name, marker in zip(sets, itertools.cycle(MARKERS)):
        for run, style in zip(runs, styles, strict=True):
            _draw_heldout(axis, run, style, name, marker, x=x)
        keys.append(_key(name.partition("/")[2], marker=marker))
    _explain(axis, keys)


def _draw_heldout(axis, run: Curves, style: dict, name: str, marker: str, *, x: str) -> int:
    """How many there are."""
    places, values = run.points(name, x)
    size = 5 if len(places) <= FEW_POINTS else 3
    axis.plot(places, values, **{**style, "linewidth": 0.8}, marker=marker, markersize=size, markerfacecolor="white")
    return len(places)


def _draw_skips(axis, run: Curves, style: dict, *, x: str) -> int:
    """How many lines have any before them."""
    places = run.skips(x)
    foot = {"transform": axis.get_xaxis_transform(), "clip_on": False, "in_layout": False, "zorder": 3}
    axis.plot(places, np.zeros(len(places)), color=style["color"], linestyle="none", marker="x", markersize=6, **foot)
    return len(places)


def _key(label: str, *, linestyle: str = "none", marker: str = ""):
    from matplotlib.lines import Line2D

    style = {"color": "#444444", "markersize": 5, "markerfacecolor": "white"}
    return Line2D([], [], label=label, linestyle=linestyle, marker=marker, **style)


def _explain(axis, keys: list) -> None:
    """What marks mean: beside the title, where no curve is, or of many and long ones in a box over the curves."""
    if sum(len(key.get_label()) + 6 for key in keys) > KEY_CHARACTERS:
        axis.legend(handles=keys, fontsize=9, loc="upper right", frameon=True, framealpha=0.8, edgecolor="none")
        return
    where = {"loc": "lower right", "bbox_to_anchor": (1.01, 0.98)}
    legend = axis.legend(handles=keys, ncols=len(keys), fontsize=9, handlelength=1.5, columnspacing=1.2, **where)
    legend.set_in_layout(False)  # the title's line has room for it


def _dress(axis, metric: str, x: str) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter

    axis.set_title(TITLES.get(metric, metric.replace("_", " ")), loc="left")
    values = np.concatenate([line.get_ydata() for line in axis.lines if line.get_transform() == axis.transData])
    values = values[np.isfinite(values)]
    if metric not in FROM_ZERO and len(values) and 0 < LOG_RATIO * values.min() < values.max():
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if values.max() < 1000 * values.min() else (1,)))
        axis.yaxis.set_minor_formatter(NullFormatter())
    elif metric in FROM_ZERO:
        axis.set_ylim(bottom=0)
    percent = PercentFormatter(xmax=1) if metric == "mfu" else FuncFormatter(lambda value, _: _text(value))
    axis.yaxis.set_major_formatter(percent)
    axis.margins(x=0.02)
    unit, name = next(((u, n) for u, n in UNITS if axis.get_xlim()[1] >= u), (1, ""))
    axis.set_xlabel(f"{X_AXES[x]} ({name})" if name else X_AXES[x])
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _text(value / unit)))


def _text(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Of up to `width` neighbours around each, without those that are not finite."""
    window, finite = np.ones(min(width, len(values))), np.isfinite(values)
    counts = np.convolve(finite, window, "same")
    return np.convolve(np.where(finite, values, 0), window, "same") / np.where(counts, counts, math.nan)
