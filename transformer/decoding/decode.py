"""A batch of sources → hypotheses, on the device: the method that the config names, over one model or several.

An ensemble averages the probabilities that its models give to the next token, as fairseq and Sockeye do: the
mean is a distribution again, so that scores remain log-probabilities; a mean of logarithms is not one.

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
from transformer.data.tokenizer import BOS, EOS, PAD
from transformer.decoding.base import Coverage, Hypotheses, StepFn, rooms
from transformer.decoding.beam_search import beam_search
from transformer.decoding.logits_processors import Restrictions
from transformer.decoding.sampling import Shape, sample
from transformer.distributed import sharding
from transformer.models.base import Cache
from transformer.models.registry import Model, Params


class Request(NamedTuple):
    """The rows of one batch; a row of nothing but PAD is no sentence.

    source_BS: int32 ids with EOS, PAD after.
    keys_B2: uint32, the data of each sentence's random key, where the method draws.
    prefix_BP: int32, what translations begin with, PAD after.
    phrases_BKL: int32, what they hold, PAD after each phrase.
    """

    source_BS: Any
    keys_B2: Any = None
    prefix_BP: Any = None
    phrases_BKL: Any = None


def batch_rows(config: DecodeConfig, mesh: Mesh) -> int:
    """Rows of every batch: `decode.batch_rows`, where that is 0 by platform, filled up to divide over the devices.

    An accelerator decodes 256 sentences in about the time of 16; on a CPU they would wait for the slowest of them.
    """
    rows = config.batch_rows or (16 if mesh.devices.flat[0].platform == "cpu" else 256)
    return sharding.padded_batch_size(mesh, rows, rows="decode_batch")


def decode(
    models: Sequence[Model], config: DecodeConfig, count: int, params: Sequence[Params], request: Request
) -> Hypotheses:
    """`count` hypotheses of each row, T = S + max_extra_length; nothing but PAD for padding.

    Beam search gives its best, and needs a beam of as many; other methods give samples in the order drawn.
    """
    batch_size, width = request.source_BS.shape
    longest = width + config.max_extra_length
    lengths_B = (request.source_BS != PAD).sum(-1, dtype=jnp.int32)
    limits_B = jnp.where(lengths_B > 0, lengths_B + jnp.int32(config.max_extra_length), 0)
    coverage = None
    if config.coverage_penalty:
        coverage = Coverage(config.coverage_penalty, request.source_BS != PAD)
    beams = config.beam_size if config.method == "beam" else count
    step, caches = start(models, params, request.source_BS, beams, longest, coverage is not None, rooms(longest)[0])
    restrictions = Restrictions(config.min_length, config.no_repeat_ngram, request.prefix_BP)
    shared: dict[str, Any] = {
        "max_length": longest,
        "max_lengths_B": limits_B,
        "length_penalty": config.length_penalty,
        "length_penalty_form": config.length_penalty_form,
        "restrictions": restrictions,
        "grow": grow_all,
        "bos_id": BOS,
        "eos_id": EOS,
        "pad_id": PAD,
    }
    if config.method == "beam":
        found = beam_search(
            step,
            caches,
            batch_size=batch_size,
            beam_size=beams,
            count=count,
            reorder=reorder_all,
            coverage=coverage,
            early_stopping=config.early_stopping,
            phrases_BKL=request.phrases_BKL,
            **shared,
        )
    else:
        keys_B = jax.random.wrap_key_data(request.keys_B2, impl="threefry2x32")
        shape = Shape(config.temperature, config.top_k, config.top_p)
        found = sample(step, caches, num_samples=count, keys_B=keys_B, shape=shape, **shared)
    return jax.tree.map(lambda leaf: leaf[:, :count], found)


def start(
    models: Sequence[Model],
    params: Sequence[Params],
    source_BS: jax.Array,
    beams: int,
    max_length: int,
    attending: bool,
    room: int | None = None,
) -> tuple[StepFn, tuple[Cache, ...]]:
    """The step function of all models together, and their caches; if `attending` it returns the mean attention too.

    Args:
      room: places that a cache has before it grows; None: max_length.
    """
    modules = [model.bind(model.in_compute_dtype(own)) for model, own in zip(models, params, strict=True)]
    memories, caches = zip(*(module.start(source_BS, beams, max_length, room) for module in modules), strict=True)

    def step(caches: tuple[Cache, ...], last_BN: jax.Array, position: jax.Array) -> tuple[Any, ...]:
        results: list[tuple[Any, ...]] = []
        for module, memory, cache in zip(modules, memories, caches, strict=True):
            one_step = module.step_attending if attending else module.step
            results.append(one_step(memory, cache, last_BN, position))
        logits, caches, *attention = zip(*results, strict=True)
        return mean_probability(logits), caches, *(sum(weights) / len(models) for weights in attention)

    return step, caches


def mean_probability(logits: Sequence[jax.Array]) -> jax.Array:
    """Log of the mean of the probabilities that several logits [..., V] stand for; a single one stays as it is."""
    if len(logits) == 1:
        return logits[0]
    stacked = jnp.stack([jax.nn.log_softmax(one.astype(jnp.float32)) for one in logits])
    return jax.nn.logsumexp(stacked, axis=0) - math.log(len(logits))


def reorder_all(caches: tuple[Cache, ...], parents_BN: jax.Array) -> tuple[Cache, ...]:
    """As the family of each model moves its cache."""
    return tuple(cache.reorder(parents_BN) for cache in caches)


def grow_all(caches: tuple[Cache, ...], max_length: int) -> tuple[Cache, ...]:
    """As the family of each model gives its cache more room."""
    return tuple(cache.grow(max_length) for cache in caches)
