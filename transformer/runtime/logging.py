"""Messages and progress of a command on stderr; stdout is for results."""

import contextlib
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from transformer.runtime import streams
from transformer.runtime.errors import StoppedError, UserError, is_out_of_memory


def log_error(message: str) -> None:
    """Writes an error to stderr, with the name of the command and, of several processes, which one this is."""
    name = " ".join(filter(None, (os.path.basename(sys.argv[0]), _process_label)))
    _print(f"{name}: {message}")


_process_label = ""  # which of several processes this is


def set_process(index: int, count: int) -> None:
    """Makes this process one of several: errors name it, and only process 0 logs other messages."""
    global _process_label
    _process_label = f"(host {index} of {count})" if count > 1 else ""


def log_info(message: str) -> None:
    """Writes a message to stderr, on process 0 only."""
    if not _process_label or _process_label.startswith("(host 0 "):
        _print(message)


def _print(message: str) -> None:
    if sys.stderr is None:  # closed: print would write to stdout instead
        return
    # Its reader may be gone: Ctrl-C ends `2>&1 | tee log` too, and saving must continue.
    with contextlib.suppress(OSError):
        print(streams.printable(message, sys.stderr), file=sys.stderr, flush=True)


def report_error(error: BaseException) -> int:
    """Prints an error, without a traceback if the user can correct it, and returns its exit code."""
    if isinstance(error, (UserError, StoppedError)):
        if str(error):
            log_error(str(error))
        return error.exit_code
    if is_out_of_memory(error):
        advice = "lower train.batch_tokens, decode.beam_size or decode.batch_rows, or free space on the disk"
        reason = str(error).partition("\n")[0] or type(error).__name__
        log_error(f"out of memory or disk: {reason}; {advice}")
        return UserError.exit_code
    traceback.print_exception(error)
    return 1


LOG_INTERVAL_S = 10.0

T = TypeVar("T")


def log_progress(items: Iterable[T], line: Callable[[int], str]) -> Iterator[T]:
    """Yields the items, and logs `line(count)` every few seconds; `count` items are done."""
    due = time.monotonic() + LOG_INTERVAL_S
    for count, item in enumerate(items):
        if time.monotonic() > due:
            log_info(line(count))
            due = time.monotonic() + LOG_INTERVAL_S
        yield item
