"""Minimum length, repeated n-grams and prefixes, against all hypotheses of a chain that obey them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.chains import (
    EOS,
    PAD,
    chain_step,
    every_hypothesis,
    log_softmax,
    penalty,
    random_chains,
    search_with,
    texts,
)
from transformer.decoding.logits_processors import LogitsConstraints, repeated_ngram_mask

SYMBOLS, LENGTH, WIDE = [3, 4, 5], 6, 487
CHAINS = random_chains(0, 20, LENGTH, vocab_size=6, eos_logit=1.0)
LIMITS = np.random.default_rng(0).integers(2, LENGTH + 1, size=len(CHAINS))


def compare(constraints, obeys, chains=CHAINS):
    """A wide beam must find all hypotheses for which `obeys(sentence, tokens)`, in the order of their scores."""
    shape = (len(chains), WIDE, LENGTH)
    run = jax.jit(lambda c: search_with(chain_step(c), (), shape, LIMITS, 0.6, constraints=constraints))
    result = jax.tree.map(np.asarray, run(jnp.asarray(chains)))
    changed = 0
    for sentence, limit in enumerate(LIMITS):
        everything = every_hypothesis(log_softmax(chains[sentence]), limit, SYMBOLS)
        scored = {t: (t[-1] == EOS, value / penalty(len(t), 0.6)) for t, value in everything.items()}
        obedient = {tokens: score for tokens, score in scored.items() if obeys(sentence, tokens)}
        got = [tuple(tokens) for tokens in texts(result, sentence)]
        assert set(got) <= set(obedient)
        assert len(got) == min(len(obedient), WIDE)
        assert got[0] == max(obedient, key=lambda tokens: obedient[tokens])
        ranked = [score for _, score in sorted(obedient.values(), reverse=True)][: len(got)]
        np.testing.assert_allclose(result.scores_BN[sentence, : len(got)], ranked, atol=1e-5)
        changed += got[0] != max(scored, key=lambda tokens: scored[tokens])
    assert changed > 2, "the restriction never changed the best hypothesis"


@pytest.mark.parametrize("least", [1, 3, 9])
def test_no_translation_is_shorter_than_its_minimum_or_its_limit(least):
    compare(
        LogitsConstraints(min_length=least),
        lambda sentence, tokens: tokens[-1] != EOS or len(tokens) - 1 >= min(least, LIMITS[sentence] - 1),
    )


def ngrams(tokens, order):
    return [tokens[i : i + order] for i in range(len(tokens) - order + 1)]


@pytest.mark.parametrize("order", [1, 2, 3, 7])
def test_no_ngram_occurs_twice(order):
    def obeys(_, tokens):
        return len(set(ngrams(tokens, order))) == len(ngrams(tokens, order))

    if order < 7:
        monotonous = CHAINS + np.where(np.arange(6) == 3, 6, 0) - np.where(np.arange(6) == EOS, 3, 0)
        compare(LogitsConstraints(no_repeat_ngram=order), obeys, monotonous.astype(np.float32))
    else:  # longer than any hypothesis: nothing is ruled out
        assert not repeated_ngram_mask(jnp.zeros((1, 1, 7), jnp.int32), jnp.int32(3), order, 6).any()


@pytest.mark.slow
def test_repeats_are_those_of_the_hypothesis_so_far():
    tokens = jnp.array([[[1, 3, 4, 3, 5, 3, PAD]]])
    banned = {
        (order, position): np.flatnonzero(repeated_ngram_mask(tokens, jnp.int32(position), order, 6)).tolist()
        for order in (1, 2, 3)
        for position in (0, 1, 3, 5)
    }
    assert banned[1, 0] == banned[2, 0] == banned[2, 1] == banned[3, 5] == []
    assert (banned[1, 1], banned[1, 3], banned[1, 5]) == ([3], [3, 4], [3, 4, 5])
    assert (banned[2, 3], banned[2, 5]) == ([4], [4, 5])


def test_translations_begin_with_their_prefix():
    rng = np.random.default_rng(1)
    prefixes = [rng.choice(SYMBOLS, rng.integers(0, limit)).tolist() for limit in LIMITS]
    prefix_BP = np.full((len(CHAINS), 8), PAD, np.int32)
    for row, prefix in zip(prefix_BP, prefixes, strict=True):
        row[: len(prefix)] = prefix
    assert {len(prefix) for prefix in prefixes} >= {0, 1, 4}
    compare(
        LogitsConstraints(prefix_BP=jnp.asarray(prefix_BP)),
        lambda sentence, tokens: list(tokens[: len(prefixes[sentence])]) == prefixes[sentence],
    )


@pytest.mark.slow
def test_a_prefix_stands_above_the_other_restrictions():
    """It repeats a token, and what follows it must not repeat one."""
    prefix_BP = jnp.asarray(np.tile(np.array([3, 3], np.int32), (len(CHAINS), 1)))
    limits = np.full(len(CHAINS), LENGTH)
    constraints = LogitsConstraints(min_length=4, no_repeat_ngram=1, prefix_BP=prefix_BP)
    result = search_with(
        chain_step(jnp.asarray(CHAINS)), (), (len(CHAINS), 4, LENGTH), limits, 0.6, constraints=constraints
    )
    for sentence in range(len(CHAINS)):
        best = texts(result, sentence)[0]
        assert best[:2] == [3, 3]
        assert sorted(best[2:]) == [EOS, 4, 5]
