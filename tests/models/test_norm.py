"""The norms' hand-written gradient, and the dtypes of statistics and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from transformer.models.norm import normalize

EPSILON = 1e-6


def plain_norm(x, scale, bias, norm_type):
    x = x - x.mean(-1, keepdims=True) if norm_type == "layer" else x
    out = x / jnp.sqrt((x**2).mean(-1, keepdims=True) + EPSILON) * scale[None, None]
    return out if bias is None else out + bias[None, None]


every_norm = pytest.mark.parametrize(("norm_type", "has_bias"), [("layer", True), ("layer", False), ("rms", False)])


def norm_of(norm_type, has_bias):
    """The norm as a function of what is differentiated, and its plain form."""

    def norm(x, scale, *bias):
        return normalize(x, scale, *(bias or [None]), norm_type, EPSILON)

    def plain(x, scale, *bias):
        return plain_norm(x, scale, *(bias or [None]), norm_type)

    return norm, plain, (0, 1, 2) if has_bias else (0, 1)


@every_norm
def test_a_norm_and_its_gradients_equal_autodiff(norm_type, has_bias, program_platform):
    keys = jax.random.split(jax.random.key(0), 4)
    x, weight = (jax.random.normal(key, (3, 4, 8)) * 3 + 1 for key in keys[:2])
    scale, bias = (jax.random.normal(key, (8,)) for key in keys[2:])

    def objective(function):
        return lambda *inputs: (weight * function(*inputs)).sum()

    norm, plain, differentiated = norm_of(norm_type, has_bias)
    inputs = (x, scale, bias)[: len(differentiated)]
    got = jax.value_and_grad(objective(norm), differentiated)(*inputs)
    want = jax.value_and_grad(objective(plain), differentiated)(*inputs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), got, want)


@every_norm
def test_the_gradient_of_a_norm_by_finite_differences(norm_type, has_bias, program_platform):
    x = jax.random.normal(jax.random.key(1), (2, 3, 6))
    norm, _, differentiated = norm_of(norm_type, has_bias)
    inputs = (x, jnp.full((6,), 1.5), jnp.full((6,), 0.5))[: len(differentiated)]
    check_grads(norm, inputs, order=1, modes=["rev"], atol=2e-2, rtol=2e-2)


@every_norm
def test_a_norm_of_bfloat16_has_float32_statistics_and_gradients(norm_type, has_bias, program_platform):
    x = (jax.random.normal(jax.random.key(2), (2, 3, 64)) + 100).astype(jnp.bfloat16)
    norm, plain, differentiated = norm_of(norm_type, has_bias)
    inputs = (x, jnp.ones(64), jnp.zeros(64))[: len(differentiated)]
    out = norm(*inputs)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), plain(x.astype(jnp.float32), *inputs[1:]), atol=0.02)
    grads = jax.grad(lambda *a: norm(*a).astype(jnp.float32).sum(), differentiated)(*inputs)
    assert [g.dtype for g in grads] == [jnp.bfloat16, jnp.float32, jnp.float32][: len(grads)]
