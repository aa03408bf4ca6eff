"""Sums and speeds of the updates between two log lines."""

import math
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from transformer.models.flops import TrainingCost
from transformer.runtime.errors import DivergedError
from transformer.training.metrics import MetricsAccumulator, peak_memory_mb
from transformer.training.objective import TrainingLoss
from transformer.training.train_step import StepMetrics


def metrics(nll=10.0, tokens=5.0, objective=12.0, norm=2.0, consistency=None):
    loss = TrainingLoss(*map(np.float32, (objective, nll, 3.0, tokens)), consistency)
    return StepMetrics(loss, *map(np.float32, (norm, 0.1, 6)), skipped=np.int32(0))


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def test_means_are_over_tokens_not_over_batches():
    clock = Clock()
    meter = MetricsAccumulator(clock=clock)
    meter.add(metrics(nll=10, tokens=5, norm=2.0), 1, token_positions=8, flops=0)
    meter.add(
        metrics(nll=90, tokens=15, norm=4.0)._replace(learning_rate=np.float32(0.25)), 2, token_positions=24, flops=0
    )
    clock.now += 4
    summary = meter.summary()
    assert summary["train/loss"] == 5.0
    assert summary["train/target_tokens_per_s"] == 5.0
    assert summary["train/fill"] == 20 / 32
    assert summary["train/step_ms"] == 2000
    assert summary["train/accuracy"] == 6 / 20
    assert summary["train/grad_norm"] == 3.0  # of updates
    assert summary["train/learning_rate"] == 0.25  # the newest


def test_consistency_is_a_mean_over_tokens_where_there_is_one():
    meter = MetricsAccumulator(clock=Clock())
    meter.add(metrics(tokens=5), 1, token_positions=8, flops=0)
    assert "train/consistency" not in meter.summary()
    meter.reset()
    for consistency, tokens in ((2.0, 5), (6.0, 15)):
        meter.add(metrics(tokens=tokens, consistency=np.float32(consistency)), 1, token_positions=8, flops=0)
    assert meter.summary()["train/consistency"] == 0.4
    assert meter.summary()["train/loss"] == 1.0
    meter.reset()
    assert "train/consistency" not in meter.summary()


def test_time_spent_elsewhere_is_left_out():
    clock = Clock()
    meter = MetricsAccumulator(clock=clock)
    meter.add(metrics(), 1, token_positions=8, flops=0)
    clock.now += 1
    with meter.pause():
        clock.now += 1000
    assert meter.summary()["train/target_tokens_per_s"] == 5.0
    meter.reset()
    assert meter.summary()["train/loss"] == 0.0


@pytest.mark.parametrize("bad", [{"objective": math.nan}, {"objective": math.inf}, {"norm": math.nan}])
def test_what_is_no_number_stops_the_run_and_names_the_update(bad):
    with pytest.raises(DivergedError, match="at update 7 the loss is") as diverged:
        MetricsAccumulator().add(metrics(**bad), 7, token_positions=8, flops=0)
    assert diverged.value.step == 7


def test_a_skipped_update_is_logged_and_counted(capsys):
    meter = MetricsAccumulator(skipped=2)
    for step, skipped in ((1, 2), (2, 3), (3, 3)):
        meter.add(metrics()._replace(skipped=np.int32(skipped)), step, token_positions=8, flops=0)
    assert capsys.readouterr().err == "update 2 skipped: its loss of 2.400 is a spike; 3 skipped so far\n"
    assert meter.summary()["train/skipped_updates"] == 3


def test_the_training_cost_continues_after_a_resume():
    clock = Clock()
    meter = MetricsAccumulator(TrainingCost(flops=1e18, tokens=1000, source_tokens=2000, seconds=3600), clock)
    meter.add(metrics(tokens=5), 1, token_positions=8, flops=3e18)
    clock.now += 30
    meter.reset()
    with meter.pause():
        clock.now += 1000
    meter.add(metrics(tokens=7), 2, token_positions=8, flops=3e18)
    clock.now += 60
    assert meter.cost() == TrainingCost(flops=7e18, tokens=1012, source_tokens=2012, seconds=3690)
    assert MetricsAccumulator().cost().seconds < 1


def test_peak_memory_is_that_of_the_process_where_devices_do_not_say():
    assert 100 < peak_memory_mb() < 100_000


def test_peak_memory_is_that_of_the_fullest_device(monkeypatch):
    devices = [SimpleNamespace(memory_stats=lambda n=n: {"peak_bytes_in_use": n << 20}) for n in (3, 7, 5)]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    assert peak_memory_mb() == 7
