"""Attention as pure functions of arrays (paper, section 3.2).

B batch, T query length, S key length, H heads, K width per head, N beams.
Masks are boolean, True where a query may look, of shape [B or 1, 1, T or 1, S].
"""

import jax
import jax.numpy as jnp

Array = jax.Array


def padding_mask(is_token_BS: Array) -> Array:
    """Every query may look at real tokens only: bool [B, S] → [B, 1, 1, S]."""
    return is_token_BS[:, None, None, :]


def causal_mask(length: int) -> Array:
    """Position t may look at positions ≤ t (paper, section 3.2.3): bool [1, 1, T, T]."""
    return jnp.tril(jnp.ones((length, length), bool))[None, None]


def dot_product_attention(
    q_BTHK: Array,
    k_BSHK: Array,
    v_BSHK: Array,
    mask: Array,
    dropout_rate: float = 0.0,
    key: Array | None = None,
) -> Array:
    """softmax(q kᵀ / √K) v (paper, equation 1), the softmax in float32; memory grows with T · S.

    A query that may look nowhere gets a finite average; its result must not be used. Without `key`
    nothing is dropped.

    Returns:
      [B, T, H, K] in the dtype of `v_BSHK`.
    """
    weights_BHTS = attention_weights(q_BTHK, k_BSHK, mask)
    weights_BHTS = dropout(weights_BHTS.astype(v_BSHK.dtype), dropout_rate, key)
    return jnp.einsum("bhts,bshk->bthk", weights_BHTS, v_BSHK)


def attention_weights(q_BTHK: Array, k_BSHK: Array, mask: Array) -> Array:
    """softmax(q kᵀ / √K), float32 [B, H, T, S]."""
    width = q_BTHK.shape[-1]
    logits_BHTS = jnp.einsum("bthk,bshk->bhts", q_BTHK, k_BSHK, preferred_element_type=jnp.float32)
    logits_BHTS = logits_BHTS * width**-0.5
    lowest = jnp.finfo(jnp.float32).min
    return jax.nn.softmax(jnp.where(mask, logits_BHTS, lowest), axis=-1)


def dropout(x: Array, rate: float, key: Array | None) -> Array:
    """Zeroes each element with probability `rate` and scales the rest by 1 / (1 - rate); identity without a key."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / jnp.asarray(1.0 - rate, x.dtype), jnp.zeros((), x.dtype))


def write_cache(cache_BNTHK: Array, new_BNHK: Array, position: Array) -> Array:
    """The cache with the keys or values of one step written at `position` of each beam."""
    return jax.lax.dynamic_update_slice_in_dim(cache_BNTHK, new_BNHK[:, :, None], position, axis=2)


def cached_attention(q_BNHK: Array, k_BNTHK: Array, v_BNTHK: Array, ancestors_BNT: Array, position: Array) -> Array:
    """One query for each beam over the cache of all beams of its sentence, as far as its own past goes.

    Hypotheses move between beams while the cache stays where it was written, which spares moving it at
    every step; a hypothesis only knows where its past lies.

    Args:
      ancestors_BNT: int32; the beam in which the hypothesis now in beam n wrote its position t.
      position: int32 []; positions after it are not written yet.

    Returns:
      [B, N, H, K]
    """
    B, N, T = k_BNTHK.shape[:3]
    beams_N = jnp.arange(N, dtype=jnp.int32)
    is_own = ancestors_BNT[:, :, None, :] == beams_N[None, None, :, None]
    is_written = jnp.arange(T, dtype=jnp.int32) <= position
    mask = (is_own & is_written[None, None, None, :]).reshape(B, 1, N, N * T)
    k_BSHK, v_BSHK = (array.reshape(B, N * T, *array.shape[3:]) for array in (k_BNTHK, v_BNTHK))
    return dot_product_attention(q_BNHK, k_BSHK, v_BSHK, mask)
