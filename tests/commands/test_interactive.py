"""Translation at a terminal: a line in, its translation out, until Ctrl-D or Ctrl-C."""

import contextlib
import io
import os
import pty
import select
import subprocess
import sys
import time

import pytest

from tests.commands.test_translate import SHORT, save, vocabulary  # noqa: F401 (a fixture)
from tests.conftest import ROOT
from tests.helpers import commands
from tests.helpers.clock import FakeClock
from tests.helpers.processes import environment
from transformer.translate import translate_stream

pytestmark = pytest.mark.reported
TIMEOUT_S = 120


@pytest.fixture(scope="module")
def workdir(vocabulary, tmp_path_factory):  # noqa: F811
    return save(tmp_path_factory.mktemp("runs") / "one", vocabulary)


@contextlib.contextmanager
def typed(*flags):
    """The translate command, whose stdin is a terminal, and the other side of that, on which keys are written."""
    keys, terminal = pty.openpty()
    command = [sys.executable, "-m", "transformer.translate", *map(str, flags)]
    # The first process of a session gets the terminal that it opens, so that Ctrl-C there is a signal to it.
    command = ["sh", "-c", 'exec "$@" < "$0"', os.ttyname(terminal), *command]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, cwd=ROOT, env=environment(1), start_new_session=True, **pipes)
    with process:
        try:
            yield process, keys
        finally:
            process.kill()
            os.close(keys)
            os.close(terminal)


def read_line(stream):
    """The next line, however it comes; fails if none does."""
    line, deadline = b"", time.monotonic() + TIMEOUT_S
    while not line.endswith(b"\n"):
        readable, _, _ = select.select([stream], [], [], max(deadline - time.monotonic(), 0))
        assert readable, f"no line, only {line!r}"
        byte = os.read(stream.fileno(), 1)
        assert byte, f"ended after {line!r}"
        line += byte
    return line


def wait_until_ready(process):
    while (line := read_line(process.stderr)) != b"ready\n":
        assert b"rror" not in line, line + process.stderr.read()


def test_each_line_is_translated_before_the_next_is_typed(workdir):
    source = [line.encode() + b"\n" for line in SHORT[:3]]
    piped = commands.run("-m", "transformer.translate", f"--workdir={workdir}", stdin=b"".join(source))
    expected = piped.stdout.splitlines(keepends=True)
    assert len(expected) == 3
    assert b"ready" not in piped.stderr
    with typed(f"--workdir={workdir}") as (process, keys):
        wait_until_ready(process)
        for line, translation in zip(source, expected, strict=True):
            os.write(keys, line)
            assert read_line(process.stdout) == translation
        os.write(keys, b"\x04")
        assert process.wait(TIMEOUT_S) == 0
        assert process.stdout.read() == b""


def test_lines_of_a_file_are_counted_while_they_are_translated(monkeypatch, capsys):
    clock, out = FakeClock(monkeypatch), io.BytesIO()

    def translate(group):
        clock.sleep(25)
        return [line.upper() for line in group]

    translate_stream(translate, ["a", "b", "c"], out, 2)
    assert out.getvalue() == b"A\nB\nC\n"
    assert capsys.readouterr().err.splitlines() == [
        "translating: 0 lines · 0:00:10 elapsed",
        "translating: 0 lines · 0:00:20 elapsed",
        "translating: 2 lines · 0:00:30 elapsed",
        "translating: 2 lines · 0:00:40 elapsed",
        "translating: 2 lines · 0:00:50 elapsed",
    ]


def test_ctrl_c_ends_it_with_the_usual_code_and_no_traceback(workdir):
    with typed(f"--workdir={workdir}") as (process, keys):
        wait_until_ready(process)
        time.sleep(0.5)  # a signal between Python's last look for one and the read waits for the next key
        os.write(keys, b"\x03")
        assert process.wait(TIMEOUT_S) == 130
        assert process.stderr.read() == b"\n"
        assert process.stdout.read() == b""


def test_ctrl_c_keeps_the_alignments_of_what_was_translated(workdir, tmp_path):
    with typed(f"--workdir={workdir}", f"--alignments={tmp_path}/alignments") as (process, keys):
        wait_until_ready(process)
        os.write(keys, f"{SHORT[0]}\n".encode())
        read_line(process.stdout)
        time.sleep(0.5)
        os.write(keys, b"\x03")
        assert process.wait(TIMEOUT_S) == 130
        assert b"Traceback" not in process.stderr.read()
    assert (tmp_path / "alignments").read_text().count("\n") == 1
