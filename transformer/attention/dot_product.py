"""Attention as pure functions of arrays (paper, section 3.2).

B batch, T query length, S key length, H heads, K width per head, N beams.
Masks are boolean, True where a query may look, of shape [B or 1, 1, T or 1, S].
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from transformer.attention.dropout import drop, head_words, kept_weights
from transformer.attention.mask import LOWEST


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def float32_product(how: str, one: Array, other: Array) -> Array:
    """Einsum of two arrays of one dtype, as a softmax wants it: float32; its gradient multiplies in their dtype.

    Left to itself, JAX takes the float32 gradient for a reason to multiply in float32, at half the speed of bfloat16
    or less. Of float32 arrays it is the einsum and its gradient.
    """
    return jnp.einsum(how, one, other, preferred_element_type=jnp.float32)


def _product_forward(how: str, one: Array, other: Array) -> tuple[Array, tuple[Array, Array]]:
    return float32_product(how, one, other), (one, other)


def _product_backward(how: str, saved: tuple[Array, Array], grad: Array) -> tuple[Array, Array]:
    one, other = saved
    narrow = grad.astype(one.dtype)
    (grad_one,) = jax.linear_transpose(lambda one: jnp.einsum(how, one, other), one)(narrow)
    (grad_other,) = jax.linear_transpose(lambda other: jnp.einsum(how, one, other), other)(narrow)
    return grad_one, grad_other


float32_product.defvjp(_product_forward, _product_backward)


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
    weights_BHTS = attention_weights(q_BTHK, k_BSHK, mask).astype(v_BSHK.dtype)
    B, H, T, S = weights_BHTS.shape
    words = head_words(key, dropout_rate, B, H)
    if words is not None:
        keep_BHTS = kept_weights(words, dropout_rate, jnp.int32(0), T, jnp.int32(0), S)
        weights_BHTS = drop(weights_BHTS, keep_BHTS, dropout_rate)
    return jnp.einsum("bhts,bshk->bthk", weights_BHTS, v_BSHK)


def attention_weights(q_BTHK: Array, k_BSHK: Array, mask: Array) -> Array:
    """softmax(q kᵀ / √K), float32 [B, H, T, S]."""
    width = q_BTHK.shape[-1]
    logits_BHTS = float32_product("bthk,bshk->bhts", q_BTHK, k_BSHK)
    return jax.nn.softmax(jnp.where(mask, logits_BHTS * width**-0.5, LOWEST), axis=-1)


def write_cache(
    k_BHKS: Array, v_BHSK: Array, new_k_BNHK: Array, new_v_BNHK: Array, position: Array
) -> tuple[Array, Array]:
    """The cache with keys and values of one step written at `position` of each beam: place position * N + n."""
    start = position * jnp.int32(new_k_BNHK.shape[1])
    return (
        jax.lax.dynamic_update_slice_in_dim(k_BHKS, new_k_BNHK.transpose(0, 2, 3, 1), start, axis=3),
        jax.lax.dynamic_update_slice_in_dim(v_BHSK, new_v_BNHK.swapaxes(1, 2), start, axis=2),
    )


def cached_attention(q_BNHK: Array, k_BHKS: Array, v_BHSK: Array, ancestors_BNT: Array, position: Array) -> Array:
    """One query for each beam over the cache of all beams of its sentence, as far as its own past goes.

    Hypotheses move between beams while the cache stays where it was written, which spares moving it at
    every step; a hypothesis only knows where its past lies.

    Args:
      k_BHKS, v_BHSK: of all positions, and of all beams of each: S = T * N.
      ancestors_BNT: int32; the beam in which the hypothesis now in beam n wrote its position t.
      position: int32 []; positions after it are not written yet.

    Returns:
      [B, N, H, K]
    """
    B, N, T = ancestors_BNT.shape
    beams_N = jnp.arange(N, dtype=jnp.int32)
    is_own = ancestors_BNT[:, :, :, None] == beams_N[None, None, None, :]
    is_written = jnp.arange(T, dtype=jnp.int32) <= position
    mask = (is_own & is_written[None, None, :, None]).reshape(B, 1, N, T * N)
    return step_attention(q_BNHK, k_BHKS, v_BHSK, mask)


def step_attention(q_BNHK: Array, k_BHKS: Array, v_BHSK: Array, mask: Array) -> Array:
    """The same as `dot_product_attention`, of a query for each beam, over keys and values in an order of their own.

    It is the order in which both products read them: with others XLA's CPU back end copies all keys and values in
    every step, or takes a slow path.

    Returns:
      [B, N, H, K]
    """
    weights_BHNS = step_weights(q_BNHK, k_BHKS, mask).astype(v_BHSK.dtype)
    return jnp.einsum("bhns,bhsk->bhnk", weights_BHNS, v_BHSK).swapaxes(1, 2)


def step_weights(q_BNHK: Array, k_BHKS: Array, mask: Array) -> Array:
    """softmax(q kᵀ / √K), float32 [B, H, N, S]."""
    logits_BHNS = jnp.einsum("bnhk,bhks->bhns", q_BNHK, k_BHKS, preferred_element_type=jnp.float32)
    return jax.nn.softmax(jnp.where(mask, logits_BHNS * q_BNHK.shape[-1] ** -0.5, LOWEST), axis=-1)
