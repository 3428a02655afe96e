"""Megatron files, the orders of samples (gpt-neox's own against a straight loop), and the loader."""

import hashlib
import math
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from neox_jax.config import DataConfig
from neox_jax.data.index import (
    MegatronSamples,
    blend_indices,
    open_samples,
    split_documents,
)
from neox_jax.data.loader import Loader
from neox_jax.data.megatron import DTYPES, IndexedDataset, IndexedDatasetWriter, best_dtype
from neox_jax.errors import InputError


def write(prefix, documents, dtype=np.uint16) -> str:
    with IndexedDatasetWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add_document(document)
    return str(prefix)


def write_sizes(prefix, sizes, first=0) -> str:
    """Documents of these sizes; the tokens count up from `first` through all of them."""
    ends = np.cumsum(sizes) + first
    return write(prefix, [np.arange(end - size, end) for end, size in zip(ends, sizes, strict=True)], np.int32)


def test_modules_import_where_grain_and_zstandard_are_absent():
    absent = "import sys; sys.modules.update(dict.fromkeys(['grain', 'zstandard', 'torch', 'transformers']))"
    modules = ", ".join(f"neox_jax.data.{name}" for name in ("index", "loader", "tokenize", "corpus"))
    subprocess.run([sys.executable, "-c", f"{absent}; import {modules}"], check=True)


# --- .bin and .idx


@settings(max_examples=30, deadline=None)
@given(
    dtype=st.sampled_from(list(DTYPES.values())),
    documents=st.lists(st.lists(st.integers(0, 127), max_size=20), min_size=1, max_size=10),
)
def test_what_is_written_is_read(tmp_path_factory, dtype, documents):
    prefix = tmp_path_factory.mktemp("data") / "set"
    with IndexedDatasetWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add_document(np.array(document, dtype))
    dataset = IndexedDataset(prefix)
    assert dataset.dtype == dtype
    assert [dataset[i].tolist() for i in range(len(dataset))] == documents
    assert dataset[-1].tolist() == documents[-1]
    assert dataset.sizes.tolist() == [len(document) for document in documents]
    assert dataset.tokens.tolist() == [token for document in documents for token in document]
    assert dataset.doc_idx.tolist() == list(range(len(documents) + 1))
    with pytest.raises(IndexError):
        dataset[len(documents)]


def test_dtype_follows_the_vocabulary():
    assert [best_dtype(n) for n in (4096, 65499, 65500)] == [np.uint16, np.uint16, np.int32]


def test_writer_leaves_nothing_behind_an_error(tmp_path):
    with pytest.raises(TypeError, match="len"), IndexedDatasetWriter(tmp_path / "set", np.uint16) as writer:
        any(map(writer.add_document, ([1, 2, 3], None)))
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match=r"no documents for .*set.bin; an empty dataset is not written"):
        write(tmp_path / "set", [])
    with pytest.raises(InputError, match="document 1 has tokens from 1 to 65536, which do not fit uint16"):
        write(tmp_path / "set", [[1], [1, 65536]])
    assert not list(tmp_path.iterdir())


def test_writer_replaces_a_dataset_only_when_done(tmp_path):
    write(tmp_path / "set", [[1, 2]])
    with IndexedDatasetWriter(tmp_path / "set", np.uint16) as writer:
        writer.add_document([3])
        assert IndexedDataset(tmp_path / "set")[0].tolist() == [1, 2]
    assert IndexedDataset(tmp_path / "set")[0].tolist() == [3]


