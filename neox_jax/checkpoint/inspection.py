"""What `neox-jax checkpoint` says about a run's checkpoints, and does: it removes steps, and never changes one."""

import dataclasses
import datetime
import math
from collections.abc import Callable
from pathlib import Path

from neox_jax.checkpoint.manager import steps_to_remove
from neox_jax.checkpoint.steps import STEPS_FOLDER, list_steps, read_meta, remove_step, size_on_disk
from neox_jax.checkpoint.streamed import dtype_of, read_leaves
from neox_jax.checkpoint.sums import SUMS, find_problems
from neox_jax.errors import InputError
from neox_jax.run_lock import held_by


def find_steps(text: str) -> list[Path]:
    """The folders of a RUN's steps, ascending; of RUN@STEP that one. Raises: InputError if there is none."""
    run, _, number = text.rpartition("@")
    if not (run and number.isdecimal() and not Path(text).exists()):
        run, number = text, None
    folder = Path(run) / STEPS_FOLDER
    steps = list_steps(folder)
    if not steps:
        raise InputError(f"{run} holds no checkpoints; wanted a run folder ({STEPS_FOLDER}/STEP), or RUN@STEP")
    if number is None:
        return [folder / str(step) for step in steps]
    if int(number) not in steps:
        raise InputError(f"{run} has no checkpoint of step {number}; it has {', '.join(map(str, steps))}")
    return [folder / str(int(number))]


def describe_steps(steps: list[Path]) -> list[str]:
    """A line for each step: number, size on disk, when it was written, whether it can be verified."""
    lines = []
    for step in filter(Path.is_dir, steps):  # a run that is alive removes some
        written = datetime.datetime.fromtimestamp(step.stat().st_mtime).isoformat(" ", "seconds")
        kind = "" if (step / "optimizer").is_dir() else "  parameters alone"
        sums = "can be verified" if (step / SUMS).is_file() else f"no {SUMS}: cannot be verified"
        lines.append(f"{step.name:>10}  {_size(size_on_disk(step)):>9}  {written}  {sums}{kind}")
    return lines


def verify_steps(steps: list[Path], progress: Callable[[int, int], None]) -> dict[Path, list[str] | None]:
    """What is wrong with each, as `find_problems` says it. progress: called with the bytes read, and of all steps."""
    sizes = [size_on_disk(step) for step in steps]
    found = {}
    for index, step in enumerate(steps):
        before = sum(sizes[:index])
        problems = find_problems(step, progress=lambda done, _, before=before: progress(before + done, sum(sizes)))
        if step.is_dir():  # else a run that is alive has removed it meanwhile
            found[step] = problems
    return found


def describe_step(step: Path) -> list[str]:
    """The model of a step, and each of its arrays. Raises: DamagedError."""
    model, dtype = read_meta(step)
    fields = ", ".join(f"{name} {value}" for name, value in dataclasses.asdict(model).items())
    lines = [f"step {step.name}: {model.num_parameters:,} parameters in {dtype}", fields]
    for item in ("params", "optimizer"):
        if not (step / item).is_dir():
            continue
        leaves = {name: (dtype_of(leaf), leaf.shape) for name, leaf in read_leaves(step / item).items()}
        sizes = {name: math.prod(shape) * dtype.itemsize for name, (dtype, shape) in leaves.items()}
        lines.append(f"{item}: {len(leaves)} arrays, {_size(sum(sizes.values()))}")
        width = max(map(len, leaves))
        for name, (kind, shape) in leaves.items():
            lines.append(f"  {name:<{width}}  {kind.name:>8}  {_size(sizes[name]):>9}  {list(shape)}")
    return lines


def find_prunable(steps: list[Path], *, keep: int, keep_every: int) -> list[Path]:
    """The steps that are not among the newest `keep` nor at a multiple of `keep_every`; never the newest good one.

    Raises: InputError for numbers that make no sense, while the run is alive, or where no step is good.
    """
    if keep < 1 or keep_every < 0:
        raise InputError(f"--keep {keep} --keep-every {keep_every}: at least one is kept, and every 0th none")
    run = steps[0].parent.parent
    holder = held_by(run)
    if holder is not None:
        raise InputError(f"{run} is in use ({holder}); stop that run first, or lower its checkpoint.keep")
    good = next((step for step in reversed(steps) if not find_problems(step)), None)
    if good is None:
        raise InputError(f"every checkpoint of {run} is damaged; none was removed")
    doomed = steps_to_remove([int(step.name) for step in steps], keep, keep_every)
    return [step for step in steps if int(step.name) in doomed and step != good]


def prune(steps: list[Path]) -> None:
    """Removes steps. Raises: InputError where one cannot be."""
    for step in steps:
        try:
            remove_step(step)
        except OSError as error:
            raise InputError(f"{step} cannot be removed: {error.strerror}") from error


def _size(num_bytes: float) -> str:
    units = iter(("B", "kB", "MB", "GB", "TB"))
    unit = next(units)
    while num_bytes >= 1000 and unit != "TB":
        num_bytes, unit = num_bytes / 1000, next(units)
    return f"{num_bytes:.4g} {unit}"
