"""Small datasets in Megatron's format, for the tests that need them."""

import numpy as np

from neox_jax.config import DataConfig
from neox_jax.data import IndexedDatasetWriter
from neox_jax.data.index import open_samples


def write(prefix, documents, dtype=np.uint16) -> str:
    with IndexedDatasetWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add_document(document)
    return str(prefix)


def write_sizes(prefix, sizes, first=0) -> str:
    """Documents of these sizes; the tokens count up from `first` through all of them."""
    ends = np.cumsum(sizes) + first
    return write(prefix, [np.arange(end - size, end) for end, size in zip(ends, sizes, strict=True)], np.int32)


def cut_into_shards(prefix, shard_bytes: list[int], last: int) -> None:
    """Replaces PREFIX.bin by PREFIX-00000-of-LAST.bin and so on, of these sizes and what is left."""
    with open(f"{prefix}.bin", "rb") as file:
        content = file.read()
    ends = [*np.cumsum(shard_bytes).tolist(), len(content)]
    for k, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        with open(f"{prefix}-{k:05}-of-{last:05}.bin", "wb") as file:
            file.write(content[start:end])


def open_train(seq_length=4, num_samples=20, vocab_size=10_000, **data):
    return open_samples(
        DataConfig(**data), "train", seq_length=seq_length, num_samples=num_samples, vocab_size=vocab_size
    )