# what to write at which byte of the .idx of documents of 3, 2 and 4 tokens, and what is then said
DAMAGE = {
    "magic": (0, b"TNTIDX\0\0", r"set.idx starts with .*; wanted b'MMIDIDX"),
    "version": (9, b"\x02", r"set.idx is of version 2; wanted version 1"),
    "dtype": (17, b"\x09", r"set.idx has dtype code 9; wanted one of 1, 2"),
    "count": (18, b"\x04", r"set.idx has 102 bytes; 4 documents want 114"),
    "size": (34, b"\x05", r"set.idx: document 1 has 2 tokens at byte 6; wanted byte 10"),
    "negative size": (34, b"\xff\xff\xff\xff", r"set.idx: document 0 has -1 tokens"),
    "last size": (42, b"\x05", r"set.bin has 18 bytes; set.idx describes 20"),
    "pointer": (54, b"\x00", r"set.idx: document 1 has 2 tokens at byte 0; wanted byte 6"),
}


@pytest.mark.parametrize(("offset", "content", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_index_is_refused(offset, content, message, tmp_path):
    write(tmp_path / "set", [[1] * 3, [2] * 2, [3] * 4])
    index = bytearray((tmp_path / "set.idx").read_bytes())
    index[offset : offset + len(content)] = content
    (tmp_path / "set.idx").write_bytes(index)
    with pytest.raises(InputError, match=message):
        IndexedDataset(tmp_path / "set")


def test_truncated_and_missing_files_are_refused(tmp_path):
    prefix = write(tmp_path / "set", [[1] * 3, [2] * 2])
    whole = {suffix: (tmp_path / f"set{suffix}").read_bytes() for suffix in (".bin", ".idx")}
    for suffix, length, message in [
        (".bin", 8, r"set.bin has 8 bytes; set.idx describes 10: the file is truncated"),
        (".bin", 0, r"set.bin has 0 bytes; set.idx describes 10"),
        (".idx", 60, r"set.idx has 60 bytes; 2 documents want 82: it is truncated"),
        (".idx", 20, r"set.idx has 20 bytes; wanted a header of 34"),
        (".idx", 0, r"set.idx starts with b''"),
    ]:
        (tmp_path / f"set{suffix}").write_bytes(whole[suffix][:length])
        with pytest.raises(InputError, match=message):
            IndexedDataset(prefix)
        (tmp_path / f"set{suffix}").write_bytes(whole[suffix])
    for suffix in (".bin", ".idx"):
        (tmp_path / f"set{suffix}").unlink()
        with pytest.raises(InputError, match=rf"no file .*set{suffix}; a dataset is named by its prefix"):
            IndexedDataset(prefix)
        (tmp_path / f"set{suffix}").write_bytes(whole[suffix])
    with pytest.raises(InputError, match=r"no file .*set.bin.idx"):
        IndexedDataset(f"{prefix}.bin")


# --- gpt-neox's own order


def reference_samples(documents, sizes, *, seq_length, num_samples, seed):
    """The rule of gpt-neox in straight loops: (doc_idx, sample_idx, shuffle_idx, tokens of each sample)."""
    total, epochs = sum(int(sizes[d]) for d in documents), 1
    while (epochs * total - 1) // seq_length < num_samples:
        epochs += 1
    random = np.random.RandomState(seed)
    doc_idx = np.array([d for _ in range(epochs) for d in documents], np.int32)
    random.shuffle(doc_idx)
    place = [(p, offset) for p, d in enumerate(doc_idx) for offset in range(sizes[d])]  # of every token
    n = (epochs * total - 1) // seq_length
    sample_idx = [(0, 0)] + [place[k * seq_length] for k in range(1, n + 1)]
    shuffle_idx = np.arange(n, dtype=np.uint32)
    random.shuffle(shuffle_idx)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    flat = [int(starts[doc_idx[p]]) + offset for p, offset in place]  # tokens count up through the file
    return doc_idx, sample_idx, shuffle_idx, [flat[k * seq_length : (k + 1) * seq_length + 1] for k in shuffle_idx]


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 12), min_size=1, max_size=12).filter(lambda sizes: sum(sizes[:-1] or sizes) > 0),
    seq_length=st.integers(1, 9),
    num_samples=st.integers(1, 60),
    seed=st.integers(0, 2**32 - 1),
    all_documents=st.booleans(),
)
def test_megatron_samples_equal_the_straight_loop(
    tmp_path_factory, sizes, seq_length, num_samples, seed, all_documents
):
    dataset = IndexedDataset(write_sizes(tmp_path_factory.mktemp("data") / "set", sizes))
    documents = range(len(sizes) if all_documents else max(1, len(sizes) - 1))
    arguments = {"seq_length": seq_length, "num_samples": num_samples, "seed": seed}
    samples = MegatronSamples(dataset, documents=None if all_documents else documents, **arguments)
    doc_idx, sample_idx, shuffle_idx, tokens = reference_samples(documents, sizes, **arguments)
    np.testing.assert_array_equal(samples.doc_idx, doc_idx, strict=True)
    np.testing.assert_array_equal(samples.sample_idx, np.array(sample_idx, np.int32), strict=True)
    np.testing.assert_array_equal(samples.shuffle_idx, shuffle_idx, strict=True)
    assert len(samples) >= num_samples
    assert [samples[i].tolist() for i in range(len(samples))] == tokens
    np.testing.assert_array_equal(dataset.tokens[samples.positions(np.arange(len(samples)))], tokens)


