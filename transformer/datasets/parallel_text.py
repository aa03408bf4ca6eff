"""The user's own text files as a TFDS data set.

The prepared folder is named by a digest of the files' content, so changed files are prepared anew
beside the old ones and unchanged files are never prepared twice. Sentences and their order are kept
exactly as in the files.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import tensorflow_datasets as tfds
from etils import epath

from transformer.command_line import say
from transformer.config import DataConfig
from transformer.datasets import pair_files, text_files
from transformer.errors import UserError

VALIDATION_STEMS = ("val", "valid", "validation", "dev")

_SHARD_BYTES = 32 << 20  # of text; TFDS holds one shard in memory while it writes it
_SECONDS_BETWEEN_LINES = 10.0


@dataclasses.dataclass(frozen=True)
class SplitFiles:
    """The files of one split: source and target in plain text, or one file with both languages."""

    paths: tuple[str, ...]
    languages: tuple[str, str]
    columns: str = ""

    def pairs(self) -> Iterator[tuple[str, str]]:
        """Yields (source, target) in the files' order; raises as the readers do."""
        if len(self.paths) == 2:
            return text_files.read_parallel(*self.paths)
        return pair_files.read_pairs(self.paths[0], self.languages, self.columns)

    def digest(self) -> list[str]:
        """What the pairs depend on: formats, columns and the content of the files, not their names."""
        plain = [text_files.without_compression(path) for path in self.paths]
        packed = [path[len(stem) :].lower() for path, stem in zip(self.paths, plain, strict=True)]
        kinds = ["lines"] * 2 if len(self.paths) == 2 else [pair_files.pair_format(self.paths[0])]
        return [*kinds, *packed, self.columns, *map(text_files.file_digest, self.paths)]


def find_splits(data: DataConfig) -> dict[str, SplitFiles]:
    """The files of each split that the config names; opens every file, reads none.

    Raises:
      UserError: a file is missing or cannot be opened, its format is unknown, or files are ambiguous.
    """
    languages = (data.source_language, data.target_language)
    if data.dir:
        paths = _find_in_folder(data.dir, languages)
    else:
        named = {
            "train": (data.train_source, data.train_target, data.train),
            "validation": (data.valid_source, data.valid_target, data.valid),
        }
        paths = {split: tuple(filter(None, group)) for split, group in named.items() if any(group)}
    for path in itertools.chain.from_iterable(paths.values()):
        text_files.check_readable(path)
    formats = {pair_files.pair_format(group[0]) for group in paths.values() if len(group) == 1}
    pair_files.parse_columns(data.columns)
    if data.columns and ".tsv" not in formats:
        raise UserError(
            "config.data.columns: picks columns of .tsv files, and neither data.train nor data.valid is one"
        )
    return {split: SplitFiles(group, languages, data.columns) for split, group in paths.items()}


def _find_in_folder(folder: str, languages: tuple[str, str]) -> dict[str, tuple[str, ...]]:
    """Split → source and target file of `data.dir`; a stem outside train and validation names its split."""
    stems = _stems(folder, languages)
    whole = {stem: tuple(files) for stem, files in stems.items() if all(files)}
    for stem in ("train", *VALIDATION_STEMS):
        if stem not in whole and (stem in stems or stem == "train"):
            found = ", ".join(filter(None, stems.get(stem, ()))) or "neither"
            raise UserError(
                f"{folder}: expected {stem}.{languages[0]} and {stem}.{languages[1]}, each perhaps with one of "
                f"{', '.join(text_files.COMPRESSIONS)}; found {found}"
            )
    validation = [stem for stem in VALIDATION_STEMS if stem in whole]
    if len(validation) > 1:
        raise UserError(f"{folder}: several sets of validation files, {', '.join(validation)}; keep one of them there")
    return {"validation" if stem in validation else stem: files for stem, files in sorted(whole.items())}


