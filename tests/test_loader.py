"""The loader: batches as functions of their step, read ahead."""

import hashlib
import threading
import time

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from token_data import open_train, write_sizes

from neox_jax.data.loader import PREFETCH, READERS, Loader
from neox_jax.errors import InputError

# --- the loader


class Counting:
    """Samples whose tokens are their number; remembers what was read, and fails where told."""

    num_samples = None

    def __init__(self, bad=()):
        self.reads, self.bad, self.threads = [], bad, set()

    def rows(self, indices):
        self.reads.append(indices.tolist())
        self.threads.add(threading.current_thread().name)
        if set(self.bad) & set(indices.tolist()):
            raise InputError(f"sample {indices[0]} is bad")
        return np.repeat(indices[:, None], 5, axis=1).astype(np.int32)


def test_a_batch_is_a_function_of_its_step():
    loader = Loader(Counting(), batch_size=3, seq_length=4)
    np.testing.assert_array_equal(loader.host_batch(7), np.repeat([[21], [22], [23]], 5, axis=1))
    batch = loader.batch(7)
    assert (batch.shape, batch.dtype) == ((3, 5), np.int32)
    np.testing.assert_array_equal(batch, loader.host_batch(7))
    rows = b"".join(int(i).to_bytes(4, "little") * 5 for i in (21, 22, 23))
    assert loader.digest(7) == hashlib.sha256(rows).hexdigest()


def test_batches_do_not_depend_on_how_they_are_cut(tmp_path):
    samples = open_train(train=write_sizes(tmp_path / "set", [200]))
    small, large = (Loader(samples, batch_size=b, seq_length=4) for b in (4, 8))
    np.testing.assert_array_equal(np.concatenate([small.host_batch(6), small.host_batch(7)]), large.host_batch(3))


@pytest.mark.parametrize("spec", [PartitionSpec("data"), PartitionSpec(("data", "model")), PartitionSpec()])
def test_a_sharded_batch_reads_each_row_once(spec):
    samples = Counting()
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("data", "model"))
    loader = Loader(samples, batch_size=16, seq_length=4, sharding=NamedSharding(mesh, spec))
    batch = loader.batch(2)
    assert samples.reads == [list(range(32, 48))]
    assert batch.sharding == loader.batch(0).sharding == NamedSharding(mesh, spec)
    assert len(batch.addressable_shards) == 8
    np.testing.assert_array_equal(batch, loader.host_batch(2))


def test_batches_come_in_order_and_are_read_ahead():
    samples = Counting()
    loader = Loader(samples, batch_size=2, seq_length=4)
    steps = []
    for step, batch, wait_seconds in loader.batches(3, 8):
        steps.append(step)
        np.testing.assert_array_equal(batch, loader.host_batch(step))
        assert wait_seconds >= 0
    assert steps == [3, 4, 5, 6, 7]
    assert list(loader.batches(5, 5)) == []


def test_reading_ahead_is_bounded_and_its_threads_end():
    samples = Counting()
    batches = Loader(samples, batch_size=2, seq_length=4).batches(0)
    next(batches)
    time.sleep(0.3)  # as long as it likes to run ahead
    assert sorted(read[0] for read in samples.reads) == list(range(0, 2 * PREFETCH + 2, 2))
    assert all("neox_jax.data.loader" in name for name in samples.threads)
    batches.close()
    assert not [thread for thread in threading.enumerate() if "neox_jax.data.loader" in thread.name]


def test_slow_reads_are_waited_for_side_by_side():
    """So that steps are not held up by reads that take up to READERS times as long."""
    together = threading.Barrier(READERS, timeout=30)

    class Slow(Counting):
        def rows(self, indices):
            together.wait()  # breaks unless READERS reads are under way at once
            return super().rows(indices)

    batches = Loader(Slow(), batch_size=2, seq_length=4).batches(0, 3 * READERS)
    for step, batch, _ in batches:
        np.testing.assert_array_equal(batch, np.repeat([[2 * step], [2 * step + 1]], 5, axis=1))


def test_an_error_surfaces_at_its_own_step():
    batches = Loader(Counting(bad=[5]), batch_size=2, seq_length=4).batches(0, 10)
    assert [next(batches)[0] for _ in range(2)] == [0, 1]
    with pytest.raises(InputError, match="sample 4 is bad"):
        next(batches)
    assert not [thread for thread in threading.enumerate() if "neox_jax.data.loader" in thread.name]
