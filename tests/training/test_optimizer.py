"""The schedule by the paper's formula, the optimizer by its own; every field changes something."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import small_config
from transformer.training.optimizer import make_optimizer, make_schedule


def schedule(**fields):
    config = small_config(optimizer={"warmup_steps": 4000, **fields}, train={"num_steps": 10_000})
    return make_schedule(config), config


@pytest.mark.parametrize("step", [1, 10, 3999, 4000, 4001, 100_000])
def test_paper_schedule_is_equation_3(step):
    function, config = schedule(learning_rate=2.0)
    want = 2.0 * config.model.emb_dim**-0.5 * min(step**-0.5, step * 4000**-1.5)
    np.testing.assert_allclose(function(step - 1), want, rtol=1e-5)


@pytest.mark.parametrize("name", ["inverse_sqrt", "cosine", "linear", "constant"])
def test_other_schedules_rise_to_the_peak(name):
    function, _ = schedule(schedule=name, learning_rate=0.3)
    np.testing.assert_allclose(function(1999), 0.15, rtol=1e-3)
    np.testing.assert_allclose(function(3999), 0.3, rtol=1e-3)
    after = {"inverse_sqrt": 0.3 * (4000 / 7000) ** 0.5, "cosine": 0.15, "linear": 0.15, "constant": 0.3}
    np.testing.assert_allclose(function(6999), after[name], rtol=2e-3)
    end = {"inverse_sqrt": 0.3 * 0.4**0.5, "cosine": 0.0, "linear": 0.0, "constant": 0.3}
    np.testing.assert_allclose(function(9999), end[name], atol=1e-4)


def test_a_schedule_without_warm_up_starts_at_its_peak():
    function, _ = schedule(schedule="constant", warmup_steps=0, learning_rate=0.3)
    assert float(function(0)) == pytest.approx(0.3)


PARAMS = {"kernel": jnp.full((2, 2), 2.0), "bias": jnp.full((2,), 2.0)}
GRADS = {"kernel": jnp.asarray([[3.0, 0.0], [0.0, 4.0]]), "bias": jnp.zeros((2,))}


def update(grads=None, **fields):
    config = small_config(optimizer={"schedule": "constant", "warmup_steps": 0, "learning_rate": 0.1, **fields})
    optimizer = make_optimizer(config)
    state = optimizer.init(PARAMS)
    with jax.numpy_dtype_promotion("standard"):
        for gradient in grads or (GRADS, jax.tree.map(lambda g: g * 0.5, GRADS)):
            updates, state = optimizer.update(gradient, state, PARAMS)
    return updates


def test_adam_is_its_own_formula():
    got = update(beta1=0.9, beta2=0.98, epsilon=1e-9)
    g1, g2 = np.asarray(GRADS["kernel"]), 0.5 * np.asarray(GRADS["kernel"])
    m = (0.9 * 0.1 * g1 + 0.1 * g2) / (1 - 0.9**2)
    v = (0.98 * 0.02 * g1**2 + 0.02 * g2**2) / (1 - 0.98**2)
    np.testing.assert_allclose(got["kernel"], -0.1 * m / (np.sqrt(v) + 1e-9), rtol=1e-5)


def test_weight_decay_is_decoupled_and_spares_biases():
    plain, decayed = update(name="adam"), update(name="adamw", weight_decay=0.5)
    np.testing.assert_allclose(decayed["kernel"], plain["kernel"] - 0.1 * 0.5 * 2.0, rtol=1e-6)
    np.testing.assert_array_equal(decayed["bias"], plain["bias"])


def test_clipping_is_by_the_global_norm():
    """Adam forgets a common scale, so two steps are taken of which clipping shrinks the first alone."""
    small = jax.tree.map(lambda g: g * 0.5, GRADS)  # norm 2.5, under the bound; the first has norm 5
    scaled = jax.tree.map(lambda g: g * (3.5 / 5), GRADS)
    jax.tree.map(np.testing.assert_allclose, update(clip_norm=3.5), update(grads=(scaled, small)))
    jax.tree.map(np.testing.assert_array_equal, update(clip_norm=100.0), update())
    assert not np.allclose(update(clip_norm=3.5)["kernel"], update()["kernel"])


@pytest.mark.parametrize(("field", "value"), [("beta1", 0.5), ("beta2", 0.5), ("epsilon", 1.0), ("learning_rate", 0.2)])
def test_every_field_changes_the_update(field, value):
    assert not np.allclose(update(**{field: value})["kernel"], update()["kernel"])
