"""GPT-NeoX as a Flax NNX module: a pytree of named arrays, its layers stacked, called under plain JAX transforms.

SHAPES  B batch  T length  D model  N heads  H head dim  C query, key, value  F mlp  V vocab (padded)  L layers
Parameters keep NeoX's own layout; each names its logical axes, which `sharding.RULES` maps to the mesh.
Source: GPT-NeoX-20B, arXiv:2204.06745; EleutherAI/gpt-neox; transformers' GPTNeoXForCausalLM.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from neox_jax.attention import NEGATIVE, Attend, default_backend, make_attend, save_attention
from neox_jax.config import TANH_GELUS, LoraConfig, ModelConfig
from neox_jax.inside import Patch, check_inside, look_inside
from neox_jax.lora import adapter_for
from neox_jax.rotary import apply_rotary, rotary_tables
from neox_jax.sharding import constrain, named_sharding, platform, positions_axis
from neox_jax.tensor_parallel import Ranks
from neox_jax.tree import map_named

# Checkpoint names of what matrix products give and the backward pass reads, in the layouts that it reads.
PRODUCTS = ("query_key_value", "mlp_hidden")
REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.save_only_these_names(*PRODUCTS), save_attention
    ),
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

    inputs, outputs: logical axis -> size. kernel [L, *inputs, *outputs]; bias [L, *outputs] or None. Where it is
    quantized the kernel is int8 and kernel_scale float32 [L, *outputs], what each output is multiplied by; else None.
    lora: what an adapter adds to the product, where it has one of this name; else None.
    """

    def __init__(
        self,
        name: str,
        layers: int,
        inputs: dict,
        outputs: dict,
        *,
        std: float,
        bias: bool,
        dtype,
        rngs: nnx.Rngs,
        quantized: bool = False,
        lora: LoraConfig | None = None,
    ):
        shape = (layers, *inputs.values(), *outputs.values())
        kernel = std * jax.random.normal(rngs.params(), shape, jnp.float32)
        self.kernel = nnx.Param(kernel.astype(jnp.int8 if quantized else dtype), logical=("layers", *inputs, *outputs))
        # What is over D alone is not sharded: it is tiny, and fsdp would gather it for nothing.
        axes = tuple("norm" if axis == "embed" else axis for axis in outputs)
        shape = (layers, *outputs.values())
        self.bias = nnx.Param(jnp.zeros(shape, dtype), logical=("layers", *axes)) if bias else None
        scale = nnx.Param(jnp.ones(shape, jnp.float32), logical=("layers", *axes)) if quantized else None
        self.kernel_scale = scale
        self.lora = adapter_for(lora, name, layers, inputs, outputs, dtype=dtype, rngs=rngs)
        self.num_inputs = len(inputs)

    def __call__(self, x: jax.Array, ranks: Ranks, *, part: int | None = None) -> jax.Array:
        """part: which of the fused query, key and value; the product with that part of the kernel alone."""
        y = self.product(x, ranks, part=part)
        if self.bias is None:
            return y
        bias = self.bias[...]
        return y + (bias if part is None else bias[..., part, :]).astype(x.dtype)

    def product(self, x: jax.Array, ranks: Ranks, *, part: int | None = None) -> jax.Array:
        """Without the bias, which is added once to a sum over ranks."""
        kernel, axes = self.kernel[...], self.kernel.get_metadata("logical")[1:]
        if self.kernel_scale is None:
            kernel = kernel.astype(x.dtype)
        if part is not None:
            kernel, axes = kernel[..., part, :], (*axes[:-2], axes[-1])
        kernel = ranks.gather_weights(kernel, axes).astype(x.dtype)
        if not ranks.joins_batch:
            y = jnp.tensordot(x, kernel, axes=self.num_inputs)
        else:
            inputs, outputs = kernel.shape[: self.num_inputs], kernel.shape[self.num_inputs :]
            y_2d = x.reshape(-1, math.prod(inputs)) @ kernel.reshape(math.prod(inputs), math.prod(outputs))
            y = y_2d.reshape(*x.shape[: x.ndim - self.num_inputs], *outputs)
        if self.kernel_scale is not None:
            scale = self.kernel_scale[...]
            y = (y * (scale if part is None else scale[..., part, :])).astype(x.dtype)
        return y if self.lora is None else y + self.lora(x, ranks, part=part)


