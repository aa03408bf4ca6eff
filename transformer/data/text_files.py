"""Reads the lines of text files, compressed or not.

Lines end in b"\\n" only; a b"\\r" right before it belongs to the line end. Any other CR and U+2028 are content. UTF-8
is strict and NUL is an error. A BOM at the start of a file is dropped; elsewhere it is content. Files are streamed,
never held in memory.
"""

import contextlib
import glob
import gzip
import io
import itertools
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO

import zstandard
from etils import epath

from transformer.runtime import object_storage
from transformer.runtime.errors import UserError
from transformer.runtime.files import reject_pipe, sha256

Pair = tuple[str, str]

COMPRESSIONS = (".gz", ".xz", ".zst")
MAX_LINE_BYTES = 64 << 20  # bytes

_BOM = b"\xef\xbb\xbf"
_CHUNK = 1 << 16
_ZSTD_CHUNK = 1 << 12  # small because the data may be 30,000 times as large when decompressed
_TRUNCATED = "the archive ends before its data does"


def read_lines(path: epath.PathLike) -> Iterator[str]:
    """Yields the lines of a plain text file, compressed or not, without their line ends.

    A last line without b"\\n" counts; an empty file has no lines.

    Raises:
      UserError: the file cannot be read, its archive is damaged, or a line is not UTF-8 or holds NUL;
        names the file and the line, counted from 1.
    """
    with open_bytes(path) as stream:
        yield from decode_lines(stream, path)


def decode_lines(stream: BinaryIO | io.BufferedIOBase, path: epath.PathLike) -> Iterator[str]:
    """Like `read_lines`, for an open stream of bytes such as stdin; errors name `path`."""
    with user_errors(path):
        for number, raw in enumerate(iter_lines(stream, path), 1):
            line = raw.removeprefix(_BOM) if number == 1 else raw
            yield strip_line_end(_decode(line, path, number))


def strip_line_end(text: str) -> str:
    """Removes one line end, LF or CR LF, if the text ends in one."""
    return text.removesuffix("\n").removesuffix("\r") if text.endswith("\n") else text


def one_line(text: str) -> str:
    """Joins lines: each line break becomes a space, with the blanks around it, and none is left at either end."""
    return re.sub("[ \t\r]*\n[ \t\r\n]*", " ", text).strip(" \t\r") if "\n" in text else text


def iter_lines(stream: BinaryIO | io.BufferedIOBase, path: epath.PathLike) -> Iterator[bytes]:
    """The lines of a stream with their b"\\n"; refuses overlong ones (decompression bombs)."""
    number = 0
    while raw := stream.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(raw) > MAX_LINE_BYTES:
            raise overlong_line(path, number)
        yield raw


def overlong_line(path: epath.PathLike, number: int) -> UserError:
    """The error for a line of more than MAX_LINE_BYTES."""
    return UserError(f"{path}, line {number}: longer than {MAX_LINE_BYTES >> 20} MiB, so not a sentence; split it")


def decode_block(block: bytes, path: epath.PathLike, first: int) -> list[str]:
    """The lines of a part of a file, as `decode_lines`; the first of them has the number `first`."""
    has_open_line = block != b"" and not block.endswith(b"\n")  # before the BOM, which may be all of it, is dropped
    if first == 1:
        block = block.removeprefix(_BOM)
    try:
        text = block.decode()
        is_valid = "\0" not in text
    except UnicodeDecodeError:
        is_valid = False
    if not is_valid:
        for number, line in enumerate(block.split(b"\n"), first):
            _decode(line, path, number)  # raises at the first invalid one
    lines = text.split("\n")
    last = lines.pop()
    if "\r" in text:
        lines = [line.removesuffix("\r") for line in lines]
    return [*lines, last] if has_open_line else lines


def read_parallel(source: epath.PathLike, target: epath.PathLike) -> Iterator[Pair]:
    """Yields (source, target) of two plain text files, line by line.

    Raises:
      UserError: as `read_lines`, or the files have different numbers of lines.
    """
    yield from zip_strict((read_lines(source), read_lines(target)), (source, target))


def zip_strict(
    lines: tuple[Iterator[str], Iterator[str]], names: tuple[epath.PathLike, epath.PathLike]
) -> Iterator[Any]:
    """Zips two iterators, which must have equal lengths; errors name `names`."""
    for number, (source, target) in enumerate(itertools.zip_longest(*lines)):
        if source is None or target is None:
            longer = number + 1 + sum(1 for _ in lines[source is None])
            raise unequal_lines(names, (number, longer) if source is None else (longer, number))
        yield source, target


