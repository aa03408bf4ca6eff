"""Sampling translations token by token from a step function: temperature, top-k, top-p.

Each sentence brings a random key of its own, from which sample n draws its token at position t by the fold
of n and t alone: neither neighbours, nor order, nor the number of samples change a sample.

Shapes: B sentences, N samples of each, T maximal length in tokens, V vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from transformer.decoding.base import (
    IMPOSSIBLE,
    Grow,
    Hypotheses,
    SpecialIds,
    StepFn,
    is_possible,
    length_penalties,
    run_stages,
)
from transformer.decoding.logits_processors import Restrictions, allowed_next
from transformer.models.base import Cache


class Shape(NamedTuple):
    """Which distribution is drawn from; each takes what those before it left over.

    temperature: logits are divided by it.
    top_k: only so many of the most probable tokens; 0 keeps all.
    top_p: only the fewest most probable tokens that have this share of the probability together
      (Holtzman et al., 2020); 1 keeps all.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


class _State(NamedTuple):
    position: jax.Array
    cache: Cache
    tokens: jax.Array
    log_probs_BN: jax.Array
    lengths_BN: jax.Array
    open_BN: jax.Array


class _Rules(NamedTuple):
    """What stays the same while samples are drawn."""

    keys_BN: jax.Array
    limits_B: jax.Array
    shape: Shape
    ids: SpecialIds
    restrictions: Restrictions


def sample(
    step: StepFn,
    cache: Cache,
    *,
    num_samples: int,
    max_length: int,
    max_lengths_B: jax.Array,
    keys_B: jax.Array,
    shape: Shape,
    length_penalty: float,
    bos_id: int,
    eos_id: int,
    pad_id: int,
    length_penalty_form: str = "gnmt",
    grow: Grow | None = None,
    restrictions: Restrictions | None = None,
) -> Hypotheses:
    """Draws N samples of each sentence, in the order drawn; to be called inside jit.

    A sample's score is what the model gave to it, whatever the shape of the distribution it was drawn from:
    log-probability / length penalty.

    Args:
      step: one step of the model, each sample in a place of its own.
      cache: its state before BOS.
      num_samples, max_length: N and T; static.
      max_lengths_B: int32 [B], the most tokens, EOS counted, of each sentence, at most T; 0 marks padding.
      keys_B: random keys [B].
      bos_id, eos_id, pad_id: token ids.
      length_penalty, length_penalty_form: of `length_penalties`.
      grow: gives the cache more room as samples get longer; None: it has room for T positions.
      restrictions: what samples may say.
    """
    batch_size = max_lengths_B.shape[0]
    samples_N = jnp.arange(num_samples, dtype=jnp.uint32)
    keys_BN = jax.vmap(lambda key: jax.vmap(lambda n: jax.random.fold_in(key, n))(samples_N))(keys_B)
    ids = SpecialIds(pad_id, bos_id, eos_id)
    rules = _Rules(keys_BN, max_lengths_B, shape, ids, restrictions or Restrictions())
    blank_BN = jnp.zeros((batch_size, num_samples), jnp.int32)
    tokens = jnp.full((batch_size, num_samples, 1 + max_length), pad_id, jnp.int32).at[:, :, 0].set(bos_id)
    open_BN = jnp.broadcast_to(max_lengths_B[:, None] > 0, blank_BN.shape)
    start = _State(jnp.zeros((), jnp.int32), cache, tokens, jnp.zeros(blank_BN.shape), blank_BN, open_BN)
    end = run_stages(
        lambda state: jnp.any(state.open_BN), lambda state: _draw(step, state, rules), start, max_length, grow
    )
    penalties = length_penalties(max_length, length_penalty, length_penalty_form)
    is_empty_BN = end.lengths_BN == 0
    last_BN1 = jnp.take_along_axis(end.tokens, end.lengths_BN[:, :, None], axis=2)
    return Hypotheses(
        tokens_BNT=jnp.where(is_empty_BN[:, :, None], pad_id, end.tokens[:, :, 1:]),
        lengths_BN=end.lengths_BN,
        scores_BN=jnp.where(is_empty_BN, IMPOSSIBLE, end.log_probs_BN / penalties[end.lengths_BN]),
        finished_BN=~is_empty_BN & (last_BN1[:, :, 0] == eos_id),
    )


