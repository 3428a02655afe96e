"""Splash attention, jax's Pallas kernel for TPUs: no score ever reaches memory, and masked blocks are skipped.

SHAPES  B batch  T queries of a device  S keys  N heads  H head dim
On a CPU the kernel is interpreted, which is for tests: it is slow.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import Mesh, NamedSharding, PartitionSpec

LANES = 128  # of a TPU's vector registers: keys come in multiples of it

# Queries and keys at a time; the largest that divides. By the kernels' schedules (v5p, head_dim 96, 2048 tokens,
# thousand instruction bundles a head, forward twice + dq + dkv): 256: 87, 256 x 512: 70, 512: 66, 512 x 1024: 77,
# 1024: 77. The fused backward kernel would save 11, but writes dq once for each block of keys, and to sum these
# is estimated to take twice what it saves.
BLOCKS = (512, 384, 256, 128)

Kernel = kernels.SplashAttentionKernel


def make_kernel(length: int, *, shards: int = 1, interpret: bool = False, checkpoint_name: str | None = None) -> Kernel:
    """The causal kernel for sequences of this length, whose queries are in so many contiguous shards.

    A shard's kernel is cut from it (`kernel_spec`); each has all keys, and its queries count from their place in the
    sequence. checkpoint_name: of what the backward pass needs of the forward one, the output and the logsumexp.
    length: a multiple of 128 * shards.
    """
    query_block, key_block = _block(length // shards), _block(length)
    # The minor dim of an array on a TPU is padded to 128 lanes, and cutting heads or rotary dims out of it moves data
    # across lanes. With the sequence minor instead, XLA keeps that layout from the fused QKV product to the kernel.
    # Estimated cycles of a layer (forward, recomputed and backward under full remat) without the kernels, in millions,
    # with the head dim minor, that padded to 128, and the sequence minor:
    #   v5p   64: 20.2, 21.9, 12.5   80: 73.5, 76.2, 59.5   96: 161.3, 163.5, 145.4   128: 39.8, 35.8   256: 38.3, 35.6
    #   v5e   64: 42.3, 46.3, 24.5   96: 81.0, 83.0, 73.4   128: 40.3, 36.5           v6e   96: 34.0 and 29.3
    # The kernels' own schedules stay within 4% (v5p, instruction bundles of a block, forward + dq + dkv, head dim minor
    # and sequence minor: at 96 4597 and 4546, at 128 4506 and 4697).
    sequence_minor = kernels.QKVLayout.SEQ_MINOR
    sizes = kernels.BlockSizes(
        block_q=query_block,
        block_kv=key_block,
        block_q_dkv=query_block,
        block_kv_dkv=key_block,
        block_q_dq=query_block,
        block_kv_dq=key_block,
        q_layout=sequence_minor,
        k_layout=sequence_minor,
        v_layout=sequence_minor,
    )
    return kernels.make_splash_mha(
        masks.MultiHeadMask([masks.CausalMask((length, length))]),  # one for all heads, however many there are
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=shards,
        residual_checkpoint_name=checkpoint_name,
        interpret=interpret,
    )


def _block(length: int) -> int:
    return next(size for size in BLOCKS if length % size == 0)


def kernel_spec(kernel: Kernel, mesh: Mesh, axis: str | None) -> Kernel:
    """What `jax.shard_map` wants to know of a kernel whose shards of queries are along this axis."""
    return kernel.manual_sharding_spec(NamedSharding(mesh, PartitionSpec(None, axis)))


def attend(kernel: Kernel, q_BTNH, k_BSNH, v_BSNH, query_ids_BT=None, key_ids_BS=None) -> jax.Array:
    """Shapes: q [B,T,N,H], k, v [B,S,N,H], ids [B,T] and [B,S] or None -> [B,T,N,H] in v.dtype."""
    scaled_BTNH = q_BTNH * jnp.asarray(q_BTNH.shape[-1] ** -0.5, q_BTNH.dtype)
    heads_first = (jnp.swapaxes(x, 1, 2) for x in (scaled_BTNH, k_BSNH, v_BSNH))
    ids = None if query_ids_BT is None else kernels.SegmentIds(query_ids_BT, key_ids_BS)
    out_BNTH = jax.vmap(kernel, in_axes=(0, 0, 0, None if ids is None else 0))(*heads_first, ids)
    return jnp.swapaxes(out_BNTH, 1, 2).astype(v_BSNH.dtype)
