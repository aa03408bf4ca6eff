"""What a person asks of one translation besides its source: how it begins, and which phrases it holds.

Texts become ids here, and what cannot be met is refused before anything is searched. Widths are powers of two,
so that the shape the device sees depends on the sentence's own wish alone.

B rows, P longest prefix, K phrases of a sentence, L longest phrase.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from transformer.data import text_inputs
from transformer.data.batching import PAD_EXAMPLE, JaggedArray, round_up_to_power_of_two
from transformer.data.tokenizer import UNK, Tokenizer
from transformer.runtime.errors import UserError

SHORTEST_PREFIX, FEWEST_PHRASES, SHORTEST_PHRASE = 16, 4, 8  # lowest rungs: each shape is a program to compile


class PaddedSizes(NamedTuple):
    """Widths P, K and L; 0 where nothing is asked."""

    prefix: int
    phrases: int
    phrase: int


class DecodingConstraints(NamedTuple):
    """Ids without EOS."""

    prefix: np.ndarray
    phrases: list[np.ndarray]

    def shape(self) -> PaddedSizes:
        """The rungs of the round_up_to_power_of_two that hold it."""
        return PaddedSizes(
            round_up_to_power_of_two(len(self.prefix), SHORTEST_PREFIX) if len(self.prefix) else 0,
            round_up_to_power_of_two(len(self.phrases), FEWEST_PHRASES) if self.phrases else 0,
            round_up_to_power_of_two(max(map(len, self.phrases)), SHORTEST_PHRASE) if self.phrases else 0,
        )

    def length(self) -> int:
        """Tokens of a translation that surely holds all of it, without EOS."""
        return len(self.prefix) + sum(map(len, self.phrases))


def encode_constraints(
    tokenizer: Tokenizer,
    prefixes: Iterable[str | None] | None,
    constraints: Iterable[Iterable[str] | None] | None,
    limits: Sequence[int],
    first: int = 1,
) -> list[DecodingConstraints]:
    """The wish for each sentence; a blank prefix and a list of no phrases ask nothing.

    Texts lose one line end at their end, if any.

    Args:
      prefixes: a text or None for each sentence, or None.
      constraints: phrases or None for each sentence, or None; the same phrase twice is asked for once.
      limits: the most tokens of each translation, EOS counted; 0 of a blank sentence, which is not translated.
      first: what the first sentence is called in errors.

    Raises:
      UserError: other counts than sentences, no text, an empty phrase, text that the vocabulary cannot write, or
        more than fits into the limit.
    """
    if prefixes is None and constraints is None:
        return [DecodingConstraints(np.zeros(0, np.int32), [])] * len(limits)
    prefixes, constraints = _items(prefixes, "prefixes", limits), _items(constraints, "constraints", limits)
    wishes = []
    for index, (prefix, phrases, limit) in enumerate(zip(prefixes, constraints, limits, strict=True)):
        where = f"sentence {first + index}"
        wish = _encode(tokenizer, prefix, phrases, where)
        _check_length(wish, limit, where)
        wishes.append(wish)
    return wishes


def _items(given: Iterable[Any] | None, name: str, limits: Sequence[int]) -> list[Any]:
    """One for each sentence, None where nothing is asked."""
    if given is None:
        return [None] * len(limits)
    found = text_inputs.items(given, f"{name}: expected a list with an item for each sentence")
    if len(found) != len(limits):
        raise UserError(f"{name}: expected one for each of {len(limits):,} sentences, got {len(found):,}")
    return found


def _encode(tokenizer: Tokenizer, prefix: str | None, phrases: Iterable[str] | None, where: str) -> DecodingConstraints:
    begins = "" if prefix is None else text_inputs.line(prefix, f"{where}, its prefix")
    asked = [] if phrases is None else text_inputs.items(phrases, f"{where}: expected a list of phrases")
    if not all(isinstance(phrase, str) and phrase.strip() for phrase in asked):
        raise UserError(f"{where}: expected phrases that are not empty, got {asked!r}")
    lines = [text_inputs.line(phrase, f"{where}, a phrase") for phrase in asked]
    wanted = [begins if begins.strip() else "", *dict.fromkeys(lines)]
    ids = [one[:-1] for one in tokenizer.encode(wanted)]
    for text, one in zip(wanted, ids, strict=True):
        if "\n" in text:
            raise UserError(f"{where}: a translation is one line, so it cannot hold {text!r}; leave out the line break")
        if UNK in one:
            raise UserError(f"{where}: the vocabulary cannot write {text!r}; ask for other words")
    distinct = {one.tobytes(): one for one in ids[1:]}
    return DecodingConstraints(ids[0], list(distinct.values()))


def _check_length(wish: DecodingConstraints, limit: int, where: str) -> None:
    if not wish.length():
        return
    if not limit:
        raise UserError(f"{where}: a blank source has no translation, so nothing can be asked of it")
    if wish.length() + 1 > limit:
        raise UserError(
            f"{where}: its prefix and phrases take {wish.length()} tokens and an end, but its translation has at most "
            f"{limit} (source tokens + decode.max_extra_length); ask for less, or raise decode.max_extra_length"
        )


def to_arrays(
    wishes: Sequence[DecodingConstraints], examples_B: np.ndarray, shape: PaddedSizes
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """prefix_BP and phrases_BKL, int32 with PAD after, of the wishes that rows name; None where nothing is asked."""
    rows = [wishes[i] if i != PAD_EXAMPLE else DecodingConstraints(np.zeros(0, np.int32), []) for i in examples_B]
    prefix_BP, phrases_BKL = None, None
    if shape.prefix:
        prefix_BP = _pad([row.prefix for row in rows], shape.prefix)
    if shape.phrases:
        nothing = np.zeros(0, np.int32)
        flat = [(row.phrases + [nothing] * shape.phrases)[k] for row in rows for k in range(shape.phrases)]
        phrases_BKL = _pad(flat, shape.phrase).reshape(len(rows), shape.phrases, shape.phrase)
    return prefix_BP, phrases_BKL


def _pad(sequences: Sequence[np.ndarray], width: int) -> np.ndarray:
    return JaggedArray.from_sequences(sequences).to_padded(np.arange(len(sequences)), width)
