"""A function in place of the jitted update."""

from collections.abc import Callable
from typing import Any


class FakeUpdate:
    """Calls a function; also what compiling it returns.

    Args:
      run: (state, batch) → (state, metrics).
      on_compile: called by each compilation.
    """

    def __init__(self, run: Callable[..., Any], on_compile: Callable[[], Any] = lambda: None):
        self._run, self._on_compile = run, on_compile

    def __call__(self, *args: Any) -> Any:
        return self._run(*args)

    def lower(self, *_: Any) -> "FakeUpdate":
        return self

    def compile(self) -> "FakeUpdate":
        self._on_compile()
        return self
