"""Scaled dot-product attention and its KV cache: the reference implementation (paper, section 3.2).

B batch, T query length, S key length, H heads, K width per head (values may have another), N beams, C = T * N positions
of the cache. A mask is an AttentionMask, or bool [B or 1, H or 1, T or 1, S or 1], true where a query attends to a key.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from transformer.attention.dropout import apply_keep_mask, attention_keep_mask, head_seeds
from transformer.attention.mask import MASK_VALUE, AttentionMask


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def einsum_f32(subscripts: str, lhs: Array, rhs: Array) -> Array:
    """Einsum of two arrays of one dtype with a float32 result; its gradient multiplies in the dtype of the operands.

    Autodiff would multiply the float32 gradient in float32, at half the speed of bfloat16 or less.
    """
    return jnp.einsum(subscripts, lhs, rhs, preferred_element_type=jnp.float32)


def _einsum_forward(subscripts: str, lhs: Array, rhs: Array) -> tuple[Array, tuple[Array, Array]]:
    return einsum_f32(subscripts, lhs, rhs), (lhs, rhs)


def _einsum_backward(subscripts: str, saved: tuple[Array, Array], grad: Array) -> tuple[Array, Array]:
    lhs, rhs = saved
    grad = grad.astype(lhs.dtype)
    (grad_lhs,) = jax.linear_transpose(lambda lhs: jnp.einsum(subscripts, lhs, rhs), lhs)(grad)
    (grad_rhs,) = jax.linear_transpose(lambda rhs: jnp.einsum(subscripts, lhs, rhs), rhs)(grad)
    return grad_lhs, grad_rhs


einsum_f32.defvjp(_einsum_forward, _einsum_backward)


def dot_product_attention(
    q_BTHK: Array,
    k_BSHK: Array,
    v_BSHK: Array,
    mask: AttentionMask | Array,
    dropout_rate: float = 0.0,
    key: Array | None = None,
) -> Array:
    """softmax(q kᵀ / √K) v (paper, equation 1), the softmax in float32; memory grows with T · S.

    A query whose keys are all masked gets a finite average, which must not be used.

    Args:
      key: of dropout; without it there is none.

    Returns:
      [B, T, H, K] in the dtype of `v_BSHK`.
    """
    weights_BHTS = attention_weights(q_BTHK, k_BSHK, mask).astype(v_BSHK.dtype)
    B, H, T, S = weights_BHTS.shape
    seeds = head_seeds(key, dropout_rate, B, H)
    if seeds is not None:
        keep_BHTS = attention_keep_mask(seeds, dropout_rate, jnp.int32(0), T, jnp.int32(0), S)
        weights_BHTS = apply_keep_mask(weights_BHTS, keep_BHTS, dropout_rate)
    return jnp.einsum("bhts,bshk->bthk", weights_BHTS, v_BSHK)


def attention_weights(q_BTHK: Array, k_BSHK: Array, mask: AttentionMask | Array) -> Array:
    """softmax(q kᵀ / √K), float32 [B, H, T, S]."""
    logits_BHTS = einsum_f32("bthk,bshk->bhts", q_BTHK, k_BSHK)
    return masked_softmax(logits_BHTS * q_BTHK.shape[-1] ** -0.5, mask)


def masked_softmax(logits_BHTS: Array, mask: AttentionMask | Array) -> Array:
    """Softmax over the keys that the mask allows."""
    if isinstance(mask, AttentionMask):
        mask = mask.materialize(logits_BHTS.shape[2], logits_BHTS.shape[3])
    return jax.nn.softmax(jnp.where(mask, logits_BHTS, MASK_VALUE), axis=-1)


def write_cache(
    k_BHKC: Array, v_BHCK: Array, new_k_BNHK: Array, new_v_BNHK: Array, position: Array
) -> tuple[Array, Array]:
    """Writes keys and values of one decoding step into the cache.

    Beam n writes its position t at index t * N + n of the C axis: with N = 2, [t0n0, t0n1, t1n0, t1n1, …].
    """
    start = position * jnp.int32(new_k_BNHK.shape[1])
    return (
        jax.lax.dynamic_update_slice_in_dim(k_BHKC, new_k_BNHK.transpose(0, 2, 3, 1), start, axis=3),
        jax.lax.dynamic_update_slice_in_dim(v_BHCK, new_v_BNHK.swapaxes(1, 2), start, axis=2),
    )


def cached_attention(
    q_BNHK: Array, k_BHKC: Array, v_BHCK: Array, beam_history_BNT: Array | None, position: Array
) -> Array:
    """Self-attention of one query per beam over the cache of all beams; each attends only to its hypothesis' history.

    When hypotheses move between beams, only `beam_history_BNT` is reordered; keys and values stay where they were
    written.

    Args:
      k_BHKC, v_BHCK: the cache, laid out as in `write_cache`.
      beam_history_BNT: int32; the beam that wrote position t of the hypothesis now in beam n; None: that beam itself.
      position: int32 []; later positions are not written yet.

    Returns:
      [B, N, H, K]
    """
    if beam_history_BNT is None:
        return _attention_within_beams(q_BNHK, k_BHKC, v_BHCK, position)
    B, N, T = beam_history_BNT.shape
    beams_N = jnp.arange(N, dtype=jnp.int32)
    is_own = beam_history_BNT[:, :, :, None] == beams_N[None, None, None, :]
    is_written = jnp.arange(T, dtype=jnp.int32) <= position
    mask = (is_own & is_written[None, None, :, None]).reshape(B, 1, N, T * N)
    return decode_attention(q_BNHK, k_BHKC, v_BHCK, mask)


def _attention_within_beams(q_BNHK: Array, k_BHKC: Array, v_BHCK: Array, position: Array) -> Array:
    """`cached_attention` where no hypothesis moves: work and memory grow with N, not with N²."""
    B, N, H, K = q_BNHK.shape
    T = k_BHKC.shape[3] // N
    k_BHKTN, v_BHTNK = k_BHKC.reshape(B, H, K, T, N), v_BHCK.reshape(B, H, T, N, v_BHCK.shape[3])
    logits_BHTN = einsum_f32("bnhk,bhktn->bhtn", q_BNHK, k_BHKTN) * K**-0.5
    is_written_T1 = jnp.arange(T, dtype=jnp.int32)[:, None] <= position
    weights_BHTN = jax.nn.softmax(jnp.where(is_written_T1, logits_BHTN, MASK_VALUE), axis=2).astype(v_BHCK.dtype)
    return jnp.einsum("bhtn,bhtnk->bnhk", weights_BHTN, v_BHTNK)


def decode_attention(q_BNHK: Array, k_BHKS: Array, v_BHSK: Array, mask: AttentionMask | Array) -> Array:
    """`dot_product_attention` of one query per beam over keys and values in the layout of the cache.

    Both products read them in this layout: with others XLA's CPU back end copies all keys and values in every step,
    or takes a slow path.

    Returns:
      [B, N, H, K]
    """
    weights_BHNS = decode_attention_weights(q_BNHK, k_BHKS, mask).astype(v_BHSK.dtype)
    return jnp.einsum("bhns,bhsk->bhnk", weights_BHNS, v_BHSK).swapaxes(1, 2)


def decode_attention_weights(q_BNHK: Array, k_BHKS: Array, mask: AttentionMask | Array) -> Array:
    """softmax(q kᵀ / √K), float32 [B, H, N, S]."""
    logits_BHNS = einsum_f32("bnhk,bhks->bhns", q_BNHK, k_BHKS)
    return masked_softmax(logits_BHNS * q_BNHK.shape[-1] ** -0.5, mask)
