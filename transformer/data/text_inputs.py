"""Texts as callers of the Python API give them: any iterable of str, in its own order, becomes a list of lines."""

from collections.abc import Iterable, Mapping, Set
from typing import Any

from transformer.data.text_files import strip_line_end
from transformer.runtime.errors import UserError


def items(given: Iterable[Any], name: str) -> list[Any]:
    """What an iterable holds, in the order in which it gives it: a list, a Series, an array, a generator, a file.

    Args:
      name: what was expected, in errors: "sentences: expected a list of texts".

    Raises:
      UserError: it is one text, is not iterable, or has no order of items: a mapping, a set, a table.
    """
    if isinstance(given, str | bytes):
        raise UserError(f"{name}, got one text, {given!r:.60}; put it into a list")
    kind = "None" if given is None else f"an object of type {type(given).__name__}"
    if isinstance(given, Mapping | Set) or getattr(given, "ndim", 1) != 1:
        raise UserError(f"{name}, got {kind}, which is no sequence of texts; pass a list of them")
    try:
        iterator = iter(given)
    except TypeError as error:
        raise UserError(f"{name}, got {kind}; pass a list, or anything else that can be gone through") from error
    return list(iterator)


def line(given: Any, where: str) -> str:
    """A text without the line end that it may end in, such as a line of a file; `where` is named in errors.

    Raises:
      UserError: it is no str, or holds half a surrogate pair.
    """
    if not isinstance(given, str):
        raise UserError(f"{where}: expected str, got {type(given).__name__}: {given!r:.60}")
    text = strip_line_end(str(given))  # np.str_ is a str, but no tokenizer's
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: holds half a surrogate pair, which is no character: {text!r:.60}") from error
    return text
