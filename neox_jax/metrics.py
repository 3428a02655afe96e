"""What a run says while it goes: `metrics.jsonl`, TensorBoard, a progress bar or plain lines."""

import json
import os
import sys
from pathlib import Path


class MetricsWriter:
    """Appends to FOLDER/metrics.jsonl, and to TensorBoard files where tensorboardX is installed.

    Lines after `start_step` are dropped first: a run that goes on from there writes them again, so each step is there
    once. A line that was cut off by a crash is dropped too.
    """

    def __init__(self, folder: Path, *, start_step: int):
        self._path = Path(folder) / "metrics.jsonl"
        self._keep_until(start_step)
        self._file = self._path.open("a", encoding="utf-8")
        self._tensorboard = _tensorboard_writer(Path(folder) / "tensorboard", purge_step=start_step + 1)

    def write(self, metrics: dict) -> None:
        """metrics: `step` and plain numbers or strings, by name; numbers go to TensorBoard too."""
        self._file.write(json.dumps(metrics) + "\n")
        self._file.flush()
        if self._tensorboard is not None:
            for name, value in metrics.items():
                if name != "step" and isinstance(value, (int, float)):
                    self._tensorboard.add_scalar(name, value, metrics["step"])

    def close(self) -> None:
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def _keep_until(self, step: int) -> None:
        kept = [line for line in read_metrics(self._path) if line["step"] <= step]
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        os.replace(temporary, self._path)


def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl, without one that was cut off."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def _tensorboard_writer(folder: Path, *, purge_step: int):
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=purge_step, flush_secs=30)


class Progress:
    """A bar on a terminal; elsewhere one plain line for each `update`."""

    def __init__(self, description: str, *, total: int, start: int = 0):
        self._description, self._total = description, total
        self._bar = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as RichProgress

            self._bar = RichProgress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                expand=True,
            )
            self._bar.start()
            self._task = self._bar.add_task(description, total=total, completed=start, text="")

    def update(self, completed: int, text: str = "", *, seconds_left: float | None = None) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=completed, text=text)
            return
        left = "" if seconds_left is None else f"  {_duration(seconds_left)} left"
        print(f"{self._description} {completed}/{self._total}  {text}{left}", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
