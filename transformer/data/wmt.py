"""Builds the WMT data sets of TFDS from the published archives, without TensorFlow.

The archives of a data set, their members, addresses and checksums are read from TFDS's code, and sentences are
extracted by its rules. The pairs of each split are those of TFDS, under the same name, version and features, but in the
order of the archives, which TFDS shuffles.
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

from transformer.data import shards, text_files
from transformer.data.download import Download, DownloadManager, VerifiedFile
from transformer.data.prepared import ParallelTextBuilder
from transformer.data.shards import Part
from transformer.data.text_files import Pair
from transformer.runtime import object_storage
from transformer.runtime.errors import UserError

_SEGMENT = re.compile(r"<seg id=\"\d+\">(.*)</seg>")  # some of the files are not XML


def read_archive_lines(archive: epath.PathLike, member: str, *, any_line_end: bool = False) -> Iterator[str]:
    """Yields the lines of a text file in an archive, or the segments of an .sgm file, unchanged.

    Args:
      archive: a tar file, compressed or not, a zip file, or a gzip file.
      member: the name of the file in it, possibly with wildcards for several files in turn; those that end in .gz are
        decompressed too. "" for the content of a gzip file.
      any_line_end: whether CR and CRLF end lines too, as in .sgm files, and not only LF.

    Raises:
      UserError: the member is missing, damaged or not UTF-8.
    """
    where = f"{archive}: {member}" if member else os.fspath(archive)
    has_member = False
    with _user_errors(where):
        for stream in _open_streams(archive, member):
            has_member = True
            if member.endswith(".sgm"):
                yield from _segments(stream)
            else:
                yield from _universal_lines(stream) if any_line_end else _lf_lines(stream, where)
    if not has_member:
        raise UserError(f"{archive}: has no file {member}, so it is another archive than expected; get the right one")


def _lf_lines(stream: Any, where: str) -> Iterator[str]:
    """Lines that end in LF only."""
    for number, line in enumerate(text_files.iter_lines(stream, where), 1):
        try:
            yield line.removesuffix(b"\n").decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{where}, line {number:,}: not UTF-8 ({error.reason}); get the archive again") from error


def _universal_lines(stream: IO[bytes]) -> Iterator[str]:
    """Lines that end in LF, CR or CRLF."""
    return (line.removesuffix("\n") for line in io.TextIOWrapper(stream, encoding="utf-8"))


def _segments(stream: IO[bytes]) -> Iterator[str]:
    """The text of segments; XML escapes are kept, as in TFDS and sacreBLEU."""
    for line in _universal_lines(stream):
        if match := _SEGMENT.match(line):
            yield match[1]


def _open_streams(archive: epath.PathLike, member: str) -> Iterator[Any]:
    """All files that match a pattern in the order of the archive, or the first with a name."""
    is_pattern = any(character in member for character in "*?[")
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(epath.Path(archive).open("rb"))
        for stream in _open_members(file, member):
            # Closed with the archive: closing a stream during iteration over a tar file disturbs the iteration.
            yield gzip.GzipFile(fileobj=stream) if member.endswith(".gz") else stream
            if not is_pattern:
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
        raise UserError(f"{where}: cannot be read ({error}): damaged, or not an archive; get it again") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 ({error.reason}); get the archive again") from error


@dataclasses.dataclass(frozen=True)
class SubCorpus:
    """One of the corpora that form a split.

    Attributes:
      name: in TFDS.
      archives: one for both languages, or several volumes of one corpus.
      members: in each archive: a file for each language, or one file with both.
    """

    name: str
    archives: tuple[Download, ...]
    members: tuple[str, ...]


class WmtBuilder(ParallelTextBuilder, skip_registration=True):  # type: ignore[call-arg]  # TFDS's keyword, unseen by mypy
    """Builds the data set of one of TFDS's WMT builders; records the digests of the archives in its metadata."""

    def __init__(self, tfds_builder: Any, data_dir: str, manual_dir: str):
        """Makes a builder like `tfds_builder`; `manual_dir` has archives fetched by hand ("": the default folder)."""
        self.name = tfds_builder.name
        self.languages = tfds_builder.builder_config.language_pair
        self.source_description = tfds_builder.info.full_name
        names = ("description", "supervised_keys", "homepage", "citation")
        self.published = {name: getattr(tfds_builder.info, name) for name in names}
        self._subcorpora = subcorpora(tfds_builder)
        self._manual_dir = manual_dir
        downloads = os.path.join(data_dir, "downloads")
        self._downloads = DownloadManager(manual_dir or os.path.join(downloads, "manual"), downloads)
        self._files: dict[Download, VerifiedFile] = {}
        config = tfds.core.BuilderConfig(
            name=tfds_builder.builder_config.name,
            version=tfds_builder.builder_config.version,
            description=tfds_builder.builder_config.description,
        )
        super().__init__(config=config, data_dir=data_dir, file_format="array_record")

    def _parts_by_split(self) -> dict[str, Callable[[], Iterator[Part]]]:
        if object_storage.is_remote(self.data_path):
            raise UserError(
                f"{self.data_path}: expected a local folder to prepare {self.source_description} in; set "
                "config.data.data_dir to one and copy the prepared folder afterwards"
            )
        if self._manual_dir and not os.path.isdir(self._manual_dir):
            raise UserError(f"config.data.manual_dir = {self._manual_dir}: expected a local folder; check the path")
        all_subcorpora = itertools.chain.from_iterable(self._subcorpora.values())
        self._files = self._downloads.download(
            archive for subcorpus in all_subcorpora for archive in subcorpus.archives
        )
        self.info.metadata["archives"] = {archive.name: file.sha256 for archive, file in self._files.items()}
        return {split: functools.partial(self._read_parts, split) for split in self._subcorpora}

    def _read_parts(self, split: str) -> Iterator[Part]:
        return shards.pair_parts(self._read_split(split))

    def _read_split(self, split: str) -> Iterator[Pair]:
        """The pairs of a split, without those with an empty side."""
        for subcorpus in self._subcorpora[split]:
            count = 0
            for pair in self._read_subcorpus(subcorpus):
                if all(pair):
                    count += 1
                    yield pair
            if not count:
                names = ", ".join(archive.name for archive in subcorpus.archives)
                raise UserError(f"{names}: expected sentences in {' and '.join(subcorpus.members)}, got none")

    def _read_subcorpus(self, subcorpus: SubCorpus) -> Iterator[Pair]:
        for archive in subcorpus.archives:
            path = self._files[archive].path
            if len(subcorpus.members) == 2:
                sides = read_archive_lines(path, subcorpus.members[0]), read_archive_lines(path, subcorpus.members[1])
                names = f"{path}: {subcorpus.members[0]}", subcorpus.members[1]
                yield from text_files.zip_strict(sides, names)
            else:
                yield from _read_columns(subcorpus.name, path, subcorpus.members[0])


