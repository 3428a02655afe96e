"""One step on its way to disk: copied off the devices at once, then written and hashed by a thread.

Orbax's handlers lay it out. Its managers are not used: they commit a step before anything can be added to it, end their
thread where a disk is full, forget steps that are still there, and leave the other processes at a barrier.
"""

import itertools
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import orbax.checkpoint as ocp

from neox_jax.checkpoint.commit import commit_step, quiet_orbax, what_failed
from neox_jax.checkpoint.steps import temporary_of
from neox_jax.checkpoint.streamed import StreamedHandler, copy_to_host, params_handler, save_tree
from neox_jax.checkpoint.sums import yield_to_others
from neox_jax.peers import Alone, Peers

BARRIER_SECONDS = 24 * 3600  # for a slow disk: a process that died ends the others at once, by `peers`

_numbers = itertools.count()  # of saves in this process: names barriers, which all processes meet in one order


class StepWriter:
    """Writes trees of jax arrays, by item, as a step whose folder was begun. To be made by all processes alike.

    failure: what went wrong, once `done`; process 0 knows of all processes, the others of themselves. A step that
    failed is not there, and nothing of it is left. committed: called by process 0 when the step has its name.
    """

    def __init__(
        self, step_folder: Path, trees: dict, meta: dict, *, peers: Alone | Peers, committed: Callable[[], None]
    ):
        self.failure: str | None = None
        self._folder, self._meta = temporary_of(step_folder), meta
        self._peers, self._committed = peers, committed
        self._barrier = f"neox_jax.checkpoint.{next(_numbers)}"
        self._trees = {}
        try:
            self._trees = {item: copy_to_host(tree) for item, tree in trees.items()}
        except Exception as error:  # to be told when all have met
            self.failure = what_failed(error)
        self._thread = threading.Thread(target=self._run, name="neox_jax.checkpoint")
        self._thread.start()

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()

    def wait(self) -> str | None:
        """Returns what went wrong, when all is written."""
        self._thread.join()
        return self.failure

    def _run(self) -> None:
        yield_to_others()
        with quiet_orbax:
            handlers = {item: params_handler(StreamedHandler()) for item in self._trees}
            try:
                if self.failure is None:
                    self._write(handlers)
            except Exception as error:
                self.failure = what_failed(error)
            try:
                ocp.multihost.get_barrier_sync_fn()(key=self._barrier, timeout_ms=BARRIER_SECONDS * 1000)
                if self._peers.process_id == 0:
                    self._commit(handlers)
            except Exception as error:
                self.failure = self.failure or what_failed(error)

    def _write(self, handlers: dict[str, ocp.PyTreeCheckpointHandler]) -> None:
        """Writes what this process has of the arrays."""
        for item, handler in handlers.items():
            save_tree(handler, self._folder / item, self._trees.pop(item))
        if self._peers.process_id != 0:
            self._marker(self._peers.process_id).touch()

    def _commit(self, handlers: dict[str, ocp.PyTreeCheckpointHandler]) -> None:
        """Makes a step of what all processes have written; by process 0."""
        try:
            for process_id in range(1, self._peers.num_processes):
                if not self._marker(process_id).exists():
                    host = self._peers.hosts[process_id]
                    self.failure = self.failure or f"process {process_id} ({host}) could not write its part"
                self._marker(process_id).unlink(missing_ok=True)
            if self.failure is None:
                commit_step(self._folder, self._meta, handlers, beside_training=True)
                self._committed()
        except Exception as error:
            self.failure = self.failure or what_failed(error)
        if self.failure is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _marker(self, process_id: int) -> Path:
        """A file that says that a process has written its part: one that cannot write cannot say so."""
        return self._folder / f"written.{process_id}"
