"""Mutated checkpoints of every kind are read or refused: a short run of benchmarks/fuzz_checkpoints.py."""

import importlib.util
import os
from pathlib import Path

import pytest

from neox_jax.errors import InputError

pytest.importorskip("torch")


@pytest.fixture(scope="module")
def fuzz():
    path = Path(__file__).parents[1] / "benchmarks" / "fuzz_checkpoints.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_mutated_checkpoints_are_read_or_refused(fuzz, tmp_path):
    num_files = 2000
    with fuzz.Fuzzer([*fuzz.KINDS], tmp_path) as fuzzer:
        counts, defects = fuzzer.run(seed=7, first=0, stride=1, end=num_files, seconds_limit=float("inf"))
    assert not defects
    assert counts.total() == num_files
    for kind, made in fuzz.KINDS.items():
        for how in made.hows:
            if how != "values":  # of a tensor: all are read
                assert counts[kind, how, "refused"] > 10
        assert sum(counts[kind, how, "read"] for how in made.hows) > 20


def refuse(message: str):
    raise InputError(message)


def spin():
    while True:
        pass


@pytest.mark.parametrize(
    ("read", "result"),
    [
        (lambda folder: None, "read"),
        (lambda folder: (folder / "here").read_bytes(), "read"),
        (lambda folder: refuse("a line"), "refused"),
        (lambda folder: refuse("two\nlines"), "a message that is not one line"),
        (lambda folder: refuse("\x1b[2J"), "a message that is not one line"),
        (lambda folder: refuse("x" * 100_000), "a message that is not one line, or long"),
        (lambda folder: {}["x"], "KeyError"),
        (lambda folder: spin(), "Late"),
        (lambda folder: (folder.parent / "there").read_bytes(), "did open"),
        (lambda folder: (folder / ".." / "there").read_bytes(), "did open"),
        (lambda folder: (folder / "here").write_bytes(b""), "did open"),
        (lambda folder: (folder / "new").touch(), "did os.utime"),
        (lambda folder: os.listdir(folder.parent), "did os.listdir"),
        (lambda folder: os.mkdir(folder / "new"), "did os.mkdir"),
        (lambda folder: os.system("true"), "did os.system"),
        (lambda folder: exec("1"), "did compile"),
        (lambda folder: __import__("this_is_no_module"), "did import"),
    ],
)
def test_the_fuzzer_sees_defects(read, result, fuzz, tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz, "MAX_SECONDS", 0.2)
    (tmp_path / "model").mkdir()
    for path in (tmp_path / "model" / "here", tmp_path / "there"):
        path.write_bytes(b"x")
    found = fuzz.attempt(lambda: read(tmp_path / "model"), tmp_path / "model")
    assert found.startswith(result), found
