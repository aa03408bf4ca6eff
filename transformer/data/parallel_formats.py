"""Reads (source, target) pairs from files with both languages: TSV, JSONL, Parquet, TMX and PO."""

import importlib.util
import json
import os
import re
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any
from xml.parsers import expat

import polib
from etils import epath

from transformer.data import text_files
from transformer.runtime.errors import UserError

_CHUNK = 1 << 16
_PARQUET_ROWS = 4096  # decoded at a time


def read_pairs(path: epath.PathLike, languages: tuple[str, str], columns: str = "") -> Iterator[tuple[str, str]]:
    """Yields (source, target) from a file with both languages, in the format of its extension.

    Args:
      path: ends in one of PAIR_FORMATS, optionally followed by one of COMPRESSIONS.
      languages: codes of source and target.
      columns: of a TSV file, counted from 1: "1,2". Empty: the file has two. Of a Parquet file, also names: "en,de".
        Of a JSONL file, names of keys; numbers are for files of other formats. Empty: the language codes.

    Raises:
      UserError: as `text_files.read_lines`, or an unknown extension, or a record that is not one pair.
    """
    return _READERS[pair_format(path)](path, languages, columns)


def pair_format(path: epath.PathLike) -> str:
    """The extension in PAIR_FORMATS of a file, before that of any compression; a UserError if it has none."""
    extension = os.path.splitext(text_files.strip_compression(os.fspath(path)))[1].lower()
    if extension not in PAIR_FORMATS:
        raise UserError(
            f"{path}: unknown format {extension or '(no extension)'!r} of a file with both languages; expected a name "
            f"ending in {', '.join(PAIR_FORMATS)}, then perhaps in {', '.join(text_files.COMPRESSIONS)}; "
            "plain text takes two files"
        )
    if extension == ".parquet":
        if text_files.strip_compression(os.fspath(path)) != os.fspath(path):
            raise UserError(f"{path}: Parquet compresses its columns itself; decompress the file")
        if importlib.util.find_spec("pyarrow") is None:
            raise UserError(f"{path}: reading Parquet needs pyarrow, which is not installed; pip install pyarrow")
    return extension


def parse_columns(columns: str) -> tuple[int, int] | None:
    """The two columns of `data.columns`, counted from 0; None if it is empty."""
    if not columns:
        return None
    parts = [part.strip() for part in columns.split(",")]
    if len(parts) != 2 or not all(map(_is_column_number, parts)):
        raise UserError(f"config.data.columns: expected two columns counted from 1, as in '1,2', got {columns!r}")
    if int(parts[0]) == int(parts[1]):
        raise UserError(f"config.data.columns: source and target are the same column in {columns!r}")
    return int(parts[0]) - 1, int(parts[1]) - 1


def parse_column_names(
    columns: str, expected: str = "names or numbers of two columns, as in 'en,de' or '1,2'"
) -> tuple[str, str] | None:
    """The two names, for Parquet also numbers, in `data.columns`; None if it is empty."""
    if not columns:
        return None
    parts = tuple(part.strip() for part in columns.split(","))
    if len(parts) != 2 or not all(parts):
        raise UserError(f"config.data.columns: expected {expected}, got {columns!r}")
    if parts[0] == parts[1]:
        raise UserError(f"config.data.columns: source and target are the same column in {columns!r}")
    return parts[0], parts[1]


def parse_keys(columns: str) -> tuple[str, str] | None:
    """The two keys in `data.columns` for JSONL; None if it is empty, or has numbers, which pick columns elsewhere."""
    keys = parse_column_names(columns)
    return None if keys and all(map(_is_column_number, keys)) else keys


def check_columns(columns: str, formats: Collection[str]) -> None:
    """Raises a UserError unless `data.columns` suits files of these formats."""
    named = {".jsonl", ".parquet"} & set(formats)
    if ".tsv" in formats or not named:
        parse_columns(columns)
    elif named == {".jsonl"}:
        expected = "two keys of .jsonl, as in 'source,target'"
        if (keys := parse_column_names(columns, expected)) and all(map(_is_column_number, keys)):
            raise UserError(f"config.data.columns: expected {expected}, got {columns!r}")
    else:
        parse_column_names(columns)
    if columns and ".tsv" not in formats and not named:
        raise UserError(
            "config.data.columns: picks columns of .tsv, .parquet or .jsonl files, and neither data.train nor "
            "data.valid is one"
        )


