"""Blockwise (flash) attention: the result of the reference implementation, in memory linear in the length.

The forward pass keeps an online softmax while blocks of keys pass (Milakov and Gimelshein 2018; Rabe and Staats 2021);
the backward pass recomputes the weights of each block. Both follow FlashAttention-2 (Dao 2023): comments name the
lines of its Algorithms 1 (forward) and 2 (backward). Blocks that a causal mask hides whole are skipped.

B batch, T query length, S key length, H heads, K width per head; q and s in a name are the queries and keys of one
block, n and m the numbers of query and key blocks. i is the index of a query block, j of a key block. Sums are float32.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from transformer.attention.dot_product import einsum_f32
from transformer.attention.dropout import Seeds, apply_keep_mask, attention_keep_mask, head_seeds
from transformer.attention.mask import MASK_VALUE, AttentionMask
from transformer.attention.padding import pad_end
from transformer.distributed.platform import ATTENTION_BLOCK
from transformer.runtime.rounding import round_up


class BlockwiseConfig(NamedTuple):
    """Static settings; `ring_size` devices hold `keys_per_device` keys each where the length is sharded."""

    dropout_rate: float
    block_q: int
    block_kv: int
    ring_size: int = 1
    keys_per_device: int = 0


class OnlineSoftmaxState(NamedTuple):
    """Unnormalized output, denominator and running maximum of each query: O, ℓ and m of Algorithm 1."""

    acc_nBHqK: Array
    denominator_nBHq: Array
    max_nBHq: Array


class Residuals(NamedTuple):
    """Saved for the backward pass: inputs, output, and the log of each query's denominator (L of Algorithm 1)."""

    q_BHTK: Array
    k_BHSK: Array
    v_BHSK: Array
    mask: AttentionMask
    seeds: Seeds | None
    out_BHTK: Array
    logsumexp_BHT: Array


class OutputGradient(NamedTuple):
    """The gradient of the output, and of each query `delta` (D of Algorithm 2) and the log-sum-exp."""

    dout_BHTK: Array
    delta_BHT: Array
    logsumexp_BHT: Array


class Gradients(NamedTuple):
    """Gradients of queries and, by block, of keys and values, accumulated in float32."""

    dq_BHTK: Array
    dk_mBHsK: Array
    dv_mBHsK: Array


def blockwise_attention(
    q_BTHK: Array,
    k_BSHK: Array,
    v_BSHK: Array,
    mask: AttentionMask,
    dropout_rate: float = 0.0,
    key: Array | None = None,
    block: int = ATTENTION_BLOCK,
) -> Array:
    """Equals `dot_product.dot_product_attention` under `mask` to 1e-5, with the same dropout.

    Returns:
      [B, T, H, K] in the dtype of `v_BSHK`.
    """
    q_BHTK, k_BHSK, v_BHSK, mask, block_q, block_kv = to_blocks(q_BTHK, k_BSHK, v_BSHK, mask, block)
    seeds = head_seeds(key, dropout_rate, q_BTHK.shape[0], q_BTHK.shape[2])
    config = BlockwiseConfig(dropout_rate, block_q, block_kv)
    out_BHTK = _attention(q_BHTK, k_BHSK, v_BHSK, mask, seeds, config)
    return jnp.swapaxes(out_BHTK, 1, 2)[:, : q_BTHK.shape[1]]


