"""Reads files that hold both languages, TSV, JSONL, TMX and PO, as (source, target) pairs."""

import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from xml.parsers import expat

import polib
from etils import epath

from transformer.data import text_files
from transformer.runtime.errors import UserError

PAIR_FORMATS = (".tsv", ".jsonl", ".tmx", ".po")

_CHUNK = 1 << 16


def read_pairs(path: epath.PathLike, languages: tuple[str, str], columns: str = "") -> Iterator[tuple[str, str]]:
    """Yields (source, target) of a file that holds both languages; its extension says how.

    Args:
      path: ends in one of PAIR_FORMATS, and may further end in one of COMPRESSIONS.
      languages: codes of source and target.
      columns: for TSV alone, the two columns to take, counted from 1: "1,2". Empty: the file has two.

    Raises:
      UserError: as `text_files.read_lines`, an unknown extension, or a record that cannot be taken as one pair.
    """
    kind = pair_format(path)
    if kind == ".tsv":
        return _read_tsv(path, parse_columns(columns))
    if kind == ".jsonl":
        return _read_jsonl(path, languages)
    return _read_tmx(path, languages) if kind == ".tmx" else _read_po(path)


def pair_format(path: epath.PathLike) -> str:
    """The extension in PAIR_FORMATS of a file of pairs, any compression left aside, or a UserError."""
    extension = os.path.splitext(text_files.strip_compression(os.fspath(path)))[1].lower()
    if extension not in PAIR_FORMATS:
        raise UserError(
            f"{path}: unknown format {extension or '(no extension)'!r} of a file with both languages; expected a name "
            f"ending in {', '.join(PAIR_FORMATS)}, then perhaps in {', '.join(text_files.COMPRESSIONS)}; "
            "plain text takes two files"
        )
    return extension


def parse_columns(columns: str) -> tuple[int, int] | None:
    """The two columns, counted from 0, that `data.columns` picks; None if it is empty."""
    if not columns:
        return None
    parts = [part.strip() for part in columns.split(",")]
    if len(parts) != 2 or not all(re.fullmatch("[0-9]{1,9}", part) and int(part) for part in parts):
        raise UserError(f"config.data.columns: expected two columns counted from 1, as in '1,2', got {columns!r}")
    if int(parts[0]) == int(parts[1]):
        raise UserError(f"config.data.columns: source and target are the same column in {columns!r}")
    return int(parts[0]) - 1, int(parts[1]) - 1


def _without_blank_end(lines: Iterable[str]) -> Iterator[tuple[int, str]]:
    """Lines with their numbers, counted from 1, but for those at the end that hold nothing or only spaces."""
    blank = 0
    for number, line in enumerate(lines, 1):
        if not line.strip(" \r"):
            blank += 1
            continue
        yield from ((before, "") for before in range(number - blank, number))
        blank = 0
        yield number, line


def _read_tsv(path: epath.PathLike, columns: tuple[int, int] | None) -> Iterator[tuple[str, str]]:
    for number, line in _without_blank_end(text_files.read_lines(path)):
        cells = line.split("\t")
        if columns is None and len(cells) != 2:
            raise UserError(
                f"{path}, line {number}: expected two columns, source tab target, got {len(cells)}; "
                "mend the line, or pick two columns with config.data.columns, as in '1,2'"
            )
        source, target = columns or (0, 1)
        if max(source, target) >= len(cells):
            raise UserError(
                f"{path}, line {number}: config.data.columns picks column {max(source, target) + 1}, "
                f"the line has {len(cells)}"
            )
        yield cells[source], cells[target]


def _read_jsonl(path: epath.PathLike, languages: tuple[str, str]) -> Iterator[tuple[str, str]]:
    for number, line in _without_blank_end(text_files.read_lines(path)):
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not JSON ({error}); expected one object a line") from error
        if not isinstance(record, dict):
            raise UserError(f"{where}: expected an object with the keys {' and '.join(languages)}, got {line[:60]!r}")
        if isinstance(nested := record.get("translation"), dict):  # as Hugging Face's data sets have it
            record = nested
        source, target = (_json_text(record, language, where) for language in languages)
        yield source, target


def _json_text(record: dict, language: str, where: str) -> str:
    if language not in record:
        raise UserError(f"{where}: expected the key {language!r}, got {', '.join(map(repr, record)) or 'none'}")
    text = record[language]
    if not isinstance(text, str):
        raise UserError(f"{where}: expected text under {language!r}, got {text!r:.60}")
    # A line break would shift every later line of a plain file; to replace it would change the reference.
    for bad, name in (("\n", "a line break"), ("\0", "a NUL character")):
        if bad in text:
            raise UserError(f"{where}: the text under {language!r} holds {name}; a sentence is one line")
    if not text.isascii() and re.search("[\ud800-\udfff]", text):
        raise UserError(f"{where}: the text under {language!r} holds half a surrogate pair, which is no character")
    return text


