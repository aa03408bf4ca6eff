"""The WMT data sets of TFDS, made from the published archives without TensorFlow.

Which archives and members a data set is made of, where they are published and their checksums are
TFDS's own, read from its code; so are the rules by which sentences are read. The pairs of each split
are those that TFDS makes, under the same name, version and features; they keep the order of the
archives, which TFDS shuffles.
"""

import dataclasses
import functools
import itertools
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import tensorflow_datasets as tfds

from transformer.data import members, text_files
from transformer.data.download import Archive, Found, Store
from transformer.data.pair_shards import Pair, PairShards
from transformer.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class Part:
    """One corpus of a split.

    Attributes:
      name: as TFDS calls it.
      archives: one for both sides, or the parts of one corpus.
      members: in each archive: a file for each language, or one that holds both.
    """

    name: str
    archives: tuple[Archive, ...]
    members: tuple[str, ...]


class Wmt(PairShards, skip_registration=True):  # type: ignore[call-arg]  # TFDS's keyword, unseen by mypy
    """Makes the data set of one of TFDS's own WMT builders; its metadata keep the digests of the archives."""

    def __init__(self, theirs: Any, data_dir: str, manual_dir: str):
        """`theirs`: TFDS's builder; `manual_dir`: the folder of archives put there by hand, "" for the usual one."""
        self.name = theirs.name
        self.languages = theirs.builder_config.language_pair
        self.origin = theirs.info.full_name
        self._theirs = theirs.info
        self._parts = parts(theirs)
        self._manual_dir = manual_dir
        downloads = os.path.join(data_dir, "downloads")
        self._store = Store(manual_dir or os.path.join(downloads, "manual"), downloads)
        self._found: dict[Archive, Found] = {}
        config = tfds.core.BuilderConfig(
            name=theirs.builder_config.name,
            version=theirs.builder_config.version,
            description=theirs.builder_config.description,
        )
        super().__init__(config=config, data_dir=data_dir, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=self._theirs.description,
            features=tfds.features.Translation(languages=self.languages),
            supervised_keys=self.languages,
            homepage=self._theirs.homepage,
            citation=self._theirs.citation,
            disable_shuffling=True,
            metadata=tfds.core.MetadataDict(),
        )

    def _pairs_by_split(self) -> dict[str, Callable[[], Iterator[Pair]]]:
        if "://" in os.fspath(self.data_path):
            raise UserError(
                f"{self.data_path}: expected a local folder to prepare {self.origin} in; set config.data.data_dir to "
                "one and copy the prepared folder afterwards"
            )
        if self._manual_dir and not os.path.isdir(self._manual_dir):
            raise UserError(f"config.data.manual_dir = {self._manual_dir}: there is no such folder; check the path")
        every = itertools.chain.from_iterable(self._parts.values())
        self._found = self._store.get(archive for part in every for archive in part.archives)
        self.info.metadata["archives"] = {archive.name: found.sha256 for archive, found in self._found.items()}
        return {split: functools.partial(self._read, split) for split in self._parts}

    def _read(self, split: str) -> Iterator[Pair]:
        """The pairs of a split without those that have an empty side."""
        for part in self._parts[split]:
            count = 0
            for pair in self._read_part(part):
                if all(pair):
                    count += 1
                    yield pair
            if not count:
                names = ", ".join(archive.name for archive in part.archives)
                raise UserError(f"{names}: expected sentences in {' and '.join(part.members)}, got none")

    def _read_part(self, part: Part) -> Iterator[Pair]:
        for archive in part.archives:
            path = self._found[archive].path
            if len(part.members) == 2:
                sides = members.sentences(path, part.members[0]), members.sentences(path, part.members[1])
                names = f"{path}: {part.members[0]}", part.members[1]
                yield from text_files.in_step(sides, names)
            else:
                yield from _columns(part.name, path, part.members[0])


class _Columns(NamedTuple):
    """How a file of both languages is read; lines with another number of columns are left out."""

    separator: str
    number: int
    languages: tuple[int, int]
    any_line_end: bool


_COLUMNS = {
    "wikiheadlines_hi": _Columns("|||", 2, (0, 1), True),
    "wikiheadlines_ru": _Columns("|||", 2, (0, 1), True),
    "hindencorp_01": _Columns("\t", 5, (4, 3), True),
    "czeng_10": _Columns("\t", 4, (2, 3), False),
}


def _columns(name: str, path: pathlib.Path, member: str) -> Iterator[Pair]:
    layout = _COLUMNS[name]
    one, other = layout.languages
    for line in members.sentences(path, member, any_line_end=layout.any_line_end):
        columns = line.split(layout.separator)
        if len(columns) == layout.number:
            yield columns[one].strip(), columns[other].strip()


def parts(builder: Any) -> dict[str, list[Part]]:
    """The corpora of each split of one of TFDS's WMT builders."""
    from tensorflow_datasets.core.download import checksums
    from tensorflow_datasets.translate import wmt

    recorded = checksums.get_all_url_infos()
    language = builder.builder_config.language_pair[0]

    def part(name: str) -> Part:
        subset = wmt.DATASET_MAP[name]
        (url,) = subset.get_url(language)
        if files := subset.get_manual_dl_files(language):
            archives = [Archive(file, url, manual=True) for file in files]
        else:
            known = recorded.get(url)
            facts = {"sha256": known.checksum, "size": int(known.size)} if known else {}
            archives = [Archive(url.rpartition("/")[2], url, **facts)]
        return Part(name, tuple(archives), tuple(dict.fromkeys(subset.get_path(language))))

    return {str(split): [part(name) for name in names] for split, names in builder.subsets.items()}
