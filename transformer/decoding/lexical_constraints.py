"""Lexically constrained beam search: progress with each phrase, and dynamic beam allocation.

Dynamic beam allocation (Post and Vilar, 2018) in the vectorized form of Hu et al. (2019). Hypotheses are grouped into
banks by the number of phrase tokens that they hold. Candidates are the best continuations and, of each hypothesis, the
continuations of its phrases, its best one, and EOS. The beam takes the best candidate of each bank, fullest bank first,
then the second best of each, and so on. So at each step one hypothesis gains a phrase token, and phrases that fit into
the limit are met, however narrow the beam.

Two differences from the papers. A phrase is met once it stands in the hypothesis, however it got there, so phrases may
overlap: progress follows Knuth, Morris and Pratt instead of a reset at each wrong token. And the likeliest candidate
stays, whatever its bank: with more banks than beams, phrases would otherwise begin at once, and not in their position.

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
    failure_table_BKML: bool [B, K, L + 1, L]; at [m, l] whether the first l tokens equal the last l of the first m, so
      that a hypothesis with m tokens of the phrase also has l. For the phrase 3 4 3 5, row m = 3 (3 4 3) is true at
      l = 0, 1 and 3: after 3 4 3 the next token 4 continues the 3, and not nothing.
    """

    tokens_BKL: jax.Array
    lengths_BK: jax.Array
    failure_table_BKML: jax.Array


def compile_phrases(tokens_BKL: jax.Array, pad_id: int) -> PhraseConstraints:
    """Computes the failure tables of phrases; `tokens_BKL` is int32 with PAD after each phrase."""
    max_length = tokens_BKL.shape[2]
    lengths_BK = jnp.sum(tokens_BKL != pad_id, axis=2, dtype=jnp.int32)
    start, offset = np.arange(max_length)[:, None], np.arange(max_length)[None, :]
    shifted_BKLL = tokens_BKL[:, :, np.minimum(start + offset, max_length - 1)]
    # prefix_at[d, l]: the first l tokens occur at index d; a column for l = 0, which occurs everywhere.
    prefix_at_BKLL = jnp.cumprod(shifted_BKLL == tokens_BKL[:, :, None, :], axis=3, dtype=jnp.int32) > 0
    prefix_at_BKLM = jnp.pad(prefix_at_BKLL, ((0, 0), (0, 0), (0, 1), (1, 0)), constant_values=True)
    m, l = np.arange(max_length + 1)[:, None], np.arange(max_length)[None, :]
    failure_table_BKML = prefix_at_BKLM[:, :, np.maximum(m - l, 0), l] & (l <= m)[None, None]
    return PhraseConstraints(tokens_BKL, lengths_BK, failure_table_BKML)


def init_progress(phrases: PhraseConstraints, beam_size: int) -> jax.Array:
    """No progress with any phrase: int32 zeros [B, N, K]."""
    batch_size, num_phrases = phrases.lengths_BK.shape
    return jnp.zeros((batch_size, beam_size, num_phrases), jnp.int32)


def update_progress(phrases: PhraseConstraints, progress_BCK: jax.Array, tokens_BC: jax.Array) -> jax.Array:
    """Number of first tokens of each phrase that end a hypothesis after a new token; a phrase once met stays met."""
    max_length = phrases.tokens_BKL.shape[2]
    rows_BKC1 = jnp.swapaxes(progress_BCK, 1, 2)[..., None]
    prefixes_BKCL = jnp.take_along_axis(phrases.failure_table_BKML, rows_BKC1, axis=2, mode="promise_in_bounds")
    extends_BKCL = prefixes_BKCL & (phrases.tokens_BKL[:, :, None, :] == tokens_BC[:, None, :, None])
    extends_BKCL &= np.arange(max_length)[None, None, None, :] < phrases.lengths_BK[:, :, None, None]
    new_lengths = np.arange(1, max_length + 1, dtype=np.int32)[None, None, None, :]
    new_progress_BCK = jnp.swapaxes(jnp.max(jnp.where(extends_BKCL, new_lengths, 0), axis=3), 1, 2)
    lengths_B1K = phrases.lengths_BK[:, None, :]
    return jnp.where(progress_BCK == lengths_B1K, lengths_B1K, new_progress_BCK)


def all_satisfied(phrases: PhraseConstraints, progress_BCK: jax.Array) -> jax.Array:
    """Whether each hypothesis holds all its phrases; bool [B, C]."""
    return jnp.all(progress_BCK == phrases.lengths_BK[:, None, :], axis=2)


def num_satisfied_tokens(phrases: PhraseConstraints, progress_BCK: jax.Array) -> jax.Array:
    """Phrase tokens of each hypothesis: those of phrases met, and of the longest one in progress; int32 [B, C].

    Only one phrase can be continued, so two in progress must not count more than one.
    """
    lengths_B1K = phrases.lengths_BK[:, None, :]
    is_met_BCK = progress_BCK == lengths_B1K
    in_progress_BC = jnp.max(jnp.where(is_met_BCK, 0, progress_BCK), axis=2)
    return jnp.sum(jnp.where(is_met_BCK, lengths_B1K, 0), axis=2) + in_progress_BC


