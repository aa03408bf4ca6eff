"""Functions for worker processes, which import this module and no test."""

import os
import signal
import sys
import time

from transformer.runtime.errors import UserError


def square_after(value: tuple[int, float]) -> int:
    """Of a number, after so many seconds."""
    time.sleep(value[1])
    return value[0] ** 2


def process_id(seconds: float) -> int:
    """Of the process that calls."""
    time.sleep(seconds)
    return os.getpid()


def jax_is_imported(text: str) -> bool:
    """And prints."""
    print(text, flush=True)
    return "jax" in sys.modules or "tensorflow_datasets" in sys.modules


def fail_at_3(number: int) -> int:
    """As the user's mistake."""
    if number == 3:
        raise UserError("three")
    return number


class OddError(Exception):
    """Cannot be pickled."""

    def __reduce__(self) -> str:
        raise TypeError("no")


def fail_oddly(number: int) -> int:
    """By an error that cannot be sent."""
    raise OddError("odd")


def kill_self(number: int) -> int:
    """As the kernel does when memory runs out."""
    os.kill(os.getpid(), signal.SIGKILL)
    return number


def sleep_and_tell(seconds: float) -> None:
    """Says which process this is."""
    print(os.getpid(), file=sys.stderr, flush=True)
    time.sleep(seconds)
