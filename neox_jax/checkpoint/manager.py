"""The checkpoints of one run: when one is saved, which stay, which one a run goes on from."""

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from neox_jax.checkpoint.commit import begin_step
from neox_jax.checkpoint.digest import digest_step
from neox_jax.checkpoint.steps import (
    STEPS_FOLDER,
    DamagedError,
    list_steps,
    make_meta,
    move_aside,
    read_adapter_meta,
    read_meta,
    remove_step,
    remove_temporary,
    size_on_disk,
)
from neox_jax.checkpoint.sums import SUMS, find_problems
from neox_jax.checkpoint.trees import read_tree
from neox_jax.checkpoint.writer import StepWriter
from neox_jax.config import CheckpointConfig, ModelConfig
from neox_jax.errors import InputError
from neox_jax.peers import Alone, Peers
from neox_jax.train_state import TrainState
from neox_jax.tree import num_bytes

SPARE = 1.3  # of the last checkpoint's size is free before another is begun
MAX_PROBLEMS = 20  # that a process tells the others of


class RunCheckpoints:
    """The checkpoints of one run folder, written in the background. All processes of a run do the same.

    say: takes a line, and the step that it is about. adapter: of a run of adapters, what a step says of them.
    Raises: InputError where the folder cannot be made.
    """

    def __init__(
        self,
        folder: Path,
        config: CheckpointConfig,
        peers: Alone | Peers | None = None,
        say: Callable[[str, int], None] = lambda text, step: print(text, flush=True),
        adapter: dict | None = None,
    ):
        self._folder = Path(os.path.abspath(folder)) / STEPS_FOLDER
        self._config, self._say, self._adapter = config, say, adapter
        self._peers = Alone() if peers is None else peers
        self._writer, self._step = None, None  # what is being written
        if self._peers.process_id == 0:
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise InputError(f"{self._folder} cannot be made: {error.strerror}") from error
            remove_temporary(self._folder)

    def latest_step(self) -> int | None:
        """The newest step on disk, whoever wrote it; whether it is as it was written is not looked at."""
        return max(list_steps(self._folder), default=None)

    @property
    def is_saving(self) -> bool:
        """Whether a save goes on in the background, in this process."""
        return self._writer is not None and not self._writer.done

    # ---- saving

    def save(self, step: int, state: TrainState, model: ModelConfig, *, force: bool = False) -> bool:
        """Begins to save the state after `step` attempts, if the configuration asks for this step or `force` does.

        What goes wrong is said in a line, at a later step if it comes later; the next step that is due tries again.
        force: waits until the step is whole. Returns whether a save was begun: not where there is no room.
        Raises: InputError where `force` could not be done.
        """
        if self._writer is not None and self._writer.done:
            self._finish()
        if not (force or is_due(step, self._config)):
            return False
        self._finish()
        trees = {"params": state.params, "optimizer": _besides_params(state)}
        plan = self._peers.gather("a checkpoint", self._prepare(step, num_bytes(state), list(trees)))[0]
        if plan is None:
            return False
        problem = plan["problem"]
        if problem is None:
            self._step = step
            self._writer = StepWriter(
                self._folder / str(step),
                trees,
                make_meta(model, state.params, self._adapter),
                peers=self._peers,
                committed=lambda: self._remove_old(step),
            )
            if force:
                problem = self._peers.gather("the last checkpoint", self._writer.wait())[0]
                self._writer = None
        if problem is not None and force:
            raise InputError(
                f"the checkpoint of step {step} could not be saved: {problem}; mend that, and the same command goes on "
                f"from {_from(self.latest_step())}"
            )
        if problem is not None:
            self._say(f"no checkpoint of step {step}: {problem}; training goes on, the next one due tries again", step)
        return problem is None

    def _finish(self) -> None:
        """Waits for the save that is under way, and says what went wrong in it."""
        if self._writer is None:
            return
        failure = self._writer.wait()
        self._writer = None
        if failure is None:
            return
        text = f"the checkpoint of step {self._step} could not be written: {failure}"
        if self._peers.process_id == 0:
            self._say(f"{text}; nothing of it was kept, the next one due tries again", self._step)
        else:  # which alone knows why
            print(f"process {self._peers.process_id}: {text}", file=sys.stderr, flush=True)

    def _prepare(self, step: int, state_bytes: int, items: list[str]) -> dict | None:
        """None where the step is there already; else {"problem": why it cannot be saved, or None}. By process 0."""
        if self._peers.process_id != 0:
            return None
        steps = list_steps(self._folder)
        if step in steps:
            return None
        try:
            last = size_on_disk(self._folder / str(steps[-1])) if steps else 0
            # The last one alone would mislead: an optimizer's zeros at step 0 take no room.
            needed, free = max(int(SPARE * last), state_bytes), shutil.disk_usage(self._folder).free
            if free < needed:
                return {
                    "problem": f"{needed / 1e9:.3g} GB wanted and {free / 1e9:.3g} GB free in {self._folder}; make "
                    "room, or lower checkpoint.keep"
                }
            begin_step(self._folder / str(step), items)
        except OSError as error:
            return {"problem": f"{self._folder}: {error.strerror}"}
        return {"problem": None}

    def _remove_old(self, step: int) -> None:
        """Removes what the configuration does not keep, once `step` is whole with its sums; by process 0."""
        config = self._config
        for old in steps_to_remove(list_steps(self._folder), config.keep, config.keep_every, config.steps):
            if old == step:
                continue
            try:
                remove_step(self._folder / str(old))
            except OSError as error:
                self._say(f"the checkpoint of step {old} could not be removed: {error.strerror}", step)

    def close(self) -> None:
        """Waits for what is being saved."""
        self._finish()

    # ---- restoring

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        """The state at `step`, on the shardings of `abstract`. Raises: InputError if the trees differ, or it is of
        adapters of another model."""
        folder = self._folder / str(step)
        read_meta(folder)
        self._check_adapter(folder)
        params = read_tree(folder / "params", abstract.params)
        rest = read_tree(folder / "optimizer", _besides_params(abstract))
        return TrainState(rest["step"], params, rest["state"], rest.get("loss_scale"))

    def _check_adapter(self, folder: Path) -> None:
        there, ours = read_adapter_meta(folder), self._adapter
        if (there is None) != (ours is None):
            kinds = {True: "a model", False: "adapters"}
            raise InputError(
                f"{folder} holds {kinds[there is None]}, and this run trains {kinds[ours is None]} (lora.rank); use "
                "another --workdir"
            )
        if ours is not None and there["base_sha256"] != ours["base_sha256"]:
            raise InputError(
                f"{folder} was trained over weights with SHA-256 {there['base_sha256'][:12]} ({there['base']}), and "
                f"init_from has {ours['base_sha256'][:12]} ({ours['base']}); give that model, or another --workdir"
            )

    def restore_newest(self, abstract: TrainState) -> tuple[int, TrainState] | None:
        """The newest step that is as it was written, and its state; None where there is no step at all.

        Damaged ones that are newer are moved to RUN/damaged_checkpoints, each with a line.
        Raises: InputError if the trees differ or every step is damaged; nothing is moved then.
        """
        damaged = {}
        for step in reversed(self._peers.gather("the checkpoints", list_steps(self._folder))[0]):
            problems, state = self._try_to_restore(step, abstract)
            if not problems:
                self._move_aside(damaged)
                return step, state
            damaged[step] = problems
        if not damaged:
            return None
        raise InputError(
            f"every checkpoint in {self._folder} is damaged ({'; '.join(_told(*one) for one in damaged.items())}); "
            "nothing was moved: copy one back from elsewhere, or begin again in another --workdir"
        )

    def _try_to_restore(self, step: int, abstract: TrainState) -> tuple[list[str], TrainState | None]:
        folder, part = self._folder / str(step), (self._peers.process_id, self._peers.num_processes)
        mine = find_problems(folder, part=part)
        found = self._peers.gather("the checkpoint's files", mine and mine[:MAX_PROBLEMS])
        if all(one is not None for one in found):
            problems = sorted({problem for one in found for problem in one})
            return problems, None if problems else self.restore(step, abstract)
        problem = None
        if self._peers.process_id == 0:
            self._say(f"the checkpoint of step {step} has no {SUMS} (of an older version): it is not verified", step)
            problem = _unreadable(folder)
        problem = self._peers.gather("an unverified checkpoint", problem)[0]
        return ([problem], None) if problem else ([], self.restore(step, abstract))

    def _move_aside(self, damaged: dict[int, list[str]]) -> None:
        if self._peers.process_id == 0:
            for step, problems in damaged.items():
                try:
                    target = move_aside(self._folder / str(step))
                except OSError as error:
                    raise InputError(f"{_told(step, problems)}; it cannot be moved aside: {error.strerror}") from error
                self._say(f"the checkpoint of {_told(step, problems)}; moved to {target}", step)
        self._peers.gather("damaged checkpoints")


