"""Reads the flags of benchmarks that are lists, with commas between."""

from collections.abc import Iterable

from transformer.runtime.errors import UserError


def known_names(flag: str, text: str, known: Iterable[str]) -> list[str]:
    """The names in the text of a flag, commas between; a UserError unless all are known."""
    given = text.split(",")
    if unknown := [name for name in given if name not in known]:
        raise UserError(f"{flag}: expected some of {', '.join(known)}, got {unknown[0]!r}")
    return given


def distinct_numbers(flag: str, text: str, least: int = 1) -> list[int]:
    """Parses different numbers above 0, ascending; `least` is how many there must be."""
    words = text.split(",")
    numbers = sorted({int(word) for word in words if word.strip().isdecimal() and int(word)})
    if len(numbers) < max(len(words), least):
        count = "at least two " if least > 1 else ""
        raise UserError(f"{flag}: expected {count}different numbers with commas between, got {text!r}")
    return numbers
