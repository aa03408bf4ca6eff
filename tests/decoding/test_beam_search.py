"""The search against exhaustive search and a plain NumPy one, on chains whose probabilities are given."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from tests.conftest import slow
from tests.helpers.chains import (
    BOS,
    EOS,
    PAD,
    A,
    B,
    attending_step,
    chain_step,
    covered,
    every_hypothesis,
    hand_made_chain,
    log_softmax,
    penalty,
    random_chains,
    search_with,
    texts,
)
from transformer.decoding.base import NEG_INF, CoveragePenalty, Hypotheses


@functools.partial(jax.jit, static_argnames=("beam_size", "form"))
def search_chains(logits_BTVV, limits_B, alpha, beam_size, form="gnmt") -> Hypotheses:
    shape = (logits_BTVV.shape[0], beam_size, logits_BTVV.shape[1])
    return search_with(chain_step(logits_BTVV), (), shape, limits_B, alpha, length_penalty_form=form)


def search(logits_BTVV, beam_size: int, limits=None, alpha: float = 0.0, form: str = "gnmt") -> Hypotheses:
    logits_BTVV = jnp.asarray(logits_BTVV)
    limits_B = np.full(len(logits_BTVV), logits_BTVV.shape[1]) if limits is None else limits
    result = search_chains(logits_BTVV, jnp.asarray(limits_B, jnp.int32), jnp.float32(alpha), beam_size, form)
    return jax.tree.map(np.asarray, result)


def plain_beam_search(
    log_probs_TVV, beam_size: int, limit: int, alpha: float, early: bool = False
) -> list[tuple[bool, float, list[int]]]:
    """The rules of the search in plain Python: (finished, score, tokens).

    Run to the limit whatever has ended, or if `early` as fairseq runs.
    """
    alive, ended = [(0.0, [])], []
    for position in range(limit):
        candidates = []
        for log_prob, tokens in alive:
            row_V = log_probs_TVV[position, tokens[-1] if tokens else BOS]
            candidates += [(log_prob + row_V[v], [*tokens, v]) for v in range(len(row_V)) if v not in (PAD, BOS)]
        candidates = sorted(candidates, reverse=True)[: 2 * beam_size - 1]
        may_end = candidates[:beam_size] if early else candidates
        ended += [(True, c[0] / penalty(position + 1, alpha), c[1]) for c in may_end if c[1][-1] == EOS]
        ended = sorted(ended, reverse=True)[:beam_size]
        if early and len(ended) == beam_size:
            return ended
        alive = [candidate for candidate in candidates if candidate[1][-1] != EOS][:beam_size]
    cut = [(False, log_prob / penalty(limit, alpha), tokens) for log_prob, tokens in alive]
    return (ended + cut)[:beam_size]


@pytest.mark.parametrize("symbols", [1, 2, slow(3), slow(4)])
@pytest.mark.parametrize(
    ("form", "alpha"),
    [("gnmt", 0.0), ("gnmt", 0.6), slow("gnmt", 1.5), slow("gnmt", -0.5), ("length", 0.6), slow("length", 1.0)],
)
def test_a_wide_beam_finds_what_exhaustive_search_finds(form, alpha, symbols):
    """50 chains of each number of symbols, up to 6 tokens long, and all of their hypotheses in order."""
    beam_size = symbols**5 * (symbols + 1) // 2 + 1  # 2 * beam_size - 1 candidates hold all continuations at once
    chains = random_chains(symbols, 50, 6, vocab_size=3 + symbols)
    limits = np.random.default_rng(1).integers(1, 7, size=50)
    result = search(chains, beam_size, limits, alpha, form)
    for sentence, limit in enumerate(limits):
        log_probs = every_hypothesis(log_softmax(chains[sentence]), limit, symbols=list(range(3, 3 + symbols)))
        expected = {t: (t[-1] == EOS, value / penalty(len(t), alpha, form)) for t, value in log_probs.items()}
        ranked = sorted(expected.values(), reverse=True)[:beam_size]
        got = [tuple(tokens) for tokens in texts(result, sentence)]
        assert len(set(got)) == len(got) == len(ranked)
        # Two near-equal neighbours may change places, so ranks are compared by score, texts by their own score.
        np.testing.assert_allclose(result.scores_BN[sentence, : len(got)], [s for _, s in ranked], atol=1e-5)
        np.testing.assert_allclose(result.scores_BN[sentence, : len(got)], [expected[t][1] for t in got], atol=1e-5)
        assert result.finished_BN[sentence].tolist() == [f for f, _ in ranked] + [False] * (beam_size - len(got))
        assert got[0] == max(expected, key=lambda tokens: expected[tokens])


@pytest.mark.parametrize(
    ("beam_size", "alpha"), [slow(1, 0.6), slow(2, 0.0), (2, 1.0), slow(4, 0.6), (4, 2.0), slow(5, -0.5)]
)
def test_stopping_early_changes_nothing(beam_size, alpha):
    chains = random_chains(2, 60, 12, vocab_size=8, eos_logit=2.0)
    limits = np.random.default_rng(3).integers(1, 13, size=60)
    result = search(chains, beam_size, limits, alpha)
    for sentence, limit in enumerate(limits):
        expected = plain_beam_search(log_softmax(chains[sentence]), beam_size, limit, alpha)
        got = texts(result, sentence)
        assert got == [tokens for _, _, tokens in expected]
        np.testing.assert_allclose(result.scores_BN[sentence, : len(got)], [s for _, s, _ in expected], rtol=1e-5)
        assert result.finished_BN[sentence, : len(got)].tolist() == [finished for finished, _, _ in expected]


@pytest.mark.slow
@pytest.mark.parametrize(("beam_size", "alpha"), [(1, 0.6), (2, 1.0), (4, 2.0)])
def test_with_early_stopping_a_sentence_ends_when_as_many_as_beams_have_ended(beam_size, alpha):
    chains = random_chains(2, 60, 12, vocab_size=8, eos_logit=2.0)
    step = chain_step(jnp.asarray(chains))
    result = search_with(step, (), (60, beam_size, 12), [12] * 60, alpha, early_stopping=True)
    plain = [plain_beam_search(log_softmax(chain), beam_size, 12, alpha, early=True) for chain in chains]
    assert [texts(result, i) for i in range(60)] == [[tokens for _, _, tokens in one] for one in plain]
    whole = [plain_beam_search(log_softmax(chain), beam_size, 12, alpha) for chain in chains]
    assert (whole != plain) is (beam_size > 1)


@pytest.mark.parametrize("alpha", [slow(0.0), 1.0, slow(2.0)])
def test_the_best_are_the_same_however_many_are_wanted_and_come_sooner(alpha):
    chains = random_chains(4, 60, 12, vocab_size=8, eos_logit=2.0)
    steps = []

    def step(cache, tokens_BN, position):
        jax.debug.callback(steps.append, position)
        return chain_step(jnp.asarray(chains))(cache, tokens_BN, position)

    result = {}
    for count in (1, 2, 4):
        run = jax.jit(lambda count=count: search_with(step, (), (60, 4, 12), [12] * 60, alpha, num_return=count))
        result[count] = jax.tree.map(np.asarray, jax.block_until_ready(run()))
        jax.effects_barrier()
        result[count] = result[count], len(steps)
        steps.clear()
    everything, most = result[4]
    for count, (some, number) in result.items():
        assert jax.tree.all(jax.tree.map(lambda a, b, n=count: (a[:, :n] == b[:, :n]).all(), some, everything))
        assert number <= most
    assert result[1][1] < most or alpha == 2.0


@pytest.mark.parametrize("alpha", [0.0, 0.6, 3.0])
def test_a_beam_of_one_is_the_argmax_roll_out(alpha):
    chains = random_chains(4, 100, 10, vocab_size=7, eos_logit=1.0)
    result = search(chains, 1, alpha=alpha)
    for sentence, log_probs_TVV in enumerate(log_softmax(chains)):
        tokens, log_prob = [], 0.0
        while len(tokens) < 10 and EOS not in tokens:
            row = log_probs_TVV[len(tokens), tokens[-1] if tokens else BOS]
            row[[PAD, BOS]] = -np.inf
            tokens.append(int(np.argmax(row)))
            log_prob += row.max()
        assert texts(result, sentence) == [tokens]
        assert result.finished_BN[sentence, 0] == (EOS in tokens)
        assert result.scores_BN[sentence, 0] == pytest.approx(log_prob / penalty(len(tokens), alpha), rel=1e-5)


def test_a_beam_finds_what_greedy_misses():
    chain = hand_made_chain(
        {(0, BOS): {A: 0.6, B: 0.4}, (1, A): {EOS: 0.5, A: 0.3, B: 0.2}, (1, B): {EOS: 0.9, A: 0.1}}
    )
    greedy, beam = search(chain, 1), search(chain, 2)
    assert texts(greedy, 0) == [[A, EOS]]
    assert texts(beam, 0) == [[B, EOS], [A, EOS]]
    np.testing.assert_allclose(np.exp(greedy.scores_BN), [[0.30]], rtol=1e-5)
    np.testing.assert_allclose(np.exp(beam.scores_BN), [[0.36, 0.30]], rtol=1e-5)


def test_the_length_penalty_changes_the_winner_after_the_beam_is_full_of_ended_ones():
    go_on = {(position, A): {A: 0.8, EOS: 0.2} for position in (1, 2, 3)}
    chain = hand_made_chain({(0, BOS): {A: 0.6, EOS: 0.4}} | go_on)
    without, with_penalty = search(chain, 2, alpha=0.0), search(chain, 2, alpha=1.0)
    assert texts(without, 0) == [[EOS], [A, A, A, A, EOS]]
    assert texts(with_penalty, 0) == [[A, A, A, A, EOS], [EOS]]
    long = np.log(0.6 * 0.8**3)
    np.testing.assert_allclose(without.scores_BN, [[np.log(0.4), long]], rtol=1e-5)
    np.testing.assert_allclose(with_penalty.scores_BN, [[long / (10 / 6), np.log(0.4)]], rtol=1e-5)


def history_logits(history: np.ndarray | jax.Array, weights: np.ndarray | jax.Array, xp) -> np.ndarray | jax.Array:
    """Logits of V = 6 from all tokens so far, [..., T] → [..., 6], in NumPy or JAX alike."""
    angle = xp.sum(history * weights.reshape((1,) * (history.ndim - 1) + (-1,)), axis=-1)
    frequencies = xp.arange(1, 7, dtype=np.float32).reshape((1,) * angle.ndim + (6,))
    return 2 * xp.sin(angle[..., None] * frequencies)


@pytest.mark.parametrize("beam_size", [1, 4])
def test_the_cache_follows_its_hypothesis(beam_size):
    batch_size, max_length = 5, 8
    weights = np.random.default_rng(5).normal(size=(batch_size, max_length)).astype(np.float32)

    def step(cache, tokens_BN, position):
        layer = cache["layers"][0]
        history = layer["history"].at[:, :, position].set(tokens_BN.astype(jnp.float32))
        # Half of what the logits need is in another leaf, of another rank and dtype.
        last = jnp.where(cache["last"] == 0, 0, cache["last"] - 1)
        logits = jax.vmap(lambda history_NT, w_T: history_logits(history_NT, w_T, jnp))(history, jnp.asarray(weights))
        logits = logits + jax.nn.one_hot(last, 6, dtype=jnp.float32)
        return logits, {"layers": [{"history": history}], "last": tokens_BN.astype(jnp.int8)}

    shape = (batch_size, beam_size, max_length)
    cache = {"layers": [{"history": jnp.zeros(shape)}], "last": jnp.zeros(shape[:2], jnp.int8)}
    result = jax.jit(lambda cache: search_with(step, cache, shape, [max_length] * batch_size))(cache)
    result = jax.tree.map(np.asarray, result)
    for sentence in range(batch_size):
        for slot, tokens in enumerate(texts(result, sentence)):
            history, score = np.zeros(max_length, np.float32), 0.0
            for position, (last, token) in enumerate(itertools.pairwise([BOS, *tokens])):
                history[position] = last
                logits = history_logits(history, weights[sentence], np)
                before = int(history[position - 1]) if position else 0
                logits[max(before - 1, 0)] += 1
                score += log_softmax(logits)[token]
            assert result.scores_BN[sentence, slot] == pytest.approx(score, abs=1e-4)


def test_without_eos_hypotheses_come_out_whole_at_each_limit():
    chains = random_chains(6, 4, 7, vocab_size=6)
    chains[..., EOS] = -np.inf
    limits = np.array([1, 3, 7, 99])
    result = search(chains, 3, limits, alpha=0.6)
    assert not result.finished_BN.any()
    for sentence, limit in enumerate([1, 3, 7, 7]):
        assert result.lengths_BN[sentence].tolist() == [limit] * 3
        log_probs = log_softmax(chains[sentence])
        for slot, tokens in enumerate(texts(result, sentence)):
            value = sum(log_probs[i, last, token] for i, (last, token) in enumerate(itertools.pairwise([BOS, *tokens])))
            assert result.scores_BN[sentence, slot] == pytest.approx(value / penalty(limit, 0.6), rel=1e-5)
        assert (np.diff(result.scores_BN[sentence]) <= 0).all()


def test_finished_hypotheses_come_before_better_cut_ones():
    result = search(hand_made_chain({(0, BOS): {EOS: 0.1, A: 0.9}, (1, A): {A: 0.7, B: 0.3}}), 3, limits=[2])
    assert texts(result, 0) == [[EOS], [A, A], [A, B]]
    assert result.finished_BN.tolist() == [[True, False, False]]
    np.testing.assert_allclose(np.exp(result.scores_BN), [[0.1, 0.63, 0.27]], rtol=1e-5)


def test_a_limit_of_zero_gives_an_empty_hypothesis():
    result = search(random_chains(7, 2, 5, vocab_size=6), 3, limits=[0, 5])
    assert result.lengths_BN[0].tolist() == [0, 0, 0]
    assert result.scores_BN[0].tolist() == [NEG_INF] * 3
    assert not result.finished_BN[0].any()
    assert (result.tokens_BNT[0] == PAD).all()
    assert len(texts(result, 1)) == 3


@pytest.mark.parametrize("weight", [0.3, 3.0])
def test_coverage_decides_between_whole_hypotheses(weight):
    """Against all there are; a source that is padding need not be attended to."""
    chains = random_chains(15, 40, 6, vocab_size=6, eos_logit=1.0)
    attention = np.random.default_rng(15).dirichlet(np.full(4, 0.2), 6).astype(np.float32)
    is_source_BS = np.tile([True, True, True, False], (40, 1))
    limits = np.random.default_rng(16).integers(1, 7, size=40)
    coverage = CoveragePenalty(weight, jnp.asarray(is_source_BS))
    step = attending_step(chains, attention)
    result = jax.jit(lambda: search_with(step, (), (40, 487, 6), limits, 0.6, coverage=coverage))()
    result = jax.tree.map(np.asarray, result)
    changed = 0
    for sentence, limit in enumerate(limits):
        log_probs = every_hypothesis(log_softmax(chains[sentence]), limit, symbols=[3, 4, 5])
        plain = {t: (t[-1] == EOS, value / penalty(len(t), 0.6)) for t, value in log_probs.items()}
        scored = {
            t: (whole, score + covered(attention[:, :3], [BOS, *t[:-1]], weight)) for t, (whole, score) in plain.items()
        }
        got = texts(result, sentence)
        ranked = [score for _, score in sorted(scored.values(), reverse=True)][: len(got)]
        np.testing.assert_allclose(result.scores_BN[sentence, : len(got)], ranked, atol=1e-4)
        assert tuple(got[0]) == max(scored, key=lambda tokens: scored[tokens])
        changed += tuple(got[0]) != max(plain, key=lambda tokens: plain[tokens])
    assert changed > 5


def test_a_sentence_does_not_depend_on_its_neighbours():
    chains = random_chains(8, 12, 10, vocab_size=9, eos_logit=1.0)
    limits = np.random.default_rng(9).integers(1, 11, size=12)
    together = search(chains, 4, limits, alpha=0.6)
    turned = search(chains[::-1], 4, limits[::-1], alpha=0.6)
    for sentence in range(12):
        alone = search(chains[sentence : sentence + 1], 4, limits[sentence : sentence + 1], alpha=0.6)
        for other, row in ((alone, 0), (turned, 11 - sentence)):
            assert other.tokens_BNT[row].tobytes() == together.tokens_BNT[sentence].tobytes()
            assert other.lengths_BN[row].tobytes() == together.lengths_BN[sentence].tobytes()
            np.testing.assert_allclose(other.scores_BN[row], together.scores_BN[sentence], rtol=1e-6)


def test_fewer_hypotheses_than_beams_leave_empty_slots():
    # V = 4: one symbol, so that all there is are EOS, A EOS, A A EOS, and A A A cut; V = 3: EOS alone.
    result = search(random_chains(10, 1, 3, vocab_size=4), 8)
    assert sorted(texts(result, 0)[:3]) == [[EOS], [A, EOS], [A, A, EOS]]
    assert texts(result, 0)[3:] == [[A, A, A]]
    assert result.scores_BN[0, 4:].tolist() == [NEG_INF] * 4
    assert result.lengths_BN[0, 4:].tolist() == [0] * 4
    assert texts(search(random_chains(11, 1, 3, vocab_size=3), 8), 0) == [[EOS]]


def test_pad_and_bos_are_never_generated_and_keep_their_probability():
    chain = hand_made_chain({(0, BOS): {PAD: 0.5, BOS: 0.3, A: 0.2}})
    for beam_size in (1, 2):
        result = search(chain, beam_size)
        assert texts(result, 0) == [[A, EOS]]
        assert np.exp(result.scores_BN[0, 0]) == pytest.approx(0.2, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("bos_id", "pad_id"), [(EOS, PAD), (BOS, EOS)])
def test_eos_may_share_its_id(bos_id, pad_id):
    chain = jnp.asarray(np.repeat(hand_made_chain({(1, A): {EOS: 1.0}}), 2, axis=0)).at[:, 0, :, A].set(5)
    result = search_with(chain_step(chain), (), (2, 2, 6), [6, 6], bos_id=bos_id, pad_id=pad_id)
    assert result.tokens_BNT[0, 0, :2].tolist() == [A, EOS]
    assert result.lengths_BN[0, 0] == 2


def test_a_dead_end_or_nan_harms_only_its_own_hypothesis():
    rows = {(0, BOS): {A: 0.9, B: 0.1}, (1, B): {B: 0.8, EOS: 0.2}}
    for bad in (-np.inf, np.nan, np.inf):
        chains = np.repeat(hand_made_chain(rows), 2, axis=0)
        chains[0, 1, A] = bad
        chains[1, 0] = bad
        # With 3 candidates, the 3 tokens of the bad row would take every place.
        result = search(chains, 2)
        assert texts(result, 0) == [[B, B, EOS], [B, EOS]]
        assert texts(result, 1) == []
        assert np.isfinite(result.scores_BN).all()


def test_bfloat16_logits_are_searched_in_float32():
    chains = jnp.asarray(random_chains(12, 8, 10, vocab_size=30), jnp.bfloat16)
    rounded, plain = search(chains, 4, alpha=0.6), search(chains.astype(jnp.float32), 4, alpha=0.6)
    assert rounded.scores_BN.dtype == np.float32
    assert jax.tree.all(jax.tree.map(np.array_equal, rounded, plain))


def count_steps(logits_BTVV: np.ndarray, beam_size: int, limits_of_calls: list[list[int]]) -> list[int]:
    """How often the step function runs, for each call with its limits."""
    positions, counts = [], []
    batch_size, max_length = logits_BTVV.shape[:2]

    def step(cache, tokens_BN, position):
        jax.debug.callback(positions.append, position)
        return chain_step(jnp.asarray(logits_BTVV))(cache, tokens_BN, position)

    run = jax.jit(lambda limits_B: search_with(step, (), (batch_size, beam_size, max_length), limits_B, alpha=0.6))
    for limits in limits_of_calls:
        jax.block_until_ready(run(jnp.asarray(limits, jnp.int32)))
        jax.effects_barrier()
        counts.append(len(positions))
        positions.clear()
    return counts


@pytest.mark.slow
def test_the_loop_stops_as_soon_as_every_sentence_is_done():
    rows = {(0, BOS): {EOS: 0.5, A: 0.3, B: 0.2}, (1, A): {EOS: 0.95, A: 0.05}, (1, B): {EOS: 1.0}}
    chain = hand_made_chain(rows | {(position, A): {A: 1.0} for position in range(2, 30)}, 30)
    chains = np.repeat(chain, 3, axis=0)
    assert count_steps(chains, 1, [[30, 30, 30]]) == [1]
    # After 2 steps the 2 that that ended have scores of at least -1.15; what goes on, at most -1.45.
    assert count_steps(chains, 2, [[30, 30, 30], [1, 0, 1]]) == [2, 1]
    # Only 3 ever end, so that 4 beams go on to the limits.
    assert count_steps(chains, 4, [[5, 0, 9], [30, 1, 1], [0, 0, 0]]) == [9, 30, 0]
    # All there is are EOS and A EOS: nothing goes on.
    assert count_steps(hand_made_chain({(0, BOS): {EOS: 0.5, A: 0.5}}), 4, [[6]]) == [2]


def test_equal_shapes_compile_once_and_nothing_sorts_the_vocabulary():
    chains = jnp.asarray(random_chains(13, 3, 6, vocab_size=50))
    limits = jnp.full(3, 6, jnp.int32)
    traced = []

    @jax.jit
    def run(chains, limits, alpha):
        traced.append(chains.shape)
        return search_chains(chains, limits, alpha, 4)

    run(chains, limits, jnp.float32(0.6))
    run(chains + 1, limits - 2, jnp.float32(1.0))
    assert len(traced) == 1
    program = run.lower(chains, limits, jnp.float32(0.6)).compile().as_text()
    # A full sort of all continuations takes 30 to 100 times as long: see the comment in beam_search._select.
    assert program.count('custom_call_target="TopK"') == 3
    assert " sort(" not in program


def test_devices_search_their_own_sentences_in_shard_map():
    devices = len(jax.devices())
    mesh = jax.make_mesh((devices,), ("sentences",), axis_types=(jax.sharding.AxisType.Auto,))
    chains = jnp.asarray(random_chains(14, 2 * devices, 8, vocab_size=9))
    limits, rows = jnp.full(2 * devices, 8, jnp.int32), PartitionSpec("sentences")
    local = functools.partial(search_chains, alpha=jnp.float32(0.6), beam_size=3)
    spread = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(rows, rows), out_specs=rows, check_vma=False))
    got, expected = spread(chains, limits), local(chains, limits)
    np.testing.assert_array_equal(got.tokens_BNT, expected.tokens_BNT)
    np.testing.assert_allclose(got.scores_BN, expected.scores_BN, rtol=1e-6)
    assert "all-gather" not in spread.lower(chains, limits).compile().as_text()


@pytest.mark.parametrize(
    ("cache", "beam_size", "message"),
    [
        ({"k": np.zeros((2, 4, 3))}, 3, r"cache\['k'\] to lead with .* \[2, 3\], got the shape \(2, 4, 3\)"),
        ((), 0, "sizes of at least 1, got .*beam_size=0"),
    ],
)
def test_wrong_shapes_are_named(cache, beam_size, message):
    with pytest.raises(ValueError, match=message):
        search_with(chain_step(jnp.zeros((2, 4, 5, 5))), cache, (2, beam_size, 4), [4, 4])
