"""The plan of global batches: the one invariant."""

import numpy as np
import pytest

from transformer.config import DataConfig
from transformer.data import batching
from transformer.data.batching import PAD_EXAMPLE, BatchSpec, Bucket, BucketedSchedule, JaggedArray
from transformer.data.tokenizer import PAD


def lengths(n=1000, seed=0):
    rng = np.random.default_rng(seed)
    source = rng.integers(2, 40, n)
    return source, np.clip(source + rng.integers(-5, 6, n), 2, None)


def make_plan(n=1000, seed=7, scale=1, **fields):
    source, target = lengths(n)
    fields = {"num_buckets": 4, "batch_tokens": 512, "max_length": 32, "seed": seed, **fields}
    return BucketedSchedule(scale * source, scale * target, **fields)


def rows_of(plan, step, hosts):
    """The global batch as the hosts together hold it."""
    planned = plan.batch(step)
    share = -(-planned.bucket.rows // hosts)
    parts = [batching.select_rows(planned, np.arange(host * share, (host + 1) * share)) for host in range(hosts)]
    assert {part.bucket for part in parts} == {planned.bucket}
    return np.concatenate([part.examples_B for part in parts])


@pytest.mark.parametrize("hosts", [1, 2, 4, 8])
def test_any_number_of_hosts_sees_the_same_global_batches(hosts):
    plan, alone = make_plan(), make_plan()
    for step in range(2 * plan.steps_per_epoch):
        np.testing.assert_array_equal(rows_of(plan, step, hosts), alone.batch(step).examples_B)


def test_hosts_that_do_not_divide_the_rows_add_padding_rows_only():
    plan = make_plan()
    rows = rows_of(plan, 3, 3)
    whole = plan.batch(3).examples_B
    np.testing.assert_array_equal(rows[: len(whole)], whole)
    assert (rows[len(whole) :] == PAD_EXAMPLE).all()


@pytest.mark.parametrize("start", [1, 5, 40, 41, 100])
def test_any_step_is_known_without_those_before_it(start):
    seen = make_plan()
    before = [seen.batch(step) for step in range(start + 3)]
    resumed = make_plan()
    for step in range(start, start + 3):
        np.testing.assert_array_equal(resumed.batch(step).examples_B, before[step].examples_B)
        assert resumed.batch(step).bucket == before[step].bucket


def test_the_plan_never_changes():
    """A golden plan. A change here is a change of the data order of every run: bump the version if it is meant."""
    plan = make_plan(n=60, batch_tokens=128)
    assert plan.buckets == [Bucket(6, 6, 16), Bucket(16, 14, 8), Bucket(26, 23, 5), Bucket(32, 32, 4)]
    assert plan.batch(0).examples_B.tolist() == [45, 9, 1, PAD_EXAMPLE]
    assert plan.batch(20).examples_B.tolist() == [51, 31, 8, 3, 20, 37, 48, PAD_EXAMPLE]


def test_an_epoch_holds_every_kept_pair_once_in_an_order_of_its_own():
    plan = make_plan()
    source, target = lengths()
    kept = np.flatnonzero((source <= 32) & (target <= 32))
    epochs = []
    for epoch in range(2):
        steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
        examples = np.concatenate([plan.batch(step).examples_B for step in steps])
        epochs.append(examples[examples != PAD_EXAMPLE])
        np.testing.assert_array_equal(np.sort(epochs[-1]), kept)
    assert not np.array_equal(*epochs)
    assert (plan.kept, plan.dropped) == (len(kept), 1000 - len(kept))


def test_the_seed_changes_the_order():
    assert not np.array_equal(make_plan(seed=1).batch(0).examples_B, make_plan(seed=2).batch(0).examples_B)


def test_every_pair_fits_its_bucket_and_every_batch_its_budget():
    plan = make_plan()
    source, target = lengths()
    for step in range(plan.steps_per_epoch):
        bucket, examples = plan.batch(step)
        real = examples[examples != PAD_EXAMPLE]
        assert len(examples) == bucket.rows
        assert bucket.rows * bucket.target <= 512
        assert bucket.rows % batching.ROW_MULTIPLE == 0
        assert source[real].max() <= bucket.source
        assert target[real].max() <= bucket.target


def test_fill_is_that_of_the_batches_made():
    plan = make_plan()
    _, target = lengths()
    real = slots = 0
    for step in range(plan.steps_per_epoch):
        bucket, examples = plan.batch(step)
        real += target[examples[examples != PAD_EXAMPLE]].sum()
        slots += bucket.rows * bucket.target
    assert plan.fill == pytest.approx(real / slots)


@pytest.mark.parametrize("longest", [30, 700])
def test_widths_are_multiples_of_the_length_multiple_and_the_same_pairs_are_kept(longest):
    fields = {"n": 5000, "max_length": longest, "batch_tokens": 4096}
    if longest > batching.MAX_CANDIDATE_WIDTHS:
        fields["scale"] = 20
    plain, rounded = make_plan(**fields), make_plan(length_multiple=8, **fields)
    assert all(bucket.source % 8 == bucket.target % 8 == 0 for bucket in rounded.buckets)
    assert max(max(bucket[:2]) for bucket in rounded.buckets) < longest + 8
    assert rounded.kept == plain.kept
    assert 0.8 * plain.fill < rounded.fill <= plain.fill + 0.01
    assert make_plan(length_multiple=1, **fields).buckets == plain.buckets


@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize("longest", [37, 256, 257, 514, 5000])
def test_no_width_exceeds_the_longest_row_of_the_config(longest, multiple):
    data = DataConfig(max_length=longest, length_multiple=multiple)
    source, target = np.arange(2, longest + 1), np.arange(longest, 1, -1)
    buckets = batching.choose_buckets(source, target, 4, longest, multiple, longest)
    assert max(max(bucket[:2]) for bucket in buckets) == data.max_row_length
    assert (batching.assign_buckets(source, target, buckets) >= 0).all()
    widest = buckets[-1]
    assert widest.rows * widest.target <= max(longest, data.max_row_length)
    assert widest.source % multiple == widest.target % multiple == 0


@pytest.mark.parametrize("num_buckets", [1, 2, 3, 5])
def test_cuts_are_the_cheapest_of_all(num_buckets):
    """Dynamic programming against trying every way to cut."""
    import itertools

    rng = np.random.default_rng(num_buckets)
    n = 9
    cost = np.triu(rng.random((n + 1, n + 1)) * np.arange(1, n + 2), 1)
    cost[np.tril_indices(n + 1)] = np.inf
    ways = [(0, *inner, n) for k in range(num_buckets) for inner in itertools.combinations(range(1, n), k)]
    best = min(sum(cost[a, b] for a, b in itertools.pairwise(way)) for way in ways)
    got = batching._optimal_boundaries(cost, num_buckets)
    assert sum(cost[a, b] for a, b in got) == pytest.approx(best)
    assert [got[0][0], got[-1][1]] == [0, n]
    assert all(a[1] == b[0] for a, b in itertools.pairwise(got))
    assert len(got) <= num_buckets


def test_more_buckets_fill_better():
    fills = [make_plan(n=5000, num_buckets=k).fill for k in (1, 2, 4, 8)]
    assert fills == sorted(fills)
    assert fills[-1] > 0.8 > fills[0]


@pytest.mark.parametrize("n", [1, 2, 7])
def test_a_tiny_corpus_is_planned_too(n):
    plan = make_plan(n=n, max_length=64)
    examples = np.concatenate([plan.batch(step).examples_B for step in range(plan.steps_per_epoch)])
    assert sorted(examples[examples != PAD_EXAMPLE]) == list(range(n))


def test_pairs_of_one_length_make_one_bucket():
    plan = BucketedSchedule(np.full(50, 5), np.full(50, 6), num_buckets=8, batch_tokens=64, max_length=10, seed=0)
    assert plan.buckets == [Bucket(5, 6, 8)]


def test_no_pair_short_enough_gives_no_steps():
    assert make_plan(max_length=1).steps_per_epoch == 0


@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 100, 101])
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_evaluation_covers_every_sentence_once(n, rows):
    planned = batching.eval_batches(*lengths(n), lambda width: rows)
    examples = np.concatenate([p.examples_B for p in planned]) if planned else np.zeros(0, int)
    assert sorted(examples[examples != PAD_EXAMPLE]) == list(range(n))
    assert all(len(p.examples_B) == p.bucket.rows == rows for p in planned)


