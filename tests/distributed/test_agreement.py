"""What processes agree on while they train: a stop, metrics of each host, and who is slow."""

import jax
import numpy as np
import pytest

from transformer.config import MeshConfig
from transformer.distributed import multihost, sharding
from transformer.distributed.mesh import make_mesh
from transformer.training import host_metrics, preemption


@pytest.fixture
def mesh():
    return make_mesh(MeshConfig(data=2, tensor=4))


@pytest.fixture
def two_hosts(monkeypatch):
    monkeypatch.setattr(multihost, "process_count", lambda: 2)
    monkeypatch.setattr(multihost, "process_name", lambda host: f"host {host}")


def test_every_device_has_what_every_process_gives(mesh):
    result = sharding.allgather_to_devices(mesh, np.array([7, 9], np.int32))
    np.testing.assert_array_equal(jax.device_get(result), [[7, 9]] * 8)
    assert result.sharding.is_fully_replicated


def test_one_host_needs_no_vote(mesh):
    assert preemption.PreemptionSync(mesh, lambda: 15)() == 15
    assert preemption.PreemptionSync(mesh, lambda: None)() is None


def test_a_vote_counts_after_the_next_update(mesh, two_hosts):
    signals = iter([None, 15, 15, 15])
    vote = preemption.PreemptionSync(mesh, lambda: next(signals))
    assert [vote() for _ in range(4)] == [None, None, 15, 15]


def test_the_vote_of_one_device_is_enough(mesh, two_hosts, monkeypatch):
    votes = iter([np.zeros((8, 1)), np.eye(8)[:, 3:4] * 15, np.zeros((8, 1))])
    monkeypatch.setattr(preemption, "allgather_to_devices", lambda *_: next(votes))
    vote = preemption.PreemptionSync(mesh, lambda: None)
    assert [vote() for _ in range(3)] == [None, None, 15]


def test_the_values_of_each_host_are_gathered(mesh, two_hosts):
    assert host_metrics.gather_host_metrics(mesh, {"step_ms": 20.0, "host_ms": 5.0}) == [{"step_ms": 20, "host_ms": 5}]


def test_the_log_has_median_and_maximum_over_the_hosts():
    hosts = [{"step_ms": step, "host_ms": own} for step, own in ((20, 5), (21, 9), (22, 4))]
    assert host_metrics.summarize_hosts(hosts) == {
        "hosts/step_ms/median": 21,
        "hosts/step_ms/max": 22,
        "hosts/host_ms/median": 5,
        "hosts/host_ms/max": 9,
        "hosts/slowest": 1,
    }


def test_one_host_alone_is_not_measured_apart(mesh):
    assert host_metrics.gather_host_metrics(mesh, {"host_ms": 5.0}) == []
    assert host_metrics.summarize_hosts([]) == {}
    assert host_metrics.StragglerDetector().update([]) == ""


def measured(*own, step=100.0):
    return [{"host_ms": ms, "step_ms": step, "input_wait": 0.5} for ms in own]


def test_a_slow_host_is_named_when_it_stays_slow(two_hosts):
    slowest = host_metrics.StragglerDetector()
    assert slowest.update(measured(10, 60)) == ""
    assert slowest.update(measured(10, 60)) == (
        "the others wait for host 1: it takes 60 ms of host time per update, the others 10 (median), and waits for "
        "data 50% of the time"
    )
    assert slowest.update(measured(60, 10)) == ""


def test_what_costs_no_time_is_not_worth_a_word(two_hosts):
    slowest = host_metrics.StragglerDetector()
    for result in (measured(50, 60), measured(50, 60), measured(1, 5), measured(1, 5)):
        assert slowest.update(result) == ""
