"""SIGTERM, SIGINT and SIGHUP: noted for the loop, which saves before it stops."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

from transformer.runtime.errors import StoppedError
from transformer.runtime.logging import log_info

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def handled_signals() -> list[signal.Signals]:
    """The stop signals, without a SIGHUP that this process was started to ignore, as nohup does."""
    return [one for one in STOP_SIGNALS if one != signal.SIGHUP or signal.getsignal(one) != signal.SIG_IGN]


def preempted(number: int, done: int) -> StoppedError:
    """What ends a run that was asked to stop and has saved step `done`."""
    return StoppedError(number, f"stopped by {signal.Signals(number).name}; saved step {done:,}; run again to resume")


@contextlib.contextmanager
def catch_stop_signals() -> Iterator[Callable[[], int | None]]:
    """Notes a stop signal for the loop to see between updates; a second one ends the process at once."""
    seen: list[int] = []
    numbers = handled_signals()
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return

    def note(number: int, _: object) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_DFL)
        seen.append(number)
        if len(seen) > 1:  # it came before the first was handled
            os.kill(os.getpid(), number)
        log_info(f"{signal.Signals(number).name}: stopping after this update; send it again to stop at once")

    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield lambda: seen[0] if seen else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
