"""Beam search, and greedy search as a beam of one, over a step function; knows nothing of the model.

Shapes: B sentences, N beams, C candidates, T maximal length, V vocabulary, S source length, K phrases of L tokens.

How hypotheses end, and how they rank:
- Of the 2N - 1 best continuations of a sentence those with EOS have ended, and the N best others go on.
  A hypothesis has one EOS continuation, so N - 1 others are there even when all N end at once. A beam of
  one has one candidate: it is the argmax roll-out, whatever the length penalty.
- A sentence is done when it reaches its own limit, or when nothing that goes on could still beat the worst
  of its best ended hypotheses, as many as are wanted. It does not change after that, whatever its neighbours do.
- With `early_stopping` it is also done once N hypotheses have ended, each with an EOS among the N best continuations,
  as in fairseq and CTranslate2: sooner, with shorter translations. Phrases may end outside of the N best.
- A hypothesis that the limit cuts is returned whole, without EOS, as not finished. Finished ones come
  first, by score; cut ones fill the places left over, by score.
- PAD and BOS are never generated. Their probability is not shared out among the other tokens: a score
  is what the model gave. The same holds of what restrictions rule out.
- With phrases, a hypothesis ends only when it holds them all, and `constraints` shares out the beam.

Sentences are searched apart. Over several devices call `beam_search` in a `jax.shard_map` over the sentences
(check_vma=False): where XLA splits the batch by itself, each device gets all logits for its top_k.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from transformer.decoding import lexical_constraints
from transformer.decoding.base import (
    IMPOSSIBLE,
    Coverage,
    Grow,
    Hypotheses,
    Reorder,
    SpecialIds,
    StepFn,
    is_possible,
    join,
    length_penalties,
    run_stages,
)
from transformer.decoding.logits_processors import Restrictions, allowed_next
from transformer.models.base import Cache, move_beams, take_beams

BLOCK = 32  # tokens of which `best` looks at the likeliest first

BLOCKS = 4  # it does so where there are so many times as many blocks as continuations are asked for


def log_probs(logits_BNV: jax.Array, allowed: jax.Array | np.ndarray, alive_log_probs_BN: jax.Array) -> jax.Array:
    """Of each hypothesis with each next token, float32 [B, N, V]; IMPOSSIBLE for what is not allowed.

    Args:
      logits_BNV: of the next token, any float.
      allowed: bool, of a shape that broadcasts to [B, N, V].
      alive_log_probs_BN: of the hypotheses so far.
    """
    # In float32 also for speed: XLA's top_k on a CPU takes 10 to 100 times as long in bfloat16.
    found_BNV = jax.nn.log_softmax(logits_BNV.astype(jnp.float32)) + alive_log_probs_BN[:, :, None]
    return _or_impossible(found_BNV, allowed)


def best(
    logits_BNV: jax.Array, allowed: jax.Array | np.ndarray, alive_log_probs_BN: jax.Array, count: int
) -> tuple[jax.Array, jax.Array]:
    """The `count` largest of `log_probs`, best first, and their places in N * V; both [B, C], to the bit as top_k.

    Where there are many, only the largest logit of each block of tokens becomes a log-probability at first, which
    keeps their order: the `count` best blocks hold the `count` best continuations. Taken in order of their places,
    so that of equals the first comes first.
    """
    batch_size, beam_size, vocab_size = logits_BNV.shape
    if beam_size * vocab_size < BLOCKS * BLOCK * count:
        return jax.lax.top_k(log_probs(logits_BNV, allowed, alive_log_probs_BN).reshape(batch_size, -1), count)
    logits_BNV = logits_BNV.astype(jnp.float32)
    # The terms of jax.nn.log_softmax, for the same bits.
    largest_BN = jnp.max(logits_BNV, axis=2)
    total_BN = jnp.log(jnp.sum(jnp.exp(logits_BNV - largest_BN[:, :, None]), axis=2))

    blocks = -(-vocab_size // BLOCK)

    def in_blocks(values_BNV: jax.Array, fill: float | bool) -> jax.Array:
        missing = ((0, 0), (0, 0), (0, blocks * BLOCK - vocab_size))
        filled_BNV = jnp.pad(values_BNV, missing, constant_values=fill)
        return filled_BNV.reshape(batch_size, beam_size * blocks, BLOCK)

    logits_BMK = in_blocks(logits_BNV, -jnp.inf)
    allowed_BMK = in_blocks(jnp.broadcast_to(allowed, logits_BNV.shape), False)
    largest_BM1 = _largest_allowed(logits_BMK, allowed_BMK, allowed)

    def normalized(logits_BCK: jax.Array, beams_BC: jax.Array) -> jax.Array:
        terms = (take_beams(term, beams_BC)[:, :, None] for term in (largest_BN, total_BN, alive_log_probs_BN))
        largest_BC1, total_BC1, alive_BC1 = terms
        return _or_impossible(logits_BCK - largest_BC1 - total_BC1 + alive_BC1, True)

    beam_of_M = np.repeat(np.arange(beam_size, dtype=np.int32), blocks)
    beam_of_BM = jnp.broadcast_to(beam_of_M[None, :], largest_BM1.shape[:2])
    _, chosen_BC = jax.lax.top_k(normalized(largest_BM1, beam_of_BM)[:, :, 0], count)
    chosen_BC = jnp.sort(chosen_BC, axis=1)
    kept_BCK = jnp.where(take_beams(allowed_BMK, chosen_BC), take_beams(logits_BMK, chosen_BC), -jnp.inf)
    candidates_BCK = normalized(kept_BCK, chosen_BC // blocks)
    log_probs_BC, places_BC = jax.lax.top_k(candidates_BCK.reshape(batch_size, -1), count)
    block_BC = take_beams(chosen_BC, places_BC // BLOCK)
    tokens_BC = block_BC % blocks * BLOCK + places_BC % BLOCK
    return log_probs_BC, block_BC // blocks * vocab_size + tokens_BC


def _largest_allowed(logits_BMK: jax.Array, allowed_BMK: jax.Array, allowed: jax.Array | np.ndarray) -> jax.Array:
    """The largest allowed logit of each block, [B, M, 1]."""
    if not isinstance(allowed, np.ndarray):
        return jnp.max(jnp.where(allowed_BMK, logits_BMK, -jnp.inf), axis=2, keepdims=True)
    # The same few tokens of every hypothesis are closed: only their blocks are masked, which spares writing the rest.
    found_BM = jnp.max(logits_BMK, axis=2)
    blocks = -(-allowed.shape[2] // BLOCK)
    for closed in np.unique(np.flatnonzero(~allowed[0, 0]) // BLOCK):
        own = slice(int(closed), None, blocks)
        inside_BNK = jnp.where(allowed_BMK[:, own], logits_BMK[:, own], -jnp.inf)
        found_BM = found_BM.at[:, own].set(jnp.max(inside_BNK, axis=2))
    return found_BM[:, :, None]


def _or_impossible(values: jax.Array, allowed: jax.Array | np.ndarray | bool) -> jax.Array:
    """NaN, from a hypothesis with no possible token, compares as false and becomes IMPOSSIBLE too."""
    return jnp.where(is_possible(values) & allowed, values, IMPOSSIBLE)


class _Rules(NamedTuple):
    """What stays the same while the search runs. penalties has T + 1 entries, one for each length."""

    limits_B: jax.Array
    penalties: jax.Array
    ids: SpecialIds
    wanted: int
    restrictions: Restrictions
    coverage: Coverage | None
    phrases: lexical_constraints.Phrases | None
    early_stopping: bool


class _Beams(NamedTuple):
    """The hypotheses that go on and the best that have ended, both best first; tokens start with BOS.

    What coverage and phrases remember of those that go on is None without them.
    """

    alive_tokens: jax.Array
    alive_log_probs_BN: jax.Array
    ended_tokens: jax.Array
    ended_lengths_BN: jax.Array
    ended_scores_BN: jax.Array
    attended_BNS: Any
    progress_BNK: Any


class _Candidates(NamedTuple):
    """The 2N - 1 best continuations of each sentence, best first, and then those that phrases call for."""

    log_probs_BC: jax.Array
    parents_BC: jax.Array
    tokens_BC: jax.Array


class _State(NamedTuple):
    position: jax.Array
    cache: Cache
    beams: _Beams
    done_B: jax.Array


def beam_search(
    step: StepFn,
    cache: Cache,
    *,
    batch_size: int,
    beam_size: int,
    max_length: int,
    max_lengths_B: jax.Array,
    length_penalty: float | jax.Array,
    bos_id: int,
    eos_id: int,
    pad_id: int,
    count: int | None = None,
    reorder: Reorder | None = None,
    grow: Grow | None = None,
    length_penalty_form: str = "gnmt",
    restrictions: Restrictions | None = None,
    coverage: Coverage | None = None,
    phrases_BKL: jax.Array | None = None,
    early_stopping: bool = False,
) -> Hypotheses:
    """Searches for the N hypotheses of each sentence with the best log-probability / length penalty.

    To be called inside jit: one while loop of fixed shapes, left as soon as every sentence is done. The
    step function's cache follows the hypotheses; what the beams of a sentence share (the encoder's
    output, its keys and values) belongs in the closure of `step`, not in the cache.

    Args:
      step: one step of the model. At position 0 all beams hold BOS and only the first one counts.
      cache: its state before BOS.
      batch_size, beam_size, max_length: B, N and T; static.
      max_lengths_B: int32 [B], the most tokens, EOS counted, of each sentence; kept within 0..T. A limit
        of 0 marks a row as padding: it is done from the start and gives an empty hypothesis.
      length_penalty: alpha of `length_penalties`; a float, or a float32 scalar that may differ from call to
        call of one compiled search.
      bos_id, eos_id, pad_id: token ids; EOS may be the same as one of the others.
      count: how many hypotheses are wanted; the search ends as soon as these are sure. None: all N.
      reorder: makes the cache follow its hypotheses, where that can be done for less than moving all of it;
        None moves each leaf, which then is [batch_size, beam_size, ...].
      grow: gives the cache more room as hypotheses get longer; None: it has room for T positions.
      length_penalty_form: gnmt or length; static.
      restrictions: what hypotheses may say.
      coverage: a penalty added to the scores; `step` then returns its attention too.
      phrases_BKL: int32, what each translation must hold, PAD after each phrase. All are met if the prefix,
        the phrases one after the other and EOS fit into the limit; nothing is returned that lacks one.
      early_stopping: a sentence is done once N hypotheses have ended; static.

    Raises:
      ValueError: a size is not positive, or a leaf of a cache to be moved does not lead with [B, N].
    """
    _check_shapes(None if reorder else cache, batch_size, beam_size, max_length)
    limits_B = jnp.clip(max_lengths_B, 0, max_length)
    rules = _Rules(
        limits_B,
        length_penalties(max_length, length_penalty, length_penalty_form),
        SpecialIds(pad_id, bos_id, eos_id),
        count or beam_size,
        restrictions or Restrictions(),
        coverage,
        None if phrases_BKL is None else lexical_constraints.phrases(phrases_BKL, pad_id),
        early_stopping,
    )
    start = _State(
        position=jnp.zeros((), jnp.int32),
        cache=cache,
        beams=_first_beams(batch_size, beam_size, max_length, rules),
        done_B=limits_B == 0,
    )
    end = run_stages(
        lambda state: ~jnp.all(state.done_B),
        lambda state: _advance(step, reorder or move_beams, state, rules),
        start,
        max_length,
        grow,
    )
    return _collect(end.beams, rules)


def _check_shapes(cache: Cache, batch_size: int, beam_size: int, max_length: int) -> None:
    if any(size < 1 for size in (batch_size, beam_size, max_length)):
        raise ValueError(f"expected sizes of at least 1, got {batch_size=}, {beam_size=}, {max_length=}")
    for path, leaf in jax.tree_util.tree_leaves_with_path(cache):
        if leaf.shape[:2] != (batch_size, beam_size):
            raise ValueError(
                f"expected cache{jax.tree_util.keystr(path)} to lead with [batch_size, beam_size] = "
                f"[{batch_size}, {beam_size}], got the shape {leaf.shape}"
            )


def _first_beams(batch_size: int, beam_size: int, max_length: int, rules: _Rules) -> _Beams:
    """One hypothesis to go on, BOS alone; the other beams are impossible, else they would repeat it."""
    tokens = jnp.full((batch_size, beam_size, 1 + max_length), rules.ids.pad, jnp.int32)
    impossible_BN = jnp.full((batch_size, beam_size), IMPOSSIBLE, jnp.float32)
    return _Beams(
        alive_tokens=tokens.at[:, :, 0].set(rules.ids.bos),
        alive_log_probs_BN=impossible_BN.at[:, 0].set(0),
        ended_tokens=tokens,
        ended_lengths_BN=jnp.zeros((batch_size, beam_size), jnp.int32),
        ended_scores_BN=impossible_BN,
        attended_BNS=rules.coverage and rules.coverage.start(beam_size),
        progress_BNK=rules.phrases and lexical_constraints.start(rules.phrases, beam_size),
    )


def _advance(step: StepFn, reorder: Reorder, state: _State, rules: _Rules) -> _State:
    """Extends all hypotheses by one token."""
    last_BN = jax.lax.dynamic_index_in_dim(state.beams.alive_tokens, state.position, axis=2, keepdims=False)
    logits_BNV, cache, *attention = step(state.cache, last_BN, state.position)
    before = state.beams
    if rules.coverage:
        before = before._replace(attended_BNS=before.attended_BNS + attention[0])
    candidates = _expand(logits_BNV, before, state.position, rules)
    position = state.position + 1
    beams, parents_BN = _select(candidates, before, position, rules)
    beams = jax.tree.map(lambda old, new: _where_rows(state.done_B, old, new), state.beams, beams)
    if last_BN.shape[1] > 1:
        cache = reorder(cache, parents_BN)
    return _State(position, cache, beams, state.done_B | _is_done(beams, position, rules))


def _expand(logits_BNV: jax.Array, beams: _Beams, position: jax.Array, rules: _Rules) -> _Candidates:
    batch_size, beam_size, vocab_size = logits_BNV.shape
    allowed = allowed_next(rules.restrictions, beams.alive_tokens, position, rules.limits_B, vocab_size, rules.ids)
    if rules.phrases:
        may_end_BN = lexical_constraints.all_met(rules.phrases, beams.progress_BNK)
        allowed = allowed & ((np.arange(vocab_size) != rules.ids.eos)[None, None, :] | may_end_BN[:, :, None])
    count = 2 * beam_size - 1
    if rules.phrases:
        log_probs_BNV = log_probs(logits_BNV, allowed, beams.alive_log_probs_BN)
        log_probs_BC, flat_BC = jax.lax.top_k(log_probs_BNV.reshape(batch_size, -1), count)
        log_probs_BC, flat_BC = lexical_constraints.add_candidates(
            rules.phrases, beams.progress_BNK, log_probs_BNV, log_probs_BC, flat_BC, rules.ids.eos
        )
    else:
        log_probs_BC, flat_BC = best(logits_BNV, allowed, beams.alive_log_probs_BN, count)
    return _Candidates(log_probs_BC, flat_BC // vocab_size, flat_BC % vocab_size)


def _select(candidates: _Candidates, beams: _Beams, position: jax.Array, rules: _Rules) -> tuple[_Beams, jax.Array]:
    """Sorts candidates, now `position` tokens long, into ended and going on; also the parents of the latter."""
    # No slices of what top_k returns, here or in _is_done: XLA would merge them into it, and its CPU
    # back end then sorts all N * V values: 30 to 100 times as slow.
    log_probs_BC, parents_BC, last_BC = candidates
    beam_size = beams.ended_scores_BN.shape[1]
    tokens = take_beams(beams.alive_tokens, parents_BC)
    tokens = jax.lax.dynamic_update_index_in_dim(tokens, last_BC, position, axis=2)
    is_eos_BC = last_BC == rules.ids.eos

    ends_BC = is_eos_BC & is_possible(log_probs_BC)
    if rules.early_stopping and not rules.phrases:
        ends_BC &= (np.arange(ends_BC.shape[1]) < beam_size)[None, :]
    scores_BC = log_probs_BC / rules.penalties[position]
    if rules.coverage:
        scores_BC += take_beams(rules.coverage.score(beams.attended_BNS), parents_BC)
    scores_BC = jnp.where(ends_BC, scores_BC, IMPOSSIBLE)
    lengths_BC = jnp.where(ends_BC, position, 0)
    # Those that ended before come first, so that a tie changes nothing, as the early stop expects.
    ended_scores_BN, picked_BN = jax.lax.top_k(join(beams.ended_scores_BN, scores_BC), beam_size)

    open_log_probs_BC = jnp.where(is_eos_BC, IMPOSSIBLE, log_probs_BC)
    progress_BNK = None
    if rules.phrases:
        progress_BCK = lexical_constraints.advance(rules.phrases, take_beams(beams.progress_BNK, parents_BC), last_BC)
        alive_log_probs_BN, kept_BN = lexical_constraints.allocate(
            rules.phrases, progress_BCK, open_log_probs_BC, beam_size
        )
        progress_BNK = take_beams(progress_BCK, kept_BN)
    else:
        alive_log_probs_BN, kept_BN = jax.lax.top_k(open_log_probs_BC, beam_size)
    came_from_BN = take_beams(parents_BC, kept_BN)
    selected = _Beams(
        alive_tokens=take_beams(tokens, kept_BN),
        alive_log_probs_BN=alive_log_probs_BN,
        ended_tokens=take_beams(join(beams.ended_tokens, tokens), picked_BN),
        ended_lengths_BN=take_beams(join(beams.ended_lengths_BN, lengths_BC), picked_BN),
        ended_scores_BN=ended_scores_BN,
        attended_BNS=None if beams.attended_BNS is None else take_beams(beams.attended_BNS, came_from_BN),
        progress_BNK=progress_BNK,
    )
    return selected, came_from_BN


def _is_done(beams: _Beams, position: jax.Array, rules: _Rules) -> jax.Array:
    """Whether each sentence is at its limit, or nothing that goes on can enter the ended hypotheses that are wanted."""
    best_B = jnp.max(beams.alive_log_probs_BN, axis=1)
    # Log-probabilities only fall, coverage adds nothing above 0, and the penalty is monotone: its largest value is
    # at one of the two ends.
    largest_penalty_B = jnp.maximum(rules.penalties[position], rules.penalties[rules.limits_B])
    is_wanted_N = np.arange(beams.ended_scores_BN.shape[1]) < rules.wanted
    worst_B = jnp.min(jnp.where(is_wanted_N[None, :], beams.ended_scores_BN, jnp.inf), axis=1)
    beaten_B = best_B / largest_penalty_B <= worst_B
    if rules.early_stopping:
        beaten_B |= jnp.all(is_possible(beams.ended_scores_BN), axis=1)
    return (position >= rules.limits_B) | ~is_possible(best_B) | beaten_B


def _collect(beams: _Beams, rules: _Rules) -> Hypotheses:
    """Ended hypotheses first, then the cut ones; a sentence with places left over is at its limit or has none."""
    possible_BN = is_possible(beams.alive_log_probs_BN)
    cut_tokens, cut_scores_BN = beams.alive_tokens, beams.alive_log_probs_BN / rules.penalties[rules.limits_B][:, None]
    if rules.phrases:
        possible_BN &= lexical_constraints.all_met(rules.phrases, beams.progress_BNK)
    if rules.coverage:
        cut_scores_BN += rules.coverage.score(beams.attended_BNS)
    cut_scores_BN = jnp.where(possible_BN, cut_scores_BN, IMPOSSIBLE)
    if rules.phrases or rules.coverage:
        cut_scores_BN, order_BN = jax.lax.top_k(cut_scores_BN, cut_scores_BN.shape[1])
        cut_tokens, possible_BN = take_beams(cut_tokens, order_BN), is_possible(cut_scores_BN)
    cut_lengths_BN = jnp.where(possible_BN, rules.limits_B[:, None], 0)

    finished_BN = is_possible(beams.ended_scores_BN)
    beam_size = finished_BN.shape[1]
    num_finished_B1 = jnp.sum(finished_BN, axis=1, keepdims=True, dtype=jnp.int32)
    slots_1N = jnp.arange(beam_size, dtype=jnp.int32)[None, :]
    # Both lists are sorted: slot i holds the i-th ended hypothesis or, past their number, the next cut one.
    order_BN = jnp.where(finished_BN, slots_1N, beam_size + slots_1N - num_finished_B1)

    lengths_BN = take_beams(join(beams.ended_lengths_BN, cut_lengths_BN), order_BN)
    tokens_BNT = take_beams(join(beams.ended_tokens, cut_tokens), order_BN)[:, :, 1:]
    inside_BNT = jnp.arange(tokens_BNT.shape[2])[None, None, :] < lengths_BN[:, :, None]
    return Hypotheses(
        tokens_BNT=jnp.where(inside_BNT, tokens_BNT, rules.ids.pad),
        lengths_BN=lengths_BN,
        scores_BN=take_beams(join(beams.ended_scores_BN, cut_scores_BN), order_BN),
        finished_BN=finished_BN,
    )


def _where_rows(keep_old_B: jax.Array, old: jax.Array, new: jax.Array) -> jax.Array:
    return jnp.where(keep_old_B.reshape((-1,) + (1,) * (old.ndim - 1)), old, new)
