"""Validates texts passed to the Python API: an ordered iterable of str becomes a list of lines."""

from collections.abc import Iterable, Mapping, Set
from typing import Any

from transformer.data.text_files import one_line, strip_line_end
from transformer.runtime.errors import UserError


def items(given: Iterable[Any], name: str) -> list[Any]:
    """The items of an ordered iterable: a list, a Series, an array, a generator, a file.

    Args:
      given: the iterable.
      name: begins error messages: "sentences: expected a list of texts".

    Raises:
      UserError: `given` is a single text, not iterable, or unordered (a mapping, a set, a table).
    """
    if isinstance(given, str | bytes):
        raise UserError(f"{name}, got one text, {given!r:.60}; put it into a list")
    kind = "None" if given is None else f"an object of type {type(given).__name__}"
    if isinstance(given, Mapping | Set) or getattr(given, "ndim", 1) != 1:
        raise UserError(f"{name}, got {kind}, not a sequence of texts; pass a list of them")
    try:
        iterator = iter(given)
    except TypeError as error:
        raise UserError(f"{name}, got {kind}; pass a list, or another iterable") from error
    return list(iterator)


def line(given: Any, where: str) -> str:
    """A text without a line end, such as a line of a file; errors name `where`.

    Raises:
      UserError: `given` is not a str, or holds half a surrogate pair.
    """
    if not isinstance(given, str):
        raise UserError(f"{where}: expected str, got {type(given).__name__}: {given!r:.60}")
    text = strip_line_end(str(given))  # tokenizers do not accept np.str_
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: holds half a surrogate pair, which is not a character: {text!r:.60}") from error
    return text


def pairs(sources: Iterable[Any], targets: Iterable[Any]) -> tuple[list[str], list[str]]:
    """The lines of sources and of their targets.

    Raises:
      UserError: an item is not text, or the numbers of sources and targets differ.
    """
    source_lines, target_lines = _lines(sources, "source"), _lines(targets, "target")
    if len(source_lines) != len(target_lines):
        raise UserError(
            f"expected a target for each source, got {len(source_lines):,} sources, {len(target_lines):,} targets"
        )
    return source_lines, target_lines


def _lines(given: Iterable[Any], side: str) -> list[str]:
    texts = items(given, f"{side}s: expected a list of texts")
    return [one_line(line(text, f"{side} {number}")) for number, text in enumerate(texts, 1)]
