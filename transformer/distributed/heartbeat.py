"""Whether the other hosts are alive: each says so every second or so, and one that falls silent ends the run.

A collective in which a host is missing never returns, and nothing can call the thread back that waits in it. So
two threads beside it watch, and end the process: with a message, and the exit code of the host that failed.
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

GRACE = 3.0  # seconds for a host to find out by itself what another failed of
LINGER = 10.0  # seconds at most that host 0 stays, so that the others can read why it ends


class Heartbeat:
    """The beats of this host, and those of the others as it hears them.

    Args:
      client: of JAX's coordination service.
      names: of all hosts, for people.
      timeout: seconds of silence after which a host is given up.
      lost_exit_code: exit code of this process when another is given up.
    """

    def __init__(self, client: Any, index: int, names: Sequence[str], timeout: float, lost_exit_code: int = 1):
        self._client, self._index, self._names, self._timeout = client, index, names, timeout
        self._lost_exit_code = lost_exit_code
        self._pause = min(max(timeout / 30, 0.2), 5.0)
        self._over = threading.Event()
        self._failed: dict[int, tuple[int, str]] = {}
        self._ending, self._written = threading.Lock(), False
        self._hear_all()

    def start(self) -> None:
        """Begins to beat and to watch."""
        for job in (self._beat, self._watch):
            threading.Thread(target=job, name=f"heartbeat {job.__name__}", daemon=True).start()

    def stop(self) -> None:
        """From here on a silent host is no fault."""
        self._over.set()

    def abort(self, error: BaseException) -> None:
        """Ends this process because of an error, and tells the others."""
        if is_peer_failure(error):
            deadline = time.monotonic() + self._timeout + 2 * self._pause + GRACE
            while time.monotonic() < deadline:  # who it was that went away is known a little later
                self._look(time.monotonic())
                time.sleep(0.1)
        with self._ending:
            code = logging.report_error(error)
            self._end(code, f"{type(error).__name__}: {error}" if code == 1 else str(error))

    def _hear_all(self) -> None:
        """Starts the clock of every host anew."""
        now = time.monotonic()
        self._answered, self._heard = now, dict.fromkeys(range(len(self._names)), ("", now))

    def _beat(self) -> None:
        number = 0
        while not self._over.is_set():
            number += 1
            try:
                self._client.key_value_set(f"beat/{self._index}", str(number), True)
                beats, failures = (dict(self._client.key_value_dir_get(f"{folder}/")) for folder in ("beat", "failed"))
            except Exception:  # whatever gRPC raises: no answer is what the watch looks for
                time.sleep(self._pause)
                continue
            self._answered = time.monotonic()
            for host in range(len(self._names)):
                beat = beats.get(f"beat/{host}", "")
                if beat != self._heard[host][0]:
                    self._heard[host] = beat, self._answered
            for key, text in failures.items():
                code, message = json.loads(text)
                self._failed[int(key.rpartition("/")[2])] = code, message
            self._over.wait(self._pause)

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._over.wait(self._pause):
            now = time.monotonic()
            if now - last > max(self._timeout / 2, 5 * self._pause):
                self._hear_all()  # it was this process that stood still
            last = now
            self._look(now)

    def _look(self, now: float) -> None:
        """Ends the process if another host failed or is silent by now."""
        failed = [host for host in sorted(self._failed) if host != self._index]
        if failed:
            self._over.wait(GRACE)
            code, message = self._failed[failed[0]]
            self._give_up(code, f"{self._names[failed[0]]} ended: {message}")
        if now - self._answered > self._timeout:
            self._give_up(self._lost_exit_code, self._silent(0, "and all others depend on it"))
        for host, (_, heard) in self._heard.items():
            if host != self._index and now - heard > self._timeout:
                self._give_up(self._lost_exit_code, self._silent(host, "so the run ends"))

    def _silent(self, host: int, why: str) -> str:
        return (
            f"{self._names[host]} has been silent for {self._timeout:.0f} s (--host_timeout), {why}. See what became "
            "of it, and start all hosts again to go on from the last checkpoint"
        )

    def _give_up(self, code: int, message: str) -> None:
        with self._ending:
            if not self._over.is_set():
                logging.log_error(message)
                self._end(code, message)

    def _end(self, code: int, message: str) -> None:
        """Ends the process without Python's own way out, in which JAX would wait for the others."""
        threading.Thread(target=self._tell, args=(code, message), daemon=True).start()
        deadline = time.monotonic() + (LINGER if self._index == 0 else GRACE)
        while time.monotonic() < deadline and not self._told():
            time.sleep(0.1)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception, StoppedError):
                stream.flush()
        os._exit(code)

    def _tell(self, code: int, message: str) -> None:
        with contextlib.suppress(Exception):  # nobody may be there to hear it
            self._client.key_value_set(f"failed/{self._index}", json.dumps([code, message]), True)
            self._written = True

    def _told(self) -> bool:
        """Whether the others know. Host 0, on which they all depend, waits until they have ended too."""
        now = time.monotonic()
        alive = {host for host, (_, heard) in self._heard.items() if now - heard < self._timeout}
        return self._written and (self._index != 0 or alive <= {0, *self._failed})


def is_peer_failure(error: BaseException) -> bool:
    """Whether an error may be what a host feels when another goes away."""
    import jax

    own = ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT")
    return isinstance(error, jax.errors.JaxRuntimeError) and not str(error).startswith(own)


@contextlib.contextmanager
def report_on_sigabrt(message: str, exit_code: int = 1) -> Iterator[None]:
    """JAX aborts a process that loses its coordinator; then this message, and this exit code, are the end of it.

    The signal of abort() reaches no handler of Python's, so this is one of C, called in the thread that aborts.
    """

    def ended(_: int) -> None:
        logging.log_error(message)
        os._exit(exit_code)

    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(ended)
    libc = ctypes.CDLL(None)
    libc.signal.restype, libc.signal.argtypes = ctypes.c_void_p, [ctypes.c_int, ctypes.c_void_p]
    before = libc.signal(signal.SIGABRT, ctypes.cast(handler, ctypes.c_void_p))
    try:
        yield
    finally:
        libc.signal(signal.SIGABRT, before)