class Attention(nnx.Module):
    """Fused query, key and value per head, rotary embedding on part of each head, output projection."""

    def __init__(self, config: ModelConfig, std: float, output_std: float, **options):
        layers, d, heads, head_dim = (
            config.num_hidden_layers,
            config.hidden_size,
            config.num_attention_heads,
            config.head_dim,
        )
        per_head = {"heads": heads, "qkv": 3, "head_dim": head_dim}
        options |= {"bias": config.attention_bias}
        self.query_key_value = Linear("query_key_value", layers, {"embed": d}, per_head, std=std, **options)
        per_head = {"heads": heads, "head_dim": head_dim}
        self.dense = Linear("dense", layers, per_head, {"embed": d}, std=output_std, **options)

    def project(self, x_BTD: jax.Array, ranks: Ranks) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values [B,T,N,H]."""
        if x_BTD.shape[1] == 1:  # a slice of the weights would be copied, and reading them is what takes the time
            qkv_BTNCH = self.query_key_value(x_BTD, ranks)
            return tuple(qkv_BTNCH[..., i, :] for i in range(3))
        # Three products, each of which gives an array as attention reads it, while the next one's weights come in.
        return tuple(self.query_key_value(x_BTD, ranks, part=i) for i in range(3))


class MLP(nnx.Module):
    """D -> F -> D with the configured GELU."""

    def __init__(self, config: ModelConfig, std: float, output_std: float, **options):
        layers, d, f = config.num_hidden_layers, config.hidden_size, config.intermediate_size
        self.approximate = config.hidden_act in TANH_GELUS
        options |= {"bias": True}
        self.dense_h_to_4h = Linear("dense_h_to_4h", layers, {"embed": d}, {"mlp": f}, std=std, **options)
        self.dense_4h_to_h = Linear("dense_4h_to_h", layers, {"mlp": f}, {"embed": d}, std=output_std, **options)

    def contract(self, hidden_BTF: jax.Array, ranks: Ranks) -> jax.Array:
        """The second product of what the first one gave, without its bias."""
        return self.dense_4h_to_h.product(jax.nn.gelu(hidden_BTF, approximate=self.approximate), ranks)


class Layer(nnx.Module):
    """All transformer layers, stacked; inside a scan over the stack, one of them."""

    def __init__(self, config: ModelConfig, *, dtype, rngs: nnx.Rngs, quantized: bool, lora: LoraConfig | None):
        layers, d = config.num_hidden_layers, config.hidden_size
        if config.init_method == "small_init":
            std, output_std = math.sqrt(2 / (5 * d)), 2 / (layers * math.sqrt(d))
        else:
            std, output_std = 0.02, 0.02 / math.sqrt(2 * layers)
        self.parallel = config.use_parallel_residual
        norm = {"eps": config.layer_norm_eps, "dtype": dtype, "stacked": (layers,)}
        self.input_layernorm = LayerNorm(d, **norm)
        self.post_attention_layernorm = LayerNorm(d, **norm)
        options = {"dtype": dtype, "rngs": rngs, "quantized": quantized, "lora": lora}
        self.attention = Attention(config, std, output_std, **options)
        self.mlp = MLP(config, std, output_std, **options)

    def __call__(self, x_BTD, tables, attend: Attend, mesh):
        """Shapes: x [B,T,D] -> (x [B,T,D], (rotated keys, values) [B,T,N,H]).

        Between layers the positions are sharded over `model` too. Here they are gathered once, before both norms (which
        are cheaper than a second gather), and what the row-parallel products give is summed and scattered once.
        """
        if self.parallel:
            return self._block(x_BTD, tables, attend, mesh, attention=True, mlp=True)
        x_BTD, keys_values = self._block(x_BTD, tables, attend, mesh, attention=True, mlp=False)
        return self._block(x_BTD, tables, attend, mesh, attention=False, mlp=True)[0], keys_values

    def apart(self, x_BTD, tables, attend: Attend, mesh, *, tap: Callable[[str, jax.Array], jax.Array]):
        """A call in which tap(name, output) takes the place of what "attention" and "mlp" each add to the residual.

        Shapes: [B,T,D] -> [B,T,D]. To be had apart, the two are summed over ranks apart.
        """
        run = functools.partial(self._block, tables=tables, attend=attend, mesh=mesh, onto_BTD=jnp.zeros_like(x_BTD))
        attended_BTD = x_BTD + tap("attention", run(x_BTD, attention=True, mlp=False)[0])
        return attended_BTD + tap("mlp", run(x_BTD if self.parallel else attended_BTD, attention=False, mlp=True)[0])

    def _block(self, x_BTD, tables, attend: Attend, mesh, *, attention: bool, mlp: bool, onto_BTD=None):
        """x, or onto, and what these two, or one of them, make of x; and (rotated keys, values) or None."""
        ranks = Ranks(mesh, x_BTD.shape[1])

        def columns(layer, x_BTD):
            whole_BTD = ranks.gather(x_BTD)
            out = layer.attention.project(layer.input_layernorm(whole_BTD), ranks) if attention else ()
            return (*out, layer.mlp.dense_h_to_4h(layer.post_attention_layernorm(whole_BTD), ranks)) if mlp else out

        def rows(layer, x_BTD, *inputs):
            parts = [layer.attention.dense.product(inputs[0], ranks)] if attention else []
            parts += [layer.mlp.contract(inputs[-1], ranks)] if mlp else []
            biases = [layer.attention.dense.bias] if attention else []
            biases += [layer.mlp.dense_4h_to_h.bias] if mlp else []
            x_BTD = x_BTD + ranks.sum(sum(parts[1:], parts[0]))
            return (sum((bias[...].astype(x_BTD.dtype) for bias in biases if bias is not None), x_BTD),)

        residual, heads = ("batch", "residual", "hidden"), ("batch", "sequence", "heads", "head_dim")
        axes = (heads,) * (3 * attention) + (("batch", "sequence", "mlp"),) * mlp
        out = ranks.run(columns, self, x_BTD, axes=(residual,), out_axes=axes)
        inputs, keys_values = [], None
        if attention:
            q, k, v = (constrain(x, (*ranks.activation_axes, "heads", "head_dim"), mesh) for x in out[:3])
            q, k, v = checkpoint_name((apply_rotary(q, tables), apply_rotary(k, tables), v), PRODUCTS[0])
            inputs, keys_values = [attend(q, k, v)], (k, v)
        if mlp:
            inputs.append(checkpoint_name(constrain(out[-1], (*ranks.activation_axes, "mlp"), mesh), PRODUCTS[1]))
        axes = (residual, *axes[2 * attention :])
        onto_BTD = x_BTD if onto_BTD is None else onto_BTD
        (x_BTD,) = ranks.run(rows, self, onto_BTD, *inputs, axes=axes, out_axes=(residual,))
        return scatter_positions(x_BTD, mesh), keys_values


def gather_positions(x_BTD: jax.Array, mesh) -> jax.Array:
    """Every rank of `model` gets all positions, those of its slice of `seq`."""
    axis = "length" if positions_axis(x_BTD.shape[1], mesh) == "length" else "sequence"
    return constrain(x_BTD, ("batch", axis, "hidden"), mesh)


def scatter_positions(x_BTD: jax.Array, mesh) -> jax.Array:
    """As positions are between layers."""
    return constrain(x_BTD, ("batch", positions_axis(x_BTD.shape[1], mesh), "hidden"), mesh)


def run_layers(layers: Layer, x_BTD: jax.Array, tables, attend: Attend, mesh, *, remat: str) -> jax.Array:
    """All the layers of a stack, one after the other. Shapes: [B,T,D] -> [B,T,D]."""

    def body(x_BTD, layer):
        return layer(x_BTD, tables, attend, mesh)[0], None

    if remat != "none":
        body = jax.checkpoint(body, policy=REMAT_POLICIES[remat], prevent_cse=False)
    return jax.lax.scan(body, x_BTD, layers)[0]


class Embedding(nnx.Module):
    """A table [V, D]: token embeddings, or the output head. Where it is quantized it is int8, its rows' scales [V]."""

    def __init__(self, config: ModelConfig, *, dtype, rngs: nnx.Rngs, quantized: bool = False):
        std = math.sqrt(2 / (5 * config.hidden_size)) if config.init_method == "small_init" else 0.02
        shape = (config.padded_vocab_size, config.hidden_size)
        table = std * jax.random.normal(rngs.params(), shape, jnp.float32)
        self.embedding = nnx.Param(table.astype(jnp.int8 if quantized else dtype), logical=("vocab", "embed"))
        self.embedding_scale = nnx.Param(jnp.ones(shape[0], jnp.float32), logical=("vocab",)) if quantized else None