def _draw(step: StepFn, state: _State, rules: _Rules) -> _State:
    """One more token of each sample that has not ended."""
    last_BN = jax.lax.dynamic_index_in_dim(state.tokens, state.position, axis=2, keepdims=False)
    logits_BNV, cache, *_ = step(state.cache, last_BN, state.position)
    log_probs_BNV = jax.nn.log_softmax(logits_BNV.astype(jnp.float32))
    allowed = allowed_next(
        rules.restrictions, state.tokens, state.position, rules.limits_B, logits_BNV.shape[2], rules.ids
    )
    possible_BNV = is_possible(log_probs_BNV) & allowed
    shaped_BNV = reshaped(jnp.where(possible_BNV, log_probs_BNV, -jnp.inf), rules.shape)
    position = state.position + 1
    keys_BN = jax.vmap(jax.vmap(lambda key: jax.random.fold_in(key, position)))(rules.keys_BN)
    drawn_BN = jax.vmap(jax.vmap(jax.random.categorical))(keys_BN, shaped_BNV).astype(jnp.int32)
    gained_BN = jnp.take_along_axis(log_probs_BNV, drawn_BN[:, :, None], axis=2)[:, :, 0]

    # A sample for which no token is possible is given up: it has length 0.
    dead_BN = state.open_BN & ~jnp.any(possible_BNV, axis=2)
    extended_BN = state.open_BN & ~dead_BN
    tokens = jax.lax.dynamic_update_index_in_dim(
        state.tokens, jnp.where(extended_BN, drawn_BN, rules.ids.pad), position, axis=2
    )
    goes_on_BN = extended_BN & (drawn_BN != rules.ids.eos) & (position < rules.limits_B[:, None])
    lengths_BN = jnp.where(extended_BN, position, jnp.where(dead_BN, 0, state.lengths_BN))
    log_probs_BN = state.log_probs_BN + jnp.where(extended_BN, gained_BN, 0.0)
    return _State(position, cache, tokens, log_probs_BN, lengths_BN, goes_on_BN)


def reshaped(log_probs_BNV: jax.Array, shape: Shape) -> jax.Array:
    """The unnormalised log-probabilities to draw from, float32 [B, N, V]; -inf for what is left out.

    Tokens as probable as the last one kept are kept too.
    """
    if shape.temperature != 1.0:
        log_probs_BNV = log_probs_BNV / shape.temperature
    if 0 < shape.top_k < log_probs_BNV.shape[2]:
        # A minimum, no slice: see search._select.
        least = jnp.min(jax.lax.top_k(log_probs_BNV, shape.top_k)[0], axis=2, keepdims=True)
        log_probs_BNV = jnp.where(log_probs_BNV >= least, log_probs_BNV, -jnp.inf)
    if shape.top_p < 1.0:
        probs_BNV = jax.nn.softmax(log_probs_BNV)
        log_probs_BNV = jnp.where(probs_BNV >= nucleus(probs_BNV, shape.top_p), log_probs_BNV, -jnp.inf)
    return log_probs_BNV


def nucleus(probs_BNV: jax.Array, top_p: float) -> jax.Array:
    """The probability of the least probable token that top-p keeps, float32 [B, N, 1].

    Found by halving, bit by bit, without sorting the vocabulary: the bits of positive floats rise as they do.
    """
    bits_BNV = jax.lax.bitcast_convert_type(probs_BNV, jnp.int32)

    def set_bit(index: int, found_BN1: jax.Array) -> jax.Array:
        tried_BN1 = found_BN1 | jnp.left_shift(jnp.int32(1), 30 - index)
        mass_BN1 = jnp.sum(jnp.where(bits_BNV >= tried_BN1, probs_BNV, 0.0), axis=2, keepdims=True)
        return jnp.where(mass_BN1 >= top_p, tried_BN1, found_BN1)

    bits_BN1 = jax.lax.fori_loop(0, 31, set_bit, jnp.zeros((*probs_BNV.shape[:2], 1), jnp.int32))
    return jax.lax.bitcast_convert_type(bits_BN1, jnp.float32)
