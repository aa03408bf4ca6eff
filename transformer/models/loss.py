"""Label-smoothed cross-entropy as sums and counts, so that micro-batches and devices add up; KL divergence.

B batch, T target length, V vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from transformer.data.tokenizer import PAD
from transformer.distributed import platform as platforms
from transformer.distributed import sharding


class LossSums(NamedTuple):
    """Sums over target tokens without padding, in nats; float32 scalars.

    Attributes:
      smoothed_nll: label-smoothed cross-entropy.
      nll: plain cross-entropy, whose mean is the log of the perplexity.
      correct: tokens whose logit is the largest.
      tokens: number of tokens.
    """

    smoothed_nll: Array
    nll: Array
    correct: Array
    tokens: Array


def cross_entropy(logits_BTV: Array, target_BT: Array, label_smoothing: float) -> LossSums:
    """Cross-entropy against (1 - ε) · target + ε / V (paper, 5.4), in float32; PAD is ignored."""
    logits_BTV = logits_BTV.astype(jnp.float32)
    is_token_BT = target_BT != PAD
    logsumexp_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    target_logits_BT = target_logits(logits_BTV, target_BT)
    nll_BT = logsumexp_BT - target_logits_BT
    uniform_BT = logsumexp_BT - logits_BTV.mean(-1)
    smoothed_nll_BT = (1.0 - label_smoothing) * nll_BT + label_smoothing * uniform_BT
    correct_BT = (target_logits_BT >= logits_BTV.max(-1)).astype(jnp.float32)

    def total(values_BT: Array) -> Array:
        return jnp.where(is_token_BT, values_BT, 0.0).sum()

    return LossSums(total(smoothed_nll_BT), total(nll_BT), total(correct_BT), is_token_BT.astype(jnp.float32).sum())


@jax.custom_vjp
def kl_of_neighbours(logits_BTV: Array) -> Array:
    """KL(p ‖ q) at each position, p a row's prediction and q that of its neighbour, in nats: float32 [B, T].

    Rows 2i and 2i + 1 are neighbours. The gradient reaches both predictions. It is written by hand: autodiff would keep
    further arrays of the logits' size.
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


def target_log_probs(logits_BTV: Array, target_BT: Array) -> Array:
    """The log-probability of each target token, float32 [B, T]; meaningless at padding."""
    logits_BTV = logits_BTV.astype(jnp.float32)
    return target_logits(logits_BTV, target_BT) - jax.nn.logsumexp(logits_BTV, axis=-1)


def target_logits(logits_BTV: Array, target_BT: Array) -> Array:
    """The logit of each target token, float32 [B, T]."""
    if sharding.num_shards("vocab") == 1 and platforms.gathers_target_logits():
        return jnp.take_along_axis(logits_BTV, target_BT[..., None], axis=-1)[..., 0]
    # A sum whose gradient is a comparison, and which each device takes over its own shard of the vocabulary.
    ids_BTV = jax.lax.broadcasted_iota(jnp.int32, logits_BTV.shape, 2)
    return jnp.where(ids_BTV == target_BT[..., None], logits_BTV, 0.0).sum(-1)
