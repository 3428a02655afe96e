"""Batches as pure functions of the step, read ahead by one thread.

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

PREFETCH = 2  # batches prepared beyond the one in use


class Loader:
    """Global batches of `samples` (of `neox_jax.data.index`), int32 [B, T], laid out by `sharding` or on one device."""

    def __init__(self, samples, *, batch_size: int, seq_length: int, sharding: jax.sharding.Sharding | None = None):
        self._samples, self.sharding = samples, sharding
        self.batch_size, self.seq_length = batch_size, seq_length
        # Whole batches in one pass; None where samples are without end.
        self.num_batches = None if samples.num_samples is None else samples.num_samples // batch_size

    def host_batch(self, step: int) -> np.ndarray:
        """The whole of batch `step`: int32 [B, T]. Raises: InputError from the samples."""
        return self._rows(step, 0, self.batch_size)

    def batch(self, step: int) -> jax.Array:
        """Batch `step` on the devices, int32 [B, T]; with a sharding, a host reads only the rows its devices hold."""
        if self.sharding is None:
            return jax.numpy.asarray(self.host_batch(step))
        read = {}  # (first row, last row) -> tokens: devices that hold the same rows share one read

        def piece(index: tuple[slice, slice]) -> np.ndarray:
            first, last, _ = index[0].indices(self.batch_size)
            if (first, last) not in read:
                read[first, last] = self._rows(step, first, last)
            return read[first, last][:, index[1]]

        shape = (self.batch_size, self.seq_length + 1)
        return jax.make_array_from_callback(shape, self.sharding, piece, dtype=np.int32)

    def digest(self, step: int) -> str:
        """SHA-256, in hex, of the int32 tokens of batch `step` in row-major order."""
        return hashlib.sha256(self.host_batch(step).astype("<i4").tobytes()).hexdigest()

    def batches(self, start: int, stop: int | None = None) -> Iterator[tuple[int, jax.Array, float]]:
        """Yields (step, batch, seconds waited for it) from `start` until before `stop` (None: without end).

        One thread works PREFETCH batches ahead; it ends with the generator. What goes wrong in it is raised at the
        step that it belongs to.
        """
        steps = itertools.count(start) if stop is None else iter(range(start, stop))
        pending = collections.deque()
        reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="neox_jax.data.loader")
        try:
            while True:
                for step in itertools.islice(steps, PREFETCH + 1 - len(pending)):
                    pending.append((step, reader.submit(self.batch, step)))
                if not pending:
                    return
                step, future = pending.popleft()
                began = time.perf_counter()
                batch = future.result()
                yield step, batch, time.perf_counter() - began
        finally:
            reader.shutdown(wait=True, cancel_futures=True)

    def _rows(self, step: int, first: int, last: int) -> np.ndarray:
        return self._samples.rows(np.arange(step * self.batch_size + first, step * self.batch_size + last))
