"""Attention under one contract, on one device or over a mesh, by three backends.

SHAPES  B batch  T query length  S key length  U new keys beside a cache (as T)  N heads  H head dim
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, PartitionSpec

from neox_jax.errors import InputError
from neox_jax.sharding import named_sharding, platform

NEGATIVE = -1e30  # a mask value that stays finite in float32, so that no row becomes NaN
ATTENTION = "attention"  # the checkpoint name of what the backward pass reads of attention's forward pass
ATTENTION_BACKENDS = ("xla", "cudnn", "splash")
HALF_DTYPES = (jnp.float16, jnp.bfloat16)

# Queries at a time, each block with the keys up to its own end. The gradient on two CPU cores, 8 float32 heads of 64,
# against all queries at once: 65 of 147 ms for 4 x 512 tokens (blocks of 128 alike), 110 of 452 ms for 1 x 2048.
QUERY_BLOCK = 256
MOST_BLOCKS = 8  # each is code of its own, so longer sequences have larger blocks

Attend = Callable[..., jax.Array]


def default_backend(platform: str, *, dtype, head_dim: int) -> str:
    """The backend for these devices: splash on TPUs, cudnn on GPUs, xla for the rest and for what those do not take.

    platform: "tpu", "gpu" or "cpu". TPU kernels have no float16. cuDNN has 16 bits only, and heads above 128 only from
    Hopper on, where it can be asked for by name.
    """
    dtype = jnp.dtype(dtype)
    if platform == "tpu" and dtype != jnp.float16:
        return "splash"
    if platform == "gpu" and dtype in HALF_DTYPES and head_dim % 8 == 0 and head_dim <= 128:
        return "cudnn"
    return "xla"


def make_attend(backend: str, mesh: Mesh | None = None) -> Attend:
    """Causal self-attention of global arrays, attend(q_BTNH, k_BTNH, v_BTNH, segment_ids_BT=None) -> out_BTNH.

    Each token attends to itself and to those before it, of its own segment where segments are given. Softmax is
    float32; the result has v's dtype. Over a mesh, rows, heads and positions are divided as `sharding.RULES` says. With
    seq > 1 (context parallel) a device has its slice of the queries and gathers all keys and values of its rows and
    heads. The slices are in order, so the last device has the most to do and all wait for it: splash takes 2 - 1/seq of
    the time of an even division (which a zig-zag order would give), and xla and cudnn, which skip no keys then, 2.
    Raises: InputError for an unknown backend or one that is not for these devices; attend raises it for dims that do
    not divide over the mesh, and for dtypes and sizes that its backend does not take.
    """
    if backend not in ATTENTION_BACKENDS:
        raise InputError(f"attention {backend!r}: wanted one of {', '.join(ATTENTION_BACKENDS)}")
    devices = platform(mesh)
    if backend == "cudnn" and devices != "gpu":
        raise InputError(f"attention cudnn is for GPUs, and these devices are {devices}; use xla")
    if backend == "splash" and devices == "gpu":
        raise InputError("attention splash is for TPUs, and these devices are gpu; use cudnn or xla")
    attend = {"xla": _attend_xla, "cudnn": _attend_cudnn, "splash": _attend_splash}[backend]
    return functools.partial(attend, mesh=mesh)


_save_named = jax.checkpoint_policies.save_only_these_names(ATTENTION)


def save_attention(primitive, *args, **params) -> bool:
    """The jax.checkpoint policy under which no attention kernel runs twice, and nothing else is kept.

    Where the name is on the output alone (xla), scores are computed again, but not their product with the values.
    """
    # cuDNN's own statistics have no name to be kept by, so what its forward pass gives is known by the operation.
    return primitive.name == "dot_product_attention_fwd_wrapper" or _save_named(primitive, *args, **params)


def causal_attention(
    q_BTNH: jax.Array, k_BTNH: jax.Array, v_BTNH: jax.Array, segment_ids_BT: jax.Array | None = None
) -> jax.Array:
    """Each token attends to itself and to those before it, of its own segment where segments are given.

    The reference: plain XLA, for any dtype on any device. Scores and softmax are float32 whatever the inputs are
    (float16 scores overflow on the small Pythias).
    Shapes: q, k, v [B,T,N,H], segment_ids [B,T] integers -> [B,T,N,H] in v.dtype.
    """
    return _attend_in_blocks(q_BTNH, k_BTNH, v_BTNH, segment_ids_BT, segment_ids_BT, 0)


def shared_context_attention(
    q_BTNH: jax.Array, k_BTNH: jax.Array, v_BTNH: jax.Array, segment_ids_BT: jax.Array
) -> jax.Array:
    """As `causal_attention`, but what is in segment 0 is seen by every segment behind it.

    So several continuations of one context are computed together. Shapes: as there.
    """
    return _attend_in_blocks(q_BTNH, k_BTNH, v_BTNH, segment_ids_BT, segment_ids_BT, 0, shared_segment=0)


def _attend_in_blocks(
    q_BTNH, k_BSNH, v_BSNH, query_ids_BT, key_ids_BS, first, shared_segment: int | None = None
) -> jax.Array:
    """Queries of which the first stands at this position of the keys. Where it is traced, no keys are skipped."""
    length = q_BTNH.shape[1]
    # Transposed once here, not per block: the gradient for 1 x 2048 tokens took 149 ms otherwise, of 110.
    q_BNTH, k_BNSH, v_BNSH = (jnp.swapaxes(x, 1, 2) for x in (q_BTNH, k_BSNH, v_BSNH))
    block = max(QUERY_BLOCK, -(-length // MOST_BLOCKS))
    outs = []
    for start in range(0, length, block):
        stop = min(start + block, length)
        seen = first + stop if isinstance(first, int) else k_BNSH.shape[2]
        keys_BNSH, values_BNSH = k_BNSH[:, :, :seen], v_BNSH[:, :, :seen]
        scores_BNTS = jnp.einsum(
            "BNTH,BNSH->BNTS", q_BNTH[:, :, start:stop], keys_BNSH, preferred_element_type=jnp.float32
        )
        mask = (first + jnp.arange(start, stop))[:, None] >= jnp.arange(seen)
        if query_ids_BT is not None:
            keys_BS = key_ids_BS[:, None, None, :seen]
            same = query_ids_BT[:, None, start:stop, None] == keys_BS
            mask = mask & (same if shared_segment is None else same | (keys_BS == shared_segment))
        scores_BNTS = jnp.where(mask, scores_BNTS * q_BNTH.shape[-1] ** -0.5, NEGATIVE)
        # Divided by its sum only after the product with the values: one pass over the scores less, and one array less
        # to keep for the backward pass.
        weights_BNTS = jnp.exp(scores_BNTS - jax.lax.stop_gradient(scores_BNTS.max(-1, keepdims=True)))
        out_BNTH = jnp.einsum(
            "BNTS,BNSH->BNTH", weights_BNTS.astype(v_BNSH.dtype), values_BNSH, preferred_element_type=jnp.float32
        )
        outs.append((out_BNTH / weights_BNTS.sum(-1, keepdims=True)).astype(v_BNSH.dtype))
    return jnp.swapaxes(jnp.concatenate(outs, axis=2), 1, 2)


def _attend_xla(q_BTNH, k_BTNH, v_BTNH, segment_ids_BT=None, *, mesh) -> jax.Array:
    if _spec(q_BTNH, mesh)[1] is None:  # rows and heads are independent: XLA divides them by itself
        out_BTNH = causal_attention(q_BTNH, k_BTNH, v_BTNH, segment_ids_BT)
    else:
        out_BTNH = _on_each_device(_attend_in_blocks, mesh, q_BTNH, k_BTNH, v_BTNH, segment_ids_BT)
    return checkpoint_name(out_BTNH, ATTENTION)


def _attend_cudnn(q_BTNH, k_BTNH, v_BTNH, segment_ids_BT=None, *, mesh) -> jax.Array:
    """cuDNN's flash attention. Segments, and slices of the queries, need a mask [B,1,T,S] in memory.

    With segments it does not go under vmap: jax's batching rule takes such a mask for one of all heads.
    """
    length, _, head_dim = q_BTNH.shape[1:]
    if q_BTNH.dtype not in HALF_DTYPES:
        raise InputError(f"attention cudnn: dtype {q_BTNH.dtype}, wanted bfloat16 or float16; or use xla")
    if head_dim % 8 or head_dim > 256:
        raise InputError(f"attention cudnn: head_dim {head_dim}, wanted a multiple of 8 up to 256; use xla")
    has_mask = segment_ids_BT is not None or _spec(q_BTNH, mesh)[1] is not None
    if has_mask and length % 2:
        raise InputError(f"attention cudnn: length {length} with a mask, wanted an even one; or use xla")

    def attend(q_BTNH, k_BSNH, v_BSNH, query_ids_BT, key_ids_BS, first):
        is_whole = isinstance(first, int)
        mask = None
        if query_ids_BT is not None:
            mask = query_ids_BT[:, None, :, None] == key_ids_BS[:, None, None, :]
        if not is_whole:
            causal = (first + jnp.arange(q_BTNH.shape[1]))[:, None] >= jnp.arange(k_BSNH.shape[1])
            mask = causal[None, None] if mask is None else mask & causal
        try:
            return jax.nn.dot_product_attention(
                q_BTNH, k_BSNH, v_BSNH, mask=mask, is_causal=is_whole, implementation="cudnn"
            )
        except NotImplementedError as error:  # what depends on the GPU: heads above 128 before Hopper
            raise InputError(f"attention cudnn: {error} Use xla") from error

    return _on_each_device(attend, mesh, q_BTNH, k_BTNH, v_BTNH, segment_ids_BT)


def _attend_splash(q_BTNH, k_BTNH, v_BTNH, segment_ids_BT=None, *, mesh) -> jax.Array:
    from neox_jax import splash  # loads Pallas, which nothing else needs

    if q_BTNH.dtype == jnp.float16:
        raise InputError("attention splash: dtype float16, wanted bfloat16 or float32; or use xla")
    positions = _spec(q_BTNH, mesh)[1]
    shards = 1 if positions is None else mesh.shape[positions]
    length = q_BTNH.shape[1]
    padding = -length % (splash.LANES * shards)
    if padding:  # behind all tokens, where causality hides it
        q_BTNH, k_BTNH, v_BTNH = (jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))) for x in (q_BTNH, k_BTNH, v_BTNH))
        segment_ids_BT = None if segment_ids_BT is None else jnp.pad(segment_ids_BT, ((0, 0), (0, padding)))
    kernel = splash.make_kernel(
        length + padding, shards=shards, checkpoint_name=ATTENTION, interpret=platform(mesh) == "cpu"
    )
    kernel_spec = None if mesh is None else splash.kernel_spec(kernel, mesh, positions)

    def attend(q_BTNH, k_BSNH, v_BSNH, query_ids_BT, key_ids_BS, first, kernel):
        return splash.attend(kernel, q_BTNH, k_BSNH, v_BSNH, query_ids_BT, key_ids_BS)

    out_BTNH = _on_each_device(
        attend, mesh, q_BTNH, k_BTNH, v_BTNH, segment_ids_BT, constants=(kernel,), constant_specs=(kernel_spec,)
    )
    return out_BTNH[:, :length]


def _on_each_device(
    attend, mesh, q_BTNH, k_BTNH, v_BTNH, segment_ids_BT, *, constants=(), constant_specs=()
) -> jax.Array:
    """Runs attend(q, k, v, ids of q, ids of k, first, *constants) on a device's rows, heads and queries, and all keys.

    first: the position of the device's first query, the int 0 where it has all of them.
    """
    if mesh is None or mesh.size == 1:
        return attend(q_BTNH, k_BTNH, v_BTNH, segment_ids_BT, segment_ids_BT, 0, *constants)
    spec = _spec(q_BTNH, mesh)
    rows, positions, *_ = spec

    def local(q_BTNH, k_BTNH, v_BTNH, ids_BT, *constants):
        if positions is None:
            return attend(q_BTNH, k_BTNH, v_BTNH, ids_BT, ids_BT, 0, *constants)
        gather = functools.partial(jax.lax.all_gather, axis_name=positions, axis=1, tiled=True)
        key_ids_BS = None if ids_BT is None else gather(ids_BT)
        first = jax.lax.axis_index(positions) * q_BTNH.shape[1]
        return attend(q_BTNH, gather(k_BTNH), gather(v_BTNH), ids_BT, key_ids_BS, first, *constants)

    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(spec, spec, spec, PartitionSpec(rows, positions), *constant_specs),
        out_specs=spec,
        check_vma=False,  # Pallas calls do not say over which axes their results vary
    )(q_BTNH, k_BTNH, v_BTNH, segment_ids_BT, *constants)


def _spec(q_BTNH, mesh) -> PartitionSpec:
    """Over which mesh axes rows, positions, heads and head dims are divided.

    Raises: InputError if a dim does not divide.
    """
    if mesh is None:
        return PartitionSpec(None, None, None, None)
    return named_sharding(q_BTNH.shape, ("batch", "sequence", "heads", "head_dim"), mesh, "attention").spec


def cached_attention(
    q_BTNH: jax.Array,
    k_BTNH: jax.Array,
    v_BTNH: jax.Array,
    *,
    keys_BNHS: jax.Array,
    values_BNHS: jax.Array,
    key_scales_BNS: jax.Array | None = None,
    value_scales_BNS: jax.Array | None = None,
    lengths_B: jax.Array,
) -> jax.Array:
    """New tokens attend to the first lengths[b] cached ones, to those new before them and to themselves.

    The cache is only read: the new tokens' own keys and values come beside it, and the two softmaxes are one through
    a common maximum and sum. Scores and softmax are float32. An int8 cache is never made into another array of its
    size: its scales multiply scores and weights instead.
    Shapes: q, k, v [B,T,N,H] of the new tokens, keys, values [B,N,H,S], scales [B,N,S], lengths [B] -> [B,T,N,H] in
    v.dtype.
    """
    scale = q_BTNH.shape[-1] ** -0.5
    keys_BNHS, values_BNHS = keys_BNHS.astype(q_BTNH.dtype), values_BNHS.astype(v_BTNH.dtype)
    cached_BNTS = jnp.einsum("BTNH,BNHS->BNTS", q_BTNH, keys_BNHS, preferred_element_type=jnp.float32) * scale
    if key_scales_BNS is not None:
        cached_BNTS *= key_scales_BNS[:, :, None]
    filled_BS = jnp.arange(keys_BNHS.shape[-1]) < lengths_B[:, None]
    cached_BNTS = jnp.where(filled_BS[:, None, None], cached_BNTS, NEGATIVE)
    new_BNTU = jnp.einsum("BTNH,BUNH->BNTU", q_BTNH, k_BTNH, preferred_element_type=jnp.float32) * scale
    new_BNTU = jnp.where(jnp.tril(jnp.ones(new_BNTU.shape[-2:], bool)), new_BNTU, NEGATIVE)

    highest = jnp.maximum(cached_BNTS.max(-1, keepdims=True), new_BNTU.max(-1, keepdims=True))
    cached_BNTS, new_BNTU = jnp.exp(cached_BNTS - highest), jnp.exp(new_BNTU - highest)
    total = cached_BNTS.sum(-1, keepdims=True) + new_BNTU.sum(-1, keepdims=True)
    cached_BNTS, new_BNTU = cached_BNTS / total, (new_BNTU / total).astype(v_BTNH.dtype)
    if value_scales_BNS is not None:
        cached_BNTS *= value_scales_BNS[:, :, None]
    cached_BNTS = cached_BNTS.astype(v_BTNH.dtype)
    out_BTNH = jnp.einsum("BNTS,BNHS->BTNH", cached_BNTS, values_BNHS, preferred_element_type=jnp.float32)
    out_BTNH += jnp.einsum("BNTU,BUNH->BTNH", new_BNTU, v_BTNH, preferred_element_type=jnp.float32)
    return out_BTNH.astype(v_BTNH.dtype)
