"""Looking inside a forward pass: activations as outputs of the scan over layers, and functions that change them.

SHAPES  B batch  T query length  S key length  D model  N heads  H head dim  L layers
"""

import functools
import operator
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from neox_jax.attention import NEGATIVE
from neox_jax.errors import InputError
from neox_jax.sharding import constrain
from neox_jax.tensor_parallel import Ranks

IN_LAYERS = ("residual", "attention", "mlp", "attention_weights")  # what every layer has, and a patch may change
CAPTURES = (*IN_LAYERS, "final")

Patch = Mapping[tuple[str, int], Callable[[jax.Array], jax.Array]]


def check_inside(capture: tuple[str, ...], patch: Patch, num_layers: int) -> tuple[tuple[str, ...], Patch]:
    """capture and patch as `look_inside` takes them. Raises: InputError for what the model does not have."""
    if isinstance(capture, str):
        raise InputError(f"capture {capture!r}: wanted a tuple of names; write ({capture!r},)")
    for name in capture:
        if name not in CAPTURES:
            raise InputError(f"capture {name!r}: wanted one of {', '.join(CAPTURES)}")
    checked = {}
    for key, function in patch.items():
        name, layer = key if isinstance(key, tuple) and len(key) == 2 else (key, None)
        if name not in IN_LAYERS:
            raise InputError(f"patch {key!r}: wanted (NAME, LAYER) with a name of {', '.join(IN_LAYERS)}")
        if not hasattr(layer, "__index__") or not 0 <= layer < num_layers:
            raise InputError(f"patch {key!r}: wanted a layer from 0 to {num_layers - 1}")
        if not callable(function):
            raise InputError(f"patch {key!r}: got a {type(function).__name__}, wanted a function of the layer's array")
        # A Partial is a pytree: the function is static, so the same one compiles nothing again, and arrays that a user
        # bound to it are arguments, so new ones do not either.
        is_partial = isinstance(function, jax.tree_util.Partial)
        checked[name, operator.index(layer)] = function if is_partial else jax.tree_util.Partial(function)
    return tuple(sorted(set(capture))), checked


# Jitted at module level for the same reason as the model's own call: eager calls compile once.
@functools.partial(jax.jit, static_argnames="capture")
def look_inside(model, tokens, segment_ids, positions, patch: Patch, *, capture: tuple[str, ...]):
    """The logits of a NeoX, and what was captured: {name: array}, [L,B,...], of "final" [B,T,D].

    Shapes: as NeoX.__call__. Raises: InputError if a patch gives another shape or dtype than it was given.
    """
    tables = model.rotary_tables(jnp.arange(tokens.shape[1]) if positions is None else positions)
    attend = functools.partial(model.attend(), segment_ids_BT=segment_ids)
    touched = {*capture, *(name for name, _ in patch)}
    branches, choices = _branches(patch, model.config.num_hidden_layers)

    def body(x_BTD, layer_and_choice):
        layer, choice = layer_and_choice
        captured = {}

        def tap(name, array):
            if name in branches:
                array = jax.lax.switch(choice[name], branches[name], array)
            if name in capture:
                captured[name] = array
            return array

        weigh = functools.partial(_attend_by_weights, segment_ids_BT=segment_ids, mesh=model.mesh, tap=tap)
        attend_here = weigh if "attention_weights" in touched else attend
        x_BTD = tap("residual", x_BTD)
        if touched & {"attention", "mlp"}:
            return layer.apart(x_BTD, tables, attend_here, model.mesh, tap=tap), captured
        return layer(x_BTD, tables, attend_here, model.mesh)[0], captured

    x_BTD, captured = jax.lax.scan(body, model.embed(tokens), (model.layers, choices))
    final_BTD = model.finish(x_BTD)
    if "final" in capture:
        captured["final"] = final_BTD
    return model.unembed(final_BTD), captured


def _branches(patch: Patch, num_layers: int) -> tuple[dict[str, list[Callable]], dict[str, np.ndarray]]:
    """For each patched name the functions to choose from, of which the first changes nothing; and [L], each layer's.

    A choice inside the one scan, and no scans of what is between patched layers: those would have a copy of the layer's
    program each, and their parts of the stacked parameters would be copied. Only the chosen function runs.
    """
    branches, choices = {}, {}
    for (name, layer), function in patch.items():
        functions = branches.setdefault(name, [lambda array: array])
        choices.setdefault(name, np.zeros(num_layers, np.int32))[layer] = len(functions)
        functions.append(functools.partial(_apply, function, f"patch {(name, layer)!r}"))
    return branches, choices


def _apply(function: Callable, what: str, array: jax.Array) -> jax.Array:
    new = function(array)
    if not isinstance(new, jax.Array | np.ndarray) or new.shape != array.shape or new.dtype != array.dtype:
        got = f"{new.dtype}{list(new.shape)}" if hasattr(new, "dtype") else type(new).__name__
        raise InputError(f"{what}: its function gave {got}, wanted {array.dtype}{list(array.shape)}, as it was given")
    return jax.lax.convert_element_type(new, array.dtype)  # no longer a weak type, which the others are not


def _attend_by_weights(q_BTNH, k_BSNH, v_BSNH, *, segment_ids_BT, mesh, tap) -> jax.Array:
    """Causal attention by way of all its probabilities, float32 [B,N,T,S], which other backends never hold whole."""
    length = q_BTNH.shape[1]
    scores_BNTS = jnp.einsum("BTNH,BSNH->BNTS", q_BTNH, k_BSNH, preferred_element_type=jnp.float32)
    mask = jnp.tril(jnp.ones((length, length), bool))
    if segment_ids_BT is not None:
        mask = mask & (segment_ids_BT[:, None, :, None] == segment_ids_BT[:, None, None, :])
    weights_BNTS = jax.nn.softmax(jnp.where(mask, scores_BNTS * q_BTNH.shape[-1] ** -0.5, NEGATIVE), axis=-1)
    batch, positions = Ranks(mesh, length).activation_axes
    weights_BNTS = tap("attention_weights", constrain(weights_BNTS, (batch, "heads", positions, "length"), mesh))
    weights_BNTS = weights_BNTS.astype(v_BSNH.dtype)
    out_BTNH = jnp.einsum("BNTS,BSNH->BTNH", weights_BNTS, v_BSNH, preferred_element_type=jnp.float32)
    return out_BTNH.astype(v_BSNH.dtype)
