"""Rows F: losses that are no numbers or shoot up, other numbers of hosts, parts of a batch."""

import contextlib
import itertools
import json
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.faults.coverage import shares
from tests.faults.table import Tally, row
from tests.faults.world import Heard, World
from tests.training import test_train_step
from train import train as fit
from transformer.checkpoints import loading
from transformer.checkpoints.manager import CheckpointManager
from transformer.config import MeshConfig
from transformer.data import corpus as corpora
from transformer.data import input_pipeline
from transformer.data.batching import Batch, make_batch
from transformer.distributed import sharding
from transformer.distributed.mesh import make_mesh
from transformer.evaluation import evaluator
from transformer.evaluation.evaluator import CrossEntropy, Evaluator
from transformer.models.loss import cross_entropy
from transformer.runtime.errors import DivergedError
from transformer.training import train_step, workdir

AT = 8  # the update that is disturbed


@contextlib.contextmanager
def poisoned(place: str, value: float, updates: range = range(AT, AT + 1), seed: int = 0) -> Iterator[None]:
    """Adds a value to the loss, the gradient or the params within these updates, counted from 1, or scales the loss."""
    sum_gradients = train_step.accumulate_gradients
    base = jax.random.fold_in(jax.random.key(seed), 1)
    keys = jnp.stack([jax.random.key_data(jax.random.fold_in(base, update - 1)) for update in updates])

    def poisoned_sum(objective, params, batch, key, parts):
        hit = (jax.random.key_data(key)[None] == keys).all(1).any()
        poison = jnp.where(hit, jnp.float32(value), jnp.float32(place == "scale"))

        def bad(params, batch, key):
            total, sums = objective(params, batch, key)
            change = jnp.multiply if place == "scale" else jnp.add
            return change(total, poison), sums._replace(objective=change(sums.objective, poison))

        if place == "params":
            params = jax.tree.map(lambda leaf: leaf + poison, params)
        total, sums = sum_gradients(bad if place in ("forward", "scale") else objective, params, batch, key, parts)
        return (jax.tree.map(lambda leaf: leaf + poison, total) if place == "gradient" else total), sums

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_step, "accumulate_gradients", poisoned_sum)
        yield


def short(world: World, **train):
    """A config of 12 updates, a checkpoint every 3, a validation every 6."""
    return world.config(train={"num_steps": 12, "checkpoint_every_steps": 3, "eval_every_steps": 6, **train})


@row("F1", "NaN and infinity in forward pass, gradient, params, validation loss", full=14, quick=4)
def no_numbers(world: World, tally: Tally) -> None:
    values = (float("nan"),) if tally.quick else (float("nan"), float("inf"))
    cases = list(
        itertools.product(("forward", "gradient") if tally.quick else ("forward", "gradient", "params"), values)
    )
    for place, value in cases:
        with tally.one(f"{value} in the {place}: the update"), poisoned(place, value):
            assert_not_applied(world)
    for place, value in cases[1:2] if tally.quick else cases:
        with tally.one(f"{value} in the {place}: the run"), Heard(), poisoned(place, value):
            assert_run_stops(world)
    for value in values:
        with tally.one(f"{value} in validation"), Heard(), pytest.MonkeyPatch.context() as patch:
            held_out, losses = Evaluator.teacher_forced_loss, iter([None, CrossEntropy(value, 1, 1)])
            patch.setattr(Evaluator, "teacher_forced_loss", lambda *args: next(losses) or held_out(*args))  # noqa: B023
            run = world.new_folder()
            with pytest.raises(DivergedError, match="the validation loss is"):
                fit(short(world), run)
            assert CheckpointManager(run).latest_valid_step() == 9
            assert loading.resolve_steps(CheckpointManager(run), "best") == [6]


def assert_not_applied(world: World) -> None:
    """Update AT leaves the whole state as it was, and the one before does not."""
    config, mesh, built, _ = test_train_step.setup()
    update = train_step.make_train_step(built, config, mesh)
    state = train_step.init_state(built, config, mesh)._replace(
        step=jax.device_put(np.int32(AT - 2), sharding.replicated(mesh))
    )
    batch = sharding.shard_batch(mesh, test_train_step.draw_batch())
    states = [jax.device_get(state)]
    for _ in range(2):
        state, metrics = update(state, batch)
        states.append(jax.device_get(state))
    assert not (np.isfinite(metrics.loss.objective) and np.isfinite(metrics.grad_norm))
    before, after, last = (jax.tree.leaves(each) for each in states)
    assert not all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(np.array_equal(a, b) for a, b in zip(after, last, strict=True))


def assert_run_stops(world: World) -> None:
    """At that update, with the pairs of its batch in a file, and the checkpoint of before left."""
    run, config = world.new_folder(), short(world)
    with pytest.raises(DivergedError, match=f"at update {AT} ") as diverged:
        fit(config, run)
    assert diverged.value.exit_code == 3
    assert CheckpointManager(run).latest_valid_step() == 6
    assert loading.resolve_steps(CheckpointManager(run), "best") == [6]
    result = json.loads((run / workdir.DIVERGED_FILE).read_text())
    corpus = corpora.open_corpus(config.data)
    ids = input_pipeline.token_ids(config.data, corpus, "train", CheckpointManager(run).tokenizer(6))
    wanted = input_pipeline.make_batch_schedule(config, ids).batch(AT - 1).examples_B
    assert [pair["number"] for pair in result["pairs"]] == wanted[wanted >= 0].tolist()
    pairs = [(pair["source"], pair["target"]) for pair in result["pairs"]]
    assert pairs == [corpus.split("train")[pair["number"]] for pair in result["pairs"]]


