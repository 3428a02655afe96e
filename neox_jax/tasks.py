"""Scores of a model on the harness's tasks: tables, files, beside published figures, and over a run's steps."""

import contextlib
import csv
import dataclasses
import difflib
import importlib.util
import json
import logging
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax

from neox_jax.checkpoint.steps import STEPS_FOLDER, list_steps
from neox_jax.config import EvalConfig
from neox_jax.convert.files import to_json
from neox_jax.disk import write_text
from neox_jax.errors import InputError
from neox_jax.model import NeoX
from neox_jax.published import PUBLISHED
from neox_jax.tokenizer import Tokenizer

# Names for several tasks: task -> shots, None being the task's own.
GROUPS = {
    "card": dict.fromkeys(("lambada_openai", "sciq", "piqa", "triviaqa", "arc_challenge"), 0),
    "leaderboard": {
        "arc_challenge": 25,
        "hellaswag": 10,
        "mmlu": 5,
        "truthfulqa_mc2": 0,
        "winogrande": 5,
        "gsm8k": 5,
        "drop": 3,
    },
    "arithmetic": {"arithmetic": None},
    "superglue": {"super-glue-lm-eval-v1": None},
}
FIRST = ("loglikelihood", "multiple_choice")  # kinds of tasks whose requests may be refused for their length
BOOTSTRAPS = 100_000  # the harness's own number


@dataclasses.dataclass(frozen=True)
class TaskScore:
    """One number of the harness's table. stderr: None where it has none.

    filter: which part of an answer was compared, "none" for all of it; a task may have a metric under several.
    """

    task: str
    metric: str
    filter: str
    shots: int
    value: float
    stderr: float | None

    @property
    def metric_name(self) -> str:
        """The metric, and the filter where there is one."""
        return self.metric if self.filter == "none" else f"{self.metric}/{self.filter}"


class Tasks:
    """Tasks of the harness and groups of ours (`GROUPS`), found and with their data at hand.

    include_path: a folder of more tasks. num_fewshot: of every task, instead of their own.
    Raises: InputError for a task that is not known or asked for in two ways, or whose data is neither in the cache nor
    to be had.
    """

    def __init__(self, names: Sequence[str], *, num_fewshot: int | None = None, include_path: str | None = None):
        if os.environ.get("LOCAL_RANK", "0") != "0":
            raise InputError(f"LOCAL_RANK is {os.environ['LOCAL_RANK']}, where lm_eval gives no results; unset it")
        shots: dict[str, int | None] = {}
        for name in names:
            for task, own in GROUPS.get(name, {name: None}).items():
                wanted = own if num_fewshot is None else num_fewshot
                if shots.setdefault(task, wanted) != wanted:
                    raise InputError(f"{task} is asked for twice, with other numbers of examples; score it by itself")
        logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of what tasks leave to their defaults
        with _shown_by_the_first():
            self._manager = _find_tasks(list(shots), include_path)
            items = [item for task, number in shots.items() for item in self._load(task, number)]
            self._items = sorted(items, key=lambda item: any(one.OUTPUT_TYPE not in FIRST for one in _leaves(item)))
            try:
                self._tasks = self._manager.load(list(self._items))["tasks"]
            except ValueError as error:  # one is there by itself and in a group
                raise InputError(f"--tasks {','.join(names)}: {error}") from error

    def _load(self, name: str, shots: int | None) -> list:
        """The task or the group, or the tasks of a tag, with so many examples before each question."""
        try:
            loaded = self._manager.load(name)
        except Exception as error:  # whatever a task's own loader raises
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise InputError(
                f"the data of task {name} cannot be had ({reason}); run it once where there is a network, or copy "
                "that machine's ~/.cache/huggingface"
            ) from error
        for task_name, task in loaded["tasks"].items():
            for trait, what in (("UNSAFE_CODE", "runs what the model writes"), ("MULTIMODAL", "is not of text alone")):
                if getattr(task, trait, False):
                    raise InputError(f"task {task_name} {what}, which is not done here; leave it out")
            if shots is not None and task.get_config("num_fewshot") != 0:  # with 0 it can be done in no other way
                task.set_config(key="num_fewshot", value=shots)
        return [loaded["groups"][name]] if name in loaded["groups"] else list(loaded["tasks"].values())

    def run(self, lm, *, limit: float | None = None, log_samples: bool = False, bootstrap: bool = False) -> dict:
        """lm: a `harness.NeoxLM`. Returns what lm_eval's simple_evaluate does.

        bootstrap: standard errors of metrics that have no formula for theirs, too; in processes of their own, so the
        program needs its `if __name__ == "__main__":`. Of several processes only the first one shows progress.
        Raises: InputError for what the model cannot do, before it does anything else.
        """
        import lm_eval

        for name, task in self._tasks.items():
            if task.OUTPUT_TYPE == "generate_until":
                try:
                    lm.check_arguments(task.get_config("generation_kwargs"))
                except InputError as error:
                    raise InputError(f"task {name}: {error}") from error
        with _shown_by_the_first(), _spawning():
            return lm_eval.simple_evaluate(
                model=lm,
                tasks=list(self._items),
                limit=limit,
                log_samples=log_samples,
                task_manager=self._manager,
                bootstrap_iters=BOOTSTRAPS if bootstrap else 0,
                verbosity="ERROR",
            )


