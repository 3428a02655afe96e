"""A trace of some of a run's steps, in RUN/profile/, as XProf (TensorBoard's plugin) and Perfetto read them."""

import contextlib
from pathlib import Path

import jax

from neox_jax.errors import InputError
from neox_jax.peers import Alone, Peers

FOLDER = "profile"


def check_range(steps: range, num_steps: int) -> None:
    """Raises: InputError where a run of `num_steps` has not all of these steps, which count from 1."""
    if steps.start < 1 or steps.stop - 1 > num_steps:
        raise InputError(
            f"--profile {steps.start}:{steps.stop} is steps {steps.start} to {steps.stop - 1}; wanted steps of 1 to "
            f"{num_steps} (train.steps), so {num_steps + 1} at most behind the colon"
        )


class Profiler:
    """Has jax trace `steps`, those of them that this start of the run makes; of no steps, does nothing.

    Each host's first process writes its host's part, as HOST.xplane.pb beside the others', which a viewer shows as one:
    a second one would write over it. Nothing that fails here stops the run.
    say: takes a line, and the step that it is about.
    """

    def __init__(self, steps: range | None, folder: Path, *, peers: Alone | Peers, say):
        mine = peers.hosts.index(peers.hosts[peers.process_id]) == peers.process_id
        self._steps = steps if steps is not None and mine else range(0)
        self._folder, self._say = Path(folder) / FOLDER, say
        self._first, self._last, self._tracing = 0, 0, False

    def start_run(self, start: int) -> None:
        """Says so where a run that goes on from `start` has none of the steps left."""
        if self._steps and start >= self._steps[-1]:
            self._say(f"nothing is profiled: the run goes on from step {start}, behind --profile {self._name()}", start)

    @contextlib.contextmanager
    def step(self, step: int, state):
        """Around the call of a step, in which `state` goes in."""
        if step in self._steps and not self._tracing:
            jax.block_until_ready(state)  # so that no earlier step is in the trace
            self._start(step)
        if not self._tracing:
            yield
            return
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield
        self._last = step

    def is_due(self, step: int) -> bool:
        """Whether `finish` is due after this step."""
        return self._tracing and step == self._steps[-1]

    def finish(self, results) -> None:
        """Waits for `results` of the last step, so that the trace has it whole, and writes the trace."""
        if self._tracing:
            jax.block_until_ready(results)
            self.close()

    def close(self) -> None:
        """Writes the trace, if there is one under way, without waiting for a step."""
        if not self._tracing:
            return
        self._tracing = False
        try:
            jax.profiler.stop_trace()
        except (OSError, RuntimeError) as error:
            self._give_up(error)
        else:
            self._say(f"traced steps {self._first} to {self._last}, in {self._folder}", self._last)

    def _start(self, step: int) -> None:
        options = jax.profiler.ProfileOptions()
        options.session_id = f"steps_{step}-{self._steps[-1]}"  # without it a time, of which hosts have several
        options.python_tracer_level = 0  # its calls were nine tenths of a trace of a small model, and slow the host
        try:
            self._folder.mkdir(parents=True, exist_ok=True)  # jax would find out when the steps are over
            jax.profiler.start_trace(self._folder, profiler_options=options)
        except (OSError, RuntimeError) as error:
            self._give_up(error)
        else:
            self._first, self._last, self._tracing = step, step, True

    def _give_up(self, error: Exception) -> None:
        self._say(f"steps {self._name()} are not profiled: {' '.join(str(error).split())}")
        self._steps = range(0)

    def _name(self) -> str:
        return f"{self._steps.start}:{self._steps.stop}"
