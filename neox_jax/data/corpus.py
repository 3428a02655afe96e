"""A text corpus that is on every machine: the source and documentation of Python's own standard library."""

import ast
import contextlib
import dataclasses
import hashlib
import json
import os
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from neox_jax.errors import InputError

# Tests repeat one shape of code thousands of times; the others belong to one machine or to somebody else.
LEFT_OUT_FOLDERS = ("site-packages", "test", "tests", "idle_test", "_bundled", "__pycache__")
LEFT_OUT_PREFIXES = ("config-", "_sysconfigdata_")  # how this one interpreter was built
PROMPT = "### Instruction:\nBegin a function named {name} that takes {arguments}.\n### Response:\n"
COMPLETION = 'def {name}({arguments}):\n    """{text}"""'
MAX_DOCSTRING = 120  # characters of a first paragraph: what is longer is seldom one sentence
_DOCUMENTED = re.compile(
    r"""^[ \t]*def (\w+)\((.*)\):\n[ \t]+[rR]?(\"{3}|'{3}|"|')((?:.|\n(?![ \t]*\n))+?)(?:\3|\n[ \t]*\n)""", re.MULTILINE
)


@dataclasses.dataclass(frozen=True)
class CorpusSummary:
    """Documents and bytes of UTF-8 text in train.jsonl and heldout.jsonl, and instructions made of each side."""

    train_documents: int
    train_bytes: int
    heldout_documents: int
    heldout_bytes: int
    train_instructions: int
    heldout_instructions: int


def collect_standard_library(folder: str | Path, *, heldout_fraction: float = 0.05) -> CorpusSummary:
    """Writes train.jsonl, heldout.jsonl ({"path", "text"} a line) and heldout.txt (its texts end to end) into folder,
    and of their functions instructions.jsonl and instructions_heldout.jsonl ({"prompt", "completion"} a line).

    What is in it: every .py file of the running Python's standard library as it stands (code, comments, docstrings),
    and each topic of `help()` (the language reference: pydoc_data) as a document of plain text. What is not: tests,
    installed and bundled packages, the code pages in `encodings` (tables a program wrote), the interpreter's own build
    settings, and files that are empty or not UTF-8. A document is held out by the SHA-256 of its path, so the split is
    the same wherever the same Python is. Documents are in the order of their paths.
    Raises: InputError for a fraction that leaves nothing on one side.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    documents, num_bytes, num_instructions = [0, 0], [0, 0], [0, 0]  # train, held out
    names = ("train.jsonl", "heldout.jsonl", "instructions.jsonl", "instructions_heldout.jsonl", "heldout.txt")
    with _written_whole(folder, *names) as files:
        texts, instructions, heldout_text = files[:2], files[2:4], files[4]
        for path, text in sorted(_documents(Path(sysconfig.get_path("stdlib")))):
            held = _fraction_of(path) < heldout_fraction
            encoded = text.encode()
            documents[held], num_bytes[held] = documents[held] + 1, num_bytes[held] + len(encoded)
            texts[held].write(_line({"path": path, "text": text}))
            if held:
                heldout_text.write(encoded)
            for instruction in _instructions(text) if path.endswith(".py") else ():
                instructions[held].write(_line(instruction))
                num_instructions[held] += 1
        if not all(documents):
            raise InputError(
                f"heldout_fraction {heldout_fraction} of {sum(documents)} documents leaves {documents[0]} to train on "
                f"and {documents[1]} held out; wanted some of both: give a fraction between 0 and 1"
            )
    return CorpusSummary(documents[0], num_bytes[0], documents[1], num_bytes[1], *num_instructions)


def _line(value: dict) -> bytes:
    return json.dumps(value).encode() + b"\n"


def _instructions(text: str) -> Iterator[dict]:
    """To begin each function of a module that says in a sentence what it does, and how it begins there.

    Not those such as __init__, of which every class has another.
    """
    for name, arguments, _, docstring in _DOCUMENTED.findall(text):
        words = {"name": name, "arguments": arguments, "text": " ".join(docstring.split())}
        completion = COMPLETION.format(**words)
        if not name.startswith("__") and len(words["text"]) <= MAX_DOCSTRING and _is_python(completion):
            prompt = PROMPT.format(name=name, arguments=arguments or "nothing")
            yield {"prompt": prompt, "completion": completion}


def _is_python(source: str) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of escapes in strings, which are the library's affair
        try:
            ast.parse(source)
        except SyntaxError:
            return False
    return True


def _documents(library: Path) -> Iterator[tuple[str, str]]:
    """(path relative to the library, text), in no order."""
    for parent, folders, files in os.walk(library):
        folders[:] = [f for f in folders if f not in LEFT_OUT_FOLDERS and not f.startswith(LEFT_OUT_PREFIXES)]
        for name in files:
            path = Path(parent, name)
            relative = path.relative_to(library).as_posix()
            if not name.endswith(".py") or name.startswith(LEFT_OUT_PREFIXES) or relative == "pydoc_data/topics.py":
                continue
            with contextlib.suppress(UnicodeDecodeError):
                text = path.read_bytes().decode("utf-8")
                if text.strip() and not _is_code_page(relative, text):
                    yield relative, text
    yield from _help_topics()


def _help_topics() -> Iterator[tuple[str, str]]:
    from pydoc_data.topics import topics

    for name, text in topics.items():
        yield f"pydoc_data/topics/{name}.txt", text


def _is_code_page(path: str, text: str) -> bool:
    return path.startswith("encodings/") and ("decoding_table" in text or "decoding_map" in text)


def _fraction_of(path: str) -> float:
    """A number in [0, 1) that depends on the path alone."""
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:6], "big") / 2**48


@contextlib.contextmanager
def _written_whole(folder: Path, *names: str):
    """Opens these files under temporary names; they get their own when the block ends well, and vanish otherwise."""
    temporary = [folder / f"{name}.{os.getpid()}.tmp" for name in names]
    try:
        with contextlib.ExitStack() as stack:
            yield [stack.enter_context(open(path, "wb")) for path in temporary]
        for path, name in zip(temporary, names, strict=True):
            os.replace(path, folder / name)
    finally:
        for path in temporary:
            path.unlink(missing_ok=True)
