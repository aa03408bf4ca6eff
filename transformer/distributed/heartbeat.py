"""Heartbeats of all processes: one that stops responding ends the run.

A collective in which a process is missing never returns, and the thread that waits in it cannot be interrupted. So
two threads beside it exchange heartbeats and end the process, with a message and the exit code of the failed one:

    running ── an error here ──────────────────────> publish it, wait until the others have read it, exit
       ├────── another process has published one ──> report it, exit with its exit code
       └────── another process is silent ──────────> report it, exit with the exit code of a lost process
"""

import contextlib
import ctypes
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from transformer.runtime import logging
from transformer.runtime.errors import StoppedError

GRACE = 3.0  # seconds in which a process may find by itself the error that another has
LINGER = 10.0  # seconds at most that process 0 stays, so that the others can read why it ends


class Heartbeat:
    """Sends heartbeats of this process and watches those of the others.

    Args:
      client: of JAX's coordination service.
      names: of all processes, for messages.
      timeout: seconds without a heartbeat after which a process counts as lost.
      lost_exit_code: exit code of this process if another is lost.
    """

    def __init__(self, client: Any, index: int, names: Sequence[str], timeout: float, lost_exit_code: int = 1):
        self._client, self._index, self._names, self._timeout = client, index, names, timeout
        self._lost_exit_code = lost_exit_code
        self._pause = min(max(timeout / 30, 0.2), 5.0)
        self._over = threading.Event()
        self._failed: dict[int, tuple[int, str]] = {}
        self._exit_lock, self._is_published = threading.Lock(), False
        self._reset_timers()

    def start(self) -> None:
        """Starts both threads."""
        for target in (self._beat, self._watch):
            threading.Thread(target=target, name=f"heartbeat {target.__name__}", daemon=True).start()

    def stop(self) -> None:
        """Stops both threads; from here on a process may be silent."""
        self._over.set()

    def abort(self, error: BaseException) -> None:
        """Ends this process because of an error, and publishes it to the others."""
        if len(self._names) > 1 and is_peer_failure(error):
            seconds = self._timeout + 2 * self._pause + GRACE
            reason = str(error).partition("\n")[0]
            logging.log_error(f"waiting up to {seconds:.0f} s to see whether another host is the cause of: {reason}")
            deadline = time.monotonic() + seconds
            while time.monotonic() < deadline:  # which process went away is known a little later
                self._check_peers(time.monotonic())
                time.sleep(0.1)
        with self._exit_lock:
            code = logging.report_error(error)
            self._exit(code, f"{type(error).__name__}: {error}" if code == 1 else str(error))

    def _reset_timers(self) -> None:
        """Counts the silence of every process from now on."""
        now = time.monotonic()
        self._last_answer, self._last_beats = now, dict.fromkeys(range(len(self._names)), ("", now))

    def _beat(self) -> None:
        count = 0
        while not self._over.is_set():
            count += 1
            try:
                self._client.key_value_set(f"beat/{self._index}", str(count), True)
                beats, failures = (dict(self._client.key_value_dir_get(f"{folder}/")) for folder in ("beat", "failed"))
            except Exception:  # whatever gRPC raises: `_check_peers` counts the time without an answer
                time.sleep(self._pause)
                continue
            self._last_answer = time.monotonic()
            for process in range(len(self._names)):
                beat = beats.get(f"beat/{process}", "")
                if beat != self._last_beats[process][0]:
                    self._last_beats[process] = beat, self._last_answer
            for key, text in failures.items():
                code, message = json.loads(text)
                self._failed[int(key.rpartition("/")[2])] = code, message
            self._over.wait(self._pause)

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._over.wait(self._pause):
            now = time.monotonic()
            if now - last > max(self._timeout / 2, 5 * self._pause):
                self._reset_timers()  # this process itself was suspended
            last = now
            self._check_peers(now)

    def _check_peers(self, now: float) -> None:
        """Ends the process if another has failed or is lost."""
        failed = [process for process in sorted(self._failed) if process != self._index]
        if failed:
            self._over.wait(GRACE)
            code, message = self._failed[failed[0]]
            self._abort_on_peer(code, f"{self._names[failed[0]]} ended: {message}")
        if now - self._last_answer > self._timeout:
            self._abort_on_peer(self._lost_exit_code, self._timeout_message(0, "and all others depend on it"))
        for process, (_, heard) in self._last_beats.items():
            if process != self._index and now - heard > self._timeout:
                self._abort_on_peer(self._lost_exit_code, self._timeout_message(process, "so the run ends"))

    def _timeout_message(self, process: int, why: str) -> str:
        return (
            f"{self._names[process]} has been silent for {self._timeout:.0f} s (--host_timeout), {why}. See what "
            "became of it, and start all hosts again to resume from the last checkpoint"
        )

    def _abort_on_peer(self, code: int, message: str) -> None:
        with self._exit_lock:
            if not self._over.is_set():
                logging.log_error(message)
                self._exit(code, message)

    def _exit(self, code: int, message: str) -> None:
        """Ends the process without Python's normal exit, in which JAX would wait for the others."""
        threading.Thread(target=self._publish_failure, args=(code, message), daemon=True).start()
        deadline = time.monotonic() + (LINGER if self._index == 0 else GRACE)
        while time.monotonic() < deadline and not self._is_failure_known():
            time.sleep(0.1)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception, StoppedError):
                stream.flush()
        os._exit(code)

    def _publish_failure(self, code: int, message: str) -> None:
        with contextlib.suppress(Exception):  # the service may be gone
            self._client.key_value_set(f"failed/{self._index}", json.dumps([code, message]), True)
            self._is_published = True

    def _is_failure_known(self) -> bool:
        """Whether the failure is published, and, in process 0, on which all depend, the others have ended."""
        now = time.monotonic()
        alive = {process for process, (_, heard) in self._last_beats.items() if now - heard < self._timeout}
        return self._is_published and (self._index != 0 or alive <= {0, *self._failed})


def is_peer_failure(error: BaseException) -> bool:
    """Whether an error may come from another process that went away."""
    import jax

    own_errors = ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT")
    return isinstance(error, jax.errors.JaxRuntimeError) and not str(error).startswith(own_errors)


@contextlib.contextmanager
def report_on_sigabrt(message: str, exit_code: int = 1) -> Iterator[None]:
    """If JAX aborts the process because its coordinator is gone, reports this message and exits with this code.

    A Python handler would not run after abort(), so this is one in C, called in the thread that aborts.
    """

    def on_abort(_: int) -> None:
        logging.log_error(message)
        os._exit(exit_code)

    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(on_abort)
    libc = ctypes.CDLL(None)
    libc.signal.restype, libc.signal.argtypes = ctypes.c_void_p, [ctypes.c_int, ctypes.c_void_p]
    previous = libc.signal(signal.SIGABRT, ctypes.cast(handler, ctypes.c_void_p))
    try:
        yield
    finally:
        libc.signal(signal.SIGABRT, previous)
