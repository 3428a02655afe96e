"""From text on disk to batches on devices. The names below load what they need when they are first used."""

import importlib

_HOMES = {
    "IndexedDataset": "neox_jax.data.megatron",
    "IndexedDatasetWriter": "neox_jax.data.megatron",
    "MegatronSamples": "neox_jax.data.gpt_neox",
    "blend_indices": "neox_jax.data.blend",
    "split_documents": "neox_jax.data.gpt_neox",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'neox_jax.data' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__():
    return [*globals(), *_HOMES]
