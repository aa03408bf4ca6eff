"""Counts compilations."""

import jax

from transformer.runtime.environment import _LOWERED


class CompileCounter:
    """Counts the programs lowered while it is entered, whether compiled or found in the cache on disk.

    Attributes:
      count: of programs.
    """

    def __init__(self) -> None:
        self.count = 0

    def __enter__(self) -> "CompileCounter":
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def __exit__(self, *_: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        self.count += event == _LOWERED
