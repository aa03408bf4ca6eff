"""One split of a data set: sentence pairs by number."""

import contextlib
import operator
from collections.abc import Iterator

import numpy as np
from tensorflow_datasets.proto import tf_example_pb2

from transformer.data import text_files
from transformer.data.prepared import Records
from transformer.runtime.errors import UserError

Pair = tuple[str, str]

_BLOCK = 4096


class Split:
    """Sentence pairs by number; can be pickled, and is read by several threads at once.

    A sentence is one line: a line break within one, which data sets of TFDS may have, is read as a space.

    Attributes:
      name: as the data set calls it.
      digest: changes when any pair or the order changes; in hexadecimal.
    """

    def __init__(
        self,
        name: str,
        digest: str,
        languages: tuple[str, str],
        records: Records,
        rows: np.ndarray | None,
        keeps_cr: bool = False,
    ):
        """Reads serialized examples.

        Args:
          records: the examples.
          rows: which of them, [N] int64 ascending, or None for all.
          keeps_cr: the records are lines of text split at b"\\n" alone, so a CR that ends one is its line end's.
        """
        self.name, self.digest = name, digest
        self._languages, self._records, self._rows, self._keeps_cr = languages, records, rows, keeps_cr

    def __len__(self) -> int:
        return len(self._records) if self._rows is None else len(self._rows)

    def __getitem__(self, index: int) -> Pair:
        """The pair (source, target) of number `index`, 0 ≤ index < len."""
        index = operator.index(index)
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name}: expected 0 ≤ index < {len(self)}, got {index}")
        row = index if self._rows is None else int(self._rows[index])
        (pair,) = self._parsed(row, row + 1)
        return self.lines(pair)

    def __iter__(self) -> Iterator[Pair]:
        return map(self.lines, self.stored())

    def lines(self, stored: Pair) -> Pair:
        """The two lines of text that a stored pair is read as."""
        source, target = stored
        if self._keeps_cr:
            source, target = source.removesuffix("\r"), target.removesuffix("\r")
        return text_files.one_line(source), text_files.one_line(target)

    def stored(self) -> Iterator[Pair]:
        """All pairs as they stand in the data, with any line breaks."""
        for start in range(0, len(self), _BLOCK):
            end = min(start + _BLOCK, len(self))
            chosen = list(range(start, end)) if self._rows is None else self._rows[start:end].tolist()
            first, last = chosen[0], chosen[-1] + 1
            if last - first > 2 * len(chosen) + 1:  # far apart: one by one costs less than all between
                for row in chosen:
                    yield from self._parsed(row, row + 1)
            else:
                pairs = self._parsed(first, last)
                yield from (pairs[row - first] for row in chosen)

    def _parsed(self, first: int, last: int) -> list[Pair]:
        with self._reported():
            return [_parse(record, self._languages) for record in self._records.read(first, last)]

    def sources(self) -> list[str]:
        """All source sentences in order."""
        return [source for source, _ in self]

    def targets(self) -> list[str]:
        """All target sentences in order."""
        return [target for _, target in self]

    @contextlib.contextmanager
    def _reported(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # ArrayRecord and protobuf raise kinds of their own
            raise UserError(f"the prepared data of split {self.name!r} cannot be read: {error}") from error


def _parse(record: bytes, languages: tuple[str, str]) -> Pair:
    """The pair of a serialized example; TFDS's own way goes through NumPy and takes three times as long."""
    features = tf_example_pb2.Example.FromString(record).features.feature
    source, target = (features[code].bytes_list.value[0].decode() for code in languages)
    return source, target
