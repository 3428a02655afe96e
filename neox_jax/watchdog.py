"""Ends a run whose step takes too long, once it has written down where every thread was. No jax."""

import contextlib
import faulthandler
import os
import threading
from pathlib import Path

from neox_jax.hub import EXIT_START_AGAIN

DUMP_SECONDS = 5
END_SECONDS = 30  # for the end itself, in which a write may hang as well: to a pipe that nobody reads, to a dead disk


class Watchdog:
    """Waits, as a context, for beats; where none comes for `seconds` it ends the process, and its peers, with exit 75.

    seconds: 0 for no watchdog. folder: gets stacks-PROCESS.txt, as standard error does. peers: `Peers` or `Alone`.
    The first beat starts it. Time is counted in turns of a thread of its own, so that a process that was stopped, or a
    computer that slept, is not behind; and it ends nothing while other code holds Python's lock.
    """

    def __init__(self, seconds: float, *, folder: Path, peers):
        self._seconds, self._peers = seconds, peers
        self._path = Path(folder) / f"stacks-{peers.process_id}.txt"
        self._turn_seconds = min(1, seconds / 10)
        self._what, self._turns = None, 0
        self._closed, self._dumping, self._dumped = threading.Event(), threading.Lock(), False

    def __enter__(self):
        if self._seconds:
            self._peers.on_roll_call = self.dump
            threading.Thread(target=self._watch, name="neox_jax.watchdog", daemon=True).start()
        return self

    def __exit__(self, *error):
        self._closed.set()
        self._peers.on_roll_call = None

    def beat(self, what: str) -> None:
        """What begins now, "step 12", has `seconds` from here."""
        self._what, self._turns = what, 0

    def dump(self) -> None:
        """Writes every thread's stack to standard error and to the file, once."""
        with self._dumping:
            if self._dumped:
                return
            self._dumped = True
            faulthandler.dump_traceback(2)
            # By a thread: the folder's file system may be what hangs.
            writer = threading.Thread(target=self._write, daemon=True)
            writer.start()
            writer.join(DUMP_SECONDS)

    def _write(self) -> None:
        with contextlib.suppress(OSError), self._path.open("w") as file:
            faulthandler.dump_traceback(file)

    def _watch(self) -> None:
        while not self._closed.wait(self._turn_seconds):
            self._turns += 1
            if self._what is None:
                self._turns = 0
            elif self._turns * self._turn_seconds > self._seconds:
                self._end()

    def _end(self) -> None:
        limit = threading.Timer(END_SECONDS, os._exit, [EXIT_START_AGAIN])
        limit.daemon = True
        limit.start()
        self.dump()
        if not self._closed.is_set():
            stacks = self._path.with_name("stacks-*.txt")
            self._peers.end_stuck(
                f"{self._what} has taken longer than {self._seconds:g} s (where each thread was: {stacks})"
            )
        limit.cancel()
