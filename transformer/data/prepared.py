"""Prepares TFDS data sets as ArrayRecord, atomically, and verifies them by SHA-256 when a split is opened.

TFDS writes into a folder named incomplete.* and renames it at the end, so an interrupted preparation is never taken
for a data set. This module adds a lock, so that one of several processes prepares and the others wait, and the
digests of all files.
"""

import abc
import contextlib
import functools
import hashlib
import io
import itertools
import json
import os
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import tensorflow_datasets as tfds
from absl import logging
from etils import epath

from transformer.data import records
from transformer.data.records import RecordReader
from transformer.runtime import object_storage, progress
from transformer.runtime.errors import UserError
from transformer.runtime.file_digests import FileDigests
from transformer.runtime.files import file_lock, user_error_on_oserror, write_atomic
from transformer.runtime.logging import log_info

Pair = tuple[str, str]

_SHARD_BYTES = 32 << 20  # of text; TFDS holds a shard in memory while writing it


class ParallelTextBuilder(tfds.core.ShardBasedBuilder):
    """A TFDS builder of sentence pairs, by shards: TFDS's GeneratorBasedBuilder needs TensorFlow above 1 GB a split.

    An empty split, which TFDS cannot write, is listed in `info.metadata["empty_splits"]`.

    Attributes:
      languages: of the first and second sentence of each pair.
      source_description: where the pairs come from, for messages.
      published: what TFDS says of the data set, as arguments of `DatasetInfo`.
    """

    languages: tuple[str, str]
    source_description: str
    published: Mapping[str, Any] = types.MappingProxyType({})

    @abc.abstractmethod
    def _pairs_by_split(self) -> Mapping[str, Callable[[], Iterator[Pair]]]:
        """For each split a function that iterates over its pairs; it is called twice."""

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.Translation(languages=self.languages),
            disable_shuffling=True,
            metadata=tfds.core.MetadataDict(),
            **self.published,
        )

    def _shard_iterators_per_split(self, dl_manager: Any) -> dict[str, list[Callable[[], Iterator]]]:
        """Reads everything once to find errors and count pairs before anything is written."""
        del dl_manager  # whose extraction needs TensorFlow
        sources = self._pairs_by_split()
        lengths = {split: _shard_lengths(split, pairs()) for split, pairs in sources.items()}
        if not lengths["train"]:
            raise UserError(f"{self.source_description}: no pairs of sentences to train on; got 0")
        self.info.metadata["empty_splits"] = [split for split in lengths if not lengths[split]]
        counts = ", ".join(f"{split} {sum(shards):,}" for split, shards in lengths.items())
        log_info(f"data: sentence pairs: {counts}")
        return {split: self._shards(split, sources[split](), shards) for split, shards in lengths.items() if shards}

    def _shards(self, split: str, pairs: Iterator[Pair], lengths: list[int]) -> list[Callable[[], Iterator]]:
        """One generator for each shard; TFDS runs them in order, so they share one pass over the pairs."""
        rows = progress.track(pairs, f"data: preparing {split}", sum(lengths), "pairs")
        examples = ((row, dict(zip(self.languages, pair, strict=True))) for row, pair in enumerate(rows))

        def take(length: int, is_last: bool) -> Iterator[tuple[int, dict[str, str]]]:
            yield from itertools.islice(examples, length)
            if is_last:
                rows.close()  # ends its progress

        return [functools.partial(take, length, number == len(lengths)) for number, length in enumerate(lengths, 1)]


def _shard_lengths(split: str, pairs: Iterator[Pair]) -> list[int]:
    """The number of pairs in each shard of about _SHARD_BYTES."""
    lengths, count, size = [], 0, 0
    for source, target in progress.track(pairs, f"data: reading {split}", unit="pairs"):
        count += 1
        size += len(source) + len(target)
        if size >= _SHARD_BYTES:
            lengths.append(count)
            count = size = 0
    return [*lengths, count] if count else lengths


