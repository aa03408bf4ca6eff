"""A clock that moves only when it is told to, for tests of what is shown while time passes."""

import pytest

from transformer.runtime import logging, progress


class FakeClock:
    """The clock of messages and progress; `sleep` stands for work of so many seconds.

    Attributes:
      messages: the time and text of each message written.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now, self.messages = 1000.0, []
        printed = logging._print

        def note(message: str) -> None:
            self.messages.append((self.now, message))
            printed(message)

        monkeypatch.setattr(logging, "clock", lambda: self.now)
        monkeypatch.setattr(logging, "_print", note)
        monkeypatch.setattr(logging, "_last_message", self.now)
        monkeypatch.setattr(progress, "start_ticks", lambda end: None)
        monkeypatch.setattr(progress, "_display", progress._Display())

    def sleep(self, seconds: float) -> None:
        """Lets time pass, and shows progress as the thread would."""
        end = self.now + seconds
        while self.now < end:
            self.now = min(self.now + progress.TICK_S, end)
            progress._display.tick()