def test_megatron_samples_of_no_tokens_are_refused(tmp_path):
    dataset = IndexedDataset(write_sizes(tmp_path / "set", [0, 0]))
    with pytest.raises(InputError, match="has no tokens in 2 documents"):
        MegatronSamples(dataset, seq_length=4, num_samples=1, seed=0)


@settings(max_examples=50, deadline=None)
@given(weights=st.lists(st.floats(0.01, 10), min_size=1, max_size=5), size=st.integers(0, 200))
def test_blend_keeps_to_its_weights(weights, size):
    which, sample = blend_indices(weights, size)
    assert (which.dtype, sample.dtype) == (np.uint8, np.int64)
    shares = np.array(weights) / np.sum(weights)
    for d, share in enumerate(shares):
        np.testing.assert_array_equal(sample[which == d], np.arange((which == d).sum()))
        # what open_samples builds for each dataset is always enough
        assert (which == d).sum() <= math.ceil(size * share * 1.005)
    longer = blend_indices(weights, size + 50)
    np.testing.assert_array_equal(longer[0][:size], which)


def test_blend_by_hand():
    # behind its share before each sample: (.25 .75), (.25 -.25), (-.5 .5), (-.25 .25), (0 0): a tie, (-.75 .75)
    which, sample = blend_indices([1, 3], 6)
    assert which.tolist() == [1, 0, 1, 1, 0, 1]
    assert sample.tolist() == [0, 0, 1, 2, 1, 3]


@pytest.mark.parametrize(
    ("split", "n", "boundaries"),
    [
        ("969, 30, 1", 1000, [0, 969, 999, 1000]),
        ("969,30,1", 737, [0, 714, 736, 737]),
        ("8/1/1", 20, [0, 16, 18, 20]),
        ("1, 1, 1", 2, [0, 0, 1, 2]),  # each rounds to 1: the error comes off every boundary
        ("1, 1, 1", 1, [0, 1, 1, 1]),
        ("90, 10", 10, [0, 9, 10, 10]),
        ("1", 7, [0, 7, 7, 7]),
        ("0, 1, 1", 3, [0, 0, 1, 3]),  # -1 in gpt-neox, which then fails
    ],
)
def test_split_boundaries(split, n, boundaries):
    assert split_documents(split, n) == boundaries


@pytest.mark.parametrize("split", ["a,b", "1,2,3,4", "-1,2", "0,0,0", "", "nan", "inf,1"])
def test_bad_splits_are_refused(split):
    with pytest.raises(InputError, match="wanted up to three shares"):
        split_documents(split, 10)


# --- the orders, as a run opens them


