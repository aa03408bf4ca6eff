"""Rounds lengths and numbers of rows to multiples, as fixed shapes and shards need."""


def round_up(length: int, multiple: int) -> int:
    """The least multiple that is at least `length`."""
    return -(-length // multiple) * multiple
