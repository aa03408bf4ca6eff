"""Messages of a command on stderr; stdout is for results."""

import contextlib
import os
import sys
import time
import traceback
from collections.abc import Iterator

from transformer.runtime import streams
from transformer.runtime.errors import StoppedError, UserError, is_out_of_memory

OUT_OF_MEMORY_ADVICE = (
    "in training set model.remat=full, also when resuming, or in a new workdir raise train.accumulation_steps or lower "
    "train.batch_tokens; in decoding set decode.batch_rows=8 or lower decode.beam_size; or free space on the disk"
)


def log_error(message: str) -> None:
    """Writes an error to stderr, with the name of the command and, of several processes, which one this is."""
    of_several = f" (host {_process_index} of {_process_count})" if _process_count > 1 else ""
    _print(f"{os.path.basename(sys.argv[0])}{of_several}: {message}")


_process_index, _process_count = 0, 1


def set_process(index: int, count: int) -> None:
    """Makes this process one of several: errors name it, and only process 0 logs other messages."""
    global _process_index, _process_count
    _process_index, _process_count = index, count


def is_shown() -> bool:
    """Whether this process logs messages other than errors."""
    return _process_index == 0


def log_info(message: str) -> None:
    """Writes a message to stderr, on process 0 only."""
    if is_shown():
        _print(message)


clock = time.monotonic
_last_message = 0.0


def last_message() -> float:
    """When the last message was written, by `clock`."""
    return _last_message


def _print(message: str) -> None:
    global _last_message
    _last_message = clock()
    if sys.stderr is None:  # closed: print would write to stdout instead
        return
    # Its reader may be gone: Ctrl-C ends `2>&1 | tee log` too, and saving must continue.
    # RuntimeError: a signal came while a message was written, and its handler has one too.
    with contextlib.suppress(OSError, RuntimeError):
        # In one write, as several threads log.
        print(f"{streams.printable(message, sys.stderr)}\n", end="", file=sys.stderr, flush=True)


def report_unraisable(unraisable: "sys.UnraisableHookArgs") -> None:
    """A `sys.unraisablehook` that leaves out writes which end after Orbax's event loop, when a save has failed."""
    if repr(unraisable.exc_value) != "RuntimeError('Event loop is closed')":
        sys.__unraisablehook__(unraisable)


@contextlib.contextmanager
def logged_beside(error: BaseException | None) -> Iterator[None]:
    """Raises a UserError of its block, or only logs it beside an error that already ends the run."""
    try:
        yield
    except UserError as failure:
        if error is None:
            raise
        log_info(str(failure))


def report_error(error: BaseException) -> int:
    """Prints an error, without a traceback if the user can correct it, and returns its exit code."""
    if isinstance(error, (UserError, StoppedError)):
        if str(error):
            log_error(str(error))
        return error.exit_code
    if is_out_of_memory(error):
        reason = str(error).partition("\n")[0] or type(error).__name__
        log_error(f"out of memory or disk: {reason}; {OUT_OF_MEMORY_ADVICE}")
        return UserError.exit_code
    traceback.print_exception(error)
    return 1
