"""Filters of training pairs, as a chain: each sees the pairs that those before it have left, and counts what it drops.

The worker that reads a shard finds what all filters but the last drop, pair by pair (`FilterChain.find`). Duplicates
are found among the hashes of all pairs (`mark_duplicates`). The result is a code for each pair: 0 if it is kept, else
the number of the filter in NAMES, counted from 1. Imports no JAX.

Shapes: N pairs of a part, a shard or the split.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from transformer.config.schema import DataConfig
from transformer.data import scripts
from transformer.data.text_files import Pair
from transformer.runtime.errors import UserError
from transformer.runtime.files import json_digest

NAMES = ("length", "ratio", "copies", "controls", "script", "duplicates")
VERSION = 1  # increased whenever the same chain drops other pairs of the same data

MAX_HASHES = 1 << 22  # compared at a time; each takes up to 80 bytes

_DUPLICATES = NAMES.index("duplicates") + 1
_NOT_EXAMINED = 255  # in place of a code
_CONTROL = re.compile("[\x00-\x08\x0a-\x1f\x7f-\x9f\ufffd]")  # a tab separates words


@dataclasses.dataclass(frozen=True, kw_only=True)
class FilterChain:
    """What training drops; picklable. The fields are those of the config.

    Attributes:
      scripts: ISO 15924 codes of source and target, "" if not known or not needed.
    """

    unit: str
    min_length: int
    max_length: int
    max_ratio: float
    copies: bool
    controls: bool
    min_script_share: float
    duplicates: bool
    scripts: tuple[str, str]

    @classmethod
    def from_config(cls, data: DataConfig) -> "FilterChain | None":
        """The chain of a config; None if all filters are off.

        Raises:
          UserError: the script of neither language is known.
        """
        languages = (data.source_language, data.target_language)
        codes = tuple(scripts.script_of_language(language) if data.filter_script else "" for language in languages)
        source, target = (code if code in scripts.LETTER_NAMES else "" for code in codes)
        if data.filter_script and not source and not target:
            raise UserError(
                f"config.data.filter_script = {data.filter_script}: the script of neither {' nor '.join(languages)} is "
                "known; expected a language of the Unicode CLDR, or a code with its script such as sr_Latn; set it to 0"
            )
        chain = cls(
            unit=data.filter_unit,
            min_length=data.filter_min_length,
            max_length=data.filter_max_length,
            max_ratio=data.filter_max_ratio,
            copies=data.filter_copies,
            controls=data.filter_controls,
            min_script_share=data.filter_script,
            duplicates=data.filter_duplicates,
            scripts=(source, target),
        )
        return chain if chain.active() else None

    def active(self) -> dict[str, str]:
        """The name of each filter that is on, and what it drops."""
        limits = [(self.min_length, "under"), (self.max_length, "over")]
        bounds = [f"{relation} {limit:,} {self.unit}" for limit, relation in limits if limit]
        letters = " or ".join(dict.fromkeys(filter(None, self.scripts)))
        dropped = {
            "length": " or ".join(bounds),
            "ratio": self.max_ratio and f"a side has over {self.max_ratio:g} times the {self.unit} of the other",
            "copies": self.copies and "source equals target",
            "controls": self.controls and "control characters or U+FFFD",
            "script": self.min_script_share and f"under {self.min_script_share:.0%} of letters in {letters}",
            "duplicates": self.duplicates and "the pair occurs before",
        }
        return {name: str(dropped[name]) for name in NAMES if dropped[name]}

    @property
    def digest(self) -> str:
        """Changes with any field and with VERSION; in hexadecimal."""
        return json_digest([VERSION, dataclasses.asdict(self)])

    def find(self, pairs: Sequence[Pair]) -> np.ndarray:
        """The code of the first filter but duplicates that drops each pair, [N] uint8."""
        codes_N = np.zeros(len(pairs), np.uint8)
        if not pairs:
            return codes_N
        sides: list[tuple[str, ...]] = list(zip(*pairs, strict=True))
        dropped: dict[str, np.ndarray] = {}
        if self.min_length or self.max_length or self.max_ratio:
            lengths = [np.array([self._length(text) for text in side]) for side in sides]
            shorter_N, longer_N = np.minimum(*lengths), np.maximum(*lengths)
            dropped["length"] = shorter_N < self.min_length
            if self.max_length:
                dropped["length"] |= longer_N > self.max_length
            if self.max_ratio:
                dropped["ratio"] = longer_N > self.max_ratio * shorter_N
        if self.copies:
            dropped["copies"] = np.array([source.strip() == target.strip() for source, target in pairs])
        if self.controls:
            dropped["controls"] = np.array([any(map(_CONTROL.search, pair)) for pair in pairs])
        if self.min_script_share:
            shares = [scripts.share_in_script(s, code) for s, code in zip(sides, self.scripts, strict=True) if code]
            dropped["script"] = np.minimum.reduce(shares) < self.min_script_share
        for code, name in enumerate(NAMES, 1):
            if name in dropped:
                codes_N[(codes_N == 0) & dropped[name]] = code
        return codes_N

    def _length(self, text: str) -> int:
        return len(text.split()) if self.unit == "words" else len(text)


def counts(codes_N: np.ndarray, chain: FilterChain) -> dict[str, int]:
    """The number of pairs that each filter of the chain drops, zeros included."""
    by_code = np.bincount(codes_N, minlength=len(NAMES) + 1)
    return {name: int(by_code[NAMES.index(name) + 1]) for name in chain.active()}


def rows_of(codes_N: np.ndarray, name: str) -> np.ndarray:
    """The rows that a filter drops, ascending."""
    return np.flatnonzero(codes_N == NAMES.index(name) + 1)


def resolve(
    codes_N: np.ndarray,
    left_out: Sequence[int],
    chain: FilterChain,
    hashes: Callable[[], Iterable[np.ndarray]],
) -> np.ndarray:
    """The codes of all pairs from those that `FilterChain.find` returns, [N] uint8.

    Args:
      left_out: rows that are not trained on in any case, which no filter counts.
      hashes: 64-bit hashes of the pairs, one array a shard; read again whenever it is called.
    """
    codes_N = codes_N.copy()
    codes_N[np.array(left_out, np.int64)] = _NOT_EXAMINED
    if chain.duplicates:
        mark_duplicates(codes_N, hashes)
    codes_N[codes_N == _NOT_EXAMINED] = 0
    return codes_N


def mark_duplicates(codes_N: np.ndarray, hashes: Callable[[], Iterable[np.ndarray]]) -> None:
    """Gives the kept pairs that equal an earlier kept one their code.

    Memory is bounded: hashes are read several times, those in one of equal ranges at a time, about MAX_HASHES of them.
    """
    passes = -(-len(codes_N) // MAX_HASHES)
    width = -(-(1 << 64) // max(passes, 1))
    for number in range(passes):
        low, high = np.uint64(number * width), np.uint64(min((number + 1) * width, 1 << 64) - 1)
        rows: list[np.ndarray] = []
        found: list[np.ndarray] = []
        first = 0
        for shard_N in hashes():
            codes = codes_N[first : first + len(shard_N)]
            here = np.flatnonzero((shard_N >= low) & (shard_N <= high) & (codes == 0))
            is_repeated = _is_repeated(shard_N[here])
            codes[here[is_repeated]] = _DUPLICATES
            rows.append(here[~is_repeated] + first)  # once a shard, however often a pair occurs
            found.append(shard_N[rows[-1] - first])
            first += len(shard_N)
        codes_N[np.concatenate(rows)[_is_repeated(np.concatenate(found))]] = _DUPLICATES


def _is_repeated(hashes_N: np.ndarray) -> np.ndarray:
    """Which hashes equal an earlier one, [N] bool."""
    order = np.argsort(hashes_N, kind="stable")
    ordered = hashes_N[order]
    repeated = np.zeros(len(order), bool)
    repeated[order[1:][ordered[1:] == ordered[:-1]]] = True
    return repeated