def _is_column_number(text: str) -> bool:
    return re.fullmatch("[0-9]{1,9}", text) is not None and int(text) > 0


def _strip_trailing_blank_lines(lines: Iterable[str]) -> Iterator[tuple[int, str]]:
    """Lines with their numbers, counted from 1, without blank lines at the end."""
    blank = 0
    for number, line in enumerate(lines, 1):
        if not line.strip(" \r"):
            blank += 1
            continue
        yield from ((blank_number, "") for blank_number in range(number - blank, number))
        blank = 0
        yield number, line


def _read_tsv(path: epath.PathLike, columns: tuple[int, int] | None) -> Iterator[tuple[str, str]]:
    for number, line in _strip_trailing_blank_lines(text_files.read_lines(path)):
        cells = line.split("\t")
        if columns is None and len(cells) != 2:
            advice = "; separate them by a tab" if len(cells) == 1 else ", or pick two with config.data.columns='1,2'"
            expected = f"{path}, line {number}: expected two columns, source tab target, got {len(cells)}"
            raise UserError(f"{expected}; fix the line{advice}")
        source, target = columns or (0, 1)
        if max(source, target) >= len(cells):
            raise UserError(
                f"{path}, line {number}: config.data.columns picks column {max(source, target) + 1}, "
                f"the line has {len(cells)}"
            )
        yield cells[source], cells[target]


def tsv_header(path: epath.PathLike, languages: tuple[str, str], columns: str) -> tuple[str, str] | None:
    """The first pair of a TSV file if it names the sides: the language codes, or source and target, in any case."""
    if pair_format(path) != ".tsv" or (first := next(read_pairs(path, languages, columns), None)) is None:
        return None
    names = {cell.strip().lower() for cell in first}
    return first if names in ({code.lower() for code in languages}, {"source", "target"}) else None


def _read_jsonl(path: epath.PathLike, languages: tuple[str, str], columns: str) -> Iterator[tuple[str, str]]:
    keys = parse_keys(columns) or languages
    hint = "" if columns else "; name two with config.data.columns, as in 'source,target'"
    for number, line in _strip_trailing_blank_lines(text_files.read_lines(path)):
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not JSON ({error}); expected one object a line") from error
        if not isinstance(record, dict):
            raise UserError(f"{where}: expected an object with the keys {' and '.join(keys)}, got {line[:60]!r}")
        if isinstance(nested := record.get("translation"), dict):  # the layout of Hugging Face's data sets
            record = nested
        source, target = (_json_text(record, key, where, hint) for key in keys)
        yield source, target


def _json_text(record: dict, key: str, where: str, hint: str) -> str:
    if key not in record:
        raise UserError(f"{where}: expected the key {key!r}, got {', '.join(map(repr, record)) or 'none'}{hint}")
    return _one_line_text(record[key], key, where)


def _one_line_text(text: Any, name: str, where: str) -> str:
    """The text under a key or in a column, which must be one line of characters."""
    if not isinstance(text, str):
        raise UserError(f"{where}: expected text under {name!r}, got {text!r:.60}")
    # A line break would shift all later lines of a plain text file; replacing it would change the reference.
    for bad, what in (("\n", "a line break"), ("\0", "a NUL character")):
        if bad in text:
            raise UserError(f"{where}: the text under {name!r} holds {what}; a sentence is one line")
    if not text.isascii() and re.search("[\ud800-\udfff]", text):
        raise UserError(f"{where}: the text under {name!r} holds half a surrogate pair, which is not a character")
    return text


