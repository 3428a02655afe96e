"""Which revisions of a model hold the same weights, though they should differ: on the hub, or in folders here.

Of pythia-2.8b's 154 branches on the hub 86 serve the final weights (EleutherAI/pythia issue 205): an experiment over
training steps that does not look sees nothing change. The hub tells each file's SHA-256, so nothing is downloaded
there; of local models every tensor is hashed, so that their formats do not matter.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from neox_jax.checkpoint.steps import STEPS_FOLDER, list_steps
from neox_jax.convert import hub
from neox_jax.convert.manifest import hash_tensors
from neox_jax.convert.neox_files import STEP_FOLDER
from neox_jax.convert.source import locate, open_source
from neox_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Comparison:
    """weights: {revision: {file or tensor: its digest}}; note: where they are from, if that is not as expected."""

    weights: dict[str, dict[str, str]]
    note: str = ""

    def identical(self) -> list[list[str]]:
        """The groups of revisions whose weights are all the same; a revision on its own is none."""
        groups: dict[tuple, list[str]] = {}
        for name, parts in self.weights.items():
            if parts:  # that two have no weights makes them no pair
                groups.setdefault(tuple(sorted(parts.items())), []).append(name)
        return [group for group in groups.values() if len(group) > 1]

    def shared(self) -> list[tuple[str, list[str]]]:
        """The files or tensors that are the same in revisions which otherwise differ, each with those revisions."""
        holders: dict[tuple[str, str], list[str]] = {}
        for name, parts in self.weights.items():
            for part in parts.items():
                holders.setdefault(part, []).append(name)
        found = []
        for (part, _), names in holders.items():
            if any(self.weights[name] != self.weights[names[0]] for name in names):
                found.append((part, names))
        return found

    def num_different(self) -> int:
        return len({tuple(sorted(parts.items())) for parts in self.weights.values() if parts})


def compare_revisions(models: list[str], *, progress: Callable[[int, int], None] | None = None) -> Comparison:
    """Compares all revisions of a model on the hub, or all models in some folders.

    models: one hub id; or folders, each a model, a run or a NeoX checkpoint of several steps, or a folder of models.
    progress: called with the number of revisions done, and of all.
    Raises: InputError where there is nothing to compare, or one of them cannot be read.
    """
    if len(models) == 1 and not Path(models[0]).exists() and hub.looks_like_repo_id(models[0]):
        found = hub.list_revisions(models[0], progress=progress)
        note = f"of what this machine's cache has: the hub cannot be reached ({found.hub_error})"
        return Comparison(found.weights, note if found.from_cache else "")
    sources = [source for model in models for source in _list_sources(model)]
    twice = sorted({source for source in sources if sources.count(source) > 1})
    if twice:
        raise InputError(f"{twice[0]} is named twice; name each once")
    weights = {}
    for done, source in enumerate(sources, start=1):
        tensors = hash_tensors(open_source(source))
        weights[source] = {name: f"{one['dtype']} {one['sha256']}" for name, one in tensors.items()}
        if progress is not None:
            progress(done, len(sources))
    return Comparison(weights)


def _list_sources(model: str) -> list[str]:
    path = Path(model)
    if steps := list_steps(path / STEPS_FOLDER):
        return [f"{model}@{step}" for step in steps]
    children = sorted(child for child in path.iterdir() if child.is_dir()) if path.is_dir() else []
    if steps := [child for child in children if STEP_FOLDER.fullmatch(child.name)]:
        return [str(child) for child in sorted(steps, key=lambda step: int(step.name.removeprefix("global_step")))]
    try:
        locate(model)
        return [model]
    except InputError:
        inside = [str(child) for child in children if _is_model(child)]
        if not inside:
            raise
        return inside


def _is_model(folder: Path) -> bool:
    try:
        locate(folder)
    except InputError:
        return False
    return True
