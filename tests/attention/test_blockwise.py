"""Attention by blocks against the plain path: values, gradients, memory, dropout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import slow
from transformer.attention import dot_product
from transformer.attention.blockwise import blockwise_attention
from transformer.attention.mask import AttentionMask

B, H, K = 2, 2, 8


def draw(seed, length, width=K, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(B, length, H, width)), dtype)


def segments(seed, length, padding):
    """Ascending segment numbers, a few of them, then padding."""
    rng = np.random.default_rng(seed)
    rows = np.sort(rng.integers(1, 4, (B, length)), axis=1)
    rows[:, length - padding :] = 0
    return jnp.asarray(rows, jnp.int32)


def cases(queries, keys):
    return {
        "everything": AttentionMask(),
        "padding": AttentionMask(kv_segment_ids_BS=segments(0, keys, 3)),
        "causal": AttentionMask(causal=True),
        "segments": AttentionMask(segments(1, queries, 2), segments(2, keys, 1)),
        "causal segments": AttentionMask(segments(1, queries, 2), segments(1, queries, 2), causal=True),
    }


@pytest.mark.parametrize("lengths", [slow((32, 32)), slow((27, 27)), (19, 30), slow((5, 5))], ids=str)
@pytest.mark.parametrize("kind", [slow(kind) if kind != "causal segments" else kind for kind in cases(1, 4)])
def test_values_and_gradients_are_those_of_the_plain_path(kind, lengths):
    queries, keys = lengths
    if "causal" in kind:
        keys = queries
    visible = cases(queries, keys)[kind]
    q, k, v = draw(3, queries), draw(4, keys), draw(5, keys, K + 2)
    mask = jnp.broadcast_to(visible.materialize(queries, keys), (B, 1, queries, keys))
    real = 1 if visible.q_segment_ids_BT is None else visible.q_segment_ids_BT
    sees = (mask.any(-1)[:, 0] & (real != 0))[..., None, None]  # the others' results are not used
    weight = jnp.where(sees, draw(6, queries, K + 2), 0.0)

    def total(attend):
        return lambda *qkv: (attend(*qkv) * weight).sum()

    def plain(*qkv):
        return dot_product.dot_product_attention(*qkv, mask)

    def blockwise(*qkv):
        return blockwise_attention(*qkv, visible, block=8)

    np.testing.assert_allclose(*(jnp.where(sees, attend(q, k, v), 0.0) for attend in (blockwise, plain)), atol=1e-5)
    want = jax.grad(total(plain), (0, 1, 2))(q, k, v)
    for one, other in zip(jax.grad(total(blockwise), (0, 1, 2))(q, k, v), want, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.slow
def test_a_query_that_sees_no_key_gives_finite_output_and_gradient():
    visible = AttentionMask(jnp.full((B, 9), 7, jnp.int32), jnp.ones((B, 9), jnp.int32))
    q, k, v = (draw(seed, 9) for seed in range(3))
    value, grads = jax.value_and_grad(lambda *qkv: blockwise_attention(*qkv, visible, block=4).sum(), (0, 1, 2))(
        q, k, v
    )
    assert np.isfinite(value)
    assert all(np.isfinite(grad).all() for grad in grads)


@pytest.mark.slow
def test_bfloat16_is_as_near_as_the_plain_path():
    q, k, v = (draw(seed, 40, dtype=jnp.bfloat16) for seed in range(3))
    got = blockwise_attention(q, k, v, AttentionMask(causal=True), block=8)
    exact = dot_product.dot_product_attention(
        *(array.astype(jnp.float32) for array in (q, k, v)), AttentionMask(causal=True).materialize(40, 40)
    )
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), exact, atol=0.02)


@pytest.mark.slow
def test_dropout_drops_the_same_weights_in_value_and_gradient():
    """With values of 1 and one key's gradient at a time, output and gradient tell which weights were kept."""
    rate, key = 0.3, jax.random.key(0)
    q, k = draw(0, 24), draw(1, 24)
    v = jnp.eye(24, dtype=jnp.float32)[None, :, None, :] * jnp.ones((B, 1, H, 1), jnp.float32)

    def weights(v):
        return blockwise_attention(q, k, v, AttentionMask(), rate, key, block=8)

    plain = dot_product.dot_product_attention(q, k, v, jnp.ones((1, 1, 1, 24), bool))
    got = np.asarray(weights(v))
    kept = got != 0
    np.testing.assert_allclose(got[kept], np.asarray(plain)[kept] / (1 - rate), rtol=1e-5)
    assert abs(kept.mean() - (1 - rate)) < 0.05
    grad = jax.grad(lambda v: weights(v)[0, 5, 1, 7])(v)
    np.testing.assert_allclose(grad[0, :, 1, 7], got[0, 5, 1], atol=1e-6)


@pytest.mark.slow
def test_the_gradient_through_dropout_is_that_of_finite_differences():
    q, k, v = (draw(seed, 12) for seed in range(3))
    weight = draw(4, 12)

    def total(q):
        return (
            blockwise_attention(q, k, v, AttentionMask(causal=True), 0.3, jax.random.key(1), block=4) * weight
        ).sum()

    direction, step = draw(5, 12), 1e-2
    slope = (total(q + step * direction) - total(q - step * direction)) / (2 * step)
    np.testing.assert_allclose((jax.grad(total)(q) * direction).sum(), slope, rtol=2e-3)


def test_without_a_key_nothing_is_dropped():
    q, k, v = (draw(seed, 12) for seed in range(3))
    dropped = blockwise_attention(q, k, v, AttentionMask(), 0.5, None, block=4)
    np.testing.assert_array_equal(dropped, blockwise_attention(q, k, v, AttentionMask(), block=4))


def temporaries(attend, length):
    """Bytes of temporary arrays of a compiled gradient of causal attention."""
    shape = jax.ShapeDtypeStruct((1, length, 1, K), jnp.float32)
    gradient = jax.jit(jax.grad(lambda *qkv: attend(*qkv).sum(), (0, 1, 2)))
    return gradient.lower(shape, shape, shape).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_memory_grows_with_the_length_and_not_its_square():
    def blockwise(*qkv):
        return blockwise_attention(*qkv, AttentionMask(causal=True))

    def plain(q, k, v):
        return dot_product.dot_product_attention(
            q, k, v, AttentionMask(causal=True).materialize(q.shape[1], k.shape[1])
        )

    lengths = (4096, 16384, 65536)  # below these the blocks themselves weigh more
    used = [temporaries(blockwise, length) for length in lengths]
    assert used[2] - used[1] < 4.2 * (used[1] - used[0]) + 1e5
    assert temporaries(plain, 4096) > 10 * used[1]
    assert used[2] < temporaries(plain, 4096) / 4


@pytest.mark.slow
def test_dropout_draws_the_bits_of_the_plain_path_in_any_block():
    q, k, v, key = draw(0, 20), draw(1, 20), draw(2, 20), jax.random.key(3)
    wanted = dot_product.dot_product_attention(q, k, v, AttentionMask(causal=True).materialize(20, 20), 0.4, key)
    for block in (3, 8, 512):
        got = blockwise_attention(q, k, v, AttentionMask(causal=True), 0.4, key, block)
        np.testing.assert_allclose(got, wanted, atol=1e-5)
