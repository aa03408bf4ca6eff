"""The best ways to go on: which of all next tokens of all hypotheses are the likeliest.

Shapes: B sentences, N hypotheses of each, V vocabulary, C continuations, M blocks of K tokens.
"""

import jax
import jax.numpy as jnp
import numpy as np

from transformer.decoding.base import IMPOSSIBLE, is_possible
from transformer.models.base import take_beams

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
