"""Long work tells how far it is, short work tells nothing."""

import pytest

from transformer.runtime import logging


@pytest.mark.parametrize(("seconds", "lines"), [(10, []), (0, ["0 done", "1 done", "2 done"]), (1.5, ["1 done"])])
def test_a_line_comes_when_time_has_passed(monkeypatch, capsys, seconds, lines):
    clock = iter(range(100))
    monkeypatch.setattr(logging.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(logging, "LOG_INTERVAL_S", seconds)
    assert list(logging.log_progress("abc", lambda count: f"{count} done")) == ["a", "b", "c"]
    assert capsys.readouterr().err.splitlines() == lines
