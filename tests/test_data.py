"""Megatron's files as they are written and read, in one piece and in shards, and everything that is refused of them."""

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from token_data import cut_into_shards, open_train, write, write_sizes

from neox_jax.data import IndexedDataset, IndexedDatasetWriter
from neox_jax.data.megatron import DTYPES, best_dtype
from neox_jax.errors import InputError


def test_public_names_load_neither_jax_nor_what_may_be_absent():
    absent = "import sys; sys.modules.update(dict.fromkeys(['jax', 'zstandard', 'torch', 'transformers']))"
    names = "IndexedDataset, IndexedDatasetWriter, MegatronSamples, blend_indices, split_documents"
    code = f"{absent}; import neox_jax.data; from neox_jax.data import {names}; print(neox_jax.data.__all__)"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert out.stdout.strip() == str(names.split(", "))


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
    num_tokens = np.array([len(dataset.tokens)])
    assert dataset.tokens.read(0 * num_tokens, num_tokens).tolist() == [t for document in documents for t in document]
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


# --- shards


def test_shards_read_as_the_whole_file(tmp_path):
    sizes = [5, 0, 9, 1, 12]
    write_sizes(tmp_path / "whole", sizes)
    write_sizes(tmp_path / "cut", sizes)
    cut_into_shards(tmp_path / "cut", [24, 24, 24], 3)
    (tmp_path / "cut.bin").unlink()
    whole, cut = (IndexedDataset(tmp_path / name) for name in ("whole", "cut"))
    assert len(cut.tokens.paths) == 4
    assert [cut[i].tolist() for i in range(5)] == [whole[i].tolist() for i in range(5)]


@settings(max_examples=60, deadline=None)
@given(
    cuts=st.lists(st.integers(0, 100), min_size=1, max_size=8),
    runs=st.lists(st.tuples(st.integers(0, 100), st.integers(0, 60)), max_size=10),
)
def test_runs_across_borders_of_shards(tmp_path_factory, cuts, runs):
    prefix = tmp_path_factory.mktemp("data") / "set"
    write_sizes(prefix, [100])
    cuts = sorted(cuts)
    cut_into_shards(prefix, [4 * (b - a) for a, b in zip([0, *cuts], cuts, strict=False)], len(cuts))
    prefix.with_suffix(".bin").unlink()
    starts = np.array([start for start, _ in runs], np.int64)
    lengths = np.array([min(length, 100 - start) for start, length in runs], np.int64)
    wanted = [token for start, length in zip(starts, lengths, strict=True) for token in range(start, start + length)]
    assert IndexedDataset(prefix).tokens.read(starts, lengths).tolist() == wanted


@pytest.mark.parametrize("last", [3, 4])  # the number of the last shard, as Pythia has it, or how many there are
def test_shards_are_checked_by_name_and_size(tmp_path, last):
    prefix = write_sizes(tmp_path / "set", [100])
    cut_into_shards(prefix, [120, 120, 120], last)
    (tmp_path / "set.bin").unlink()
    shards = [tmp_path / f"set-{k:05}-of-{last:05}.bin" for k in range(4)]
    assert len(IndexedDataset(prefix).tokens) == 100
    shards[1].rename(tmp_path / "kept")
    with pytest.raises(InputError, match=rf"no file .*set-00001-of-{last:05}.bin, one of 1 missing shards"):
        IndexedDataset(prefix)
    shards[1].write_bytes((tmp_path / "kept").read_bytes()[:-8])
    with pytest.raises(InputError, match=rf"has 392 bytes; set.idx describes 400.*set-00001-of-{last:05}.bin has 112"):
        IndexedDataset(prefix)
    (tmp_path / "kept").rename(shards[1])
    shards[3].unlink()
    missing = r"perhaps set-00003-of-00003.bin is missing" if last == 3 else r"no file .*set-00003-of-00004.bin"
    with pytest.raises(InputError, match=missing):
        IndexedDataset(prefix)


def test_shards_that_will_not_do_are_refused(tmp_path):
    prefix = write_sizes(tmp_path / "set", [100])
    cut_into_shards(prefix, [121, 120], 2)
    assert len(IndexedDataset(prefix).tokens.paths) == 1  # the whole file goes first
    (tmp_path / "set.bin").unlink()
    with pytest.raises(InputError, match=r"set-00000-of-00002.bin has 121 bytes, no whole number of tokens of 4"):
        IndexedDataset(prefix)
    (tmp_path / "set-00000-of-00005.bin").write_bytes(b"")
    with pytest.raises(InputError, match=r"shards of several sets, of \[2, 5\]"):
        IndexedDataset(prefix)


def test_pythia_rows_come_from_shards(tmp_path):
    prefix = write_sizes(tmp_path / "document", [9] * 30)
    cut_into_shards(prefix, [500, 500], 2)
    (tmp_path / "document.bin").unlink()
    samples = open_train(train=prefix, order="sequential", seq_length=8)
    assert samples.num_samples == 30
    np.testing.assert_array_equal(samples.rows(np.arange(30)), np.arange(270).reshape(30, 9))


# --- what is refused


def test_a_dataset_without_documents_is_refused(tmp_path):
    (tmp_path / "set.idx").write_bytes(b"MMIDIDX\0\0" + (1).to_bytes(8, "little") + b"\x08" + bytes(8) + bytes(8))
    (tmp_path / "set.bin").write_bytes(b"")
    assert len(IndexedDataset(tmp_path / "set")) == 0
    for order in ("shuffled", "megatron", "sequential"):
        with pytest.raises(InputError, match=r"set has 0 tokens in documents 0 to 0"):
            open_train(train=str(tmp_path / "set"), order=order)


def test_a_file_that_is_cut_off_while_it_is_read_is_refused(tmp_path):
    samples = open_train(train=write_sizes(tmp_path / "set", [100]))
    assert samples.rows(np.arange(24)).max() == 96
    os.truncate(tmp_path / "set.bin", 40)
    with pytest.raises(InputError, match=r"set.bin has 40 bytes; 400 when it was opened"):
        samples.rows(np.arange(24))


@pytest.mark.parametrize("order", ["shuffled", "megatron", "sequential"])
def test_a_token_outside_the_vocabulary_is_placed_in_its_shard(order, tmp_path):
    prefix = write(tmp_path / "set", [[1] * 7, [2, 999, 3], [3] * 10])
    cut_into_shards(prefix, [16, 12], 2)
    (tmp_path / "set.bin").unlink()
    with pytest.raises(InputError, match=r"set-00001-of-00002.bin: token 999 at position 1 of document 1 is not in"):
        open_train(train=prefix, order=order, vocab_size=512).rows(np.arange(4))
