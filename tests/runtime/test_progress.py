"""Long work shows how far it is, short work shows nothing."""

import os
import pty
import re
import subprocess
import sys
import threading
import time

import pytest

from tests.conftest import ROOT
from tests.helpers.clock import FakeClock
from transformer.runtime import logging, progress


@pytest.fixture
def clock(monkeypatch):
    return FakeClock(monkeypatch)


def test_a_short_phase_shows_nothing(clock, capsys):
    with progress.phase("reading"):
        clock.sleep(9)
    clock.now += 2
    for _ in progress.track(range(3), "counting", 3, "things"):
        clock.sleep(3)
    assert capsys.readouterr().err == ""


def test_a_call_that_takes_long_is_reported_every_ten_seconds(clock, capsys):
    with progress.phase("training a vocabulary"):
        clock.sleep(25)
    assert capsys.readouterr().err.splitlines() == [
        "training a vocabulary: 0:00:10 elapsed",
        "training a vocabulary: 0:00:20 elapsed",
    ]


def test_counts_and_the_time_left_are_shown(clock, capsys):
    with progress.phase("reading", 1_000, "pairs") as reading:
        clock.sleep(10)
        reading.advance(250)
        reading.note = "2 MB"
        clock.sleep(10)
    first, second = capsys.readouterr().err.splitlines()
    assert first == "reading: 0/1,000 pairs · 0:00:10 elapsed"
    assert second == "reading: 250/1,000 pairs · 2 MB · 0:00:20 elapsed · 0:01:00 left"
    list(progress.track(range(20), "reading", unit="pairs"))
    assert capsys.readouterr().err == ""


def test_what_does_not_recur_is_left_out_of_the_time_left(clock):
    with progress.phase("training", 100, "steps") as training:
        clock.sleep(300)
        progress.leave_out(298)
        training.advance(2)
        assert training.seconds == 300
        assert training.seconds_left == 98
    resumed = progress.Phase("training", 100, "steps", completed=50)
    assert resumed.seconds_left is None
    clock.sleep(5)
    resumed.completed = 60
    assert resumed.seconds_left == 20


def test_a_message_puts_off_the_next_line(clock, capsys):
    with progress.phase("training"):
        for step in range(4):
            clock.sleep(8)
            logging.log_info(f"step {step}")
    assert [line for line in capsys.readouterr().err.splitlines() if not line.startswith("step")] == []


def test_lines_are_of_the_innermost_phase(clock, capsys):
    with progress.phase("training"):
        clock.sleep(6)
        with progress.phase("saving"):
            clock.sleep(6)
        clock.sleep(10)
    assert capsys.readouterr().err.splitlines() == ["saving: 0:00:04 elapsed", "training: 0:00:20 elapsed"]


def test_only_process_0_shows_progress(clock, capsys):
    logging.set_process(1, 2)
    try:
        with progress.phase("reading"):
            clock.sleep(30)
    finally:
        logging.set_process(0, 1)
    assert capsys.readouterr().err == ""


def test_phases_that_follow_each_other_are_one_stretch_of_work(clock, capsys):
    for number in range(4):
        with progress.phase(f"file {number}"):
            clock.sleep(4)
    assert capsys.readouterr().err == "file 2: 0:00:02 elapsed\n"
    clock.now += 100  # without a phase
    with progress.phase("file 4"):
        clock.sleep(9)
    assert capsys.readouterr().err == ""


def test_a_phase_whose_iterator_is_dropped_ends(clock, capsys):
    items = progress.track(iter("abc"), "reading")
    next(items)
    del items
    clock.sleep(30)
    assert capsys.readouterr().err == ""


def test_a_thread_shows_a_phase_that_is_one_call(monkeypatch, capsys):
    monkeypatch.setattr(progress, "TICK_S", 0.01)
    monkeypatch.setattr(progress, "LINE_INTERVAL_S", 0.05)
    before = threading.active_count()
    with progress.phase("waiting"):
        time.sleep(0.5)
    shown = capsys.readouterr().err
    assert shown.count("waiting: 0:00:00 elapsed\n") > 2
    deadline = time.monotonic() + 10
    while threading.active_count() > before:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def in_terminal(program: str) -> str:
    """What a program writes to a terminal that is its stderr."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stderr=theirs, env=environment) as process:
        os.close(theirs)
        shown = b""
        while True:
            try:
                read = os.read(ours, 4096)
            except OSError:  # the other side is closed
                break
            if not read:
                break
            shown += read
        assert process.wait(60) == 0
    os.close(ours)
    return shown.decode()


def test_a_terminal_has_a_bar_and_keeps_messages_above_it():
    shown = in_terminal(
        "import time\nfrom transformer.runtime import logging, progress\nprogress.BAR_DELAY_S = 0\n"
        "progress.TICK_S = 0.05\n"
        "with progress.phase('training [x]', 100, 'steps') as training:\n"
        "  for step in range(10):\n"
        "    time.sleep(0.1)\n"
        "    training.advance(10)\n"
        "    logging.log_info(f'a message after {step}')\n"
        "logging.log_info('the end')\n"
    )
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    assert "training [x]" in plain
    assert re.search(r"━.* [0-9]+/100 steps · 0:00:0[01] elapsed · 0:00:0[01] left", plain)
    assert all(plain.count(f"a message after {step}\r\n") == 1 for step in range(10))
    assert "\x1b[?25l" not in shown  # Ctrl-C would leave the cursor hidden
    assert plain.rstrip().endswith("the end")


def test_stages_are_one_line_with_the_time_left_of_all(clock, capsys):
    stages = progress.Stages("preparing", {"cached": 50.0, "pairs": 30.0, "words": 10.0})
    with progress.shown(stages):
        with stages.stage("cached"):
            pass  # takes no time, so it tells nothing about the others
        with stages.stage("pairs"), progress.phase("storing", 100, "MB") as storing:
            for _ in range(10):
                clock.sleep(3)
                storing.advance(10)
        with stages.stage("words"), progress.phase("counting"):
            clock.sleep(11)
    assert capsys.readouterr().err.splitlines() == [
        "preparing: 22% · storing 30/100 MB · 0:00:10 elapsed · 0:00:34 left",
        "preparing: 45% · storing 60/100 MB · 0:00:20 elapsed · 0:00:24 left",
        "preparing: 68% · storing 90/100 MB · 0:00:30 elapsed · 0:00:14 left",
        "preparing: 75% · counting · 0:00:40 elapsed · 0:00:13 left",
    ]
