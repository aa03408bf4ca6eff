"""Commands in this process: as people run them, but with one start of JAX and shared programs."""

import importlib
import io
import signal
import sys
from typing import NamedTuple

import pytest

from transformer import command_line


class Finished(NamedTuple):
    """A command that has ended; `returncode` and bytes, as of subprocess.run."""

    returncode: int
    stdout: bytes
    stderr: bytes


def run(*command: object, stdin: bytes = b"", code: int = 0) -> Finished:
    """Runs train.py, eval.py or -m MODULE; asserts the exit code, and no traceback where that is not 0."""
    argv = [str(part) for part in command]
    if argv[0] == "-m":
        argv = argv[1:]
    module = importlib.import_module(argv[0].removesuffix(".py"))
    if hasattr(module, "__path__"):  # a folder, whose command is its __main__
        module = importlib.import_module(f"{module.__name__}.__main__")
    argv[0] = getattr(module, "__file__", argv[0])
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf8", write_through=True) for _ in range(2))
    interrupt = signal.getsignal(signal.SIGINT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", argv)
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), "utf8"))
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        try:
            command_line.run(module.main)
            returncode = 0
        except SystemExit as end:
            returncode = int(end.code or 0)
        finally:
            signal.signal(signal.SIGINT, interrupt)
    result = Finished(returncode, out.buffer.getvalue(), err.buffer.getvalue())
    assert result.returncode == code, result.stderr.decode()
    assert not code or b"Traceback" not in result.stderr, result.stderr.decode()
    return result
