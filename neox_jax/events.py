"""What happened to a run besides its metrics: lines on the terminal, and in RUN/events.jsonl for whoever asks later."""

import contextlib
import datetime
import json
import os
from pathlib import Path


class Events:
    """Prints lines and appends them to FOLDER/events.jsonl, as {"time": UTC, "step": or null, "text"}.

    muted: says nothing at all, for every process but the first. What cannot be written does not stop the run.
    """

    def __init__(self, folder: Path, *, muted: bool = False):
        self._path, self._muted = Path(folder) / "events.jsonl", muted

    def say(self, text: str, step: int | None = None) -> None:
        """One line; step: that it is about."""
        if self._muted:
            return
        with contextlib.suppress(OSError):  # standard output may be a file on a full disk
            print(text, flush=True)
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        line = json.dumps({"time": now, "step": step, "text": text}) + "\n"
        with contextlib.suppress(OSError):
            descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                os.write(descriptor, line.encode())
            finally:
                os.close(descriptor)
