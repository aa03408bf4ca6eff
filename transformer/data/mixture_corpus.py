"""The corpora of a mixture: one for each entry, each prepared by itself, and what spans all of them.

Example ids count through the training pairs of the entries, one entry after another. Imports no JAX.
"""

import bisect
import functools
import itertools
import os
from typing import NamedTuple

from transformer.config import mixture
from transformer.config.mixture import Direction
from transformer.config.schema import DataConfig
from transformer.data import corpus as corpora
from transformer.data import local_text, parallel_formats, text_files
from transformer.data.corpus import Corpus, Split
from transformer.data.local_text import SplitFiles
from transformer.data.text_files import Pair
from transformer.runtime.errors import UserError
from transformer.runtime.files import json_digest


class MixtureSplit:
    """The training pairs of all entries, one entry after another.

    Attributes:
      splits: of the entries.
      digest: changes with any pair and with their order; in hexadecimal.
    """

    def __init__(self, splits: list[Split]):
        self.splits = splits
        self._ends = list(itertools.accumulate(map(len, splits)))
        self.digest = json_digest([split.digest for split in splits])

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Pair:
        """The pair (source, target) of an example id, without tags."""
        entry = bisect.bisect_right(self._ends, index)
        return self.splits[entry][index - (self._ends[entry - 1] if entry else 0)]


class ValidationSplit(NamedTuple):
    """The validation split of a direction."""

    direction: Direction
    split: Split


class MixtureCorpus:
    """The corpora of a mixture.

    Attributes:
      corpora: of the entries.
      source_language, target_language: of all entries, for names of folders.
      digest: changes with any of them; in hexadecimal.
    """

    def __init__(self, entries: list[Corpus]):
        self.corpora = entries
        self.source_language, self.target_language = "mixture", str(len(entries))
        self.digest = json_digest([corpus.digest for corpus in entries])

    @functools.cached_property
    def train(self) -> MixtureSplit:
        """The training split."""
        return MixtureSplit([corpus.train for corpus in self.corpora])


def open_sources(data: DataConfig, *, tokenize: bool = False, workers: int = 0) -> Corpus | MixtureCorpus:
    """Opens the data set of a config, or that of each entry of its mixture; as `corpus.open_corpus`."""
    if not data.mixture:
        return corpora.open_corpus(data, tokenize=tokenize, workers=workers)
    found = []
    for number, entry in enumerate(data.mixture, 1):
        with mixture.entry_errors(number, entry):
            own = mixture.entry_data(data, entry)
            found.append(corpora.open_corpus(own, tokenize=tokenize, workers=workers))
    return MixtureCorpus(found)


def validation_splits(data: DataConfig, corpus: Corpus | MixtureCorpus) -> list[ValidationSplit]:
    """The validation split of each direction.

    Raises:
      UserError: one has no pairs.
    """
    own = corpus.corpora if isinstance(corpus, MixtureCorpus) else [corpus]
    found = [ValidationSplit(each, own[each.entry].split("validation")) for each in mixture.directions(data)]
    for direction, split in found:
        if not len(split):
            where = f" of {direction.name}" if data.mixture else ""
            raise UserError(
                f"the validation split{where} has no pairs: fill it, or leave it out to hold out training pairs"
            )
    return found


def validation_digest(splits: list[ValidationSplit]) -> str:
    """The digest of one split, or of several together."""
    digests = [split.digest for _, split in splits]
    return digests[0] if len(digests) == 1 else json_digest(digests)


def validate_sources(data: DataConfig) -> None:
    """Raises a UserError if the files, data sets or languages of the config or of an entry are missing.

    An entry of a mixture without a pair to train on is an error too. Imports no JAX.
    """
    if not data.mixture:
        corpora.validate_source(data)
    for number, entry in enumerate(data.mixture, 1):
        with mixture.entry_errors(number, entry):
            own = mixture.entry_data(data, entry)
            corpora.validate_source(own)
            if own.name == "text":
                _check_not_empty(local_text.find_splits(own)["train"])
    _check_sides(data)


def _check_not_empty(files: SplitFiles) -> None:
    """Raises a UserError unless one of the pairs has text on both sides; reads no further than the part with it."""
    pairs = (pair for part in files.parts() for pair in part.pairs())
    if not any(source.strip() and target.strip() for source, target in pairs):
        raise UserError(f"{' and '.join(files.paths[:2])}: expected pairs of sentences to train on, got none")


def _check_sides(data: DataConfig) -> None:
    """Raises a UserError if two entries read the same columns of a file as two directions."""
    seen: dict[tuple[str, str], tuple[int, str, str]] = {}
    for number, entry in enumerate(data.mixture, 1):
        extension = os.path.splitext(text_files.strip_compression(entry.train))[1].lower()
        picks = parallel_formats.parse_keys(entry.columns) if extension == ".jsonl" else entry.columns
        if not entry.train or not (picks or extension == ".tsv"):
            continue
        languages = entry.source_language, entry.target_language
        columns = entry.columns or "1,2"
        first, *before = seen.setdefault((entry.train, columns), (number, *languages))
        if tuple(before) == languages[::-1]:
            swapped = ",".join(columns.split(",")[::-1])
            raise UserError(
                f"config.data.mixture: entries {first} and {number} are two directions with the same columns of "
                f"{entry.train}; set columns={swapped!r} in the one that reads it the other way round"
            )
