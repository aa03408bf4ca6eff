"""SIGTERM, SIGINT and SIGHUP: caught for loops that save before they stop."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

from transformer.runtime import progress
from transformer.runtime.errors import StoppedError
from transformer.runtime.logging import log_info

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def handled_signals() -> list[signal.Signals]:
    """The stop signals, without SIGHUP if this process was started to ignore it, as by nohup."""
    return [number for number in STOP_SIGNALS if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]


def stopped(number: int, done: str) -> StoppedError:
    """The error that ends a command after a stop signal; `done` says what is kept."""
    return StoppedError(number, f"stopped by {signal.Signals(number).name}; {done}; run again to resume")


def preempted(number: int, step: int) -> StoppedError:
    """The error that ends a run after a stop signal, once `step` is saved."""
    return stopped(number, f"saved step {step:,}")


@contextlib.contextmanager
def handling(handler: Callable[[int, object], None]) -> Iterator[None]:
    """Handles the stop signals by a function for the block."""
    previous = {number: signal.signal(number, handler) for number in handled_signals()}
    try:
        yield
    finally:
        for number, handler_before in previous.items():
            signal.signal(number, handler_before)


def _current_work() -> str:
    phases = progress.names()
    if any(name.startswith("validation") for name in phases):
        return "this batch of the validation, which is repeated on resume"
    if phases and phases[-1].startswith("compiling"):
        return f"this update, which is {phases[-1]}"
    return "this update"


@contextlib.contextmanager
def catch_stop_signals(work: Callable[[], str] | None = None) -> Iterator[Callable[[], int | None]]:
    """Catches the first stop signal for the loop to read between updates; a second one ends the process at once.

    Args:
      work: says what is done before the process stops; of training by default.
    """
    received: list[int] = []
    numbers = handled_signals()
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return

    def handle(number: int, _: object) -> None:
        for caught in numbers:
            signal.signal(caught, signal.SIG_DFL)
        received.append(number)
        if len(received) > 1:  # it came before the first was handled
            os.kill(os.getpid(), number)
        current = (work or _current_work)()
        log_info(f"{signal.Signals(number).name}: stopping after {current}; send it again to stop at once")

    with handling(handle):
        yield lambda: received[0] if received else None
