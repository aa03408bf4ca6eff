"""Sums, speeds and files of the log."""

import errno
import json
import math
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from etils import epath
from tensorboardX.proto import event_pb2

from tests.conftest import ROOT
from tests.helpers.clock import FakeClock
from transformer.models.flops import TrainingCost
from transformer.runtime.errors import DivergedError, StoppedError, UserError
from transformer.training.metrics import MetricsAccumulator, MetricWriter, peak_memory_mb, summarize_hosts
from transformer.training.objective import TrainingLoss
from transformer.training.train_step import StepMetrics


def metrics(nll=10.0, tokens=5.0, objective=12.0, norm=2.0):
    return StepMetrics(
        TrainingLoss(*map(np.float32, (objective, nll, 3.0, tokens))), np.float32(norm), np.float32(0.1), np.float32(6)
    )


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def test_means_are_over_tokens_not_over_batches():
    clock = Clock()
    meter = MetricsAccumulator(clock=clock)
    meter.add(metrics(nll=10, tokens=5), 1, slots=8, flops=0)
    meter.add(metrics(nll=90, tokens=15), 2, slots=24, flops=0)
    clock.now += 4
    summary = meter.summary()
    assert summary["train/loss"] == 5.0
    assert summary["train/target_tokens_per_s"] == 5.0
    assert summary["train/fill"] == 20 / 32
    assert summary["train/step_ms"] == 2000
    assert summary["train/accuracy"] == 6 / 20


def test_consistency_is_a_mean_over_tokens_where_there_is_one():
    meter = MetricsAccumulator(clock=Clock())
    meter.add(metrics(tokens=5), 1, slots=8, flops=0)
    assert "train/consistency" not in meter.summary()
    meter.reset()
    for consistency, tokens in ((2.0, 5), (6.0, 15)):
        meter.add(metrics(tokens=tokens)._replace(consistency=np.float32(consistency)), 1, slots=8, flops=0)
    assert meter.summary()["train/consistency"] == 0.4
    assert meter.summary()["train/loss"] == 1.0
    meter.reset()
    assert "train/consistency" not in meter.summary()


def test_time_spent_elsewhere_is_left_out():
    clock = Clock()
    meter = MetricsAccumulator(clock=clock)
    meter.add(metrics(), 1, slots=8, flops=0)
    clock.now += 1
    with meter.pause():
        clock.now += 1000
    assert meter.summary()["train/target_tokens_per_s"] == 5.0
    meter.reset()
    assert meter.summary()["train/loss"] == 0.0


@pytest.mark.parametrize("bad", [{"objective": math.nan}, {"objective": math.inf}, {"norm": math.nan}])
def test_what_is_no_number_stops_the_run_and_names_the_update(bad):
    with pytest.raises(DivergedError, match="at update 7 the loss is") as diverged:
        MetricsAccumulator().add(metrics(**bad), 7, slots=8, flops=0)
    assert diverged.value.step == 7


def test_a_skipped_update_is_logged_and_counted(capsys):
    meter = MetricsAccumulator(skipped=2)
    for step, skipped in ((1, 2), (2, 3), (3, 3)):
        meter.add(metrics()._replace(skipped=np.int32(skipped)), step, slots=8, flops=0)
    assert capsys.readouterr().err == "update 2 skipped: its loss of 2.400 is a spike; 3 skipped so far\n"
    assert meter.summary()["train/skipped_updates"] == 3


def test_the_training_cost_continues_after_a_resume():
    clock = Clock()
    meter = MetricsAccumulator(TrainingCost(flops=1e18, tokens=1000, source_tokens=2000, seconds=3600), clock)
    meter.add(metrics(tokens=5), 1, slots=8, flops=3e18)
    clock.now += 30
    meter.reset()
    with meter.pause():
        clock.now += 1000
    meter.add(metrics(tokens=7), 2, slots=8, flops=3e18)
    clock.now += 60
    assert meter.cost() == TrainingCost(flops=7e18, tokens=1012, source_tokens=2012, seconds=3690)
    assert MetricsAccumulator().cost().seconds < 1


def test_peak_memory_is_that_of_the_process_where_devices_do_not_say():
    assert 100 < peak_memory_mb() < 100_000


def test_peak_memory_is_that_of_the_fullest_device(monkeypatch):
    devices = [SimpleNamespace(memory_stats=lambda n=n: {"peak_bytes_in_use": n << 20}) for n in (3, 7, 5)]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    assert peak_memory_mb() == 7


def test_lines_are_json_and_resume_appends(tmp_path, capsys):
    for start in (0, 10):
        with MetricWriter(epath.Path(tmp_path), start, 20) as log:
            log.write(start + 10, {"train/loss": 1.5, "train/target_tokens_per_s": 1234.0})
            log.write(start + 10, {"valid/bleu": 30.0})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [10, 10, 20, 20]
    assert lines[1] == {"step": 10, "valid/bleu": 30.0}
    shown = capsys.readouterr().err
    assert "step 10/20 · loss 1.500 · 1,234 tokens/s · 0:00:0" in shown
    assert list(tmp_path.glob("events.out.tfevents.*"))


