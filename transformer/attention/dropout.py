"""Dropout. Every bit is a hash of its own place, so that neither padding, blocks nor a mesh change the others.

B batch, T query length, S key length, H heads.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend.random import threefry2x32_p

Words = tuple[Array, Array]

BYTES = 8  # of one hash


def dropout(x: Array, rate: float, key: Array | None) -> Array:
    """Zeroes each element with probability `rate` and scales the rest by 1 / (1 - rate); identity without a key.

    One hash of a row and a place in it serves eight elements, a byte each: hashing is what dropout costs.
    As a byte knows 256 rates only, one of the two next to `rate` is drawn for each call.
    """
    if key is None or rate == 0.0:
        return x
    *leading, width = x.shape
    shape = (*leading, -(-width // BYTES))
    row, *rest = (jax.lax.broadcasted_iota(jnp.uint32, shape, axis) for axis in range(len(shape)))
    place = jnp.zeros(shape, jnp.uint32)
    for size, index in zip(shape[1:], rest, strict=True):
        place = place * np.uint32(size) + index
    words = jnp.stack(_hash(_words(key), row, place), axis=-1)
    bytes_ = jax.lax.bitcast_convert_type(words, jnp.uint8).reshape(*leading, -1)[..., :width]
    draw = jax.random.uniform(jax.random.fold_in(key, 2**31))
    lowest_kept = jnp.floor(256.0 * rate + draw).astype(jnp.uint8)
    scale = jnp.where(bytes_ >= lowest_kept, 1.0 / (1.0 - rate), 0.0).astype(x.dtype)
    return x * jax.lax.optimization_barrier(scale)


def drop(x: Array, keep: Array, rate: float) -> Array:
    """Zeroes what is not kept and scales the rest by 1 / (1 - rate)."""
    return jnp.where(keep, x / jnp.asarray(1.0 - rate, x.dtype), jnp.zeros((), x.dtype))


def head_words(key: Array | None, rate: float, batch: int, heads: int) -> Words | None:
    """Two random uint32 [B, H] for each row and head, from which `kept_weights` draws; None: it keeps all."""
    if key is None or rate == 0.0:
        return None
    row_BH, head_BH = (jax.lax.broadcasted_iota(jnp.uint32, (batch, heads), axis) for axis in (0, 1))
    return _hash(_words(key), row_BH, head_BH)


def kept_weights(words: Words, rate: float, query: Array, queries: int, key: Array, keys: int) -> Array:
    """Which attention weights dropout keeps, bool [B, H, queries, keys], from a first query and key on.

    The bit of a weight is a hash of its own row, head and places: the same in any block, on any device.
    """
    shape = (*words[0].shape, queries, keys)
    query_BHTS = jax.lax.broadcasted_iota(jnp.uint32, shape, 2) + query.astype(jnp.uint32)
    key_BHTS = jax.lax.broadcasted_iota(jnp.uint32, shape, 3) + key.astype(jnp.uint32)
    return _kept(_hash([word[:, :, None, None] for word in words], query_BHTS, key_BHTS), rate)


def _kept(bits: Words, rate: float) -> Array:
    return bits[0] >= np.uint32(round(rate * 2**32))


def _words(key: Array) -> Array:
    return jax.random.key_data(key).ravel()[:2]


def _hash(words: Sequence[Array] | Array, high: Array, low: Array) -> Words:
    """Threefry-2x32 of two counters under a key of two words; all uint32, of one shape in the end."""
    one, other = (jnp.broadcast_to(word, high.shape) for word in words)
    return tuple(threefry2x32_p.bind(one, other, high, low))
