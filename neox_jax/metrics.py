"""What a run says while it goes: `metrics.jsonl`, TensorBoard, a progress bar or plain lines."""

import contextlib
import json
import os
import sys
import time
from pathlib import Path

from neox_jax.disk import sync
from neox_jax.errors import InputError

FLUSH_SECONDS = 30  # of TensorBoard's files
SPEED = ("tokens_per_second", "step_seconds", "data_wait_seconds", "mfu")


class MetricsWriter:
    """Appends to FOLDER/metrics.jsonl, and to TensorBoard files where tensorboardX is installed.

    Lines after `start_step`, and one that a crash cut off, are dropped first: a run that goes on from there writes them
    again, so each step is there once. Nothing that fails later stops the run: lines that cannot be written are kept,
    and written in their order once they can.
    last: the newest line, None before the first.
    Raises: InputError where what is to be dropped cannot be.
    """

    def __init__(self, folder: Path, *, start_step: int):
        self._path = Path(folder) / "metrics.jsonl"
        self._size, self.last = _drop_after(self._path, start_step)
        self._waiting: list[dict] = []
        self._warned = False
        self._tensorboard = _TensorBoard(Path(folder) / "tensorboard", purge_step=start_step + 1)

    def write(self, metrics: dict) -> None:
        """metrics: `step` and plain numbers or strings, by name; numbers go to TensorBoard too, in groups."""
        self.last = metrics
        self._waiting.append(metrics)
        self._append()
        self._tensorboard.write(metrics)

    def flush(self) -> bool:
        """Whether every line is on the disk for good; to be called before a checkpoint of the same step is saved, so
        that no line up to a saved step is lost with the host."""
        self._append()
        if not self._size and not self._waiting:
            return True
        try:
            for path in (self._path, self._path.parent):
                sync(path)
        except OSError as error:
            self._warn(error)
            return False
        return not self._waiting

    def close(self) -> None:
        if not self.flush() and self._waiting:
            steps = f"{self._waiting[0]['step']} to {self._waiting[-1]['step']}"
            _say(f"neox-jax: {self._path} lacks {len(self._waiting)} lines, steps {steps}, which could not be written")
        self._tensorboard.close()

    def _append(self) -> None:
        """Writes what waits, all or nothing."""
        if not self._waiting:
            return
        text = "".join(json.dumps(line) + "\n" for line in self._waiting).encode()
        try:
            # Opened and closed each time: over NFS that is when a full disk is told.
            with self._path.open("ab", buffering=0) as file:
                if file.tell() > self._size:
                    file.truncate(self._size)
                else:
                    self._size = file.tell()  # less where somebody removed the file
                rest = memoryview(text)
                while rest:
                    rest = rest[file.write(rest) :]
        except OSError as error:
            self._warn(error)
            with contextlib.suppress(OSError):  # if not now, then before the next line
                os.truncate(self._path, self._size)
            return
        self._size += len(text)
        self._waiting.clear()

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            _say(f"neox-jax: {self._path} cannot be written ({_reason(error)}); its lines are kept until it can")


def _drop_after(path: Path, step: int) -> tuple[int, dict | None]:
    """Cuts a metrics.jsonl off behind its last line of `step` or before; returns (bytes left, that line).

    Needs no room on the disk, and a crash leaves the file as it was or as it should be.
    Raises: InputError.
    """
    size, last, ending = 0, None, b""
    try:
        for position, line in _raw_lines(path):
            metrics = _parse(line)
            if metrics is not None and metrics["step"] > step:
                break
            if metrics is not None:
                size, last, ending = position + len(line), metrics, b"" if line.endswith(b"\n") else b"\n"
        if not path.exists() or (path.stat().st_size == size and not ending):
            return size, last
        with path.open("r+b") as file:
            file.truncate(size)
            file.seek(size)
            file.write(ending)
        sync(path)
    except OSError as error:
        raise InputError(
            f"{path} cannot be cut off behind step {step}, where the run goes on ({_reason(error)}); make it writable, "
            "or move it away"
        ) from error
    return size + len(ending), last


