"""Beam search, with greedy search as a beam of one, over a step function; independent of the model.

Shapes: B sentences, N beams, C candidates, T maximal length, U = T + 1 lengths from 0, V vocabulary, S source length,
K phrases of L tokens.

How hypotheses finish, and how they rank:
- Of the 2N - 1 best continuations of a sentence those with EOS finish, and the N best others stay alive. Each
  hypothesis has one EOS continuation, so N - 1 others exist even if all N finish at once. A beam of one has one
  candidate: it is the argmax roll-out, whatever the length penalty.
- A sentence is done when it reaches its own limit, or when no alive hypothesis could still beat the worst of its
  `num_return` best finished ones. After that it does not change, whatever the other sentences do.
- With `early_stopping` it is also done once N hypotheses have finished, each with an EOS among the N best
  continuations, as in fairseq and CTranslate2: sooner, with shorter translations. With phrases the EOS may rank lower.
- A hypothesis truncated by the limit is returned without EOS, as not finished. Finished ones come first, by score;
  truncated ones fill the remaining slots, by score.
- PAD and BOS are never generated. Masked tokens keep their probability: it is not renormalized over the others, so a
  score is what the model gives.
- With phrases, a hypothesis finishes only when it holds them all; `lexical_constraints` allocates the beam.

Sentences are independent. Over several devices call `beam_search` in a `jax.shard_map` over the sentences
(check_vma=False): if XLA partitions the batch by itself, each device gathers all logits for its top_k.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from transformer.decoding import lexical_constraints
from transformer.decoding.base import (
    NEG_INF,
    CoveragePenalty,
    Hypotheses,
    ReorderCache,
    ResizeCache,
    SpecialIds,
    StepFn,
    concat_beams,
    is_valid,
    length_penalties,
    while_loop_with_growing_cache,
)
from transformer.decoding.logits_processors import LogitsConstraints, allowed_tokens_mask
from transformer.decoding.top_k import blockwise_top_k, masked_log_probs
from transformer.models.base import Cache, gather_beams, reorder_beams


@dataclasses.dataclass(frozen=True)
class SearchConfig:
    """Settings of a beam search.

    Attributes:
      beam_size, max_length: N and T.
      special_ids: EOS may be the same as one of the others.
      num_return: hypotheses that must be certain before the search ends; None: all N.
      length_penalty: alpha of `length_penalties`; a float, or a float32 scalar that may differ between calls of one
        compiled search.
      length_penalty_form: gnmt or length.
      early_stopping: a sentence is done once N hypotheses have finished.
    """

    beam_size: int
    max_length: int
    special_ids: SpecialIds
    num_return: int | None = None
    length_penalty: float | jax.Array = 0.0
    length_penalty_form: str = "gnmt"
    early_stopping: bool = False


class _Search(NamedTuple):
    """Everything that stays the same during a search; `penalties_U` has the length penalty of each length."""

    config: SearchConfig
    limits_B: jax.Array
    penalties_U: jax.Array
    constraints: LogitsConstraints
    coverage: CoveragePenalty | None
    phrases: lexical_constraints.PhraseConstraints | None


class BeamState(NamedTuple):
    """Alive hypotheses and the best finished ones, both best first; tokens start with BOS.

    attended_BNS is the total attention of the alive ones, None without a coverage penalty; progress_BNK their progress
    with each phrase, None without phrases.
    """

    alive_tokens: jax.Array
    alive_log_probs_BN: jax.Array
    finished_tokens: jax.Array
    finished_lengths_BN: jax.Array
    finished_scores_BN: jax.Array
    attended_BNS: Any
    progress_BNK: Any


class Candidates(NamedTuple):
    """The 2N - 1 best continuations of each sentence, best first, followed by those that phrases add."""

    log_probs_BC: jax.Array
    parents_BC: jax.Array
    tokens_BC: jax.Array


class SearchState(NamedTuple):
    """Carry of the loop over positions."""

    position: jax.Array
    cache: Cache
    beams: BeamState
    done_B: jax.Array


def beam_search(
    step: StepFn,
    cache: Cache,
    max_lengths_B: jax.Array,
    config: SearchConfig,
    *,
    reorder: ReorderCache | None = None,
    resize: ResizeCache | None = None,
    constraints: LogitsConstraints | None = None,
    coverage: CoveragePenalty | None = None,
    phrases_BKL: jax.Array | None = None,
) -> Hypotheses:
    """Searches for the N hypotheses of each sentence with the best log-probability / length penalty.

    To be called inside jit: one while loop of fixed shapes, left as soon as every sentence is done. The cache of the
    step function follows the hypotheses; what the beams of a sentence share (the encoder's output, its keys and
    values) belongs in the closure of `step`, not in the cache.

    Args:
      step: one step of the model. At position 0 all beams hold BOS and only the first one counts.
      cache: its state before BOS.
      max_lengths_B: int32 [B], the most tokens, EOS counted, of each sentence; clipped to 0..T. A limit of 0 marks a
        row as padding: it is done from the start and gives an empty hypothesis.
      reorder: moves the cache with its hypotheses, if that costs less than moving all of it; None moves each leaf,
        which then is [B, N, ...].
      resize: enlarges the cache as hypotheses get longer; None: it holds T positions.
      constraints: which tokens are allowed.
      coverage: a penalty added to the scores; `step` then returns its attention too.
      phrases_BKL: int32, phrases that each translation must hold, PAD after each. All are met if the prefix, the
        phrases one after the other and EOS fit into the limit; no hypothesis without one is returned.

    Raises:
      ValueError: a size is not positive, or a leaf of a cache to be moved does not lead with [B, N].
    """
    _check_shapes(None if reorder else cache, max_lengths_B.shape[0], config.beam_size, config.max_length)
    limits_B = jnp.clip(max_lengths_B, 0, config.max_length)
    search = _Search(
        config,
        limits_B,
        length_penalties(config.max_length, config.length_penalty, config.length_penalty_form),
        constraints or LogitsConstraints(),
        coverage,
        None if phrases_BKL is None else lexical_constraints.compile_phrases(phrases_BKL, config.special_ids.pad),
    )
    final = while_loop_with_growing_cache(
        lambda state: ~jnp.all(state.done_B),
        lambda state: _search_step(step, reorder or reorder_beams, state, search),
        SearchState(jnp.zeros((), jnp.int32), cache, _init_beams(search), done_B=limits_B == 0),
        config.max_length,
        resize,
    )
    return _collect(final.beams, search)


def _check_shapes(cache: Cache, batch_size: int, beam_size: int, max_length: int) -> None:
    if any(size < 1 for size in (batch_size, beam_size, max_length)):
        raise ValueError(f"expected sizes of at least 1, got {batch_size=}, {beam_size=}, {max_length=}")
    for path, leaf in jax.tree_util.tree_leaves_with_path(cache):
        if leaf.shape[:2] != (batch_size, beam_size):
            raise ValueError(
                f"expected cache{jax.tree_util.keystr(path)} to lead with [batch_size, beam_size] = "
                f"[{batch_size}, {beam_size}], got the shape {leaf.shape}; another cache needs a function `reorder`"
            )


def _init_beams(search: _Search) -> BeamState:
    """One alive hypothesis of BOS alone; the other beams are invalid, else they would repeat it."""
    batch_size, beam_size, ids = search.limits_B.shape[0], search.config.beam_size, search.config.special_ids
    tokens = jnp.full((batch_size, beam_size, 1 + search.config.max_length), ids.pad, jnp.int32)
    invalid_BN = jnp.full((batch_size, beam_size), NEG_INF, jnp.float32)
    return BeamState(
        alive_tokens=tokens.at[:, :, 0].set(ids.bos),
        alive_log_probs_BN=invalid_BN.at[:, 0].set(0),
        finished_tokens=tokens,
        finished_lengths_BN=jnp.zeros((batch_size, beam_size), jnp.int32),
        finished_scores_BN=invalid_BN,
        attended_BNS=search.coverage.init_state(beam_size) if search.coverage else None,
        progress_BNK=lexical_constraints.init_progress(search.phrases, beam_size) if search.phrases else None,
    )


def _search_step(step: StepFn, reorder: ReorderCache, state: SearchState, search: _Search) -> SearchState:
    """Extends all hypotheses by one token."""
    last_BN = jax.lax.dynamic_index_in_dim(state.beams.alive_tokens, state.position, axis=2, keepdims=False)
    logits_BNV, cache, *attention = step(state.cache, last_BN, state.position)
    beams = state.beams
    if search.coverage:
        beams = beams._replace(attended_BNS=beams.attended_BNS + attention[0])
    candidates = _expand(logits_BNV, beams, state.position, search)
    position = state.position + 1
    beams, parents_BN = _select(candidates, beams, position, search)
    beams = jax.tree.map(lambda old, new: _where_rows(state.done_B, old, new), state.beams, beams)
    if last_BN.shape[1] > 1:
        cache = reorder(cache, parents_BN)
    return SearchState(position, cache, beams, state.done_B | _is_done(beams, position, search))


def _expand(logits_BNV: jax.Array, beams: BeamState, position: jax.Array, search: _Search) -> Candidates:
    batch_size, beam_size, vocab_size = logits_BNV.shape
    ids, alive_log_probs_BN = search.config.special_ids, beams.alive_log_probs_BN
    allowed = allowed_tokens_mask(search.constraints, beams.alive_tokens, position, search.limits_B, vocab_size, ids)
    count = 2 * beam_size - 1
    if search.phrases:
        may_finish_BN = lexical_constraints.all_satisfied(search.phrases, beams.progress_BNK)
        allowed = allowed & ((np.arange(vocab_size) != ids.eos)[None, None, :] | may_finish_BN[:, :, None])
        log_probs_BNV = masked_log_probs(logits_BNV, allowed, alive_log_probs_BN)
        log_probs_BC, indices_BC = jax.lax.top_k(log_probs_BNV.reshape(batch_size, -1), count)
        log_probs_BC, indices_BC = lexical_constraints.add_candidates(
            search.phrases, beams.progress_BNK, log_probs_BNV, log_probs_BC, indices_BC, ids.eos
        )
    else:
        log_probs_BC, indices_BC = blockwise_top_k(logits_BNV, allowed, alive_log_probs_BN, count)
    return Candidates(log_probs_BC, indices_BC // vocab_size, indices_BC % vocab_size)


def _select(
    candidates: Candidates, beams: BeamState, position: jax.Array, search: _Search
) -> tuple[BeamState, jax.Array]:
    """Divides candidates, now `position` tokens long, into finished and alive; also the parents of the alive ones."""
    # No slices of the results of top_k, here or in _is_done: XLA would merge them into it, and its CPU back end then
    # sorts all N * V values, 30 to 100 times as slow.
    log_probs_BC, parents_BC, last_BC = candidates
    beam_size = search.config.beam_size
    tokens = gather_beams(beams.alive_tokens, parents_BC)
    tokens = jax.lax.dynamic_update_index_in_dim(tokens, last_BC, position, axis=2)
    is_eos_BC = last_BC == search.config.special_ids.eos

    finishes_BC = is_eos_BC & is_valid(log_probs_BC)
    if search.config.early_stopping and not search.phrases:
        finishes_BC &= (np.arange(finishes_BC.shape[1]) < beam_size)[None, :]
    scores_BC = log_probs_BC / search.penalties_U[position]
    if search.coverage:
        scores_BC += gather_beams(search.coverage.score(beams.attended_BNS), parents_BC)
    scores_BC = jnp.where(finishes_BC, scores_BC, NEG_INF)
    lengths_BC = jnp.where(finishes_BC, position, 0)
    # Earlier finished ones come first, so that a tie changes nothing, as _is_done expects.
    finished_scores_BN, finished_BN = jax.lax.top_k(concat_beams(beams.finished_scores_BN, scores_BC), beam_size)

    open_log_probs_BC = jnp.where(is_eos_BC, NEG_INF, log_probs_BC)
    progress_BNK = None
    if search.phrases:
        progress_BCK = lexical_constraints.update_progress(
            search.phrases, gather_beams(beams.progress_BNK, parents_BC), last_BC
        )
        alive_log_probs_BN, alive_BN = lexical_constraints.dynamic_beam_allocation(
            search.phrases, progress_BCK, open_log_probs_BC, beam_size
        )
        progress_BNK = gather_beams(progress_BCK, alive_BN)
    else:
        alive_log_probs_BN, alive_BN = jax.lax.top_k(open_log_probs_BC, beam_size)
    alive_parents_BN = gather_beams(parents_BC, alive_BN)
    selected = BeamState(
        alive_tokens=gather_beams(tokens, alive_BN),
        alive_log_probs_BN=alive_log_probs_BN,
        finished_tokens=gather_beams(concat_beams(beams.finished_tokens, tokens), finished_BN),
        finished_lengths_BN=gather_beams(concat_beams(beams.finished_lengths_BN, lengths_BC), finished_BN),
        finished_scores_BN=finished_scores_BN,
        attended_BNS=None if beams.attended_BNS is None else gather_beams(beams.attended_BNS, alive_parents_BN),
        progress_BNK=progress_BNK,
    )
    return selected, alive_parents_BN


def _is_done(beams: BeamState, position: jax.Array, search: _Search) -> jax.Array:
    """Whether each sentence is at its limit, or no alive hypothesis can enter its `num_return` best finished ones."""
    best_alive_B = jnp.max(beams.alive_log_probs_BN, axis=1)
    # Log-probabilities only fall, coverage adds at most 0, and the penalty is monotone: its largest value is at one of
    # the two ends.
    largest_penalty_B = jnp.maximum(search.penalties_U[position], search.penalties_U[search.limits_B])
    is_returned_N = np.arange(search.config.beam_size) < (search.config.num_return or search.config.beam_size)
    worst_finished_B = jnp.min(jnp.where(is_returned_N[None, :], beams.finished_scores_BN, jnp.inf), axis=1)
    is_beaten_B = best_alive_B / largest_penalty_B <= worst_finished_B
    if search.config.early_stopping:
        is_beaten_B |= jnp.all(is_valid(beams.finished_scores_BN), axis=1)
    return (position >= search.limits_B) | ~is_valid(best_alive_B) | is_beaten_B


def _collect(beams: BeamState, search: _Search) -> Hypotheses:
    """Finished hypotheses first, then the truncated ones; a sentence with free slots is at its limit or has no more."""
    valid_BN = is_valid(beams.alive_log_probs_BN) & (search.limits_B[:, None] > 0)
    truncated_tokens = beams.alive_tokens
    truncated_scores_BN = beams.alive_log_probs_BN / search.penalties_U[search.limits_B][:, None]
    if search.phrases:
        valid_BN &= lexical_constraints.all_satisfied(search.phrases, beams.progress_BNK)
    if search.coverage:
        truncated_scores_BN += search.coverage.score(beams.attended_BNS)
    truncated_scores_BN = jnp.where(valid_BN, truncated_scores_BN, NEG_INF)
    if search.phrases or search.coverage:
        truncated_scores_BN, order_BN = jax.lax.top_k(truncated_scores_BN, truncated_scores_BN.shape[1])
        truncated_tokens, valid_BN = gather_beams(truncated_tokens, order_BN), is_valid(truncated_scores_BN)
    truncated_lengths_BN = jnp.where(valid_BN, search.limits_B[:, None], 0)

    # Both lists are sorted: slot i holds the i-th finished hypothesis or, past their number, the next truncated one.
    # With N = 4 and 2 finished of a sentence: [finished 0, finished 1, truncated 0, truncated 1] = [0, 1, 4, 5].
    finished_BN = is_valid(beams.finished_scores_BN)
    beam_size = finished_BN.shape[1]
    num_finished_B1 = jnp.sum(finished_BN, axis=1, keepdims=True, dtype=jnp.int32)
    slots_1N = jnp.arange(beam_size, dtype=jnp.int32)[None, :]
    order_BN = jnp.where(finished_BN, slots_1N, beam_size + slots_1N - num_finished_B1)

    lengths_BN = gather_beams(concat_beams(beams.finished_lengths_BN, truncated_lengths_BN), order_BN)
    tokens_BNT = gather_beams(concat_beams(beams.finished_tokens, truncated_tokens), order_BN)[:, :, 1:]
    inside_BNT = jnp.arange(tokens_BNT.shape[2])[None, None, :] < lengths_BN[:, :, None]
    return Hypotheses(
        tokens_BNT=jnp.where(inside_BNT, tokens_BNT, search.config.special_ids.pad),
        lengths_BN=lengths_BN,
        scores_BN=gather_beams(concat_beams(beams.finished_scores_BN, truncated_scores_BN), order_BN),
        finished_BN=finished_BN,
    )


def _where_rows(keep_old_B: jax.Array, old: jax.Array, new: jax.Array) -> jax.Array:
    return jnp.where(keep_old_B.reshape((-1,) + (1,) * (old.ndim - 1)), old, new)
