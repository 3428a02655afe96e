"""Which tokens are sample k: gpt-neox's order against a straight loop, permutations, mixing, and what a run opens."""

import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from token_data import open_train, write, write_sizes

from neox_jax.config import DataConfig
from neox_jax.data import (
    IndexedDataset,
    IndexedDatasetWriter,
    MegatronSamples,
    blend_indices,
    index_loops,
    split_documents,
)
from neox_jax.data.gpt_neox import build_index
from neox_jax.data.index import open_samples
from neox_jax.data.permutation import Interleave, Permutations, mix, permute
from neox_jax.errors import InputError

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
    runs = samples.runs(np.arange(len(samples)))
    np.testing.assert_array_equal(dataset.tokens.read(*runs).reshape(len(samples), -1), tokens)


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


def blend_by_loop(weights, size):
    shares, counts, blend = np.array(weights) / np.sum(weights), np.zeros(len(weights)), []
    for i in range(size):
        d = int(np.argmax(shares * float(max(i, 1)) - counts))
        blend.append((d, int(counts[d])))
        counts[d] += 1
    return blend


@settings(max_examples=25, deadline=None)
@given(
    weights=st.one_of(
        st.lists(st.floats(1e-4, 1), min_size=1, max_size=8),
        st.lists(st.integers(1, 4), min_size=1, max_size=8),  # with ties
    ),
    size=st.integers(0, 3000),
)
def test_blend_equals_the_loop(weights, size):
    which, sample = blend_indices(weights, size)
    assert list(zip(which.tolist(), sample.tolist(), strict=True)) == blend_by_loop(weights, size)


def test_blend_equals_the_loop_over_blocks(monkeypatch):
    monkeypatch.setattr("neox_jax.data.blend.STRETCH", 16)
    monkeypatch.setattr("neox_jax.data.blend.BLOCK", 1600)
    for weights in ([5, 3, 2], [0.9, 0.05, 0.03, 0.02], [1] * 7, [1e-6, 1]):
        which, sample = blend_indices(weights, 5000)
        assert list(zip(which.tolist(), sample.tolist(), strict=True)) == blend_by_loop(weights, 5000)


@pytest.mark.parametrize("weights", [[], [1, 0], [-1, 2], [math.nan], [math.inf, 1], [1] * 257])
def test_bad_weights_are_refused(weights):
    with pytest.raises(InputError, match="no weights to blend by"):
        blend_indices(weights, 10)


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


# --- NumPy's shuffle, compiled


@pytest.mark.parametrize("dtype", [np.uint32, np.int32, np.int64])
@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(0, 3 * index_loops.BLOCK),
    seed=st.integers(0, 2**32 - 1),
)
def test_shuffle_is_numpys(dtype, size, seed):
    bits, numpys = np.random.MT19937(), np.random.RandomState(seed)
    ours = np.random.RandomState(bits)
    ours.seed(seed)
    x, y = (np.arange(size, dtype=dtype) // 2 for _ in range(2))
    index_loops.shuffle(bits, x)
    numpys.shuffle(y)
    np.testing.assert_array_equal(x, y, strict=True)
    assert ours.randint(2**30) == numpys.randint(2**30)  # nothing more was drawn, and nothing less


# --- the index beyond one block, and its cache


def test_without_numba_one_line_says_what_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, "neox_jax.data.index_loops")
    monkeypatch.setitem(sys.modules, "numba", None)
    with pytest.raises(InputError, match=r"needs the numba package: pip install 'neox_jax\[data\]'"):
        build_index(np.array([5], np.int32), documents=range(1), num_epochs=1, seq_length=2, seed=0)


def test_index_of_many_blocks_equals_the_straight_loop():
    sizes = np.random.default_rng(0).integers(0, 9, index_loops.BLOCK).astype(np.int32)
    documents, arguments = range(5, index_loops.BLOCK), {"seq_length": 7, "seed": 2}
    num_epochs = 3
    num_samples = (num_epochs * int(sizes[5:].sum()) - 1) // 7
    wanted = reference_samples(documents, sizes, num_samples=num_samples, **arguments)
    got = build_index(sizes, documents=documents, num_epochs=num_epochs, **arguments)
    for a, b in zip(got, wanted, strict=False):
        np.testing.assert_array_equal(a, b)


def indices_of(samples):
    return samples.doc_idx, samples.sample_idx, samples.shuffle_idx


def make_samples(prefix, seed=3, seq_length=4, num_samples=20, **arguments):
    dataset = IndexedDataset(prefix)
    return MegatronSamples(dataset, seq_length=seq_length, num_samples=num_samples, seed=seed, **arguments)


@pytest.fixture
def no_build(monkeypatch):
    """Calls it to forbid that an index is made."""
    return lambda: monkeypatch.setattr("neox_jax.data.gpt_neox.build_index", None)