def _find_tasks(names: Sequence[str], include_path: str | None):
    """lm_eval's TaskManager. Raises: InputError for a name that it does not know."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise InputError('tasks need lm_eval; pip install "neox_jax[eval]"') from error
    if include_path is not None:
        if not Path(include_path).is_dir():
            raise InputError(f"--include-path {include_path} is no folder; give one with the YAML files of tasks")
        own = TaskManager(include_path=include_path, include_defaults=False)
        if set(names) <= set(own.all_subtasks):  # to look through all of lm_eval's files takes seconds
            return own
    manager = TaskManager(include_path=include_path)
    for name in names:
        if name not in manager.task_index:
            near = difflib.get_close_matches(name, [*manager.all_tasks, *GROUPS], n=3)
            hint = f"; did you mean {', '.join(near)}?" if near else ""
            raise InputError(f"task {name!r} is not known{hint}")
    return manager


def _leaves(item) -> list:
    return item.get_all_tasks() if hasattr(item, "get_all_tasks") else [item]


@contextlib.contextmanager
def _shown_by_the_first():
    """What lm_eval prints goes to stderr, stdout being for results; of several processes the first alone shows it."""
    with open(os.devnull, "w") as nowhere:
        shown = sys.stderr if jax.process_index() == 0 else nowhere
        with contextlib.redirect_stderr(shown), contextlib.redirect_stdout(shown):
            yield


@contextlib.contextmanager
def _spawning():
    """Here multiprocessing starts new processes: a fork of one in which jax has threads may hang."""
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method("spawn", force=True)
    try:
        yield
    finally:
        multiprocessing.set_start_method(before, force=True)


class RunTasks:
    """The tasks of `eval.tasks`, found before a run begins, for the models that it becomes."""

    def __init__(self, config: EvalConfig, tokenizer: Tokenizer | None):
        self._config, self._tokenizer = config, tokenizer
        self._tasks = None
        if config.tasks:
            if tokenizer is None:
                raise InputError("eval.tasks needs data.tokenizer")
            self._tasks = Tasks(config.tasks, include_path=config.tasks_path or None)

    def is_due(self, step: int, last: int) -> bool:
        every = self._config.tasks_every
        return self._tasks is not None and (step == last or (bool(every) and step % every == 0))

    def measure(self, model: NeoX, begin: Callable[[str], None]) -> dict[str, float]:
        """tasks/NAME/METRIC. begin: is told what is about to be done, batch by batch."""
        from neox_jax.harness import NeoxLM

        lm = NeoxLM("the run", model=model, tokenizer=self._tokenizer, tell=begin)
        results = self._tasks.run(lm, limit=self._config.tasks_limit or None)
        return {f"tasks/{one.task}/{one.metric_name}": one.value for one in scores(results)}


def scores(results: dict) -> Iterator[TaskScore]:
    """The numbers of what `Tasks.run` returned."""
    for task, values in results["results"].items():
        for key, value in values.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            stderr = values.get(f"{metric}_stderr,{kind}")
            stderr = float(stderr) if isinstance(stderr, (int, float)) else None
            yield TaskScore(task, metric, kind, results["n-shot"].get(task, 0), float(value), stderr)


def table(results: dict) -> str:
    """The harness's own tables, of tasks and of groups, with standard errors."""
    from lm_eval.utils import make_table

    tables = [make_table(results), *([make_table(results, "groups")] if "groups" in results else [])]
    return "\n".join(tables)


