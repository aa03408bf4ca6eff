"""Sampling of translations from a step function: temperature, top-k, top-p.

Each sentence brings its own random key, from which sample n draws its token at position t by folding in n and t alone:
a sample depends on neither neighbours, nor order, nor the number of samples.

Shapes: B sentences, N samples of each, T maximal length in tokens, U = T + 1 lengths from 0, V vocabulary.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from transformer.decoding.base import (
    NEG_INF,
    Hypotheses,
    ResizeCache,
    SpecialIds,
    StepFn,
    is_valid,
    length_penalties,
    while_loop_with_growing_cache,
)
from transformer.decoding.logits_processors import LogitsConstraints, allowed_tokens_mask
from transformer.models.base import Cache


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """Settings of sampling; temperature, top_k and top_p apply in this order.

    Attributes:
      num_samples, max_length: N and T.
      special_ids: token ids.
      temperature: logits are divided by it.
      top_k: only so many of the most probable tokens; 0 keeps all.
      top_p: only the fewest most probable tokens whose probabilities sum to it (Holtzman et al., 2020); 1 keeps all.
      length_penalty, length_penalty_form: of `length_penalties`.
    """

    num_samples: int
    max_length: int
    special_ids: SpecialIds
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    length_penalty: float = 0.0
    length_penalty_form: str = "gnmt"


class _State(NamedTuple):
    """Carry of the loop over positions; `active_BN` samples have neither finished nor reached their limit."""

    position: jax.Array
    cache: Cache
    tokens: jax.Array
    log_probs_BN: jax.Array
    lengths_BN: jax.Array
    active_BN: jax.Array


class _Sampling(NamedTuple):
    """Everything that stays the same while samples are drawn."""

    config: SamplingConfig
    keys_BN: jax.Array
    limits_B: jax.Array
    constraints: LogitsConstraints


def sample(
    step: StepFn,
    cache: Cache,
    max_lengths_B: jax.Array,
    keys_B: jax.Array,
    config: SamplingConfig,
    *,
    resize: ResizeCache | None = None,
    constraints: LogitsConstraints | None = None,
) -> Hypotheses:
    """Draws N samples of each sentence, in the order drawn; to be called inside jit.

    A sample's score is its log-probability under the model, before temperature, top-k and top-p, / length penalty.

    Args:
      step: one step of the model, each sample in its own beam.
      cache: its state before BOS.
      max_lengths_B: int32 [B], the most tokens, EOS counted, of each sentence, at most T; 0 marks padding.
      keys_B: random keys [B].
      resize: enlarges the cache as samples get longer; None: it holds T positions.
      constraints: which tokens are allowed.
    """
    batch_size, num_samples, ids = max_lengths_B.shape[0], config.num_samples, config.special_ids
    samples_N = jnp.arange(num_samples, dtype=jnp.uint32)
    keys_BN = jax.vmap(lambda key: jax.vmap(lambda n: jax.random.fold_in(key, n))(samples_N))(keys_B)
    sampling = _Sampling(config, keys_BN, max_lengths_B, constraints or LogitsConstraints())
    lengths_BN = jnp.zeros((batch_size, num_samples), jnp.int32)
    tokens = jnp.full((batch_size, num_samples, 1 + config.max_length), ids.pad, jnp.int32).at[:, :, 0].set(ids.bos)
    active_BN = jnp.broadcast_to(max_lengths_B[:, None] > 0, lengths_BN.shape)
    final = while_loop_with_growing_cache(
        lambda state: jnp.any(state.active_BN),
        lambda state: _sample_step(step, state, sampling),
        _State(jnp.zeros((), jnp.int32), cache, tokens, jnp.zeros(lengths_BN.shape), lengths_BN, active_BN),
        config.max_length,
        resize,
    )
    penalties_U = length_penalties(config.max_length, config.length_penalty, config.length_penalty_form)
    is_empty_BN = final.lengths_BN == 0
    last_BN1 = jnp.take_along_axis(final.tokens, final.lengths_BN[:, :, None], axis=2)
    return Hypotheses(
        tokens_BNT=jnp.where(is_empty_BN[:, :, None], ids.pad, final.tokens[:, :, 1:]),
        lengths_BN=final.lengths_BN,
        scores_BN=jnp.where(is_empty_BN, NEG_INF, final.log_probs_BN / penalties_U[final.lengths_BN]),
        finished_BN=~is_empty_BN & (last_BN1[:, :, 0] == ids.eos),
    )


def _sample_step(step: StepFn, state: _State, sampling: _Sampling) -> _State:
    """Draws one more token of each active sample."""
    ids, limits_B = sampling.config.special_ids, sampling.limits_B
    last_BN = jax.lax.dynamic_index_in_dim(state.tokens, state.position, axis=2, keepdims=False)
    logits_BNV, cache, *_ = step(state.cache, last_BN, state.position)
    log_probs_BNV = jax.nn.log_softmax(logits_BNV.astype(jnp.float32))
    allowed = allowed_tokens_mask(
        sampling.constraints, state.tokens, state.position, limits_B, logits_BNV.shape[2], ids
    )
    valid_BNV = is_valid(log_probs_BNV) & allowed
    warped_BNV = warp_logits(jnp.where(valid_BNV, log_probs_BNV, -jnp.inf), sampling.config)
    position = state.position + 1
    keys_BN = jax.vmap(jax.vmap(lambda key: jax.random.fold_in(key, position)))(sampling.keys_BN)
    drawn_BN = jax.vmap(jax.vmap(jax.random.categorical))(keys_BN, warped_BNV).astype(jnp.int32)
    drawn_log_probs_BN = jnp.take_along_axis(log_probs_BNV, drawn_BN[:, :, None], axis=2)[:, :, 0]

    # A sample without a valid token is given up: it has length 0.
    dead_BN = state.active_BN & ~jnp.any(valid_BNV, axis=2)
    extended_BN = state.active_BN & ~dead_BN
    tokens = jax.lax.dynamic_update_index_in_dim(
        state.tokens, jnp.where(extended_BN, drawn_BN, ids.pad), position, axis=2
    )
    active_BN = extended_BN & (drawn_BN != ids.eos) & (position < limits_B[:, None])
    lengths_BN = jnp.where(extended_BN, position, jnp.where(dead_BN, 0, state.lengths_BN))
    log_probs_BN = state.log_probs_BN + jnp.where(extended_BN, drawn_log_probs_BN, 0.0)
    return _State(position, cache, tokens, log_probs_BN, lengths_BN, active_BN)


def warp_logits(log_probs_BNV: jax.Array, config: SamplingConfig) -> jax.Array:
    """Applies temperature, top-k and top-p: unnormalized log-probabilities, float32 [B, N, V]; -inf where excluded.

    Tokens that tie with the last one kept are kept too.
    """
    if config.temperature != 1.0:
        log_probs_BNV = log_probs_BNV / config.temperature
    if 0 < config.top_k < log_probs_BNV.shape[2]:
        # A minimum, no slice: see beam_search._select.
        least = jnp.min(jax.lax.top_k(log_probs_BNV, config.top_k)[0], axis=2, keepdims=True)
        log_probs_BNV = jnp.where(log_probs_BNV >= least, log_probs_BNV, -jnp.inf)
    if config.top_p < 1.0:
        probs_BNV = jax.nn.softmax(log_probs_BNV)
        log_probs_BNV = jnp.where(probs_BNV >= top_p_threshold(probs_BNV, config.top_p), log_probs_BNV, -jnp.inf)
    return log_probs_BNV


def top_p_threshold(probs_BNV: jax.Array, top_p: float) -> jax.Array:
    """The probability of the least probable token that top-p keeps, float32 [B, N, 1].

    Bisection over the 31 bits of a positive float, from the highest, without sorting the vocabulary: the integers of
    these bits are ordered as the floats. A bit stays set if the tokens at or above the threshold still sum to top_p.
    """
    bits_BNV = jax.lax.bitcast_convert_type(probs_BNV, jnp.int32)

    def set_bit(index: int, threshold_BN1: jax.Array) -> jax.Array:
        trial_BN1 = threshold_BN1 | jnp.left_shift(jnp.int32(1), 30 - index)
        mass_BN1 = jnp.sum(jnp.where(bits_BNV >= trial_BN1, probs_BNV, 0.0), axis=2, keepdims=True)
        return jnp.where(mass_BN1 >= top_p, trial_BN1, threshold_BN1)

    bits_BN1 = jax.lax.fori_loop(0, 31, set_bit, jnp.zeros((*probs_BNV.shape[:2], 1), jnp.int32))
    return jax.lax.bitcast_convert_type(bits_BN1, jnp.float32)
