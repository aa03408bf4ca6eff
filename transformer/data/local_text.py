"""The user's text files as a TFDS data set.

The name of the prepared folder contains a digest of the files' content, so changed files are prepared again beside the
old ones, and unchanged files are not. Sentences and their order are exactly those of the files.
"""

import dataclasses
import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import tensorflow_datasets as tfds
from etils import epath

from transformer.config import DataConfig
from transformer.data import parallel_formats, shards, text_files
from transformer.data.prepared import ParallelTextBuilder
from transformer.data.shards import Part
from transformer.runtime import object_storage, progress
from transformer.runtime.errors import UserError
from transformer.runtime.file_digests import FileDigests
from transformer.runtime.files import absolute_path, json_digest
from transformer.runtime.logging import log_info

VALIDATION_STEMS = ("val", "valid", "validation", "dev")
GENERATED = {"runs/tasks": "python -m benchmarks.task_data"}  # parent of a data.dir → the command that writes it


@dataclasses.dataclass(frozen=True)
class SplitFiles:
    """The files of one split, read one after another.

    Attributes:
      paths: source, target, source, target … of plain text, or files with both languages.
      languages: of source and target.
      columns: as in the config.
      sides: files that belong together: 2 of plain text, or 1.
    """

    paths: tuple[str, ...]
    languages: tuple[str, str]
    columns: str = ""
    sides: int = 2

    def parts(self) -> Iterator[Part]:
        """Yields the pairs in the order of the files, in parts."""
        for first in range(0, len(self.paths), self.sides):
            if self.sides == 2:
                yield from shards.line_parts(self.paths[first], self.paths[first + 1])
            else:
                pairs = parallel_formats.read_pairs(self.paths[first], self.languages, self.columns)
                yield from shards.pair_parts(pairs)

    def warn_of_headers(self) -> None:
        """Warns of each TSV file that begins with the names of its columns: they are read as a pair of sentences."""
        for path in self.paths if self.sides == 1 else ():
            if header := parallel_formats.tsv_header(path, self.languages, self.columns):
                log_info(
                    f"warning: {path}: its first line, {header[0]!r} and {header[1]!r}, looks like a header and is "
                    "read as a pair of sentences; delete that line if it is one, for example with sed 1d"
                )

    def digest(self, digests: Mapping[str, str]) -> list[str]:
        """All that the pairs depend on: formats, columns and the content of the files, but not their names.

        Args:
          digests: of the bytes of each file.
        """
        compressions = [path.removeprefix(text_files.strip_compression(path)).lower() for path in self.paths]
        formats = ["lines" if self.sides == 2 else parallel_formats.pair_format(path) for path in self.paths]
        if ".jsonl" in formats and parallel_formats.parse_keys(self.columns):
            formats.append("keys")  # version 1.1.0 read such files, beside Parquet, by language codes
        return [*formats, *compressions, self.columns, *(digests[path] for path in self.paths)]


def find_splits(data: DataConfig) -> dict[str, SplitFiles]:
    """Finds the files of each split; opens every file but reads none.

    Raises:
      UserError: a file is missing or cannot be opened, its format is unknown, or files are ambiguous.
    """
    languages = (data.source_language, data.target_language)
    if data.dir:
        found = {split: (files, 2) for split, files in _find_in_folder(data.dir, languages).items()}
    else:
        named = {
            "train": ("train_source", "train_target", "train"),
            "validation": ("valid_source", "valid_target", "valid"),
        }
        found = {
            split: _find_named(data, fields) for split, fields in named.items() if any(getattr(data, f) for f in fields)
        }
    for path in itertools.chain.from_iterable(paths for paths, _ in found.values()):
        text_files.check_readable(path)
    formats = {parallel_formats.pair_format(path) for paths, sides in found.values() if sides == 1 for path in paths}
    parallel_formats.check_columns(data.columns, formats)
    return {split: SplitFiles(paths, languages, data.columns, sides) for split, (paths, sides) in found.items()}


def _find_named(data: DataConfig, fields: Sequence[str]) -> tuple[tuple[str, ...], int]:
    """The files that fields for source, target and both sides name, and how many belong together."""
    given = {field: getattr(data, field) for field in fields if getattr(data, field)}
    matches = {field: text_files.expand(pattern, f"config.data.{field}") for field, pattern in given.items()}
    counts = {f"data.{field} {len(paths):,}": len(paths) for field, paths in matches.items()}
    if len(set(counts.values())) > 1:
        raise UserError(
            f"config.data: expected equally many files for source and target, paired in the order of their names; "
            f"found {', '.join(counts)}"
        )
    return tuple(itertools.chain.from_iterable(zip(*matches.values(), strict=True))), len(matches)


