"""Counts of what callers should be warned of."""

import collections
import threading
from collections.abc import Mapping

from transformer.runtime.logging import log_info


class WarningCounts:
    """Counts by name; threads may share them."""

    def __init__(self) -> None:
        self._counts: collections.Counter[str] = collections.Counter()
        self._lock = threading.Lock()

    def add(self, name: str, count: int) -> None:
        """Adds to a count."""
        with self._lock:
            self._counts[name] += count

    def log(self, messages: Mapping[str, str], subject: str = "") -> None:
        """Logs each count above 0 with the message of its name, and starts again from 0.

        Args:
          subject: what all messages are about.
        """
        with self._lock:
            counts, self._counts = self._counts, collections.Counter()
        for name, message in messages.items():
            if counts[name]:
                log_info(f"warning: {f'{subject}: ' * bool(subject)}{counts[name]:,} {message}")
