"""Packed batches: the one invariant again, rows that hold what they say, and a loss that does not notice."""

import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import small_config
from transformer.data import batching, packing
from transformer.data.batching import PAD_EXAMPLE, BucketedSchedule, JaggedArray
from transformer.data.packing import PackedSchedule
from transformer.data.tokenizer import EOS
from transformer.distributed import sharding
from transformer.distributed.mesh import make_mesh
from transformer.models import registry
from transformer.models.loss import cross_entropy
from transformer.training import train_step


def lengths(n=1000, seed=0):
    rng = np.random.default_rng(seed)
    source = np.clip(rng.lognormal(2.5, 0.5, n).astype(int), 2, None)
    return source, np.clip(source + rng.integers(-3, 5, n), 2, None)


def make_plan(n=1000, seed=7, **fields):
    return PackedSchedule(*lengths(n), **{"batch_tokens": 512, "max_length": 48, "seed": seed, **fields})


@pytest.mark.parametrize("hosts", [1, 2, 4, 8])
def test_any_number_of_hosts_sees_the_same_global_batches(hosts):
    plan, alone = make_plan(), make_plan()
    for number in range(plan.steps_per_epoch + 2):
        planned = plan.batch(number)
        shares = np.array_split(np.arange(planned.bucket.rows), hosts)
        parts = [batching.select_rows(planned, share).examples_B for share in shares]
        np.testing.assert_array_equal(np.concatenate(parts), alone.batch(number).examples_B)


@pytest.mark.parametrize("start", [1, 5, 31, 64, 200])
def test_any_step_is_known_without_those_before_it(start):
    seen = make_plan()
    before = [seen.batch(number).examples_B for number in range(start + 2)]
    resumed = make_plan()
    for number in range(start, start + 2):
        np.testing.assert_array_equal(resumed.batch(number).examples_B, before[number])


def test_the_plan_never_changes():
    """A golden plan. A change here is a change of the data order of every packed run."""
    plan = make_plan(n=40, batch_tokens=96)
    assert plan.buckets == [batching.Bucket(48, 48, 2)]
    assert plan.batch(0).examples_B.tolist() == [[7, 35, 23, -1, -1, -1, -1], [25, 0, 32, 27, -1, -1, -1]]


def test_rows_are_multiples_of_the_length_multiple():
    source, target, _ = make_plan(max_length=45, length_multiple=16).buckets[0]
    assert (source % 16, target) == (0, 48)
    assert make_plan(length_multiple=1).buckets == make_plan().buckets


def epoch_of(plan, epoch):
    steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
    return [plan.batch(number).examples_B for number in steps]


def test_an_epoch_holds_every_kept_pair_once_in_an_order_of_its_own():
    plan = make_plan()
    source, target = lengths()
    kept = np.flatnonzero((source <= 48) & (target <= 48))
    orders = []
    for epoch in range(2):
        examples = np.concatenate([batch.ravel() for batch in epoch_of(plan, epoch)])
        orders.append(examples[examples != PAD_EXAMPLE])
        np.testing.assert_array_equal(np.sort(orders[-1]), kept)
    assert not np.array_equal(*orders)
    assert (plan.kept, plan.dropped) == (len(kept), 1000 - len(kept))


def test_sentences_meet_others_in_every_epoch():
    plan = make_plan()
    pairs = []
    for epoch in range(2):
        rows = np.concatenate(epoch_of(plan, epoch))
        pairs.append({tuple(sorted(row[row != PAD_EXAMPLE])) for row in rows if row[1] != PAD_EXAMPLE})
    assert len(pairs[0] & pairs[1]) < len(pairs[0]) / 4


def test_every_row_holds_what_it_names():
    plan = make_plan()
    source, target = lengths()
    (bucket,) = plan.buckets
    for examples_BM in epoch_of(plan, 0):
        assert examples_BM.shape[0] == bucket.rows
        real = examples_BM != PAD_EXAMPLE
        assert (np.where(real, source[examples_BM], 0).sum(1) <= bucket.source).all()
        assert (np.where(real, target[examples_BM], 0).sum(1) <= bucket.target).all()


def test_rows_are_filled_and_fill_is_that_of_the_batches_made():
    plan = make_plan(n=20_000)
    _, target = lengths(20_000)
    (bucket,) = plan.buckets
    real = sum(np.where(batch != PAD_EXAMPLE, target[batch], 0).sum() for batch in epoch_of(plan, 0))
    assert plan.fill == pytest.approx(real / (plan.steps_per_epoch * bucket.rows * bucket.target))
    assert plan.fill > 0.95
    buckets = BucketedSchedule(*lengths(20_000), num_buckets=8, batch_tokens=512, max_length=48, seed=0)
    assert plan.fill > buckets.fill


def test_an_epoch_is_held_in_memory_as_its_order_alone():
    plan = make_plan(n=50_000, max_length=400, batch_tokens=4000)
    tracemalloc.start()
    plan.batch(0)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 12 * plan.kept


