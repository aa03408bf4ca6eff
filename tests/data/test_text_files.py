import gzip
import hashlib
import lzma
import os
import pathlib
from collections.abc import Callable

import pytest
import zstandard

from transformer.data import text_files
from transformer.runtime.errors import UserError

PACK: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: zstandard.ZstdCompressor().compress(data),
}
NASTY = [
    "a\rb",
    "a\u2028b",
    "a\u0085b",
    "a\ufeffb",
    "a\ufffdb",
    "",
    " ",
    "x" * 100_000,
    "a\x0b\x0c\x1cb",
    "\rCR",
    "😀é",
]


def lines_of(path: pathlib.Path, content: bytes) -> list[str]:
    path.write_bytes(content)
    return list(text_files.read_lines(path))


@pytest.mark.parametrize("extension", ["", *PACK])
def test_only_newline_bytes_split_lines(tmp_path, extension):
    content = "".join(f"{line}\n" for line in NASTY).encode()
    assert lines_of(tmp_path / f"a.en{extension}", PACK.get(extension, bytes)(content)) == NASTY


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        (b"", []),
        (b"\n", [""]),
        (b"a", ["a"]),
        (b"a\n", ["a"]),
        (b"a\n\n", ["a", ""]),
    ],
)
def test_the_last_line_and_blank_lines_count(tmp_path, content, lines):
    assert lines_of(tmp_path / "a.en", content) == lines


@pytest.mark.reported
@pytest.mark.parametrize("extension", ["", *PACK])
@pytest.mark.parametrize(
    ("content", "lines"),
    [
        (b"a\r\nb\r\n", ["a", "b"]),
        (b"a\r\r\n\r\n\r\r\n", ["a\r", "", "\r"]),
        (b"a\rb\r\n\ra\r", ["a\rb", "\ra\r"]),
        (b"\xef\xbb\xbf\r\na \r\n", ["", "a "]),
    ],
)
def test_one_cr_right_before_lf_belongs_to_the_line_end(tmp_path, extension, content, lines):
    assert lines_of(tmp_path / f"a.en{extension}", PACK.get(extension, bytes)(content)) == lines


@pytest.mark.parametrize("extension", ["", *PACK])
def test_a_line_that_would_fill_the_memory_is_refused(tmp_path, monkeypatch, extension):
    monkeypatch.setattr(text_files, "MAX_LINE_BYTES", 1000)
    pack = PACK.get(extension, bytes)
    assert lines_of(tmp_path / f"a.en{extension}", pack(b"a\n" + b"x" * 999 + b"\n")) == ["a", "x" * 999]
    with pytest.raises(UserError, match="line 2: longer than"):
        lines_of(tmp_path / f"a.en{extension}", pack(b"a\n" + b"x" * 1001))


def test_a_bom_is_dropped_at_the_start_of_the_file_alone(tmp_path):
    assert lines_of(tmp_path / "a.en", "\ufeff\ufeffa\n\ufeffb\n".encode()) == ["\ufeffa", "\ufeffb"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"a\nb\nc\xff\n", "a.en, line 3: not UTF-8 (byte 2 of the line, 0xff)"),
        (b"a\n\xed\xa0\x80\n", "a.en, line 2: not UTF-8"),
        ("a\n".encode("utf-16"), "a.en, line 1: not UTF-8"),
        (b"a\nb\x00c\n", "a.en, line 2: holds a NUL character"),
    ],
)
def test_bytes_that_are_not_text_are_refused_by_file_and_line(tmp_path, content, says):
    with pytest.raises(UserError) as error:
        lines_of(tmp_path / "a.en", content)
    assert says in str(error.value)


@pytest.mark.parametrize("extension", list(PACK))
@pytest.mark.parametrize("cut", [1, 40, None])
def test_a_truncated_archive_is_refused(tmp_path, extension, cut):
    packed = PACK[extension](os.urandom(3000).hex().encode())
    with pytest.raises(UserError, match=f"a.en{extension}: damaged or truncated archive"):
        lines_of(tmp_path / f"a.en{extension}", packed[:-cut] if cut else b"")