def _read_parquet(path: epath.PathLike, languages: tuple[str, str], columns: str) -> Iterator[tuple[str, str]]:
    """Yields pairs row by row; rows are decoded a few at a time."""
    import pyarrow
    import pyarrow.compute
    import pyarrow.parquet

    row = 1
    with text_files.user_errors(path), epath.Path(path).expanduser().open("rb") as stream:
        try:
            file = pyarrow.parquet.ParquetFile(stream)
            picked = _parquet_columns(file.schema_arrow, f"{path}", languages, parse_column_names(columns))
            for batch in file.iter_batches(_PARQUET_ROWS, columns=[".".join(name) for name in picked]):
                sides = []
                for top, *fields in picked:
                    column = batch.column(top)
                    sides.append((pyarrow.compute.struct_field(column, fields) if fields else column).to_pylist())
                for number, texts in enumerate(zip(*sides, strict=True), row):
                    where = f"{path}, row {number:,}"
                    source, target = (
                        _one_line_text(text, name[-1], where) for text, name in zip(texts, picked, strict=True)
                    )
                    yield source, target
                row += batch.num_rows
        except (pyarrow.ArrowException, UnicodeDecodeError) as error:
            raise UserError(
                f"{path}, at row {row:,} or later: damaged, or no Parquet file ({error}); make or fetch it again"
            ) from error


def _parquet_columns(
    schema: Any, path: str, languages: tuple[str, str], columns: tuple[str, str] | None
) -> list[list[str]]:
    """The column of each side, as the names that lead to it from the top level."""
    names, picked = list(schema.names), []
    for wanted in columns or languages:
        if wanted in names:
            picked.append([wanted])
        elif columns and _is_column_number(wanted) and int(wanted) <= len(names):
            picked.append([names[int(wanted) - 1]])
        elif not columns and "translation" in names:  # the layout of Hugging Face's data sets
            picked.append(["translation", wanted])
        else:
            raise UserError(
                f"{path}: expected the column {wanted!r}, got {', '.join(map(repr, names)) or 'none'}; pick two with "
                "config.data.columns, as in 'source,target'"
            )
    if picked[0] == picked[1]:
        raise UserError(f"{path}: config.data.columns picks the column {picked[0][-1]!r} for source and target")
    for name in picked:
        kind = schema.field(name[0]).type
        if len(name) == 2:
            fields = [kind.field(index).name for index in range(kind.num_fields)]
            if name[1] not in fields:
                raise UserError(f"{path}: expected {name[1]!r} in the column 'translation', got {', '.join(fields)}")
    return picked


def _read_po(path: epath.PathLike, languages: tuple[str, str]) -> Iterator[tuple[str, str]]:
    """Yields msgid → msgstr of translated entries; skips fuzzy, obsolete and plural ones.

    A file whose header says that it translates into the source language is an error.
    """
    # polib splits text passed to it at U+2028 and the like, but a file at line ends only.
    with tempfile.NamedTemporaryFile("w", suffix=".po", encoding="utf-8", newline="") as copy:
        copy.writelines(line + "\n" for line in text_files.read_lines(path))
        copy.flush()
        try:
            entries = polib.pofile(copy.name, encoding="utf-8")
        except (OSError, ValueError, IndexError) as error:
            line = re.search(r"line (\d+)", str(error))
            where = f"{path}, line {line[1]}" if line else f"{path}"
            raise UserError(f"{where}: invalid PO file; msgfmt --check says more") from error
    into, (source, target) = entries.metadata.get("Language", ""), map(_main_code, languages)
    if _main_code(into) == source != target:
        raise UserError(
            f"{path}: its header says that it translates into {into}, the source language; expected one from "
            f"{languages[0]} into {languages[1]}"
        )
    for entry in entries:
        if entry.translated() and not entry.obsolete and not entry.msgid_plural:
            yield text_files.one_line(entry.msgid), text_files.one_line(entry.msgstr)


def _main_code(language: str) -> str:
    """The code of a language without its country, in lower case: de of de_AT."""
    return re.split("[-_]", language.lower())[0]


