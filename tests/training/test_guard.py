"""Spikes of the loss are skipped, the first few updates of each; numbers that are none change nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from transformer.config import TrainConfig
from transformer.training import optimizer as optimizer_lib

PARAMS = {"w": jnp.ones((2, 3))}


def follow(losses, factor=2.0, most=2):
    """Which updates were made, and the last state."""
    optimizer = optimizer_lib.skip_spikes(optax.adam(0.1), TrainConfig(spike_factor=factor, max_skipped_updates=most))
    state, made = optimizer.init(PARAMS), []
    update = jax.jit(lambda grads, state, value: optimizer.update(grads, state, PARAMS, value=value))
    with jax.numpy_dtype_promotion("standard"):
        for loss in losses:
            updates, after = update(PARAMS, state, jnp.float32(loss))
            made.append(bool((updates["w"] != 0).any()))
            count = [int(each.inner[0].count) for each in (state, after)]
            assert count[1] - count[0] == made[-1]  # what is skipped is not counted by the optimizer either
            state = after
    return made, state


@pytest.mark.slow
@pytest.mark.parametrize(
    ("losses", "made", "skipped"),
    [
        ([9, 8, 7, 6], [1, 1, 1, 1], 0),
        ([4, 4, 9, 4], [1, 1, 0, 1], 1),
        ([4, 9, 9, 9, 9, 4, 9], [1, 0, 0, 1, 1, 1, 0], 3),  # at most two of one spike; a new one begins anew
        ([4, 7.9, 4], [1, 1, 1], 0),
        ([100, 4, 4], [1, 1, 1], 0),  # there is no mean to measure the first by
    ],
)
def test_the_first_updates_of_a_spike_are_skipped(losses, made, skipped):
    result, state = follow(losses)
    assert result == [bool(each) for each in made]
    assert int(state.skipped) == int(optimizer_lib.num_skipped(state)) == skipped


def test_the_mean_follows_the_updates_that_are_made():
    assert float(follow([4])[1].mean) == 4
    assert float(follow([4, 9])[1].mean) == 4
    assert float(follow([4, 6])[1].mean) == pytest.approx(
        optimizer_lib.LOSS_EMA_DECAY * 4 + (1 - optimizer_lib.LOSS_EMA_DECAY) * 6
    )
    assert all(follow([4] + [9] * 80)[0][3:])  # no longer a spike once the mean has followed
    assert int(follow([4] + [9] * 80)[1].length) == 0


def test_a_skipped_update_leaves_params_moments_and_count_as_they_were():
    before, after = follow([4, 4])[1], follow([4, 4, 9])[1]
    jax.tree.map(np.testing.assert_array_equal, before.inner, after.inner)


def test_without_a_factor_nothing_is_kept_or_skipped():
    optimizer = optimizer_lib.skip_spikes(optax.sgd(0.1), TrainConfig())
    state = optimizer.init(PARAMS)
    assert jax.tree.structure(state) == jax.tree.structure(optax.sgd(0.1).init(PARAMS))
    assert optimizer_lib.num_skipped(state) == 0
    assert (optimizer.update(PARAMS, state, PARAMS, value=jnp.float32(1e9))[0]["w"] != 0).all()