@pytest.mark.parametrize("extension", list(PACK))
def test_a_file_that_is_not_the_archive_it_is_named_after_is_refused(tmp_path, extension):
    with pytest.raises(UserError, match="damaged or truncated archive"):
        lines_of(tmp_path / f"a.en{extension}", b"plain text\n")


@pytest.mark.parametrize("extension", [".gz", ".xz"])
def test_a_flipped_bit_in_an_archive_with_a_checksum_is_refused(tmp_path, extension):
    packed = bytearray(PACK[extension](os.urandom(3000).hex().encode()))
    packed[len(packed) // 2] ^= 1
    with pytest.raises(UserError):
        lines_of(tmp_path / f"a.en{extension}", bytes(packed))


@pytest.mark.parametrize("extension", list(PACK))
def test_archives_joined_end_to_end_are_read_whole(tmp_path, extension):
    parts = [PACK[extension](b"a\n" * 100_000), PACK[extension](b"b"), PACK[extension](b"c\n")]
    assert lines_of(tmp_path / f"a.en{extension}", b"".join(parts)) == ["a"] * 100_000 + ["bc"]


def test_two_files_are_read_in_step(tmp_path):
    (tmp_path / "a.en").write_bytes(b"one\n\nthree")
    (tmp_path / "a.de.gz").write_bytes(gzip.compress(b"eins\nzwei\n\n"))
    pairs = list(text_files.read_parallel(tmp_path / "a.en", tmp_path / "a.de.gz"))
    assert pairs == [("one", "eins"), ("", "zwei"), ("three", "")]


@pytest.mark.parametrize(("source", "target"), [(3, 2), (2, 5), (0, 1), (1, 0)])
def test_unequal_counts_of_lines_are_refused_with_both(tmp_path, source, target):
    (tmp_path / "a.en").write_bytes(b"x\n" * source)
    (tmp_path / "a.de").write_bytes(b"y\n" * target)
    with pytest.raises(UserError) as error:
        list(text_files.read_parallel(tmp_path / "a.en", tmp_path / "a.de"))
    assert f"a.en has {source} lines" in str(error.value)
    assert f"a.de has {target}:" in str(error.value)


def test_a_file_that_cannot_be_opened_is_named(tmp_path):
    (tmp_path / "a.en").write_bytes(b"x\n")
    for path, says in [
        (tmp_path / "none.en", "there is no such file"),
        (tmp_path, "expected a file"),
        (tmp_path / "a.en" / "b", "expected a file"),
    ]:
        for read in (text_files.check_readable, text_files.file_digest, lambda path: list(text_files.read_lines(path))):
            with pytest.raises(UserError) as error:
                read(path)
            assert str(error.value).startswith(f"{path}: ")
            assert says in str(error.value)


def test_a_file_without_permission_is_named(tmp_path):
    (tmp_path / "a.en").write_bytes(b"x\n")
    (tmp_path / "a.en").chmod(0)
    user = os.geteuid()
    os.seteuid(user or 65534)  # root may read every file
    try:
        with pytest.raises(UserError, match=r"a\.en: no permission"):
            text_files.check_readable(tmp_path / "a.en")
    finally:
        os.seteuid(user)


def test_the_digest_is_of_the_bytes(tmp_path):
    content = os.urandom(3 << 20)
    (tmp_path / "a").write_bytes(content)
    assert text_files.file_digest(tmp_path / "a") == hashlib.sha256(content).hexdigest()


def test_reading_is_lazy(tmp_path):
    (tmp_path / "a.en").write_bytes(b"good\n\xff\n")
    assert next(text_files.read_lines(tmp_path / "a.en")) == "good"


@pytest.mark.parametrize(
    ("name", "stem"), [("a.en.gz", "a.en"), ("a.en.XZ", "a.en"), ("d/a.zst", "d/a"), ("a.en", "a.en"), ("gz", "gz")]
)
def test_the_compression_extension_comes_off(name, stem):
    assert text_files.strip_compression(name) == stem
