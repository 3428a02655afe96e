"""What a batch says of its tokens besides their ids, in the bits above them: one int32 array, so that reading, sharding
and resuming know of nothing else.

SHAPES  B batch  T length; a row is T+1 tokens, of which the first T are inputs and the last T targets
A token's id is in the low 24 bits. NO_LOSS: predicting this token counts nothing. BEGINS: it is the first one of a
document. A row without marks is its tokens.
"""

import jax
import jax.numpy as jnp
import numpy as np

TOKEN = (1 << 24) - 1
BEGINS, NO_LOSS = 1 << 24, 1 << 25


def split_marks(rows: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """On the device: (tokens, which targets count, segment ids of the documents).

    Shapes: rows [B,T+1] -> tokens [B,T+1], counted [B,T] bool, segment_ids [B,T+1] int32, which count up in a row.
    """
    segment_ids = jnp.cumsum((rows & BEGINS) != 0, axis=1, dtype=jnp.int32)
    return rows & TOKEN, (rows[:, 1:] & NO_LOSS) == 0, segment_ids


def strip_marks(rows: np.ndarray) -> np.ndarray:
    """The tokens alone. Shapes: [B,T+1] -> [B,T+1]."""
    return rows & TOKEN


def counted_targets(rows: np.ndarray) -> np.ndarray:
    """The tokens whose prediction counts, end to end. Shapes: [B,T+1] -> [n]."""
    targets_BT = rows[:, 1:]
    return strip_marks(targets_BT[(targets_BT & NO_LOSS) == 0])


def mark_after(rows: np.ndarray, eod_token: int, marks: int) -> np.ndarray:
    """Puts marks on each token that follows an end of document, which belongs to the document that it ends.

    So NO_LOSS is gpt-neox's eod_mask_loss: an input that is the end of a document predicts nothing that counts.
    Shapes: [B,T+1] -> [B,T+1].
    """
    marked = rows.copy()
    marked[:, 1:][rows[:, :-1] == eod_token] |= marks
    return marked


class MarkedSamples:
    """Samples of `neox_jax.data.index`, marked after each end of document."""

    def __init__(self, samples, *, eod_token: int, marks: int):
        self._samples, self._eod_token, self._marks = samples, eod_token, marks
        self.num_samples, self.samples_per_epoch = samples.num_samples, samples.samples_per_epoch

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """Shapes: [n] -> [n,T+1] int32."""
        return mark_after(self._samples.rows(indices), self._eod_token, self._marks)

    def pieces(self, index: int) -> list:
        """Where in its files sample `index` lies."""
        return self._samples.pieces(index)
