"""Text files to .bin/.idx: what is written, that workers do not change it, what is refused; the Python corpus."""

import ast
import json
import os
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import zstandard

from neox_jax.data import text_files
from neox_jax.data.corpus import collect_standard_library
from neox_jax.data.megatron import IndexedDataset
from neox_jax.data.text_files import find_inputs
from neox_jax.data.tokenize import read_texts, tokenize_files
from neox_jax.errors import InputError
from neox_jax.tokenizer import Tokenizer, train_tokenizer

TEXTS = [f"Document {i}: the fox and {i * i} hounds.\r\n  né\u0000  end\n" * (i % 7 + 1) for i in range(60)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, vocab_size=320)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three kinds of files, in two folders: TEXTS in order, with empty documents and blank lines between."""
    folder = tmp_path / "in"
    (folder / "b").mkdir(parents=True)
    (folder / "a.txt").write_bytes(TEXTS[0].encode())
    (folder / "b" / "1.jsonl").write_bytes(lines(TEXTS[1:30]) + b"\n" + lines(["", TEXTS[30]])[:-1])
    first, second = (zstandard.compress(lines(part)) for part in (TEXTS[31:40], TEXTS[40:]))
    (folder / "b" / "2.jsonl.zst").write_bytes(first + second)
    (folder / "b" / "ignored.md").write_text("ignored")
    return folder


def lines(texts, key="text") -> bytes:
    return b"".join(json.dumps({key: text, "meta": 1}).encode() + b"\n" for text in texts)


def test_every_document_becomes_one_sequence_in_order(folder, tokenizer, tmp_path):
    reports = []
    summary = tokenize_files(
        [folder], tokenizer=tokenizer, output=tmp_path / "out", progress=lambda *p: reports.append(p)
    )
    dataset = IndexedDataset(tmp_path / "out")
    assert dataset.dtype == np.uint16
    assert [dataset[i].tolist() for i in range(len(dataset))] == [tokenizer.encode(text) for text in TEXTS]
    assert dataset.doc_idx.tolist() == list(range(len(TEXTS) + 1))
    assert (summary.documents, summary.empty_documents) == (60, 1)
    assert summary.tokens == len(dataset.tokens)
    assert summary.bytes == sum(len(text.encode()) for text in TEXTS)
    total = sum(path.stat().st_size for path in find_inputs([folder]))
    assert reports[-1] == (total, total)
    assert sorted(reports) == reports
    assert list(read_texts([folder])) == [*TEXTS[:30], "", *TEXTS[30:]]


def test_append_eod_ends_each_document(folder, tokenizer, tmp_path):
    tokenize_files([folder / "a.txt"], tokenizer=tokenizer, output=tmp_path / "out", append_eod=True)
    assert IndexedDataset(tmp_path / "out")[0].tolist() == [*tokenizer.encode(TEXTS[0]), 0]


def test_workers_do_not_change_a_byte(folder, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "CHUNK_BYTES", 500)  # many pieces, so that the order could go wrong
    for workers in (1, 3):
        tokenize_files(
            [folder], tokenizer=tokenizer, output=tmp_path / f"out{workers}", workers=workers, append_eod=True
        )
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"out1{suffix}").read_bytes() == (tmp_path / f"out3{suffix}").read_bytes()


def test_the_library_uses_one_thread_a_process(folder, tokenizer, tmp_path, monkeypatch):
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    during = []
    tokenize_files(
        [folder], tokenizer=tokenizer, output=tmp_path / "out",
        progress=lambda *_: during.append(os.environ["TOKENIZERS_PARALLELISM"]),
    )  # fmt: skip
    assert set(during) == {"false"}
    assert "TOKENIZERS_PARALLELISM" not in os.environ


def gpt_neox_files(inputs, encode, eod) -> dict[str, bytes]:
    """What gpt-neox's tools/datasets/preprocess_data.py --append-eod writes, as its source says it: lm_dataformat's
    order and readers, no empty texts, add_item and end_document, and the index of MMapIndexedDatasetBuilder."""
    tokens, sizes, pointers, doc_idx = [], [], [], [0]
    for name in inputs:
        paths = [os.path.join(name, entry) for entry in sorted(os.listdir(name))] if os.path.isdir(name) else [name]
        for path in map(str, paths):
            if path.endswith(".txt"):
                texts = [Path(path).read_text(encoding="utf-8")]
            elif path.endswith(".jsonl"):
                texts = [json.loads(line)["text"] for line in Path(path).read_text(encoding="utf-8").splitlines()]
            elif path.endswith(".jsonl.zst"):
                with zstandard.open(path, "rt", encoding="utf-8") as file:
                    texts = [json.loads(line)["text"] for line in file]
            else:
                continue
            for text in filter(None, texts):
                ids = [*encode(text), eod]
                pointers.append(2 * sum(map(len, tokens)))
                tokens.append(ids)
                sizes.append(len(ids))
                doc_idx.append(len(sizes))
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, len(sizes), len(doc_idx))
    index += struct.pack(f"<{len(sizes)}i{len(pointers)}q{len(doc_idx)}q", *sizes, *pointers, *doc_idx)
    return {".bin": b"".join(struct.pack(f"<{len(ids)}H", *ids) for ids in tokens), ".idx": index}


def assert_like_gpt_neox(inputs, tokenizer_file, output, **options):
    tokenizer = Tokenizer.from_file(tokenizer_file)
    tokenize_files(inputs, tokenizer=tokenizer, output=output, append_eod=True, **options)
    library = tokenizers.Tokenizer.from_file(str(tokenizer_file))
    wanted = gpt_neox_files(inputs, lambda text: library.encode(text).ids, library.token_to_id("<|endoftext|>"))
    for suffix, content in wanted.items():
        assert Path(f"{output}{suffix}").read_bytes() == content


def test_output_is_byte_for_byte_what_gpt_neox_writes(tokenizer, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    texts = [text.replace("\r\n", "\n") for text in TEXTS]  # gpt-neox reads a .txt with its line ends translated
    (folder / "b.txt").write_text(texts[0], encoding="utf-8")
    (folder / "a.jsonl").write_bytes(lines([*texts[1:20], "", *TEXTS[20:30]]))
    (folder / "c.jsonl.zst").write_bytes(zstandard.compress(lines(TEXTS[30:])))
    (tmp_path / "last.jsonl").write_bytes(lines(["ab", "c"]))
    tokenizer.save(tmp_path / "tokenizer.json")
    assert_like_gpt_neox([folder, tmp_path / "last.jsonl"], tmp_path / "tokenizer.json", tmp_path / "out")


def test_real_text_with_the_20b_tokenizer_is_what_gpt_neox_writes(shared_data, tmp_path):
    text = "".join((shared_data / name).read_text()[:100_000] for name in ("wikitext2_test.txt", "tinyshakespeare.txt"))
    (tmp_path / "in.jsonl").write_bytes(lines(text[start : start + 3000] for start in range(0, 200_000, 3000)))
    (tmp_path / "long.txt").write_text((shared_data / "wikitext2_valid.txt").read_text()[:200_000])
    inputs = [tmp_path / "in.jsonl", tmp_path / "long.txt"]
    assert_like_gpt_neox(inputs, shared_data / "20B_tokenizer.json", tmp_path / "out", workers=2)


BAD_LINES = {
    "not JSON": (b'{"text": "unfinished\n', "bad.jsonl:3: not JSON"),
    "not UTF-8": (b'{"text": "\xff"}\n', "bad.jsonl:3: not UTF-8 at byte 10"),
    "no key": (b'{"body": "x", "id": 1}\n', "bad.jsonl:3: wanted an object with the key 'text', got the keys body, id"),
    "no object": (b'["x"]\n', "bad.jsonl:3: wanted an object with the key 'text', got a list"),
    "no string": (b'{"text": 5}\n', "bad.jsonl:3: 'text' holds a int; wanted a string"),
    "surrogate": (rb'{"text": "ab\ud800"}' + b"\n", "bad.jsonl:3: half a surrogate pair at character 2"),
    "too deep": (b"[" * 100_000 + b"\n", "bad.jsonl:3: not JSON"),
}


@pytest.mark.parametrize(("line", "message"), BAD_LINES.values(), ids=BAD_LINES)
def test_bad_lines_are_refused_by_file_and_number(line, message, tokenizer, tmp_path):
    (tmp_path / "bad.jsonl").write_bytes(lines(["good"]) + b"\n" + line + lines(["good"]))
    with pytest.raises(InputError, match=message):
        tokenize_files([tmp_path / "bad.jsonl"], tokenizer=tokenizer, output=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["bad.jsonl"]  # nothing half-written


def test_a_bad_line_in_a_worker_process_is_the_same_error(tokenizer, tmp_path):
    (tmp_path / "bad.jsonl").write_bytes(lines(["good"]) + b"{\n")
    with pytest.raises(InputError, match=r"bad.jsonl:2: not JSON"):
        tokenize_files([tmp_path / "bad.jsonl"], tokenizer=tokenizer, output=tmp_path / "out", workers=2)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.jsonl"]


@pytest.mark.parametrize("name", ["in.jsonl", "in.jsonl.zst"])
def test_bad_lines_in_later_pieces_keep_their_number(name, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "CHUNK_BYTES", 100)
    content = lines(TEXTS[:20]) + b"\n{\n" + lines(TEXTS[20:])
    (tmp_path / name).write_bytes(zstandard.compress(content) if name.endswith("zst") else content)
    with pytest.raises(InputError, match=f"{name}:22: not JSON"):
        tokenize_files([tmp_path / name], tokenizer=tokenizer, output=tmp_path / "out")


@pytest.mark.parametrize("workers", [1, 2])
def test_a_counted_few_can_be_skipped(workers, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "CHUNK_BYTES", 100)
    bad = [line for line, _ in list(BAD_LINES.values())[:5]]
    (tmp_path / "in.jsonl").write_bytes(b"".join(lines([text]) + line for text, line in zip(TEXTS, bad, strict=False)))
    (tmp_path / "latin.txt").write_bytes(b"n\xe9")
    inputs = [tmp_path / "in.jsonl", tmp_path / "latin.txt"]
    options = {"tokenizer": tokenizer, "output": tmp_path / "out", "workers": workers}
    with pytest.raises(InputError, match=r"in.jsonl:10: 'text' holds a int; .* .bad document 5; 4 may be skipped"):
        tokenize_files(inputs, **options, skip_bad=4)
    with pytest.raises(InputError, match=r"latin.txt: not UTF-8 at byte 1 .* .bad document 6; 5 may be skipped"):
        tokenize_files(inputs, **options, skip_bad=5)
    assert not list(tmp_path.glob("out*"))
    summary = tokenize_files(inputs, **options, skip_bad=6)
    assert (summary.documents, summary.bad_documents) == (5, 6)
    assert [place.split(":")[1] for place in summary.bad_places] == ["2", "4", "6"]
    assert IndexedDataset(tmp_path / "out")[4].tolist() == tokenizer.encode(TEXTS[4])


def test_bad_inputs_are_refused(tokenizer, tmp_path):
    def refuses(message, name, content=None, **options):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=message):
            tokenize_files([tmp_path / name], tokenizer=tokenizer, output=tmp_path / "out", **options)
        assert not list(tmp_path.glob("out*"))

    data = zstandard.compress(lines(TEXTS))
    refuses("no file or folder .*nothing.txt", "nothing.txt")
    refuses("notes.md is of no known kind; wanted .txt, .jsonl, .jsonl.zst", "notes.md", b"x")
    refuses("latin.txt: not UTF-8 at byte 1", "latin.txt", b"n\xe9")
    refuses("no documents in 1 files", "empty.txt", b"")
    refuses("no documents in 1 files .1 were empty", "empty.jsonl", lines([""]))
    refuses("cut.jsonl.zst ends in the middle of its data: it is truncated", "cut.jsonl.zst", data[:-20])
    refuses("bad.jsonl.zst is no zstandard file, or damaged", "bad.jsonl.zst", b"plain text")
    refuses("workers 0, skip_bad 0; wanted at least 1", "one.txt", b"x", workers=0)
    refuses("with the key 'body', got the keys text, meta", "key.jsonl", lines(["x"]), json_key="body")
    (tmp_path / "folder").mkdir()
    refuses("no .txt, .jsonl, .jsonl.zst files in .*folder", "folder")


def test_append_eod_needs_such_a_token(tokenizer, tmp_path):
    file = json.loads(tokenizer.to_json())
    file["added_tokens"] = []
    file["model"]["vocab"] = {t.replace("<|endoftext|>", "<end>"): i for t, i in file["model"]["vocab"].items()}
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(InputError, match="no end-of-document token"):
        tokenize_files(
            [tmp_path / "a.txt"],
            tokenizer=Tokenizer.from_json(json.dumps(file)),
            output=tmp_path / "out",
            append_eod=True,
        )


def test_zstandard_missing_says_what_to_install(tokenizer, tmp_path, monkeypatch):
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(lines(["x"])))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(InputError, match="needs the zstandard package: pip install"):
        tokenize_files([tmp_path / "a.jsonl.zst"], tokenizer=tokenizer, output=tmp_path / "out")


def test_the_corpus_is_the_standard_library_split_by_path(tmp_path):
    summary = collect_standard_library(tmp_path / "one", heldout_fraction=0.1)
    sides = {
        side: [json.loads(line) for line in (tmp_path / "one" / f"{side}.jsonl").open()]
        for side in ("train", "heldout")
    }
    paths = {side: {document["path"] for document in documents} for side, documents in sides.items()}
    assert not paths["train"] & paths["heldout"]
    everything = paths["train"] | paths["heldout"]
    assert {"dataclasses.py", "json/decoder.py", "pydoc_data/topics/assert.txt", "encodings/utf_8.py"} <= everything
    assert not everything & {"pydoc_data/topics.py", "encodings/cp1252.py", "idlelib/idle_test/htest.py"}
    assert not [path for path in everything if "site-packages" in path or "/test" in path or "_sysconfigdata_" in path]
    assert (tmp_path / "one" / "heldout.txt").read_bytes() == "".join(d["text"] for d in sides["heldout"]).encode()
    assert summary.train_bytes == sum(len(document["text"].encode()) for document in sides["train"])
    assert (summary.train_documents, summary.heldout_documents) == tuple(map(len, sides.values()))
    assert summary.train_bytes > 5e6
    assert 0.05 < summary.heldout_documents / len(everything) < 0.15

    smaller = tmp_path / "two"
    collect_standard_library(smaller, heldout_fraction=0.05)  # a smaller share is a part of the larger
    assert {json.loads(line)["path"] for line in (smaller / "heldout.jsonl").open()} < paths["heldout"]
    names = ["heldout.jsonl", "heldout.txt", "instructions.jsonl", "instructions_heldout.jsonl", "train.jsonl"]
    assert sorted(path.name for path in smaller.iterdir()) == names

    again = collect_standard_library(tmp_path / "three", heldout_fraction=0.1)
    assert again == summary
    for name in names:
        assert (tmp_path / "three" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::SyntaxWarning"
)  # of escapes in the library's strings
def test_instructions_are_of_the_functions_of_their_own_side(tmp_path):
    summary = collect_standard_library(tmp_path)
    counts = {"train": summary.train_instructions, "heldout": summary.heldout_instructions}
    for side, name in (("train", "instructions"), ("heldout", "instructions_heldout")):
        documents = [json.loads(line) for line in (tmp_path / f"{side}.jsonl").open()]
        text = "\n".join(document["text"] for document in documents if document["path"].endswith(".py"))
        lines, words = set(map(str.strip, text.split("\n"))), " ".join(text.split())
        instructions = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").open()]
        assert len(instructions) == counts[side] > 100
        for i, instruction in enumerate(instructions):
            (function,) = ast.parse(instruction["completion"]).body
            signature, docstring = instruction["completion"].split("\n")
            assert signature in lines
            assert i % 100 or docstring.strip()[3:-3] in words  # of some: it is looked for in 10 MB
            asked = f"named {function.name} that takes {signature.split('(', 1)[1][:-2] or 'nothing'}."
            assert instruction["prompt"] == f"### Instruction:\nBegin a function {asked}\n### Response:\n"


@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_a_corpus_with_an_empty_side_is_refused(fraction, tmp_path):
    with pytest.raises(InputError, match="wanted some of both"):
        collect_standard_library(tmp_path, heldout_fraction=fraction)
    assert not list(tmp_path.iterdir())
