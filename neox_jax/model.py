"""GPT-NeoX as a Flax NNX module: a pytree of named arrays, its layers stacked, called under plain JAX transforms.

SHAPES  B batch  T length  D model  N heads  H head dim  C query, key, value  F mlp  V vocab (padded)  L layers
Parameters keep NeoX's own layout; each names its logical axes, which `sharding.RULES` maps to the mesh.
Source: GPT-NeoX-20B, arXiv:2204.06745; EleutherAI/gpt-neox; transformers' GPTNeoXForCausalLM.
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from neox_jax.attention import NEGATIVE, Attend, default_backend, make_attend, save_attention
from neox_jax.config import TANH_GELUS, ModelConfig
from neox_jax.rotary import apply_rotary, rotary_tables
from neox_jax.sharding import constrain, named_sharding, positions_axis
from neox_jax.tree import map_named

REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "save_attention": save_attention,
}


class LayerNorm(nnx.Module):
    """LayerNorm over D with scale and bias, computed in float32. Shapes: [..., D] -> [..., D] in x.dtype."""

    def __init__(self, size: int, *, eps: float, dtype, stacked: tuple[int, ...] = ()):
        logical = ("layers",) * len(stacked) + ("norm",)
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((*stacked, size), dtype), logical=logical)
        self.bias = nnx.Param(jnp.zeros((*stacked, size), dtype), logical=logical)

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        mean = jnp.mean(x32, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(x32 - mean), axis=-1, keepdims=True)
        normed = (x32 - mean) * jax.lax.rsqrt(variance + self.eps)
        return (normed * self.scale[...] + self.bias[...]).astype(x.dtype)


class Linear(nnx.Module):
    """A stacked dense layer that contracts the trailing `inputs` dims of x and appends the `outputs` dims.

    inputs, outputs: logical axis -> size. kernel [L, *inputs, *outputs]; bias [L, *outputs] or None.
    """

    def __init__(self, layers: int, inputs: dict, outputs: dict, *, std: float, bias: bool, dtype, rngs: nnx.Rngs):
        shape = (layers, *inputs.values(), *outputs.values())
        kernel = std * jax.random.normal(rngs.params(), shape, jnp.float32)
        self.kernel = nnx.Param(kernel.astype(dtype), logical=("layers", *inputs, *outputs))
        # A bias over D is not sharded: it is tiny, and fsdp would gather it for nothing.
        axes = tuple("norm" if axis == "embed" else axis for axis in outputs)
        zeros = jnp.zeros((layers, *outputs.values()), dtype)
        self.bias = nnx.Param(zeros, logical=("layers", *axes)) if bias else None
        self.num_inputs = len(inputs)

    def __call__(self, x: jax.Array, mesh) -> jax.Array:
        kernel = self.kernel[...]
        inputs, outputs = kernel.shape[: self.num_inputs], kernel.shape[self.num_inputs :]
        if mesh is not None and mesh.shape.get("seq", 1) > 1:  # batch and positions are sharded each for itself
            y = jnp.tensordot(x, kernel.astype(x.dtype), axes=self.num_inputs)
        else:
            # One plain matrix product: with B and T as two dims, XLA's CPU backward pass takes twice as long.
            x_2d = x.reshape(-1, math.prod(inputs))
            y_2d = x_2d @ kernel.astype(x.dtype).reshape(math.prod(inputs), math.prod(outputs))
            y = y_2d.reshape(*x.shape[: x.ndim - self.num_inputs], *outputs)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class Attention(nnx.Module):
    """Fused query, key and value per head, rotary embedding on part of each head, output projection."""

    def __init__(self, config: ModelConfig, std: float, output_std: float, *, dtype, rngs: nnx.Rngs):
        layers, d, heads, head_dim = (
            config.num_hidden_layers,
            config.hidden_size,
            config.num_attention_heads,
            config.head_dim,
        )
        per_head = {"heads": heads, "qkv": 3, "head_dim": head_dim}
        options = {"bias": config.attention_bias, "dtype": dtype, "rngs": rngs}
        self.query_key_value = Linear(layers, {"embed": d}, per_head, std=std, **options)
        self.dense = Linear(layers, {"heads": heads, "head_dim": head_dim}, {"embed": d}, std=output_std, **options)

    def __call__(self, x_BTD, tables, attend: Attend, mesh):
        qkv_BTNCH = self.query_key_value(x_BTD, mesh)
        axes = ("batch", _positions(x_BTD, mesh), "heads", "head_dim")
        q, k, v = (constrain(qkv_BTNCH[..., i, :], axes, mesh) for i in range(3))
        q, k = apply_rotary(q, tables), apply_rotary(k, tables)
        return self.dense(attend(q, k, v), mesh), (k, v)


class MLP(nnx.Module):
    """D -> F -> D with the configured GELU."""

    def __init__(self, config: ModelConfig, std: float, output_std: float, *, dtype, rngs: nnx.Rngs):
        layers, d, f = config.num_hidden_layers, config.hidden_size, config.intermediate_size
        self.approximate = config.hidden_act in TANH_GELUS
        options = {"bias": True, "dtype": dtype, "rngs": rngs}
        self.dense_h_to_4h = Linear(layers, {"embed": d}, {"mlp": f}, std=std, **options)
        self.dense_4h_to_h = Linear(layers, {"mlp": f}, {"embed": d}, std=output_std, **options)

    def __call__(self, x_BTD: jax.Array, mesh) -> jax.Array:
        hidden_BTF = jax.nn.gelu(self.dense_h_to_4h(x_BTD, mesh), approximate=self.approximate)
        return self.dense_4h_to_h(constrain(hidden_BTF, ("batch", _positions(x_BTD, mesh), "mlp"), mesh), mesh)


class Layer(nnx.Module):
    """All transformer layers, stacked; inside a scan over the stack, one of them."""

    def __init__(self, config: ModelConfig, *, dtype, rngs: nnx.Rngs):
        layers, d = config.num_hidden_layers, config.hidden_size
        if config.init_method == "small_init":
            std, output_std = math.sqrt(2 / (5 * d)), 2 / (layers * math.sqrt(d))
        else:
            std, output_std = 0.02, 0.02 / math.sqrt(2 * layers)
        self.parallel = config.use_parallel_residual
        norm = {"eps": config.layer_norm_eps, "dtype": dtype, "stacked": (layers,)}
        self.input_layernorm = LayerNorm(d, **norm)
        self.post_attention_layernorm = LayerNorm(d, **norm)
        self.attention = Attention(config, std, output_std, dtype=dtype, rngs=rngs)
        self.mlp = MLP(config, std, output_std, dtype=dtype, rngs=rngs)

    def __call__(self, x_BTD, tables, attend: Attend, mesh):
        """Shapes: x [B,T,D] -> (x [B,T,D], (rotated keys, values) [B,T,N,H]).

        Between layers the positions are sharded over `model` too. Here they are gathered once, before both norms (which
        are cheaper than a second gather), and what the row-parallel products give is summed and scattered once.
        """
        whole_BTD = gather_positions(x_BTD, mesh)
        attended, keys_values = self.attention(self.input_layernorm(whole_BTD), tables, attend, mesh)
        if self.parallel:
            x_BTD = x_BTD + scatter_positions(attended + self.mlp(self.post_attention_layernorm(whole_BTD), mesh), mesh)
        else:
            x_BTD = x_BTD + scatter_positions(attended, mesh)
            mlp_input = self.post_attention_layernorm(gather_positions(x_BTD, mesh))
            x_BTD = x_BTD + scatter_positions(self.mlp(mlp_input, mesh), mesh)
        return x_BTD, keys_values


def _positions(x_BTD: jax.Array, mesh) -> str:
    """The logical axis of the positions of activations inside a layer."""
    return "length" if positions_axis(x_BTD.shape[1], mesh) == "length" else "sequence"


def gather_positions(x_BTD: jax.Array, mesh) -> jax.Array:
    return constrain(x_BTD, ("batch", _positions(x_BTD, mesh), "hidden"), mesh)


def scatter_positions(x_BTD: jax.Array, mesh) -> jax.Array:
    return constrain(x_BTD, ("batch", positions_axis(x_BTD.shape[1], mesh), "hidden"), mesh)


def run_layers(layers: Layer, x_BTD: jax.Array, tables, attend: Attend, mesh, *, remat: str) -> jax.Array:
    """All the layers of a stack, one after the other. Shapes: [B,T,D] -> [B,T,D]."""

    def body(x_BTD, layer):
        return layer(x_BTD, tables, attend, mesh)[0], None

    if remat != "none":
        body = jax.checkpoint(body, policy=REMAT_POLICIES[remat], prevent_cse=False)
    return jax.lax.scan(body, x_BTD, layers)[0]


class Embedding(nnx.Module):
    """A table [V, D]: token embeddings, or the output head."""

    def __init__(self, config: ModelConfig, *, dtype, rngs: nnx.Rngs):
        std = math.sqrt(2 / (5 * config.hidden_size)) if config.init_method == "small_init" else 0.02
        shape = (config.padded_vocab_size, config.hidden_size)
        table = std * jax.random.normal(rngs.params(), shape, jnp.float32)
        self.embedding = nnx.Param(table.astype(dtype), logical=("vocab", "embed"))


class NeoX(nnx.Module):
    """A GPT-NeoX language model. The compute dtype is that of `embed_in`; a mesh pins activations' sharding."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype=jnp.float32, mesh=None):
        self.config = config
        self.mesh = mesh
        self.embed_in = Embedding(config, dtype=dtype, rngs=rngs)
        self.layers = Layer(config, dtype=dtype, rngs=rngs)
        self.final_layer_norm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps, dtype=dtype)
        self.embed_out = None if config.tie_word_embeddings else Embedding(config, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        tokens: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
    ) -> jax.Array:
        """Logits of the next token at every position.

        Shapes: tokens, segment_ids, positions [B,T] integers (positions count from 0 by default; tokens attend within
        their segment) -> [B,T,V] float32; rows beyond config.vocab_size, there only to divide over a mesh, are -1e30.
        Compiled once per shape, also when called outside jit.
        """
        return _logits(self, tokens, segment_ids, positions)

    @property
    def head(self) -> jax.Array:
        """The output head's table [V, D]."""
        return (self.embed_in if self.embed_out is None else self.embed_out).embedding[...]

    def embed(self, tokens_BT: jax.Array) -> jax.Array:
        """Shapes: [B,T] -> [B,T,D]."""
        table_VD = constrain(self.embed_in.embedding[...], ("vocab", "hidden"), self.mesh)  # gathered over fsdp
        return scatter_positions(table_VD[tokens_BT], self.mesh)

    def rotary_tables(self, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        config = self.config
        dtype = self.embed_in.embedding.dtype
        return rotary_tables(positions, base=config.rotary_emb_base, rotary_dim=config.rotary_dim, dtype=dtype)

    def attend(self, backend: str = "auto") -> Attend:
        """The attention of this name for this model's dtype, heads and devices (`attention.make_attend`)."""
        if backend == "auto":
            platform = jax.default_backend() if self.mesh is None else self.mesh.devices.flat[0].platform
            dtype = self.embed_in.embedding.dtype
            backend = default_backend(platform, dtype=dtype, head_dim=self.config.head_dim)
        return make_attend(backend, self.mesh)

    def hidden(
        self, tokens_BT, *, segment_ids=None, positions=None, remat: str = "none", attention: str = "auto"
    ) -> jax.Array:
        """The final LayerNorm's output, what the head is applied to. Shapes: [B,T] -> [B,T,D]."""
        tables = self.rotary_tables(jnp.arange(tokens_BT.shape[1]) if positions is None else positions)
        attend = functools.partial(self.attend(attention), segment_ids_BT=segment_ids)
        x_BTD = run_layers(self.layers, self.embed(tokens_BT), tables, attend, self.mesh, remat=remat)
        return self.final_layer_norm(gather_positions(x_BTD, self.mesh))

    def unembed(self, x: jax.Array) -> jax.Array:
        """Shapes: [..., D] -> logits [..., V] float32."""
        logits = jnp.einsum("...D,VD->...V", x, self.head.astype(x.dtype), preferred_element_type=jnp.float32)
        return mask_padding(logits, self.config)


def mask_padding(logits: jax.Array, config: ModelConfig) -> jax.Array:
    """Sets the columns beyond config.vocab_size to -1e30; nothing to do where there are none."""
    if config.padded_vocab_size == config.vocab_size:
        return logits
    return jnp.where(jnp.arange(config.padded_vocab_size) < config.vocab_size, logits, NEGATIVE)


# Jitted at module level, so that an eager call compiles once per shape whatever closures the trace makes.
@jax.jit
def _logits(model: NeoX, tokens, segment_ids, positions):
    return model.unembed(model.hidden(tokens, segment_ids=segment_ids, positions=positions))


def logical_axes(model: NeoX) -> dict[str, tuple[str, ...]]:
    """Maps each parameter's name to its logical axes."""
    _, state = nnx.split(model)
    return {".".join(path): param.get_metadata("logical") for path, param in nnx.to_flat_state(state)}


def abstract_model(config: ModelConfig, *, dtype=jnp.float32, mesh=None) -> NeoX:
    """The model with ShapeDtypeStructs for parameters, with their shardings where there is a mesh.

    Raises: InputError if a dim does not divide over the mesh.
    """
    model = jax.eval_shape(lambda: NeoX(config, rngs=nnx.Rngs(0), dtype=dtype, mesh=mesh))
    if mesh is None:
        return model
    axes = logical_axes(model)

    def with_sharding(name, leaf):
        sharding = named_sharding(leaf.shape, axes[name], mesh, name)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return map_named(with_sharding, model)


def init_model(config: ModelConfig, *, seed: int = 0, dtype=jnp.float32, mesh=None) -> NeoX:
    """A freshly initialised model, made in place on the mesh: no device or host ever holds more than its shards."""
    shardings = None
    if mesh is not None:
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_model(config, dtype=dtype, mesh=mesh))
    make = jax.jit(lambda: NeoX(config, rngs=nnx.Rngs(seed), dtype=dtype, mesh=mesh), out_shardings=shardings)
    return make()
