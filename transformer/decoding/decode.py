"""Decodes a batch of sources on the device, by the method of the config, with one model or an ensemble.

An ensemble averages the probabilities that its models give to the next token, as fairseq and Sockeye do: the mean is a
distribution again, so that scores remain log-probabilities; a mean of logarithms is not one.

B rows, S source length, N hypotheses, T longest translation, V vocabulary, P longest prefix, K phrases of a
sentence, L longest phrase.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from transformer.config import DecodeConfig
from transformer.config.schema import MAX_INT
from transformer.data.tokenizer import BOS, EOS, PAD
from transformer.decoding.base import CoveragePenalty, Hypotheses, SpecialIds, StepFn, cache_lengths
from transformer.decoding.beam_search import SearchConfig, beam_search
from transformer.decoding.logits_processors import LogitsConstraints
from transformer.decoding.sampling import SamplingConfig, sample
from transformer.distributed import platform, sharding
from transformer.models.base import Cache
from transformer.models.registry import ModelDef, Params

SPECIAL_IDS = SpecialIds(PAD, BOS, EOS)
MIN_SEPARATE_SAMPLES = 12  # samples of a sentence; fewer attend sooner with a mask over the cache of all


class DecodeInputs(NamedTuple):
    """The rows of one batch; a row of PAD alone is padding.

    source_BS: int32 ids with EOS, PAD after.
    keys_B2: uint32, the data of each sentence's random key, where the method samples.
    prefix_BP: int32, forced prefixes of translations, PAD after.
    phrases_BKL: int32, phrases that translations must hold, PAD after each.
    """

    source_BS: Any
    keys_B2: Any = None
    prefix_BP: Any = None
    phrases_BKL: Any = None


def batch_rows(config: DecodeConfig, mesh: Mesh, most: int = MAX_INT) -> int:
    """Rows of every batch: `decode.batch_rows`, or by platform where that is 0, padded to divide over the devices.

    Args:
      most: rows that fit in memory, before padding; at least one is taken.
    """
    rows = min(config.batch_rows or platform.decode_rows(mesh), max(most, 1))
    return sharding.padded_batch_size(mesh, rows, rows="decode_batch")


def decode(
    models: Sequence[ModelDef], config: DecodeConfig, count: int, params: Sequence[Params], inputs: DecodeInputs
) -> Hypotheses:
    """Returns `count` hypotheses of each row, T = S + max_extra_length; padding rows are PAD alone.

    Beam search returns its best and needs a beam of at least as many; other methods return samples in the order drawn.
    """
    max_length = inputs.source_BS.shape[1] + config.max_extra_length
    lengths_B = (inputs.source_BS != PAD).sum(-1, dtype=jnp.int32)
    limits_B = jnp.where(lengths_B > 0, lengths_B + jnp.int32(config.max_extra_length), 0)
    coverage = CoveragePenalty(config.coverage_penalty, inputs.source_BS != PAD) if config.coverage_penalty else None
    beams = config.beam_size if config.method == "beam" else count
    step, caches = init_step_fn(
        models,
        params,
        inputs.source_BS,
        beams,
        max_length,
        coverage is not None,
        cache_lengths(max_length)[0],
        attends_across_beams=config.method == "beam" or count < MIN_SEPARATE_SAMPLES,
    )
    constraints = LogitsConstraints(config.min_length, config.no_repeat_ngram, inputs.prefix_BP)
    if config.method == "beam":
        search_config = SearchConfig(
            beam_size=beams,
            max_length=max_length,
            special_ids=SPECIAL_IDS,
            num_return=count,
            length_penalty=config.length_penalty,
            length_penalty_form=config.length_penalty_form,
            early_stopping=config.early_stopping,
        )
        hypotheses = beam_search(
            step,
            caches,
            limits_B,
            search_config,
            reorder=lambda caches, parents_BN: tuple(cache.reorder(parents_BN) for cache in caches),
            resize=resize_caches,
            constraints=constraints,
            coverage=coverage,
            phrases_BKL=inputs.phrases_BKL,
        )
    else:
        keys_B = jax.random.wrap_key_data(inputs.keys_B2, impl="threefry2x32")
        sampling_config = SamplingConfig(
            num_samples=count,
            max_length=max_length,
            special_ids=SPECIAL_IDS,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            length_penalty=config.length_penalty,
            length_penalty_form=config.length_penalty_form,
        )
        hypotheses = sample(
            step, caches, limits_B, keys_B, sampling_config, resize=resize_caches, constraints=constraints
        )
    return jax.tree.map(lambda leaf: leaf[:, :count], hypotheses)


def init_step_fn(
    models: Sequence[ModelDef],
    params: Sequence[Params],
    source_BS: jax.Array,
    beams: int,
    max_length: int,
    return_attention: bool,
    cache_length: int,
    attends_across_beams: bool,
) -> tuple[StepFn, tuple[Cache, ...]]:
    """Encodes the source; returns the step function of the ensemble and the caches of its models.

    Args:
      return_attention: the step function also returns the mean attention of the models.
      cache_length: initial length of the caches.
      attends_across_beams: as of `Seq2SeqModel`; true where hypotheses move between beams.
    """
    modules = [model.bind(model.in_compute_dtype(leaves)) for model, leaves in zip(models, params, strict=True)]
    for module in modules:
        module.attends_across_beams = attends_across_beams
    sources, caches = zip(
        *(module.init_decode(source_BS, beams, max_length, cache_length) for module in modules), strict=True
    )

    def step(caches: tuple[Cache, ...], last_BN: jax.Array, position: jax.Array) -> tuple[Any, ...]:
        results = [
            module.decode_step(source, cache, last_BN, position, return_attention)
            for module, source, cache in zip(modules, sources, caches, strict=True)
        ]
        logits, caches, attention = zip(*results, strict=True)
        if not return_attention:
            return ensemble_log_probs(logits), caches
        return ensemble_log_probs(logits), caches, sum(attention) / len(models)

    return step, caches


def ensemble_log_probs(logits: Sequence[jax.Array]) -> jax.Array:
    """Log of the mean probability of several logits [..., V]; logits of a single model stay as they are."""
    if len(logits) == 1:
        return logits[0]
    log_probs = jnp.stack([jax.nn.log_softmax(member.astype(jnp.float32)) for member in logits])
    return jax.nn.logsumexp(log_probs, axis=0) - math.log(len(logits))


def resize_caches(caches: tuple[Cache, ...], cache_length: int) -> tuple[Cache, ...]:
    """Pads all caches to hold this many positions."""
    return tuple(cache.resize(cache_length) for cache in caches)
