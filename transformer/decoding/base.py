"""What beam search and sampling share: the step function they call, what they return, and how both are scored.

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
→ (logits of the next token: any float [B, N, V], the cache of the same shapes and dtypes), and, where a
coverage penalty asks for it, a third: the attention paid to the source, float32 [B, N, S], of sum 1."""

Reorder = Callable[[Cache, jax.Array], Cache]
"""(cache, parents: int32 [B, N]) → the cache in which hypothesis n goes on from what was parents[b, n]."""

IMPOSSIBLE = -1e9
"""The log-probability and the score of what cannot be: finite, so that sums and ratios stay free of NaN."""


LEAST_ATTENTION = 1e-9  # keeps the logarithm of a coverage finite


Grow = Callable[[Cache, int], Cache]
"""(cache, length) → the cache with room for so many positions."""

FIRST_ROOM = 16  # positions in a cache at first


class Hypotheses(NamedTuple):
    """N hypotheses of each sentence; a slot for which there is none has length 0.

    tokens_BNT: int32, without BOS, with EOS where it was reached, PAD after.
    lengths_BN: int32, tokens up to and with EOS.
    scores_BN: float32, log-probability / length penalty, and what the search adds to it; IMPOSSIBLE in an
      empty slot.
    finished_BN: bool, whether EOS was reached.
    """

    tokens_BNT: jax.Array
    lengths_BN: jax.Array
    scores_BN: jax.Array
    finished_BN: jax.Array


def rooms(max_length: int) -> list[int]:
    """How long a cache is, stage by stage: a step costs as much as there is room, and most sentences are short.

    It doubles, for each stage is a program of its own, and the last is no shorter than the first. A length that is a
    symbol (`jax.export`) has one stage.
    """
    if not isinstance(max_length, int):
        return [max_length]
    doubled = (FIRST_ROOM << i for i in itertools.count())
    return [*itertools.takewhile(lambda room: room + FIRST_ROOM <= max_length, doubled), max_length]


def run_stages(
    goes_on: Callable[[Any], jax.Array], advance: Callable[[Any], Any], state: Any, max_length: int, grow: Grow | None
) -> Any:
    """`advance`s a state, a named tuple with `position` and `cache`, while it `goes_on` and is not `max_length` long.

    Args:
      grow: gives the cache more room at each of `rooms`; None: it has all it needs.

    Returns:
      The last state, without its cache.
    """
    if grow is None or _same_shapes(state.cache, jax.eval_shape(lambda: grow(state.cache, max_length))):
        return _without_cache(jax.lax.while_loop(goes_on, advance, state))

    def run(state: Any, room: int, *larger: int) -> Any:
        state = state._replace(cache=grow(state.cache, room))
        state = jax.lax.while_loop(lambda now: goes_on(now) & (now.position < room), advance, state)
        if not larger:
            return _without_cache(state)
        return jax.lax.cond(goes_on(state), lambda state: run(state, *larger), _without_cache, state)

    return run(state, *rooms(max_length))


def _without_cache(state: Any) -> Any:
    return state._replace(cache=())


def _same_shapes(one: Cache, other: Cache) -> bool:
    one, other = (jax.tree.map(lambda leaf: leaf.shape, cache) for cache in (one, other))
    return one == other


class SpecialIds(NamedTuple):
    """Token ids that mean something to a search; PAD and BOS are never generated."""

    pad: int
    bos: int
    eos: int


def length_penalties(max_length: int, alpha: float | jax.Array, form: str = "gnmt") -> jax.Array:
    """What a log-probability is divided by, float32 [1 + max_length], for each length, EOS counted.

    gnmt: ((5 + length) / 6) ** alpha (Wu et al., 2016, equation 14); length: length ** alpha, so that
    alpha = 1 is the mean log-probability of a token. Both are 1 with alpha = 0.
    """
    lengths = jnp.arange(max_length + 1, dtype=jnp.float32)
    base = (5 + lengths) / 6 if form == "gnmt" else jnp.maximum(lengths, 1)
    return base**alpha


class Coverage(NamedTuple):
    """A penalty on sources that a translation leaves out (Wu et al., 2016, equation 14).

    It adds weight * Σ_s log(min(attention paid to s in all, 1)) to the score of a whole hypothesis; the
    search goes by log-probability until then. The step function returns its attention too.
    """

    weight: float
    is_source_BS: jax.Array

    def start(self, beam_size: int) -> jax.Array:
        """Nothing attended to yet: zeros [B, N, S]."""
        batch_size, width = self.is_source_BS.shape
        return jnp.zeros((batch_size, beam_size, width), jnp.float32)

    def score(self, attended_BNS: jax.Array) -> jax.Array:
        """float32 [B, N], at most 0."""
        logs_BNS = jnp.log(jnp.clip(attended_BNS, LEAST_ATTENTION, 1.0))
        return self.weight * jnp.sum(jnp.where(self.is_source_BS[:, None, :], logs_BNS, 0.0), axis=2)


def is_possible(log_probs: jax.Array) -> jax.Array:
    """Whether a log-probability, or a score, is one of something that can be; false of NaN."""
    # Far from both what models give and IMPOSSIBLE, so that adding to IMPOSSIBLE does not blur the line.
    return log_probs > IMPOSSIBLE / 2


def join(first: jax.Array, second: jax.Array) -> jax.Array:
    """[B, M, ...] and [B, N, ...] → [B, M + N, ...]."""
    return jnp.concatenate([first, second], axis=1)