class ColumnFormat(NamedTuple):
    """The layout of a file with both languages; lines with another number of columns are skipped."""

    separator: str
    num_columns: int
    language_columns: tuple[int, int]
    any_line_end: bool


COLUMN_FORMATS = {
    "wikiheadlines_hi": ColumnFormat("|||", 2, (0, 1), True),
    "wikiheadlines_ru": ColumnFormat("|||", 2, (0, 1), True),
    "hindencorp_01": ColumnFormat("\t", 5, (4, 3), True),
    "czeng_10": ColumnFormat("\t", 4, (2, 3), False),
}


def _read_columns(name: str, path: pathlib.Path, member: str) -> Iterator[Pair]:
    layout = COLUMN_FORMATS[name]
    source, target = layout.language_columns
    for line in read_archive_lines(path, member, any_line_end=layout.any_line_end):
        columns = line.split(layout.separator)
        if len(columns) == layout.num_columns:
            yield columns[source].strip(), columns[target].strip()


def subcorpora(builder: Any) -> dict[str, list[SubCorpus]]:
    """The corpora of each split of one of TFDS's WMT builders."""
    from tensorflow_datasets.core.download import checksums
    from tensorflow_datasets.translate import wmt

    recorded = checksums.get_all_url_infos()
    language = builder.builder_config.language_pair[0]

    def subcorpus(name: str) -> SubCorpus:
        subset = wmt.DATASET_MAP[name]
        (url,) = subset.get_url(language)
        if files := subset.get_manual_dl_files(language):
            archives = [Download(file, url, manual=True) for file in files]
        else:
            known = recorded.get(url)
            facts = {"sha256": known.checksum, "size": int(known.size)} if known else {}
            archives = [Download(url.rpartition("/")[2], url, **facts)]
        return SubCorpus(name, tuple(archives), tuple(dict.fromkeys(subset.get_path(language))))

    return {str(split): [subcorpus(name) for name in names] for split, names in builder.subsets.items()}
