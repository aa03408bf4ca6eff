"""Functions that run one after the other in a thread."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class BackgroundQueue:
    """Runs functions in a thread, in the order in which they come; an error drops those after it.

    Args:
      name: of the thread.
    """

    def __init__(self, name: str) -> None:
        self._pool = ThreadPoolExecutor(1, name)
        self._futures: list[Future[None]] = []
        self._error: BaseException | None = None

    def submit(self, function: Callable[[], None]) -> None:
        """Runs a function after all others.

        Raises:
          BaseException: what an earlier one raised, here and in `check` and `wait`, once.
        """
        self.check()
        self._futures = [future for future in self._futures if not future.done()]
        self._futures.append(self._pool.submit(self._run, function))

    def _run(self, function: Callable[[], None]) -> None:
        if self._error is None:
            try:
                function()
            except BaseException as error:
                self._error = error

    @property
    def is_idle(self) -> bool:
        """Whether all have ended."""
        return all(future.done() for future in self._futures)

    def check(self) -> None:
        """Raises what a function raised."""
        if self._error is not None:
            self.wait()

    def wait(self) -> None:
        """Waits until all have ended."""
        for future in self._futures:
            future.result()
        self._futures.clear()
        if (error := self._error) is not None:
            self._error = None
            raise error
