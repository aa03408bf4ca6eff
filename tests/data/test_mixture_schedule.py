"""The plan of the batches of a mixture: exact shares, each source's own epochs, any step and any number of hosts."""

import itertools

import numpy as np
import pytest

from transformer.config import mixture
from transformer.config.schema import DataConfig, MixtureEntry
from transformer.data import batching, mixture_schedule
from transformer.data.batching import PAD_EXAMPLE, Bucket, JaggedArray, Lengths
from transformer.data.mixed_sequences import MixedSequences
from transformer.data.mixture_schedule import MixtureSchedule
from transformer.data.schedule_store import FileStore
from transformer.runtime.errors import UserError

SIZES = (30_000, 5_000, 1_000)
STARTS = np.cumsum([0, *SIZES])


def lengths(n, seed, mean):
    rng = np.random.default_rng(seed)
    source = np.clip(rng.poisson(mean, n), 2, None)
    return source, np.clip(source + rng.integers(-3, 4, n), 2, None)


def entries(*weights, **fields):
    codes = ("de", "fr", "es")
    each = [{name: values[i] for name, values in fields.items()} for i in range(len(codes))]
    return tuple(
        MixtureEntry(source_language="en", target_language=code, tag=f"<2{code}>", weight=float(weight), **own)
        for code, weight, own in zip(codes, weights, each, strict=True)
    )


def make_plan(weights=(7, 2, 1), temperature=0.0, seed=3, sizes=SIZES, batch_tokens=4096, fields=None, **options):
    data = DataConfig(
        mixture=entries(*weights, **(fields or {})), mixture_temperature=temperature, max_length=32, num_buckets=6
    )
    sources = [lengths(n, number, mean) for number, (n, mean) in enumerate(zip(sizes, (8, 15, 12), strict=True))]
    return MixtureSchedule(data, sources, batch_tokens=batch_tokens, seed=seed, **options)


def examples_of(plan, step):
    examples = plan.batch(step).examples_B
    return examples[examples != PAD_EXAMPLE]


def counts_of(examples, starts=STARTS):
    return np.bincount(np.searchsorted(starts, examples, side="right") - 1, minlength=len(starts) - 1)


def draw(plan, count, start=0):
    """The examples of at least `count` from a step on."""
    drawn, step = [], start
    while sum(map(len, drawn)) < count:
        drawn.append(examples_of(plan, step))
        step += 1
    return np.concatenate(drawn)


@pytest.mark.parametrize(
    ("weights", "temperature"), [((7, 2, 1), 0), ((1, 1, 1), 1), ((1, 1, 1), 2), ((1, 1, 1), 5), ((1, 1, 200), 0)]
)
def test_observed_shares_are_within_one_percent_after_100000_examples(weights, temperature):
    plan = make_plan(weights, temperature)
    wanted = np.array(mixture.shares(plan._data, plan.pairs))
    observed = counts_of(draw(plan, 100_000))
    observed = observed / observed.sum()
    np.testing.assert_allclose(observed, wanted, atol=0.005)  # half of what is promised
    whole_round = np.concatenate([examples_of(plan, step) for step in range(plan.steps_per_epoch)])
    np.testing.assert_allclose(counts_of(whole_round) / len(whole_round), wanted, atol=1e-4)


def test_every_source_has_epochs_of_its_own():
    """However often a source comes round, each of its pairs has come as often, up to one or two."""
    counts = np.bincount(draw(make_plan(), 100_000), minlength=STARTS[-1])
    for first, last in itertools.pairwise(STARTS):
        assert np.ptp(counts[first:last]) <= 2
    assert counts.min() >= 2


def test_epochs_of_a_source_have_different_orders():
    plan = make_plan()
    shape = int(np.argmax(plan._members[2]))
    orders = [plan._order_of(2, shape, epoch) for epoch in range(2)]
    np.testing.assert_array_equal(*map(np.sort, orders))
    assert not np.array_equal(*orders)
    assert not np.array_equal(make_plan(seed=4).batch(0).examples_B, plan.batch(0).examples_B)


@pytest.mark.parametrize("start", [1, 188, 189, 190, 400, 100_000])
def test_any_step_is_known_without_those_before_it(start):
    seen, resumed = make_plan(), make_plan()
    for step in (start - 1, start + 1, start):
        seen.batch(step)
    for step in (start, start + 1):
        np.testing.assert_array_equal(resumed.batch(step).examples_B, seen.batch(step).examples_B)
        assert resumed.batch(step).bucket == seen.batch(step).bucket