def to_blocks(
    q_BTHK: Array, k_BSHK: Array, v_BSHK: Array, mask: AttentionMask, block: int
) -> tuple[Array, Array, Array, AttentionMask, int, int]:
    """Puts heads before lengths and pads lengths to whole blocks; also returns block_q and block_kv."""
    num_queries, num_keys = q_BTHK.shape[1], k_BSHK.shape[1]
    block_q, block_kv = min(block, num_queries), min(block, num_keys)
    padded_T, padded_S = round_up(num_queries, block_q), round_up(num_keys, block_kv)
    q_ids_BT, kv_ids_BS = mask.q_segment_ids_BT, mask.kv_segment_ids_BS
    if num_keys % block_kv and kv_ids_BS is None:
        kv_ids_BS = jnp.ones(k_BSHK.shape[:2], jnp.int32)  # so that padded keys, of segment 0, are masked
    mask = dataclasses.replace(
        mask,
        q_segment_ids_BT=None if q_ids_BT is None else pad_end(q_ids_BT, 1, padded_T),
        kv_segment_ids_BS=None if kv_ids_BS is None else pad_end(kv_ids_BS, 1, padded_S),
    )
    q_BHTK, k_BHSK, v_BHSK = (
        pad_end(jnp.swapaxes(array, 1, 2), 2, length)
        for array, length in ((q_BTHK, padded_T), (k_BSHK, padded_S), (v_BSHK, padded_S))
    )
    return q_BHTK, k_BHSK, v_BHSK, mask, block_q, block_kv


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attention(
    q_BHTK: Array, k_BHSK: Array, v_BHSK: Array, mask: AttentionMask, seeds: Seeds | None, config: BlockwiseConfig
) -> Array:
    return _forward(q_BHTK, k_BHSK, v_BHSK, mask, seeds, config)[0]


def _forward(
    q_BHTK: Array, k_BHSK: Array, v_BHSK: Array, mask: AttentionMask, seeds: Seeds | None, config: BlockwiseConfig
) -> tuple[Array, Residuals]:
    inputs = BlockInputs(q_BHTK, k_BHSK, v_BHSK, mask, seeds, config)
    out_BHTK, logsumexp_BHT = finalize(forward_blocks(inputs, init_state(inputs)), v_BHSK.dtype)
    return out_BHTK, Residuals(q_BHTK, k_BHSK, v_BHSK, mask, seeds, out_BHTK, logsumexp_BHT)


def _backward(config: BlockwiseConfig, saved: Residuals, dout_BHTK: Array) -> tuple:
    inputs, output_gradient = unpack_residuals(config, saved, dout_BHTK)
    return *merge_gradients(backward_blocks(inputs, output_gradient, init_gradients(inputs)), inputs), None, None


_attention.defvjp(_forward, _backward)