def test_an_index_is_made_once_and_then_mapped(tmp_path, no_build):
    prefix = write_sizes(tmp_path / "set", [7, 0, 13, 5])
    made = [array.copy() for array in indices_of(make_samples(prefix))]
    (folder,) = (tmp_path / "set.cache").iterdir()
    files = {path.name for path in folder.iterdir()}
    assert files == {"SHA256SUMS", "doc_idx.npy", "sample_idx.npy", "shuffle_idx.npy"}
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=folder, check=True)
    no_build()
    for array, wanted in zip(indices_of(make_samples(prefix)), made, strict=True):
        np.testing.assert_array_equal(array, wanted, strict=True)
        assert not array.flags.owndata
        assert not array.flags.writeable


def test_an_index_is_kept_under_everything_it_depends_on(tmp_path):
    prefix = write_sizes(tmp_path / "set", [7, 0, 13, 5])
    variants = [{}, {"seed": 4}, {"seq_length": 5}, {"num_samples": 200}, {"documents": range(1, 4)}]
    for variant in variants:
        make_samples(prefix, **variant)
    assert len(list((tmp_path / "set.cache").iterdir())) == len(variants)
    write_sizes(prefix, [7, 0, 14, 4])
    make_samples(prefix)
    assert len(list((tmp_path / "set.cache").iterdir())) == len(variants) + 1


@pytest.mark.parametrize("damage", ["byte", "truncated", "missing", "sums", "no sums"])
def test_a_damaged_index_is_made_again(tmp_path, caplog, damage):
    prefix = write_sizes(tmp_path / "set", [7, 0, 13, 5])
    wanted = [array.copy() for array in indices_of(make_samples(prefix))]
    (folder,) = (tmp_path / "set.cache").iterdir()
    path = folder / ("SHA256SUMS" if "sums" in damage else "sample_idx.npy")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    if damage in ("missing", "no sums"):
        path.unlink()
    else:
        path.write_bytes(content[:-9] if damage == "truncated" else content)
    for k in range(2):  # the second time it is whole again
        caplog.clear()
        for array, expected in zip(indices_of(make_samples(prefix)), wanted, strict=True):
            np.testing.assert_array_equal(array, expected)
        assert ("are damaged" in caplog.text) == (k == 0 and damage != "no sums")


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch, caplog, no_build):
    prefix = write_sizes(tmp_path / "set", [7, 0, 13, 5])
    (tmp_path / "set.cache").write_text("in the way, as for anybody who may not write there")
    (tmp_path / "home").write_text("in the way too")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    in_memory = indices_of(make_samples(prefix))
    assert "they are made again at each start" in caplog.text
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    make_samples(prefix)
    assert len(list((tmp_path / "other" / "neox_jax").glob("set-*/*/SHA256SUMS"))) == 1
    no_build()
    for array, wanted in zip(indices_of(make_samples(prefix)), in_memory, strict=True):
        np.testing.assert_array_equal(array, wanted)


def test_processes_that_start_together_all_have_a_whole_index(tmp_path):
    prefix = write_sizes(tmp_path / "set", [50] * 2000)
    code = (
        "import hashlib, sys; from neox_jax.data import *; print('ready', flush=True); sys.stdin.readline()\n"
        "samples = MegatronSamples(IndexedDataset(sys.argv[1]), seq_length=4, num_samples=10**5, seed=1)\n"
        "print(*(hashlib.sha256(x).hexdigest() for x in (samples.doc_idx, samples.sample_idx, samples.shuffle_idx)))"
    )
    command = [sys.executable, "-c", code, prefix]
    children = [subprocess.Popen(command, stdin=-1, stdout=-1, stderr=-1, text=True) for _ in range(4)]
    for child in children:
        assert child.stdout.readline() == "ready\n"
    for child in children:
        child.stdin.write("go\n")
        child.stdin.flush()
    results = [child.communicate(timeout=60) for child in children]
    assert {err for _, err in results} == {""}
    assert len({out for out, _ in results}) == 1
    (folder,) = (tmp_path / "set.cache").iterdir()
    assert len(list(folder.iterdir())) == 4


# --- permutations and mixing


def keys_of(*seeds) -> np.ndarray:
    return mix(np.array(seeds, np.uint64))


@settings(max_examples=100, deadline=None)
@given(n=st.integers(1, 3000), seed=st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation(n, seed):
    places = permute(np.arange(n), n, np.full(n, keys_of(seed)))
    assert places.dtype == np.int64
    np.testing.assert_array_equal(np.sort(places), np.arange(n))


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 2**48), some=st.lists(st.integers(0, 2**48), min_size=1), seed=st.integers(0, 2**64 - 1))
def test_permute_of_a_few_places_is_the_one_of_all(n, some, seed):
    some = np.array(some) % n
    keys = np.full(len(some), keys_of(seed))
    together = permute(some, n, keys)
    assert ((together >= 0) & (together < n)).all()
    assert [int(permute(some[k : k + 1], n, keys[:1])[0]) for k in range(len(some))] == together.tolist()
    assert len(set(together.tolist())) == len(set(some.tolist()))


