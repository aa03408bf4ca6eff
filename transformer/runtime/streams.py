"""Standard streams of a command that may be closed, full, or without a reader.

Results go to stdout, messages to stderr. A result that cannot be written is an error; a message that cannot be
written is dropped, and the command continues.
"""

import contextlib
import errno
import io
import os
import re
import signal
import sys
from typing import IO, Any, TextIO

from transformer.runtime.errors import StoppedError, UserError

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and line feed


class _Results(io.FileIO):
    """Standard output, whose errors end the command.

    Raises:
      UserError: the stream is closed, or its disk full.
      StoppedError: its reader is gone; the exit code is that of a process ended by SIGPIPE.
    """

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except BrokenPipeError as error:
            raise StoppedError(signal.SIGPIPE, "") from error
        except OSError as error:
            reason = "it is closed" if error.errno == errno.EBADF else error.strerror
            raise UserError(f"the result could not be written to stdout: {reason}; send it elsewhere") from error


class _Messages(io.FileIO):
    """Standard error, which drops what it cannot write: training and saving must continue."""

    def write(self, data: Any) -> int:
        with contextlib.suppress(OSError):
            return super().write(data) or len(data)
        return len(data)


def prepare() -> None:
    """Wraps the standard streams of this process; re-executes it if one of them is closed."""
    closed = [number for number, stream in enumerate((sys.stdin, sys.stdout, sys.stderr)) if stream is None]
    if closed:
        for number in closed:
            # A file opened since may have this descriptor. Writing to stdout and reading from stdin stay errors.
            _send_to_null(number, os.O_RDONLY if number == 1 else os.O_WRONLY)
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    # Leaves streams that a caller has replaced.
    if sys.stdout is sys.__stdout__:
        sys.stdout = _as_text(_Results(1, "w", closefd=False), sys.stdout)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _as_text(_Messages(2, "w", closefd=False), sys.stderr)


def _as_text(raw: io.FileIO, original: Any) -> TextIO:
    """A text stream in the encoding of the original one; characters that it lacks are escaped."""
    original.flush()
    flushes = original.line_buffering or original.write_through
    buffer = io.BufferedWriter(raw)
    return io.TextIOWrapper(buffer, encoding=original.encoding, errors="backslashreplace", line_buffering=flushes)


def discard_results() -> None:
    """Drops what stdout could not write: Python would report it again when it closes the stream."""
    if sys.stdout is not None and sys.stdout.fileno() == 1:
        _send_to_null(1, os.O_WRONLY)


def _send_to_null(number: int, flags: int) -> None:
    null = os.open(os.devnull, flags)
    os.dup2(null, number)
    os.set_inheritable(number, True)
    if null != number:
        os.close(null)


def printable(text: str, stream: IO[Any]) -> str:
    """Escapes control characters, except tab and line feed, if the stream is a terminal."""
    return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text) if stream.isatty() else text