def _stems(folder: str, languages: tuple[str, str]) -> dict[str, list[str]]:
    """Stem → paths of STEM.SOURCE and STEM.TARGET, "" where there is none."""
    try:
        names = sorted(entry.name for entry in epath.Path(folder).expanduser().iterdir())
    except (OSError, ImportError) as error:
        raise UserError(f"config.data.dir: cannot list the folder {folder}: {error}") from error
    stems: dict[str, list[str]] = {}
    for name in names:
        stem, _, language = text_files.without_compression(name).rpartition(".")
        if language not in languages or not stem or stem.startswith("."):
            continue
        files = stems.setdefault(stem, ["", ""])
        side = languages.index(language)
        if files[side]:
            raise UserError(f"{folder}: has both {os.path.basename(files[side])} and {name}; keep one of them there")
        files[side] = os.path.join(folder, name)
    return stems


class ParallelText(tfds.core.ShardBasedBuilder):
    """Text files as ArrayRecord, by shards: TFDS's GeneratorBasedBuilder needs TensorFlow above 1 GB a split.

    A split of no pairs, which TFDS cannot write, is listed in `info.metadata["empty_splits"]`.
    """

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, files: Mapping[str, SplitFiles], data_dir: epath.PathLike):
        self._files = dict(files)
        self._languages = self._files["train"].languages
        self._digest = _digest(self._files)
        name = f"{'-'.join(self._languages)}-{self._digest[:16]}"
        config = tfds.core.BuilderConfig(name=name, description="Parallel text from the user's files")
        super().__init__(config=config, data_dir=data_dir, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.Translation(languages=self._languages),
            disable_shuffling=True,
            metadata=tfds.core.MetadataDict(),
        )

    def _download_and_prepare(self, dl_manager: Any, download_config: Any = None) -> None:
        super()._download_and_prepare(dl_manager, download_config)
        if _digest(self._files) != self._digest:
            raise UserError("the text files changed while they were being read; run again when they are complete")

    def _shard_iterators_per_split(self, dl_manager: Any) -> dict[str, list[Callable[[], Iterator]]]:
        """Reads everything once for its errors and sizes before a byte is written."""
        lengths = {split: _shard_lengths(files.pairs()) for split, files in self._files.items()}
        if not lengths["train"]:
            raise UserError(f"{' and '.join(self._files['train'].paths)}: no pairs of sentences to train on; got 0")
        self.info.metadata["empty_splits"] = [split for split in lengths if not lengths[split]]
        counts = ", ".join(f"{split} {sum(shards):,}" for split, shards in lengths.items())
        say(f"data: sentence pairs: {counts}")
        return {split: self._shards(split, shards) for split, shards in lengths.items() if shards}

    def _shards(self, split: str, lengths: list[int]) -> list[Callable[[], Iterator]]:
        """One generator a shard; TFDS runs them in order, so they can share one pass over the files."""
        examples = self._examples(split, sum(lengths))
        return [functools.partial(itertools.islice, examples, length) for length in lengths]

    def _examples(self, split: str, total: int) -> Iterator[tuple[int, dict[str, str]]]:
        due = time.monotonic() + _SECONDS_BETWEEN_LINES
        for row, pair in enumerate(self._files[split].pairs()):
            if time.monotonic() > due:
                say(f"data: prepared {row:,} of {total:,} pairs of {split}")
                due += _SECONDS_BETWEEN_LINES
            yield row, dict(zip(self._languages, pair, strict=True))


def _shard_lengths(pairs: Iterator[tuple[str, str]]) -> list[int]:
    """Cuts the pairs into shards of about _SHARD_BYTES: their counts."""
    lengths, count, size = [], 0, 0
    for source, target in pairs:
        count += 1
        size += len(source) + len(target)
        if size >= _SHARD_BYTES:
            lengths.append(count)
            count = size = 0
    return [*lengths, count] if count else lengths


def _digest(files: Mapping[str, SplitFiles]) -> str:
    """A digest of all that the prepared folder depends on."""
    parts = [str(ParallelText.VERSION), {split: files[split].digest() for split in sorted(files)}]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
