"""The best continuations by blocks are those of all log-probabilities in order, to the bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import slow
from transformer.decoding import top_k
from transformer.decoding.base import NEG_INF

B, N = 6, 3


def plain(logits, allowed, alive, count):
    everything = top_k.masked_log_probs(logits, allowed, alive)
    return jax.lax.top_k(everything.reshape(B, -1), count)


def logits_of(kind, vocab_size):
    rng = np.random.default_rng(0)
    logits = rng.normal(scale=3, size=(B, N, vocab_size)).astype(np.float32)
    if kind == "ties":
        logits = np.round(logits)
    if kind == "bad":
        logits[0, 0, 7], logits[1, 1, 9], logits[2, 2] = np.nan, np.inf, -np.inf
        logits[3, :, 5:] = -np.inf
    return jnp.asarray(logits, jnp.bfloat16 if kind == "bfloat16" else jnp.float32)


@pytest.mark.parametrize("vocab_size", [slow(640), 1000])
@pytest.mark.parametrize("kind", ["plain", "ties", "bad", "bfloat16"])
@pytest.mark.parametrize("by_sentence", [False, True])
def test_blocks_find_what_top_k_finds(kind, vocab_size, by_sentence):
    rng = np.random.default_rng(1)
    logits, alive = logits_of(kind, vocab_size), jnp.asarray(-rng.exponential(size=(B, N)), jnp.float32)
    alive = alive.at[4, 1].set(NEG_INF)
    allowed = np.ones((1, 1, vocab_size), bool)
    allowed[0, 0, :2] = False
    if by_sentence:
        allowed = jnp.asarray(allowed & (rng.random((B, N, vocab_size)) < 0.01))
    for count in (1, 2 * N - 1):
        assert N * vocab_size >= top_k.MIN_BLOCKS_PER_CANDIDATE * top_k.BLOCK_SIZE * count
        got = jax.jit(lambda *given, n=count: top_k.blockwise_top_k(*given[:1], allowed, *given[1:], n))(logits, alive)
        want = jax.jit(lambda *given, n=count: plain(*given[:1], allowed, *given[1:], n))(logits, alive)
        np.testing.assert_array_equal(got[1], want[1])
        assert np.asarray(got[0]).tobytes() == np.asarray(want[0]).tobytes()


def test_few_tokens_are_all_compared():
    logits, alive, allowed = logits_of("plain", 64), jnp.zeros((B, N), jnp.float32), np.ones((1, 1, 64), bool)
    got, want = (find(logits, allowed, alive, 5) for find in (top_k.blockwise_top_k, plain))
    np.testing.assert_array_equal(got[1], want[1])
