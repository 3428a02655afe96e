"""THE table: our parameter names, Hugging Face's, NeoX's, and the change of layout between them, for both directions.

SHAPES  D model  N heads  C query, key, value  H head dim  F mlp  V vocab
A stored tensor is a vector, or a matrix of which each dim merges some of our dims in order: a conversion is a reshape
and, where the dims are flipped, a transpose. The leading dim of our stacked parameters, the layer, is not in `dims`: it
is in the stored name.
"""

import dataclasses
import math
import re

import numpy as np

Dims = tuple[tuple[int, ...], ...]
_VECTOR: Dims = ((0,),)
_TABLE: Dims = ((0,), (1,))
_FLIPPED: Dims = ((1,), (0,))
# Ours [D, N, C, H], stored [N*C*H, D]: per head its query, key and value, not three thirds.
_QKV: Dims = ((1, 2, 3), (0,))
# How NeoX's tensor-parallel ranks hold it: cut along its outputs (dim 0) or its inputs (dim 1); as copies; or, the
# bias of a layer cut along its inputs, as shares whose sum counts (copies too, where the residual is sequential).
OUTPUTS, INPUTS, COPIES, SHARES = "outputs", "inputs", "copies", "shares"


@dataclasses.dataclass(frozen=True)
class Row:
    """One parameter.

    dims: for each dim of the stored tensor, which of our dims (of one layer) it merges, in order. ranks: how NeoX's
    ranks hold it. neox: its name in NeoX's layer file, where that is not what Hugging Face's ends with.
    """

    name: str
    hf: str
    dims: Dims
    ranks: str = COPIES
    neox: str = ""

    @property
    def stacked(self) -> bool:
        return "{layer}" in self.hf

    @property
    def is_table(self) -> bool:
        """Whether its first dim is the vocabulary, whose rows we may pad."""
        return self.dims == _TABLE and not self.stacked

    def layers(self, shape: tuple[int, ...]) -> list[int | None]:
        """The layers of a parameter of this shape, [None] where it is not stacked."""
        return list(range(shape[0])) if self.stacked else [None]

    def hf_name(self, layer: int | None) -> str:
        return self.hf.format(layer=layer)

    @property
    def neox_name(self) -> str:
        return self.neox or self.hf.removeprefix(_LAYER)


_LAYER = "gpt_neox.layers.{layer}."

ROWS = (
    Row("embed_in.embedding", "gpt_neox.embed_in.weight", _TABLE, OUTPUTS, "word_embeddings.weight"),  # [V, D]
    Row("layers.input_layernorm.scale", _LAYER + "input_layernorm.weight", _VECTOR),
    Row("layers.input_layernorm.bias", _LAYER + "input_layernorm.bias", _VECTOR),
    Row("layers.post_attention_layernorm.scale", _LAYER + "post_attention_layernorm.weight", _VECTOR),
    Row("layers.post_attention_layernorm.bias", _LAYER + "post_attention_layernorm.bias", _VECTOR),
    Row("layers.attention.query_key_value.kernel", _LAYER + "attention.query_key_value.weight", _QKV, OUTPUTS),
    Row("layers.attention.query_key_value.bias", _LAYER + "attention.query_key_value.bias", ((0, 1, 2),), OUTPUTS),
    # Ours [N, H, D], stored [D, N*H].
    Row("layers.attention.dense.kernel", _LAYER + "attention.dense.weight", ((2,), (0, 1)), INPUTS),
    Row("layers.attention.dense.bias", _LAYER + "attention.dense.bias", _VECTOR, SHARES),
    # Ours [D, F], stored [F, D]; and the other way round.
    Row("layers.mlp.dense_h_to_4h.kernel", _LAYER + "mlp.dense_h_to_4h.weight", _FLIPPED, OUTPUTS),
    Row("layers.mlp.dense_h_to_4h.bias", _LAYER + "mlp.dense_h_to_4h.bias", _VECTOR, OUTPUTS),
    Row("layers.mlp.dense_4h_to_h.kernel", _LAYER + "mlp.dense_4h_to_h.weight", _FLIPPED, INPUTS),
    Row("layers.mlp.dense_4h_to_h.bias", _LAYER + "mlp.dense_4h_to_h.bias", _VECTOR, SHARES),
    Row("final_layer_norm.scale", "gpt_neox.final_layer_norm.weight", _VECTOR, COPIES, "norm.weight"),
    Row("final_layer_norm.bias", "gpt_neox.final_layer_norm.bias", _VECTOR, COPIES, "norm.bias"),
    Row("embed_out.embedding", "embed_out.weight", _TABLE, OUTPUTS, "final_linear.weight"),  # [V, D]
)
BY_NAME = {row.name: row for row in ROWS}


