"""Prepares TFDS data sets as ArrayRecord, atomically, and verifies them by SHA-256 when a split is opened.

TFDS writes into a folder named incomplete.* and renames it at the end, so an interrupted preparation is never taken
for a data set. This module adds a lock, so that one of several processes prepares and the others wait, the digests of
all files, and for our own builders several processes that continue an interrupted preparation.
"""

import abc
import contextlib
import dataclasses
import glob
import io
import json
import os
import pathlib
import shutil
import sys
import types
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import tensorflow_datasets as tfds
from absl import logging
from etils import epath

from transformer.data import records, shards
from transformer.data.filters import FilterChain
from transformer.data.records import RecordReader
from transformer.data.shards import Part, ShardedSplit, ShardJob
from transformer.data.tokenizer import Tokenizer
from transformer.runtime import object_storage, progress
from transformer.runtime.errors import UserError, last_line_in
from transformer.runtime.file_digests import FileDigests
from transformer.runtime.files import file_lock, json_digest, user_error_on_oserror, write_atomic
from transformer.runtime.logging import log_info
from transformer.runtime.worker_pool import WorkerEndedError

_DIGESTS_FILE = "digests.json"
_ORIGIN_FILE = "origin"  # beside the shards that are done
_MB = 1_000_000


@dataclasses.dataclass(frozen=True)
class OnePass:
    """What is made of the pairs in the pass that stores them.

    Attributes:
      languages: of source and target; None: the pairs are only stored.
      strip_cr: as in `shards.to_lines`.
      tokenizer: by which training is tokenized, or None.
      filters: of training, or None.
      workers: processes; 0 for `shards.default_workers`.
      finish: called with the splits, the digest of the data and its folder before the data counts as prepared.
    """

    languages: tuple[str, str] | None = None
    strip_cr: bool = False
    tokenizer: Tokenizer | None = None
    filters: FilterChain | None = None
    workers: int = 0
    finish: Callable[[Mapping[str, ShardedSplit], str, epath.Path], None] | None = None