def test_the_time_left_has_hours(tmp_path, capsys, monkeypatch):
    clock = FakeClock(monkeypatch)
    with MetricWriter(epath.Path(tmp_path), 0, 101) as log:
        clock.now += 73.95
        log.write(2, {"train/loss": 1.5, "train/target_tokens_per_s": 9.0})
    assert "1:01:01 left" in capsys.readouterr().err


def test_a_log_of_256_hosts_is_small(tmp_path):
    rng, accumulator = np.random.default_rng(0), MetricsAccumulator()
    names = [*accumulator.host_timing(), "memory_mb"]
    with MetricWriter(epath.Path(tmp_path), 0, 1000) as log:
        for step in range(1, 1001):
            hosts = [dict(zip(names, row, strict=True)) for row in rng.uniform(0, 100, (256, len(names))).tolist()]
            log.write(step, {**accumulator.summary(), **TrainingCost().metrics(), **summarize_hosts(hosts)})
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 3e6


def test_a_closed_reader_of_log_lines_does_not_stop_training(tmp_path):
    program = (
        "import sys\nfrom etils import epath\nfrom transformer.runtime.logging import log_info\n"
        "from transformer.training.metrics import MetricWriter\n"
        "with MetricWriter(epath.Path(sys.argv[1]), 0, 9) as log:\n"
        "  sys.stdin.read()\n"
        "  log_info('stopping')\n"
        "  for step in (1, 2): log.write(step, {'train/loss': 1.5, 'train/target_tokens_per_s': 9.0})\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stderr.close()
        process.stdin.close()
        assert process.wait(60) == 0
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_disk_that_is_full_is_a_message(tmp_path, monkeypatch):
    with MetricWriter(epath.Path(tmp_path), 0, 20) as log:
        log._jsonl.close()
        monkeypatch.setattr(log, "_jsonl", open("/dev/full", "w"))  # noqa: SIM115
        with pytest.raises(UserError, match=r"^(?!--).*: No space left on device"):
            log.write(1, {"valid/bleu": 1.0})


def fail():
    raise OSError(errno.EIO, "Input/output error")


def test_an_error_of_the_event_file_is_a_message_too(tmp_path, monkeypatch):
    with MetricWriter(epath.Path(tmp_path), 0, 20) as log:
        log.write(1, {"valid/bleu": 1.0})
        with monkeypatch.context() as patched:
            patched.setattr(log._events, "flush", fail)
            with pytest.raises(UserError, match="Input/output error"):
                log.write(2, {"valid/bleu": 1.0})


def test_a_failed_upload_does_not_replace_the_error_that_ends_the_run(tmp_path, monkeypatch, capsys):
    def write(error):
        with MetricWriter(epath.Path(tmp_path), 0, 20) as log:
            monkeypatch.setattr(log._directory, "close", fail)
            if error:
                raise error

    with pytest.raises(UserError, match="Input/output error"):
        write(None)
    with pytest.raises(StoppedError, match="stopped"):
        write(StoppedError(15, "stopped"))
    assert "Input/output error" in capsys.readouterr().err


def test_events_hold_the_same_numbers(tmp_path):
    with MetricWriter(epath.Path(tmp_path), 0, 20) as log:
        log.write(10, {"valid/bleu": 30.5})
    (path,) = tmp_path.glob("events.out.tfevents.*")
    content, result = path.read_bytes(), {}
    while content:
        size = int.from_bytes(content[:8], "little")
        event = event_pb2.Event.FromString(content[12 : 12 + size])
        result.update({(event.step, value.tag): value.simple_value for value in event.summary.value})
        content = content[16 + size :]
    assert result == {(10, "valid/bleu"): 30.5}


def test_what_is_done_again_is_not_listed_twice(tmp_path):
    whole = b'{"step": 5, "a": 1}\n{"step": 10, "a": 2}\n{"step": 12, "a": 3}\n{"step": 1'
    (tmp_path / "metrics.jsonl").write_bytes(whole)
    with MetricWriter(epath.Path(tmp_path), 10, 20) as log:
        log.write(12, {"a": 4.0})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["a"]) for line in lines] == [(5, 1), (10, 2), (12, 4.0)]


def test_what_is_no_number_is_never_written(tmp_path):
    with MetricWriter(epath.Path(tmp_path), 0, 20) as log, pytest.raises(ValueError, match="not JSON compliant"):
        log.write(10, {"valid/loss": math.nan})


def test_metrics_of_a_run_that_lost_its_checkpoints_are_put_aside(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text('{"step": 5, "a": 1}\n')
    with MetricWriter(epath.Path(tmp_path), 0, 20) as log:
        log.write(1, {"a": 4.0})
    assert (tmp_path / "metrics.jsonl.old").read_text() == '{"step": 5, "a": 1}\n'
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "a": 4.0}\n'
    assert "training starts again" in capsys.readouterr().err
