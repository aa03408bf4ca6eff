"""Attention by blocks: the numbers of the plain path, in memory that grows with the length and not its square.

Keys pass by in blocks while each query keeps a running maximum, sum and weighted value (Milakov and
Gimelshein 2018; Rabe and Staats 2021). The gradient computes the weights of each block anew (Dao et al.
2022, algorithm 4). Blocks that a causal mask hides whole are not computed.

B batch, T query length, S key length, H heads, K width per head; q and s in a name are a block's
queries and keys, n and m how many blocks there are of them. Sums are float32.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from transformer.attention.dropout import Words, drop, head_words, kept_weights
from transformer.attention.mask import LOWEST, Visible

BLOCK = 128  # queries and keys of a block; larger ones are slower on a CPU (docs/log.md)


class Drop(NamedTuple):
    """Dropout of attention weights; see `kept_weights`."""

    rate: float
    words: Words | None


class Way(NamedTuple):
    """How to attend: rate of dropout, queries and keys of a block, devices of a ring and keys of each."""

    rate: float
    sizes: tuple[int, int]
    ring: tuple[int, int] = (1, 0)


class Running(NamedTuple):
    """What queries, by blocks, have gathered from the keys that have passed: weighted values, sums, maxima."""

    sum_nBHqK: Array
    total_nBHq: Array
    highest_nBHq: Array


class Looked(NamedTuple):
    """Queries that have looked at all keys, as their gradient needs them: in `mean_BHT` that of their weights."""

    q_BHTK: Array
    grad_BHTK: Array
    mean_BHT: Array
    log_total_BHT: Array


class Gradients(NamedTuple):
    """Of queries, and by blocks of keys and values, as far as blocks have met; float32."""

    q_BHTK: Array
    k_mBHsK: Array
    v_mBHsK: Array


def blockwise_attention(
    q_BTHK: Array,
    k_BSHK: Array,
    v_BSHK: Array,
    visible: Visible,
    dropout_rate: float = 0.0,
    key: Array | None = None,
    block: int = BLOCK,
) -> Array:
    """As `attention.dot_product_attention` under `visible`, to 1e-5, with the same dropout.

    Returns:
      [B, T, H, K] in the dtype of `v_BSHK`.
    """
    *arrays, visible, sizes = in_blocks(q_BTHK, k_BSHK, v_BSHK, visible, block)
    words = head_words(key, dropout_rate, q_BTHK.shape[0], q_BTHK.shape[2])
    out_BHTK = _attend(*arrays, visible, words, Way(dropout_rate, sizes))
    return jnp.swapaxes(out_BHTK, 1, 2)[:, : q_BTHK.shape[1]]


def in_blocks(
    q_BTHK: Array, k_BSHK: Array, v_BSHK: Array, visible: Visible, block: int
) -> tuple[Array, Array, Array, Visible, tuple[int, int]]:
    """Heads before lengths, lengths filled up to whole blocks, and the sizes of a block of queries and of keys."""
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
    return q_BHTK, k_BHSK, v_BHSK, visible, (size_q, size_s)


def _fill(array: Array, axis: int, block: int) -> Array:
    """Zeros at the end, up to whole blocks; as segments they are padding."""
    missing = -array.shape[axis] % block
    return jnp.pad(array, [(0, missing if i == axis else 0) for i in range(array.ndim)]) if missing else array


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(q_BHTK: Array, k_BHSK: Array, v_BHSK: Array, visible: Visible, words: Words | None, way: Way) -> Array:
    return _forward(q_BHTK, k_BHSK, v_BHSK, visible, words, way)[0]


def _forward(
    q_BHTK: Array, k_BHSK: Array, v_BHSK: Array, visible: Visible, words: Words | None, way: Way
) -> tuple[Array, tuple]:
    """Output, and what the gradient needs: the inputs, the output and the log of each query's sum."""
    meeting = Meeting(q_BHTK, k_BHSK, v_BHSK, visible, Drop(way.rate, words), way.sizes)
    out_BHTK, log_total_BHT = settle(look(meeting, nothing_seen(meeting)), v_BHSK.dtype)
    return out_BHTK, (q_BHTK, k_BHSK, v_BHSK, visible, words, out_BHTK, log_total_BHT)


def _backward(way: Way, saved: tuple, grad_BHTK: Array) -> tuple:
    meeting, looked = reopened(way, saved, grad_BHTK)
    gradients = look_back(meeting, looked, no_gradients(meeting))
    return *in_rows(gradients, *saved[:3]), None, None


