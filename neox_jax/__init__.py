"""GPT-NeoX in JAX. The names below load what they need when they are first used."""

import importlib

__version__ = "0.1.0"

_HOMES = {
    "Completion": "neox_jax.generation",
    "InputError": "neox_jax.errors",
    "ModelConfig": "neox_jax.config",
    "NeoX": "neox_jax.model",
    "Tokenizer": "neox_jax.tokenizer",
    "generate": "neox_jax.generation",
    "init_model": "neox_jax.model",
    "load_model": "neox_jax.convert.source",
    "load_tokenizer": "neox_jax.convert.source",
    "make_mesh": "neox_jax.sharding",
    "save_model": "neox_jax.convert.source",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'neox_jax' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value  # also over a submodule of the same name, as `generate` is
    return value


def __dir__():
    return [*globals(), *_HOMES]
