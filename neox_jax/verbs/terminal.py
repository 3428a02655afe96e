"""What the verbs say, and how they end."""

import contextlib
import signal
import sys
import time

EXIT_USAGE, EXIT_BAD_INPUT, EXIT_BAD_NUMBERS, EXIT_START_AGAIN, EXIT_TERMINATED = 2, 65, 70, 75, 143
PROGRESS_LINE_SECONDS = 30


def usage(text: str) -> int:
    print(f"neox-jax: {text}", file=sys.stderr)
    return EXIT_USAGE


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


@contextlib.contextmanager
def show_progress(what: str, *, unit: int = 1, name: str = ""):
    """Gives a function of (done, in all), which draws a bar in such units where stderr is a terminal, and elsewhere
    prints a line now and then."""
    from neox_jax.metrics import Progress

    start, bar = time.perf_counter(), None
    next_line = start + PROGRESS_LINE_SECONDS

    def report(done: int, total: int) -> None:
        nonlocal bar, next_line
        now = time.perf_counter()
        if not sys.stderr.isatty():
            if now < next_line:
                return
            next_line = now + PROGRESS_LINE_SECONDS
        bar = bar or Progress(what, total=-(-total // unit))
        rate = done / unit / (now - start)
        left = (total - done) / unit / rate if rate else None
        bar.update(-(-done // unit), f"{name}  {rate:.1f} {name}/s", seconds_left=left)

    try:
        yield report
    finally:
        if bar is not None:
            bar.close()


@contextlib.contextmanager
def unwound_by_sigterm():
    """A SIGTERM ends the process as Ctrl-C does, so that what is half-written is removed."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_TERMINATED))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
