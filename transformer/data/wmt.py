"""The WMT data sets of TFDS, made from the published archives without TensorFlow.

Which archives and members a data set is made of, where they are published and their checksums are
TFDS's own, read from its code; so are the rules by which sentences are read. The pairs of each split
are those that TFDS makes, under the same name, version and features; they keep the order of the
archives, which TFDS shuffles.
"""

import contextlib
import dataclasses
import fnmatch
import functools
import gzip
import io
import itertools
import lzma
import os
import pathlib
import re
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any, NamedTuple

import tensorflow_datasets as tfds
from etils import epath

from transformer.data import text_files
from transformer.data.download import Download, DownloadManager, VerifiedFile
from transformer.data.prepared import Pair, ParallelTextBuilder
from transformer.runtime.errors import UserError

_SEGMENT = re.compile(r"<seg id=\"\d+\">(.*)</seg>")  # some of the files are no XML


def read_archive_lines(archive: epath.PathLike, member: str, *, any_line_end: bool = False) -> Iterator[str]:
    """Yields the lines of a text file in an archive, or the segments of an .sgm file, as they stand.

    Args:
      archive: a tar, compressed or not, a zip, or one gzip file.
      member: the name of the file in it, perhaps with wildcards for several that are read one after the
        other; those that end in .gz are unpacked too. "" for what a gzip file holds.
      any_line_end: whether CR and CRLF end lines too, as they do in .sgm files; else LF alone does.

    Raises:
      UserError: there is no such member, it is damaged or it is not UTF-8.
    """
    where = f"{archive}: {member}" if member else os.fspath(archive)
    found = False
    with _user_errors(where):
        for stream in _open_streams(archive, member):
            found = True
            if member.endswith(".sgm"):
                yield from _segments(stream)
            else:
                yield from _decode_lines(stream) if any_line_end else _decode_lf_lines(stream, where)
    if not found:
        raise UserError(f"{archive}: has no file {member}, so it is another archive than expected; get the right one")


def _decode_lf_lines(stream: Any, where: str) -> Iterator[str]:
    """Lines end in b"\\n" alone."""
    for number, line in enumerate(text_files.iter_lines(stream, where), 1):
        try:
            yield line.removesuffix(b"\n").decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{where}, line {number:,}: not UTF-8 ({error.reason}); get the archive again") from error


def _decode_lines(stream: IO[bytes]) -> Iterator[str]:
    """Lines end in LF, CR or CRLF."""
    return (line.removesuffix("\n") for line in io.TextIOWrapper(stream, encoding="utf-8"))


def _segments(stream: IO[bytes]) -> Iterator[str]:
    """What is escaped stays so, as in TFDS and sacreBLEU."""
    for line in _decode_lines(stream):
        if match := _SEGMENT.match(line):
            yield match[1]


def _open_streams(archive: epath.PathLike, member: str) -> Iterator[Any]:
    """The files of that name or pattern, in the order of the archive; of one name, the first."""
    pattern = any(sign in member for sign in "*?[")
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(epath.Path(archive).open("rb"))
        for stream in _open_members(file, member):
            # Closed by no one but the archive: closing a stream in the midst of a pass costs the pass its place.
            yield gzip.GzipFile(fileobj=stream) if member.endswith(".gz") else stream
            if not pattern:
                return


def _open_members(file: IO[bytes], member: str) -> Iterator[Any]:
    if not member:
        yield gzip.GzipFile(fileobj=file)
    elif zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            for name in archive.namelist():
                if _matches(name, member):
                    yield archive.open(name)
    else:
        file.seek(0)
        with tarfile.open(fileobj=file) as tar:
            for entry in tar:
                if entry.isfile() and _matches(entry.name, member):
                    yield tar.extractfile(entry)


def _matches(name: str, member: str) -> bool:
    return fnmatch.fnmatchcase(name.removeprefix("./"), member)


