"""KL divergence between two predictions of one sentence pair, in neighbouring rows of a batch.

Rows 2i and 2i + 1 are neighbours. A device that holds consecutive rows holds both of each pair, and no logits travel.

B batch, T target length, V vocabulary.
"""

import jax
import jax.numpy as jnp
from jax import Array


def interleave(first: Array, second: Array) -> Array:
    """Makes neighbours of rows i of two arrays [B, ...]: [2B, ...]."""
    return jnp.stack([first, second], axis=1).reshape(-1, *first.shape[1:])


@jax.custom_vjp
def kl_of_neighbours(logits_BTV: Array) -> Array:
    """KL(p ‖ q) at each position, p a row's prediction and q that of its neighbour, in nats: float32 [B, T].

    The gradient reaches both predictions. It is written by hand: autodiff would keep more arrays of the logits' size.
    """
    return _kl_forward(logits_BTV)[0]


def _kl_forward(logits_BTV: Array) -> tuple[Array, tuple[Array, ...]]:
    logits_f32_BTV = logits_BTV.astype(jnp.float32)
    max_BT1 = logits_f32_BTV.max(-1, keepdims=True)
    max_BT1 = jnp.where(jnp.isfinite(max_BT1), max_BT1, 0.0)
    # As logsumexp of the cross-entropy has them, so that XLA computes them once for both.
    exp_BTV = jnp.exp(logits_f32_BTV - max_BT1)
    sum_BT1 = exp_BTV.sum(-1, keepdims=True)
    logsumexp_BT1 = jnp.log(sum_BT1) + max_BT1
    kl_BT1 = (exp_BTV * _log_ratio(logits_BTV, logsumexp_BT1)).sum(-1, keepdims=True) / sum_BT1
    return kl_BT1[..., 0], (logits_BTV, max_BT1, sum_BT1, logsumexp_BT1, kl_BT1)


def _kl_backward(residuals: tuple[Array, ...], grad_BT: Array) -> tuple[Array]:
    logits_BTV, max_BT1, sum_BT1, logsumexp_BT1, kl_BT1 = residuals
    p_BTV = jnp.exp(logits_BTV.astype(jnp.float32) - max_BT1) / sum_BT1
    own_BTV = p_BTV * (_log_ratio(logits_BTV, logsumexp_BT1) - kl_BT1)
    of_neighbour_BTV = p_BTV - swap_neighbours(p_BTV)
    grad_BTV = grad_BT[..., None] * own_BTV + swap_neighbours(grad_BT)[..., None] * of_neighbour_BTV
    return (grad_BTV.astype(logits_BTV.dtype),)


def _log_ratio(logits_BTV: Array, logsumexp_BT1: Array) -> Array:
    """By how much the log-probabilities exceed those of the neighbour."""
    log_probs_BTV = logits_BTV.astype(jnp.float32) - logsumexp_BT1
    return log_probs_BTV - swap_neighbours(log_probs_BTV)


def swap_neighbours(x_B: Array) -> Array:
    """Swaps rows 2i and 2i + 1."""
    return jnp.flip(x_B.reshape(-1, 2, *x_B.shape[1:]), axis=1).reshape(x_B.shape)


kl_of_neighbours.defvjp(_kl_forward, _kl_backward)