def _find_in_folder(folder: str, languages: tuple[str, str]) -> dict[str, tuple[str, ...]]:
    """Split → source and target file in `data.dir`; stems other than train and validation are names of test splits."""
    stems = _stems(folder, languages)
    complete = {stem: tuple(files) for stem, files in stems.items() if all(files)}
    for stem in ("train", *VALIDATION_STEMS):
        if stem not in complete and (stem in stems or stem == "train"):
            available = ", ".join(filter(None, stems.get(stem, ()))) or "neither"
            hint = _pair_file_hint(folder) if stem == "train" else ""
            raise UserError(
                f"{folder}: expected {stem}.{languages[0]} and {stem}.{languages[1]}, each perhaps with one of "
                f"{', '.join(text_files.COMPRESSIONS)}; found {available}{hint}. The endings are those of "
                "data.source_language and data.target_language"
            )
    validation = [stem for stem in VALIDATION_STEMS if stem in complete]
    if len(validation) > 1:
        raise UserError(f"{folder}: several sets of validation files, {', '.join(validation)}; keep one of them")
    return {"validation" if stem in validation else stem: files for stem, files in sorted(complete.items())}


def _pair_file_hint(folder: str) -> str:
    """What to set if the folder has files with both languages; empty if it has none."""
    formats = parallel_formats.PAIR_FORMATS
    files = [name for name in _names(folder) if text_files.strip_compression(name).lower().endswith(formats)]
    if not files:
        return ""
    name = next((name for name in files if name.startswith("train")), files[0])
    return (
        f". {name} has both languages in one file: set data.train={os.path.join(folder, name)} in place of data.dir, "
        "and data.valid for one to validate with"
    )


def _names(folder: str) -> list[str]:
    try:
        return sorted(entry.name for entry in epath.Path(folder).expanduser().iterdir())
    except (OSError, ImportError) as error:
        commands = (command for parent, command in GENERATED.items() if os.path.dirname(folder).endswith(parent))
        hint = "".join(f"; run {command} first, which writes it" for command in commands)
        raise UserError(f"config.data.dir: cannot list the folder {folder}: {error}{hint}") from error


def _stems(folder: str, languages: tuple[str, str]) -> dict[str, list[str]]:
    """Stem → paths of STEM.SOURCE and STEM.TARGET; "" if missing."""
    stems: dict[str, list[str]] = {}
    for name in _names(folder):
        stem, _, language = text_files.strip_compression(name).rpartition(".")
        if language not in languages or not stem or stem.startswith("."):
            continue
        files = stems.setdefault(stem, ["", ""])
        side = languages.index(language)
        if files[side]:
            raise UserError(f"{folder}: has both {os.path.basename(files[side])} and {name}; keep one of them")
        files[side] = os.path.join(folder, name)
    return stems


class ParallelText(ParallelTextBuilder):
    """TFDS builder of text files."""

    VERSION = tfds.core.Version("1.1.0")  # increased whenever the same files give other pairs

    def __init__(self, files: Mapping[str, SplitFiles], data_dir: epath.PathLike):
        self._files = dict(files)
        self.languages = self._files["train"].languages
        self.source_description = _some(self._files["train"].paths, " and ")
        self.origin = _origin(self._files)
        self._digests_dir = data_dir
        self._digest = _digest(self._files, data_dir)
        name = f"{'-'.join(self.languages)}-{self._digest[:16]}"
        config = tfds.core.BuilderConfig(name=name, description="Parallel text from the user's files")
        super().__init__(config=config, data_dir=data_dir, file_format="array_record")

    def _download_and_prepare(self, dl_manager: Any, download_config: Any = None) -> None:
        for files in self._files.values():
            files.warn_of_headers()
        super()._download_and_prepare(dl_manager, download_config)
        if _digest(self._files, self._digests_dir) != self._digest:
            raise UserError("the text files changed while they were being read; run again when they are complete")

    def _parts_by_split(self) -> dict[str, Callable[[], Iterator[Part]]]:
        return {split: files.parts for split, files in self._files.items()}

    def _text_bytes(self) -> int | None:
        paths = [path for files in self._files.values() for path in files.paths]
        if any(object_storage.is_remote(path) or text_files.strip_compression(path) != path for path in paths):
            return None
        return sum(os.path.getsize(os.path.expanduser(path)) for path in paths)


def _some(paths: Sequence[str], separator: str) -> str:
    """The first paths for a message."""
    more = [f"{len(paths) - 2:,} more"] if len(paths) > 2 else []
    return separator.join([*paths[:2], *more])


def _origin(files: Mapping[str, SplitFiles]) -> str:
    """Where the text is: paths, languages and columns."""
    parts = []
    for split in sorted(files):
        made = files[split]
        paths = list(map(absolute_path, made.paths))
        parts.append([split, made.languages, made.columns, paths])
    return json.dumps(parts)


def _digest(files: Mapping[str, SplitFiles], data_dir: epath.PathLike) -> str:
    """A digest of all that the prepared data depends on; files that have not changed are not read again."""
    with progress.phase("data: hashing the text files"):
        paths = list(dict.fromkeys(path for split in files for path in files[split].paths))
        local = {path: path for path in paths if not object_storage.is_remote(path)}
        local = {path: os.path.expanduser(path) for path in local}
        digests = {path: text_files.file_digest(path) for path in paths if path not in local}
        if local:
            cache = FileDigests(os.path.join(data_dir, "parallel_text", ".digests.json"))
            with text_files.user_errors(_some(paths, ", ")):
                computed = cache.compute(list(local.values()), "data: hashing the text files")
            digests |= {path: computed[expanded] for path, expanded in local.items()}
        parts = [str(ParallelText.VERSION), {split: files[split].digest(digests) for split in sorted(files)}]
    return json_digest(parts)
