"""Token masks for decoding: minimum length, no-repeat n-grams, forced prefix.

Beam search and sampling share them; a constraint that is not set costs nothing.

Shapes: B sentences, N hypotheses, T maximal length in tokens, V vocabulary, P longest prefix.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from transformer.decoding.base import SpecialIds


class LogitsConstraints(NamedTuple):
    """Constraints on the next token; min_length and no_repeat_ngram are static.

    min_length: least number of tokens before EOS; a sentence's own limit takes precedence.
    no_repeat_ngram: no n-gram of so many tokens occurs twice in a hypothesis; 0 allows all.
    prefix_BP: int32, the tokens that each translation begins with, PAD after; they override the other constraints.
    """

    min_length: int = 0
    no_repeat_ngram: int = 0
    prefix_BP: jax.Array | None = None


def allowed_tokens_mask(
    constraints: LogitsConstraints,
    tokens_BNT: jax.Array,
    position: jax.Array,
    limits_B: jax.Array,
    vocab_size: int,
    ids: SpecialIds,
) -> jax.Array | np.ndarray:
    """Computes which tokens may come next.

    Args:
      tokens_BNT: int32 [B, N, 1 + T], the hypotheses so far, BOS first.
      position: int32 [], the position of their last token, and so their length without BOS.
      limits_B: int32, the most tokens of each sentence, EOS counted.

    Returns:
      bool, of a shape that broadcasts to [B, N, V].
    """
    allowed_V = np.ones(vocab_size, bool)
    allowed_V[[ids.pad, ids.bos]] = False
    allowed_V[ids.eos] = True
    allowed: jax.Array | np.ndarray = allowed_V[None, None, :]
    if constraints.min_length:
        is_long_B = position >= jnp.minimum(constraints.min_length, limits_B - 1)
        allowed = allowed & ((np.arange(vocab_size) != ids.eos)[None, None, :] | is_long_B[:, None, None])
    if constraints.no_repeat_ngram:
        allowed = allowed & ~repeated_ngram_mask(tokens_BNT, position, constraints.no_repeat_ngram, vocab_size)
    if constraints.prefix_BP is not None:
        allowed = _force_prefix(constraints.prefix_BP, position, ids.pad, allowed)
    return allowed


def repeated_ngram_mask(tokens_BNT: jax.Array, position: jax.Array, order: int, vocab_size: int) -> jax.Array:
    """The tokens that would repeat an n-gram of `order` tokens; bool [B, N, V].

    With order 3, a hypothesis BOS a b c a b may not continue with c: for each n-gram that ends at index e, the tokens
    at e - 2 and e - 1 are compared with the last two of the hypothesis, and where they match, token e is masked.
    """
    length = tokens_BNT.shape[2]
    ends = np.arange(order, length)  # last indices of all n-grams without BOS
    if not len(ends):
        return jnp.zeros((*tokens_BNT.shape[:2], vocab_size), bool)
    matches_BNE = jnp.broadcast_to((ends <= position)[None, None, :], (*tokens_BNT.shape[:2], len(ends)))
    for back in range(1, order):
        # A position too small for an n-gram clamps this index, but then no n-gram ends within the hypothesis either.
        last_BN1 = jax.lax.dynamic_slice_in_dim(tokens_BNT, position - back + 1, 1, axis=2)
        matches_BNE &= tokens_BNT[:, :, order - back : length - back] == last_BN1
    rows_B11, beams_1N1 = (jnp.arange(n, dtype=jnp.int32) for n in tokens_BNT.shape[:2])
    empty_BNV = jnp.zeros((*tokens_BNT.shape[:2], vocab_size), bool)
    return empty_BNV.at[rows_B11[:, None, None], beams_1N1[None, :, None], tokens_BNT[:, :, order:]].max(matches_BNE)


def _force_prefix(
    prefix_BP: jax.Array, position: jax.Array, pad_id: int, allowed: jax.Array | np.ndarray
) -> jax.Array | np.ndarray:
    """Allows only the next token of the prefix until it ends."""
    prefix_length = prefix_BP.shape[1]
    token_B = jax.lax.dynamic_index_in_dim(prefix_BP, jnp.minimum(position, prefix_length - 1), axis=1, keepdims=False)
    is_forced_B = (position < prefix_length) & (token_B != pad_id)
    is_token_BV = token_B[:, None] == np.arange(allowed.shape[2])[None, :]
    return jnp.where(is_forced_B[:, None, None], is_token_BV[:, None, :], allowed)