@pytest.mark.parametrize("hosts", [1, 2, 4, 8])
def test_any_number_of_hosts_sees_the_same_global_batches(hosts):
    plan, alone = make_plan(), make_plan()
    for step in range(0, 400, 7):
        planned = plan.batch(step)
        share = -(-planned.bucket.rows // hosts)
        parts = [batching.select_rows(planned, np.arange(host * share, (host + 1) * share)) for host in range(hosts)]
        np.testing.assert_array_equal(np.concatenate([p.examples_B for p in parts]), alone.batch(step).examples_B)


def test_the_plan_never_changes():
    """A golden plan. A change here is a change of the data order of every mixture: bump the version if it is meant."""
    plan = make_plan(sizes=(60, 20, 10), batch_tokens=128)
    assert plan.buckets == GOLDEN_BUCKETS
    assert plan.batch(0).examples_B.tolist() == GOLDEN_BATCHES[0]
    assert plan.batch(20_000).examples_B.tolist() == GOLDEN_BATCHES[1]


GOLDEN_BUCKETS = [
    Bucket(9, 7, 16),
    Bucket(11, 10, 8),
    Bucket(13, 12, 8),
    Bucket(16, 16, 8),
    Bucket(19, 19, 6),
    Bucket(20, 23, 5),
]
GOLDEN_BATCHES = [[35, 71, 19, 60, 46, 77, 87, 40], [8, 66, 41, 56, 14, 15, 42, 21]]


def test_every_pair_fits_its_batch_and_no_batch_is_empty():
    plan = make_plan()
    source, target = (np.concatenate(side) for side in zip(*plan._lengths, strict=True))
    for step in range(2 * plan.steps_per_epoch):
        examples, bucket = examples_of(plan, step), plan.batch(step).bucket
        assert 0 < len(examples) <= bucket.rows
        assert source[examples].max() <= bucket.source
        assert target[examples].max() <= bucket.target


def test_rows_of_one_sentence_are_never_empty():
    """The widest shape has one row: a share of a pair in a round would leave some of its batches empty."""
    plan = make_plan(weights=(100, 1, 1), sizes=(300, 20, 10), batch_tokens=40)
    assert plan.buckets[-1].rows == 1
    assert all(len(examples_of(plan, step)) for step in range(0, 3 * plan.steps_per_epoch, 11))


def test_long_pairs_are_dropped_and_counted():
    plan = make_plan()
    source, target = (np.concatenate(side) for side in zip(*plan._lengths, strict=True))
    kept = (source <= 32) & (target <= 32)
    assert (plan.kept, plan.dropped) == (kept.sum(), (~kept).sum())
    data = DataConfig(mixture=entries(1, 1, 1), max_length=4)
    sources = [lengths(100, 0, 3), (np.full(5, 9), np.full(5, 9)), lengths(100, 0, 3)]
    with pytest.raises(UserError, match=r"entry 2, en to fr: all 5 training pairs are longer than data.max_length = 4"):
        MixtureSchedule(data, sources, batch_tokens=64, seed=0)


def test_stages_have_their_own_sources_and_resume_anywhere():
    stages = {"from_step": (0, 0, 100), "until_step": (0, 250, 0)}
    plan = make_plan((1, 1, 1), fields=stages)
    found = [set(np.flatnonzero(counts_of(draw(plan, 1, step)))) for step in range(400)]
    assert all(each <= {0, 1} for each in found[:100])
    assert all(each <= {0, 2} for each in found[250:])
    for first, last, wanted in ((0, 100, [0.5, 0.5, 0]), (100, 250, [1 / 3] * 3), (250, 400, [0.5, 0, 0.5])):
        counts = sum(counts_of(examples_of(plan, step)) for step in range(first, last))
        np.testing.assert_allclose(counts / counts.sum(), wanted, atol=0.01)
    for step in (99, 100, 249, 250, 399):
        resumed = make_plan((1, 1, 1), fields=stages)
        np.testing.assert_array_equal(resumed.batch(step).examples_B, plan.batch(step).examples_B)
    examples = plan.examples(400)
    actual = sum(counts_of(examples_of(plan, step)) for step in range(400))
    np.testing.assert_allclose(examples, actual, rtol=0.02)
    assert len(plan.summary()) == 3
    assert plan.summary()[0].startswith("mixture from update 1 on: en-de 50.0% of ")


@pytest.mark.parametrize("large", [1 << 20, 500])
def test_files_hold_the_same_plan(tmp_path, monkeypatch, large):
    """Those of processes that share them, and of one that resumes; the order of a large source is a file too."""
    monkeypatch.setattr(mixture_schedule, "LARGE", large)
    in_memory = make_plan()
    for _ in range(2):
        plan = make_plan(store_of=lambda name: FileStore(tmp_path / name))
        for step in (0, 150, 189, 500):
            np.testing.assert_array_equal(plan.batch(step).examples_B, in_memory.batch(step).examples_B)
        assert (plan.kept, plan.steps_per_epoch) == (in_memory.kept, in_memory.steps_per_epoch)
        assert plan.fill == in_memory.fill
    assert any(tmp_path.glob("entry-*")) == (large == 500)


def test_a_list_is_spread_evenly():
    order = mixture_schedule.interleave([90, 10], 1, 2)
    np.testing.assert_array_equal(np.sort(order), np.arange(100))
    places = np.flatnonzero(order >= 90)
    assert (np.abs(places - (10 * np.arange(10) + 5)) <= 8).all()
    assert not np.array_equal(order, mixture_schedule.interleave([90, 10], 1, 3))


def test_utilization_is_that_of_the_batches():
    plan = make_plan()
    target = np.concatenate([target for _, target in plan._lengths])
    real = slots = 0
    for step in range(plan.steps_per_epoch):
        real += target[examples_of(plan, step)].sum()
        slots += plan.batch(step).bucket.rows * plan.batch(step).bucket.target
    assert plan.fill == pytest.approx(real / slots, rel=0.01)


def test_tags_come_before_the_sequences_of_their_source():
    sources = [
        JaggedArray.from_sequences([np.array(ids) for ids in own]) for own in ([[7, 2], [8, 9, 2]], [[5, 2]], [[6, 2]])
    ]
    mixed = MixedSequences(sources, [[4], [], [4, 10]])
    assert len(mixed) == 4
    assert mixed.lengths.tolist() == [3, 4, 2, 4]
    padded = mixed.to_padded(np.array([3, PAD_EXAMPLE, 1, 2, 0]), 5)
    assert padded.tolist() == [[4, 10, 6, 2, 0], [0] * 5, [4, 8, 9, 2, 0], [5, 2, 0, 0, 0], [4, 7, 2, 0, 0]]
    assert Lengths(sources[0], added=1)[0:2].tolist() == [3, 4]