def published(model: str) -> list[tuple[str, str, int, float, str]]:
    """What is published of a model's scores. Raises: InputError naming the models there are."""
    if model not in PUBLISHED:
        raise InputError(f"nothing published of {model!r} is known; wanted one of {', '.join(PUBLISHED)}")
    return PUBLISHED[model]


def compare(results: dict, model: str) -> list[str]:
    """Lines with our scores and the published ones of this model."""
    ours = list(scores(results))
    lines = []
    for task, metric, shots, value, source in published(model):
        for one in (one for one in ours if (one.task, one.metric, one.shots) == (task, metric, shots)):
            error = "" if one.stderr is None else f" ± {one.stderr:.4f}"
            lines.append(
                f"{task} {one.metric_name} ({shots} shots): {one.value:.4f}{error}, published {value:.4f} "
                f"({one.value - value:+.4f}; {source})"
            )
    return lines


def check_output(folder: str | Path, *, pictures: bool) -> None:
    """Raises: InputError where results could not be written, while that costs nothing yet."""
    if pictures and importlib.util.find_spec("matplotlib") is None:
        raise InputError('a picture needs matplotlib; pip install "neox_jax[viz]"')
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output {folder} cannot be written: {error.strerror}") from error


def write_results(results: dict, folder: str | Path, *, about: dict) -> Path:
    """results.json in a folder, and samples.jsonl where there are samples. about: what was scored, and how."""
    folder = Path(folder)
    samples = results.pop("samples", None) or {}
    path = folder / "results.json"
    write_text(path, to_json({**about, **json.loads(json.dumps(results, default=str))}))
    lines = [json.dumps({"task": task, **one}, default=str) for task, several in samples.items() for one in several]
    if lines:
        write_text(folder / "samples.jsonl", "".join(f"{line}\n" for line in lines))
    return path


def steps_of(run: str | Path, wanted: str) -> list[int]:
    """ "all", or steps with commas, of a run folder. Raises: InputError for a step that is not there."""
    there = list_steps(Path(run) / STEPS_FOLDER)
    if not there:
        raise InputError(f"--steps is of a run folder; {run} has no {STEPS_FOLDER}")
    if wanted == "all":
        return there
    steps = [int(part) for part in wanted.split(",") if part.strip().isdecimal()]
    missing = [step for step in steps if step not in there]
    if missing or len(steps) != len(wanted.split(",")):
        raise InputError(f"--steps {wanted}: wanted all, or some of {', '.join(map(str, there))}, with commas")
    return steps


def write_curves(by_step: dict[int, dict], folder: str | Path) -> tuple[Path, Path]:
    """scores.csv and scores.png of results by step."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    curves: dict[str, list[tuple[int, TaskScore]]] = {}
    for step, results in sorted(by_step.items()):
        for one in scores(results):
            curves.setdefault(f"{one.task} {one.metric_name}", []).append((step, one))
    with (folder / "scores.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["step", *(field.name for field in dataclasses.fields(TaskScore))])
        for points in curves.values():
            writer.writerows([step, *dataclasses.astuple(one)] for step, one in points)
    _draw(curves, folder / "scores.png")
    return folder / "scores.csv", folder / "scores.png"


def _draw(curves: dict[str, list[tuple[int, TaskScore]]], path: Path) -> None:
    """A panel for each metric, a curve for each task, with its standard errors."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    metrics = sorted({points[0][1].metric_name for points in curves.values()})
    figure = Figure(figsize=(7, 3.2 * len(metrics)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(metrics), 1, squeeze=False)[:, 0]
    for panel, metric in zip(panels, metrics, strict=True):
        for points in curves.values():
            if points[0][1].metric_name == metric:
                steps, values = zip(*((step, one.value) for step, one in points), strict=True)
                errors = [one.stderr or 0 for _, one in points]
                panel.errorbar(steps, values, errors, marker="o", markersize=4, capsize=3, label=points[0][1].task)
        panel.set_title(metric, loc="left")
        panel.set_xlabel("step")
        panel.grid(alpha=0.3)
        panel.legend(frameon=False)
    figure.savefig(path, dpi=130)
