"""Attention against a float64 reference written another way, and its masks by gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer.attention import dot_product, dropout
from transformer.attention.mask import AttentionMask


def reference(q, k, v, mask):
    """Equation 1 of the paper for one head at a time, in float64."""
    out = np.zeros((*q.shape[:3], v.shape[3]), np.float64)
    B, T, H, K = q.shape
    mask = np.broadcast_to(mask, (B, 1, T, k.shape[1]))
    for b in range(B):
        for h in range(H):
            for t in range(T):
                score = q[b, t, h].astype(np.float64) @ k[b, :, h].astype(np.float64).T / np.sqrt(K)
                score[~mask[b, 0, t]] = -np.inf
                weight = np.exp(score - score.max())
                out[b, t, h] = (weight / weight.sum()) @ v[b, :, h]
    return out


def draw(seed, *shapes, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


@pytest.mark.parametrize("value_width", [4, 6])
@pytest.mark.parametrize("kind", ["none", "padding", "causal", "both"])
def test_equals_the_float64_reference(kind, value_width):
    q, k, v = draw(0, (3, 5, 2, 4), (3, 5, 2, 4), (3, 5, 2, value_width))
    is_token = jnp.asarray([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]], jnp.int32)
    mask = jnp.ones((1, 1, 1, 5), bool)
    if kind in ("padding", "both"):
        mask = mask & AttentionMask(kv_segment_ids_BS=is_token).materialize(5, 5)
    if kind in ("causal", "both"):
        mask = mask & AttentionMask(causal=True).materialize(5, 5)
    got = dot_product.dot_product_attention(q, k, v, mask)
    want = reference(*(np.asarray(a) for a in (q, k, v, mask)))
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_large_logits_stay_finite_and_right():
    q, k, v = draw(1, (1, 3, 1, 8), (1, 4, 1, 8), (1, 4, 1, 8))
    got = dot_product.dot_product_attention(100 * q, 100 * k, v, jnp.ones((1, 1, 1, 4), bool))
    everywhere = np.ones((1, 1, 1, 4), bool)
    want = reference(*(np.asarray(a) for a in (100 * q, 100 * k, v)), everywhere)
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_a_query_without_visible_keys_gives_finite_output_and_gradient():
    q, k, v = draw(2, (1, 2, 1, 4), (1, 3, 1, 4), (1, 3, 1, 4))
    nowhere = jnp.zeros((1, 1, 1, 3), bool)
    value, grad = jax.value_and_grad(lambda q: dot_product.dot_product_attention(q, k, v, nowhere).sum())(q)
    assert np.isfinite(value)
    assert np.isfinite(grad).all()


def test_softmax_of_bfloat16_is_taken_in_float32():
    q, k, v = draw(3, (2, 16, 2, 8), (2, 16, 2, 8), (2, 16, 2, 8), dtype=jnp.bfloat16)
    mask = AttentionMask(causal=True).materialize(16, 16)
    got = dot_product.dot_product_attention(q, k, v, mask)
    want = reference(*(np.asarray(a, np.float64) for a in (q, k, v)), np.asarray(mask))
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(got, np.float64), want, atol=0.008)  # 0.012 with a softmax in bfloat16


def test_dropout_keeps_the_mean_and_needs_a_key():
    x = jnp.ones((200, 200), jnp.float32)
    dropped = dropout.dropout(x, 0.25, jax.random.key(0))
    assert set(np.unique(dropped)) == {np.float32(0), np.float32(1 / 0.75)}
    assert abs(float(dropped.mean()) - 1) < 0.01
    assert dropout.dropout(x, 0.25, None) is x
    assert dropout.dropout(x, 0.0, jax.random.key(0)) is x


@pytest.mark.slow
@pytest.mark.parametrize("rate", [0.001, 0.1, 0.3, 0.99])
def test_dropout_has_the_rate_asked_for_though_a_byte_knows_256_only(rate):
    x = jnp.ones((64, 30), jnp.float32)
    dropped = jax.vmap(lambda key: dropout.dropout(x, rate, key))(jax.random.split(jax.random.key(0), 2000))
    assert abs(float((dropped == 0).mean()) - rate) < min(0.003, 0.2 * rate)
    kept = np.unique(dropped[dropped > 0])
    np.testing.assert_allclose(kept, 1 / (1 - rate), rtol=1e-5)


def test_dropout_draws_each_element_and_each_call_by_itself():
    """Four elements share a word, and rows share a call: neither may show."""
    dropped = dropout.dropout(jnp.ones((4000, 8), jnp.float32), 0.5, jax.random.key(0)) > 0
    together = np.corrcoef(np.asarray(dropped, np.float64).T)
    assert np.abs(together - np.eye(8)).max() < 0.06
    other = dropout.dropout(jnp.ones((4000, 8), jnp.float32), 0.5, jax.random.key(1)) > 0
    assert abs(float((dropped == other).mean()) - 0.5) < 0.02


def test_attention_dropout_changes_the_weights():
    q, k, v = draw(4, (1, 3, 1, 4), (1, 3, 1, 4), (1, 3, 1, 4))
    mask = AttentionMask(causal=True).materialize(3, 3)
    plain = dot_product.dot_product_attention(q, k, v, mask, 0.5)
    dropped = dot_product.dot_product_attention(q, k, v, mask, 0.5, jax.random.key(1))
    assert not np.allclose(plain, dropped)


def test_cached_attention_equals_causal_attention_position_by_position():
    B, N, T, H, K = 2, 3, 5, 2, 4
    q, k, v = draw(5, (B * N, T, H, K), (B * N, T, H, K), (B * N, T, H, K))
    want = dot_product.dot_product_attention(q, k, v, AttentionMask(causal=True).materialize(T, T)).reshape(
        B, N, T, H, K
    )
    # Slots not yet written hold rubbish, which must not be seen; so do the other beams' slots.
    own = jnp.broadcast_to(jnp.arange(N, dtype=jnp.int32)[None, :, None], (B, N, T))
    cache = jnp.full((B, H, K, T * N), 1e3, jnp.float32), jnp.full((B, H, T * N, K), 1e3, jnp.float32)
    for position in range(T):
        at = jnp.int32(position)
        cache = dot_product.write_cache(*cache, *(one.reshape(B, N, T, H, K)[:, :, position] for one in (k, v)), at)
        for history in (own, None):  # no beam moves
            got = dot_product.cached_attention(q.reshape(B, N, T, H, K)[:, :, position], *cache, history, at)
            np.testing.assert_allclose(got, want[:, :, position], atol=1e-6)


def test_a_hypothesis_sees_the_past_that_its_ancestors_wrote():
    """One query over slots picked from several beams equals plain attention over those slots in a row."""
    B, N, T, H, K = 2, 3, 4, 2, 4
    q, k, v = draw(6, (B, N, H, K), (B, N, T, H, K), (B, N, T, H, K))
    ancestors = jnp.asarray(np.random.default_rng(7).integers(0, N, (B, N, T)), jnp.int32)
    cache = k.transpose(0, 3, 4, 2, 1).reshape(B, H, K, T * N), v.transpose(0, 3, 2, 1, 4).reshape(B, H, T * N, K)
    got = dot_product.cached_attention(q, *cache, ancestors, jnp.int32(2))
    for b in range(B):
        for n in range(N):
            path = [(b, int(ancestors[b, n, t]), t) for t in range(3)]
            keys, values = (jnp.stack([array[at] for at in path])[None] for array in (k, v))
            want = dot_product.dot_product_attention(q[b, n][None, None], keys, values, jnp.ones((1, 1, 1, 3), bool))
            np.testing.assert_allclose(got[b, n], want[0, 0], atol=1e-6)


SEGMENTS = {
    "q_segment_ids_BT": jnp.asarray([[1, 1, 2, 2, 2, 0], [1, 2, 3, 3, 0, 0]], jnp.int32),
    "kv_segment_ids_BS": jnp.asarray([[1, 2, 2, 2, 0], [1, 1, 2, 3, 3]], jnp.int32),
}


@pytest.mark.parametrize("causal", [False, True])
def test_segments_see_their_own_kind_only(causal):
    mask = np.broadcast_to(AttentionMask(**SEGMENTS, causal=causal).materialize(6, 5), (2, 1, 6, 5))
    for b, t, s in np.ndindex(2, 6, 5):
        same = SEGMENTS["q_segment_ids_BT"][b, t] == SEGMENTS["kv_segment_ids_BS"][b, s]
        assert mask[b, 0, t, s] == (same and (s <= t or not causal))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_a_block_of_the_mask_is_that_block_of_the_whole(causal, packed):
    visible = AttentionMask(SEGMENTS["q_segment_ids_BT"] if packed else None, SEGMENTS["kv_segment_ids_BS"], causal)
    whole = np.broadcast_to(visible.materialize(6, 5), (2, 1, 6, 5))
    block = np.broadcast_to(visible.materialize(3, 2, jnp.int32(2), jnp.int32(1)), (2, 1, 3, 2))
    np.testing.assert_array_equal(block, whole[:, :, 2:5, 1:3])


def test_filled_up_rows_and_lengths_leave_the_others_bits_as_they_are():
    """So no mesh changes what is dropped, whatever it fills up."""
    key = jax.random.key(0)
    small = dropout.dropout(jnp.ones((3, 5, 4)), 0.5, key)
    large = dropout.dropout(jnp.ones((8, 9, 4)), 0.5, key)
    np.testing.assert_array_equal(large[:3, :5], small)
    assert not np.array_equal(small[0], small[1])
    assert not np.array_equal(small, dropout.dropout(jnp.ones((3, 5, 4)), 0.5, jax.random.key(1)))


@pytest.mark.parametrize("rate", [0.1, 0.7])
def test_as_many_weights_are_dropped_as_asked_and_each_by_itself(rate):
    words = dropout.head_seeds(jax.random.key(2), rate, 3, 4)
    keep = np.asarray(dropout.attention_keep_mask(words, rate, jnp.int32(0), 64, jnp.int32(0), 64))
    assert abs(keep.mean() - (1 - rate)) < 0.01
    for axis in range(4):  # neighbours along no axis know of each other
        one, other = np.split(keep, 2, axis) if axis == 1 else (keep.take(0, axis), keep.take(1, axis))
        expected = (1 - rate) ** 2 + rate**2
        assert abs((one == other).mean() - expected) < 0.06
    part = dropout.attention_keep_mask(words, rate, jnp.int32(7), 5, jnp.int32(20), 9)
    np.testing.assert_array_equal(part, keep[:, :, 7:12, 20:29])
