"""Prompts out of a file, or from whoever types them, and completions back."""

import contextlib
import json
import os
import sys
import time
from pathlib import Path

from neox_jax.disk import read_text
from neox_jax.errors import InputError
from neox_jax.generation import Completion, generate
from neox_jax.metrics import Progress
from neox_jax.model import NeoX
from neox_jax.tokenizer import Tokenizer


def complete_file(model: NeoX, tok: Tokenizer, source: str | Path, output: str | Path, **options) -> int:
    """Completes every {"prompt": ...} of a jsonl file, into the same lines with completion and finish_reason, in order.

    What is complete is kept in OUTPUT.partial line by line, so that the same call goes on where one was ended; with
    other prompts or options it is begun again. OUTPUT is there when it is whole. options: of `generate`.
    Returns the number of lines. Raises: InputError for a file that cannot be read or written.
    """
    asked, output = read_prompts(source), Path(output)
    settings = {**options, "prompts": len(asked)}
    with _Lines(output, asked, settings) as lines:
        progress = Progress("completing", total=len(asked), start=lines.num_there, line_seconds=10)
        start = time.perf_counter()

        def done(i: int, completion: Completion) -> None:
            lines.add(i, completion)
            made = lines.num_there - lines.num_before
            seconds_left = (time.perf_counter() - start) / made * (len(asked) - lines.num_there)
            progress.update(lines.num_there, f"{lines.num_tokens:,} tokens", seconds_left=seconds_left)

        try:
            generate(
                model, tok, [line["prompt"] for line in asked], done=done, skip=set(range(lines.num_before)), **options
            )
        finally:
            progress.close()
        lines.finish()
    return len(asked)


def read_prompts(path: str | Path) -> list[dict]:
    """Raises: InputError for a file that cannot be read, naming the line that is no {"prompt": TEXT}."""
    lines = []
    for number, text in enumerate(read_text(path).splitlines(), start=1):
        try:
            line = json.loads(text)
            if not isinstance(line["prompt"], str):
                raise TypeError("prompt is no text")
            lines.append(line)
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise InputError(f'{path}, line {number}: wanted {{"prompt": TEXT}}, got {text[:60]!r}') from error
    return lines


class _Lines:
    """OUTPUT.partial: settings in the first line, then completed lines in the order of the prompts.

    num_before: lines that were there; num_there: that are complete now, in order or not; num_tokens: of those made.
    """

    def __init__(self, output: Path, asked: list[dict], settings: dict):
        self._output, self._path, self._asked = output, output.with_name(output.name + ".partial"), asked
        self._settings = json.dumps(settings, sort_keys=True)
        self._waiting, self.num_tokens = {}, 0
        kept = self._read()
        self.num_before = self._num_written = len(kept)
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_text("".join(f"{line}\n" for line in [self._settings, *kept]), encoding="utf-8")
            self._file = self._path.open("a", encoding="utf-8")
        except OSError as error:
            raise InputError(f"{self._path} cannot be written: {error.strerror}") from error

    def __enter__(self):
        return self

    def __exit__(self, *exception) -> None:
        self._file.close()

    @property
    def num_there(self) -> int:
        return self._num_written + len(self._waiting)

    def add(self, i: int, completion: Completion) -> None:
        line = {**self._asked[i], "completion": completion.text, "finish_reason": completion.finish_reason}
        for name in ("top_logprobs", "prompt_logprobs"):
            if getattr(completion, name) is not None:
                line |= {"tokens": completion.tokens, "logprobs": completion.logprobs, name: getattr(completion, name)}
        self._waiting[i] = json.dumps(line)
        self.num_tokens += len(completion.tokens)
        while self._num_written in self._waiting:
            self._file.write(self._waiting.pop(self._num_written) + "\n")
            self._num_written += 1
        self._file.flush()

    def finish(self) -> None:
        """Puts OUTPUT where it belongs."""
        try:
            os.fsync(self._file.fileno())
            lines = self._path.read_text(encoding="utf-8").splitlines(keepends=True)[1:]
            whole = self._output.with_name(f".{self._output.name}.tmp")
            whole.write_text("".join(lines), encoding="utf-8")
            os.replace(whole, self._output)
            self._path.unlink()
        except OSError as error:
            raise InputError(f"{self._output} cannot be written: {error.strerror}") from error

    def _read(self) -> list[str]:
        """The lines that are there already and are of these prompts and settings."""
        try:
            first, *lines = self._path.read_text(encoding="utf-8").split("\n")
        except (OSError, ValueError):
            return []
        kept = []
        for text, asked in zip(lines[:-1], self._asked, strict=False):  # the last one is empty, or was cut off
            with contextlib.suppress(ValueError):
                if json.loads(text).items() >= asked.items():
                    kept.append(text)
                    continue
            break
        return kept if first == self._settings else []


def converse(model: NeoX, tok: Tokenizer, *, max_new_tokens: int, **options) -> None:
    """Continues what is typed, line by line, until the end of the input.

    A line stands behind all the text so far; an empty one forgets it. Of a text too long for the model its end is kept.
    Ctrl-C stops what is being written, not the conversation.
    """
    most = model.config.max_position_embeddings - max_new_tokens
    if most < 1:
        raise InputError(f"max_new_tokens {max_new_tokens} leaves no room in a context of {most + max_new_tokens}")
    text, prompt = "", "> " if sys.stdin.isatty() else ""
    print("A line is continued; an empty line starts afresh; Ctrl-D ends.", file=sys.stderr)
    while True:
        try:
            line = input(prompt)
        except EOFError:
            return
        except KeyboardInterrupt:
            print()
            return
        if not line:
            text = ""
            continue
        text += line
        written = []

        def stream(_, piece: str, written: list[str] = written) -> None:
            written.append(piece)
            print(piece, end="", flush=True)

        with contextlib.suppress(KeyboardInterrupt):
            generate(model, tok, [tok.encode(text)[-most:]], max_new_tokens=max_new_tokens, stream=stream, **options)
        text += "".join(written)
        print()
