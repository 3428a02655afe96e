"""Shares of a tokenising job and their merge; what is there afterwards, or when it was interrupted."""

import contextlib
import functools
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from neox_jax.cli import main
from neox_jax.data import merge, text_files
from neox_jax.data.merge import merge_shards
from neox_jax.data.output import partial_folder
from neox_jax.data.text_files import Shard, find_spans, read_pieces, split_texts
from neox_jax.data.tokenize import tokenize_files
from neox_jax.data.workers import map_in_order
from neox_jax.errors import InputError
from neox_jax.tokenizer import Tokenizer, train_tokenizer

TEXTS = [f"Document {i}: the fox and {i * i} hounds.\n  né  end\n" * (i % 7 + 1) for i in range(60)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, vocab_size=320)


@pytest.fixture
def folder(tmp_path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.txt").write_text(TEXTS[0])
    (folder / "b.jsonl").write_bytes(lines(TEXTS[1:40]) + b"\n{bad\n" + lines(["", TEXTS[40]])[:-1])
    (folder / "c.jsonl").write_bytes(b"")
    (folder / "d.jsonl.zst").write_bytes(zstandard.compress(lines(TEXTS[41:50])))
    (folder / "e.jsonl").write_bytes(lines(TEXTS[50:]))
    return folder


def lines(texts) -> bytes:
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


def contents(folder: Path, prefix="out") -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob(f"{prefix}*") if path.is_file()}


LINE = st.one_of(
    st.binary(max_size=20),
    st.sampled_from([b"", b"\r", b" ", b"\xff", b'{"text": 1}', b"\xe2\x80\xa8"]),
    st.text(max_size=20).map(lambda text: json.dumps({"text": text}).encode()),
    st.text(max_size=20).map(lambda text: json.dumps({"text": text}, ensure_ascii=False).encode("utf-8", "replace")),
)
FILE = st.tuples(st.sampled_from([".txt", ".jsonl", ".jsonl.zst"]), st.lists(LINE, max_size=8).map(b"\n".join))


def documents(paths, shard: Shard) -> list:
    pieces = [piece for span in find_spans(paths, shard) for piece in read_pieces(span)]
    return [text for piece in pieces for text in split_texts(piece, "text")]


@settings(deadline=None, max_examples=150)
@given(files=st.lists(FILE, min_size=1, max_size=4), chunk_bytes=st.integers(1, 60), count=st.integers(1, 6))
def test_pieces_and_shards_of_any_size_hold_the_same_documents(files, chunk_bytes, count):
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for i, (suffix, content) in enumerate(files):
            paths.append(Path(folder, f"{i}{suffix}"))
            paths[-1].write_bytes(zstandard.compress(content) if suffix.endswith("zst") else content)
        whole = documents(paths, Shard(0, 1))
        with mock.patch.object(text_files, "CHUNK_BYTES", chunk_bytes):
            merged = [text for index in range(count) for text in documents(paths, Shard(index, count))]
    assert merged == whole
    num_lines = sum(bool(line.strip()) for suffix, text in files if suffix != ".txt" for line in text.split(b"\n"))
    assert len(whole) == num_lines + sum(suffix == ".txt" and text != b"" for suffix, text in files)