_attend.defvjp(_forward, _backward)


class Meeting(NamedTuple):
    """Queries that meet keys, block by block: i is one of queries, j one of keys."""

    q_BHTK: Array
    k_BHSK: Array
    v_BHSK: Array
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
        (rate, words), (size_q, size_s) = self.drop, self.sizes
        if words is None:
            return weights_BHqs
        query, key = self.visible.query_place(i * size_q), self.visible.key_place(j * size_s)
        return drop(weights_BHqs, kept_weights(words, rate, query, size_q, key, size_s), rate)

    def last_keys(self, i: Array) -> Any:
        """Blocks of keys up to the last that these queries see."""
        size_q, size_s = self.sizes
        blocks = self.k_BHSK.shape[2] // size_s
        if not self.visible.causal:
            return blocks
        ahead = self.visible.query_place((i + 1) * size_q - 1) - self.visible.key_place(0)
        return jnp.clip(ahead // size_s + 1, 0, blocks)

    def first_queries(self, j: Array) -> Any:
        """The first block of queries that sees these keys."""
        size_q, size_s = self.sizes
        if not self.visible.causal:
            return 0
        ahead = self.visible.key_place(j * size_s) - self.visible.query_place(0)
        return jnp.clip(ahead // size_q, 0, self.q_BHTK.shape[2] // size_q)


def nothing_seen(meeting: Meeting) -> Running:
    """Before the first keys."""
    B, H, T, _ = meeting.q_BHTK.shape
    size_q, width = meeting.sizes[0], meeting.v_BHSK.shape[-1]
    shape = (T // size_q, B, H, size_q)
    return Running(jnp.zeros((*shape, width), jnp.float32), jnp.zeros(shape, jnp.float32), jnp.full(shape, LOWEST))


def look(meeting: Meeting, running: Running) -> Running:
    """Lets all blocks of keys pass all blocks of queries."""
    v_BHSK, size_s = meeting.v_BHSK, meeting.sizes[1]

    def add_keys(i: Array, j: Array, running: Running) -> Running:
        sum_BHqK, total_BHq, highest_BHq = running
        logits_BHqs, _ = meeting.logits(i, j)
        higher_BHq = jnp.maximum(highest_BHq, logits_BHqs.max(-1))
        shrink_BHq = jnp.exp(highest_BHq - higher_BHq)
        weights_BHqs = jnp.exp(logits_BHqs - higher_BHq[..., None])
        total_BHq = total_BHq * shrink_BHq + weights_BHqs.sum(-1)
        kept_BHqs = meeting.dropped(weights_BHqs, i, j).astype(v_BHSK.dtype)
        sum_BHqK = sum_BHqK * shrink_BHq[..., None] + _product("bhqs,bhsk->bhqk", kept_BHqs, _block(v_BHSK, j, size_s))
        return Running(sum_BHqK, total_BHq, higher_BHq)

    def of_queries(block: tuple[Array, Running]) -> Running:
        i, running = block
        return jax.lax.fori_loop(0, meeting.last_keys(i), functools.partial(add_keys, i), running)

    blocks = jnp.arange(running.sum_nBHqK.shape[0], dtype=jnp.int32)
    return jax.lax.map(of_queries, (blocks, running))


def settle(running: Running, dtype: jnp.dtype) -> tuple[Array, Array]:
    """Output [B, H, T, K] and the log of each query's sum [B, H, T], when all keys have passed."""
    out_nBHqK = (running.sum_nBHqK / running.total_nBHq[..., None]).astype(dtype)
    return _join(out_nBHqK), _join(running.highest_nBHq + jnp.log(running.total_nBHq))


def mean_gradient(grad_BHTK: Array, out_BHTK: Array) -> Array:
    """The mean of the gradients of a query's weights, which each of them loses; the output tells it without them."""
    return (grad_BHTK.astype(jnp.float32) * out_BHTK.astype(jnp.float32)).sum(-1)


def reopened(way: Way, saved: tuple, grad_BHTK: Array) -> tuple[Meeting, Looked]:
    """What was saved for the gradient of attention: its queries and keys, and what the queries found."""
    q_BHTK, k_BHSK, v_BHSK, visible, words, out_BHTK, log_total_BHT = saved
    meeting = Meeting(q_BHTK, k_BHSK, v_BHSK, visible, Drop(way.rate, words), way.sizes)
    return meeting, Looked(q_BHTK, grad_BHTK, mean_gradient(grad_BHTK, out_BHTK), log_total_BHT)


def no_gradients(meeting: Meeting) -> Gradients:
    """Before the first keys."""

    def zeros(array: Array) -> Array:
        B, H, S, K = array.shape
        return jnp.zeros((S // meeting.sizes[1], B, H, meeting.sizes[1], K), jnp.float32)

    q_BHTK = jnp.zeros(meeting.q_BHTK.shape, jnp.float32)
    return Gradients(q_BHTK, zeros(meeting.k_BHSK), zeros(meeting.v_BHSK))


def look_back(meeting: Meeting, looked: Looked, gradients: Gradients) -> Gradients:
    """Adds the gradients of all blocks of queries and these keys."""
    size_q, size_s = meeting.sizes
    q_BHTK, grad_BHTK = looked.q_BHTK, looked.grad_BHTK
    scale, last = q_BHTK.shape[-1] ** -0.5, q_BHTK.shape[2] // size_q

    def add_queries(j: Array, i: Array, running: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        dq_BHTK, dk_BHsK, dv_BHsK = running
        q_BHqK, grad_BHqK = _block(q_BHTK, i, size_q), _block(grad_BHTK, i, size_q)
        logits_BHqs, mask = meeting.logits(i, j)
        weights_BHqs = jnp.exp(logits_BHqs - _block(looked.log_total_BHT, i, size_q)[..., None])
        kept_BHqs = meeting.dropped(weights_BHqs, i, j).astype(grad_BHTK.dtype)
        dv_BHsK += _product("bhqs,bhqk->bhsk", kept_BHqs, grad_BHqK)
        dweights_BHqs = _product("bhqk,bhsk->bhqs", grad_BHqK, _block(meeting.v_BHSK, j, size_s))
        dweights_BHqs = meeting.dropped(dweights_BHqs, i, j) - _block(looked.mean_BHT, i, size_q)[..., None]
        dlogits_BHqs = jnp.where(mask, weights_BHqs * dweights_BHqs * scale, 0.0).astype(q_BHTK.dtype)
        dk_BHsK += _product("bhqs,bhqk->bhsk", dlogits_BHqs, q_BHqK)
        dq_BHqK = _product("bhqs,bhsk->bhqk", dlogits_BHqs, _block(meeting.k_BHSK, j, size_s))
        dq_BHqK += _block(dq_BHTK, i, size_q)
        dq_BHTK = jax.lax.dynamic_update_slice_in_dim(dq_BHTK, dq_BHqK, i * size_q, axis=2)
        return dq_BHTK, dk_BHsK, dv_BHsK

    def of_keys(dq_BHTK: Array, block: tuple[Array, Array, Array]) -> tuple[Array, tuple[Array, Array]]:
        j, dk_BHsK, dv_BHsK = block
        step = functools.partial(add_queries, j)
        dq_BHTK, *dkv = jax.lax.fori_loop(meeting.first_queries(j), last, step, (dq_BHTK, dk_BHsK, dv_BHsK))
        return dq_BHTK, tuple(dkv)

    blocks = jnp.arange(gradients.k_mBHsK.shape[0], dtype=jnp.int32)
    dq_BHTK, dkv = jax.lax.scan(of_keys, gradients.q_BHTK, (blocks, *gradients[1:]))
    return Gradients(dq_BHTK, *dkv)


def in_rows(gradients: Gradients, *qkv: Array) -> tuple[Array, ...]:
    """As arrays like those that they belong to: [B, H, T or S, K]."""
    joined = (gradients.q_BHTK, _join(gradients.k_mBHsK), _join(gradients.v_mBHsK))
    return tuple(gradient.astype(array.dtype) for gradient, array in zip(joined, qkv, strict=True))


def _block(array: Array, index: Array, size: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(array, index * size, size, axis=2)


def _join(blocks: Array) -> Array:
    """[blocks, B, H, size, …] → [B, H, blocks · size, …]."""
    joined = jnp.moveaxis(blocks, 0, 2)
    return joined.reshape(*joined.shape[:2], -1, *joined.shape[4:])


def _product(how: str, one: Array, other: Array) -> Array:
    return jnp.einsum(how, one, other, preferred_element_type=jnp.float32)
