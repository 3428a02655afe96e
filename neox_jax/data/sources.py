"""A source of data as a run names it, opened: files of tokens, marked as its masks want them, or conversations."""

import dataclasses

from neox_jax.config import Config, is_conversations
from neox_jax.data.conversations import ConversationSamples, open_conversations
from neox_jax.data.index import open_samples
from neox_jax.errors import InputError
from neox_jax.marks import BEGINS, NO_LOSS, MarkedSamples
from neox_jax.tokenizer import Tokenizer


def open_source(config: Config, source, *, which: str, field: str, tokenizer: Tokenizer | None):
    """The samples of data.train or of a set of data.valid: what `Loader` takes, or None where there are none.

    which: "train" or "valid". field: what messages call the source. Raises: InputError.
    """
    if is_conversations(source):
        return _open_conversations(config, source, which, field, tokenizer)
    train = config.train
    samples = open_samples(
        config.data if which == "train" else dataclasses.replace(config.data, valid=source),
        which,
        seq_length=train.seq_length,
        num_samples=train.steps * train.batch_size,
        vocab_size=config.model.vocab_size,
    )
    masks = config.masks(source)
    if samples is None or not any(masks):
        return samples
    marks = (NO_LOSS if masks.targets else 0) | (BEGINS if masks.documents else 0)
    return MarkedSamples(samples, eod_token=_eod_token(config, tokenizer), marks=marks)


def _open_conversations(config: Config, source, which, field, tokenizer) -> ConversationSamples:
    data, train = config.data, config.train
    if not 0 <= data.seed < 2**32:
        raise InputError(f"data.seed is {data.seed}; wanted a number from 0 to 2**32 - 1")
    if tokenizer is None:
        raise InputError(f"{field} holds conversations, which are tokenised as the run starts; set data.tokenizer")
    if which == "train" and (data.order == "megatron" or data.split):
        raise InputError(
            f"{field} holds conversations, which data.order=megatron and data.split are not for; set data.order to "
            "shuffled or sequential, and leave data.split empty"
        )
    return open_conversations(
        source,
        tokenizer=tokenizer,
        eos_token=_eod_token(config, tokenizer),
        template=data.chat_template,
        seq_length=train.seq_length,
        seed=data.seed if which == "train" and data.order == "shuffled" else None,
        multiple=train.batch_size if which == "valid" else 1,
    )


def _eod_token(config: Config, tokenizer: Tokenizer | None) -> int:
    data, vocab_size = config.data, config.model.vocab_size
    token = data.eod_token
    if token < 0:
        token = None if tokenizer is None else tokenizer.eos_token_id
    if token is None:
        raise InputError(
            "masks and conversations need the token that ends a document; set data.tokenizer to one that has "
            "<|endoftext|> or </s>, or data.eod_token to its id"
        )
    if token >= vocab_size:
        raise InputError(f"data.eod_token is {token}; wanted an id below model.vocab_size {vocab_size}")
    return token