def test_permutations_of_several_sizes_at_once():
    sizes, random = [7, 100, 1], np.random.default_rng(0)
    which = random.integers(0, 3, 200)
    places, keys = random.integers(0, np.array(sizes)[which]), keys_of(*range(200))
    wanted = [int(permute(places[k : k + 1], sizes[which[k]], keys[k : k + 1])[0]) for k in range(200)]
    assert Permutations(sizes).permute(which, places, keys).tolist() == wanted


def test_mix_is_splitmix64():
    assert mix(np.array([0], np.uint64))[0] == 0xE220A8397B1DCDAF  # the published first output for the seed 0


def chi_square(counts: np.ndarray) -> float:
    """In standard deviations from what a uniform distribution gives."""
    counts = counts.ravel()
    expected, freedom = counts.sum() / len(counts), len(counts) - 1
    return (((counts - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize("n", [2, 3, 4, 5, 6])
def test_every_permutation_of_a_few_is_as_likely(n):
    draws = 20_000
    keys = np.repeat(keys_of(*range(draws)), n)
    places = permute(np.tile(np.arange(n), draws), n, keys).reshape(draws, n)
    number = {order: k for k, order in enumerate(itertools.permutations(range(n)))}
    counts = np.bincount([number[tuple(row)] for row in places.tolist()], minlength=len(number))
    assert abs(chi_square(counts)) < 4


@pytest.mark.parametrize("n", [16, 30, 1000])
def test_permutations_look_random(n):
    """Where each place goes, how far neighbours land from each other, and what two epochs have in common."""
    draws = 200_000 // n
    keys = np.repeat(keys_of(*range(draws)), n)
    places = permute(np.tile(np.arange(n), draws), n, keys).reshape(draws, n)
    buckets = min(n, 16)
    goes = np.zeros((buckets, buckets))
    np.add.at(goes, (np.tile(np.arange(n), draws) * buckets // n, places.ravel() * buckets // n), 1)
    if n % buckets == 0:
        assert abs(chi_square(goes)) < 4
    between_neighbours = (places[:, 1:] - places[:, :-1]) % n
    assert abs(chi_square(np.bincount(between_neighbours.ravel(), minlength=n)[1:])) < 4
    between_epochs = (places[1:] - places[:-1]) % n
    assert abs(chi_square(np.bincount(between_epochs.ravel(), minlength=n))) < 4


@settings(max_examples=40, deadline=None)
@given(weights=st.lists(st.floats(1e-3, 1), min_size=1, max_size=12), start=st.integers(0, 2**40))
def test_interleave_keeps_to_its_shares(weights, start):
    interleave, shares = Interleave(weights), np.array(weights) / np.sum(weights)
    which, local = interleave.locate(np.arange(3000))
    for d, share in enumerate(shares):
        mine = which == d
        np.testing.assert_array_equal(local[mine], np.arange(mine.sum()))  # each number of each part once, in order
        assert np.abs(np.cumsum(mine) - share * np.arange(1, 3001)).max() < 2
    later, local = interleave.locate(start + np.arange(1000))
    for d, share in enumerate(shares):
        mine = later == d
        np.testing.assert_array_equal(np.diff(local[mine]), 1)
        if mine.any():
            assert abs(local[mine][0] - share * start) < 3 + start * 2**-30


def test_interleave_of_equal_parts_takes_turns():
    which, _ = Interleave([1, 1, 1]).locate(np.arange(300))
    assert [sorted(turn) for turn in which.reshape(100, 3).tolist()] == [[0, 1, 2]] * 100


# --- the orders, as a run opens them


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
    """If this fails, runs can no longer be resumed: the order is a part of the format."""
    prefixes = [write_sizes(tmp_path / "a", [41]), write_sizes(tmp_path / "b", [41], first=100)]
    single = open_train(train=prefixes[0], seed=7).rows(np.arange(10))[:, 0]
    mixed = open_train(train=[(prefixes[0], 3), (prefixes[1], 1)], seed=7).rows(np.arange(10))[:, 0]
    assert single.tolist() == [8, 20, 16, 0, 36, 28, 24, 12, 32, 4]
    assert mixed.tolist() == [8, 20, 116, 16, 0, 36, 108, 28, 24, 12]


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
    assert {path.name for path in (tmp_path / "a.cache").glob("blend-*/*")} == {
        "SHA256SUMS",
        "dataset_index.npy",
        "dataset_sample_index.npy",
    }


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
