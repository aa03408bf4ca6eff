"""Ring attention: the length split over devices, keys and values passed round them (Liu et al. 2023).

Each device keeps its queries. Its keys and values go from device to device until all queries have met all
keys, by the blocks of `blockwise`; in the backward pass the gradients of keys and values travel with them
and come home. A device never holds more than its part of the length, and XLA sends the next part while one
is computed with.

B batch, T query length, S key length, H heads, K width per head: of one device's part.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array

from transformer.attention.blockwise import (
    BLOCK,
    Drop,
    Gradients,
    Meeting,
    Running,
    Way,
    in_blocks,
    in_rows,
    look,
    look_back,
    no_gradients,
    nothing_seen,
    reopened,
    settle,
)
from transformer.attention.dropout import Words, head_words
from transformer.attention.mask import Visible
from transformer.distributed import sharding


def ring_attention(
    q_BTHK: Array,
    k_BSHK: Array,
    v_BSHK: Array,
    visible: Visible,
    dropout_rate: float = 0.0,
    key: Array | None = None,
    block: int = BLOCK,
) -> Array:
    """As `blockwise.blockwise_attention`, on the current mesh, over the devices that split `length`.

    These must divide T and S: `sharding.shard_batch` sees to it.

    Returns:
      [B, T, H, K] in the dtype of `v_BSHK`.
    """
    words = head_words(key, dropout_rate, q_BTHK.shape[0], q_BTHK.shape[2])
    local = functools.partial(_local, dropout_rate, block, sharding.num_shards("length"))
    heads = ("batch", "length", "heads", "kv")
    split = sharding.shard_map(local, (heads, heads, heads, ("batch", "length"), ("batch", "heads")), heads)
    return split(q_BTHK, k_BSHK, v_BSHK, visible, words)


def _local(
    rate: float,
    block: int,
    count: int,
    q_BTHK: Array,
    k_BSHK: Array,
    v_BSHK: Array,
    visible: Visible,
    words: Words | None,
) -> Array:
    """One of `count` devices."""
    queries, keys = q_BTHK.shape[1], k_BSHK.shape[1]
    first = sharding.axis_index("length") * queries
    *qkv, visible, sizes = in_blocks(q_BTHK, k_BSHK, v_BSHK, dataclasses.replace(visible, first_query=first), block)
    out_BHTK = _attend(*qkv, visible, words, Way(rate, sizes, (count, keys)))
    return jnp.swapaxes(out_BHTK, 1, 2)[:, :queries]


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(q_BHTK: Array, k_BHSK: Array, v_BHSK: Array, visible: Visible, words: Words | None, way: Way) -> Array:
    return _forward(q_BHTK, k_BHSK, v_BHSK, visible, words, way)[0]


def _meet(here: Meeting, travelling: tuple, turn: Array, ring: tuple[int, int]) -> Meeting:
    """This device's queries and the keys that have come after so many turns, from so many devices before it."""
    k_BHSK, v_BHSK, keys_BS = travelling
    count, keys = ring
    first = (sharding.axis_index("length") - turn) % count * keys
    visible = dataclasses.replace(here.visible, keys_BS=keys_BS, first_key=first)
    return here._replace(k_BHSK=k_BHSK, v_BHSK=v_BHSK, visible=visible)


def _forward(
    q_BHTK: Array, k_BHSK: Array, v_BHSK: Array, visible: Visible, words: Words | None, way: Way
) -> tuple[Array, tuple]:
    here, ring = Meeting(q_BHTK, k_BHSK, v_BHSK, visible, Drop(way.rate, words), way.sizes), way.ring

    def turn(number: Array, carry: tuple[tuple, Running]) -> tuple[tuple, Running]:
        travelling, running = carry
        onward = sharding.ring_permute("length", travelling, ring[0])
        return onward, look(_meet(here, travelling, number, ring), running)

    start = (k_BHSK, v_BHSK, visible.keys_BS), nothing_seen(here)
    _, running = jax.lax.fori_loop(0, ring[0], turn, start)
    out_BHTK, log_total_BHT = settle(running, v_BHSK.dtype)
    return out_BHTK, (q_BHTK, k_BHSK, v_BHSK, visible, words, out_BHTK, log_total_BHT)


def _backward(way: Way, saved: tuple, grad_BHTK: Array) -> tuple:
    (here, looked), ring = reopened(way, saved, grad_BHTK), way.ring

    def turn(number: Array, carry: tuple[tuple, Gradients]) -> tuple[tuple, Gradients]:
        travelling, gradients = carry
        onward = sharding.ring_permute("length", travelling, ring[0])
        dq_BHTK, *dkv = look_back(_meet(here, travelling, number, ring), looked, gradients)
        return onward, Gradients(dq_BHTK, *sharding.ring_permute("length", dkv, ring[0]))

    start = (here.k_BHSK, here.v_BHSK, here.visible.keys_BS), no_gradients(here)
    _, gradients = jax.lax.fori_loop(0, ring[0], turn, start)
    return *in_rows(gradients, *saved[:3]), None, None


_attend.defvjp(_forward, _backward)