def open_train(seq_length=4, num_samples=20, vocab_size=10_000, **data):
    return open_samples(
        DataConfig(**data), "train", seq_length=seq_length, num_samples=num_samples, vocab_size=vocab_size
    )


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(0, 30), min_size=1, max_size=8), seed=st.integers(0, 2**32 - 1), data=st.data())
def test_shuffled_has_each_window_once_an_epoch(tmp_path_factory, sizes, seed, data):
    sizes = [*sizes, 30]
    samples = open_train(train=write_sizes(tmp_path_factory.mktemp("data") / "set", sizes), seed=seed)
    n = samples.samples_per_epoch
    assert n == (sum(sizes) - 1) // 4
    windows = 4 * np.arange(n)[:, None] + np.arange(5)
    epochs = samples.rows(np.arange(3 * n)).reshape(3, n, 5)
    assert epochs.dtype == np.int32
    for epoch in epochs:
        np.testing.assert_array_equal(epoch[np.argsort(epoch[:, 0])], windows)
    some = np.array(data.draw(st.lists(st.integers(0, 3 * n - 1), min_size=1)))
    np.testing.assert_array_equal(samples.rows(some), epochs.reshape(3 * n, 5)[some])


def test_shuffled_epochs_and_seeds_differ(tmp_path):
    prefix = write_sizes(tmp_path / "set", [401])
    orders = [open_train(train=prefix, seed=seed).rows(np.arange(300))[:, 0].reshape(3, 100) for seed in (1, 2)]
    epochs = np.concatenate(orders)
    assert len({epoch.tobytes() for epoch in epochs}) == 6  # in particular, seed 2 is not seed 1 an epoch later
    assert not (epochs == np.arange(0, 400, 4)).all(axis=1).any()


def test_shuffled_order_is_the_one_of_yesterday(tmp_path):
    """If this fails, grain or NumPy has changed its shuffle: runs can no longer be resumed. Pin the old version."""
    prefixes = [write_sizes(tmp_path / "a", [41]), write_sizes(tmp_path / "b", [41], first=100)]
    single = open_train(train=prefixes[0], seed=7).rows(np.arange(10))[:, 0]
    mixed = open_train(train=[(prefixes[0], 3), (prefixes[1], 1)], seed=7).rows(np.arange(10))[:, 0]
    assert single.tolist() == [12, 32, 8, 4, 0, 16, 36, 20, 28, 24]
    assert mixed.tolist() == [12, 32, 8, 124, 4, 0, 16, 128, 36, 20]


def test_mixing_keeps_to_its_weights_and_covers_each_part(tmp_path):
    prefixes = [write_sizes(tmp_path / "a", [41]), write_sizes(tmp_path / "b", [81], first=1000)]
    samples = open_train(train=[(prefixes[0], 0.7), (prefixes[1], 0.3)])
    assert (samples.samples_per_epoch, samples.num_samples) == (30, None)
    first = samples.rows(np.arange(1000))[:, 0]
    assert abs((first < 1000).sum() - 700) <= 10
    for part, windows in ((first[first < 1000], range(0, 40, 4)), (first[first >= 1000], range(1000, 1080, 4))):
        epoch = part[: len(windows)]
        assert sorted(epoch) == list(windows)
        assert list(epoch) != list(windows)
    equal = open_train(train=prefixes).rows(np.arange(100))[:, 0]  # without weights: equal shares
    assert (equal < 1000).sum() == 50
    np.testing.assert_array_equal(samples.rows(np.array([2**40, 5])), samples.rows(np.array([5, 2**40]))[::-1])


def test_megatron_order_of_one_dataset(tmp_path):
    prefix = write_sizes(tmp_path / "set", [7, 0, 13, 5])
    samples = open_train(train=prefix, order="megatron", seed=3, num_samples=20)
    wanted = MegatronSamples(IndexedDataset(prefix), seq_length=4, num_samples=20, seed=3)
    np.testing.assert_array_equal(samples.rows(np.array([19, 0, 7])), [wanted[i] for i in (19, 0, 7)])
    assert samples.num_samples == samples.samples_per_epoch == 20
    with pytest.raises(InputError, match=r"built for 20 samples; wanted sample 20 .*data.num_samples"):
        samples.rows(np.array([0, 20]))