def factor_rows(kernel: Row) -> tuple[Row, Row]:
    """The two factors of a kernel's adapter under PEFT's names: ours [*inputs, R] and [R, *outputs], stored [R, in] and
    [out, R]."""
    outputs, inputs = kernel.dims
    name, stored = kernel.name.removesuffix("kernel"), f"base_model.model.{kernel.hf.removesuffix('weight')}"
    a: Dims = ((len(inputs),), tuple(range(len(inputs))))
    b: Dims = (tuple(range(1, 1 + len(outputs))), (0,))
    return Row(f"{name}lora.a", f"{stored}lora_A.weight", a), Row(f"{name}lora.b", f"{stored}lora_B.weight", b)


_TILE = 256  # rows and columns that are transposed at a time; of 2-byte elements they fit a core's second cache

# Buffers of old exports: the causal mask and the rotary frequencies, which follow from the config.
_BUFFER = re.compile(r"(gpt_neox\.)?layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)")


def is_buffer(stored_name: str) -> bool:
    return _BUFFER.fullmatch(stored_name) is not None


def full_hf_name(stored_name: str) -> str:
    """The name as in a GPTNeoXForCausalLM; an export of the base model leaves the prefix out."""
    return stored_name if stored_name.startswith(("gpt_neox.", "embed_out.")) else f"gpt_neox.{stored_name}"


def stored_shape(shape: tuple[int, ...], dims: Dims) -> tuple[int, ...]:
    """Our shape (of one layer) -> the stored one."""
    return tuple(math.prod(shape[dim] for dim in merged) for merged in dims)


def to_stored(array: np.ndarray, dims: Dims) -> np.ndarray:
    """Our layout (of one layer) -> the stored one, contiguous."""
    if dims[0][0] == 0:
        return np.ascontiguousarray(array.reshape(stored_shape(array.shape, dims)))
    return _transpose(array.reshape(stored_shape(array.shape, dims)[::-1]))


def from_stored(array: np.ndarray, dims: Dims, shape: tuple[int, ...]) -> np.ndarray:
    """The stored layout -> ours (of one layer), of this shape, contiguous where the dims are flipped."""
    return (array if dims[0][0] == 0 else _transpose(array)).reshape(shape)


def put_stored(rows: np.ndarray, dims: Dims, out: np.ndarray, start: int) -> None:
    """Puts rows of the stored tensor, from `start` on, where they belong in `out`, contiguous and in our layout."""
    stored = stored_shape(out.shape, dims)
    if dims[0][0] == 0:
        out.reshape(stored)[start : start + len(rows)] = rows
    else:
        _transpose(rows, out.reshape(stored[::-1])[:, start : start + len(rows)])


def _transpose(matrix: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """A transposed copy, in `out` if that is given, by tiles: 2 to 3 times as fast as numpy's.

    A tile is first copied to where its rows are not a power of two apart, which would have few places in the caches.
    """
    out = np.empty(matrix.shape[::-1], matrix.dtype) if out is None else out
    tile = np.empty((_TILE, _TILE + 32), matrix.dtype)
    for row in range(0, matrix.shape[0], _TILE):
        for column in range(0, matrix.shape[1], _TILE):
            part = matrix[row : row + _TILE, column : column + _TILE]
            copy = tile[: part.shape[0], : part.shape[1]]
            copy[...] = part
            out[column : column + _TILE, row : row + _TILE] = copy.T
    return out


def stored_slices(bounds: list[tuple[int, int]], shape: tuple[int, ...], dims: Dims) -> tuple[slice, ...]:
    """Which part of the stored tensor holds this part of ours.

    bounds: (start, stop) for each of our dims (of one layer). A merged dim can only be cut along its first part; the
    others must be whole, as they are on any mesh (head_dim and qkv are never sharded).
    """
    slices = []
    for first, *rest in dims:
        assert all(bounds[dim] == (0, shape[dim]) for dim in rest), (bounds, shape, dims)
        width = math.prod(shape[dim] for dim in rest)
        slices.append(slice(bounds[first][0] * width, bounds[first][1] * width))
    return tuple(slices)


def covering_bounds(
    slices: tuple[slice, ...], shape: tuple[int, ...], dims: Dims
) -> tuple[list[tuple[int, int]], tuple[slice, ...]]:
    """The part of ours that holds this part of the stored tensor, and where in the stored layout of that part it is.

    Merged dims can only be cut along their first: a part may be larger than what was asked for.
    """
    bounds, inside = [(0, size) for size in shape], []
    for part, (first, *rest) in zip(slices, dims, strict=True):
        width = math.prod(shape[dim] for dim in rest)
        start = part.start // width
        bounds[first] = (start, -(-part.stop // width))
        inside.append(slice(part.start - start * width, part.stop - start * width))
    return bounds, tuple(inside)


def in_order(num_layers: int) -> list[str]:
    """Every full Hugging Face name, in the order of the forward pass: layer by layer."""
    per_layer = [row for row in ROWS if row.stacked]
    first = ROWS.index(per_layer[0])
    last = first + len(per_layer)
    layers = [row.hf_name(layer) for layer in range(num_layers) for row in per_layer]
    return [*(row.hf for row in ROWS[:first]), *layers, *(row.hf for row in ROWS[last:])]
