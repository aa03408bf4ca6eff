"""Counter-based dropout: each bit is a hash of its own position, whatever the padding, the blocks or the mesh.

B batch, T query length, S key length, H heads.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend.random import threefry2x32_p

from transformer.distributed import platform as platforms

Seeds = tuple[Array, Array]

BYTES_PER_HASH = 8  # random bytes of one hash


def dropout(x: Array, rate: float, key: Array | None) -> Array:
    """Zeroes each element with probability `rate` and scales the rest by 1 / (1 - rate); identity without a key.

    One hash of a row and a position in it serves eight elements, a byte each: hashing is what dropout costs. A byte
    has only 256 rates, so the rate is stochastically rounded to a multiple of 1/256, once for each call.
    """
    if key is None or rate == 0.0:
        return x
    *leading, width = x.shape
    shape = (*leading, -(-width // BYTES_PER_HASH))
    row, *rest = (jax.lax.broadcasted_iota(jnp.uint32, shape, axis) for axis in range(len(shape)))
    position = jnp.zeros(shape, jnp.uint32)
    for size, index in zip(shape[1:], rest, strict=True):
        position = position * np.uint32(size) + index
    words = jnp.stack(_hash(_key_words(key), row, position), axis=-1)
    bytes_ = jax.lax.bitcast_convert_type(words, jnp.uint8).reshape(*leading, -1)[..., :width]
    offset = jax.random.uniform(jax.random.fold_in(key, 2**31))
    threshold = jnp.floor(256.0 * rate + offset).astype(jnp.uint8)
    scale = jnp.where(bytes_ >= threshold, 1.0 / (1.0 - rate), 0.0).astype(x.dtype)
    return x * (jax.lax.optimization_barrier(scale) if platforms.materializes_dropout_masks() else scale)


def apply_keep_mask(x: Array, keep: Array, rate: float) -> Array:
    """Zeroes elements where `keep` is false and scales the rest by 1 / (1 - rate)."""
    return jnp.where(keep, x / jnp.asarray(1.0 - rate, x.dtype), jnp.zeros((), x.dtype))


def head_seeds(key: Array | None, rate: float, batch: int, heads: int) -> Seeds | None:
    """Seeds of `attention_keep_mask`, two uint32 [B, H]; None without dropout."""
    if key is None or rate == 0.0:
        return None
    row_BH, head_BH = (jax.lax.broadcasted_iota(jnp.uint32, (batch, heads), axis) for axis in (0, 1))
    return _hash(_key_words(key), row_BH, head_BH)


def attention_keep_mask(
    seeds: Seeds, rate: float, q_position: Array, num_queries: int, kv_position: Array, num_keys: int
) -> Array:
    """Which attention weights of a block dropout keeps, bool [B, H, num_queries, num_keys].

    Each bit is a hash of row, head and both positions: the same in any block, on any device.
    """
    shape = (*seeds[0].shape, num_queries, num_keys)
    query_BHTS = jax.lax.broadcasted_iota(jnp.uint32, shape, 2) + q_position.astype(jnp.uint32)
    key_BHTS = jax.lax.broadcasted_iota(jnp.uint32, shape, 3) + kv_position.astype(jnp.uint32)
    bits, _ = _hash([seed[:, :, None, None] for seed in seeds], query_BHTS, key_BHTS)
    return bits >= np.uint32(round(rate * 2**32))


def token_keep_mask(key: Array, rate: float, rows: int, length: int) -> Array:
    """Which tokens of a batch a cutoff with probability `rate` keeps, bool [rows, length].

    Each bit is a hash of row and position: the same whatever the padding and the mesh.
    """
    row_BT, position_BT = (jax.lax.broadcasted_iota(jnp.uint32, (rows, length), axis) for axis in (0, 1))
    bits_BT, _ = _hash(_key_words(key), row_BT, position_BT)
    return bits_BT >= np.uint32(round(rate * 2**32))


def _key_words(key: Array) -> Array:
    return jax.random.key_data(key).ravel()[:2]


def _hash(key_words: Sequence[Array] | Array, high: Array, low: Array) -> Seeds:
    """Threefry-2x32 of two counters under a key of two words; all uint32, broadcast to one shape."""
    key_high, key_low = (jnp.broadcast_to(word, high.shape) for word in key_words)
    return tuple(threefry2x32_p.bind(key_high, key_low, high, low))