def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl, without one at its end that a crash cut off. One elsewhere that cannot be read is
    left out too, and told on standard error."""
    found = [(number, _parse(line)) for number, (_, line) in enumerate(_raw_lines(path), start=1)]
    bad = [number for number, metrics in found[:-1] if metrics is None]
    if bad:
        more = f", as are {len(bad) - 1} more" if len(bad) > 1 else ""
        _say(f"neox-jax: {path}: line {bad[0]} cannot be read and is left out{more}")
    return [metrics for _, metrics in found if metrics is not None]


def _raw_lines(path: Path):
    """(position, bytes) of each line, with its end, which the last may lack."""
    position = 0
    if path.exists():
        with path.open("rb") as file:
            for line in file:
                yield position, line
                position += len(line)


def _parse(line: bytes) -> dict | None:
    try:
        metrics = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return metrics if isinstance(metrics, dict) and isinstance(metrics.get("step"), int) else None


class _TensorBoard:
    """Scalars in event files, or nothing at all from the first problem on.

    By tensorboardX's writer of events, without its queue: once the thread at that one's end has met a full disk, it is
    gone, and whoever puts in an eleventh event waits for ever.
    """

    def __init__(self, folder: Path, *, purge_step: int):
        self._folder, self._writer, self._flushed = folder, None, time.monotonic()
        with self._for_what_it_is_worth():
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto.event_pb2 import Event, SessionLog

            folder.mkdir(parents=True, exist_ok=True)
            # Two starts within a second are two files: a name that is there would be written over.
            self._writer = EventsWriter(str(folder / "events"), f".{os.getpid()}.{time.time_ns()}")
            # A viewer forgets what an earlier start wrote from here on.
            self._writer.write_event(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))
            self._writer.flush()

    def write(self, metrics: dict) -> None:
        if self._writer is None:
            return
        with self._for_what_it_is_worth():
            from tensorboardX.proto.event_pb2 import Event
            from tensorboardX.proto.summary_pb2 import Summary

            numbers = {k: v for k, v in metrics.items() if k != "step" and isinstance(v, (int, float))}
            values = [Summary.Value(tag=_tag(name), simple_value=number) for name, number in numbers.items()]
            self._writer.write_event(Event(wall_time=time.time(), step=metrics["step"], summary=Summary(value=values)))
            if time.monotonic() - self._flushed > FLUSH_SECONDS:
                self._writer.flush()
                self._flushed = time.monotonic()

    def close(self) -> None:
        if self._writer is not None:
            with self._for_what_it_is_worth():
                self._writer.close()

    @contextlib.contextmanager
    def _for_what_it_is_worth(self):
        try:
            yield
        except Exception as error:  # of another package's files: no run is stopped for them, whatever it is
            self._writer = None
            _say(f"neox-jax: no more is written for TensorBoard, {self._folder} ({_reason(error)})")


def _tag(name: str) -> str:
    """A metric's name for TensorBoard, which shows together what is alike before the first slash."""
    if name.startswith("valid_"):
        return f"valid/{name.removeprefix('valid_')}"
    if name.startswith("tasks/"):
        return name
    return f"speed/{name}" if name in SPEED else f"train/{name}"


def _reason(error: Exception) -> str:
    text = error.strerror.lower() if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()) or type(error).__name__


def _say(text: str) -> None:
    """A line on standard error, which may be a file on a full disk."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


class Progress:
    """A bar on a terminal; elsewhere one plain line for each `update`, or every `line_seconds` and at the end."""

    def __init__(self, description: str, *, total: int, start: int = 0, line_seconds: float = 0):
        self._description, self._total = description, total
        self._line_seconds, self._next_line = line_seconds, time.monotonic() + line_seconds
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
        if completed < self._total and time.monotonic() < self._next_line:
            return
        self._next_line = time.monotonic() + self._line_seconds
        left = "" if seconds_left is None else f"  {_duration(seconds_left)} left"
        _say(f"{self._description} {completed}/{self._total}  {text}{left}")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
