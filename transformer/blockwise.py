"""Attention by blocks: the numbers of the plain path, in memory that grows with the length and not its square.

Keys pass by in blocks while each query keeps a running maximum, sum and weighted value (Milakov and
Gimelshein 2018; Rabe and Staats 2021). The gradient computes the weights of each block anew (Dao et al.
2022, algorithm 4). Blocks that a causal mask hides whole are not computed.

B batch, T query length, S key length, H heads, K width per head; q and s in a name are a block's
queries and keys. Sums are float32.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from transformer.attention import LOWEST, Visible, dropout

Array = jax.Array

BLOCK = 128  # queries and keys of a block; larger ones are slower on a CPU (docs/log.md)


class Drop(NamedTuple):
    """Dropout of attention weights: each block draws from a key of its own."""

    rate: float
    key: Array | None


def blockwise_attention(
    q_BTHK: Array,
    k_BSHK: Array,
    v_BSHK: Array,
    visible: Visible,
    dropout_rate: float = 0.0,
    key: Array | None = None,
    block: int = BLOCK,
) -> Array:
    """As `attention.dot_product_attention` under `visible`, to 1e-5; dropout draws other bits.

    Returns:
      [B, T, H, K] in the dtype of `v_BSHK`.
    """
    queries, keys = q_BTHK.shape[1], k_BSHK.shape[1]
    size_q, size_s = min(block, queries), min(block, keys)
    if keys % size_s and visible.keys_BS is None:
        visible = dataclasses.replace(visible, keys_BS=jnp.ones(k_BSHK.shape[:2], jnp.int32))
    visible = dataclasses.replace(
        visible,
        queries_BT=None if visible.queries_BT is None else _fill(visible.queries_BT, 1, size_q),
        keys_BS=None if visible.keys_BS is None else _fill(visible.keys_BS, 1, size_s),
    )
    q_BHTK, k_BHSK, v_BHSK = (
        _fill(jnp.swapaxes(array, 1, 2), 2, size)
        for array, size in ((q_BTHK, size_q), (k_BSHK, size_s), (v_BSHK, size_s))
    )
    rate = 0.0 if key is None else dropout_rate
    out_BHTK = _attend(q_BHTK, k_BHSK, v_BHSK, visible, key if rate else None, rate, (size_q, size_s))
    return jnp.swapaxes(out_BHTK, 1, 2)[:, :queries]


def _fill(array: Array, axis: int, block: int) -> Array:
    """Zeros at the end, up to whole blocks; as segments they are padding."""
    missing = -array.shape[axis] % block
    return jnp.pad(array, [(0, missing if i == axis else 0) for i in range(array.ndim)]) if missing else array


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attend(
    q_BHTK: Array,
    k_BHSK: Array,
    v_BHSK: Array,
    visible: Visible,
    key: Array | None,
    rate: float,
    sizes: tuple[int, int],
) -> Array:
    return _forward(q_BHTK, k_BHSK, v_BHSK, visible, key, rate, sizes)[0]


def _forward(
    q_BHTK: Array,
    k_BHSK: Array,
    v_BHSK: Array,
    visible: Visible,
    key: Array | None,
    rate: float,
    sizes: tuple[int, int],
) -> tuple[Array, tuple]:
    """Output, and what the gradient needs: the inputs, the output and the log of each query's sum."""
    size_q, size_s = sizes
    scorer = _Scorer(q_BHTK, k_BHSK, visible, Drop(rate, key), sizes)
    B, H, T = q_BHTK.shape[:3]

    def add_keys(i: Array, j: Array, running: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        sum_BHqK, total_BHq, highest_BHq = running
        logits_BHqs, _ = scorer.logits(i, j)
        higher_BHq = jnp.maximum(highest_BHq, logits_BHqs.max(-1))
        shrink_BHq = jnp.exp(highest_BHq - higher_BHq)
        weights_BHqs = jnp.exp(logits_BHqs - higher_BHq[..., None])
        total_BHq = total_BHq * shrink_BHq + weights_BHqs.sum(-1)
        kept_BHqs = scorer.dropped(weights_BHqs, i, j).astype(v_BHSK.dtype)
        sum_BHqK = sum_BHqK * shrink_BHq[..., None] + _product("bhqs,bhsk->bhqk", kept_BHqs, _block(v_BHSK, j, size_s))
        return sum_BHqK, total_BHq, higher_BHq

    def of_queries(i: Array) -> tuple[Array, Array]:
        empty = (
            jnp.zeros((B, H, size_q, v_BHSK.shape[-1]), jnp.float32),
            jnp.zeros((B, H, size_q), jnp.float32),
            jnp.full((B, H, size_q), LOWEST),
        )
        step = functools.partial(add_keys, i)
        sum_BHqK, total_BHq, highest_BHq = jax.lax.fori_loop(0, scorer.last_keys(i), step, empty)
        out_BHqK = sum_BHqK / total_BHq[..., None]
        return out_BHqK.astype(v_BHSK.dtype), highest_BHq + jnp.log(total_BHq)

    blocks = jax.lax.map(of_queries, jnp.arange(T // size_q, dtype=jnp.int32))
    out_BHTK, log_total_BHT = (_join(array) for array in blocks)
    return out_BHTK, (q_BHTK, k_BHSK, v_BHSK, visible, key, out_BHTK, log_total_BHT)


def _backward(rate: float, sizes: tuple[int, int], saved: tuple, grad_BHTK: Array) -> tuple:
    q_BHTK, k_BHSK, v_BHSK, visible, key, out_BHTK, log_total_BHT = saved
    size_q, size_s = sizes
    scorer = _Scorer(q_BHTK, k_BHSK, visible, Drop(rate, key), sizes)
    scale = q_BHTK.shape[-1] ** -0.5
    # Every weight of a query loses the mean of their gradients, which the output tells without the weights.
    mean_BHT = (grad_BHTK.astype(jnp.float32) * out_BHTK.astype(jnp.float32)).sum(-1)

    def add_queries(j: Array, i: Array, running: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        dq_BHTK, dk_BHsK, dv_BHsK = running
        q_BHqK, grad_BHqK = _block(q_BHTK, i, size_q), _block(grad_BHTK, i, size_q)
        logits_BHqs, mask = scorer.logits(i, j)
        weights_BHqs = jnp.exp(logits_BHqs - _block(log_total_BHT, i, size_q)[..., None])
        kept_BHqs = scorer.dropped(weights_BHqs, i, j).astype(grad_BHTK.dtype)
        dv_BHsK += _product("bhqs,bhqk->bhsk", kept_BHqs, grad_BHqK)
        dweights_BHqs = _product("bhqk,bhsk->bhqs", grad_BHqK, _block(v_BHSK, j, size_s))
        dweights_BHqs = scorer.dropped(dweights_BHqs, i, j) - _block(mean_BHT, i, size_q)[..., None]
        dlogits_BHqs = jnp.where(mask, weights_BHqs * dweights_BHqs * scale, 0.0).astype(q_BHTK.dtype)
        dk_BHsK += _product("bhqs,bhqk->bhsk", dlogits_BHqs, q_BHqK)
        dq_BHqK = _product("bhqs,bhsk->bhqk", dlogits_BHqs, _block(k_BHSK, j, size_s))
        dq_BHqK += _block(dq_BHTK, i, size_q)
        dq_BHTK = jax.lax.dynamic_update_slice_in_dim(dq_BHTK, dq_BHqK, i * size_q, axis=2)
        return dq_BHTK, dk_BHsK, dv_BHsK

    def of_keys(dq_BHTK: Array, j: Array) -> tuple[Array, tuple[Array, Array]]:
        empty = [jnp.zeros((*array.shape[:2], size_s, array.shape[3]), jnp.float32) for array in (k_BHSK, v_BHSK)]
        step = functools.partial(add_queries, j)
        last = q_BHTK.shape[2] // size_q
        dq_BHTK, *dkv = jax.lax.fori_loop(scorer.first_queries(j), last, step, (dq_BHTK, *empty))
        return dq_BHTK, tuple(dkv)

    blocks = jnp.arange(k_BHSK.shape[2] // size_s, dtype=jnp.int32)
    dq_BHTK, dkv = jax.lax.scan(of_keys, jnp.zeros(q_BHTK.shape, jnp.float32), blocks)
    dk_BHSK, dv_BHSK = (_join(array) for array in dkv)
    grads = dq_BHTK.astype(q_BHTK.dtype), dk_BHSK.astype(k_BHSK.dtype), dv_BHSK.astype(v_BHSK.dtype)
    return (*grads, None, None)


_attend.defvjp(_forward, _backward)


class _Scorer(NamedTuple):
    """Logits and dropout of block i of the queries against block j of the keys."""

    q_BHTK: Array
    k_BHSK: Array
    visible: Visible
    drop: Drop
    sizes: tuple[int, int]

    def logits(self, i: Array, j: Array) -> tuple[Array, Array]:
        """Scaled float32 logits, LOWEST where hidden, and the mask."""
        size_q, size_s = self.sizes
        q_BHqK, k_BHsK = _block(self.q_BHTK, i, size_q), _block(self.k_BHSK, j, size_s)
        mask = self.visible.mask(size_q, size_s, i * size_q, j * size_s)
        logits_BHqs = _product("bhqk,bhsk->bhqs", q_BHqK, k_BHsK) * q_BHqK.shape[-1] ** -0.5
        return jnp.where(mask, logits_BHqs, LOWEST), mask

    def dropped(self, weights_BHqs: Array, i: Array, j: Array) -> Array:
        """Weights after dropout, or their gradient before it: both are scaled by the same bits."""
        rate, key = self.drop
        if key is None:
            return weights_BHqs
        return dropout(weights_BHqs, rate, jax.random.fold_in(jax.random.fold_in(key, i), j))

    def last_keys(self, i: Array) -> Any:
        """Blocks of keys up to the last that these queries see."""
        blocks = self.k_BHSK.shape[2] // self.sizes[1]
        if not self.visible.causal:
            return blocks
        return jnp.minimum(((i + 1) * self.sizes[0] - 1) // self.sizes[1] + 1, blocks)

    def first_queries(self, j: Array) -> Any:
        """The first block of queries that sees these keys."""
        return j * self.sizes[1] // self.sizes[0] if self.visible.causal else 0


def _block(array: Array, index: Array, size: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(array, index * size, size, axis=2)


def _join(blocks: Array) -> Array:
    """[blocks, B, H, size, …] → [B, H, blocks · size, …]."""
    joined = jnp.moveaxis(blocks, 0, 2)
    return joined.reshape(*joined.shape[:2], -1, *joined.shape[4:])


def _product(how: str, one: Array, other: Array) -> Array:
    return jnp.einsum(how, one, other, preferred_element_type=jnp.float32)
