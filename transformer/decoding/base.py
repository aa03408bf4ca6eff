"""What beam search and sampling share: step function, hypotheses, scores, and the loop over a growing KV cache.

Shapes: B sentences, N hypotheses of each, T maximal length in tokens, V vocabulary, S source length.
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from transformer.models.base import Cache

StepFn = Callable[[Cache, jax.Array, jax.Array], tuple[Any, ...]]
"""(cache, the last token of each hypothesis: int32 [B, N], its position from 0, BOS being at 0: int32 [])
→ (logits of the next token: any float [B, N, V], the cache of the same shapes and dtypes), and for a coverage
penalty a third: the cross-attention, float32 [B, N, S], of sum 1."""

ReorderCache = Callable[[Cache, jax.Array], Cache]
"""(cache, parents: int32 [B, N]) → the cache in which hypothesis n continues what was parents[b, n]."""

ResizeCache = Callable[[Cache, int], Cache]
"""(cache, length) → the cache padded to hold so many positions."""

NEG_INF = -1e9
"""Log-probability and score of an impossible hypothesis: finite, so that sums and ratios stay free of NaN."""

MIN_COVERAGE = 1e-9  # keeps the logarithm of a coverage finite
INITIAL_CACHE_LENGTH = 16


class Hypotheses(NamedTuple):
    """N hypotheses of each sentence; an empty one has length 0.

    tokens_BNT: int32, without BOS, with EOS where it was reached, PAD after.
    lengths_BN: int32, tokens including EOS.
    scores_BN: float32, log-probability / length penalty + coverage penalty; NEG_INF for an empty hypothesis.
    finished_BN: bool, whether EOS was reached.
    """

    tokens_BNT: jax.Array
    lengths_BN: jax.Array
    scores_BN: jax.Array
    finished_BN: jax.Array


def cache_lengths(max_length: int) -> list[int]:
    """Lengths to which a KV cache is resized in turn, the last one `max_length`: 100 → [16, 32, 64, 100].

    The cost of a step is proportional to the cache length, and most sentences are short. Lengths double, because each
    is a program of its own, and the last step adds at least INITIAL_CACHE_LENGTH: 70 → [16, 32, 70]. A symbolic length
    (`jax.export`) has one stage.
    """
    if not isinstance(max_length, int):
        return [max_length]
    doubled = (INITIAL_CACHE_LENGTH << i for i in itertools.count())
    return [*itertools.takewhile(lambda length: length + INITIAL_CACHE_LENGTH <= max_length, doubled), max_length]


def while_loop_with_growing_cache(
    cond_fn: Callable[[Any], jax.Array],
    body_fn: Callable[[Any], Any],
    state: Any,
    max_length: int,
    resize: ResizeCache | None,
) -> Any:
    """`lax.while_loop` over decoding steps that enlarges the KV cache as hypotheses get longer.

    With `cache_lengths` = [16, 32, 70] the program is

        cache = resize(cache, 16); while cond and position < 16: body
        if cond: cache = resize(cache, 32); while cond and position < 32: body
                 if cond: cache = resize(cache, 70); while cond and position < 70: body

    Args:
      state: a named tuple with the fields `position`, of the last token, and `cache`.
      resize: pads the cache; None: it holds `max_length` positions.

    Returns:
      The final state, without its cache.
    """
    if resize is None or _shapes(state.cache) == _shapes(jax.eval_shape(lambda: resize(state.cache, max_length))):
        return _without_cache(jax.lax.while_loop(cond_fn, body_fn, state))

    def run_stage(state: Any, length: int, *longer: int) -> Any:
        state = state._replace(cache=resize(state.cache, length))
        state = jax.lax.while_loop(lambda s: cond_fn(s) & (s.position < length), body_fn, state)
        if not longer:
            return _without_cache(state)
        return jax.lax.cond(cond_fn(state), lambda s: run_stage(s, *longer), _without_cache, state)

    return run_stage(state, *cache_lengths(max_length))


def _without_cache(state: Any) -> Any:
    return state._replace(cache=())


def _shapes(cache: Cache) -> Any:
    return jax.tree.map(jnp.shape, cache)


class SpecialIds(NamedTuple):
    """Ids of the special tokens of a search; PAD and BOS are never generated."""

    pad: int
    bos: int
    eos: int


def length_penalties(max_length: int, alpha: float | jax.Array, form: str = "gnmt") -> jax.Array:
    """Length penalty of each length, EOS counted, float32 [1 + max_length]; scores are divided by it.

    gnmt: ((5 + length) / 6) ** alpha (Wu et al., 2016, equation 14); length: length ** alpha, so that
    alpha = 1 is the mean log-probability of a token. Both are 1 with alpha = 0.
    """
    lengths = jnp.arange(max_length + 1, dtype=jnp.float32)
    base = (5 + lengths) / 6 if form == "gnmt" else jnp.maximum(lengths, 1)
    return base**alpha


class CoveragePenalty(NamedTuple):
    """Penalizes source tokens that a translation leaves out (Wu et al., 2016, equation 14).

    It adds weight * Σ_s log(min(total attention to s, 1)) to the score of a finished hypothesis; until then
    hypotheses are ranked by log-probability. The step function must return its attention.
    """

    weight: float
    is_source_BS: jax.Array

    def init_state(self, beam_size: int) -> jax.Array:
        """Total attention before the first step: zeros [B, N, S]."""
        batch_size, source_length = self.is_source_BS.shape
        return jnp.zeros((batch_size, beam_size, source_length), jnp.float32)

    def score(self, attended_BNS: jax.Array) -> jax.Array:
        """The penalty of each hypothesis, float32 [B, N], at most 0."""
        logs_BNS = jnp.log(jnp.clip(attended_BNS, MIN_COVERAGE, 1.0))
        return self.weight * jnp.sum(jnp.where(self.is_source_BS[:, None, :], logs_BNS, 0.0), axis=2)


def is_valid(log_probs: jax.Array) -> jax.Array:
    """Whether a log-probability or score is that of a possible hypothesis; false of NaN."""
    # Half of NEG_INF: adding real log-probabilities to NEG_INF does not reach it.
    return log_probs > NEG_INF / 2


def concat_beams(first: jax.Array, second: jax.Array) -> jax.Array:
    """[B, M, ...] and [B, N, ...] → [B, M + N, ...]."""
    return jnp.concatenate([first, second], axis=1)
