"""Errors that the user can correct, each with its exit code (see `command_line`)."""

import errno
import os
import traceback


class UserError(Exception):
    """Bad usage, config or input: says what was expected, what was got, and what to do."""

    exit_code = 2


class DivergedError(UserError):
    """The loss is no longer finite; `step` is the update that showed it, whose batch is written down, if known."""

    exit_code = 3

    def __init__(self, message: str, step: int | None = None):
        super().__init__(message)
        self.step = step


class WorkdirError(UserError):
    """The workdir is held by another run, or none of its checkpoints is valid."""

    exit_code = 4


class StoppedError(BaseException):
    """A signal stopped the run after it saved its state; not an Exception, so that nothing handles it as an error."""

    def __init__(self, signal_number: int, message: str):
        super().__init__(message)
        self.exit_code = 128 + signal_number


def is_out_of_memory(error: BaseException) -> bool:
    """Whether device memory, host memory or disk ran out; XLA and TensorStore have no exception class for it."""
    is_disk = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return is_disk or isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)


def last_line_in(file: str, error: BaseException) -> int | None:
    """The line of a file of the user's at which an error left it; None if it was not there."""
    if isinstance(error, SyntaxError):
        return error.lineno
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if os.path.abspath(frame.filename) == os.path.abspath(file)]
    return lines[-1] if lines else None
