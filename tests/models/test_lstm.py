"""The LSTM against its equations written out, its gradient against autodiff of them, and what its loops hold."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import slow
from transformer.models import lstm
from transformer.models.lstm import LstmState, LstmWeights

B, T, D, H = 2, 5, 3, 4
KEEP = jnp.asarray([[0, 1, 1, 0, 1], [1, 1, 0, 0, 1]], bool)


def made():
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = ((B, T, D), (D, 4 * H), (H, 4 * H), (4 * H,))
    x, *weights = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))
    return x, LstmWeights(*weights)


def plain(x_BTD, weights, keep_BT=None, reverse=False):
    """Hochreiter and Schmidhuber's equations, one place after the other."""
    h = c = jnp.zeros((B, H))
    result = [None] * T
    for t in reversed(range(T)) if reverse else range(T):
        if keep_BT is not None:
            h, c = (jnp.where(keep_BT[:, t, None], value, 0.0) for value in (h, c))
        gates = x_BTD[:, t] @ weights.input_DG + h @ weights.state_HG + weights.bias_G[None]
        i, f, o, g = jnp.split(gates, 4, axis=-1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        result[t] = h
    return jnp.stack(result, 1)


@pytest.mark.parametrize("reverse", [slow(False), True])
@pytest.mark.parametrize("keep_BT", [slow(None, id="on"), pytest.param(KEEP, id="anew")])
def test_states_and_gradients_are_those_of_the_equations(reverse, keep_BT):
    arguments, weigh = made(), jax.random.normal(jax.random.key(9), (B, T, H))

    def value(function):
        return jax.jit(jax.value_and_grad(lambda x, w: (function(x, w, keep_BT, reverse) * weigh).sum(), (0, 1)))

    for got, want in zip(
        jax.tree.leaves(value(lstm.lstm)(*arguments)), jax.tree.leaves(value(plain)(*arguments)), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_steps_one_by_one_are_the_same():
    x_BTD, weights = made()
    state = LstmState(jnp.zeros((B, H)), jnp.zeros((B, H)))
    for t in range(T):
        gates = x_BTD[:, t] @ weights.input_DG + state.h @ weights.state_HG + weights.bias_G[None]
        state, _ = lstm.lstm_cell(gates, state)
    np.testing.assert_allclose(state.h, lstm.lstm(x_BTD, weights)[:, -1], rtol=1e-5, atol=1e-6)


def test_each_loop_holds_one_product_and_the_rest_is_outside():
    """What makes it fast: no gradient of weights and no product with the input inside."""

    def products(jaxpr):
        return sum(equation.primitive.name == "dot_general" for equation in jaxpr.eqns)

    def loops(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "scan":
                yield equation.params["jaxpr"].jaxpr
            else:
                for value in equation.params.values():
                    inner = getattr(value, "jaxpr", value)
                    yield from loops(inner) if hasattr(inner, "eqns") else ()

    traced = jax.make_jaxpr(jax.grad(lambda x, w: lstm.lstm(x, w).sum(), (0, 1)))(*made())
    assert [products(body) for body in loops(traced.jaxpr)] == [1, 1]


def test_bfloat16_keeps_its_memory_in_float32():
    x_BTD, weights = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), made())
    got = lstm.lstm(x_BTD, weights)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), lstm.lstm(*made()), atol=0.05)
    state = LstmState(got[:, 0], jnp.zeros((B, H)))
    assert lstm.lstm_cell(x_BTD[:, 0] @ weights.input_DG, state)[0].c.dtype == jnp.float32
