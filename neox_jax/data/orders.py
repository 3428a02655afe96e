"""The orders in which rows of tokens are read, each a pure function of the sample number.

Shapes: k rows asked for, m runs of tokens that make them up, T = seq_length + 1 tokens a row (inputs and targets
overlap in all but one). A part is some documents of one dataset; it has `dataset`, a length, and `runs`.
Every order has `samples_per_epoch`, `num_samples` (None: it has no end) and `rows(indices [k]) -> int32 [k, T]`, for
any indices from 0, in any sequence.
"""

import dataclasses
import functools
import hashlib

import numpy as np

from neox_jax.data.blend import blend_indices
from neox_jax.data.cache import cached_arrays
from neox_jax.data.gpt_neox import MegatronSamples
from neox_jax.data.megatron import IndexedDataset
from neox_jax.data.permutation import Interleave, Permutations, mix
from neox_jax.errors import InputError


@dataclasses.dataclass(frozen=True, eq=False)
class Windows:
    """Rows of T tokens every `stride` tokens, over documents [first, last) laid end to end as they lie in the file."""

    dataset: IndexedDataset
    first: int
    last: int
    seq_length: int
    stride: int

    @functools.cached_property
    def _num_windows(self) -> int:
        num_tokens = int(self.dataset.sizes[self.first : self.last].sum(dtype=np.int64))
        return max(0, (num_tokens - self.seq_length - 1) // self.stride + 1)

    def __len__(self) -> int:
        return self._num_windows

    def runs(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where in `dataset.tokens` samples [k] lie, end to end: starts and lengths, int64 [m] with m = k."""
        first_token = self.dataset.pointers[self.first] // self.dataset.dtype.itemsize
        return first_token + samples * self.stride, np.full(len(samples), self.seq_length + 1)


@dataclasses.dataclass(frozen=True)
class Piece:
    """Tokens [offset, offset + length) of one document of the dataset `prefix`."""

    prefix: str
    document: int
    offset: int
    length: int


class _Samples:
    """What the orders share: from the sample number to (part, sample in it), and from there to checked tokens."""

    def __init__(self, parts: list, *, seq_length: int, vocab_size: int):
        self.parts, self.seq_length, self.vocab_size = parts, seq_length, vocab_size

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """The tokens of these samples: int64 [k] -> int32 [k, T].

        Raises: InputError for a token outside the vocabulary, or a sample past the end.
        """
        indices = np.asarray(indices, np.int64)
        rows = np.empty((len(indices), self.seq_length + 1), np.int32)
        which, local = self._find(indices)
        for d in np.unique(which):
            mine = np.flatnonzero(which == d)
            part = self.parts[d]
            tokens = read_tokens(part.dataset, *part.runs(local[mine]), vocab_size=self.vocab_size)
            rows[mine] = tokens.reshape(len(mine), self.seq_length + 1)
        return rows

    def pieces(self, index: int) -> list[Piece]:
        """What sample `index` is made of, in order: for people to look at."""
        which, local = self._find(np.array([index]))
        part = self.parts[which[0]]
        return [
            Piece(part.dataset.prefix, *piece)
            for start, length in zip(*part.runs(local), strict=True)
            for piece in part.dataset.locate(int(start), int(length))
        ]

    def _find(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        assert (indices >= 0).all(), "samples are numbered from 0"
        if self.num_samples is not None and indices.max(initial=-1) >= self.num_samples:
            raise InputError(self._past_the_end(int(indices.max())))
        return self._locate(indices)


class ShuffledSamples(_Samples):
    """Windows in a new order each epoch, without end; several parts are mixed by weight.

    Each epoch of a part has each of its windows once. With several parts, each has epochs of its own length.
    """

    num_samples = None

    def __init__(self, parts: list[Windows], *, weights, seed: int, seq_length: int, vocab_size: int):
        super().__init__(parts, seq_length=seq_length, vocab_size=vocab_size)
        self.samples_per_epoch = sum(map(len, parts))
        self._interleave, self._permutations = Interleave(weights), Permutations([len(part) for part in parts])
        self._sizes = np.array([len(part) for part in parts])
        self._keys = mix(mix(np.full(len(parts), seed, np.uint64)) ^ np.arange(len(parts), dtype=np.uint64))

    def _locate(self, indices):
        which, local = self._interleave.locate(indices)
        epochs, places = np.divmod(local, self._sizes[which])
        return which, self._permutations.permute(which, places, mix(self._keys[which] ^ epochs.astype(np.uint64)))


class SequentialSamples(_Samples):
    """Windows in the order of the files, one part after the other, once. which: "train" or "valid", for messages."""

    def __init__(self, parts: list[Windows], *, which: str, seq_length: int, vocab_size: int):
        super().__init__(parts, seq_length=seq_length, vocab_size=vocab_size)
        self._which = which
        self._ends = np.cumsum([len(part) for part in parts])
        self.num_samples = self.samples_per_epoch = int(self._ends[-1])

    def _past_the_end(self, index: int) -> str:
        change = "train.steps or train.batch_size" if self._which == "train" else "eval.batches"
        return (
            f"the {self._which} data have {self.num_samples} samples in file order; wanted sample {index} (from 0): "
            f"lower {change}, or give more data"
        )

    def _locate(self, indices):
        which = np.searchsorted(self._ends, indices, side="right")
        return which, indices - np.append(0, self._ends)[which]


class BlendedSamples(_Samples):
    """gpt-neox's order over num_samples samples: MegatronSamples, blended by weight where there are several."""

    def __init__(self, parts: list[MegatronSamples], *, weights, num_samples: int, seq_length: int, vocab_size: int):
        super().__init__(parts, seq_length=seq_length, vocab_size=vocab_size)
        self.num_samples = self.samples_per_epoch = num_samples
        self._blend = None
        if len(parts) > 1:
            digest = hashlib.sha256(np.asarray(weights, np.float64)).hexdigest()[:16]
            self._blend = cached_arrays(
                parts[0].dataset.prefix,
                f"blend-of-{num_samples}-weights-{digest}",
                ("dataset_index", "dataset_sample_index"),
                lambda: blend_indices(weights, num_samples),
            )

    def _past_the_end(self, index: int) -> str:
        return (
            f"order=megatron was built for {self.num_samples} samples; wanted sample {index} (from 0): set "
            "data.num_samples to the samples of the whole run (another number is another order)"
        )

    def _locate(self, indices):
        if self._blend is None:
            return np.zeros(len(indices), np.int64), indices
        return self._blend[0][indices], self._blend[1][indices]


def read_tokens(dataset: IndexedDataset, starts: np.ndarray, lengths: np.ndarray, *, vocab_size: int) -> np.ndarray:
    """The tokens of these runs [m] of the .bin, one after the other, in the dtype of the file.

    Raises: InputError naming the document and the place in it of the first token that is not below vocab_size, or for
    a file that was cut off meanwhile.
    """
    tokens = dataset.tokens.read(starts, lengths)
    if len(tokens) and (tokens.max() >= vocab_size or tokens.min() < 0):
        k = int(np.argmax((tokens < 0) | (tokens >= vocab_size)))
        ends = np.cumsum(lengths)
        run = int(np.searchsorted(ends, k, side="right"))
        place = int(starts[run] + k - (ends[run] - lengths[run]))
        document, offset, _ = dataset.locate(place, 1)[0]
        raise InputError(
            f"{dataset.tokens.place(place)}: token {tokens[k]} at position {offset} of document {document} is not in "
            f"the vocabulary of {vocab_size}; set model.vocab_size to that of the tokenizer which made the file"
        )
    return tokens
