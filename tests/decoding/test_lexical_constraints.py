"""Phrases that translations must hold: against all hypotheses that hold them, and in beams too narrow to see all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.chains import (
    BOS,
    EOS,
    PAD,
    attending_step,
    chain_step,
    covered,
    every_hypothesis,
    log_softmax,
    penalty,
    random_chains,
    search_with,
    texts,
)
from transformer.decoding import lexical_constraints
from transformer.decoding.base import CoveragePenalty
from transformer.decoding.logits_processors import LogitsConstraints

SYMBOLS, LENGTH, WIDE = [3, 4, 5], 5, 163


def padded(phrases_of_sentences, count, width):
    phrases_BKL = np.full((len(phrases_of_sentences), count, width), PAD, np.int32)
    for sentence, several in enumerate(phrases_of_sentences):
        for k, phrase in enumerate(several):
            phrases_BKL[sentence, k, : len(phrase)] = phrase
    return jnp.asarray(phrases_BKL)


def holds(tokens, phrase):
    return any(tuple(tokens[i : i + len(phrase)]) == tuple(phrase) for i in range(len(tokens)))


def random_phrases(rng, most_tokens, most_phrases=3, symbols=SYMBOLS):
    """Up to three phrases, of `most_tokens` tokens in all."""
    phrases, left = [], most_tokens
    for _ in range(rng.integers(0, most_phrases + 1)):
        if left:
            phrases.append(tuple(rng.choice(symbols, rng.integers(1, min(left, 4) + 1)).tolist()))
            left -= len(phrases[-1])
    return list(dict.fromkeys(phrases))


def search(chains, phrases, beam_size, limits, prefix_BP=None, width=4, alpha=0.6):
    shape = (len(chains), beam_size, chains.shape[1])
    constraints = LogitsConstraints(prefix_BP=prefix_BP)
    phrases_BKL = padded(phrases, 4, width)
    run = jax.jit(
        lambda chains, phrases_BKL: search_with(
            chain_step(chains), (), shape, limits, alpha, constraints=constraints, phrases_BKL=phrases_BKL
        )
    )
    return jax.tree.map(np.asarray, run(jnp.asarray(chains), phrases_BKL))


@pytest.mark.slow
def test_a_wide_beam_finds_the_best_of_those_that_hold_their_phrases():
    """Phrases overlap, lie in one another and repeat themselves; not all can be met within the limit."""
    rng = np.random.default_rng(0)
    chains = random_chains(0, 40, LENGTH, vocab_size=6, eos_logit=1.0)
    limits = rng.integers(2, LENGTH + 1, size=40)
    phrases = [random_phrases(rng, limit) for limit in limits]
    result = search(chains, phrases, WIDE, limits)
    changed = overlapping = 0
    for sentence, limit in enumerate(limits):
        everything = every_hypothesis(log_softmax(chains[sentence]), limit, SYMBOLS)
        scored = {t: (t[-1] == EOS, value / penalty(len(t), 0.6)) for t, value in everything.items()}
        holding = {t: s for t, s in scored.items() if all(holds(t, phrase) for phrase in phrases[sentence])}
        got = [tuple(tokens) for tokens in texts(result, sentence)]
        assert set(got) <= set(holding)
        finished = sorted((score for is_whole, score in holding.values() if is_whole), reverse=True)
        assert result.finished_BN[sentence].sum() == len(finished)
        np.testing.assert_allclose(result.scores_BN[sentence, : len(finished)], finished, atol=1e-5)
        if finished:
            assert got[0] == max(holding, key=lambda tokens: holding[tokens])
            changed += got[0] != max(scored, key=lambda tokens: scored[tokens])
            overlapping += len(got[0]) <= sum(map(len, phrases[sentence]))
    assert changed > 10
    assert overlapping > 0


@pytest.mark.parametrize("beam_size", [1, 2, 5])
def test_phrases_that_fit_are_met_however_narrow_the_beam(beam_size):
    """Chains that would rather end at once: without force no phrase of theirs would come."""
    rng = np.random.default_rng(beam_size)
    chains = random_chains(1, 60, 12, vocab_size=9, eos_logit=4.0)
    limits = rng.integers(2, 13, size=60)
    prefixes = [rng.integers(3, 9, rng.integers(0, 4)).tolist() if limit > 4 else [] for limit in limits]
    prefix_BP = np.full((60, 4), PAD, np.int32)
    for row, prefix in zip(prefix_BP, prefixes, strict=True):
        row[: len(prefix)] = prefix
    phrases = [
        random_phrases(rng, limit - 1 - len(prefix), 4, list(range(3, 6)))
        for limit, prefix in zip(limits, prefixes, strict=True)
    ]
    assert any(sum(map(len, p)) + len(x) + 1 == n for p, x, n in zip(phrases, prefixes, limits, strict=True))
    result = search(chains, phrases, beam_size, limits, jnp.asarray(prefix_BP))
    for sentence in range(60):
        got = texts(result, sentence)
        assert result.finished_BN[sentence, 0]
        assert len(set(map(tuple, got))) == len(got)
        for tokens in got:
            assert tokens[: len(prefixes[sentence])] == prefixes[sentence]
            assert all(holds(tokens, phrase) for phrase in phrases[sentence])
        scores = result.scores_BN[sentence, : len(got)]
        assert (np.diff(scores[result.finished_BN[sentence, : len(got)]]) <= 0).all()


@pytest.mark.slow
def test_no_phrases_change_nothing():
    chains = random_chains(2, 20, 8, vocab_size=9, eos_logit=1.0)
    limits = np.full(20, 8)
    plain = search_with(chain_step(jnp.asarray(chains)), (), (20, 4, 8), limits, 0.6)
    asked = search(chains, [[] for _ in range(20)], 4, limits)
    np.testing.assert_array_equal(plain.tokens_BNT[:, 0], asked.tokens_BNT[:, 0])
    np.testing.assert_allclose(plain.scores_BN[:, 0], asked.scores_BN[:, 0], rtol=1e-6)


def test_a_sentence_does_not_depend_on_its_neighbours():
    rng = np.random.default_rng(3)
    chains, limits = random_chains(3, 10, 10, vocab_size=9, eos_logit=2.0), np.full(10, 10)
    phrases = [random_phrases(rng, 9) for _ in range(10)]
    together = search(chains, phrases, 4, limits)
    turned = search(chains[::-1], phrases[::-1], 4, limits)
    np.testing.assert_array_equal(together.tokens_BNT, turned.tokens_BNT[::-1])


def table(rows, max_length=8, vocab_size=8):
    """One chain from {last token: {next token: probability}}, the same at all positions; others are sure of EOS."""
    logits = np.full((1, max_length, vocab_size, vocab_size), -np.inf, np.float32)
    logits[..., EOS] = 0
    for last, probabilities in rows.items():
        logits[:, :, last] = -np.inf
        for token, probability in probabilities.items():
            logits[:, :, last, token] = np.log(probability)
    return logits


def test_what_has_begun_a_phrase_stays_however_unlikely():
    """Nine in ten tokens are 3 to the end: by likelihood alone, two beams would never hold a 5."""
    chain = table({BOS: {3: 0.89, 4: 0.1, 5: 0.01}, 3: {3: 0.89, 4: 0.1, 5: 0.01}, 5: {6: 0.5, EOS: 0.5}})
    best = texts(search(chain, [[(5, 6)]], 2, [8], alpha=0.0), 0)[0]
    assert best == [5, 6, EOS]


def test_a_phrase_is_produced_with_more_banks_than_beams():
    """Four banks and two beams: the hypothesis that would come to the phrase by itself must not be crowded out."""
    rows = {BOS: {3: 0.9, 5: 0.1}, 3: {4: 0.9, 5: 0.1}, 4: {5: 1.0}, 5: {6: 1.0}, 6: {7: 1.0}}
    result = search(table(rows), [[(5, 6, 7)]], 2, [8], alpha=0.0)
    assert texts(result, 0)[0] == [3, 4, 5, 6, 7, EOS]
    np.testing.assert_allclose(np.exp(result.scores_BN[0, 0]), 0.81, rtol=1e-5)


def walk(phrase, tokens, width=4):
    """The progress of one phrase after each token."""
    compiled = lexical_constraints.compile_phrases(padded([[phrase]], 1, width), PAD)
    progress, seen = jnp.zeros((1, 1, 1), jnp.int32), []
    for token in tokens:
        progress = lexical_constraints.update_progress(compiled, progress, jnp.full((1, 1), token, jnp.int32))
        seen.append(int(progress[0, 0, 0]))
    return seen


def test_constraint_progress_falls_back_to_the_longest_prefix():
    assert walk((3, 3, 4), (3, 3, 3, 4, 5)) == [1, 2, 2, 3, 3]
    assert walk((3, 4, 3, 5), (3, 4, 3, 4, 3, 5)) == [1, 2, 3, 2, 3, 4]
    assert walk((3, 4), (4, 5, 3, 3, 4, 3)) == [0, 0, 1, 1, 2, 2]


def test_what_is_placed_counts_one_phrase_under_way():
    compiled = lexical_constraints.compile_phrases(padded([[(3, 4, 5), (4, 4)]], 2, 4), PAD)
    progress = jnp.array([[[0, 0], [2, 1], [3, 1], [0, 2], [3, 2]]], jnp.int32)
    assert lexical_constraints.num_satisfied_tokens(compiled, progress).tolist() == [[0, 2, 4, 2, 5]]


@pytest.mark.parametrize("beam_size", [1, 2])
def test_phrases_that_begin_alike_do_not_block_each_other(beam_size):
    """3 3 3 is on the way to all three: to stay there must not seem better than to go on with one."""
    chain = table({last: {3: 0.9, 4: 0.02, 5: 0.02, 6: 0.02, EOS: 0.04} for last in (BOS, 3, 4, 5, 6)}, 13)
    asked = [(3, 3, 3, 4), (3, 3, 3, 5), (3, 3, 3, 6)]
    result = search(chain, [asked], beam_size, [13])
    assert result.finished_BN[0, 0]
    assert all(holds(texts(result, 0)[0], phrase) for phrase in asked)


@pytest.mark.slow
def test_coverage_and_phrases_go_together():
    """Both reach into what a hypothesis remembers."""
    chains = random_chains(4, 10, 8, vocab_size=9, eos_logit=1.0)
    attention = np.random.default_rng(4).dirichlet(np.full(5, 0.3), 9).astype(np.float32)
    options = {
        "phrases_BKL": padded([[(3, 4)]] * 10, 1, 4),
        "coverage": CoveragePenalty(2.0, jnp.ones((10, 5), bool)),
    }
    step = attending_step(chains, attention)
    result = jax.jit(lambda: search_with(step, (), (10, 4, 8), np.full(10, 8), 0.6, **options))()
    for sentence in range(10):
        for slot, tokens in enumerate(texts(result, sentence)):
            assert holds(tokens, (3, 4))
            log_probs, inputs = log_softmax(chains[sentence]), [BOS, *tokens[:-1]]
            value = sum(log_probs[t, last, token] for t, (last, token) in enumerate(zip(inputs, tokens, strict=True)))
            value = value / penalty(len(tokens), 0.6) + covered(attention, inputs, 2.0)
            assert result.scores_BN[sentence, slot] == pytest.approx(value, abs=1e-4)
