"""Opens the data that a configuration names: the order of samples over them, everything checked."""

import math
import numbers

import numpy as np

from neox_jax.config import DataConfig
from neox_jax.data.gpt_neox import MegatronSamples, split_documents, split_shares
from neox_jax.data.megatron import IndexedDataset
from neox_jax.data.orders import BlendedSamples, SequentialSamples, ShuffledSamples, Windows
from neox_jax.errors import InputError


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
        if not data.split or not split_shares(data.split)[share]:
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
        MegatronSamples(dataset, seq_length=seq_length, num_samples=n, seed=seed, documents=range(first, last))
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