def add_candidates(
    phrases: PhraseConstraints,
    progress_BNK: jax.Array,
    log_probs_BNV: jax.Array,
    log_probs_BC: jax.Array,
    indices_BC: jax.Array,
    eos_id: int,
) -> tuple[jax.Array, jax.Array]:
    """Adds to the best continuations, of each hypothesis, the next token of each phrase, the best token, and EOS.

    Args:
      log_probs_BC, indices_BC: of the best continuations; indices are into N * V.

    Returns:
      The same of all candidates, more of them; a duplicate has log-probability NEG_INF.
    """
    batch_size, beam_size, vocab_size = log_probs_BNV.shape
    max_length = phrases.tokens_BKL.shape[2]
    at_BKN = jnp.minimum(jnp.swapaxes(progress_BNK, 1, 2), max_length - 1)
    next_BKN = jnp.take_along_axis(phrases.tokens_BKL, at_BKN, axis=2, mode="promise_in_bounds")
    next_BNK = jnp.where(progress_BNK < phrases.lengths_BK[:, None, :], jnp.swapaxes(next_BKN, 1, 2), eos_id)
    best_BN1 = jnp.argmax(log_probs_BNV, axis=2, keepdims=True).astype(jnp.int32)
    tokens_BNM = jnp.concatenate([next_BNK, best_BN1, jnp.full_like(best_BN1, eos_id)], axis=2)
    offset_N = jnp.arange(beam_size, dtype=jnp.int32) * jnp.int32(vocab_size)
    added_BM = (offset_N[None, :, None] + tokens_BNM).reshape(batch_size, -1)
    indices_BC = concat_beams(indices_BC, added_BM)
    log_probs_BC = concat_beams(log_probs_BC, gather_beams(log_probs_BNV.reshape(batch_size, -1), added_BM))
    is_earlier = np.tri(indices_BC.shape[1], k=-1, dtype=bool)
    is_duplicate_BC = jnp.any((indices_BC[:, :, None] == indices_BC[:, None, :]) & is_earlier[None], axis=2)
    return jnp.where(is_duplicate_BC, NEG_INF, log_probs_BC), indices_BC


def dynamic_beam_allocation(
    phrases: PhraseConstraints,
    progress_BCK: jax.Array,
    log_probs_BC: jax.Array,
    beam_size: int,
) -> tuple[jax.Array, jax.Array]:
    """Selects the candidates that stay alive: their log-probabilities and indices, both [B, N], best first.

    Candidates are ordered by four keys: valid before invalid; the likeliest of all first, whatever its bank; by rank
    within their bank; fullest bank first. One integer encodes them, the smallest first. Of 4 candidates and 10 banks:

        log-probability  -1   -2   -3   NEG_INF
        bank              0    2    2    1
        rank in bank      0    0    1    0
        rank * 10 - bank  0   -2    8   -1
        priority        -10   -2    8   -1 + 4 * 10 = 39    the likeliest gets -10, less than any other

    Args:
      progress_BCK: of the candidates themselves.
      log_probs_BC: of the candidates; NEG_INF for finished ones.
    """
    bank_BC = num_satisfied_tokens(phrases, progress_BCK)
    num_candidates = log_probs_BC.shape[1]
    num_banks = phrases.tokens_BKL.shape[1] * phrases.tokens_BKL.shape[2] + 1
    is_ahead_BCC = log_probs_BC[:, None, :] > log_probs_BC[:, :, None]
    is_tie_BCC = log_probs_BC[:, None, :] == log_probs_BC[:, :, None]
    is_ahead_BCC |= is_tie_BCC & np.tri(num_candidates, k=-1, dtype=bool)[None]
    same_bank_BCC = bank_BC[:, :, None] == bank_BC[:, None, :]
    rank_BC = jnp.sum(is_ahead_BCC & same_bank_BCC, axis=2, dtype=jnp.int32)
    priority_BC = rank_BC * num_banks - bank_BC
    if beam_size > 1:  # a beam of one would never gain a phrase token
        is_best_BC = jnp.argmax(log_probs_BC, axis=1, keepdims=True) == np.arange(num_candidates)[None, :]
        priority_BC = jnp.where(is_best_BC, -num_banks, priority_BC)
    priority_BC += jnp.where(is_valid(log_probs_BC), 0, num_candidates * num_banks)
    _, selected_BN = jax.lax.top_k(-priority_BC, beam_size)
    log_probs_BN, order_BN = jax.lax.top_k(gather_beams(log_probs_BC, selected_BN), beam_size)
    return log_probs_BN, gather_beams(selected_BN, order_BN)
