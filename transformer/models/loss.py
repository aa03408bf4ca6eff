"""Label-smoothed cross-entropy as sums and counts, so that micro-batches and devices add up.

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
