"""Long work tells how far it is: a line on stderr every few seconds."""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from transformer.command_line import say

SECONDS_BETWEEN_LINES = 10.0

T = TypeVar("T")


def told(items: Iterable[T], line: Callable[[int], str]) -> Iterator[T]:
    """Yields the items; now and then says `line(count)`, count being how many are done with."""
    due = time.monotonic() + SECONDS_BETWEEN_LINES
    for count, item in enumerate(items):
        if time.monotonic() > due:
            say(line(count))
            due = time.monotonic() + SECONDS_BETWEEN_LINES
        yield item
