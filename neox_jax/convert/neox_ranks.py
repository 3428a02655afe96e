"""How a stored tensor lies over NeoX's tensor-parallel ranks, in both directions: merging is undone by splitting.

Cut along its outputs or inputs; or as copies, which drift a little in training and whose mean counts; or as shares
whose sum counts: the biases behind row-parallel layers of a model with parallel residual.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator

import numpy as np

from neox_jax.config import DTYPES, ModelConfig
from neox_jax.convert import names
from neox_jax.convert.byte_reader import RawBytes
from neox_jax.convert.names import COPIES, INPUTS, OUTPUTS, SHARES
from neox_jax.convert.neox_files import NeoxFiles
from neox_jax.convert.stored import StoredTensor, expected_shapes, raw_parts

VOCAB_MULTIPLE = 128  # NeoX's make_vocab_size_divisible_by; a vocabulary is padded to this many rows a rank


def how_held(row: names.Row, config: ModelConfig) -> str:
    """How the ranks hold it: with sequential residual shares are copies."""
    return COPIES if row.ranks == SHARES and not config.use_parallel_residual else row.ranks


def place_of(config: ModelConfig) -> dict[str, tuple[names.Row, int]]:
    """Maps each full Hugging Face name to its row of the table and the number of the layer file that holds it."""
    last = config.num_hidden_layers + 4
    alone = {"word_embeddings.weight": 0, "final_linear.weight": last}
    places = {row.hf: (row, alone.get(row.neox_name, last - 1)) for row in names.ROWS if not row.stacked}
    for row in names.ROWS:
        if row.stacked:
            places |= {row.hf_name(layer): (row, layer + 2) for layer in range(config.num_hidden_layers)}
    return places


# ---- merging


@dataclasses.dataclass(frozen=True)
class Merged:
    """One stored tensor over its ranks. shape: of the whole, without rows that only pad the vocabulary."""

    ranks: tuple
    how: str
    shape: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.ranks[0].dtype)

    @property
    def raw(self) -> list[RawBytes] | None:
        """Where the ranks' parts are its rows, those but the ones that only pad."""
        parts = [raw_parts(rank) for rank in self.ranks]
        if (self.how != OUTPUTS and len(parts) > 1) or not all(parts):
            return None
        found, left = [], math.prod(self.shape) * self.dtype.itemsize
        for raw in itertools.chain(*parts):
            if left:
                found.append(raw.cut(left))
                left -= found[-1].num_bytes
        return found

    def read(self, slices: tuple[slice, ...]) -> np.ndarray:
        """Part of the whole tensor; slices have plain bounds."""
        if self.how in (OUTPUTS, INPUTS):
            return self._join(slices, 0 if self.how == OUTPUTS else 1)
        parts = [tensor.read(slices) for tensor in self.ranks]
        if len(parts) == 1:
            return parts[0]
        total = _sum(parts)
        return (total if self.how == SHARES else total / len(parts)).astype(self.dtype)

    def _join(self, slices: tuple[slice, ...], dim: int) -> np.ndarray:
        parts, width = [], self.ranks[0].shape[dim]
        for i, tensor in enumerate(self.ranks):
            start, stop = max(slices[dim].start - i * width, 0), min(slices[dim].stop - i * width, width)
            if start < stop:
                parts.append(tensor.read((*slices[:dim], slice(start, stop), *slices[dim + 1 :])))
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=dim)


def _sum(parts: list[np.ndarray]) -> np.ndarray:
    """In float64, in the order of the ranks."""
    total = parts[0].astype(np.float64)
    for part in parts[1:]:
        total = total + part.astype(np.float64)
    return total


def merge(files: NeoxFiles, config: ModelConfig, problems: list[str]) -> dict[str, Merged]:
    """Maps the full Hugging Face name of each parameter to its tensor; reports what is missing, unknown or wrong."""
    merged, wanted, unseen = {}, set(), set()
    numbers = {number for number, _ in files.found} | {number for number, _ in files.absent}
    table_rows = files.shape(0, "word_embeddings.weight")[0]
    places = place_of(config)
    for name, shape in expected_shapes(config).items():
        row, number = places[name]
        how = how_held(row, config)
        on_rank = (table_rows, *shape[1:]) if row.is_table else _shape_on_rank(shape, how, len(files.ranks))
        wanted.add((number, row.neox_name))
        if number not in numbers and -1 not in numbers:
            unseen.add(number)
            continue
        held = files.found.get((number, row.neox_name), {})
        if _check_ranks(f"layer {number}'s {row.neox_name}", held, on_rank, files, number, problems):
            merged[name] = Merged(tuple(held[rank] for rank in files.ranks), how, shape)
    problems += [f"layer {number} is missing on every rank; download its files" for number in sorted(unseen)]
    for number, name in sorted(files.found.keys() - wanted):
        tied = " (no_weight_tying is false)" if name == "final_linear.weight" else ""
        problems.append(f"layer {number}'s {name[:100]!r} is no parameter of this configuration{tied}")
    return merged