class NeoX(nnx.Module):
    """A GPT-NeoX language model. The compute dtype is that of `embed_in`; a mesh pins activations' sharding.

    quantization: "int8" for matrices (and a head that is not tied) in 8 bits, as `quantize.quantize_model` makes them.
    lora: of adapters, for a model that has some.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs,
        dtype=jnp.float32,
        mesh=None,
        quantization: str = "",
        lora: LoraConfig | None = None,
    ):
        self.config = config
        self.mesh = mesh
        self.quantization = quantization
        self.lora = lora
        options = {"dtype": dtype, "rngs": rngs}
        self.embed_in = Embedding(config, **options)
        self.layers = Layer(config, **options, quantized=bool(quantization), lora=lora)
        self.final_layer_norm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps, dtype=dtype)
        tied = config.tie_word_embeddings
        self.embed_out = None if tied else Embedding(config, **options, quantized=bool(quantization))

    def __call__(
        self,
        tokens: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
        capture: tuple[str, ...] = (),
        patch: Patch | None = None,
    ) -> jax.Array | tuple[jax.Array, dict[str, jax.Array]]:
        """Logits of the next token at every position; with `capture`, (logits, {name: activations}).

        Shapes: tokens, segment_ids, positions [B,T] integers (positions count from 0 by default; tokens attend within
        their segment) -> [B,T,V] float32; rows beyond config.vocab_size, there only to divide over a mesh, are -1e30.
        Compiled once per shape, also when called outside jit.
        capture: any of "residual" (what goes into each layer), "attention", "mlp" (what each adds to it) [L,B,T,D],
        "attention_weights" [L,B,N,T,S] float32, "final" (the final LayerNorm's output) [B,T,D]. patch: {(name, layer):
        function of that layer's array}, which gives what takes its place (`docs/interpretability.md`).
        Raises: InputError for a name or layer that is not there, or a patch that changes a shape or dtype.
        """
        if not capture and not patch:
            return _logits(self, tokens, segment_ids, positions)
        capture, patch = check_inside(capture, patch or {}, self.config.num_hidden_layers)
        logits, captured = look_inside(self, tokens, segment_ids, positions, patch, capture=capture)
        return (logits, captured) if capture else logits

    @property
    def head(self) -> jax.Array:
        """The output head's table [V, D], gathered over fsdp: once, not for every chunk of a loss."""
        scale = self._head.embedding_scale
        if scale is None:
            return self.head_table
        return self.head_table.astype(self.embed_in.embedding.dtype) * scale[...][:, None]

    @property
    def head_table(self) -> jax.Array:
        """The same as it is stored; products with it are to go through `finish_logits`."""
        return constrain(self._head.embedding[...], ("vocab", "hidden"), self.mesh)

    @property
    def _head(self) -> Embedding:
        return self.embed_in if self.embed_out is None else self.embed_out

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
            dtype = self.embed_in.embedding.dtype
            backend = default_backend(platform(self.mesh), dtype=dtype, head_dim=self.config.head_dim)
        return make_attend(backend, self.mesh)

    def hidden(
        self, tokens_BT, *, segment_ids=None, positions=None, remat: str = "none", attention: str = "auto"
    ) -> jax.Array:
        """The final LayerNorm's output, what the head is applied to. Shapes: [B,T] -> [B,T,D]."""
        tables = self.rotary_tables(jnp.arange(tokens_BT.shape[1]) if positions is None else positions)
        attend = functools.partial(self.attend(attention), segment_ids_BT=segment_ids)
        x_BTD = run_layers(self.layers, self.embed(tokens_BT), tables, attend, self.mesh, remat=remat)
        return self.finish(x_BTD)

    def finish(self, x_BTD: jax.Array) -> jax.Array:
        """The final LayerNorm, of all positions. Shapes: what a layer gives, [B,T,D] -> [B,T,D]."""
        return self.final_layer_norm(gather_positions(x_BTD, self.mesh))

    def unembed(self, x: jax.Array) -> jax.Array:
        """Shapes: [..., D] -> logits [..., V] float32."""
        logits = jnp.einsum("...D,VD->...V", x, self.head_table.astype(x.dtype), preferred_element_type=jnp.float32)
        return self.finish_logits(logits)

    def finish_logits(self, logits: jax.Array) -> jax.Array:
        """From products with the head's table [..., V]: scaled where it is int8, masked where it only pads."""
        scale = self._head.embedding_scale
        return mask_padding(logits if scale is None else logits * scale[...], self.config)


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


def abstract_model(
    config: ModelConfig, *, dtype=jnp.float32, mesh=None, quantization: str = "", lora: LoraConfig | None = None
) -> NeoX:
    """The model with ShapeDtypeStructs for parameters, with their shardings where there is a mesh.

    Raises: InputError if a dim does not divide over the mesh.
    """
    options = {"dtype": dtype, "mesh": mesh, "quantization": quantization, "lora": lora}
    model = jax.eval_shape(lambda: NeoX(config, rngs=nnx.Rngs(0), **options))
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
