"""How hypotheses are scored: the two length penalties, and coverage."""

import jax.numpy as jnp
import numpy as np

from transformer.decoding.base import NEG_INF, CoveragePenalty, is_valid, length_penalties


def test_length_penalties_are_those_of_their_formulas():
    lengths = np.arange(1, 11)
    np.testing.assert_allclose(length_penalties(10, 0.6)[1:], ((5 + lengths) / 6) ** 0.6, rtol=1e-6)
    np.testing.assert_allclose(length_penalties(10, 0.6, "length")[1:], lengths**0.6, rtol=1e-6)
    assert (length_penalties(10, 0.0, "length") == 1).all()
    assert (length_penalties(10, 2.0, "length") > 0).all()


def test_coverage_counts_what_is_left_out_and_never_rewards():
    """Wu et al. (2016), equation 14, by hand: ln 0.5 + ln 1; the third source is padding."""
    coverage = CoveragePenalty(2.0, jnp.array([[True, True, False]]))
    attended = jnp.array([[[0.5, 1.5, 0.0], [3.0, 1.0, 0.0], [0.0, 1.0, 0.0]]])
    got = coverage.score(attended)
    np.testing.assert_allclose(got[0, :2], [2 * np.log(0.5), 0], atol=1e-6)
    assert np.isfinite(got).all()
    assert got[0, 2] < -30
    assert coverage.init_state(4).shape == (1, 4, 3)


def test_nan_and_sums_with_the_impossible_are_not_possible():
    values = jnp.array([0.0, -1e6, NEG_INF, NEG_INF - 1e6, NEG_INF + 1e6, jnp.nan, -jnp.inf])
    assert is_valid(values).tolist() == [True, True, False, False, False, False, False]
