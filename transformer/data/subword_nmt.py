"""Applies BPE merges learnt by subword-nmt: words → subword tokens → text (Sennrich et al. 2016).

A file of merges ("codes") holds one merge a line in the order they were learnt; version 0.2 marks the end of a word by
`</w>`. A subword token that is continued by another of the same word ends in `@@`.
"""

import collections
import functools
import itertools
import json
import re
from collections.abc import Iterable, Sequence

from transformer.runtime.errors import UserError

VERSION = "#version: 0.2"
END_OF_WORD = "</w>"
CONTINUATION_MARKER = "@@"
MAX_CACHED_WORDS = 1 << 20  # of a corpus with ever new words, such as addresses
SPECIALS = ("<pad>", "<s>", "</s>", "<unk>")
Merges = tuple[tuple[str, str], ...]


def parse(text: str, path: str) -> Merges:
    """Parses a file of merges; errors name `path`.

    Raises:
      UserError: the version is not 0.2, or a line is not a pair.
    """
    first, *lines = text.rstrip("\n").split("\n")
    if first.rstrip("\r ") != VERSION:
        raise UserError(f"{path}: expected codes of subword-nmt, whose first line is {VERSION!r}, got {first[:60]!r}")
    merges = []
    for number, line in enumerate(lines, 2):
        pair = line.strip("\r ").split(" ")
        if len(pair) != 2:
            raise UserError(f"{path}, line {number}: expected two tokens with a space between, got {line[:60]!r}")
        merges.append((pair[0], pair[1]))
    return tuple(merges)


class BpeSegmenter:
    """Splits words into subword tokens by merges, with a cache of words."""

    def __init__(self, merges: Merges):
        self._ranks = {pair: rank for rank, pair in reversed(list(enumerate(merges)))}
        self._pieces = functools.lru_cache(MAX_CACHED_WORDS)(self._split)

    def segment(self, line: str) -> list[str]:
        """The subword tokens of a line, whose words are separated by single spaces."""
        return [piece for word in line.split(" ") if word for piece in self._pieces(word)]

    def _split(self, word: str) -> tuple[str, ...]:
        """Repeatedly merges all occurrences of the pair that was learnt first."""
        parts = [*word[:-1], word[-1] + END_OF_WORD]
        while len(parts) > 1:
            best = min(itertools.pairwise(parts), key=lambda pair: self._ranks.get(pair, len(self._ranks)))
            if best not in self._ranks:
                break
            parts = _merge(parts, best)
        parts[-1] = parts[-1].removesuffix(END_OF_WORD)
        return (*(part + CONTINUATION_MARKER for part in parts[:-1]), parts[-1])


def _merge(parts: Sequence[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    i = 0
    while i < len(parts):
        is_pair = tuple(parts[i : i + 2]) == pair
        merged.append("".join(pair) if is_pair else parts[i])
        i += 2 if is_pair else 1
    return merged


class SubwordProcessor:
    """Merges with a vocabulary, with the interface of SentencePieceProcessor that `tokenizer` uses."""

    def __init__(self, merges: Merges, pieces: Sequence[str], tags: Sequence[str] = ()):
        self._segmenter, self._pieces = BpeSegmenter(merges), [*SPECIALS, *tags, *pieces]
        self._first = len(SPECIALS) + len(tags)  # id that text may give
        self._ids = {piece: number for number, piece in enumerate(self._pieces) if number >= self._first}

    def encode(self, lines: Sequence[str]) -> list[list[int]]:
        """The ids of each line; `<unk>` for a subword token that is not in the vocabulary."""
        return [[self._ids.get(piece, self.unk_id()) for piece in self._segmenter.segment(line)] for line in lines]

    def decode(self, ids: Iterable[int]) -> str:
        """The text: subword tokens separated by spaces, except after a continuation marker."""
        pieces = (self._pieces[number] for number in ids if not self.is_control(number))
        return re.sub(f"{CONTINUATION_MARKER}( |$)", "", " ".join(pieces))

    def id_to_piece(self, number: int) -> str:
        return self._pieces[number]

    def piece_to_id(self, piece: str) -> int:
        return self._pieces.index(piece) if piece in self._pieces else self.unk_id()

    def is_control(self, number: int) -> bool:
        return len(SPECIALS) <= number < self._first

    def vocab_size(self) -> int:
        return len(self._pieces)

    def pad_id(self) -> int:
        return 0

    def bos_id(self) -> int:
        return 1

    def eos_id(self) -> int:
        return 2

    def unk_id(self) -> int:
        return 3


def build_vocabulary(merges: Merges, lines: Iterable[str], tags: Sequence[str] = ()) -> bytes:
    """The merges and the subword tokens of these lines, the most frequent first, as a file that `load` reads.

    Tags are tokens too, which no text gives.
    """
    segmenter = BpeSegmenter(merges)
    counts = collections.Counter(piece for line in lines for piece in segmenter.segment(line))
    pieces = sorted(counts.keys() - {*SPECIALS, *tags}, key=lambda piece: (-counts[piece], piece))
    fields = {"format": "subword-nmt 0.2", "pieces": pieces, "merges": merges, **({"tags": tags} if tags else {})}
    return json.dumps(fields, ensure_ascii=False).encode()


def load(model: bytes, path: str) -> SubwordProcessor:
    """Reads what `build_vocabulary` wrote.

    Raises:
      UserError: the file is invalid.
    """
    try:
        fields = json.loads(model)
        merges = tuple((str(left), str(right)) for left, right in fields["merges"])
        return SubwordProcessor(
            merges, [str(piece) for piece in fields["pieces"]], list(map(str, fields.get("tags", [])))
        )
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: expected a vocabulary of BPE merges, got something else: {error}") from error