def _read_po(path: epath.PathLike) -> Iterator[tuple[str, str]]:
    """msgid → msgstr of translated entries; fuzzy, obsolete and plural ones are left out."""
    # polib splits text that it is given at U+2028 and the like, but a file at line ends alone.
    with tempfile.NamedTemporaryFile("w", suffix=".po", encoding="utf-8", newline="") as copy:
        copy.writelines(line + "\n" for line in text_files.read_lines(path))
        copy.flush()
        try:
            entries = polib.pofile(copy.name, encoding="utf-8")
        except (OSError, ValueError, IndexError) as error:
            line = re.search(r"line (\d+)", str(error))
            place = f"{path}, line {line[1]}" if line else f"{path}"
            raise UserError(f"{place}: not a PO file that can be read; msgfmt --check says more") from error
    for entry in entries:
        if entry.translated() and not entry.obsolete and not entry.msgid_plural:
            yield text_files.one_line(entry.msgid), text_files.one_line(entry.msgstr)


def _read_tmx(path: epath.PathLike, languages: tuple[str, str]) -> Iterator[tuple[str, str]]:
    """The units that have both languages; units but none of them with both is an error."""
    reader = _TmxReader(path)
    found = False
    with text_files.open_bytes(path) as stream:
        while chunk := stream.read(_CHUNK):
            for unit in reader.feed(chunk):
                if pair := _tmx_pair(unit, languages):
                    found = True
                    yield pair
    reader.feed(b"", last=True)
    if reader.languages and not found:
        seen = ", ".join(sorted(reader.languages))
        raise UserError(f"{path}: no unit has both {' and '.join(languages)}; languages in it: {seen}")


def _tmx_pair(unit: dict[str, str], languages: tuple[str, str]) -> tuple[str, str] | None:
    """The texts of a unit in the two languages: the very code, else another of the same language ("en": "en-US")."""
    wanted = [language.lower().replace("_", "-") for language in languages]
    found = []
    for language in wanted:
        near = (code for code in unit if code not in wanted and code.split("-")[0] == language.split("-")[0])
        found.append(language if language in unit else next(near, None))
    source, target = found
    return (unit[source], unit[target]) if source and target and source != target else None


class _TmxReader:
    """Collects the units of a TMX file that comes in chunks, each as {language in lower case: text}.

    The content of inline codes (bpt, ept, it, ph, ut) is markup and left out; hi and sub hold text.
    Entity declarations are refused, so nothing can expand; a DTD is never fetched.
    """

    _CODES = frozenset(("bpt", "ept", "it", "ph", "ut"))

    def __init__(self, path: epath.PathLike):
        self._path = path
        self._inside: list[str] = []  # the elements open within the current seg, itself included
        self._encoding = ""
        self._language = ""
        self._text: list[str] = []
        self._unit: dict[str, str] = {}
        self._units: list[dict[str, str]] = []
        self.languages: set[str] = set()
        self._parser = expat.ParserCreate()
        self._parser.buffer_text = True
        self._parser.XmlDeclHandler = self._declaration
        self._parser.StartElementHandler = self._start
        self._parser.EndElementHandler = self._end
        self._parser.CharacterDataHandler = self._characters
        self._parser.EntityDeclHandler = self._refuse_entity

    def feed(self, chunk: bytes, last: bool = False) -> list[dict[str, str]]:
        """The units that this chunk completes."""
        self._units = []
        try:
            self._parser.Parse(chunk, last)
        except expat.ExpatError as error:
            reason = expat.errors.messages[error.code]
            raise UserError(f"{self._path}, line {error.lineno}: not well-formed XML ({reason})") from error
        except (ValueError, LookupError) as error:  # of several bytes a character, or of no known name
            raise UserError(
                f"{self._path}: the encoding {self._encoding} cannot be read; convert the file to UTF-8"
            ) from error
        return self._units

    def _declaration(self, version: str, encoding: str | None, *_: object) -> None:
        self._encoding = encoding or ""

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        if self._inside or name == "seg":
            self._inside.append(name)
        elif name == "tu":
            self._unit = {}
        elif name == "tuv":
            code = attributes.get("xml:lang", attributes.get("lang", ""))
            self._language = code.lower().replace("_", "-")
            self.languages.add(code)
            self._text = []

    def _end(self, name: str) -> None:
        if self._inside:
            self._inside.pop()
        elif name == "tuv":
            self._unit.setdefault(self._language, text_files.one_line("".join(self._text)))
        elif name == "tu":
            self._units.append(self._unit)

    def _characters(self, text: str) -> None:
        if self._inside and self._inside[-1] not in self._CODES:
            self._text.append(text)

    def _refuse_entity(self, name: str, *_: object) -> None:
        raise UserError(f"{self._path}: declares the XML entity {name!r}, which is refused; write its text out instead")