@contextlib.contextmanager
def _user_errors(where: str) -> Iterator[None]:
    try:
        yield
    except (EOFError, tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, OSError) as error:
        raise UserError(f"{where}: cannot be read ({error}): damaged or no archive; get it again") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 ({error.reason}); get the archive again") from error


@dataclasses.dataclass(frozen=True)
class SubCorpus:
    """One corpus of a split.

    Attributes:
      name: as TFDS calls it.
      archives: one for both sides, or the parts of one corpus.
      members: in each archive: a file for each language, or one that holds both.
    """

    name: str
    archives: tuple[Download, ...]
    members: tuple[str, ...]


class WmtBuilder(ParallelTextBuilder, skip_registration=True):  # type: ignore[call-arg]  # TFDS's keyword, unseen by mypy
    """Makes the data set of one of TFDS's own WMT builders; its metadata keep the digests of the archives."""

    def __init__(self, theirs: Any, data_dir: str, manual_dir: str):
        """`theirs`: TFDS's builder; `manual_dir`: the folder of archives put there by hand, "" for the usual one."""
        self.name = theirs.name
        self.languages = theirs.builder_config.language_pair
        self.origin = theirs.info.full_name
        self._theirs = theirs.info
        self._parts = subcorpora(theirs)
        self._manual_dir = manual_dir
        downloads = os.path.join(data_dir, "downloads")
        self._store = DownloadManager(manual_dir or os.path.join(downloads, "manual"), downloads)
        self._found: dict[Download, VerifiedFile] = {}
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

    def _read_part(self, part: SubCorpus) -> Iterator[Pair]:
        for archive in part.archives:
            path = self._found[archive].path
            if len(part.members) == 2:
                sides = read_archive_lines(path, part.members[0]), read_archive_lines(path, part.members[1])
                names = f"{path}: {part.members[0]}", part.members[1]
                yield from text_files.zip_strict(sides, names)
            else:
                yield from _read_columns(part.name, path, part.members[0])


class ColumnFormat(NamedTuple):
    """How a file of both languages is read; lines with another number of columns are left out."""

    separator: str
    number: int
    languages: tuple[int, int]
    any_line_end: bool


COLUMN_FORMATS = {
    "wikiheadlines_hi": ColumnFormat("|||", 2, (0, 1), True),
    "wikiheadlines_ru": ColumnFormat("|||", 2, (0, 1), True),
    "hindencorp_01": ColumnFormat("\t", 5, (4, 3), True),
    "czeng_10": ColumnFormat("\t", 4, (2, 3), False),
}


def _read_columns(name: str, path: pathlib.Path, member: str) -> Iterator[Pair]:
    layout = COLUMN_FORMATS[name]
    one, other = layout.languages
    for line in read_archive_lines(path, member, any_line_end=layout.any_line_end):
        columns = line.split(layout.separator)
        if len(columns) == layout.number:
            yield columns[one].strip(), columns[other].strip()


def subcorpora(builder: Any) -> dict[str, list[SubCorpus]]:
    """The corpora of each split of one of TFDS's WMT builders."""
    from tensorflow_datasets.core.download import checksums
    from tensorflow_datasets.translate import wmt

    recorded = checksums.get_all_url_infos()
    language = builder.builder_config.language_pair[0]

    def part(name: str) -> SubCorpus:
        subset = wmt.DATASET_MAP[name]
        (url,) = subset.get_url(language)
        if files := subset.get_manual_dl_files(language):
            archives = [Download(file, url, manual=True) for file in files]
        else:
            known = recorded.get(url)
            facts = {"sha256": known.checksum, "size": int(known.size)} if known else {}
            archives = [Download(url.rpartition("/")[2], url, **facts)]
        return SubCorpus(name, tuple(archives), tuple(dict.fromkeys(subset.get_path(language))))

    return {str(split): [part(name) for name in names] for split, names in builder.subsets.items()}