@pytest.mark.parametrize("sizes", [(10,), (10, 12)], ids=str)
def test_sentences_of_the_same_lengths_share_rows_too(sizes):
    lengths_N = np.resize(sizes, 1000)
    plan = PackedSchedule(lengths_N, lengths_N, batch_tokens=640, max_length=64, seed=0)
    assert plan.fill > 0.9


def test_the_seed_changes_the_order():
    assert not np.array_equal(make_plan(seed=1).batch(0).examples_B, make_plan(seed=2).batch(0).examples_B)


@pytest.mark.parametrize("n", [1, 2, 9])
def test_a_tiny_corpus_is_planned_too(n):
    plan = make_plan(n=n)
    examples = np.concatenate([batch.ravel() for batch in epoch_of(plan, 0)])
    assert sorted(examples[examples != PAD_EXAMPLE]) == list(range(n))


def test_no_pair_short_enough_gives_no_steps():
    assert make_plan(max_length=1).steps_per_epoch == 0


def test_as_few_rows_as_can_be_where_that_is_plain():
    """Two to a row at most, complements together, and a full side alone decides."""
    for sources, targets, rows in (([5, 2], [2, 5], 10), ([7, 3], [6, 4], 10), ([10], [1], 10), ([3], [5], 5)):
        packed = packing.pack(np.array(sources), np.array(targets), np.full(len(sources), 10), 10, 10)
        assert len(packed.counts_R) == rows
        assert len(packed.classes) == packed.counts_R.sum() == 10 * len(sources)


def corpus(n=60):
    rng = np.random.default_rng(1)
    source, target = lengths(n, seed=3)
    return tuple(
        JaggedArray.from_sequences([np.append(rng.integers(4, 40, size - 1), EOS) for size in sizes])
        for sizes in (source, target)
    )


def total_gradient(plan, ids, packed):
    """Loss sums and summed gradient over one epoch, without dropout."""
    model = registry.ModelDef(small_config(model={"num_layers": 1}).model, 40)
    params = model.init(0)

    def objective(params, batch):
        sums = cross_entropy(model.bind(params)(*batch, packed=packed), batch.target_BT, 0.1)
        return sums.smoothed_nll, sums

    add = jax.jit(jax.value_and_grad(objective, has_aux=True))
    parts = []
    for number in range(plan.steps_per_epoch):
        batch = jax.tree.map(jnp.asarray, batching.make_batch(plan.batch(number), *ids))
        (_, sums), grads = add(params, batch)
        parts.append((sums, grads))
    return jax.tree.map(lambda *leaves: sum(leaves), *parts)


def test_packed_loss_and_gradient_are_those_of_unpacked_rows():
    ids = corpus()
    sides = ids[0].lengths, ids[1].lengths
    fields = {"batch_tokens": 384, "max_length": 48, "seed": 0}
    packed, packed_grads = total_gradient(PackedSchedule(*sides, **fields), ids, packed=True)
    alone, grads = total_gradient(BucketedSchedule(*sides, num_buckets=1, **fields), ids, packed=False)
    assert packed.tokens == alone.tokens
    np.testing.assert_allclose(packed.smoothed_nll, alone.smoothed_nll, rtol=1e-5)
    np.testing.assert_allclose(packed.nll, alone.nll, rtol=1e-5)
    flat, want = (jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)]) for tree in (packed_grads, grads))
    assert jnp.linalg.norm(flat - want) < 1e-5 * jnp.linalg.norm(want)


@pytest.mark.slow
def test_the_field_packs_the_training_step():
    """The compiled update of a packed config is that of its sentences, whatever the number of devices."""
    ids = corpus()
    plan = PackedSchedule(ids[0].lengths, ids[1].lengths, batch_tokens=384, max_length=48, seed=0)
    batch = batching.make_batch(plan.batch(0), *ids)
    losses = {}
    for batching_mode in ("pack", "bucket"):
        config = small_config(
            data={"batching": batching_mode, "num_buckets": 8}, model={"dropout_rate": 0.0, "num_layers": 1}
        )
        mesh = make_mesh(config.mesh)
        model = registry.ModelDef(config.model, 40)
        update = train_step.make_train_step(model, config, mesh)
        _, metrics = update(train_step.init_state(model, config, mesh), sharding.shard_batch(mesh, batch))
        losses[batching_mode] = float(metrics.loss.nll / metrics.loss.tokens)
    model = registry.ModelDef(small_config(model={"num_layers": 1}).model, 40)
    examples = batch_examples(plan)
    source, target = (side.to_padded(examples, 48) for side in ids)
    sums = cross_entropy(model.bind(model.init(0))(jnp.asarray(source), jnp.asarray(target)), jnp.asarray(target), 0.0)
    assert losses["pack"] == pytest.approx(float(sums.nll / sums.tokens), rel=1e-5)
    assert losses["bucket"] != pytest.approx(losses["pack"], rel=1e-3)


def batch_examples(plan):
    examples = plan.batch(0).examples_B.ravel()
    return examples[examples != PAD_EXAMPLE]