def test_evaluation_width_depends_on_the_sentence_alone():
    assert [batching.round_up_to_power_of_two(n) for n in (1, 16, 17, 32, 33, 100_000)] == [16, 16, 32, 32, 64, 131_072]


def test_rectangles_cut_pad_and_leave_padding_rows_empty():
    ragged = JaggedArray.from_sequences([np.array([5, 6, 2]), np.array([2]), np.array([], int), np.array([7, 8, 9, 2])])
    got = ragged.to_padded(np.array([3, 0, PAD_EXAMPLE, 1, 2]), 3)
    np.testing.assert_array_equal(got, [[7, 8, 9], [5, 6, 2], [PAD] * 3, [2, PAD, PAD], [PAD] * 3])
    assert got.dtype == np.int32


def test_assemble_takes_source_and_target_of_the_same_pair():
    source = JaggedArray.from_sequences([np.array([10, 2]), np.array([11, 2])])
    target = JaggedArray.from_sequences([np.array([20, 2]), np.array([21, 2])])
    batch = batching.make_batch(BatchSpec(Bucket(2, 3, 2), np.array([1, 0])), source, target)
    np.testing.assert_array_equal(batch.source_BS, [[11, 2], [10, 2]])
    np.testing.assert_array_equal(batch.target_BT, [[21, 2, PAD], [20, 2, PAD]])


def test_worked_examples_of_the_comments():
    jagged = JaggedArray(np.array([5, 6, 2, 7, 2]), np.array([0, 3, 5]))
    padded = jagged.to_padded(np.array([[1, 0], [0, PAD_EXAMPLE]]), 6)
    np.testing.assert_array_equal(padded, [[7, 2, 5, 6, 2, PAD], [5, 6, 2, PAD, PAD, PAD]])
    counts = np.array([[0, 0, 0], [0, 1, 1], [0, 0, 1]])
    assert batching._choose_widths(counts, 1) == [(2, 2)]
    assert batching._choose_widths(counts, 2) == [(2, 1), (2, 2)]
    inf = np.inf
    assert batching._optimal_boundaries(np.array([[inf, 6, 12], [inf, inf, 4], [inf] * 3]), 2) == [(0, 1), (1, 2)]
