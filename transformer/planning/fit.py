"""The largest batch that fits, found with few compilations."""

from collections.abc import Callable

CLOSE = 0.04  # of what fits: how near the search comes to what does not
MOST = 2**20


def largest(needed: Callable[[int], int], available: int, first: int = 1) -> int:
    """The most units of batch, such as rows a chip, that need no more than is available; 0 where one does not fit.

    Memory grows about evenly with the batch, so a line through two trials says what to try next; but what
    counts is what was tried. The result is within 4% of the most.

    Args:
      needed: bytes for so many units.
      first: units to try first.
    """
    tried: dict[int, int] = {}
    units, fits, fails = first, 0, MOST
    while units:
        tried[units] = needed(units)
        if tried[units] <= available:
            fits = units
        else:
            fails = units
        nearest = fits + max(1, int(fits * CLOSE))
        if nearest >= fails:
            break
        units = min(max(_on_line(tried, available), nearest), fails - 1, 8 * max(fits, 1))
    return fits


def _on_line(tried: dict[int, int], available: int) -> int:
    """Where a line through the last two trials, or through one and zero, meets the limit."""
    (low, low_bytes), (high, high_bytes) = [(0, 0), *tried.items()][-2:]
    if low_bytes == high_bytes:
        return high
    return int(low + (available - low_bytes) * (high - low) / (high_bytes - low_bytes))
