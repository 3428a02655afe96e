"""gpt-neox's own order of samples, bit for bit: its index of one dataset, its blend of several, its split of documents.

Shapes: N documents, E epochs, n samples an index has, T = seq_length + 1 tokens a sample.
Source: EleutherAI/gpt-neox, megatron/data/gpt2_dataset.py, helpers.cpp and data_utils.py.
"""

import math

import numpy as np

from neox_jax.data.cache import cached_arrays
from neox_jax.data.megatron import IndexedDataset
from neox_jax.errors import InputError


class MegatronSamples:
    """gpt-neox's samples of one dataset: documents shuffled, laid end to end, cut, shuffled again.

    doc_idx: int32 [E * N], all epochs in one shuffle. sample_idx: int32 [n + 1, 2] (int64 where n is beyond 2^30),
    position in doc_idx and offset in that document of the first token of each sample, which is also the last one of the
    sample before. shuffle_idx: uint32 [n] (int64 from 2^32 - 2), sample k is row shuffle_idx[k]. n >= num_samples,
    since epochs are whole. The three are kept in files (`cache`) and mapped from there. documents: which of the
    dataset; all by default.
    Raises: InputError where the documents hold no tokens.
    """

    def __init__(
        self, dataset: IndexedDataset, *, seq_length: int, num_samples: int, seed: int, documents: range | None = None
    ):
        self.dataset, self.seq_length = dataset, seq_length
        documents = range(len(dataset)) if documents is None else documents
        tokens_per_epoch = int(dataset.sizes[documents.start : documents.stop].sum(dtype=np.int64))
        if not tokens_per_epoch:
            raise InputError(f"{dataset.prefix} has no tokens in {len(documents)} documents; nothing can be sampled")
        num_epochs = max(1, -(-(num_samples * seq_length + 1) // tokens_per_epoch))
        name = f"{num_epochs}-epochs-{seq_length}-tokens-seed-{seed}-documents-{documents.start}-{documents.stop}"
        arguments = {"documents": documents, "num_epochs": num_epochs, "seq_length": seq_length, "seed": seed}
        self.doc_idx, self.sample_idx, self.shuffle_idx = cached_arrays(
            dataset.prefix,
            f"{name}-sizes-{dataset.digest_sizes()[:16]}",
            ("doc_idx", "sample_idx", "shuffle_idx"),
            lambda: build_index(dataset.sizes, **arguments),
        )

    def __len__(self) -> int:
        return len(self.shuffle_idx)

    def __getitem__(self, i: int) -> np.ndarray:
        """The T tokens of sample i, in the dtype of the file."""
        return self.dataset.tokens.read(*self.runs(np.array([range(len(self))[i]])))

    def runs(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where in `dataset.tokens` samples [k] lie, end to end: starts and lengths, int64 [m], m >= k.

        A sample is a piece of each document that it touches; all of them are laid out at once.
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
        return self.dataset.pointers[documents] // self.dataset.dtype.itemsize + begins, ends - begins


def build_index(
    sizes: np.ndarray, *, documents: range, num_epochs: int, seq_length: int, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """doc_idx, sample_idx and shuffle_idx of `MegatronSamples`. sizes: int32 [N] of all documents of the dataset."""
    from neox_jax.data.index_loops import locate_samples, shuffle  # its compiler is loaded where an index is made

    bits = np.random.MT19937()
    np.random.RandomState(bits).seed(seed)  # one stream: the order of the two shuffles matters
    doc_idx = np.empty((num_epochs, len(documents)), np.int32)
    doc_idx[:] = np.arange(documents.start, documents.stop, dtype=np.int32)
    doc_idx = doc_idx.reshape(-1)
    shuffle(bits, doc_idx)
    num_tokens = num_epochs * int(sizes[documents.start : documents.stop].sum(dtype=np.int64))
    num_samples = (num_tokens - 1) // seq_length
    fits_int32 = 2 * ((num_tokens - 1) / seq_length + 1) < np.iinfo(np.int32).max  # gpt-neox's rule, division too
    sample_idx = np.empty((num_samples + 1, 2), np.int32 if fits_int32 else np.int64)
    locate_samples(sizes, doc_idx, seq_length, sample_idx)
    sample_idx[0] = 0  # an empty first document is not skipped
    shuffle_idx = np.arange(num_samples, dtype=np.uint32 if num_samples < 2**32 - 2 else np.int64)
    shuffle(bits, shuffle_idx)
    return doc_idx, sample_idx, shuffle_idx


def split_documents(split: str, num_documents: int) -> list[int]:
    """'969, 30, 1' -> the boundaries [0, a, b, num_documents] of train, valid and test documents.

    Parts that are left out are 0; '/' separates as ',' does. gpt-neox's rounding: each part by itself, the error
    taken off every boundary after 0 (where that would fall below 0, 0).
    Raises: InputError for anything but one to three numbers, not negative and not all 0.
    """
    boundaries = [0]
    for share in split_shares(split):
        boundaries.append(boundaries[-1] + round(share * float(num_documents)))
    error = boundaries[-1] - num_documents
    return [0] + [max(0, boundary - error) for boundary in boundaries[1:]]


def split_shares(split: str) -> list[float]:
    """The three parts of a split string, adding up to 1."""
    try:
        parts = [float(part) for part in split.replace("/", ",").split(",")]
    except ValueError:
        parts = []
    if not 1 <= len(parts) <= 3 or min(parts) < 0 or not 0 < sum(parts) < math.inf:
        raise InputError(f'data.split is {split!r}; wanted up to three shares of train, valid, test, as "969, 30, 1"')
    total = sum(parts)
    return [part / total for part in parts] + [0.0] * (3 - len(parts))
