"""Messages and progress of a command, on stderr; stdout is for results."""

import contextlib
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from transformer.runtime import streams
from transformer.runtime.errors import StoppedError, UserError, is_out_of_memory


def complain(message: str) -> None:
    """The last words of a command, on stderr, under its name and that of the host if there are several."""
    name = " ".join(filter(None, (os.path.basename(sys.argv[0]), _host)))
    _tell(f"{name}: {message}")


_host = ""  # of several, which one this is


def speak_as(index: int, count: int) -> None:
    """From here on this process is one of several: it says which in its last words, and only host 0 tells the rest."""
    global _host
    _host = f"(host {index} of {count})" if count > 1 else ""


def say(message: str) -> None:
    """Tells the person at the terminal, on stderr, what one host tells for all; stdout is for results."""
    if not _host or _host.startswith("(host 0 "):
        _tell(message)


def _tell(message: str) -> None:
    if sys.stderr is None:  # closed; print would take stdout instead
        return
    # Whoever read it may be gone: Ctrl-C ends `2>&1 | tee log` too, and saving must go on.
    with contextlib.suppress(OSError):
        print(streams.printable(message, sys.stderr), file=sys.stderr, flush=True)


def exit_code(error: BaseException) -> int:
    """Prints an error, as one message if a person can mend it, and returns the exit code of its kind."""
    if isinstance(error, (UserError, StoppedError)):
        if str(error):
            complain(str(error))
        return error.exit_code
    if is_out_of_memory(error):
        advice = "lower train.batch_tokens, decode.beam_size or decode.batch_rows, or free space on the disk"
        reason = str(error).partition("\n")[0] or type(error).__name__
        complain(f"out of memory or disk: {reason}; {advice}")
        return UserError.exit_code
    traceback.print_exception(error)
    return 1


SECONDS_BETWEEN_LINES = 10.0

T = TypeVar("T")


def told(items: Iterable[T], line: Callable[[int], str]) -> Iterator[T]:
    """Yields the items; now and then says `line(count)`, count being how many are done with."""
    due = time.monotonic() + SECONDS_BETWEEN_LINES
    for count, item in enumerate(items):
        if time.monotonic() > due:
            say(line(count))
            due = time.monotonic() + SECONDS_BETWEEN_LINES
        yield item
