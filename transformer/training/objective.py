"""The training objective: label-smoothed cross-entropy, alone or with the consistency of two predictions.

`train.consistency` compares what the model predicts for a target token in two passes over its sentence pair:

- rdrop (Liang et al. 2021, "R-Drop: Regularized Dropout for Neural Networks"): passes 1 and 2 have different dropout.
  L = NLL₁ + NLL₂ + α · ½ (KL(p₁ ‖ p₂) + KL(p₂ ‖ p₁)), the sum of both cross-entropies, not their mean.
- simcut (Gao et al. 2022, "Bi-SimCut: A Simple Strategy for Boosting Neural Machine Translation"): pass 2 has the
  embeddings of random tokens but tags set to zero, in the source and in the decoder's input.
  L = NLL₁ + α · KL(p₁ ‖ p₂), and the gradient reaches both passes.

NLL is label-smoothed, KL is of the predictions themselves; both are sums over target tokens. Both passes are one: row i
of a batch becomes two neighbouring rows of one with twice the rows (see `divergence`).

B batch, S source length, T target length, V vocabulary.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from transformer.config import Config, mixture
from transformer.data.batching import Batch
from transformer.data.tokenizer import PAD
from transformer.distributed import sharding
from transformer.models.base import cut_tokens
from transformer.models.loss import cross_entropy
from transformer.models.registry import ModelDef, Params
from transformer.training.divergence import interleave, kl_of_neighbours


class TrainingLoss(NamedTuple):
    """Sums over the target tokens of a batch, each counted once; float32 scalars.

    Attributes:
      objective: what is minimized, L above: label-smoothed cross-entropy, with rdrop of both passes, and weighted
        consistency.
      nll, correct: as in `LossSums`, of whole inputs; with rdrop the mean of both passes.
      tokens: how many there are.
      consistency: KL divergence without its weight, with rdrop the mean of both directions; None without
        `train.consistency`.
    """

    objective: Array
    nll: Array
    correct: Array
    tokens: Array
    consistency: Array | None


Objective = Callable[[Params, Batch, Array], tuple[Array, TrainingLoss]]


def make_objective(model: ModelDef, config: Config, mesh: Mesh) -> Objective:
    """Returns (params, batch, key of dropout and cutoff) → the objective, to be minimized, and the whole loss."""
    packed, label_smoothing = config.data.batching == "pack", config.optimizer.label_smoothing
    weight = config.train.consistency_weight
    num_tags = max((len(mixture.tags_of(entry)) for entry in config.data.mixture), default=0)

    def cross_entropy_only(params: Params, batch: Batch, key: Array) -> TrainingLoss:
        logits_BTV = model.bind(params)(batch.source_BS, batch.target_BT, key, packed)
        sums = cross_entropy(logits_BTV, batch.target_BT, label_smoothing)
        return TrainingLoss(sums.smoothed_nll, sums.nll, sums.correct, sums.tokens, consistency=None)

    def rdrop(params: Params, batch: Batch, key: Array) -> TrainingLoss:
        twice = Batch(*(interleave(ids, ids) for ids in batch))
        logits_2BTV = model.bind(params)(twice.source_BS, twice.target_BT, key, packed)
        both = cross_entropy(logits_2BTV, twice.target_BT, label_smoothing)
        consistency = 0.5 * sum_over_tokens(kl_of_neighbours(logits_2BTV), twice.target_BT)
        objective = both.smoothed_nll + weight * consistency
        return TrainingLoss(objective, 0.5 * both.nll, 0.5 * both.correct, 0.5 * both.tokens, consistency)

    def simcut(params: Params, batch: Batch, key: Array) -> TrainingLoss:
        dropout_key, source_key, target_key = jax.random.split(key, 3)
        rate = config.train.cutoff_rate
        cut_source_BS = cut_tokens(batch.source_BS, rate, source_key, num_tags)
        cut = Batch(cut_source_BS, cut_tokens(batch.target_BT, rate, target_key))
        twice = Batch(*map(interleave, batch, cut))
        module = model.bind(params)
        module.has_cut_tokens = True
        logits_2BTV = module(twice.source_BS, twice.target_BT, dropout_key, packed)
        target_2BT = interleave(batch.target_BT, jnp.full_like(batch.target_BT, PAD))  # none for the rows cut off
        sums = cross_entropy(logits_2BTV, target_2BT, label_smoothing)
        consistency = sum_over_tokens(kl_of_neighbours(logits_2BTV), target_2BT)
        objective = sums.smoothed_nll + weight * consistency
        return TrainingLoss(objective, sums.nll, sums.correct, sums.tokens, consistency)

    loss_of = {"none": cross_entropy_only, "rdrop": rdrop, "simcut": simcut}[config.train.consistency]

    def objective(params: Params, batch: Batch, key: Array) -> tuple[Array, TrainingLoss]:
        with sharding.use_mesh(mesh):
            loss = loss_of(params, batch, key)
        return loss.objective, loss

    return objective


def sum_over_tokens(values_BT: Array, target_BT: Array) -> Array:
    """The sum over positions without padding."""
    return jnp.where(target_BT != PAD, values_BT, 0.0).sum()
