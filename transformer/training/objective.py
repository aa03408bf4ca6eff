"""The training objective: label-smoothed cross-entropy, alone or with the consistency of two predictions.

`train.consistency` compares what the model predicts for a target token in two passes over its sentence pair:

- rdrop (Liang et al. 2021, "R-Drop: Regularized Dropout for Neural Networks"): passes 1 and 2 have different dropout.
  L = NLL₁ + NLL₂ + α · ½ (KL(p₁ ‖ p₂) + KL(p₂ ‖ p₁)), the sum of both cross-entropies, not their mean.
- simcut (Gao et al. 2022, "Bi-SimCut: A Simple Strategy for Boosting Neural Machine Translation"): pass 2 has the
  embeddings of random tokens but tags set to zero, in the source and in the decoder's input.
  L = NLL₁ + α · KL(p₁ ‖ p₂), and the gradient reaches both passes.

NLL is label-smoothed, KL is of the predictions themselves; both are sums over target tokens. Both passes are one: row i
of a batch becomes the neighbouring rows 2i and 2i + 1 of one with twice the rows. A device that holds consecutive rows
then holds both of each pair, and no logits travel.

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
from transformer.models.loss import cross_entropy, kl_of_neighbours
from transformer.models.registry import ModelDef, Params


class TrainingLoss(NamedTuple):
    """Sums over the target tokens of a batch, each counted once; float32 scalars.

    Attributes:
      objective: what is minimized, L above: label-smoothed cross-entropy, with rdrop of both passes, and weighted
        consistency.
      nll, correct: of whole inputs, with rdrop the mean of both passes; as in `LossSums`, field by field.
      tokens: how many there are.
    """

    objective: Array
    nll: Array
    correct: Array
    tokens: Array


class ObjectiveSums(NamedTuple):
    """The loss, and what `train.consistency` adds to it.

    Attributes:
      consistency: KL divergence without its weight, with rdrop the mean of both directions; None without.
    """

    loss: TrainingLoss
    consistency: Array | None = None


Objective = Callable[[Params, Batch, Array], tuple[Array, ObjectiveSums]]


def make_objective(model: ModelDef, config: Config, mesh: Mesh) -> Objective:
    """Returns (params, batch, dropout key) → the objective of `train.consistency`, to be minimized, and its sums."""
    packed, label_smoothing = config.data.batching == "pack", config.optimizer.label_smoothing
    consistency, weight = config.train.consistency, config.train.consistency_weight
    num_tags = max((len(mixture.tags_of(entry)) for entry in config.data.mixture), default=0)

    def cross_entropy_only(params: Params, batch: Batch, key: Array) -> ObjectiveSums:
        logits_BTV = model.bind(params)(batch.source_BS, batch.target_BT, key, packed)
        return ObjectiveSums(TrainingLoss(*cross_entropy(logits_BTV, batch.target_BT, label_smoothing)))

    def rdrop(params: Params, batch: Batch, key: Array) -> ObjectiveSums:
        twice = Batch(*(interleave(ids, ids) for ids in batch))
        logits_2BTV = model.bind(params)(twice.source_BS, twice.target_BT, key, packed)
        both = cross_entropy(logits_2BTV, twice.target_BT, label_smoothing)
        loss = TrainingLoss(both.smoothed_nll, 0.5 * both.nll, 0.5 * both.correct, 0.5 * both.tokens)
        return add_consistency(loss, 0.5 * kl_of_neighbours(logits_2BTV), twice.target_BT)

    def simcut(params: Params, batch: Batch, key: Array) -> ObjectiveSums:
        dropout_key, source_key, target_key = jax.random.split(key, 3)
        rate = config.train.cutoff_rate
        cut_source_BS = cut_tokens(batch.source_BS, rate, source_key, num_tags)
        cut = Batch(cut_source_BS, cut_tokens(batch.target_BT, rate, target_key))
        twice = Batch(*map(interleave, batch, cut))
        module = model.bind(params)
        module.has_cut_tokens = True
        logits_2BTV = module(twice.source_BS, twice.target_BT, dropout_key, packed)
        target_2BT = interleave(batch.target_BT, jnp.full_like(batch.target_BT, PAD))  # none for the rows cut off
        loss = TrainingLoss(*cross_entropy(logits_2BTV, target_2BT, label_smoothing))
        return add_consistency(loss, kl_of_neighbours(logits_2BTV), target_2BT)

    def add_consistency(loss: TrainingLoss, divergence_2BT: Array, target_2BT: Array) -> ObjectiveSums:
        consistency = jnp.where(target_2BT != PAD, divergence_2BT, 0.0).sum()
        return ObjectiveSums(loss._replace(objective=loss.objective + weight * consistency), consistency)

    sums_of = {"none": cross_entropy_only, "rdrop": rdrop, "simcut": simcut}[consistency]

    def objective(params: Params, batch: Batch, key: Array) -> tuple[Array, ObjectiveSums]:
        with sharding.use_mesh(mesh):
            sums = sums_of(params, batch, key)
        return sums.loss.objective, sums

    return objective


def interleave(first: Array, second: Array) -> Array:
    """Two arrays [B, ...] → one [2B, ...], whose rows 2i and 2i + 1 are rows i of both."""
    return jnp.stack([first, second], axis=1).reshape(-1, *first.shape[1:])
