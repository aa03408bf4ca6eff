"""The blocks: positions, embeddings, shapes of heads, dropout's places."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from transformer.attention import dropout
from transformer.attention.mask import AttentionMask
from transformer.config import ModelConfig
from transformer.models import layers


def config_of(width=8, **fields):
    return ModelConfig(**{"emb_dim": width, "qkv_dim": width, "value_dim": width, "num_heads": 2, **fields})


def test_sinusoids_are_those_of_the_paper():
    table = layers.sinusoidal_position_encoding(50, 16)
    for position, pair in [(0, 0), (1, 0), (7, 3), (49, 7)]:
        angle = position / 10000 ** (2 * pair / 16)
        np.testing.assert_allclose(table[position, 2 * pair : 2 * pair + 2], [np.sin(angle), np.cos(angle)], atol=1e-6)


def test_embedding_scales_by_root_of_width_and_logits_do_not():
    embedding = layers.Embedding(10, 16, nnx.Rngs(params=0))
    table = embedding.table[...]
    ids = jnp.asarray([[3, 9]])
    np.testing.assert_allclose(embedding(ids, jnp.float32), 4.0 * table[ids], rtol=1e-6)
    x = jnp.ones((1, 2, 16))
    np.testing.assert_allclose(embedding.logits(x), jnp.einsum("btd,vd->btv", x, table), rtol=1e-5)
    assert embedding.logits(x.astype(jnp.bfloat16)).dtype == jnp.float32


def test_feed_forward_is_equation_2():
    block = layers.FeedForward(config_of(4, mlp_dim=8), nnx.Rngs(params=0))
    block.bias_in[...] = jnp.linspace(-1, 1, 8)
    block.bias_out[...] = jnp.linspace(0, 1, 4)
    x = jax.random.normal(jax.random.key(3), (2, 3, 4))
    hidden = np.maximum(np.asarray(x) @ np.asarray(block.kernel_in[...]) + np.asarray(block.bias_in[...]), 0)
    want = hidden @ np.asarray(block.kernel_out[...]) + np.asarray(block.bias_out[...])
    np.testing.assert_allclose(block(x), want, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("qkv_dim", "value_dim"), [(8, 8), (4, 8), (16, 4)])
def test_key_and_value_widths_are_free_of_the_model_width(qkv_dim, value_dim):
    config = config_of(qkv_dim=qkv_dim, value_dim=value_dim, attention="plain")
    block = layers.MultiHeadAttention(config, nnx.Rngs(params=0))
    x = jax.random.normal(jax.random.key(4), (2, 3, 8))
    assert block(x, x, AttentionMask()).shape == (2, 3, 8)
    assert block.query[...].shape == block.key[...].shape == (8, 2, qkv_dim // 2)
    assert block.value[...].shape == (8, 2, value_dim // 2)


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_residual_puts_norm_and_dropout_where_the_paper_does(norm):
    block = layers.ResidualBlock(config_of(norm=norm, dropout_rate=0.5), nnx.Rngs(params=0))
    x = jax.random.normal(jax.random.key(5), (1, 2, 8))
    key = jax.random.key(6)

    def sublayer(y):
        return y * 2.0

    dropped = dropout.dropout(sublayer(x if norm == "post" else block.norm(x)), 0.5, key)
    want = block.norm(x + dropped) if norm == "post" else x + dropped
    np.testing.assert_allclose(block(x, sublayer, key), want, rtol=1e-6)
    assert not np.allclose(block(x, sublayer, key), block(x, sublayer))


def test_every_param_names_its_axes():
    block = layers.MultiHeadAttention(config_of(qk_norm=True), nnx.Rngs(params=0))
    for _, param in nnx.to_flat_state(nnx.state(block, nnx.Param)):
        assert len(param.get_metadata()["axes"]) == param.get_value().ndim


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-6), (jnp.bfloat16, 1e-2)])
def test_gelu_is_that_of_the_error_function(dtype, tolerance):
    given = jnp.linspace(-9, 9, 181).astype(dtype)
    x = np.asarray(given.astype(jnp.float32))
    phi = np.array([0.5 * math.erfc(-value / 2**0.5) for value in x])
    value, slope = jax.vmap(jax.value_and_grad(layers.gelu))(given)
    np.testing.assert_allclose(value.astype(jnp.float32), x * phi, rtol=tolerance, atol=tolerance)
    density = np.exp(-np.square(x) / 2) / (2 * np.pi) ** 0.5
    np.testing.assert_allclose(slope.astype(jnp.float32), phi + x * density, rtol=tolerance, atol=2 * tolerance)
