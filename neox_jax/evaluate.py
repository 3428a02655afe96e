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


def score_text(model: NeoX, tokenizer: Tokenizer, text: str, *, seq_length: int = 0, batch_size: int = 8) -> TextScore:
    """Scores every token of `text` once, in windows of seq_length (0: the model's context) that do not overlap.

    The first token of each window is predicted from the end-of-text token alone in the first window, from the last
    token of the window before it in the others. Raises: InputError for a text without tokens or that does not fit.
    """
    config = model.config
    seq_length = seq_length or config.max_position_embeddings
    tokens = tokenizer.encode(text)
    if not tokens:
        raise InputError("nothing to score: the text has no tokens")
    if max(tokens) >= config.vocab_size:
        raise InputError(
            f"the tokenizer gives id {max(tokens)}, the model's vocabulary has {config.vocab_size}; use the model's own"
        )
    first = config.eos_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    windows = -(-len(tokens) // seq_length)
    rows = -(-windows // batch_size) * batch_size
    inputs = np.zeros(rows * seq_length, np.int32)
    targets, weights = np.zeros_like(inputs), np.zeros(rows * seq_length, np.float32)
    inputs[: len(tokens)] = [first, *tokens[:-1]]
    targets[: len(tokens)], weights[: len(tokens)] = tokens, 1
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
