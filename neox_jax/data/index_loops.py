"""The two loops of gpt-neox's index that are one step after the other, compiled by numba: NumPy's legacy shuffle, bit
for bit at several times its speed, and where each sample starts.

Both are bound by places of memory far from each other, so both first fill a block of what does not depend on these
(targets of swaps, sizes of documents): the processor then has many of them under way.
"""

import numpy as np

from neox_jax.errors import InputError

try:
    import numba
except ImportError as error:
    raise InputError("data.order megatron needs the numba package: pip install 'neox_jax[data]'") from error

BLOCK = 1 << 12


def shuffle(bits: np.random.MT19937, x: np.ndarray) -> None:
    """Does `np.random.RandomState(bits).shuffle(x)`, x [n]: the same order, and the same state of `bits` after it."""
    if len(x) > 2**32:  # NumPy draws 64 bits there
        return np.random.RandomState(bits).shuffle(x)
    _shuffle(x, bits.ctypes.next_uint32, bits.ctypes.state_address, np.empty(BLOCK, np.int64))


@numba.njit
def _shuffle(x, next_uint32, state, targets) -> None:
    """Down the array, x[i] is swapped with x[j], j from [0, i]: the low bits of 32, drawn until they are no more."""
    last = len(x) - 1
    while last > 0:
        half = 1  # the greatest power of two that is no more than `last`
        while 2 * half <= last:
            half *= 2
        num_swaps = min(len(targets), last - half + 1)  # all with the same number of bits
        k = 0
        while k < num_swaps:
            targets[k] = next_uint32(state) & (2 * half - 1)
            k += targets[k] <= last - k
        for k in range(num_swaps):
            x[last - k], x[targets[k]] = x[targets[k]], x[last - k]
        last -= num_swaps


@numba.njit
def locate_samples(sizes, doc_idx, seq_length, sample_idx) -> None:
    """Fills sample_idx [n + 1, 2]: of token k * seq_length the position in doc_idx and the offset in that document.

    sizes: int [N] in tokens, of which doc_idx, int [m], is an order; its documents hold more than n * seq_length.
    """
    block = np.empty(BLOCK, np.int64)
    end, token, row = 0, 0, 0
    for first in range(0, len(doc_idx), BLOCK):
        num_documents = min(BLOCK, len(doc_idx) - first)
        for k in range(num_documents):
            block[k] = sizes[doc_idx[first + k]]
        for k in range(num_documents):
            start, end = end, end + block[k]
            while token < end:
                sample_idx[row, 0] = first + k
                sample_idx[row, 1] = token - start
                token += seq_length
                row += 1
