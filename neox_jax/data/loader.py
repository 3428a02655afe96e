"""Batches as pure functions of the step, read ahead by several threads.

Indices: `step` counts global batches from 0; `row` counts within a batch; row r of step s is sample s * batch_size + r,
on any number of hosts. Nothing else is state: to resume is to start at another step.
Shapes: B batch_size over all hosts, T seq_length + 1 tokens (inputs and targets overlap in all but one).
"""

import collections
import hashlib
import itertools
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np

from neox_jax.marks import strip_marks

PREFETCH = 8  # batches prepared beyond the one in use: what memory they take on hosts and devices is bounded by this
READERS = 8  # threads; each reads a batch at a time, so a step may be much shorter than a read takes


def digest_batch(rows: np.ndarray) -> str:
    """SHA-256, in hex, of the int32 tokens [B, T] in row-major order, without their marks."""
    return hashlib.sha256(strip_marks(rows).astype("<i4").tobytes()).hexdigest()


class Loader:
    """Global batches of `samples` (of `neox_jax.data.index`), int32 [B, T], laid out by `sharding` or on one device."""

    def __init__(self, samples, *, batch_size: int, seq_length: int, sharding: jax.sharding.Sharding | None = None):
        self._samples, self.sharding = samples, sharding
        self.batch_size, self.seq_length = batch_size, seq_length
        # Whole batches in one pass; None where samples are without end.
        self.num_batches = None if samples.num_samples is None else samples.num_samples // batch_size

    def host_batch(self, step: int) -> np.ndarray:
        """The whole of batch `step`: int32 [B, T]. Raises: InputError from the samples."""
        return self._samples.rows(np.arange(step * self.batch_size, (step + 1) * self.batch_size))

    def batch(self, step: int) -> jax.Array:
        """Batch `step` on the devices, int32 [B, T]; with a sharding, a host reads only the rows its devices hold."""
        if self.sharding is None:
            return jax.numpy.asarray(self.host_batch(step))
        shape = (self.batch_size, self.seq_length + 1)
        places = self.sharding.addressable_devices_indices_map(shape).values()
        ranges = sorted({place[0].indices(self.batch_size)[:2] for place in places})  # many devices may hold the same
        read = self._samples.rows(
            np.concatenate([step * self.batch_size + np.arange(first, last) for first, last in ranges])
        )
        ends = np.cumsum([last - first for first, last in ranges])
        rows = dict(zip(ranges, np.split(read, ends[:-1]), strict=True))

        def piece(place: tuple[slice, slice]) -> np.ndarray:
            return rows[place[0].indices(self.batch_size)[:2]][:, place[1]]

        return jax.make_array_from_callback(shape, self.sharding, piece, dtype=np.int32)

    def digest(self, step: int) -> str:
        """`digest_batch` of all of batch `step`."""
        return digest_batch(self.host_batch(step))

    def batches(self, start: int, stop: int | None = None) -> Iterator[tuple[int, jax.Array, float]]:
        """Yields (step, batch, seconds waited for it) from `start` until before `stop` (None: without end).

        READERS threads work PREFETCH batches ahead; they end with the generator. What goes wrong in them is raised at
        the step that it belongs to.
        """
        steps = itertools.count(start) if stop is None else iter(range(start, stop))
        pending = collections.deque()
        readers = ThreadPoolExecutor(max_workers=READERS, thread_name_prefix="neox_jax.data.loader")
        try:
            while True:
                for step in itertools.islice(steps, PREFETCH + 1 - len(pending)):
                    pending.append((step, readers.submit(self.batch, step)))
                if not pending:
                    return
                step, future = pending.popleft()
                began = time.perf_counter()
                batch = future.result()
                yield step, batch, time.perf_counter() - began
        finally:
            readers.shutdown(wait=True, cancel_futures=True)
