"""How well a model predicts a text.

SHAPES  B batch  T length
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from neox_jax.errors import InputError
from neox_jax.loss import cross_entropy_sum
from neox_jax.model import NeoX
from neox_jax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class TextScore:
    """nats: summed -log p over all tokens; num_bytes: the text's length in UTF-8."""

    nats: float
    num_tokens: int
    num_bytes: int

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.num_tokens

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.num_bytes


def score_text(
    model: NeoX, tokenizer: Tokenizer, text: str, *, seq_length: int = 0, stride: int = 0, batch_size: int = 8
) -> TextScore:
    """Scores every token of `text` once, in windows of seq_length (0: the model's context), each `stride` further than
    the one before (0: they do not overlap); in a window that overlaps, only what is new is scored.

    The first token of each window is predicted from the end-of-text token alone in the first window, from the token
    before it in the others. Raises: InputError for a text without tokens or that does not fit.
    """
    config = model.config
    seq_length = seq_length or config.max_position_embeddings
    stride = stride or seq_length
    if not 1 <= stride <= seq_length:
        raise InputError(f"stride is {stride}; wanted 1 to the window's {seq_length} tokens")
    tokens = tokenizer.encode(text)
    if not tokens:
        raise InputError("nothing to score: the text has no tokens")
    if max(tokens) >= config.vocab_size:
        raise InputError(
            f"the tokenizer gives id {max(tokens)}, the model's vocabulary has {config.vocab_size}; use the model's own"
        )
    first = config.eos_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    num_windows = 1 + -(-max(len(tokens) - seq_length, 0) // stride)
    rows = -(-num_windows // batch_size) * batch_size
    inputs = np.zeros((rows, seq_length), np.int32)
    targets, weights = np.zeros_like(inputs), np.zeros((rows, seq_length), np.float32)
    before = np.asarray([first, *tokens[:-1]])
    for k in range(num_windows):
        start = k * stride
        size = min(seq_length, len(tokens) - start)
        inputs[k, :size], targets[k, :size] = before[start : start + size], tokens[start : start + size]
        weights[k, seq_length - stride if k else 0 : size] = 1
    nats = 0.0
    shape = (-1, batch_size, seq_length)
    for batch in zip(inputs.reshape(shape), targets.reshape(shape), weights.reshape(shape), strict=True):
        nats += float(_batch_nats(model, *batch))
    return TextScore(nats=nats, num_tokens=len(tokens), num_bytes=len(text.encode()))


@jax.jit
def _batch_nats(model: NeoX, inputs_BT, targets_BT, weights_BT) -> jax.Array:
    hidden_BTD = model.hidden(jnp.asarray(inputs_BT))
    vocab_size = model.config.vocab_size
    return cross_entropy_sum(hidden_BTD, model.head, targets_BT, weights_BT, vocab_size=vocab_size, mesh=model.mesh)
