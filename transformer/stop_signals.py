"""SIGTERM and SIGINT: noted for the loop, which saves before it stops."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

from transformer.command_line import say
from transformer.errors import StoppedError

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def stopped_by(number: int, done: int) -> StoppedError:
    """What ends a run that was asked to stop and has saved step `done`."""
    return StoppedError(number, f"stopped by {signal.Signals(number).name}; saved step {done:,}; run again to go on")


@contextlib.contextmanager
def noted() -> Iterator[Callable[[], int | None]]:
    """Notes SIGTERM and SIGINT for the loop to see between updates; a second one ends the process at once."""
    seen: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return

    def note(number: int, _: object) -> None:
        for each in STOP_SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        seen.append(number)
        if len(seen) > 1:  # it came before the first was handled
            os.kill(os.getpid(), number)
        say(f"{signal.Signals(number).name}: stopping after this update; send it again to stop at once")

    before = {number: signal.signal(number, note) for number in STOP_SIGNALS}
    try:
        yield lambda: seen[0] if seen else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
