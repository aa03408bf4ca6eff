"""Phrases that a translation must hold: which of them a hypothesis has met, and how the beam is shared out.

Dynamic beam allocation (Post and Vilar, 2018) in the vectorised form of Hu et al. (2019). Hypotheses are
put into banks by how many tokens of their phrases they have placed. Besides the best continuations there are, for
each hypothesis, those that go on with a phrase, its best one, and the end. The beam takes from the banks
in turn: the best of each bank, fullest bank first, then the second best of each. So at each step one hypothesis
places one more token, and phrases that fit into the limit are met, however narrow the beam.

Two things differ from the papers. A phrase is met once it stands in the hypothesis, however it got there, so
phrases may overlap: progress follows Knuth, Morris and Pratt, not a reset at each wrong token. And the likeliest
candidate stays, whatever its bank: with more banks than beams, phrases would else be begun at once, and not in
their place.

Shapes: B sentences, N beams, C candidates, K phrases of a sentence, L longest phrase in tokens, V vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from transformer.decoding.base import NEG_INF, concat_beams, is_valid
from transformer.models.base import gather_beams


class PhraseConstraints(NamedTuple):
    """The phrases of each sentence.

    tokens_BKL: int32, PAD after.
    lengths_BK: int32; 0 where there is no phrase.
    failure_table_BKML: bool [B, K, L + 1, L]; at [m, l]: the first l tokens are the last l of the first m.
    """

    tokens_BKL: jax.Array
    lengths_BK: jax.Array
    failure_table_BKML: jax.Array


def compile_phrases(tokens_BKL: jax.Array, pad_id: int) -> PhraseConstraints:
    """Makes ready what following the phrases needs; `tokens_BKL` is int32 with PAD after each phrase."""
    longest = tokens_BKL.shape[2]
    lengths_BK = jnp.sum(tokens_BKL != pad_id, axis=2, dtype=jnp.int32)
    start, place = np.arange(longest)[:, None], np.arange(longest)[None, :]
    shifted_BKLL = tokens_BKL[:, :, np.minimum(start + place, longest - 1)]
    # same[d, l]: the first l tokens are those that start at d; one more column, for none of them.
    same_BKLL = jnp.cumprod(shifted_BKLL == tokens_BKL[:, :, None, :], axis=3, dtype=jnp.int32) > 0
    same_BKLM = jnp.pad(same_BKLL, ((0, 0), (0, 0), (0, 1), (1, 0)), constant_values=True)
    met, border = np.arange(longest + 1)[:, None], np.arange(longest)[None, :]
    failure_table_BKML = same_BKLM[:, :, np.maximum(met - border, 0), border] & (border <= met)[None, None]
    return PhraseConstraints(tokens_BKL, lengths_BK, failure_table_BKML)


def init_progress(these: PhraseConstraints, beam_size: int) -> jax.Array:
    """No progress with any phrase: int32 zeros [B, N, K]."""
    batch_size, count = these.lengths_BK.shape
    return jnp.zeros((batch_size, beam_size, count), jnp.int32)


def update_progress(these: PhraseConstraints, progress_BCK: jax.Array, tokens_BC: jax.Array) -> jax.Array:
    """How many first tokens of each phrase end a hypothesis that gained a token; a phrase once met stays met."""
    longest = these.tokens_BKL.shape[2]
    indices_BKC1 = jnp.swapaxes(progress_BCK, 1, 2)[..., None]
    failure_table_BKCL = jnp.take_along_axis(these.failure_table_BKML, indices_BKC1, axis=2, mode="promise_in_bounds")
    fits_BKCL = failure_table_BKCL & (these.tokens_BKL[:, :, None, :] == tokens_BC[:, None, :, None])
    fits_BKCL &= np.arange(longest)[None, None, None, :] < these.lengths_BK[:, :, None, None]
    steps = np.arange(1, longest + 1, dtype=np.int32)[None, None, None, :]
    reached_BCK = jnp.swapaxes(jnp.max(jnp.where(fits_BKCL, steps, 0), axis=3), 1, 2)
    lengths_B1K = these.lengths_BK[:, None, :]
    return jnp.where(progress_BCK == lengths_B1K, lengths_B1K, reached_BCK)


def all_satisfied(these: PhraseConstraints, progress_BCK: jax.Array) -> jax.Array:
    """Whether each hypothesis holds all its phrases; bool [B, C]."""
    return jnp.all(progress_BCK == these.lengths_BK[:, None, :], axis=2)


def num_satisfied_tokens(these: PhraseConstraints, progress_BCK: jax.Array) -> jax.Array:
    """How many tokens of its phrases each hypothesis has: those met, and the one under way furthest; int32 [B, C].

    Only one can be gone on with: two under way at once must not count more than one does.
    """
    lengths_B1K = these.lengths_BK[:, None, :]
    met_BCK = progress_BCK == lengths_B1K
    under_way_BC = jnp.max(jnp.where(met_BCK, 0, progress_BCK), axis=2)
    return jnp.sum(jnp.where(met_BCK, lengths_B1K, 0), axis=2) + under_way_BC


def add_candidates(
    these: PhraseConstraints,
    progress_BNK: jax.Array,
    log_probs_BNV: jax.Array,
    best_BC: jax.Array,
    flat_BC: jax.Array,
    eos_id: int,
) -> tuple[jax.Array, jax.Array]:
    """The best continuations, and of each hypothesis those that its phrases call for.

    Args:
      best_BC, flat_BC: log-probabilities of the best continuations, and their places in N * V.

    Returns:
      The same of all candidates, more of them; one that occurs twice is impossible the second time.
    """
    batch_size, beam_size, vocab_size = log_probs_BNV.shape
    longest = these.tokens_BKL.shape[2]
    at_BKN = jnp.minimum(jnp.swapaxes(progress_BNK, 1, 2), longest - 1)
    next_BKN = jnp.take_along_axis(these.tokens_BKL, at_BKN, axis=2, mode="promise_in_bounds")
    next_BNK = jnp.where(progress_BNK < these.lengths_BK[:, None, :], jnp.swapaxes(next_BKN, 1, 2), eos_id)
    likely_BN1 = jnp.argmax(log_probs_BNV, axis=2, keepdims=True).astype(jnp.int32)
    tokens_BNM = jnp.concatenate([next_BNK, likely_BN1, jnp.full_like(likely_BN1, eos_id)], axis=2)
    first_N = jnp.arange(beam_size, dtype=jnp.int32) * jnp.int32(vocab_size)
    more_BM = (first_N[None, :, None] + tokens_BNM).reshape(batch_size, -1)
    flat_BC = concat_beams(flat_BC, more_BM)
    log_probs_BC = concat_beams(best_BC, gather_beams(log_probs_BNV.reshape(batch_size, -1), more_BM))
    before = np.tri(flat_BC.shape[1], k=-1, dtype=bool)
    is_again_BC = jnp.any((flat_BC[:, :, None] == flat_BC[:, None, :]) & before[None], axis=2)
    return jnp.where(is_again_BC, NEG_INF, log_probs_BC), flat_BC


def dynamic_beam_allocation(
    these: PhraseConstraints,
    progress_BCK: jax.Array,
    log_probs_BC: jax.Array,
    beam_size: int,
) -> tuple[jax.Array, jax.Array]:
    """Which candidates go on: their log-probabilities and places, both [B, N], best first.

    Args:
      progress_BCK: of the candidates themselves.
      log_probs_BC: of the candidates; IMPOSSIBLE for what has ended.
    """
    bank_BC = num_satisfied_tokens(these, progress_BCK)
    count = log_probs_BC.shape[1]
    ahead_BCC = log_probs_BC[:, None, :] > log_probs_BC[:, :, None]
    ahead_BCC |= (log_probs_BC[:, None, :] == log_probs_BC[:, :, None]) & np.tri(count, k=-1, dtype=bool)[None]
    rank_BC = jnp.sum(ahead_BCC & (bank_BC[:, :, None] == bank_BC[:, None, :]), axis=2, dtype=jnp.int32)
    banks = these.tokens_BKL.shape[1] * these.tokens_BKL.shape[2] + 1
    turn_BC = rank_BC * banks - bank_BC
    if beam_size > 1:  # a beam of one would never place a phrase
        is_best_BC = jnp.argmax(log_probs_BC, axis=1, keepdims=True) == np.arange(count)[None, :]
        turn_BC = jnp.where(is_best_BC, -banks, turn_BC)
    turn_BC += jnp.where(is_valid(log_probs_BC), 0, count * banks)
    _, kept_BN = jax.lax.top_k(-turn_BC, beam_size)
    log_probs_BN, order_BN = jax.lax.top_k(gather_beams(log_probs_BC, kept_BN), beam_size)
    return log_probs_BN, gather_beams(kept_BN, order_BN)
