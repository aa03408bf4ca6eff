"""Messages on stderr."""

import io
import signal
import sys
from types import SimpleNamespace

import pytest

from transformer.runtime.errors import UserError
from transformer.runtime.logging import log_info, logged_beside, report_unraisable


class Interrupted(io.RawIOBase):
    """A file whose first write is interrupted by a signal."""

    def __init__(self):
        self.written, self.interrupted = b"", False

    def writable(self):
        return True

    def write(self, data):
        if not self.interrupted:
            self.interrupted = True
            signal.raise_signal(signal.SIGTERM)
        self.written += bytes(data)
        return len(data)


def test_a_handler_s_message_may_come_while_another_is_written(monkeypatch):
    handled = []

    def handle(number, frame):
        log_info("stopping")
        handled.append(number)

    before = signal.signal(signal.SIGTERM, handle)
    try:
        file = Interrupted()
        monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BufferedWriter(file)))
        log_info("step 1")
        log_info("step 2")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert handled == [signal.SIGTERM]
    lines = file.written.decode().splitlines()
    assert "step 1" in lines
    assert lines[-1] == "step 2"


@pytest.mark.parametrize(("message", "is_shown"), [("Event loop is closed", False), ("another", True)])
def test_writes_that_end_after_a_failed_save_say_nothing(monkeypatch, message, is_shown):
    shown = []
    monkeypatch.setattr(sys, "__unraisablehook__", shown.append)
    report_unraisable(SimpleNamespace(exc_value=RuntimeError(message)))
    assert bool(shown) == is_shown


def test_an_error_beside_the_one_that_ends_the_run_is_only_logged(capsys):
    with logged_beside(ValueError("first")):
        raise UserError("second")
    assert capsys.readouterr().err == "second\n"
    with pytest.raises(UserError, match="alone"), logged_beside(None):
        raise UserError("alone")