class BlockInputs(NamedTuple):
    """The arrays of one attention, read block by block."""

    q_BHTK: Array
    k_BHSK: Array
    v_BHSK: Array
    mask: AttentionMask
    seeds: Seeds | None
    config: BlockwiseConfig

    def logits(self, i: Array, j: Array) -> tuple[Array, Array]:
        """Scaled float32 logits of a block, MASK_VALUE where masked, and the boolean mask."""
        block_q, block_kv = self.config.block_q, self.config.block_kv
        q_BHqK, k_BHsK = _slice_block(self.q_BHTK, i, block_q), _slice_block(self.k_BHSK, j, block_kv)
        mask = self.mask.materialize(block_q, block_kv, i * block_q, j * block_kv)
        logits_BHqs = einsum_f32("bhqk,bhsk->bhqs", q_BHqK, k_BHsK) * q_BHqK.shape[-1] ** -0.5
        return jnp.where(mask, logits_BHqs, MASK_VALUE), mask

    def apply_dropout(self, weights_BHqs: Array, i: Array, j: Array) -> Array:
        """Drops weights of a block, or back-propagates their gradient through the same dropout."""
        rate, block_q, block_kv, *_ = self.config
        if self.seeds is None:
            return weights_BHqs
        q_position, kv_position = self.mask.q_position(i * block_q), self.mask.kv_position(j * block_kv)
        keep_BHqs = attention_keep_mask(self.seeds, rate, q_position, block_q, kv_position, block_kv)
        return apply_keep_mask(weights_BHqs, keep_BHqs, rate)

    def num_kv_blocks(self, i: Array) -> Any:
        """How many key blocks, from the first, these queries attend to: with blocks of 4, queries 4…7 to 2."""
        block_q, block_kv = self.config.block_q, self.config.block_kv
        total = self.k_BHSK.shape[2] // block_kv
        if not self.mask.causal:
            return total
        last_position = self.mask.q_position((i + 1) * block_q - 1) - self.mask.kv_position(0)
        return jnp.clip(last_position // block_kv + 1, 0, total)

    def first_q_block(self, j: Array) -> Any:
        """The first query block that attends to these keys: with blocks of 4, block 1 to keys 4…7."""
        block_q, block_kv = self.config.block_q, self.config.block_kv
        if not self.mask.causal:
            return 0
        first_position = self.mask.kv_position(j * block_kv) - self.mask.q_position(0)
        return jnp.clip(first_position // block_q, 0, self.q_BHTK.shape[2] // block_q)


def init_state(inputs: BlockInputs) -> OnlineSoftmaxState:
    """The state before the first block of keys (Algorithm 1, line 5)."""
    B, H, T, _ = inputs.q_BHTK.shape
    block_q, width = inputs.config.block_q, inputs.v_BHSK.shape[-1]
    shape = (T // block_q, B, H, block_q)
    return OnlineSoftmaxState(
        jnp.zeros((*shape, width), jnp.float32), jnp.zeros(shape, jnp.float32), jnp.full(shape, MASK_VALUE)
    )


def forward_blocks(inputs: BlockInputs, state: OnlineSoftmaxState) -> OnlineSoftmaxState:
    """Updates the state of all queries by all blocks of keys (Algorithm 1, lines 3 to 11)."""
    v_BHSK, block_kv = inputs.v_BHSK, inputs.config.block_kv

    def add_kv_block(i: Array, j: Array, state: OnlineSoftmaxState) -> OnlineSoftmaxState:
        acc_BHqK, denominator_BHq, max_BHq = state
        logits_BHqs, _ = inputs.logits(i, j)  # line 8
        new_max_BHq = jnp.maximum(max_BHq, logits_BHqs.max(-1))  # line 9
        rescale_BHq = jnp.exp(max_BHq - new_max_BHq)
        weights_BHqs = jnp.exp(logits_BHqs - new_max_BHq[..., None])
        denominator_BHq = denominator_BHq * rescale_BHq + weights_BHqs.sum(-1)
        dropped_BHqs = inputs.apply_dropout(weights_BHqs, i, j).astype(v_BHSK.dtype)
        update_BHqK = einsum_f32("bhqs,bhsk->bhqk", dropped_BHqs, _slice_block(v_BHSK, j, block_kv))
        acc_BHqK = acc_BHqK * rescale_BHq[..., None] + update_BHqK  # line 10
        return OnlineSoftmaxState(acc_BHqK, denominator_BHq, new_max_BHq)

    def update_q_block(block: tuple[Array, OnlineSoftmaxState]) -> OnlineSoftmaxState:
        i, state = block
        return jax.lax.fori_loop(0, inputs.num_kv_blocks(i), functools.partial(add_kv_block, i), state)

    q_blocks = jnp.arange(state.acc_nBHqK.shape[0], dtype=jnp.int32)
    return jax.lax.map(update_q_block, (q_blocks, state))


def finalize(state: OnlineSoftmaxState, dtype: jnp.dtype) -> tuple[Array, Array]:
    """Output [B, H, T, K] and log-sum-exp [B, H, T] after the last block of keys (Algorithm 1, lines 12 and 13)."""
    out_nBHqK = (state.acc_nBHqK / state.denominator_nBHq[..., None]).astype(dtype)
    return _merge_blocks(out_nBHqK), _merge_blocks(state.max_nBHq + jnp.log(state.denominator_nBHq))


def delta(dout_BHTK: Array, out_BHTK: Array) -> Array:
    """rowsum(dO · O), float32 [B, H, T] (Algorithm 2, line 4)."""
    return (dout_BHTK.astype(jnp.float32) * out_BHTK.astype(jnp.float32)).sum(-1)


def unpack_residuals(config: BlockwiseConfig, saved: Residuals, dout_BHTK: Array) -> tuple[BlockInputs, OutputGradient]:
    """The inputs of the backward pass."""
    inputs = BlockInputs(saved.q_BHTK, saved.k_BHSK, saved.v_BHSK, saved.mask, saved.seeds, config)
    return inputs, OutputGradient(dout_BHTK, delta(dout_BHTK, saved.out_BHTK), saved.logsumexp_BHT)


def init_gradients(inputs: BlockInputs) -> Gradients:
    """Zeros (Algorithm 2, lines 3 and 7)."""
    block_kv = inputs.config.block_kv

    def zeros(array: Array) -> Array:
        B, H, S, K = array.shape
        return jnp.zeros((S // block_kv, B, H, block_kv, K), jnp.float32)

    return Gradients(jnp.zeros(inputs.q_BHTK.shape, jnp.float32), zeros(inputs.k_BHSK), zeros(inputs.v_BHSK))


def backward_blocks(inputs: BlockInputs, output: OutputGradient, gradients: Gradients) -> Gradients:
    """Adds the gradients of all pairs of query and key blocks (Algorithm 2, lines 5 to 18)."""
    q_BHTK, dout_BHTK = inputs.q_BHTK, output.dout_BHTK
    block_q, block_kv = inputs.config.block_q, inputs.config.block_kv
    scale, num_q_blocks = q_BHTK.shape[-1] ** -0.5, q_BHTK.shape[2] // block_q

    def add_q_block(j: Array, i: Array, gradients: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        dq_BHTK, dk_BHsK, dv_BHsK = gradients
        q_BHqK, dout_BHqK = _slice_block(q_BHTK, i, block_q), _slice_block(dout_BHTK, i, block_q)
        logits_BHqs, mask = inputs.logits(i, j)  # line 10
        weights_BHqs = jnp.exp(logits_BHqs - _slice_block(output.logsumexp_BHT, i, block_q)[..., None])  # line 11
        dropped_BHqs = inputs.apply_dropout(weights_BHqs, i, j).astype(dout_BHTK.dtype)
        dv_BHsK += einsum_f32("bhqs,bhqk->bhsk", dropped_BHqs, dout_BHqK)  # line 12
        dweights_BHqs = einsum_f32("bhqk,bhsk->bhqs", dout_BHqK, _slice_block(inputs.v_BHSK, j, block_kv))  # line 13
        delta_BHq1 = _slice_block(output.delta_BHT, i, block_q)[..., None]
        dweights_BHqs = inputs.apply_dropout(dweights_BHqs, i, j) - delta_BHq1
        dlogits_BHqs = jnp.where(mask, weights_BHqs * dweights_BHqs * scale, 0.0).astype(q_BHTK.dtype)  # line 14
        dk_BHsK += einsum_f32("bhqs,bhqk->bhsk", dlogits_BHqs, q_BHqK)  # line 16
        dq_BHqK = einsum_f32("bhqs,bhsk->bhqk", dlogits_BHqs, _slice_block(inputs.k_BHSK, j, block_kv))
        dq_BHqK += _slice_block(dq_BHTK, i, block_q)
        dq_BHTK = jax.lax.dynamic_update_slice_in_dim(dq_BHTK, dq_BHqK, i * block_q, axis=2)  # line 15
        return dq_BHTK, dk_BHsK, dv_BHsK

    def add_kv_block(dq_BHTK: Array, block: tuple[Array, Array, Array]) -> tuple[Array, tuple[Array, Array]]:
        j, dk_BHsK, dv_BHsK = block
        body = functools.partial(add_q_block, j)
        dq_BHTK, *dkv = jax.lax.fori_loop(inputs.first_q_block(j), num_q_blocks, body, (dq_BHTK, dk_BHsK, dv_BHsK))
        return dq_BHTK, tuple(dkv)

    kv_blocks = jnp.arange(gradients.dk_mBHsK.shape[0], dtype=jnp.int32)
    dq_BHTK, dkv = jax.lax.scan(add_kv_block, gradients.dq_BHTK, (kv_blocks, *gradients[1:]))
    return Gradients(dq_BHTK, *dkv)


def merge_gradients(gradients: Gradients, inputs: BlockInputs) -> tuple[Array, ...]:
    """Gradients [B, H, T or S, K] in the dtypes of q, k and v."""
    merged = (gradients.dq_BHTK, _merge_blocks(gradients.dk_mBHsK), _merge_blocks(gradients.dv_mBHsK))
    return tuple(gradient.astype(array.dtype) for gradient, array in zip(merged, inputs[:3], strict=True))


def _slice_block(array: Array, index: Array, size: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(array, index * size, size, axis=2)


def _merge_blocks(blocks: Array) -> Array:
    """[blocks, B, H, size, …] → [B, H, blocks · size, …]."""
    merged = jnp.moveaxis(blocks, 0, 2)
    return merged.reshape(*merged.shape[:2], -1, *merged.shape[4:])
