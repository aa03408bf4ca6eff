"""Cross-entropy as sums: against a float64 reference, with padding, and added up over parts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer.data.tokenizer import PAD
from transformer.distributed import platform as platforms
from transformer.models.loss import cross_entropy

LOGITS = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4, 7)) * 3, jnp.float32)
TARGET = jnp.asarray([[4, 5, 2, PAD], [6, 2, PAD, PAD], [3, 3, 3, 2]], jnp.int32)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_equals_the_definition_in_float64(smoothing, program_platform):
    got = cross_entropy(LOGITS, TARGET, smoothing)
    logits = np.asarray(LOGITS, np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    objective = nll = correct = count = 0.0
    for b, t in np.argwhere(np.asarray(TARGET) != PAD):
        target = np.full(7, smoothing / 7)
        target[TARGET[b, t]] += 1 - smoothing
        objective -= target @ log_p[b, t]
        nll -= log_p[b, t, TARGET[b, t]]
        correct += log_p[b, t].argmax() == int(TARGET[b, t])
        count += 1
    np.testing.assert_allclose(got, [objective, nll, correct, count], rtol=1e-6)


def test_uneven_rows_add_up_to_one_batch():
    whole = cross_entropy(LOGITS, TARGET, 0.1)
    parts = [cross_entropy(LOGITS[i : i + 1], TARGET[i : i + 1], 0.1) for i in range(3)]
    np.testing.assert_allclose(np.sum(parts, axis=0), whole, rtol=1e-6)


def test_the_gradient_is_that_of_gathered_logits(monkeypatch):
    """Of the same sums on an accelerator, which compares instead."""

    def gradient(platform):
        monkeypatch.setattr(platforms, "current", lambda: platform)
        step = jax.jit(jax.grad(lambda logits: cross_entropy(logits, TARGET, 0.1).smoothed_nll))
        return step(LOGITS), str(jax.make_jaxpr(step)(LOGITS))

    (gathered, gather_program), (compared, compare_program) = gradient("cpu"), gradient("gpu")
    np.testing.assert_allclose(compared, gathered, rtol=1e-6, atol=1e-7)
    assert "scatter" in gather_program
    assert "scatter" not in compare_program


def test_padding_has_no_gradient_and_unknown_tokens_have_one(program_platform):
    grad = jax.grad(lambda logits: cross_entropy(logits, TARGET, 0.1).smoothed_nll)(LOGITS)
    np.testing.assert_array_equal(np.abs(grad).sum(-1) > 0, TARGET != PAD)


def test_logits_of_bfloat16_are_summed_in_float32():
    got = cross_entropy(LOGITS.astype(jnp.bfloat16), TARGET, 0.1)
    assert {value.dtype for value in got} == {jnp.dtype(jnp.float32)}
    np.testing.assert_allclose(got, cross_entropy(LOGITS, TARGET, 0.1), rtol=0.02)


def test_huge_logits_stay_finite():
    assert np.isfinite(cross_entropy(LOGITS * 1e30, TARGET, 0.1).smoothed_nll)