def is_due(step: int, config: CheckpointConfig) -> bool:
    """Whether the configuration asks for a checkpoint after this step."""
    return step in config.steps or bool(config.every and step % config.every == 0)


def steps_to_remove(steps: list[int], keep: int, keep_every: int, listed: tuple[int, ...] = ()) -> list[int]:
    """Those that are not among the newest `keep`, nor at a multiple of `keep_every` (0: none is), nor listed."""

    def stays(step: int) -> bool:
        return step in listed or bool(keep_every and step % keep_every == 0)

    return [step for step in sorted(steps)[: max(0, len(steps) - keep)] if not stays(step)]


def _unreadable(step_folder: Path) -> str | None:
    """Why a step cannot be read, if it cannot: it is read through. Orbax itself would leave tracebacks."""
    try:
        read_meta(step_folder)
        digest_step(step_folder)
    except DamagedError as error:
        return str(error)
    return None


def _told(step: int, problems: list[str]) -> str:
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"step {step} is damaged, {problems[0]}{more}"


def _from(step: int | None) -> str:
    return "the start" if step is None else f"step {step}"


def _besides_params(state: TrainState) -> dict:
    rest = {"step": state.step, "state": state.optimizer_state}
    return rest if state.loss_scale is None else {**rest, "loss_scale": state.loss_scale}