def test_shards_are_balanced_by_bytes(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_bytes(lines(TEXTS * 20))
    spans = [find_spans([path], Shard(index, 7)) for index in range(7)]
    assert [len(span) for span in spans] == [1] * 7
    sizes = [span[0].end - span[0].start for span in spans]
    longest = max(map(len, path.read_bytes().splitlines())) + 1
    assert sum(sizes) == path.stat().st_size
    assert max(sizes) - min(sizes) <= 2 * longest


@pytest.mark.parametrize("count", [1, 2, 3, 7, 70])
def test_merged_shards_are_the_single_run(count, folder, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "CHUNK_BYTES", 500)
    monkeypatch.setattr(merge, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(merge, "BLOCK_DOCUMENTS", 7)
    options = {"tokenizer": tokenizer, "append_eod": True, "skip_bad": 1}
    single = tokenize_files([folder], output=tmp_path / "out", **options)
    wanted = contents(tmp_path)
    assert sorted(wanted) == ["out.bin", "out.idx", "out.json"]
    (tmp_path / "merged").mkdir()
    for index in range(count):
        tokenize_files([folder], output=tmp_path / "merged" / "out", shard=Shard(index, count), **options)
    merged, num_shards = merge_shards(tmp_path / "merged" / "out")
    assert num_shards == count
    found = contents(tmp_path / "merged")
    assert {name: found[name] for name in wanted} == wanted
    assert (merged.documents, merged.bad_places) == (single.documents, single.bad_places)
    assert not list(tmp_path.rglob("*.partial"))


def test_merging_needs_one_whole_set(folder, tokenizer, tmp_path):
    def make(index, count, **options):
        options = {"tokenizer": tokenizer, "skip_bad": 1, **options}
        tokenize_files([folder], output=tmp_path / "out", shard=Shard(index, count), **options)

    def refuses(message):
        with pytest.raises(InputError, match=message):
            merge_shards(tmp_path / "out")
        assert not (tmp_path / "out.bin").exists()

    refuses("no .*out-00000-of-....json; shards are made by")
    make(0, 3)
    make(2, 3)
    refuses(r"out lacks 1 of 3 shards \(1/3\)")
    make(1, 3, append_eod=True)
    refuses(r"out-00001-of-00003 does not go with .*out-00000-of-00003 \(eod: 0, not None\)")
    for path in tmp_path.glob("out-00001-*"):
        path.unlink()
    (folder / "z.jsonl").write_bytes(lines(["more"]))
    make(1, 3)
    refuses(r"\(inputs: \('z.jsonl', 17\), not nothing\)")
    (folder / "z.jsonl").unlink()
    for path in tmp_path.glob("out-00001-*"):
        path.unlink()
    make(1, 3)
    make(0, 2)
    refuses("out has shards of 2 and of 3; remove")
    for path in tmp_path.glob("out-*-of-00002*"):
        path.unlink()
    os.truncate(tmp_path / "out-00002-of-00003.bin", 10)
    refuses("out-00002-of-00003.bin has 10 bytes; .*out-00002-of-00003.json tells of")


@pytest.mark.parametrize(("index", "count"), [(3, 3), (-1, 3), (0, 0)])
def test_a_shard_that_is_not_among_them_is_refused(index, count):
    with pytest.raises(InputError, match="shard .*: there are 0/"):
        Shard(index, count)


def test_a_finished_output_is_left_alone(folder, tokenizer, tmp_path):
    def make(**options):
        return tokenize_files(
            [folder], output=tmp_path / "out", **{"tokenizer": tokenizer, "skip_bad": 1, "append_eod": True, **options}
        )

    first = make()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out*")}
    again = make(workers=2)
    assert again.seconds == 0
    assert (again.documents, again.tokens, again.bytes) == (first.documents, first.tokens, first.bytes)
    with pytest.raises(InputError, match=r"out.json tells of other work \(eod: 0, not None\); remove it"):
        make(append_eod=False)
    with pytest.raises(InputError, match=r"other work \(tokenizer_sha256: "):
        make(tokenizer=train_tokenizer(TEXTS, vocab_size=310))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("out*")} == before

    (tmp_path / "out.idx").rename(tmp_path / "kept.idx")  # as if it was killed while the files took their names
    assert make().seconds > 0
    assert (tmp_path / "out.idx").read_bytes() == (tmp_path / "kept.idx").read_bytes()
    os.truncate(tmp_path / "out.bin", 10)
    with pytest.raises(InputError, match="out.bin has 10 bytes; .*out.json tells of"):
        make()
    (tmp_path / "out.json").unlink()
    with pytest.raises(InputError, match="out.bin is there, and no .*out.json that says of what"):
        make()
    (tmp_path / "out.json").write_text('{"mine": 1}')
    with pytest.raises(InputError, match="out.json is not by 'neox-jax tokenize 1'; move it away"):
        make()


def test_two_processes_do_not_write_one_output(folder, tokenizer, tmp_path):
    with (
        partial_folder(tmp_path / "out"),
        pytest.raises(InputError, match="out.partial is in use: another process writes"),
    ):
        tokenize_files([folder], tokenizer=tokenizer, output=tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_a_full_disk_leaves_nothing(folder, tokenizer, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(InputError, match=r"out.bin cannot be written \(File too large\); nothing of it was kept"):
            tokenize_files([folder], tokenizer=tokenizer, output=tmp_path / "out", skip_bad=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def children_of(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task")
    return [int(child) for task in tasks.iterdir() for child in (task / "children").read_text().split()]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def wait_for(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="looks processes up in /proc")
@pytest.mark.parametrize(("which", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGKILL", -9)])
def test_interrupted_it_leaves_no_output_and_no_processes(which, code, tokenizer, tmp_path, capsys):
    tokenizer.save(tmp_path / "tokenizer.json")
    (tmp_path / "big.jsonl").write_bytes(lines(TEXTS) * 3000)
    arguments = ["--tokenizer", tmp_path / "tokenizer.json", "--output", tmp_path / "out", "--workers", 2]
    command = [sys.executable, "-m", "neox_jax.cli", "tokenize", tmp_path / "big.jsonl", *arguments]
    with subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    ) as run:
        try:
            wait_for(lambda: any(path.stat().st_size for path in tmp_path.glob("out.partial/*.tmp")))
            children = children_of(run.pid)
            assert len(children) >= 2
            if which == "SIGINT":
                os.killpg(run.pid, signal.SIGINT)  # as a terminal does
            else:
                os.kill(run.pid, signal.Signals[which])
            errors = run.communicate(timeout=60)[1].decode()
        finally:
            with contextlib.suppress(ProcessLookupError):
                run.kill()
    assert run.returncode == code
    assert errors == ("neox-jax: interrupted\n" if which == "SIGINT" else "")
    wait_for(lambda: not any(map(is_alive, children)))
    assert sorted(path.name for path in tmp_path.glob("out*")) == (["out.partial"] if which == "SIGKILL" else [])

    (tmp_path / "small.txt").write_text(TEXTS[0])
    assert main(["tokenize", *map(str, [tmp_path / "small.txt", *arguments])]) == 0
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out.bin", "out.idx", "out.json"]
    assert "1 documents" in capsys.readouterr().out


def test_worker_processes_that_fail():
    def make(function, *arguments):
        return functools.partial(functools.partial, function, *arguments)  # loads nothing in the processes

    with pytest.raises(InputError, match=r"a worker process was killed \(SIGKILL\); where memory ran out"):
        list(map_in_order(make(signal.raise_signal), [signal.SIGKILL], workers=2))
    with pytest.raises(InputError, match="^shard 5/5"):
        list(map_in_order(make(Shard, 5), [7, 8, 5, 7, 4, 9], workers=2))
    assert list(map_in_order(make(abs), range(-40, 0), workers=2)) == list(range(40, 0, -1))


def test_the_verbs(folder, tokenizer, tmp_path, capsys):
    tokenizer.save(tmp_path / "tokenizer.json")
    options = ["--tokenizer", str(tmp_path / "tokenizer.json"), "--output", str(tmp_path / "out"), "--workers", "1"]
    command = ["tokenize", str(folder), *options]
    assert main([*command, "--shard", "1/2"]) == 65
    assert "b.jsonl:41: not JSON" in capsys.readouterr().err
    for shard in ("0/2", "1/2"):
        assert main([*command, "--shard", shard, "--skip-bad", "3"]) == 0
    printed = capsys.readouterr()
    assert "out-00000-of-00002.bin" in printed.out
    assert "; 1 bad documents skipped" in printed.out
    assert f"skipped {folder}/b.jsonl:41: not JSON" in printed.err
    for _ in range(2):
        assert main(["merge-shards", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.count("60 documents, ") == 2
    assert main([*command, "--skip-bad", "3"]) == 0
    assert "complete before: nothing done" in capsys.readouterr().out
    for shard in ("2/2", "1", "x/2", "-1/2", "0/0"):
        with pytest.raises(SystemExit, match="2"):
            main([*command, f"--shard={shard}"])
        assert f"{shard!r} is no shard" in capsys.readouterr().err
