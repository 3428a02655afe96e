"""Which tokens are sample k: the orders in which rows of tokens are read, each a pure function of the sample number.

Shapes: n rows asked for, T = seq_length + 1 tokens a row (inputs and targets overlap in all but one), N documents.
Every order has `samples_per_epoch`, `num_samples` (None: it has no end) and `rows(indices [n]) -> int32 [n, T]`, for
any indices from 0, in any sequence.
"""

import dataclasses
import math
import numbers

import numpy as np

from neox_jax.config import DataConfig
from neox_jax.data.megatron import IndexedDataset
from neox_jax.errors import InputError


@dataclasses.dataclass(frozen=True, eq=False)
class Windows:
    """Rows of T tokens every `stride` tokens, over documents [first, last) laid end to end as they lie in the file."""

    dataset: IndexedDataset
    first: int
    last: int
    seq_length: int
    stride: int

    def __len__(self) -> int:
        num_tokens = int(self.dataset.sizes[self.first : self.last].sum(dtype=np.int64))
        return max(0, (num_tokens - self.seq_length - 1) // self.stride + 1)

    def positions(self, samples: np.ndarray) -> np.ndarray:
        """Where in `dataset.tokens` samples [n] lie: int64 [n, T]."""
        first_token = self.dataset.pointers[self.first] // self.dataset.dtype.itemsize
        starts = first_token + samples.astype(np.int64) * self.stride
        return starts[:, None] + np.arange(self.seq_length + 1)


class MegatronSamples:
    """gpt-neox's own samples of one dataset, bit for bit: documents shuffled, laid end to end, cut, shuffled again.

    doc_idx: int32 [epochs * documents], all epochs in one shuffle. sample_idx: int32 [n + 1, 2] (int64 where n is
    beyond 2^30), position in doc_idx and offset in that document of the first token of each sample, which is also the
    last one of the sample before. shuffle_idx: uint32 [n], sample k is row shuffle_idx[k]. n >= num_samples, since
    epochs are whole.   Source: EleutherAI/gpt-neox, megatron/data/gpt2_dataset.py and helpers.cpp.
    Raises: InputError where the documents hold no tokens.
    """

    def __init__(self, dataset: IndexedDataset, *, seq_length: int, num_samples: int, seed: int, documents=None):
        self.dataset, self.seq_length = dataset, seq_length
        documents = np.arange(len(dataset), dtype=np.int32) if documents is None else np.asarray(documents, np.int32)
        sizes = np.asarray(dataset.sizes)
        tokens_per_epoch = int(sizes[documents].sum(dtype=np.int64))
        if not tokens_per_epoch:
            raise InputError(f"{dataset.prefix} has no tokens in {len(documents)} documents; nothing can be sampled")
        num_epochs = max(1, math.ceil((num_samples * seq_length + 1) / tokens_per_epoch))
        n = (num_epochs * tokens_per_epoch - 1) // seq_length
        random = np.random.RandomState(seed)  # one stream: the order of the two shuffles matters
        self.doc_idx = np.tile(documents, num_epochs)
        random.shuffle(self.doc_idx)
        self.sample_idx = _sample_idx(sizes[self.doc_idx], seq_length, n)
        self.shuffle_idx = np.arange(n, dtype=np.uint32 if n < 2**32 - 2 else np.int64)
        random.shuffle(self.shuffle_idx)

    def __len__(self) -> int:
        return len(self.shuffle_idx)

    def __getitem__(self, i: int) -> np.ndarray:
        """The T tokens of sample i, in the dtype of the file."""
        return self.dataset.tokens[self.positions(np.array([range(len(self))[i]]))[0]]

    def positions(self, samples: np.ndarray) -> np.ndarray:
        """Where in `dataset.tokens` samples [n] lie: int64 [n, T].

        A sample is a run of pieces, one from each document that it touches; all of them are laid out at once.
        """
        rows = self.shuffle_idx[samples].astype(np.int64)
        first, last = self.sample_idx[rows].astype(np.int64), self.sample_idx[rows + 1].astype(np.int64)
        num_pieces = last[:, 0] - first[:, 0] + 1
        piece_ends = np.cumsum(num_pieces)
        piece = np.arange(num_pieces.sum()) - np.repeat(piece_ends - num_pieces, num_pieces)  # within its sample
        documents = self.doc_idx[np.repeat(first[:, 0], num_pieces) + piece]
        begins = np.zeros(len(piece), np.int64)
        begins[piece_ends - num_pieces] = first[:, 1]
        ends = self.dataset.sizes[documents].astype(np.int64)
        ends[piece_ends - 1] = last[:, 1] + 1
        starts = self.dataset.pointers[documents] // self.dataset.dtype.itemsize + begins
        return _concatenated_ranges(starts, ends - begins).reshape(len(samples), self.seq_length + 1)


def _sample_idx(doc_sizes: np.ndarray, seq_length: int, num_samples: int) -> np.ndarray:
    """[num_samples + 1, 2] from the sizes of documents in their shuffled order."""
    ends = np.cumsum(doc_sizes, dtype=np.int64)
    tokens = np.arange(num_samples + 1, dtype=np.int64) * seq_length
    positions = np.searchsorted(ends, tokens, side="right")
    offsets = tokens - ends[positions] + doc_sizes[positions]
    fits_int32 = 2 * ((int(ends[-1]) - 1) / seq_length + 1) < np.iinfo(np.int32).max  # gpt-neox's rule, division too
    sample_idx = np.stack([positions, offsets], axis=1).astype(np.int32 if fits_int32 else np.int64)
    sample_idx[0] = 0  # an empty first document is not skipped
    return sample_idx


def _concatenated_ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """arange(starts[0], starts[0] + lengths[0]), then arange(starts[1], ...) and so on, as one array."""
    ends = np.cumsum(lengths)
    return np.repeat(starts - (ends - lengths), lengths) + np.arange(ends[-1])


def blend_indices(weights, size: int) -> tuple[np.ndarray, np.ndarray]:
    """gpt-neox's blend of datasets: for each of `size` samples, the dataset (uint8) and the sample in it (int64).

    Sample i goes to the dataset that is furthest behind its share, w_d * max(i, 1) - count_d; ties to the first.
    Any shorter size gives a prefix of the same blend.   Source: EleutherAI/gpt-neox, megatron/data/helpers.cpp.
    """
    weights = np.asarray(weights, np.float64)
    shares = (weights / weights.sum()).tolist()  # plain floats: quicker here than arrays of a few elements
    counts = [0] * len(shares)
    dataset_index, dataset_sample_index = np.empty(size, np.uint8), np.empty(size, np.int64)
    datasets = range(len(shares))
    for i in range(size):
        expected = float(max(i, 1))
        behind = [shares[d] * expected - counts[d] for d in datasets]
        d = behind.index(max(behind))
        dataset_index[i], dataset_sample_index[i] = d, counts[d]
        counts[d] += 1
    return dataset_index, dataset_sample_index


def split_documents(split: str, num_documents: int) -> list[int]:
    """'969, 30, 1' -> the boundaries [0, a, b, num_documents] of train, valid and test documents.

    Parts that are left out are 0; '/' separates as ',' does. gpt-neox's rounding: each part by itself, the error
    taken off every boundary after 0 (where that would fall below 0, 0).
    Raises: InputError for anything but one to three numbers, not negative and not all 0.
    """
    boundaries = [0]
    for share in _split_shares(split):
        boundaries.append(boundaries[-1] + round(share * float(num_documents)))
    error = boundaries[-1] - num_documents
    return [0] + [max(0, boundary - error) for boundary in boundaries[1:]]


def _split_shares(split: str) -> list[float]:
    """The three parts of a split string, adding up to 1."""
    try:
        parts = [float(part) for part in split.replace("/", ",").split(",")]
    except ValueError:
        parts = []
    if not 1 <= len(parts) <= 3 or min(parts) < 0 or not 0 < sum(parts) < math.inf:
        raise InputError(f'data.split is {split!r}; wanted up to three shares of train, valid, test, as "969, 30, 1"')
    total = sum(parts)
    return [part / total for part in parts] + [0.0] * (3 - len(parts))


class _Samples:
    """What the orders share: from the sample number to (part, sample in it), and from there to checked tokens."""

    def __init__(self, parts: list, *, seq_length: int, vocab_size: int):
        self.parts, self.seq_length, self.vocab_size = parts, seq_length, vocab_size

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """The tokens of these samples: int64 [n] -> int32 [n, T].

        Raises: InputError for a token outside the vocabulary, or a sample past the end.
        """
        indices = np.asarray(indices, np.int64)
        assert (indices >= 0).all(), "samples are numbered from 0"
        if self.num_samples is not None and indices.max(initial=-1) >= self.num_samples:
            raise InputError(self._past_the_end(int(indices.max())))
        which, local = self._locate(indices)
        rows = np.empty((len(indices), self.seq_length + 1), np.int32)
        for d in np.unique(which):
            mine = which == d
            positions = self.parts[d].positions(local[mine])
            rows[mine] = read_tokens(self.parts[d].dataset, positions, vocab_size=self.vocab_size)
        return rows


class ShuffledSamples(_Samples):
    """Windows in a new order each epoch, without end; several parts are mixed by weight. By grain's MapDataset.

    Each epoch of a part has each of its windows once. With several parts, each has epochs of its own length.
    """

    num_samples = None

    def __init__(self, parts: list[Windows], *, weights, seed: int, seq_length: int, vocab_size: int):
        import grain

        super().__init__(parts, seq_length=seq_length, vocab_size=vocab_size)
        self._ends = np.cumsum([len(part) for part in parts])
        self.samples_per_epoch = int(self._ends[-1])
        # grain shuffles epoch e by seed + e, so neighbouring seeds would repeat each other's epochs: spread them
        seeds = np.random.SeedSequence(seed).generate_state(len(parts))
        shuffled = [  # shuffle, then repeat: the other way round samples with replacement
            grain.MapDataset.range(int(end) - len(part), int(end)).shuffle(seed=int(part_seed)).repeat(None)
            for part, end, part_seed in zip(parts, self._ends, seeds, strict=True)
        ]
        self._order = shuffled[0] if len(parts) == 1 else grain.MapDataset.mix(shuffled, weights)

    def _locate(self, indices):
        windows = np.array([self._order[int(i)] for i in indices], np.int64)  # numbered through all parts
        which = np.searchsorted(self._ends, windows, side="right")
        return which, windows - np.append(0, self._ends)[which]


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
        self._blend = blend_indices(weights, num_samples) if len(parts) > 1 else None

    def _past_the_end(self, index: int) -> str:
        return (
            f"order=megatron was built for {self.num_samples} samples; wanted sample {index} (from 0): set "
            "data.num_samples to the samples of the whole run (another number is another order)"
        )

    def _locate(self, indices):
        if self._blend is None:
            return np.zeros(len(indices), np.int64), indices
        return self._blend[0][indices], self._blend[1][indices]


def read_tokens(dataset: IndexedDataset, positions: np.ndarray, *, vocab_size: int) -> np.ndarray:
    """The tokens at these positions of the flat file, as int32 of the same shape.

    Raises: InputError naming the document and the place in it of the first token that is not below vocab_size, or for
    a file that was cut off meanwhile.
    """
    dataset.check_whole()
    tokens = dataset.tokens[positions]
    wrong = (tokens < 0) | (tokens >= vocab_size)
    if wrong.any():
        first = np.unravel_index(np.argmax(wrong), wrong.shape)
        byte = int(positions[first]) * dataset.dtype.itemsize
        document = int(np.searchsorted(dataset.pointers, byte, side="right")) - 1
        place = (byte - int(dataset.pointers[document])) // dataset.dtype.itemsize
        raise InputError(
            f"{dataset.prefix}.bin: token {tokens[first]} at position {place} of document {document} is not in the "
            f"vocabulary of {vocab_size}; set model.vocab_size to that of the tokenizer which made the file"
        )
    return tokens.astype(np.int32)


def open_samples(data: DataConfig, which: str, *, seq_length: int, num_samples: int, vocab_size: int):
    """The samples of `which` ("train" or "valid"): an object with `rows`, `num_samples`, `samples_per_epoch`.

    train is in data.order. valid is data.valid, or the second share of data.split of data.train, always in file
    order; None where there is neither. num_samples: what the run will ask for, for order=megatron, unless
    data.num_samples says. A list of prefixes without weights is mixed in equal shares, as gpt-neox does it.
    Raises: InputError for files and settings that will not do.
    """
    assert which in ("train", "valid"), which
    if not 0 <= data.seed < 2**32:
        raise InputError(f"data.seed is {data.seed}; wanted a number from 0 to 2**32 - 1")
    if which == "valid" and not data.valid:
        share = 1
        if not data.split or not _split_shares(data.split)[share]:
            return None
        field = "train"
    else:
        share, field = (0 if data.split and not data.valid else None), which
    prefixes, weights = _parse_sources(f"data.{field}", getattr(data, field))
    order = data.order if which == "train" else "sequential"
    if order == "sequential" and weights is not None:
        raise InputError(f"data.{field} has weights, but is read in file order; give the prefixes alone")
    ranges = [_document_range(prefix, share, data.split) for prefix in prefixes]
    for dataset, first, last in ranges:
        _check_tokens(f"data.{field}", dataset, first, last, seq_length)
    common = {"seq_length": seq_length, "vocab_size": vocab_size}
    weights = np.ones(len(prefixes)) if weights is None else weights
    if order == "megatron":
        return _open_megatron(ranges, weights, seed=data.seed, num_samples=data.num_samples or num_samples, **common)
    if order == "shuffled":
        windows = [Windows(*documents, seq_length, seq_length) for documents in ranges]
        return ShuffledSamples(windows, weights=weights, seed=data.seed, **common)
    windows = [Windows(*documents, seq_length, _file_stride(*documents, seq_length)) for documents in ranges]
    return SequentialSamples(windows, which=which, **common)


def _open_megatron(ranges, weights, *, seed, num_samples, seq_length, vocab_size) -> BlendedSamples:
    shares = [float(weight) / sum(weights) for weight in weights]  # normalised here and in blend_indices, as there
    counts = [num_samples] if len(ranges) == 1 else [math.ceil(num_samples * share * 1.005) for share in shares]
    parts = [
        MegatronSamples(dataset, seq_length=seq_length, num_samples=n, seed=seed, documents=np.arange(first, last))
        for (dataset, first, last), n in zip(ranges, counts, strict=True)
    ]
    return BlendedSamples(parts, weights=shares, num_samples=num_samples, seq_length=seq_length, vocab_size=vocab_size)


def _parse_sources(field: str, value) -> tuple[list[str], list[float] | None]:
    """A prefix, a list of prefixes, or a list of (prefix, weight) -> prefixes and weights, None where none is given."""
    entries = [value] if isinstance(value, str) else list(value)
    pairs = [(entry, None) if isinstance(entry, str) else entry for entry in entries]
    for pair in pairs:
        good = isinstance(pair, (tuple, list)) and len(pair) == 2 and isinstance(pair[0], str) and pair[0]
        if not good or not (pair[1] is None or (isinstance(pair[1], numbers.Real) and 0 < pair[1] < math.inf)):
            break
    else:
        weights = [weight for _, weight in pairs]
        if pairs and (all(w is None for w in weights) or None not in weights):
            return [prefix for prefix, _ in pairs], (None if None in weights else [float(w) for w in weights])
    raise InputError(
        f"{field} is {value!r}; wanted the prefix of .bin/.idx files, a list of prefixes, or a list of "
        "(prefix, weight) pairs with weights above 0"
    )


def _document_range(prefix: str, share: int | None, split: str) -> tuple[IndexedDataset, int, int]:
    """Opens a dataset: (dataset, first, last), the documents of this share of the split, or all of them."""
    dataset = IndexedDataset(prefix)
    if dataset.dtype.kind == "f":
        raise InputError(f"{prefix}.idx says that its data are {dataset.dtype}; tokens are whole numbers")
    if share is None:
        return dataset, 0, len(dataset)
    boundaries = split_documents(split, len(dataset))
    return dataset, boundaries[share], boundaries[share + 1]


def _check_tokens(field: str, dataset: IndexedDataset, first: int, last: int, seq_length: int) -> None:
    num_tokens = int(dataset.sizes[first:last].sum(dtype=np.int64))
    if num_tokens < seq_length + 1:
        raise InputError(
            f"{field}: {dataset.prefix} has {num_tokens} tokens in documents {first} to {last}; a sample of "
            f"train.seq_length {seq_length} needs {seq_length + 1}: give more text or shorten train.seq_length"
        )


def _file_stride(dataset: IndexedDataset, first: int, last: int, seq_length: int) -> int:
    """How far apart rows lie in a file read in order: documents of exactly T tokens (Pythia's) are rows already."""
    return seq_length + 1 if (dataset.sizes[first:last] == seq_length + 1).all() else seq_length