def test_megatron_order_of_several_datasets(tmp_path):
    prefixes = [write_sizes(tmp_path / "a", [30, 31]), write_sizes(tmp_path / "b", [50], first=500)]
    data = DataConfig(train=[(prefixes[0], 2), (prefixes[1], 5)], order="megatron", seed=5, num_samples=300)
    samples = open_samples(data, "train", seq_length=4, num_samples=9, vocab_size=1000)
    assert samples.num_samples == 300  # data.num_samples goes before the caller's
    parts = [
        MegatronSamples(IndexedDataset(prefix), seq_length=4, num_samples=math.ceil(300 * w * 1.005), seed=5)
        for prefix, w in zip(prefixes, (2 / 7, 5 / 7), strict=True)
    ]
    which, local = blend_indices([2 / 7, 5 / 7], 300)
    wanted = [parts[d][i] for d, i in zip(which, local, strict=True)]
    np.testing.assert_array_equal(samples.rows(np.arange(300)), wanted)


def test_sequential_rows_are_documents_where_these_are_rows(tmp_path):
    prefixes = [write_sizes(tmp_path / "a", [5] * 6), write_sizes(tmp_path / "b", [5] * 3, first=30)]
    samples = open_train(train=prefixes, order="sequential")
    assert samples.num_samples == 9
    np.testing.assert_array_equal(samples.rows(np.arange(9)), np.arange(45).reshape(9, 5))
    np.testing.assert_array_equal(samples.rows(np.array([7, 2])), np.arange(45).reshape(9, 5)[[7, 2]])
    with pytest.raises(InputError, match=r"the train data have 9 samples in file order; wanted sample 9 .*train.steps"):
        samples.rows(np.array([9]))


def test_sequential_windows_of_other_files_overlap_by_one(tmp_path):
    samples = open_train(train=write_sizes(tmp_path / "set", [5, 5, 6]), order="sequential")
    np.testing.assert_array_equal(samples.rows(np.arange(3)), 4 * np.arange(3)[:, None] + np.arange(5))
    assert samples.num_samples == 3


@pytest.mark.parametrize("order", ["shuffled", "megatron", "sequential"])
def test_split_gives_each_side_its_own_documents(order, tmp_path):
    prefix = write_sizes(tmp_path / "set", [9] * 10)
    data = DataConfig(train=prefix, split="6, 3, 1", order=order, num_samples=40)
    shape = {"seq_length": 4, "num_samples": 0, "vocab_size": 1000}
    train, valid = (open_samples(data, which, **shape) for which in ("train", "valid"))
    rows = train.rows(np.arange(13 if order == "sequential" else 40))
    assert set(rows.ravel()) == set(range(54 if order == "megatron" else 53))
    assert valid.num_samples == 6
    np.testing.assert_array_equal(valid.rows(np.arange(6)), 54 + 4 * np.arange(6)[:, None] + np.arange(5))
    with pytest.raises(InputError, match=r"the valid data have 6 samples .*lower eval.batches"):
        valid.rows(np.array([6]))


def test_valid_is_its_own_file_or_nothing(tmp_path):
    train, valid = write_sizes(tmp_path / "a", [50]), write_sizes(tmp_path / "b", [4, 9], first=100)
    shape = {"seq_length": 4, "num_samples": 0, "vocab_size": 1000}
    samples = open_samples(DataConfig(train=train, valid=valid, split="1,1"), "valid", **shape)
    np.testing.assert_array_equal(samples.rows(np.arange(3))[:, 0], [100, 104, 108])
    assert open_samples(DataConfig(train=train), "valid", **shape) is None
    assert open_samples(DataConfig(train=train, split="1"), "valid", **shape) is None


