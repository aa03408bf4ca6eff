"""The best continuations of the hypotheses of a sentence.

B sentences, N beams, C candidates, V vocabulary; M blocks of W tokens.
"""

import jax
import jax.numpy as jnp
import numpy as np

from transformer.decoding.base import NEG_INF, is_valid
from transformer.models.base import gather_beams

BLOCK_SIZE = 32  # tokens of a block of `blockwise_top_k`
MIN_BLOCKS_PER_CANDIDATE = 4  # below it a plain top_k is used


def masked_log_probs(
    logits_BNV: jax.Array, allowed: jax.Array | np.ndarray, alive_log_probs_BN: jax.Array
) -> jax.Array:
    """Log-probability of each hypothesis with each next token, float32 [B, N, V]; NEG_INF where not allowed.

    Args:
      logits_BNV: of the next token, any float.
      allowed: bool, of a shape that broadcasts to [B, N, V].
      alive_log_probs_BN: of the hypotheses so far.
    """
    # In float32 also for speed: XLA's top_k on a CPU takes 10 to 100 times as long in bfloat16.
    log_probs_BNV = jax.nn.log_softmax(logits_BNV.astype(jnp.float32)) + alive_log_probs_BN[:, :, None]
    return _mask_invalid(log_probs_BNV, allowed)


def blockwise_top_k(
    logits_BNV: jax.Array, allowed: jax.Array | np.ndarray, alive_log_probs_BN: jax.Array, k: int
) -> tuple[jax.Array, jax.Array]:
    """The k largest of `masked_log_probs` and their indices in N * V, both [B, C], bit-identical to `lax.top_k`.

    The vocabulary is cut into blocks of BLOCK_SIZE tokens. The k blocks with the largest maxima hold the k best
    continuations, and only those blocks become log-probabilities. With k = 2 and blocks of 2 tokens:

        scores           1 7 | 5 2 | 6 0 | 3 3      of one beam with V = 8, so that blocks are numbered 0 to 3
        block maxima     7     5     6     3     →  top 2: blocks 0 and 2, sorted by number
        their scores     1 7 6 0                 →  top 2: 7 and 6 at 1 and 2
        back to tokens   1 → block 0, offset 1 → token 1;   2 → block 2, offset 0 → token 4

    Blocks are sorted by number so that of equal scores the lower index comes first, as in `lax.top_k`.
    """
    batch_size, beam_size, vocab_size = logits_BNV.shape
    if beam_size * vocab_size < MIN_BLOCKS_PER_CANDIDATE * BLOCK_SIZE * k:
        return jax.lax.top_k(masked_log_probs(logits_BNV, allowed, alive_log_probs_BN).reshape(batch_size, -1), k)
    logits_BNV = logits_BNV.astype(jnp.float32)
    # The terms of jax.nn.log_softmax, for identical bits.
    max_BN = jnp.max(logits_BNV, axis=2)
    log_sum_BN = jnp.log(jnp.sum(jnp.exp(logits_BNV - max_BN[:, :, None]), axis=2))

    blocks_per_beam = -(-vocab_size // BLOCK_SIZE)

    def to_blocks(values_BNV: jax.Array, fill: float | bool) -> jax.Array:
        """[B, N, V] → [B, M, W]: M = N * blocks_per_beam blocks of W = BLOCK_SIZE tokens."""
        padding = ((0, 0), (0, 0), (0, blocks_per_beam * BLOCK_SIZE - vocab_size))
        padded_BNV = jnp.pad(values_BNV, padding, constant_values=fill)
        return padded_BNV.reshape(batch_size, beam_size * blocks_per_beam, BLOCK_SIZE)

    logits_BMW = to_blocks(logits_BNV, -jnp.inf)
    allowed_BMW = to_blocks(jnp.broadcast_to(allowed, logits_BNV.shape), False)
    block_max_BM1 = _max_of_blocks(logits_BMW, allowed_BMW, allowed)

    def log_probs_of(logits_BCW: jax.Array, beams_BC: jax.Array) -> jax.Array:
        max_BC1, log_sum_BC1, alive_BC1 = (
            gather_beams(term, beams_BC)[:, :, None] for term in (max_BN, log_sum_BN, alive_log_probs_BN)
        )
        return _mask_invalid(logits_BCW - max_BC1 - log_sum_BC1 + alive_BC1, True)

    beam_of_block_M = np.repeat(np.arange(beam_size, dtype=np.int32), blocks_per_beam)
    beam_of_block_BM = jnp.broadcast_to(beam_of_block_M[None, :], block_max_BM1.shape[:2])
    _, blocks_BC = jax.lax.top_k(log_probs_of(block_max_BM1, beam_of_block_BM)[:, :, 0], k)
    blocks_BC = jnp.sort(blocks_BC, axis=1)
    best_logits_BCW = jnp.where(gather_beams(allowed_BMW, blocks_BC), gather_beams(logits_BMW, blocks_BC), -jnp.inf)
    best_log_probs_BCW = log_probs_of(best_logits_BCW, blocks_BC // blocks_per_beam)
    log_probs_BC, indices_BC = jax.lax.top_k(best_log_probs_BCW.reshape(batch_size, -1), k)
    block_BC = gather_beams(blocks_BC, indices_BC // BLOCK_SIZE)
    tokens_BC = block_BC % blocks_per_beam * BLOCK_SIZE + indices_BC % BLOCK_SIZE
    return log_probs_BC, block_BC // blocks_per_beam * vocab_size + tokens_BC


def _max_of_blocks(logits_BMW: jax.Array, allowed_BMW: jax.Array, allowed: jax.Array | np.ndarray) -> jax.Array:
    """The largest allowed logit of each block, [B, M, 1]."""
    if not isinstance(allowed, np.ndarray):
        return jnp.max(jnp.where(allowed_BMW, logits_BMW, -jnp.inf), axis=2, keepdims=True)
    # The same few tokens are masked in every hypothesis: only their blocks are recomputed, for less memory traffic.
    max_BM = jnp.max(logits_BMW, axis=2)
    blocks_per_beam = -(-allowed.shape[2] // BLOCK_SIZE)
    for block in np.unique(np.flatnonzero(~allowed[0, 0]) // BLOCK_SIZE):
        of_all_beams = slice(int(block), None, blocks_per_beam)
        masked_BNW = jnp.where(allowed_BMW[:, of_all_beams], logits_BMW[:, of_all_beams], -jnp.inf)
        max_BM = max_BM.at[:, of_all_beams].set(jnp.max(masked_BNW, axis=2))
    return max_BM[:, :, None]


def _mask_invalid(values: jax.Array, allowed: jax.Array | np.ndarray | bool) -> jax.Array:
    """NEG_INF where a value is not allowed or invalid; NaN, of a hypothesis without a possible token, is invalid."""
    return jnp.where(is_valid(values) & allowed, values, NEG_INF)
