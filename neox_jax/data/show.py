"""Training batches for people to look at: what step S was trained on, and which steps had a text.

Steps count from 0, so step S is the batch behind line S + 1 of metrics.jsonl. Nothing here uses a device.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from neox_jax.config import Config
from neox_jax.data.loader import digest_batch
from neox_jax.data.sources import open_source
from neox_jax.errors import InputError
from neox_jax.marks import BEGINS, strip_marks
from neox_jax.tokenizer import Tokenizer

CONTEXT = 40  # characters shown on either side of what was found


@dataclasses.dataclass(frozen=True)
class Found:
    """Where a text is: `text` is what is around it, on one line."""

    step: int
    row: int
    sample: int
    text: str


class TrainingData:
    """The batches of data.train, as a run of this configuration reads them. Raises: InputError."""

    def __init__(self, config: Config):
        self.batch_size = config.train.batch_size
        self.tokenizer = Tokenizer.from_file(config.data.tokenizer) if config.data.tokenizer else None
        self.samples = open_source(
            config, config.data.train, which="train", field="data.train", tokenizer=self.tokenizer
        )

    def batch(self, step: int) -> np.ndarray:
        """Rows of step `step`, with their marks: int32 [B, T]."""
        return self.samples.rows(np.arange(step * self.batch_size, (step + 1) * self.batch_size))

    def describe(self, step: int, *, row: int | None = None, ids: bool = False) -> Iterator[str]:
        """Lines: the batch's digest, then of each row, or of one, its documents as text, or as token ids.

        Without data.tokenizer there is no text: ids.
        """
        if row is not None and not 0 <= row < self.batch_size:
            raise InputError(f"row {row} is not in the batch; it has rows 0 to {self.batch_size - 1}")
        batch = self.batch(step)
        first = step * self.batch_size
        yield (
            f"step {step}: {self.batch_size} rows of {batch.shape[1]} tokens, samples {first} to "
            f"{first + self.batch_size - 1}, batch_sha256 {digest_batch(batch)}"
        )
        for r in range(self.batch_size) if row is None else [row]:
            yield f"\n=== row {r}, sample {first + r}"
            for title, tokens in self._documents(first + r, batch[r]):
                yield f"--- {title}"
                as_ids = ids or self.tokenizer is None
                yield " ".join(map(str, tokens)) if as_ids else self.tokenizer.decode(tokens)

    def find(self, text: str, steps: range, progress=lambda done, total: None) -> Iterator[Found]:
        """Rows whose decoded text has `text` in it, as this tokenizer would write it; not from one row into the next.

        Texts are compared, not tokens: what comes before a text changes the tokens that it is cut into.
        """
        if self.tokenizer is None:
            raise InputError("text is found with the tokenizer that made the data; set data.tokenizer")
        text = self.tokenizer.decode(self.tokenizer.encode(text))  # normalised
        if not text:
            raise InputError("there is no text to find")
        for done, step in enumerate(steps):
            progress(done, len(steps))
            for row, tokens in enumerate(strip_marks(self.batch(step)).tolist()):
                decoded = self.tokenizer.decode(tokens)
                at = decoded.find(text)
                if at >= 0:
                    around = decoded[max(0, at - CONTEXT) : at + len(text) + CONTEXT]
                    yield Found(step, row, step * self.batch_size + row, " ".join(around.split()))
        progress(len(steps), len(steps))

    def _documents(self, sample: int, row: np.ndarray) -> Iterator[tuple[str, list[int]]]:
        """(title, tokens) of each document in a row; where it lies, if it is of files of tokens."""
        tokens = strip_marks(row)
        if hasattr(self.samples, "pieces"):
            pieces = self.samples.pieces(sample)
            titles = [f"{p.prefix}, document {p.document} from token {p.offset}" for p in pieces]
            ends = np.cumsum([piece.length for piece in pieces])
        else:  # conversations, which are packed as the run starts
            begins = np.flatnonzero(row & BEGINS)
            ends = np.append(begins[begins > 0], len(row))
            titles = [f"document {k}" for k in range(len(ends))]
        for title, document in zip(titles, np.split(tokens, ends[:-1]), strict=True):
            yield title, document.tolist()
