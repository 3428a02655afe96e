"""gpt-neox's blend of datasets, bit for bit, many stretches of it at once.

The rule goes sample by sample, each choice from the counts that those before have left. But counts that are wrong soon
become right: whichever dataset is ahead is not chosen until it no longer is. So stretches start side by side from
guessed counts, and those that did not start where the one before has ended are done again from there.

Shapes: S stretches, L samples each, D datasets.   Source: EleutherAI/gpt-neox, megatron/data/helpers.cpp.
"""

import math

import numpy as np

from neox_jax.errors import InputError

STRETCH = 512
BLOCK = 2048 * STRETCH  # samples worked on at a time: bounds the memory


def blend_indices(weights, size: int) -> tuple[np.ndarray, np.ndarray]:
    """For each of `size` samples, the dataset (uint8 [size]) and the sample in it (int64 [size]).

    Sample i goes to the dataset that is furthest behind its share, w_d * max(i, 1) - count_d in float64; ties to the
    first. Any shorter size gives a prefix of the same blend.
    Raises: InputError for weights that are not above 0, or more than 256.
    """
    weights = np.asarray(weights, np.float64)
    if not (0 < len(weights) <= 256 and (weights > 0).all() and weights.sum() < math.inf):
        raise InputError(f"{weights.tolist()} are no weights to blend by; wanted 1 to 256 numbers above 0")
    shares = weights / weights.sum()
    dataset_index, dataset_sample_index = np.empty(size, np.uint8), np.empty(size, np.int64)
    counts = np.zeros(len(shares))
    for start in range(0, size, BLOCK):
        stop = min(start + BLOCK, size)
        which, sample, counts = _blend_block(shares, counts, start, stop - start)
        dataset_index[start:stop], dataset_sample_index[start:stop] = which, sample
    return dataset_index, dataset_sample_index


def _blend_block(shares: np.ndarray, counts: np.ndarray, start: int, size: int):
    """Samples [start, start + size), after counts [D] -> (dataset [size], sample in it [size], counts after [D])."""
    starts = np.arange(start, start + size, STRETCH)
    begin = _guess_counts(shares, starts)  # [S, D]
    begin[0] = counts
    end = np.empty_like(begin)
    which = np.empty((len(starts), STRETCH), np.uint8)
    sample = np.empty((len(starts), STRETCH), np.int64)
    wrong = np.arange(len(starts))
    while len(wrong):
        end[wrong], which[wrong], sample[wrong] = _blend_stretches(shares, begin[wrong], starts[wrong])
        wrong = 1 + np.flatnonzero((begin[1:] != end[:-1]).any(axis=1))
        begin[wrong] = end[wrong - 1]
    which, sample = which.reshape(-1)[:size], sample.reshape(-1)[:size]
    return which, sample, counts + np.bincount(which, minlength=len(shares))


def _guess_counts(shares: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """About what the counts are before samples [S]: shares rounded down, what is left to the largest remainders."""
    exact = starts[:, None] * shares
    counts = np.floor(exact)
    left = starts - counts.sum(axis=1)
    rank = np.argsort(np.argsort(counts - exact, axis=1, kind="stable"), axis=1)
    return counts + (rank < left[:, None])


def _blend_stretches(shares: np.ndarray, counts: np.ndarray, starts: np.ndarray):
    """The rule, side by side: counts [S, D] before starts [S] -> (counts after [S, D], dataset and sample [S, L])."""
    counts, rows = counts.copy(), np.arange(len(starts))
    which = np.empty((STRETCH, len(starts)), np.uint8)
    sample = np.empty((STRETCH, len(starts)), np.int64)
    for k in range(STRETCH):
        behind = np.maximum(starts + k, 1).astype(np.float64)[:, None] * shares - counts
        which[k] = behind.argmax(axis=1)
        sample[k] = counts[rows, which[k]]
        counts[rows, which[k]] += 1
    return counts, which.T, sample.T
