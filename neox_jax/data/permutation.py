"""Orders that are computed and not stored: any place of them at once, in time that does not depend on it.

A permutation of [0, n) is a Feistel network of 16 half-rounds over a rectangle that holds n places, walked on from
those outside. `Interleave` deals a sequence out to several by weight.   Source of the idea: Black and Rogaway, Ciphers
with arbitrary finite domains (2002); the mixing function is SplitMix64 (Steele, Lea, Flood 2014).
"""

import heapq
import math

import numpy as np

HALF_ROUNDS = 16  # so many for small n: with 8, permutations of 5 are not all as likely


def mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's output for the state x: uint64 [n] -> [n], a bijection that changes about half of the bits."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(places: np.ndarray, n: int, keys: np.ndarray) -> np.ndarray:
    """`Permutations` of one n: int64 [m] below n, keys uint64 [m] -> int64 [m] below n."""
    return Permutations([n]).permute(np.zeros(len(places), np.int64), places, keys)


class Permutations:
    """A permutation of [0, n) for each n of `sizes` and each key."""

    def __init__(self, sizes: list[int]):
        heights = [_next_even(math.isqrt(n - 1) + 1) for n in sizes]
        widths = [_next_even(-(-n // height)) for n, height in zip(sizes, heights, strict=True)]
        self._sizes, self._heights, self._widths = (np.array(x, np.uint64) for x in (sizes, heights, widths))

    def permute(self, which: np.ndarray, places: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """Where places below sizes[which] go, each under a key of its own: int64, int64, uint64 [m] -> int64 [m]."""
        n, height, width = self._sizes[which], self._heights[which], self._widths[which]
        places = _rounds(places.astype(np.uint64), height, width, keys)
        outside = np.flatnonzero(places >= n)
        while len(outside):
            places[outside] = _rounds(places[outside], height[outside], width[outside], keys[outside])
            outside = outside[places[outside] >= n[outside]]
        return places.astype(np.int64)


def _next_even(x: int) -> int:
    return x + x % 2  # to rotate an odd number of places is an even permutation, and of those no odd one is made


def _rounds(places: np.ndarray, height: np.ndarray, width: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """One pass over rectangles: uint64 [m] below height * width -> the same, a bijection for each key."""
    row, column = np.divmod(places, width)
    for k in range(0, HALF_ROUNDS, 2):
        row = (row + _half(keys ^ (column * np.uint64(HALF_ROUNDS) + np.uint64(k)))) % height
        column = (column + _half(keys ^ (row * np.uint64(HALF_ROUNDS) + np.uint64(k + 1)))) % width
    return row * width + column


def _half(x: np.ndarray) -> np.ndarray:
    return mix(x) >> np.uint64(1)  # so that a row or column can be added to it


class Interleave:
    """Deals 0, 1, 2, ... out to parts by weight, each part getting its own 0, 1, 2, ...

    A binary tree halves the sequence again and again: of the first i that come to a node, its first child gets
    floor(i * share + 1/2), so that after any i each part is within 2 of its share, and mostly within 1. Each child's
    share of its node is a multiple of 2^-32. The tree is Huffman's, so a part of a large weight is near the root.
    """

    def __init__(self, weights):
        total = float(sum(weights))
        self._children = np.array([[d, d] for d in range(len(weights))])  # leaves first; they go on in themselves
        self._shares = np.full(len(weights), 1 << 32, np.uint64)
        nodes = [(weight / total, d) for d, weight in enumerate(weights)]
        self._depth, depths = 0, [0] * len(weights)
        heapq.heapify(nodes)
        while len(nodes) > 1:
            (light, second), (heavy, first) = heapq.heappop(nodes), heapq.heappop(nodes)
            share = min(max(round(heavy / (light + heavy) * 2**32), 1), 2**32 - 1)
            self._children = np.append(self._children, [[first, second]], axis=0)
            self._shares = np.append(self._shares, np.uint64(share))
            depths.append(1 + max(depths[first], depths[second]))
            heapq.heappush(nodes, (light + heavy, len(depths) - 1))
        self._root, self._depth = len(depths) - 1, depths[-1]

    def locate(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """int64 [n] -> the part that each goes to, and its number there: int64 [n] each."""
        local, node = index.astype(np.uint64), np.full(len(index), self._root)
        for _ in range(self._depth):
            share = self._shares[node]
            before, after = _times(local, share), _times(local + np.uint64(1), share)
            second = after == before
            local = np.where(second, local - before, before)
            node = self._children[node, second.astype(np.int64)]
        return node, local.astype(np.int64)


def _times(count: np.ndarray, share: np.ndarray) -> np.ndarray:
    """floor(count * share / 2^32 + 1/2), exactly, for counts below 2^63: uint64 [n] each."""
    low = count & np.uint64(0xFFFFFFFF)
    return (count >> np.uint64(32)) * share + ((low * share + np.uint64(1 << 31)) >> np.uint64(32))
