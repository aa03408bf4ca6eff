"""Errors that a user can fix, each with the exit code of its kind (see `command_line`)."""

import errno


class UserError(Exception):
    """Bad usage, config or input: says what was expected, what was got, and what to do."""

    exit_code = 2


class DivergedError(UserError):
    """The loss is no longer a finite number; `step` is the first that would have been made of that, if known."""

    exit_code = 3

    def __init__(self, message: str, step: int | None = None):
        super().__init__(message)
        self.step = step


class WorkdirError(UserError):
    """The workdir is held by another run, or no checkpoint in it is valid."""

    exit_code = 4


class StoppedError(BaseException):
    """The run was asked to stop by a signal and has saved its state; no error, so that nothing takes it for one."""

    def __init__(self, signal_number: int, message: str):
        super().__init__(message)
        self.exit_code = 128 + signal_number


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory, of devices or of the host, or the disk ran out; XLA and TensorStore have no class for this."""
    is_disk = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return is_disk or isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)
