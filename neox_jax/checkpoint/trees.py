"""Trees of arrays as Orbax stores them: what is there, compared with what is wanted before it is read."""

from pathlib import Path

import orbax.checkpoint as ocp

from neox_jax.checkpoint.streamed import dtype_of, read_leaves
from neox_jax.errors import InputError
from neox_jax.tree import named_leaves


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
    _check_same(folder, _shapes(read_leaves(folder)), _shapes(named_leaves(abstract)))


def _shapes(leaves: dict) -> dict[str, str]:
    return {name: f"{dtype_of(leaf).name}{list(leaf.shape)}" for name, leaf in leaves.items()}


def _check_same(folder: Path, found: dict[str, str], wanted: dict[str, str]) -> None:
    problems = [f"{name} is missing" for name in wanted.keys() - found.keys()]
    problems += [f"{name} is not part of this model" for name in found.keys() - wanted.keys()]
    for name in wanted.keys() & found.keys():
        if found[name] != wanted[name]:
            problems.append(f"{name} is {found[name]}, wanted {wanted[name]}")
    if problems:
        raise InputError(f"{folder}: {'; '.join(sorted(problems))}")
