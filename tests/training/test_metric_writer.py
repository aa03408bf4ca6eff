"""The files and lines of the log."""

import errno
import json
import math
import subprocess
import sys

import numpy as np
import pytest
from etils import epath
from tensorboardX.proto import event_pb2

from tests.conftest import ROOT
from tests.helpers.clock import FakeClock
from transformer.models.flops import TrainingCost
from transformer.runtime.errors import StoppedError, UserError
from transformer.training.host_metrics import summarize_hosts
from transformer.training.metric_writer import MetricWriter, NullMetricWriter
from transformer.training.metrics import MetricsAccumulator


def test_a_writer_of_nothing_has_the_methods_of_one(tmp_path):
    with NullMetricWriter() as log:
        log.advance(1)
        log.write(1, {"train/loss": 1.0})
        log.log_step(1, "text")
        log.sync()
    own = {name for name, value in vars(MetricWriter).items() if callable(value) and name != "_write_event"}
    assert own <= vars(NullMetricWriter).keys()


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
        "from transformer.training.metric_writer import MetricWriter\n"
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