def unequal_lines(names: Sequence[epath.PathLike], counts: Sequence[int]) -> UserError:
    """The error for two files that do not have equally many lines."""
    longer, least = (names[0], counts[1]) if counts[0] > counts[1] else (names[1], counts[0])
    return UserError(
        f"{names[0]} has {counts[0]:,} lines and {names[1]} has {counts[1]:,}: expected equal numbers, each line the "
        f"translation of the other file's; line {least + 1:,} of {longer} has no counterpart"
    )


def strip_compression(name: str) -> str:
    """Removes the compression extension of a file name, if it has one."""
    stem, extension = os.path.splitext(name)
    return stem if extension.lower() in COMPRESSIONS else name


def expand(pattern: str, name: str) -> list[str]:
    """The files that match a pattern with the wildcards * ? [ ], in the order of their names; others are a path.

    Raises:
      UserError: there are none; begins with `name`.
    """
    path = os.path.expanduser(pattern)
    if object_storage.is_remote(pattern) or not glob.has_magic(path) or os.path.exists(path):
        return [pattern]
    matches = sorted(match for match in glob.glob(path, recursive=True) if os.path.isfile(match))
    if not matches:
        raise UserError(f"{name}: expected files that match {pattern}, found none; check the pattern")
    return matches


def check_readable(path: epath.PathLike) -> None:
    """Raises a UserError unless the file can be opened and read repeatedly; reads none of it."""
    reject_pipe(epath.Path(path).expanduser())
    with user_errors(path):
        epath.Path(path).expanduser().open("rb").close()


def file_digest(path: epath.PathLike) -> str:
    """SHA-256 of the bytes of a file, in hexadecimal."""
    with user_errors(path):
        return sha256(epath.Path(path).expanduser())


@contextlib.contextmanager
def user_errors(path: epath.PathLike) -> Iterator[None]:
    """Turns errors of opening and reading a file into a UserError that names it."""
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such file; check the path") from error
    except (IsADirectoryError, NotADirectoryError) as error:
        raise UserError(f"{path}: expected a file, but it or its parent is something else; check the path") from error
    except PermissionError as error:
        raise UserError(f"{path}: no permission to read it; change its mode or copy it") from error
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error, zstandard.ZstdError) as error:
        raise UserError(f"{path}: damaged or truncated archive ({error}); make or fetch it again") from error
    except (OSError, ImportError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error


@contextlib.contextmanager
def open_bytes(path: epath.PathLike) -> Iterator[io.BufferedIOBase]:
    """The bytes of a file, decompressed as its extension says."""
    extension = os.path.splitext(os.fspath(path))[1].lower()
    with user_errors(path), epath.Path(path).expanduser().open("rb") as raw:
        if extension not in COMPRESSIONS:
            yield raw if isinstance(raw, io.BufferedReader) else io.BufferedReader(raw)  # gives readline
            return
        start = io.BufferedReader(raw)
        if not start.peek(1):  # gzip would read an archive of 0 bytes as an empty file
            raise EOFError(_TRUNCATED)
        with _DECOMPRESSORS[extension](start) as stream:
            yield stream


class _ZstdReader(io.RawIOBase):
    """Decompresses frame after frame; zstandard's own reader accepts a truncated one."""

    def __init__(self, raw: io.BufferedReader):
        self._raw = raw
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._compressed = b""
        self._decompressed = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._decompressed:
            self._compressed = self._compressed or self._raw.read(_ZSTD_CHUNK)
            if not self._compressed:
                if self._frame is not None:
                    raise EOFError(_TRUNCATED)
                return 0
            frame = self._frame or zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
            self._decompressed = memoryview(frame.decompress(self._compressed))
            self._compressed, self._frame = (frame.unused_data, None) if frame.eof else (b"", frame)
        count = min(len(buffer), len(self._decompressed))
        buffer[:count] = self._decompressed[:count]
        self._decompressed = self._decompressed[count:]
        return count


_DECOMPRESSORS: dict[str, Callable[[Any], Any]] = {
    ".gz": gzip.open,
    ".xz": lzma.open,
    ".zst": lambda raw: io.BufferedReader(_ZstdReader(raw), _CHUNK),
}


def _decode(line: bytes, path: epath.PathLike, number: int) -> str:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}, line {number}: not UTF-8 (byte {error.start + 1} of the line, 0x{line[error.start]:02x}); "
            "convert the file, for example with iconv"
        ) from error
    if "\0" in text:
        raise UserError(f"{path}, line {number}: holds a NUL character; remove it")
    return text
