"""Sentences of the files inside archives: streamed, so that nothing is unpacked onto the disk.

Members are asked for by name and never written anywhere, so a hostile archive has no say in paths.
"""

import contextlib
import fnmatch
import gzip
import io
import lzma
import os
import re
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from typing import IO, Any

from etils import epath

from transformer.data import text_files
from transformer.runtime.errors import UserError

_SEGMENT = re.compile(r"<seg id=\"\d+\">(.*)</seg>")  # some of the files are no XML


def sentences(archive: epath.PathLike, member: str, *, any_line_end: bool = False) -> Iterator[str]:
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
    with _reported(where):
        for stream in _streams(archive, member):
            found = True
            if member.endswith(".sgm"):
                yield from _segments(stream)
            else:
                yield from _translated(stream) if any_line_end else _lines(stream, where)
    if not found:
        raise UserError(f"{archive}: has no file {member}, so it is another archive than expected; get the right one")


def _lines(stream: Any, where: str) -> Iterator[str]:
    """Lines end in b"\\n" alone."""
    for number, line in enumerate(text_files.bounded_lines(stream, where), 1):
        try:
            yield line.removesuffix(b"\n").decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{where}, line {number:,}: not UTF-8 ({error.reason}); get the archive again") from error


def _translated(stream: IO[bytes]) -> Iterator[str]:
    """Lines end in LF, CR or CRLF."""
    return (line.removesuffix("\n") for line in io.TextIOWrapper(stream, encoding="utf-8"))


def _segments(stream: IO[bytes]) -> Iterator[str]:
    """What is escaped stays so, as in TFDS and sacreBLEU."""
    for line in _translated(stream):
        if match := _SEGMENT.match(line):
            yield match[1]


def _streams(archive: epath.PathLike, member: str) -> Iterator[Any]:
    """The files of that name or pattern, in the order of the archive; of one name, the first."""
    pattern = any(sign in member for sign in "*?[")
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(epath.Path(archive).open("rb"))
        for stream in _opened(file, member):
            # Closed by no one but the archive: closing a stream in the midst of a pass costs the pass its place.
            yield gzip.GzipFile(fileobj=stream) if member.endswith(".gz") else stream
            if not pattern:
                return


def _opened(file: IO[bytes], member: str) -> Iterator[Any]:
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
def _reported(where: str) -> Iterator[None]:
    try:
        yield
    except (EOFError, tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, OSError) as error:
        raise UserError(f"{where}: cannot be read ({error}): damaged or no archive; get it again") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 ({error.reason}); get the archive again") from error