_DIGESTS_FILE = "digests.json"


class PreparedDataset:
    """The splits of a prepared data set as ArrayRecord files, verified by their recorded digests."""

    def __init__(self, builder: Any):
        self.folder = epath.Path(builder.data_path)
        self._remedy = f"restore it, or delete the folder {self.folder} and run again to prepare it again"
        self._empty = list((builder.info.metadata or {}).get("empty_splits", []))
        self._splits = dict(builder.info.splits)
        if builder.info.file_format is None or builder.info.file_format.value != "array_record":
            raise UserError(
                f"{self.folder}: prepared as {builder.info.file_format and builder.info.file_format.value}, which only "
                "TensorFlow reads; prepare it again with file_format='array_record'"
            )
        self._digests = self._load_or_record_digests()

    @property
    def names(self) -> list[str]:
        """The names of the splits in the order of their preparation, then those of empty splits."""
        return [*self._splits, *self._empty]

    def digest(self) -> str:
        """SHA-256 of the recorded digests of all files, in hexadecimal; equal pairs may have different ones."""
        return hashlib.sha256(json.dumps([self._digests, self._empty], sort_keys=True).encode()).hexdigest()

    def records(self, split: str) -> RecordReader:
        """The serialized examples of a split, in order.

        Raises:
          UserError: a file is missing or has changed.
        """
        if split in self._empty:
            return RecordReader([], [])
        files = self._files(split)
        for path in files.values():
            if not path.exists():
                raise UserError(f"{path}: missing from the prepared data; {self._remedy}")
        digests = self._compute_digests(list(files.values()), f"data: verifying {split}")
        for name, path in files.items():
            if digests[os.fspath(path)] != self._digests[name]:
                raise UserError(f"{path}: changed since it was prepared (digest differs); {self._remedy}")
        info = self._splits[split]  # not its file_instructions: they read a name such as "train[1]" as a slice
        return RecordReader([os.fspath(path) for path in info.filepaths], list(info.shard_lengths))

    def _compute_digests(self, paths: Sequence[epath.Path], what: str) -> dict[str, str]:
        """Path → SHA-256 now; files that have not changed since they were hashed on this node are not read again."""
        with user_error_on_oserror(f"{self.folder}, of config.data.data_dir"):
            return FileDigests(self.folder.parent / f".digests-{self.folder.name}.json").compute(paths, what)

    def _files(self, split: str) -> dict[str, epath.Path]:
        paths = [epath.Path(path) for path in self._splits[split].filepaths]
        return {path.name: path for path in paths}

    def _load_or_record_digests(self) -> dict[str, str]:
        """File name → recorded SHA-256; recorded at the first opening, after the numbers of records are verified."""
        path = self.folder / _DIGESTS_FILE
        needed = {name for split in self._splits for name in self._files(split)}
        if path.exists():
            try:
                digests = json.loads(path.read_text())
                if needed <= set(digests):
                    return digests
            except (ValueError, TypeError):
                pass
            raise UserError(f"{path}: damaged; {self._remedy}")
        for split in self._splits:
            self._check_num_records(split)
        paths = [self.folder / name for name in sorted(needed)]
        computed = self._compute_digests(paths, "data: hashing the prepared files")
        digests = {path.name: computed[os.fspath(path)] for path in paths}
        write_cache(path, json.dumps(digests, indent=1).encode())
        return digests

    def _check_num_records(self, split: str) -> None:
        """Raises a UserError unless each file of a split holds the number of records that TFDS recorded."""
        for path, expected in zip(self._files(split).values(), self._splits[split].shard_lengths, strict=True):
            try:
                count = records.count_records(os.fspath(path))
            except (RuntimeError, OSError) as error:
                raise UserError(f"{path}: missing or damaged ({error}); {self._remedy}") from error
            if count != expected:
                raise UserError(f"{path}: expected {expected:,} records, got {count:,}; {self._remedy}")


