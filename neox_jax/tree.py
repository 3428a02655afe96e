"""Names and sizes of the leaves of a pytree of arrays."""

import math
from collections.abc import Callable

import jax
import numpy as np

NO_DECAY = (
    "bias",
    "scale",
    "kernel_scale",
    "embedding_scale",
)  # last part of the name; the number of dims says nothing, since layers are stacked


def leaf_name(path) -> str:
    """The dotted name of a pytree path: 'layers.mlp.dense_h_to_4h.kernel', for modules and for pure dicts alike."""
    parts = jax.tree_util.keystr(path, simple=True, separator=".").split(".")
    return ".".join(parts[:-1] if parts[-1] == "value" and len(parts) > 1 else parts)


def named_leaves(tree) -> dict:
    """Maps each leaf's name to the leaf, in the tree's order."""
    return {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def map_named(function, tree, *rest):
    """Like jax.tree.map, but calls function(name, leaf, *rest)."""
    return jax.tree_util.tree_map_with_path(lambda path, *leaves: function(leaf_name(path), *leaves), tree, *rest)


def is_decayed(name: str) -> bool:
    """Whether weight decay applies to the parameter: all but biases, scales and LayerNorm's parameters."""
    return name.rsplit(".", 1)[-1] not in NO_DECAY


def num_elements(tree) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def num_bytes(tree) -> int:
    """Bytes of all leaves, each counted once however it is replicated."""
    return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


def select(tree: dict, wanted: Callable[[str], bool]) -> dict:
    """The leaves of nested dicts whose names are wanted, in as few dicts as hold them."""

    def within(part: dict, prefix: str) -> dict:
        found = {}
        for key, value in part.items():
            name = f"{prefix}{key}"
            if isinstance(value, dict):
                if inside := within(value, f"{name}."):
                    found[key] = inside
            elif wanted(name):
                found[key] = value
        return found

    return within(tree, "")


def join(*trees: dict) -> dict:
    """One tree of nested dicts that have no leaf in common."""
    joined: dict = {}
    for tree in trees:
        for key, value in tree.items():
            joined[key] = join(joined.get(key, {}), value) if isinstance(value, dict) else value
    return joined