def test_settings_that_will_not_do_are_refused(tmp_path):
    prefix = write_sizes(tmp_path / "set", [3, 2])
    for train in ("", [], [""], (prefix, 0.5), [(prefix, 0)], [(prefix, -1)], [prefix, (prefix, 1)], [[prefix]], [3]):
        with pytest.raises(InputError, match=r"data.train is .*; wanted the prefix of .bin/.idx files"):
            open_train(train=train)
    for seed in (-1, 2**32):
        with pytest.raises(InputError, match=r"data.seed is .*; wanted a number from 0"):
            open_train(train=prefix, seed=seed)
    with pytest.raises(InputError, match="has weights, but is read in file order"):
        open_train(train=[(prefix, 1)], order="sequential")
    for order in ("shuffled", "megatron", "sequential"):
        with pytest.raises(InputError, match=r"set has 5 tokens in documents 0 to 2; .* 5 needs 6"):
            open_train(train=prefix, seq_length=5, order=order)
    with pytest.raises(InputError, match=r"has 0 tokens in documents 2 to 2"):  # rounding left the share no document
        open_samples(DataConfig(train=prefix, split="99,1"), "valid", seq_length=4, num_samples=0, vocab_size=10)
    with IndexedDatasetWriter(tmp_path / "floats", np.float32) as writer:
        writer.add_document(np.ones(9, np.float32))
    with pytest.raises(InputError, match="says that its data are float32; tokens are whole numbers"):
        open_train(train=str(tmp_path / "floats"))


@pytest.mark.parametrize("order", ["shuffled", "megatron", "sequential"])
@pytest.mark.parametrize(("dtype", "token"), [(np.uint16, 512), (np.int32, -3), (np.int64, 2**40)])
def test_tokens_outside_the_vocabulary_are_refused_by_place(order, dtype, token, tmp_path):
    prefix = write(tmp_path / "set", [[1] * 7, [], [511, 2, token], [3] * 3], dtype)
    samples = open_train(train=prefix, order=order, vocab_size=512, num_samples=3)
    with pytest.raises(InputError, match=rf"set.bin: token {token} at position 2 of document 2 is not in .* of 512"):
        samples.rows(np.arange(3))
    if token == 512:
        assert open_train(train=prefix, order=order, vocab_size=70_000, num_samples=3).rows(np.arange(3)).max() == 512


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


@pytest.mark.parametrize(
    ("spec", "num_reads"), [(PartitionSpec("data"), 4), (PartitionSpec(("data", "model")), 8), (PartitionSpec(), 1)]
)
def test_a_sharded_batch_reads_each_row_once(spec, num_reads):
    samples = Counting()
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("data", "model"))
    loader = Loader(samples, batch_size=16, seq_length=4, sharding=NamedSharding(mesh, spec))
    batch = loader.batch(2)
    assert sorted(i for read in samples.reads for i in read) == list(range(32, 48))
    assert len(samples.reads) == num_reads
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


def test_reading_ahead_is_bounded_and_its_thread_ends():
    samples = Counting()
    batches = Loader(samples, batch_size=2, seq_length=4).batches(0)
    next(batches)
    time.sleep(0.3)  # as long as it likes to run ahead
    assert [read[0] for read in samples.reads] == [0, 2, 4]
    assert all("neox_jax.data.loader" in name for name in samples.threads)
    batches.close()
    assert not [thread for thread in threading.enumerate() if "neox_jax.data.loader" in thread.name]


def test_an_error_surfaces_at_its_own_step():
    batches = Loader(Counting(bad=[5]), batch_size=2, seq_length=4).batches(0, 10)
    assert [next(batches)[0] for _ in range(2)] == [0, 1]
    with pytest.raises(InputError, match="sample 4 is bad"):
        next(batches)
    assert not [thread for thread in threading.enumerate() if "neox_jax.data.loader" in thread.name]
