"""Sampling against the distribution it claims to draw from, and its independence of everything else."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.chains import (
    BOS,
    EOS,
    PAD,
    chain_step,
    every_hypothesis,
    hand_made_chain,
    log_softmax,
    penalty,
    random_chains,
    texts,
)
from transformer.decoding.base import NEG_INF, SpecialIds
from transformer.decoding.logits_processors import LogitsConstraints
from transformer.decoding.sampling import SamplingConfig, sample, top_p_threshold, warp_logits


def config_of(num_samples=1, max_length=1, **distribution):
    return SamplingConfig(num_samples, max_length, SpecialIds(PAD, BOS, EOS), length_penalty=0.6, **distribution)


@functools.partial(jax.jit, static_argnames=("config", "constraints"))
def draw_chains(logits_BTVV, limits_B, keys_B, config, constraints):
    step = chain_step(logits_BTVV)
    return sample(step, (), limits_B, keys_B, config, constraints=LogitsConstraints(**dict(constraints)))


def draw(chains, num_samples, limits=None, keys=None, distribution=None, **constraints):
    limits_B = np.full(len(chains), chains.shape[1]) if limits is None else limits
    keys_B = jax.random.split(jax.random.key(0), len(chains)) if keys is None else keys
    result = draw_chains(
        jnp.asarray(chains),
        jnp.asarray(limits_B, jnp.int32),
        keys_B,
        config_of(num_samples, chains.shape[1], **(distribution or {})),
        tuple(constraints.items()),
    )
    return jax.tree.map(np.asarray, result)


def plain_shape(probabilities, temperature=1.0, top_k=0, top_p=1.0):
    """What the fields mean, in plain Python."""
    p = np.where(probabilities > 0, probabilities ** (1 / temperature), 0)
    order = np.argsort(-p)
    if top_k:
        p[order[top_k:]] = 0
    p /= p.sum()
    order = np.argsort(-p)
    kept = np.searchsorted(np.cumsum(p[order]), top_p) + 1
    p[order[kept:]] = 0
    return p / p.sum()


SHAPES = [
    {},
    {"temperature": 0.5},
    {"temperature": 3.0},
    {"top_k": 1},
    {"top_k": 3},
    {"top_k": 99},
    {"top_p": 0.3},
    {"top_p": 0.9},
    {"temperature": 2.0, "top_k": 4, "top_p": 0.7},
]


@pytest.mark.parametrize("fields", SHAPES)
def test_the_distribution_is_the_one_the_fields_describe(fields):
    logits = np.random.default_rng(0).normal(scale=2, size=(5, 4, 9)).astype(np.float32)
    logits[..., [PAD, BOS]] = -np.inf
    got = np.asarray(jax.nn.softmax(warp_logits(jax.nn.log_softmax(jnp.asarray(logits)), config_of(**fields))))
    for row, probabilities in zip(got.reshape(-1, 9), np.exp(log_softmax(logits)).reshape(-1, 9), strict=True):
        np.testing.assert_allclose(row, plain_shape(probabilities, **fields), atol=1e-5)


def test_the_nucleus_of_ties_and_of_one():
    probs = jnp.array([[[0.25, 0.25, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0], [0.5, 0.25, 0.125, 0.125]]])
    assert top_p_threshold(probs, 0.5)[0, :, 0].tolist() == [0.25, 1.0, 0.5]
    assert top_p_threshold(probs, 0.6)[0, :, 0].tolist() == [0.25, 1.0, 0.25]


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, {"temperature": 0.6, "top_p": 0.9}])
def test_samples_are_as_frequent_as_they_are_probable(fields):
    """40,000 samples of a chain with 15 hypotheses: total variation from the exact distribution under 0.02."""
    chain = random_chains(0, 1, 3, vocab_size=5)
    result = draw(chain, 40_000, distribution=fields)
    log_probs = log_softmax(chain[0])
    log_probs[..., [PAD, BOS]] = -np.inf
    with np.errstate(divide="ignore"):
        shaped = np.log(np.apply_along_axis(plain_shape, -1, np.exp(log_probs) / 1.0, **fields))
    expected = {tokens: np.exp(value) for tokens, value in every_hypothesis(shaped, 3, [3, 4]).items()}
    assert sum(expected.values()) == pytest.approx(1)
    counts = {}
    for tokens in texts(result, 0):
        counts[tuple(tokens)] = counts.get(tuple(tokens), 0) + 1 / 40_000
    assert sum(abs(expected[t] - counts.get(t, 0)) for t in expected) / 2 < 0.02
    assert set(counts) <= set(expected)


@pytest.mark.parametrize("form", ["gnmt", "length"])
def test_scores_are_those_of_the_model_whatever_the_shape(form):
    chains = random_chains(1, 4, 6, vocab_size=8, eos_logit=1.0)
    result = draw(chains, 20, distribution={"temperature": 2.0, "top_k": 5, "length_penalty_form": form})
    for sentence in range(4):
        log_probs, got = log_softmax(chains[sentence]), texts(result, sentence)
        assert len(got) == 20
        for slot, tokens in enumerate(got):
            value = sum(
                log_probs[t, last, token] for t, (last, token) in enumerate(zip([BOS, *tokens], tokens, strict=False))
            )
            divisor = penalty(len(tokens), 0.6) if form == "gnmt" else len(tokens) ** 0.6
            assert result.scores_BN[sentence, slot] == pytest.approx(value / divisor, rel=1e-4)
            assert result.finished_BN[sentence, slot] == (tokens[-1] == EOS)
            assert tokens[-1] == EOS or len(tokens) == 6
            assert EOS not in tokens[:-1]


def test_a_sample_depends_on_its_key_and_its_number_alone():
    chains, keys = random_chains(2, 6, 8, vocab_size=9), jax.random.split(jax.random.key(1), 6)
    limits = np.array([8, 3, 5, 8, 1, 0])
    together = draw(chains, 5, limits, keys)
    turned = draw(chains[::-1], 5, limits[::-1], keys[::-1])
    fewer = draw(chains[:2], 3, limits[:2], keys[:2])
    np.testing.assert_array_equal(together.tokens_BNT, turned.tokens_BNT[::-1])
    np.testing.assert_array_equal(together.tokens_BNT[:2, :3], fewer.tokens_BNT)
    assert len({tuple(tokens) for tokens in texts(together, 0)}) == 5
    other = draw(chains, 5, limits, jax.random.split(jax.random.key(2), 6))
    assert (other.tokens_BNT[0] != together.tokens_BNT[0]).any()
    assert [together.lengths_BN[i].max() for i in (1, 4, 5)] == [3, 1, 0]
    assert (together.scores_BN[5] == NEG_INF).all()


def test_equal_sentences_with_equal_keys_have_equal_samples():
    chain = random_chains(3, 1, 8, vocab_size=9)
    keys = jnp.stack([jax.random.key(7), jax.random.key(7)])
    result = draw(np.repeat(chain, 2, axis=0), 4, keys=keys)
    np.testing.assert_array_equal(result.tokens_BNT[0], result.tokens_BNT[1])


def test_restrictions_hold_for_samples():
    result = draw(random_chains(4, 8, 6, vocab_size=8, eos_logit=2.0), 30, min_length=3, no_repeat_ngram=1)
    for sentence in range(8):
        for tokens in texts(result, sentence):
            assert len(tokens) > 3
            assert len(set(tokens)) == len(tokens)


def test_a_dead_end_gives_an_empty_sample():
    for bad in (-np.inf, np.nan):
        chains = np.repeat(hand_made_chain({(0, BOS): {3: 1.0}}), 2, axis=0)
        chains[0, 1, 3] = bad
        result = draw(chains, 2)
        assert texts(result, 0) == []
        assert texts(result, 1) == [[3, EOS], [3, EOS]]
        assert not result.finished_BN[0].any()


def test_nothing_sorts_the_vocabulary():
    chains = jnp.asarray(random_chains(5, 3, 6, vocab_size=50))
    arguments = (chains, jnp.full(3, 6, jnp.int32), jax.random.split(jax.random.key(0), 3))
    config = config_of(4, 6, temperature=0.7, top_k=10, top_p=0.9)
    program = draw_chains.lower(*arguments, config, ()).compile().as_text()
    assert " sort(" not in program
