"""One split of a data set: sentence pairs by number."""

import contextlib
import operator
from collections.abc import Iterator

import numpy as np
from tensorflow_datasets.proto import tf_example_pb2

from transformer.datasets.prepared import Records
from transformer.errors import UserError

_BLOCK = 4096


class Split:
    """Sentence pairs by number; can be pickled, and is read by several threads at once.

    Attributes:
      name: as the data set calls it.
      digest: changes when any pair or the order changes; in hexadecimal.
    """

    def __init__(self, name: str, digest: str, languages: tuple[str, str], records: Records, rows: np.ndarray | None):
        """`records`: serialized examples; `rows`: which of them, [N] int64 ascending, or None for all."""
        self.name, self.digest = name, digest
        self._languages, self._records, self._rows = languages, records, rows

    def __len__(self) -> int:
        return len(self._records) if self._rows is None else len(self._rows)

    def __getitem__(self, index: int) -> tuple[str, str]:
        """The pair (source, target) of number `index`, 0 ≤ index < len, as it stands in the data."""
        index = operator.index(index)
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name}: expected 0 ≤ index < {len(self)}, got {index}")
        row = index if self._rows is None else int(self._rows[index])
        with self._reported():
            return _parse(self._records.read(row, row + 1)[0], self._languages)

    def __iter__(self) -> Iterator[tuple[str, str]]:
        for start in range(0, len(self), _BLOCK):
            rows = range(start, min(start + _BLOCK, len(self)))
            chosen = list(rows) if self._rows is None else self._rows[start : start + _BLOCK].tolist()
            if chosen[-1] - chosen[0] > 2 * len(chosen):  # far apart: one by one costs less than all between
                yield from (self[row] for row in rows)
                continue
            with self._reported():
                records = self._records.read(chosen[0], chosen[-1] + 1)
                pairs = [_parse(records[row - chosen[0]], self._languages) for row in chosen]
            yield from pairs

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


def _parse(record: bytes, languages: tuple[str, str]) -> tuple[str, str]:
    """The pair of a serialized example; TFDS's own way goes through NumPy and takes three times as long."""
    features = tf_example_pb2.Example.FromString(record).features.feature
    source, target = (features[code].bytes_list.value[0].decode() for code in languages)
    return source, target
