"""NumPy's legacy shuffle, bit for bit, at about twice its speed: it is most of the time of gpt-neox's index build.

`RandomState.shuffle` goes down an array and swaps x[i] with x[j], j drawn from [0, i] by taking the low bits of 32 at a
time until they are no more than i. Here thousands of draws are made and judged at once, and the swaps that share no
place with another are one gather and one scatter.
"""

import numpy as np

SMALL = 1 << 20  # below, draws are so close to each other that NumPy's own loop is as fast
DRAWS = 1 << 15  # at a time: the more, the less of the time is Python's
SWAPS = 1 << 13  # at a time: the lines of memory that these touch fit a core's cache
SLOTS = 1 << 20
_TURNS = np.arange(SWAPS, dtype=np.uint16)


def shuffle(random: np.random.RandomState, x: np.ndarray) -> None:
    """Does `random.shuffle(x)`, for x [n] contiguous: the same order, and the same state of `random` after it."""
    if len(x) <= 2**32:  # beyond, NumPy draws 64 bits
        slots = np.empty(SLOTS, np.uint16)
        last = len(x) - 1
        while last >= SMALL:
            targets = _draw(random, last)
            for start in range(0, len(targets), SWAPS):
                _swap(x, last - start, targets[start : start + SWAPS], slots)
            last -= len(targets)
        x = x[: last + 1]
    random.shuffle(x)


def _draw(random: np.random.RandomState, last: int) -> np.ndarray:
    """Targets of the swaps of places last, last - 1, ...: int64 [m], all with the bit length of `last`."""
    mask = (1 << last.bit_length()) - 1
    num_left = last - (mask >> 1)  # places that have this mask
    state = random.get_state(legacy=False) if num_left <= DRAWS else None
    draws = random.randint(0, 2**32, DRAWS, dtype=np.uint32) & np.uint32(mask)
    fits = draws <= last
    targets = draws[fits].astype(np.int64)
    # The bound falls by one with each draw that is kept; only those that are near it have to be judged in turn.
    doubtful = np.flatnonzero(targets > last - len(targets))
    rejected = []
    for k, target in zip(doubtful.tolist(), targets[doubtful].tolist(), strict=True):
        if target > last - (k - len(rejected)):
            rejected.append(k)
    if rejected:
        targets = np.delete(targets, rejected)
    if len(targets) >= num_left:  # what is behind was drawn with too many bits: draw again, no more than what is before
        kept = np.delete(np.flatnonzero(fits), rejected)
        random.set_state(state)
        random.randint(0, 2**32, kept[num_left - 1] + 1, dtype=np.uint32)
    return targets[:num_left]


def _swap(x: np.ndarray, last: int, targets: np.ndarray, slots: np.ndarray) -> None:
    """Swaps x[last - t] and x[targets[t]] for t = 0, 1, ..., as if one after the other."""
    turns = _TURNS[: len(targets)]
    slot = targets & (SLOTS - 1)
    slots[slot] = turns
    found = slots[slot]
    losers = np.flatnonzero(found != turns)  # another has the same slot, perhaps the same target
    hits = np.flatnonzero(targets > last - len(targets))  # the target is a place of its own turn
    in_turn = sorted({*losers.tolist(), *found[losers].tolist(), *hits.tolist(), *(last - targets[hits]).tolist()})
    view = memoryview(x)
    for t, target in zip(in_turn, targets[in_turn].tolist(), strict=True):
        view[last - t], view[target] = view[target], view[last - t]
    targets[in_turn] = last - np.array(in_turn, np.int64)  # done: each with itself
    places = x[last - len(targets) + 1 : last + 1][::-1]
    moved = x[targets]
    x[targets] = places.copy()
    places[:] = moved
