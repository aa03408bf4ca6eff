"""Label-smoothed cross-entropy as sums and counts, never a mean: parts of a batch then simply add up.

B batch, T target length, V vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from transformer.tokenizer import PAD

Array = jax.Array


class LossSums(NamedTuple):
    """Sums over real target tokens, in nats; float32 scalars.

    Attributes:
      objective: label-smoothed cross-entropy, what training minimises.
      nll: plain cross-entropy, whose mean is the log of the perplexity.
      correct: tokens whose logit is the largest.
      tokens: how many there are.
    """

    objective: Array
    nll: Array
    correct: Array
    tokens: Array


def cross_entropy(logits_BTV: Array, target_BT: Array, label_smoothing: float) -> LossSums:
    """Cross-entropy against (1 - ε) · target + ε / V (paper, 5.4), in float32; PAD counts nothing."""
    logits_BTV = logits_BTV.astype(jnp.float32)
    is_token_BT = target_BT != PAD
    log_total_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    picked_BT = jnp.take_along_axis(logits_BTV, target_BT[..., None], axis=-1)[..., 0]
    nll_BT = log_total_BT - picked_BT
    uniform_BT = log_total_BT - logits_BTV.mean(-1)
    objective_BT = (1.0 - label_smoothing) * nll_BT + label_smoothing * uniform_BT
    correct_BT = (picked_BT >= logits_BTV.max(-1)).astype(jnp.float32)

    def total(values_BT: Array) -> Array:
        return jnp.where(is_token_BT, values_BT, 0.0).sum()

    return LossSums(total(objective_BT), total(nll_BT), total(correct_BT), is_token_BT.astype(jnp.float32).sum())
