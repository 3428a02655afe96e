"""Saves and restores a run's state: `FOLDER/checkpoints/STEP/{params,optimizer,meta}`.

`params` stands apart from `optimizer`, so that whoever wants the model alone reads just that; a model exported without
an optimizer is the same layout at step 0. `meta` makes each step readable by itself: the model's configuration.
"""

import concurrent.futures
import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import (
    AnyPreservationPolicy,
    AnySavePolicy,
    CustomSteps,
    EveryNSteps,
    FixedIntervalPolicy,
    LatestN,
    SpecificStepsPolicy,
)

from neox_jax.checkpoint.streamed import StreamedHandler, params_handler
from neox_jax.config import CheckpointConfig, ModelConfig
from neox_jax.errors import InputError
from neox_jax.train_state import TrainState
from neox_jax.tree import map_named, named_leaves

FORMAT = 1
STEPS_FOLDER = "checkpoints"


class RunCheckpoints:
    """The checkpoints of one run folder, written in the background."""

    def __init__(self, folder: Path, config: CheckpointConfig):
        save = [FixedIntervalPolicy(config.every)] if config.every else []
        keep = [EveryNSteps(config.keep_every)] if config.keep_every else []
        if config.steps:
            save.append(SpecificStepsPolicy(frozenset(config.steps)))
            keep.append(CustomSteps(config.steps))
        self._manager = ocp.CheckpointManager(
            (Path(folder) / STEPS_FOLDER).absolute(),
            options=ocp.CheckpointManagerOptions(
                save_decision_policy=AnySavePolicy(save),
                preservation_policy=AnyPreservationPolicy([LatestN(config.keep), *keep]),
                cleanup_tmp_directories=True,
            ),
        )

    def latest_step(self) -> int | None:
        """The newest complete step on disk, whoever wrote it."""
        return max(list_steps(self._manager.directory), default=None)

    def save(self, step: int, state: TrainState, model: ModelConfig, *, force: bool = False) -> bool:
        """Saves the state after `step` attempts, if the configuration asks for this step or `force` does."""
        if force and step in self._manager.all_steps():
            return False
        items = {
            "params": ocp.args.StandardSave(state.params, save_args=map_named(_save_args, state.params)),
            "optimizer": ocp.args.StandardSave(_besides_params(state)),
            "meta": ocp.args.JsonSave(_meta(model, state.params)),
        }
        return self._manager.save(step, args=ocp.args.Composite(**items), force=force)

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        """The state at `step`, on the shardings of `abstract`. Raises: InputError if the trees differ."""
        folder = Path(self._manager.directory) / str(step)
        params = read_tree(folder / "params", abstract.params)
        rest = read_tree(folder / "optimizer", _besides_params(abstract))
        return TrainState(rest["step"], params, rest["state"], rest.get("loss_scale"))

    def close(self):
        """Waits for background saves and raises what went wrong in them."""
        self._manager.wait_until_finished()
        self._manager.check_for_errors()
        self._manager.close()


def save_params(params, folder: Path, model: ModelConfig) -> None:
    """Writes parameters alone, a tree of `StreamedArray`s, as step 0 under `folder`."""
    path = (Path(folder) / STEPS_FOLDER).absolute()
    streamed = StreamedHandler()

    def save() -> None:
        handlers = {"params": params_handler(streamed), "meta": ocp.JsonCheckpointHandler()}
        # Not in the background: what goes wrong there is printed as a traceback before anybody can catch it.
        options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
        with ocp.CheckpointManager(path, options=options, item_handlers=handlers) as manager:
            items = {"params": ocp.args.PyTreeSave(params), "meta": ocp.args.JsonSave(_meta(model, params))}
            manager.save(0, args=ocp.args.Composite(**items), force=True)

    # In a thread, so that Ctrl-C comes here and not into Orbax, whose own threads would go on.
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        future = thread.submit(save)
        try:
            future.result()
        except Exception as error:
            raise streamed.error or error from None
        except BaseException:
            streamed.cancelled.set()
            raise
    if streamed.error is not None:
        raise streamed.error


def list_steps(folder: Path) -> list[int]:
    """Complete steps under a `checkpoints` folder, ascending; temporary folders do not count."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit() and (p / "params").is_dir())


def read_meta(step_folder: Path) -> tuple[ModelConfig, str]:
    """The model and the parameters' dtype of a step folder. Raises: InputError if it is not one of ours."""
    path = Path(step_folder) / "meta" / "metadata"
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        if meta["format"] != FORMAT:
            raise InputError(
                f"{step_folder}: checkpoint format {meta['format']!r}, and this version reads {FORMAT}; update neox_jax"
            )
        return ModelConfig(**meta["model"]), meta["dtype"]
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise InputError(f"{step_folder}: no readable checkpoint metadata at {path} ({error})") from error


def read_tree(folder: Path, abstract):
    """Restores a tree onto the shapes, dtypes and shardings of `abstract`.

    Raises: InputError listing every array that is missing, extra or of another shape or dtype; nothing is narrowed.
    """
    check_tree(folder, abstract)
    handler = ocp.StandardCheckpointHandler()  # a checkpointer around it would look for metadata one folder too deep
    return handler.restore(folder.absolute(), args=ocp.args.StandardRestore(abstract))


def check_tree(folder: Path, abstract) -> None:
    """Compares what is on disk with a tree of shapes and dtypes.

    Raises: InputError listing every array that is missing, extra or of another shape or dtype.
    """
    found = _shapes(ocp.StandardCheckpointHandler().metadata(folder.absolute()).tree)
    _check_same(folder, found, _shapes(abstract))


def _shapes(tree) -> dict[str, str]:
    return {name: f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}" for name, leaf in named_leaves(tree).items()}


def _check_same(folder: Path, found: dict[str, str], wanted: dict[str, str]) -> None:
    problems = [f"{name} is missing" for name in wanted.keys() - found.keys()]
    problems += [f"{name} is not part of this model" for name in found.keys() - wanted.keys()]
    for name in wanted.keys() & found.keys():
        if found[name] != wanted[name]:
            problems.append(f"{name} is {found[name]}, wanted {wanted[name]}")
    if problems:
        raise InputError(f"{folder}: {'; '.join(sorted(problems))}")


def _besides_params(state: TrainState) -> dict:
    rest = {"step": state.step, "state": state.optimizer_state}
    return rest if state.loss_scale is None else {**rest, "loss_scale": state.loss_scale}


def _save_args(name: str, leaf) -> ocp.SaveArgs:
    """A chunk for each layer, so that a conversion reads one without the others."""
    return ocp.SaveArgs(shard_axes=(0,) if name.startswith("layers.") else ())


def _meta(model: ModelConfig, params) -> dict:
    dtype = jax.tree.leaves(params)[0].dtype
    return {"format": FORMAT, "model": dataclasses.asdict(model), "dtype": np.dtype(dtype).name}
