"""Ring attention: the length is sharded, and keys and values rotate round the devices (Liu et al. 2023).

Each device keeps its queries and computes with `blockwise`. After one step for each device all queries have met all
keys. In the backward pass dK and dV rotate together with K and V, and so end where they belong. A device never holds
more than its shard of the length, and XLA sends the next shard while one is computed with.

B batch, T query length, S key length, H heads, K width per head: of one device's shard.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array

from transformer.attention import blockwise
from transformer.attention.blockwise import BlockInputs, BlockwiseConfig, Gradients, OnlineSoftmaxState, Residuals
from transformer.attention.dropout import Seeds, head_seeds
from transformer.attention.mask import AttentionMask
from transformer.distributed import sharding
from transformer.distributed.platform import ATTENTION_BLOCK


def ring_attention(
    q_BTHK: Array,
    k_BSHK: Array,
    v_BSHK: Array,
    mask: AttentionMask,
    dropout_rate: float = 0.0,
    key: Array | None = None,
    block: int = ATTENTION_BLOCK,
) -> Array:
    """`blockwise.blockwise_attention` over the devices of the current mesh that shard `length`.

    Their number must divide T and S: `sharding.shard_batch` pads to it.

    Returns:
      [B, T, H, K] in the dtype of `v_BSHK`.
    """
    seeds = head_seeds(key, dropout_rate, q_BTHK.shape[0], q_BTHK.shape[2])
    local = functools.partial(_local_attention, dropout_rate, block, sharding.num_shards("length"))
    heads = sharding.HEAD_AXES
    sharded = sharding.shard_map(local, (heads, heads, heads, sharding.ROW_AXES, ("batch", "heads")), heads)
    return sharded(q_BTHK, k_BSHK, v_BSHK, mask, seeds)


def _local_attention(
    dropout_rate: float,
    block: int,
    ring_size: int,
    q_BTHK: Array,
    k_BSHK: Array,
    v_BSHK: Array,
    mask: AttentionMask,
    seeds: Seeds | None,
) -> Array:
    """Attention of one device's queries."""
    num_queries, num_keys = q_BTHK.shape[1], k_BSHK.shape[1]
    mask = dataclasses.replace(mask, q_offset=sharding.axis_index("length") * num_queries)
    q_BHTK, k_BHSK, v_BHSK, mask, block_q, block_kv = blockwise.to_blocks(q_BTHK, k_BSHK, v_BSHK, mask, block)
    config = BlockwiseConfig(dropout_rate, block_q, block_kv, ring_size, num_keys)
    out_BHTK = _attention(q_BHTK, k_BHSK, v_BHSK, mask, seeds, config)
    return jnp.swapaxes(out_BHTK, 1, 2)[:, :num_queries]


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attention(
    q_BHTK: Array, k_BHSK: Array, v_BHSK: Array, mask: AttentionMask, seeds: Seeds | None, config: BlockwiseConfig
) -> Array:
    return _forward(q_BHTK, k_BHSK, v_BHSK, mask, seeds, config)[0]


def _with_remote_kv(local: BlockInputs, kv: tuple, step: Array) -> BlockInputs:
    """Local queries with the keys and values that have arrived after `step` rotations.

    With 4 devices, device 1 holds after step 0, 1, 2, 3 the keys of device 1, 0, 3, 2.
    """
    k_BHSK, v_BHSK, kv_segment_ids_BS = kv
    owner = (sharding.axis_index("length") - step) % local.config.ring_size
    kv_offset = owner * local.config.keys_per_device
    mask = dataclasses.replace(local.mask, kv_segment_ids_BS=kv_segment_ids_BS, kv_offset=kv_offset)
    return local._replace(k_BHSK=k_BHSK, v_BHSK=v_BHSK, mask=mask)


def _forward(
    q_BHTK: Array, k_BHSK: Array, v_BHSK: Array, mask: AttentionMask, seeds: Seeds | None, config: BlockwiseConfig
) -> tuple[Array, Residuals]:
    local = BlockInputs(q_BHTK, k_BHSK, v_BHSK, mask, seeds, config)

    def ring_step(step: Array, carry: tuple[tuple, OnlineSoftmaxState]) -> tuple[tuple, OnlineSoftmaxState]:
        kv, state = carry
        next_kv = sharding.ring_permute("length", kv, config.ring_size)
        return next_kv, blockwise.forward_blocks(_with_remote_kv(local, kv, step), state)

    init = (k_BHSK, v_BHSK, mask.kv_segment_ids_BS), blockwise.init_state(local)
    _, state = jax.lax.fori_loop(0, config.ring_size, ring_step, init)
    out_BHTK, logsumexp_BHT = blockwise.finalize(state, v_BHSK.dtype)
    return out_BHTK, Residuals(q_BHTK, k_BHSK, v_BHSK, mask, seeds, out_BHTK, logsumexp_BHT)


def _backward(config: BlockwiseConfig, saved: Residuals, dout_BHTK: Array) -> tuple:
    local, output_gradient = blockwise.unpack_residuals(config, saved, dout_BHTK)

    def ring_step(step: Array, carry: tuple[tuple, Gradients]) -> tuple[tuple, Gradients]:
        kv, gradients = carry
        next_kv = sharding.ring_permute("length", kv, config.ring_size)
        dq_BHTK, *dkv = blockwise.backward_blocks(_with_remote_kv(local, kv, step), output_gradient, gradients)
        return next_kv, Gradients(dq_BHTK, *sharding.ring_permute("length", dkv, config.ring_size))

    init = (local.k_BHSK, local.v_BHSK, local.mask.kv_segment_ids_BS), blockwise.init_gradients(local)
    _, gradients = jax.lax.fori_loop(0, config.ring_size, ring_step, init)
    return *blockwise.merge_gradients(gradients, local), None, None


_attention.defvjp(_forward, _backward)
