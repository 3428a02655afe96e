"""How well a model predicts a text; what is looked at before a model is scored on anything.

SHAPES  B batch  T length
"""

import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from neox_jax.config import ModelConfig
from neox_jax.convert.source import config_of, load_tokenizer
from neox_jax.engine import batch_bucket
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


def open_fitting(
    source: str | Path, *, tokenizer: str | Path | None = None, revision: str | None = None
) -> tuple[Tokenizer, ModelConfig]:
    """The tokenizer and the configuration of a SOURCE, before any weight is read. tokenizer: a file instead.

    Raises: InputError for a tokenizer that has ids which the model has not.
    """
    tokens, config = load_tokenizer(tokenizer or source, revision=revision), config_of(source, revision=revision)
    check_tokenizer(tokens, config)
    return tokens, config


def check_tokenizer(tokenizer: Tokenizer, config: ModelConfig) -> None:
    ids, rows = tokenizer.vocab_size, config.vocab_size
    if ids > rows:
        raise InputError(f"the tokenizer has {ids} ids, the model's vocabulary has {rows}; use the model's own")


def check_windows(config: ModelConfig, *, seq_length: int = 0, stride: int = 0) -> tuple[int, int]:
    """The length of `score_text`'s windows and how far apart they are, where 0 is its default. Raises: InputError."""
    context = config.max_position_embeddings
    seq_length = seq_length or context
    if not 1 <= seq_length <= context:
        raise InputError(f"seq-length is {seq_length}; wanted 1 to {context}, the model's context")
    stride = stride or seq_length
    if not 1 <= stride <= seq_length:
        raise InputError(f"stride is {stride}; wanted 1 to the window's {seq_length} tokens")
    return seq_length, stride


def score_text(
    model: NeoX, tokenizer: Tokenizer, text: str, *, seq_length: int = 0, stride: int = 0, batch_size: int = 8
) -> TextScore:
    """Scores every token of `text` once, in windows of seq_length (0: the model's context), each `stride` further than
    the one before (0: they do not overlap); in a window that overlaps, only what is new is scored.

    The first token of each window is predicted from the end-of-text token alone in the first window, from the token
    before it in the others. Raises: InputError for a text without tokens or that does not fit.
    """
    config = model.config
    seq_length, stride = check_windows(config, seq_length=seq_length, stride=stride)
    check_tokenizer(tokenizer, config)
    tokens = tokenizer.encode(text)
    if not tokens:
        raise InputError("nothing to score: the text has no tokens")
    batch_size = batch_bucket(batch_size, model.mesh)
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