class ParallelTextBuilder(tfds.core.ShardBasedBuilder):
    """A TFDS builder of sentence pairs that several processes write, shard by shard, as `shards` describes.

    Shards that are done are kept in a folder beside the data until all are. An empty split, which TFDS cannot write, is
    listed in `info.metadata["empty_splits"]`.

    Attributes:
      languages: of the first and second sentence of each pair.
      source_description: where the pairs come from, for messages.
      origin: names the files that the text is read from, whatever they hold; empty if the name of the data set does.
      published: what TFDS says of the data set, as arguments of `DatasetInfo`.
      one_pass: what is made of the pairs besides.
      work: the folder for shards that are done.
    """

    languages: tuple[str, str]
    source_description: str
    origin: str = ""
    published: Mapping[str, Any] = types.MappingProxyType({})
    one_pass = OnePass()
    work: pathlib.Path

    @abc.abstractmethod
    def _parts_by_split(self) -> Mapping[str, Callable[[], Iterator[Part]]]:
        """For each split a function that reads its text."""

    def _text_bytes(self) -> int | None:
        """The size of all text; None if that is not known."""
        return None

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.Translation(languages=self.languages),
            disable_shuffling=True,
            metadata=tfds.core.MetadataDict(),
            **self.published,
        )

    def _shard_iterators_per_split(self, dl_manager: Any) -> Any:
        raise NotImplementedError  # TFDS would call it from the method below

    def _download_and_prepare(self, dl_manager: Any, download_config: Any = None) -> None:
        del dl_manager, download_config  # whose extraction needs TensorFlow
        splits = self._make_shards()
        counts = {split: made.pairs() for split, made in splits.items()}
        if not counts["train"]:
            raise UserError(f"{self.source_description}: no pairs of sentences to train on; got 0")
        log_info(f"data: sentence pairs: {', '.join(f'{split} {count:,}' for split, count in counts.items())}")
        empty = [split for split in splits if not counts[split]]
        self.info.metadata["empty_splits"] = empty
        digests: dict[str, str] = {}
        infos = [self._publish(name, made, digests) for name, made in splits.items() if counts[name]]
        self.info.set_splits(tfds.core.SplitDict(infos))
        folder = epath.Path(self.data_path)
        (folder / _DIGESTS_FILE).write_text(json.dumps(digests, indent=1))
        if self.one_pass.finish:
            self.one_pass.finish(splits, data_digest(digests, empty), folder)

    def _make_shards(self) -> dict[str, ShardedSplit]:
        """Makes all shards that are not done."""
        wanted, total = self.one_pass, self._text_bytes()
        self.work.mkdir(parents=True, exist_ok=True)
        (self.work / _ORIGIN_FILE).write_text(self.origin)
        workers = wanted.workers or shards.default_workers()
        splits = {}
        with progress.phase("data: preparing", total and total // _MB, "MB") as phase:
            done = 0

            def advance(result: shards.Result) -> None:
                nonlocal done
                done += result.size
                phase.completed = done // _MB

            for split, read in self._parts_by_split().items():
                job = ShardJob(
                    os.fspath(self.work),
                    self.languages,
                    store=True,
                    scan=wanted.languages is not None,
                    reverse=wanted.languages not in (None, self.languages),
                    strip_cr=wanted.strip_cr,
                    tokenizer=wanted.tokenizer if split == "train" else None,
                    filters=wanted.filters if split == "train" else None,
                )
                phase.note = split
                splits[split] = shards.run(job, split, shards.blocks(split, read()), workers, advance)
        earlier = sum(not shard.is_new for made in splits.values() for shard in made.shards)
        if earlier:
            total_shards = sum(len(made.shards) for made in splits.values())
            log_info(f"data: {earlier:,} of {total_shards:,} shards were done before an interruption and are kept")
        return splits

    def _publish(self, split: str, made: ShardedSplit, digests: dict[str, str]) -> Any:
        """Gives the records of a split the names by which TFDS finds them, and adds their digests."""
        template = self._get_filename_template(split_name=split)
        size = 0
        for index, shard in enumerate(made.shards):
            path = template.sharded_filepath(shard_index=index, num_shards=len(made.shards))
            stored = made.job.path(shard.name, shards.RECORDS)
            try:
                os.link(stored, path)
            except OSError:  # a file system without hard links
                shutil.copyfile(stored, path)
            digests[path.name] = shard.digests[shards.RECORDS]
            size += stored.stat().st_size
        lengths = [shard.pairs for shard in made.shards]
        return tfds.core.SplitInfo(name=split, shard_lengths=lengths, num_bytes=size, filename_template=template)


def data_digest(digests: Mapping[str, str], empty: Sequence[str]) -> str:
    """SHA-256 of the digests of all files and the names of empty splits, in hexadecimal."""
    return json_digest([digests, empty])


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
        return data_digest(self._digests, self._empty)

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
            if (digest := digests[os.fspath(path)]) != self._digests[name]:
                raise UserError(
                    f"{path}: changed since it was prepared: expected the digest {self._digests[name][:16]}, got "
                    f"{digest[:16]} of {path.stat().length:,} bytes; {self._remedy}"
                )
        info = self._splits[split]  # not its file_instructions: they read a name such as "train[1]" as a slice
        return RecordReader([os.fspath(path) for path in info.filepaths], list(info.shard_lengths))

    def record_digests(self) -> None:
        """Records that the files are as they were when they were written, by this process."""
        FileDigests.beside(self.folder).record({os.fspath(self.folder / name): d for name, d in self._digests.items()})

    def _compute_digests(self, paths: Sequence[epath.Path], what: str) -> dict[str, str]:
        """Path → SHA-256 now; files that have not changed since they were hashed on this node are not read again."""
        with user_error_on_oserror(f"{self.folder}, of config.data.data_dir"):
            return FileDigests.beside(self.folder).compute(paths, what)

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


def prepare(
    make_builder: Callable[[], Any], *, owned: bool, one_pass: Callable[[], OnePass] = OnePass
) -> PreparedDataset:
    """Opens a data set, after preparing it if necessary.

    Args:
      make_builder: makes the TFDS builder, which reads what is prepared at that time.
      owned: only this function prepares this data set, so incomplete preparations of it can be deleted.
      one_pass: called if a ParallelTextBuilder has to prepare; returns what is made in the same pass.

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
            lock = file_lock(folder.parent, f"preparing {folder.parent}")
            with lock as is_locked, silence_tfds(progress_bars=not owned):
                builder, work, is_new = make_builder(), _work_folder(folder, is_locked), not _is_complete(folder)
                if is_new:
                    if isinstance(builder, ParallelTextBuilder):
                        builder.one_pass, builder.work = one_pass(), work
                    _prepare_under_lock(builder, owned)
                builder = make_builder()
                shutil.rmtree(work, ignore_errors=True)  # before the digests: it changes the times of linked files
                if is_new and isinstance(builder, ParallelTextBuilder):
                    PreparedDataset(builder).record_digests()
                    _delete_abandoned_work(folder, builder.origin)
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
    """Copies the folder from object storage, if it is there; returns whether it is new here.

    Of the processes of a node that start at once, one copies and the others wait.
    """
    if folder.exists() or not object_storage.has_address(folder):
        return False
    with user_error_on_oserror(f"{folder}, of config.data.data_dir"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with file_lock(folder.parent, f"copying {folder} from object storage", name=f".{folder.name}.lock"):
            object_storage.pull(folder)
        return folder.exists()


def is_of_tfds(builder: Any) -> bool:
    """Whether the builder is one of the package tensorflow_datasets, and neither ours nor the user's."""
    return type(builder).__module__.startswith("tensorflow_datasets.")


def preparation_instructions(builder: Any) -> str:
    """Instructions to prepare a data set of TFDS on another machine."""
    name = "/".join(filter(None, (builder.name, builder.builder_config_name)))
    return (
        "where TensorFlow and a network are available, run\n"
        f"  python -c \"import tensorflow_datasets as tfds; tfds.builder('{name}', file_format='array_record', "
        "data_dir='prepared').download_and_prepare()\"\n"
        f"and copy the folder prepared/{name} to {builder.data_path.parent}"
    )


def cache_folder(data_dir: str, kind: str, digest: str, languages: tuple[str, str], key: str) -> epath.Path:
    """The folder, beside the prepared data, for what is derived from the split with this digest, and how: `key`."""
    return epath.Path(data_dir, kind, f"{digest[:24]}-{'-'.join(languages)}-{key}")


@contextlib.contextmanager
def lock_cache(folder: epath.Path) -> Iterator[None]:
    """Keeps other processes from making the folder meanwhile; makes its parent, if that can be written."""
    with contextlib.suppress(OSError):
        folder.parent.mkdir(parents=True, exist_ok=True)
    with file_lock(folder.parent, f"making {folder}", name=f".{folder.name}.lock"):
        yield


@contextlib.contextmanager
def synchronize_cache(folder: epath.Path) -> Iterator[None]:
    """Keeps other processes from making the folder meanwhile, and it equal to its copy in object storage."""
    with user_error_on_oserror(f"{folder}, under config.data.data_dir"), lock_cache(folder):
        object_storage.pull(folder)
        yield
        object_storage.push(folder)  # also what exists here, as an earlier attempt may have failed


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


def _work_folder(folder: epath.Path, is_locked: bool) -> pathlib.Path:
    """The folder for shards that are done; without a lock one of this process alone."""
    suffix = "" if is_locked else f".{uuid.uuid4().hex}"
    return pathlib.Path(folder.parent, f"{folder.name}{suffix}.partial")


def _delete_abandoned_work(folder: epath.Path, origin: str) -> None:
    """Deletes the shards of interrupted preparations of this text, and of other text that the same files held before.

    A preparation that may still be continued, such as of another corpus or language pair, is left alone.
    """
    for work in pathlib.Path(folder.parent).glob(f"{glob.escape(folder.name)}.*.partial"):  # made without a lock
        shutil.rmtree(work, ignore_errors=True)
    for path in pathlib.Path(folder.parent.parent).glob(f"*/{glob.escape(folder.name)}*.partial/{_ORIGIN_FILE}"):
        work = path.parent
        with contextlib.suppress(OSError):  # another process may delete it
            if origin and path.read_text() == origin and work.parent != pathlib.Path(folder.parent):
                with file_lock(work.parent, wait=False) as is_locked:
                    if is_locked:
                        shutil.rmtree(work, ignore_errors=True)


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
    except WorkerEndedError:
        raise
    except UserError:
        if isinstance(builder, ParallelTextBuilder):
            shutil.rmtree(builder.work, ignore_errors=True)  # other text has another folder
        raise
    except Exception as error:
        if _is_complete(folder):
            return  # another process was faster, on a file system without locks
        if owned and not isinstance(error, (OSError, RuntimeError)):
            raise
        is_foreign = is_of_tfds(builder) and not owned
        remedy = preparation_instructions(builder) if is_foreign else "fix the cause and run again"
        if isinstance(builder, ParallelTextBuilder):
            remedy += f"; shards that are done are kept in {builder.work}"
        reason = str(error) if owned or is_foreign else _where_it_failed(builder, error)
        raise UserError(f"cannot prepare {builder.info.full_name} in {folder}: {reason}; {remedy}") from error


def _where_it_failed(builder: Any, error: Exception) -> str:
    """Type and message of an error in a builder of the user's, and the last line of its module that it passed."""
    file = getattr(sys.modules.get(type(builder).__module__), "__file__", "")
    line = last_line_in(file, error)
    return f"{f'{file}, line {line}: ' if line else ''}{type(error).__name__}: {error}"
