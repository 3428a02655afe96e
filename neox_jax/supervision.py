"""What watches a run from outside its step: the folder's lock, the watchdog, the numbers, the hosts, the replicas."""

import contextlib
import time
from pathlib import Path

from jax.sharding import Mesh

from neox_jax.config import Config
from neox_jax.health import Health
from neox_jax.peers import Alone, Peers
from neox_jax.replicas import compare_replicas
from neox_jax.run_lock import RunLock
from neox_jax.slow_hosts import slow_hosts
from neox_jax.train_state import TrainState
from neox_jax.watchdog import Watchdog


class Supervisor:
    """Holds a run's folder and watches over it, as a context; all processes do the same.

    say: takes a line, and the step that it is about. Raises: InputError, on entering, where another run holds the
    folder.
    """

    def __init__(self, config: Config, folder: Path, mesh: Mesh, peers: Alone | Peers, say):
        self._config, self._mesh, self._peers, self._say = config, mesh, peers, say
        self._lock = RunLock(folder) if peers.process_id == 0 else None
        self._watchdog = Watchdog(config.safety.step_seconds, folder=folder, peers=peers)
        self._health = Health(config, say)
        self._context = contextlib.ExitStack()
        self._wait_seconds, self._steps, self._began = 0.0, 0, time.perf_counter()

    def __enter__(self):
        if self._lock is not None:
            self._context.enter_context(self._lock)
        self._context.enter_context(self._watchdog)
        return self

    def __exit__(self, *error):
        self._context.close()

    def begin(self, what: str) -> None:
        """What begins now may take safety.step_seconds. Raises: InputError where the folder is another run's by now."""
        if self._lock is not None:
            self._lock.check()
        self._watchdog.beat(what)

    def see(self, step: int, state: TrainState, metrics: dict, wait_seconds: float) -> None:
        """Looks at what attempt `step` gave. Raises: NumbersError where its numbers are not to be gone on with."""
        self._health.see(step, metrics)
        every = self._config.safety.compare_replicas
        if every and step % every == 0:
            compare_replicas((state.params, state.optimizer_state), self._mesh, self._peers)
        self._compare_hosts(step, wait_seconds)

    def finish(self) -> None:
        """Looks at what is left. Raises: as `see`."""
        self._health.finish()

    def _compare_hosts(self, step: int, wait_seconds: float) -> None:
        every = self._config.safety.slow_hosts
        if not every or self._peers.num_processes == 1:
            return
        self._wait_seconds, self._steps = self._wait_seconds + wait_seconds, self._steps + 1
        if step % every:
            return
        now = time.perf_counter()
        mine = {"step_seconds": (now - self._began) / self._steps}
        mine["data_wait_seconds"] = self._wait_seconds / self._steps
        for line in slow_hosts(self._peers.gather("the hosts' times", mine), self._peers.hosts):
            self._say(f"steps to {step}: {line}", step)
        self._wait_seconds, self._steps, self._began = 0.0, 0, now