def prepare(make_builder: Callable[[], Any], *, owned: bool) -> PreparedDataset:
    """Opens a data set, after preparing it if necessary.

    Args:
      make_builder: makes the TFDS builder, which reads what is prepared at that time.
      owned: only this function prepares this data set, so incomplete preparations of it can be deleted.

    Raises:
      UserError: the preparation failed, or the folder is damaged or not writable.
    """
    with silence_tfds():
        builder = make_builder()
    folder = epath.Path(builder.data_path)
    if _pull_from_object_storage(folder):
        builder = make_builder()
    if not _is_complete(folder):
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with file_lock(folder.parent, f"preparing {folder.parent}"), silence_tfds(progress_bars=not owned):
                builder = make_builder()
                if not _is_complete(folder):
                    _prepare_under_lock(builder, owned)
                builder = make_builder()
        except OSError as error:
            raise UserError(f"{folder}: cannot write data there: {error}; see config.data.data_dir") from error
    dataset = PreparedDataset(builder)
    with user_error_on_oserror(f"{folder}, of config.data.data_dir"):
        object_storage.push(folder)
    return dataset


def is_prepared(builder: Any) -> bool:
    """Whether a builder's data is prepared."""
    _pull_from_object_storage(epath.Path(builder.data_path))
    return _is_complete(epath.Path(builder.data_path))


def _pull_from_object_storage(folder: epath.Path) -> bool:
    """Copies the folder from object storage, if it is there; returns whether it is."""
    with user_error_on_oserror(f"{folder}, of config.data.data_dir"):
        return object_storage.pull(folder)


def preparation_instructions(builder: Any) -> str:
    """Instructions to prepare a data set of TFDS on another machine."""
    name = "/".join(filter(None, (builder.name, builder.builder_config_name)))
    return (
        "where TensorFlow and a network are available, run\n"
        f"  python -c \"import tensorflow_datasets as tfds; tfds.builder('{name}', file_format='array_record', "
        "data_dir='prepared').download_and_prepare()\"\n"
        f"and copy the folder prepared/{name} to {builder.data_path.parent}"
    )


def write_cache(path: epath.Path, content: bytes) -> None:
    """Writes a file of derived data atomically; does nothing if the folder is read-only."""
    with contextlib.suppress(OSError):
        write_atomic(path, content)


@contextlib.contextmanager
def silence_tfds(progress_bars: bool = False) -> Iterator[None]:
    """Keeps TFDS from printing to stdout, which is for results, and from logging each step."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    if not (progress_bars and sys.stderr.isatty()):
        tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tfds.enable_progress_bar()
        logging.set_verbosity(verbosity)


def _is_complete(folder: epath.Path) -> bool:
    return (folder / "dataset_info.json").exists() and (folder / "features.json").exists()


def _prepare_under_lock(builder: Any, owned: bool) -> None:
    folder = epath.Path(builder.data_path)
    if folder.exists():
        raise UserError(f"{folder}: incomplete data; delete the folder and run again")
    if owned:
        for incomplete in folder.parent.glob(f"incomplete.*_{folder.name}"):
            incomplete.rmtree()
    log_info(f"data: preparing {builder.info.full_name} in {folder}")
    try:
        has_own_bars = not owned and progress.is_terminal()
        phase = progress.phase(f"data: preparing {builder.info.full_name}")
        with contextlib.nullcontext() if has_own_bars else phase:
            builder.download_and_prepare()
    except UserError:
        raise
    except Exception as error:
        if _is_complete(folder):
            return  # another process was faster, on a file system without locks
        if owned and not isinstance(error, (OSError, RuntimeError)):
            raise
        remedy = "fix the cause and run again" if owned else preparation_instructions(builder)
        raise UserError(f"cannot prepare {builder.info.full_name} in {folder}: {error}; {remedy}") from error
