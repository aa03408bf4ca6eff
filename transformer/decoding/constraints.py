"""Encodes what a caller asks of each translation: a forced prefix and phrases that it must hold.

Constraints that cannot be met are rejected here, before the search. Widths are padded to powers of two, so that the
shape on the device depends on the sentence's own constraints alone.

B rows, P longest prefix, K phrases of a sentence, L longest phrase.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from transformer.data import scripts, text_inputs
from transformer.data.batching import PAD_EXAMPLE, pad, round_up_to_power_of_two
from transformer.data.tokenizer import UNK, Tokenizer
from transformer.runtime.errors import UserError

MIN_PREFIX, MIN_PHRASES, MIN_PHRASE = 16, 4, 8  # smallest padded sizes: each shape is a program to compile


class PaddedSizes(NamedTuple):
    """Padded sizes P, K and L; 0 where there is no such constraint."""

    prefix: int
    phrases: int
    phrase: int


class DecodingConstraints(NamedTuple):
    """Token ids, without EOS, of one sentence's forced prefix and of its phrases; empty for no constraint."""

    prefix: np.ndarray = np.zeros(0, np.int32)
    phrases: tuple[np.ndarray, ...] = ()

    def padded_sizes(self) -> PaddedSizes:
        """The sizes of the arrays that hold these constraints."""
        return PaddedSizes(
            round_up_to_power_of_two(len(self.prefix), MIN_PREFIX) if len(self.prefix) else 0,
            round_up_to_power_of_two(len(self.phrases), MIN_PHRASES) if self.phrases else 0,
            round_up_to_power_of_two(max(map(len, self.phrases)), MIN_PHRASE) if self.phrases else 0,
        )

    def length(self) -> int:
        """Tokens, without EOS, of a translation that is sure to hold all of them."""
        return len(self.prefix) + sum(map(len, self.phrases))


def encode_constraints(
    tokenizer: Tokenizer,
    prefixes: Iterable[str | None] | None,
    constraints: Iterable[Iterable[str] | None] | None,
    limits: Sequence[int],
    first: int = 1,
) -> list[DecodingConstraints]:
    """Encodes the constraints of each sentence; a blank prefix and an empty list of phrases are no constraint.

    One line end at the end of a text is stripped.

    Args:
      prefixes: a text or None for each sentence, or None.
      constraints: phrases or None for each sentence, or None; repeated phrases count once.
      limits: the most tokens of each translation, EOS counted; 0 for a blank sentence, which is not translated.
      first: number of the first sentence in errors.

    Raises:
      UserError: the counts differ, an item is not text, a phrase is empty, the vocabulary cannot spell a text, or the
        constraints exceed the limit.
    """
    if prefixes is None and constraints is None:
        return [DecodingConstraints()] * len(limits)
    prefixes, constraints = _items(prefixes, "prefixes", limits), _items(constraints, "constraints", limits)
    encoded = []
    for index, (prefix, phrases, limit) in enumerate(zip(prefixes, constraints, limits, strict=True)):
        where = f"sentence {first + index}"
        sentence_constraints = _encode(tokenizer, prefix, phrases, where)
        _check_length(sentence_constraints, limit, where)
        encoded.append(sentence_constraints)
    return encoded


def _items(values: Iterable[Any] | None, name: str, limits: Sequence[int]) -> list[Any]:
    """One item for each sentence, None without constraint."""
    if values is None:
        return [None] * len(limits)
    items = text_inputs.items(values, f"{name}: expected a list with an item for each sentence")
    if len(items) != len(limits):
        raise UserError(f"{name}: expected one for each of {len(limits):,} sentences, got {len(items):,}")
    return items


def _encode(tokenizer: Tokenizer, prefix: str | None, phrases: Iterable[str] | None, where: str) -> DecodingConstraints:
    prefix = "" if prefix is None else text_inputs.line(prefix, f"{where}, its prefix")
    phrases = [] if phrases is None else text_inputs.items(phrases, f"{where}: expected a list of phrases")
    if not all(isinstance(phrase, str) and phrase.strip() for phrase in phrases):
        raise UserError(f"{where}: expected phrases that are not empty, got {phrases!r}")
    phrases = [text_inputs.line(phrase, f"{where}, a phrase") for phrase in phrases]
    texts = [prefix if prefix.strip() else "", *dict.fromkeys(phrases)]
    prefix_ids, *phrase_ids = [ids[:-1] for ids in tokenizer.encode(texts)]
    for text, ids in zip(texts, [prefix_ids, *phrase_ids], strict=True):
        if "\n" in text:
            raise UserError(f"{where}: a translation is one line, so it cannot hold {text!r}; leave out the line break")
        if UNK in ids:
            raise UserError(f"{where}: the vocabulary cannot write {text!r}; ask for other words")
    for i, inside in enumerate(tokenizer.encode_inside(texts[1:])):
        if scripts.is_written_without_spaces(texts[1 + i][0]):  # it may follow another word directly
            phrase_ids[i] = inside
    distinct = {ids.tobytes(): ids for ids in phrase_ids}
    return DecodingConstraints(prefix_ids, tuple(distinct.values()))


def _check_length(constraints: DecodingConstraints, limit: int, where: str) -> None:
    if not constraints.length():
        return
    if not limit:
        raise UserError(f"{where}: a blank source has no translation, so it cannot have a prefix or phrases")
    if constraints.length() + 1 > limit:
        raise UserError(
            f"{where}: its prefix and phrases take {constraints.length()} tokens and an end, but its translation has "
            f"at most {limit} (source tokens + decode.max_extra_length); ask for less, or raise decode.max_extra_length"
        )


def pad_constraints(
    constraints: Sequence[DecodingConstraints], examples_B: np.ndarray, sizes: PaddedSizes
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """prefix_BP and phrases_BKL of these examples, int32 with PAD after; None where there is no such constraint."""
    rows = [constraints[i] if i != PAD_EXAMPLE else DecodingConstraints() for i in examples_B]
    prefix_BP, phrases_BKL = None, None
    if sizes.prefix:
        prefix_BP = pad([row.prefix for row in rows], sizes.prefix)
    if sizes.phrases:
        empty = np.zeros(0, np.int32)
        padded = [(*row.phrases, *[empty] * (sizes.phrases - len(row.phrases))) for row in rows]
        flat = [phrase for phrases in padded for phrase in phrases]
        phrases_BKL = pad(flat, sizes.phrase).reshape(len(rows), sizes.phrases, sizes.phrase)
    return prefix_BP, phrases_BKL
