"""Applies a function to many values in processes of their own.

A worker is a fresh interpreter that imports the module of the function and nothing else of this program: no JAX, no
`__main__`, no threads that a fork would break. Values and results are pickled. A worker ends at once when this process
does, however it ends.
"""

import collections
import concurrent.futures
import copy
import os
import queue
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from typing import Any, Generic, TypeVar

from transformer.runtime.errors import UserError

T = TypeVar("T")
R = TypeVar("R")

_START = "import sys; sys.path[:] = {path!r}; from transformer.runtime import worker_pool; worker_pool.serve()"


class WorkerEndedError(UserError):
    """A worker process was killed."""


class WorkerPool(Generic[T, R]):
    """Calls a function in worker processes; a context manager.

    Args:
      function: picklable, found by importing its module.
      workers: how many processes; with 1 the function is called in this one.
    """

    def __init__(self, function: Callable[[T], R], workers: int):
        self._function, self._size = function, workers
        self._tasks: queue.SimpleQueue[tuple[concurrent.futures.Future[R], T] | None] = queue.SimpleQueue()
        self._processes: list[subprocess.Popen] = []
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> "WorkerPool[T, R]":
        return self

    def __exit__(self, *exception: object) -> None:
        """Ends the workers, also those at work."""
        for process in self._processes:
            process.kill()
        for _ in range(len(self._threads)):
            self._tasks.put(None)
        for thread in self._threads:
            thread.join()
        for process in self._processes:
            process.wait()

    def map(self, values: Iterable[T]) -> Iterator[R]:
        """The results in order. Takes values as workers become free, and few in advance; raises what a call raised.

        Raises:
          WorkerEndedError: a worker was killed.
        """
        if self._size <= 1:
            yield from map(self._function, values)
            return
        pending: collections.deque[concurrent.futures.Future[R]] = collections.deque()
        for value in values:
            if len(self._processes) < self._size:
                self._start_worker()
            future: concurrent.futures.Future[R] = concurrent.futures.Future()
            self._tasks.put((future, value))
            del value  # perhaps large
            pending.append(future)
            while len(pending) > self._size:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

    def _start_worker(self) -> None:
        command = [sys.executable, "-c", _START.format(path=sys.path)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._processes.append(process)
        thread = threading.Thread(target=self._serve, args=(process,), name="worker", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _serve(self, process: subprocess.Popen) -> None:
        """Passes tasks to a worker, one after another."""
        assert process.stdin
        assert process.stdout
        values = Connection(os.dup(process.stdin.fileno()), readable=False)
        results = Connection(os.dup(process.stdout.fileno()), writable=False)
        process.stdin.close()
        process.stdout.close()
        with values, results:
            self._pass_tasks(process, values, results)

    def _pass_tasks(self, process: subprocess.Popen, values: Connection, results: Connection) -> None:
        message: Any = self._function
        while (task := self._tasks.get()) is not None:
            future, value = task
            try:
                if message is not None:
                    values.send(message)
                    message = None
                values.send(value)
                del task, value
                result, error = results.recv()
            except (OSError, EOFError) as broken:
                code = process.wait()
                reason = signal.Signals(-code).name if code < 0 else f"exit code {code}"
                future.set_exception(
                    WorkerEndedError(
                        f"a worker process ended ({reason}): if the machine ran out of memory, prepare the data by "
                        f"python -m transformer.prepare --workers=1: what is done is kept ({type(broken).__name__})"
                    )
                )
                continue
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)


def serve() -> None:
    """Runs a worker: reads a function and then values from stdin, writes results to what was stdout."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one, which ends it
    with Connection(os.dup(1), readable=False) as results:
        os.dup2(2, 1)  # what a library prints is no result
        values: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(target=_receive, args=(values,), daemon=True).start()
        function = values.get()
        while True:
            answer: tuple[Any, Exception | None]
            try:
                answer = (function(values.get()), None)
            except Exception as error:
                answer = (None, _picklable(error))
            results.send(answer)


def _receive(values: "queue.SimpleQueue[Any]") -> None:
    """Reads values until the end of stdin, and then ends this process, as the other one has ended."""
    try:
        with Connection(os.dup(0), writable=False) as stdin:
            while True:
                values.put(stdin.recv())
    except BaseException as error:
        if not isinstance(error, EOFError):
            traceback.print_exc()
        os._exit(1)


def _picklable(error: Exception) -> Exception:
    """The error with its traceback in this process, or its text if it cannot be pickled."""
    text = "".join(traceback.format_exception(error))
    try:
        copy.deepcopy(error)  # which needs what pickling needs
    except Exception:
        error = RuntimeError(str(error))
    if not isinstance(error, UserError):
        error.add_note(f"in a worker process:\n{text}")
    return error
