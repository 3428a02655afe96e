"""Small GPT-NeoX models of every kind in the family, as Hugging Face config dicts, and random weights for them.

Weights are far from an initialisation: random biases and norm scales too, so that a missing one shows.
"""

import jax
import numpy as np

from neox_jax.config import ModelConfig
from neox_jax.model import NeoX, abstract_model
from neox_jax.tree import map_named


def _variant(heads: int, head_dim: int, **fields) -> dict:
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "vocab_size": 97,
        "hidden_size": heads * head_dim,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "intermediate_size": 4 * heads * head_dim,
        "hidden_act": "gelu",
        "rotary_pct": 0.25,
        "rotary_emb_base": 10000,
        "max_position_embeddings": 64,
        "use_parallel_residual": True,
        "layer_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "attention_bias": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        **fields,
    }


VARIANTS = {
    "pythia": _variant(4, 8, num_hidden_layers=3),
    "20b": _variant(2, 96, hidden_act="gelu_fast", vocab_size=130, intermediate_size=160),
    "pythia-2.8b": _variant(2, 80, intermediate_size=96, layer_norm_eps=1e-3),
    "redpajama": _variant(4, 32, use_parallel_residual=False, rotary_pct=1.0, intermediate_size=200),
    "polyglot": _variant(2, 128, rotary_pct=0.5, intermediate_size=136, vocab_size=300),
    "wide-heads": _variant(2, 256, rotary_pct=0.25, intermediate_size=64, hidden_act="gelu_fast"),
    "tied": _variant(3, 8, tie_word_embeddings=True, rotary_pct=0.5, rotary_emb_base=500),
    "no-attention-bias": _variant(2, 64, attention_bias=False, rotary_pct=1.0, intermediate_size=40),
    "sequential-tied": _variant(
        2,
        16,
        use_parallel_residual=False,
        tie_word_embeddings=True,
        attention_bias=False,
        hidden_act="gelu_new",
        rotary_pct=1.0,
        rotary_emb_base=1000000.0,
        layer_norm_eps=1e-6,
        num_hidden_layers=1,
    ),
}


def random_value(name: str, shape: tuple[int, ...], hidden_size: int, random: np.random.Generator) -> np.ndarray:
    """float32 values that make every parameter matter: logits of a few units, attention that is not uniform."""
    noise = random.standard_normal(shape, np.float32)
    if name.endswith(("scale", "layernorm.weight", "layer_norm.weight")):
        return 1 + 0.3 * noise
    return (0.3 if name.endswith("bias") else 1.5 * hidden_size**-0.5) * noise


def random_model(config: ModelConfig | dict, *, seed: int = 0, dtype=np.float32) -> NeoX:
    """Our model with random weights, without torch; config may be a Hugging Face dict."""
    config = ModelConfig.from_hf(config) if isinstance(config, dict) else config
    random = np.random.default_rng(seed)

    def value(name, leaf):
        return jax.numpy.asarray(random_value(name, leaf.shape, config.hidden_size, random).astype(dtype))

    return map_named(value, abstract_model(config, dtype=dtype))


def random_reference(config: dict, *, seed: int = 0):
    """transformers' model of this config with random float32 weights, eager attention."""
    import torch
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.set_num_threads(1)
    fields = {key: value for key, value in config.items() if key not in ("architectures", "model_type")}
    model = GPTNeoXForCausalLM(GPTNeoXConfig(**fields, attn_implementation="eager")).float().eval()
    random = np.random.default_rng(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = random_value(name, tuple(parameter.shape), config["hidden_size"], random)
            parameter.copy_(torch.from_numpy(value))
    return model
