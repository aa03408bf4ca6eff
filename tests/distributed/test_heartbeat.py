"""Whether hosts that fall silent or fail end the others, without any process but this one."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import jax
import pytest

from tests.conftest import ROOT
from transformer.distributed import heartbeat
from transformer.distributed.heartbeat import Heartbeat
from transformer.runtime.errors import UserError

NAMES = ["host 0 (process 7 on a)", "host 1 (process 8 on b)", "host 2 (process 9 on c)"]


class Service:
    """What the coordination service keeps; every other host beats whenever it is asked, but the silent ones."""

    def __init__(self, silent=()):
        self.kept, self.silent, self.asked, self.answers = {}, set(silent), 0, True

    def key_value_set(self, key, value, overwrite=False):
        assert overwrite or key not in self.kept
        self.kept[key] = value

    def key_value_dir_get(self, folder):
        while not self.answers:
            time.sleep(0.01)
        self.asked += 1
        for host in range(len(NAMES)):
            if host not in self.silent:
                self.kept[f"beat/{host}"] = str(self.asked)
        return [(key, value) for key, value in self.kept.items() if key.startswith(folder)]


class Ended(Exception):
    pass


@pytest.fixture
def ended(monkeypatch):
    """Exit codes, in place of the end of this process."""
    codes = []
    monkeypatch.setattr(heartbeat, "GRACE", 0.1)
    monkeypatch.setattr(heartbeat, "LINGER", 0.3)
    monkeypatch.setattr(os, "_exit", lambda code: codes.append(code) or (_ for _ in ()).throw(Ended))
    monkeypatch.setattr("threading.excepthook", lambda _: None)
    yield codes
    while BEATING:
        BEATING.pop().stop()
    for thread in threading.enumerate():
        if thread.name.startswith("heartbeat"):
            thread.join(10)


BEATING = []


def beating(service, index=0, timeout=1.0, **options):
    beats = Heartbeat(service, index, NAMES, timeout, **options)
    beats.start()
    BEATING.append(beats)
    return beats


def until(condition, seconds=10):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_hosts_that_beat_are_left_alone(ended):
    beating(Service())
    time.sleep(2.5)
    assert not ended


def test_a_silent_host_is_named(ended, capsys):
    beating(Service(silent=[2]))
    until(lambda: ended)
    assert ended == [1]
    assert f"{NAMES[2]} has been silent for 1 s (--host_timeout), so the run ends" in capsys.readouterr().err


def test_a_scheduler_can_tell_a_lost_host_from_a_failure(ended):
    """The exit code asked for is that of a silent host; the others end with it too. A failure keeps its own."""
    service = Service(silent=[2])
    beating(service, lost_exit_code=75)
    until(lambda: ended)
    assert ended == [75]
    assert json.loads(service.kept["failed/0"])[0] == 75
    ended.clear()
    service = Service()
    service.kept["failed/1"] = json.dumps([1, "ValueError: x"])
    beating(service, lost_exit_code=75)
    until(lambda: ended)
    assert ended == [1]


def test_a_service_that_does_not_answer_is_host_0(ended, capsys):
    service = Service()
    beating(service, index=1)
    until(lambda: service.asked)
    service.answers = False
    until(lambda: ended)
    service.answers = True
    assert ended[0] == 1
    assert f"{NAMES[0]} has been silent" in capsys.readouterr().err


def test_a_host_that_failed_ends_the_others_with_its_code(ended, capsys):
    service = Service()
    service.kept["failed/1"] = json.dumps([3, "the run diverged"])
    beating(service)
    until(lambda: ended)
    assert ended == [3]
    assert f"{NAMES[1]} ended: the run diverged" in capsys.readouterr().err
    assert json.loads(service.kept["failed/0"])[0] == 3


def test_a_failure_is_reported_to_the_other_processes(ended, capsys):
    service = Service()
    beats = beating(service, index=1)
    with pytest.raises(Ended):
        beats.abort(UserError("no such file"))
    assert ended == [2]
    assert json.loads(service.kept["failed/1"]) == [2, "no such file"]
    assert "no such file" in capsys.readouterr().err


def test_a_broken_collective_waits_to_know_who_went_away(ended, capsys):
    beats = beating(Service(silent=[1]))
    with pytest.raises(Ended):
        beats.abort(jax.errors.JaxRuntimeError("UNKNOWN: Gloo AllReduce failed: Connection closed by peer"))
    assert set(ended) == {1}
    said = capsys.readouterr().err
    assert f"{NAMES[1]} has been silent" in said
    assert "to see whether another host is the cause of: UNKNOWN: Gloo AllReduce failed" in said.splitlines()[0]


def test_a_host_that_stood_still_itself_blames_nobody(ended, monkeypatch):
    """As after SIGSTOP and SIGCONT: its clock went on, and it heard nothing meanwhile."""
    beating(Service(), timeout=2)
    shift, clock = [0.0], time.monotonic
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: clock() + shift[0])
    shift[0] = 60.0
    time.sleep(1)
    assert not ended


def test_an_abort_ends_with_the_message():
    program = (
        "import os\nfrom transformer.distributed.heartbeat import report_on_sigabrt\n"
        "with report_on_sigabrt('host 0 has gone away', 75):\n    os.abort()"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, cwd=ROOT)
    assert result.returncode == 75
    assert result.stderr.decode().endswith("host 0 has gone away\n")


def test_after_the_block_an_abort_is_an_abort():
    program = (
        "import os\nfrom transformer.distributed.heartbeat import report_on_sigabrt\n"
        "with report_on_sigabrt('never'):\n    pass\nos.abort()"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == -signal.SIGABRT