def _read_tmx(path: epath.PathLike, languages: tuple[str, str]) -> Iterator[tuple[str, str]]:
    """Yields the units with both languages; a file whose units all lack one is an error."""
    reader = _TmxReader(path)
    has_pairs = False
    with text_files.open_bytes(path) as stream:
        while chunk := stream.read(_CHUNK):
            for unit in reader.feed(chunk):
                if pair := _tmx_pair(unit, languages):
                    has_pairs = True
                    yield pair
    reader.feed(b"", last=True)
    if reader.languages and not has_pairs:
        available = ", ".join(sorted(reader.languages))
        raise UserError(f"{path}: no unit has both {' and '.join(languages)}; languages in it: {available}")


def _tmx_pair(unit: dict[str, str], languages: tuple[str, str]) -> tuple[str, str] | None:
    """The texts of a unit in the two languages, by exact code or else another code of the language (en: en-US)."""
    codes = [language.lower().replace("_", "-") for language in languages]
    matches = []
    for code in codes:
        variants = (other for other in unit if other not in codes and other.split("-")[0] == code.split("-")[0])
        matches.append(code if code in unit else next(variants, None))
    source, target = matches
    return (unit[source], unit[target]) if source and target and source != target else None


class _TmxReader:
    """Parses a TMX file in chunks into units, each {language in lower case: text}.

    The content of inline codes (bpt, ept, it, ph, ut) is markup and skipped; hi and sub hold text. Entity declarations
    are errors, so nothing can expand; a DTD is never fetched, and an entity that only it defines is an error too.
    """

    _CODES = frozenset(("bpt", "ept", "it", "ph", "ut"))

    def __init__(self, path: epath.PathLike):
        self._path = path
        self._open_elements: list[str] = []  # within the current seg, which comes first
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
        self._parser.SkippedEntityHandler = self._refuse_undefined_entity

    def feed(self, chunk: bytes, last: bool = False) -> list[dict[str, str]]:
        """The units that this chunk completes."""
        self._units = []
        try:
            self._parser.Parse(chunk, last)
        except expat.ExpatError as error:
            reason = expat.errors.messages[error.code]
            raise UserError(f"{self._path}, line {error.lineno}: not well-formed XML ({reason})") from error
        except (ValueError, LookupError) as error:  # an unsupported multi-byte encoding or an unknown name
            raise UserError(
                f"{self._path}: the encoding {self._encoding} cannot be read; convert the file to UTF-8"
            ) from error
        return self._units

    def _declaration(self, version: str, encoding: str | None, *_: object) -> None:
        self._encoding = encoding or ""

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        if self._open_elements or name == "seg":
            self._open_elements.append(name)
        elif name == "tu":
            self._unit = {}
        elif name == "tuv":
            code = attributes.get("xml:lang", attributes.get("lang", ""))
            self._language = code.lower().replace("_", "-")
            self.languages.add(code)
            self._text = []

    def _end(self, name: str) -> None:
        if self._open_elements:
            self._open_elements.pop()
        elif name == "tuv":
            self._unit.setdefault(self._language, text_files.one_line("".join(self._text)))
        elif name == "tu":
            self._units.append(self._unit)

    def _characters(self, text: str) -> None:
        if self._open_elements and self._open_elements[-1] not in self._CODES:
            self._text.append(text)

    def _refuse_entity(self, name: str, *_: object) -> None:
        raise UserError(f"{self._path}: declares the XML entity {name!r}, which is refused; write its text out instead")

    def _refuse_undefined_entity(self, name: str, is_parameter: bool) -> None:
        if not is_parameter:  # whose entities, if they are used, are refused themselves
            line = self._parser.CurrentLineNumber
            raise UserError(f"{self._path}, line {line}: the entity &{name}; is not defined; write its text out")


Reader = Callable[[epath.PathLike, tuple[str, str], str], Iterator[tuple[str, str]]]

# By extension; called with a file, the languages and data.columns.
_READERS: dict[str, Reader] = {
    ".tsv": lambda path, languages, columns: _read_tsv(path, parse_columns(columns)),
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
    ".tmx": lambda path, languages, columns: _read_tmx(path, languages),
    ".po": lambda path, languages, columns: _read_po(path, languages),
}
PAIR_FORMATS = tuple(_READERS)