@row("F2", "loss spikes: skipped, counted, logged, at most K; exact when resumed in the midst of one", full=3, quick=3)
def spikes(world: World, tally: Tally) -> None:
    config = short(world, spike_factor=3.0, max_skipped_updates=2, log_every_steps=1)
    run, spike = world.new_folder(), range(7, 11)  # longer than K
    with poisoned("scale", 50.0, spike), Heard() as heard:
        fit(config, run)
        with tally.one("at most K are skipped"):
            lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            skipped = [line["train/skipped_updates"] for line in lines if "train/loss" in line]
            assert skipped == [0] * 6 + [1, 2, 2, 2, 2, 2]
            assert "update 7 skipped: its loss of" in heard.getvalue()
            assert "2 skipped so far" in heard.getvalue()
        with tally.one("a skipped update changes nothing"):
            states = [world.state(run, done) for done in (6, 9, 12)]
            assert not all(np.array_equal(a, b) for a, b in zip(states[0], states[1], strict=True))
            stopped = world.new_folder()
            fit(short(world, spike_factor=3.0, max_skipped_updates=2, log_every_steps=1, num_steps=8), stopped)
            moved = [
                i for i, (a, b) in enumerate(zip(states[0], world.state(stopped, 8), strict=True)) if (a != b).any()
            ]
            assert len(moved) == 3, "more than the counters of steps, of the spike and of skipped updates have changed"
        with tally.one("resumed in the midst of a spike"):
            fit(config, stopped)
            assert all(np.array_equal(a, b) for a, b in zip(world.state(stopped, 12), states[2], strict=True))


@row("F3", "hosts 1 to 2 to 4 to 1 in a run: the same global batches, the same loss", full=24, quick=24)
def hosts_change(world: World, tally: Tally) -> None:
    config = world.config()
    run = loading.load_checkpoint(world.whole().workdir, "latest")
    with Heard():
        corpus = corpora.open_corpus(config.data)
        ids = input_pipeline.token_ids(config.data, corpus, "train", run.tokenizer)
    plan = input_pipeline.make_batch_schedule(config, ids)
    mesh = make_mesh(MeshConfig())
    eval_step = evaluator.make_eval_step(run.model, mesh)
    params = sharding.replicate(mesh, run.params)
    wanted = {done: seen.split(",") for done, seen in world.whole().ids.items()}
    largest = 0.0
    for done in range(24):
        hosts = (1, 2, 4, 1)[done // 6]
        with tally.one(f"step {done + 1}, {hosts} hosts"):
            planned = plan.batch(done)
            parts = shares(planned, mesh, hosts)
            together = np.concatenate([part.examples_B for part in parts])
            assert [str(example) for example in together if example >= 0] == [x for x in wanted[done + 1] if x != "-1"]
            assembled = [make_batch(part, *ids) for part in parts]
            batch = Batch(*(np.concatenate(sides) for sides in zip(*assembled, strict=True)))
            losses = [
                eval_step(params, sharding.shard_batch(mesh, each)) for each in (batch, make_batch(planned, *ids))
            ]
            ours, theirs = (float(sums.nll / sums.tokens) for sums in losses)
            largest = max(largest, abs(ours - theirs) / theirs)
            assert largest <= 1e-6
    tally.note(f"largest difference of the loss {largest:.0e}")


@row("F4", "gradient accumulation makes the update of the whole batch, sentences of uneven lengths", full=6, quick=2)
def parts_of_a_batch(world: World, tally: Tally) -> None:
    for parts, rows in ((2, 7), (4, 8)) if tally.quick else itertools.product((2, 4, 8), (7, 16)):
        with tally.one(f"{parts} parts of {rows} rows"):
            _, mesh, built, _ = test_train_step.setup()
            batch = test_train_step.draw_batch(rows=rows)

            def objective(params, batch, key):
                logits = built.bind(params)(batch.source_BS, batch.target_BT, key)  # noqa: B023
                sums = cross_entropy(logits, batch.target_BT, 0.1)
                return sums.smoothed_nll, sums

            init = built.init

            def summed(batch, parts):
                return train_step.accumulate_gradients(objective, init(0), batch, jax.random.key(3), parts)  # noqa: B023

            summed = jax.jit(summed, static_argnums=1)
            (grads, sums), (whole, wanted) = (
                summed(sharding.shard_batch(mesh, batch, count), count) for count in (parts, 1)
            )
            assert float(sums.tokens) == float(wanted.tokens)
            np.testing.assert_allclose(sums, wanted, rtol=1e-5)
            norm = lambda tree: np.sqrt(sum(float((leaf**2).sum()) for leaf in jax.tree.leaves(tree)))  # noqa: E731
            assert norm(jax.tree.map(jnp.subtract, grads, whole)) <= 1e-5 * norm(whole)