def _shape_on_rank(shape: tuple[int, ...], how: str, num_ranks: int) -> tuple[int, ...]:
    if how == OUTPUTS:
        return (shape[0] // num_ranks, *shape[1:])
    return (shape[0], shape[1] // num_ranks) if how == INPUTS else shape


def _check_ranks(what: str, held: dict, shape: tuple[int, ...], files: NeoxFiles, number: int, problems) -> bool:
    """Whether every rank holds the tensor, alike and in this shape; reports it where not."""
    missing = [rank for rank in files.ranks if rank not in held and not files.missing(number, rank)]
    if missing:
        on = "" if len(missing) == len(files.ranks) else f" on rank {', '.join(map(str, missing))}"
        problems.append(f"{what} is missing{on}")
    tensors = {rank: tensor for rank, tensor in sorted(held.items()) if hasattr(tensor, "read")}
    wrong = {rank: tuple(tensor.shape) for rank, tensor in tensors.items() if tuple(tensor.shape) != shape}
    if wrong:
        got = next(iter(wrong.values()))
        on = "every rank" if len(wrong) == len(files.ranks) else f"rank {', '.join(map(str, wrong))}"
        problems.append(f"{what} is {list(got)} on {on}, wanted {list(shape)}")
    dtypes = sorted({np.dtype(tensor.dtype).name for tensor in tensors.values()})
    if len(dtypes) > 1:
        problems.append(f"{what} is {' and '.join(dtypes)} on different ranks; wanted one dtype")
    problems += [f"{what} is {dtype}, wanted one of {', '.join(DTYPES)}" for dtype in dtypes if dtype not in DTYPES]
    return len(tensors) == len(files.ranks) and not wrong and len(dtypes) == 1 and dtypes[0] in DTYPES


def measure_drift(tensors: dict[str, Merged], problems: list[str]) -> dict[str, float]:
    """The largest difference between the ranks' copies, where they differ.

    Norms drift a little in training, and so may the biases of a model with sequential residual. Biases that have
    nothing to do with each other are no copies.
    """
    drift = {}
    for name, tensor in tensors.items():
        if tensor.how != COPIES or len(tensor.ranks) == 1:
            continue
        copies = [copy.read() for copy in tensor.ranks]
        if all(copy.tobytes() == copies[0].tobytes() for copy in copies):
            continue
        stack = np.stack([copy.astype(np.float64) for copy in copies])
        drift[name] = float(np.max(np.max(stack, axis=0) - np.min(stack, axis=0)))
        if name.endswith((".attention.dense.bias", ".mlp.dense_4h_to_h.bias")) and not drift[name] <= 0.5 * np.max(
            np.abs(stack)
        ):
            problems.append(
                f"{name} differs between the ranks by {drift[name]:.3g}: with gpt_j_residual false they hold copies; "
                "set it to true if the residual is parallel, or download all ranks of the same step"
            )
    return drift


# ---- splitting


def shape_on_rank(row: names.Row, shape: tuple[int, ...], num_ranks: int, config: ModelConfig) -> tuple[int, ...]:
    """Of what each rank holds of a stored tensor of this shape; tables get rows of zeros at their end."""
    if row.is_table:
        shape = (shape[0] + -shape[0] % (VOCAB_MULTIPLE * num_ranks), *shape[1:])
    return _shape_on_rank(shape, how_held(row, config), num_ranks)


def split(
    row: names.Row, tensor: StoredTensor, blocks: Iterable[np.ndarray], num_ranks: int, config: ModelConfig
) -> Iterator[tuple[int, np.ndarray]]:
    """(rank, piece) for all that the ranks hold of a stored tensor; a rank's pieces are its part in C order.

    blocks: all of the tensor's rows, in order.
    """
    how, shape = how_held(row, config), tensor.shape
    if how in (COPIES, SHARES):
        array = np.concatenate(list(blocks))
        yield from enumerate(_share(array, num_ranks) if how == SHARES else [array] * num_ranks)
    elif how == INPUTS:
        width = shape[1] // num_ranks
        for block in blocks:
            for rank in range(num_ranks):
                yield rank, np.ascontiguousarray(block[:, rank * width : (rank + 1) * width])
    else:
        num_rows, position = shape_on_rank(row, shape, num_ranks, config)[0], 0
        padding = np.zeros((num_rows * num_ranks - shape[0], *shape[1:]), tensor.dtype)
        for block in itertools.chain(blocks, [padding]):
            while len(block):
                rank = position // num_rows
                piece = block[: (rank + 1) * num_rows - position]
                yield rank, piece
                position, block = position + len(piece), block[len(piece) :]


def _share(bias: np.ndarray, num_ranks: int) -> list[np.ndarray]:
    """Equal shares of a bias, whose sum is the bias to the bit.

    The shares are equal, as NeoX's own converter and NeoX's training make them, where that is exact: always for a power
    of two, but for the smallest numbers. Where it is not, rank 0 takes the rounding error too, and if even that does
    not sum up (an infinity, a number that underflows) the whole, the others nothing.
    """
    if num_ranks == 1:
        return [bias]
    with np.errstate(invalid="ignore", over="ignore"):
        share = (bias.astype(np.float64) / num_ranks).astype(bias.dtype)
        first = (bias.astype(np.float64) - (num_ranks - 1) * share.astype(np.float64)).astype(bias.dtype)
        first = np.where(bias == 0, bias, first)  # minus zero stays what it is
        total = _sum([first, *[share] * (num_ranks - 1)]).astype(bias.dtype)
    exact = total == bias
    first, share = np.where(exact, first, bias), np.where(exact, share, np.zeros_like(bias))
    return [first] + [share] * (num_ranks - 1)
