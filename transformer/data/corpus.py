"""Opens the corpus of a config: splits of sentence pairs from TFDS, the user's text files or WMT archives.

`open_corpus` prepares the data set if necessary (`prepared`) and returns a `Corpus`, whose `split(name)` is a `Split`:
random access to (source, target). Training drops pairs with a blank side and what the filters of the config drop;
other splits keep all. Without a validation split, a part of training is held out by a hash of the source sentence,
before filters. Which rows these are, and the digests of all splits, are computed in one pass over the data and cached
beside it (`CorpusMetadata`), as is what filters drop (`load_or_compute_drops`).
"""

import dataclasses
import difflib
import functools
import hashlib
import importlib
import importlib.util
import itertools
import operator
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from transformer.config.schema import PATH_FIELDS, WMT_NAMES, DataConfig
from transformer.data import filters as filter_chain
from transformer.data import local_text, prepared, records, shards, token_id_cache, wmt
from transformer.data import tokenizer as tokenizers
from transformer.data.filters import FilterChain
from transformer.data.records import RecordReader
from transformer.data.schedule_store import FileStore
from transformer.data.shards import ShardedSplit, ShardJob
from transformer.data.text_files import Pair
from transformer.data.tokenizer import Tokenizer
from transformer.runtime import object_storage, progress
from transformer.runtime.errors import UserError
from transformer.runtime.files import checksummed_json, json_digest, parse_checksummed_json, user_error_on_oserror
from transformer.runtime.logging import log_info
from transformer.runtime.worker_pool import WorkerPool

VALIDATION_RATIO = 100  # without a validation split, one training pair in this many is held out
MAX_VALIDATION_PAIRS = 2000  # held out
METADATA_VERSION = 1  # increased whenever the same data gives other metadata

_CHUNK_PAIRS = 4096
_CHUNK_ROWS = 1 << 18
_FEW_FILES = 2  # are read by this process
_DROPS = "dropped"  # name of the array of `load_or_compute_drops`
_CANDIDATES = 1 << 14  # hashes among which rows to hold out are looked for first


class RowsExcept:
    """The rows 0 … total - 1 without some of them, in order: few bytes in place of one integer a row.

    Example: 5 rows without [1, 3] are [0, 2, 4].
    """

    def __init__(self, total: int, excluded: Sequence[int] | np.ndarray):
        self._excluded = np.sort(np.asarray(excluded, np.int64))
        self._total = total
        self._kept_before = self._excluded - np.arange(len(self._excluded))  # rows that are before each of them

    def __len__(self) -> int:
        return self._total - len(self._excluded)

    def __getitem__(self, index: Any) -> Any:
        """The row of an index, or [M] int64 of a slice."""
        wanted: Any
        if isinstance(index, slice):
            start, stop, _ = index.indices(len(self))
            wanted = np.arange(start, stop)
        else:
            wanted = np.int64(index)
        return wanted + np.searchsorted(self._kept_before, wanted, side="right")

    def mask(self, first: int, last: int) -> np.ndarray | None:
        """Which of first ≤ row < last are among these rows, bool; None for all."""
        start, stop = np.searchsorted(self._excluded, [first, last])
        if start == stop:
            return None
        kept = np.ones(last - first, bool)
        kept[self._excluded[start:stop] - first] = False
        return kept


class Split:
    """Random access to sentence pairs; picklable and thread-safe.

    A sentence is one line: a line break in it, which data sets of TFDS may have, is read as a space.

    Attributes:
      name: in the data set.
      digest: changes with any pair and with their order; in hexadecimal.
      longest: bytes that no line has more of; None if that is not known.
    """

    def __init__(
        self,
        name: str,
        digest: str,
        languages: tuple[str, str],
        records: RecordReader,
        rows: np.ndarray | RowsExcept | None,
        strip_cr: bool = False,
        longest: int | None = None,
    ):
        """Makes a split of serialized examples.

        Args:
          records: the examples.
          rows: the indices of the split's examples, ascending; None for all.
          strip_cr: removes a CR at the end, for records made from lines that were split at b"\\n" only.
          longest: bytes that no line has more of; None if that is not known.
        """
        self.name, self.digest, self.longest = name, digest, longest
        self._languages, self._records, self._strip_cr = languages, records, strip_cr
        self._rows = RowsExcept(len(records), ()) if rows is None else rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Pair:
        """The pair (source, target) at `index`, 0 ≤ index < len."""
        index = operator.index(index)
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name}: expected 0 ≤ index < {len(self)}, got {index}")
        row = int(self._rows[index])
        (pair,) = self._read(row, row + 1)
        return self.to_lines(pair)

    def __iter__(self) -> Iterator[Pair]:
        return map(self.to_lines, self.raw_pairs())

    def to_lines(self, raw: Pair) -> Pair:
        """The pair as two lines of text, without line breaks."""
        return shards.to_lines(raw, self._strip_cr)

    def raw_pairs(self) -> Iterator[Pair]:
        """All pairs as stored, including line breaks."""
        for start in range(0, len(self), _CHUNK_PAIRS):
            end = min(start + _CHUNK_PAIRS, len(self))
            rows = self._rows[start:end].tolist()
            first, last = rows[0], rows[-1] + 1
            if last - first > 2 * len(rows) + 1:  # far apart: reading them singly is faster than reading the range
                for row in rows:
                    yield from self._read(row, row + 1)
            else:
                pairs = self._read(first, last)
                yield from (pairs[row - first] for row in rows)

    def _read(self, first: int, last: int) -> list[Pair]:
        try:
            return [records.parse(record, self._languages) for record in self._records.read(first, last)]
        except Exception as error:  # ArrayRecord and protobuf raise exceptions of their own
            raise UserError(f"the prepared data of split {self.name!r} cannot be read: {error}") from error

    def lines(self, workers: int = 0) -> Iterator[str]:
        """All lines, source and target of each pair in turn; read ahead by other processes if there are many."""
        files = self._records.files()
        if len(files) <= _FEW_FILES or isinstance(self._rows, np.ndarray):
            yield from itertools.chain.from_iterable(self)
            return
        first = 0
        blocks = shards.stored_blocks("lines", files, self._languages)
        with WorkerPool(shards.LineJob(self._strip_cr), workers or shards.default_workers()) as pool:
            for (_, count), text in zip(files, pool.map(blocks), strict=True):
                mask = self._rows.mask(first, first + count)
                lines = text.split("\n")
                yield from lines if mask is None else itertools.compress(lines, np.repeat(mask, 2))
                first += count

    def make_token_ids(self, folder: pathlib.Path, tokenizer: Tokenizer, workers: int = 0) -> None:
        """Tokenizes the split by several processes into a folder, unless it exists; continues after an interruption."""
        work = folder.parent / f"{folder.name}.partial"
        work.mkdir(parents=True, exist_ok=True)
        job = ShardJob(os.fspath(work), self._languages, strip_cr=self._strip_cr, tokenizer=tokenizer)
        mask: token_id_cache.Mask | None
        if isinstance(self._rows, RowsExcept):
            blocks = shards.stored_blocks("all", self._records.files(), self._languages)
            mask, total = self._rows.mask, len(self._records)
        else:  # few rows of a large split
            job = dataclasses.replace(job, strip_cr=False)
            blocks = shards.blocks("rows", shards.pair_parts(self))
            mask, total = None, len(self)
        with progress.phase(f"tokenizing {self.name}", total, "pairs") as phase:
            workers = workers or shards.default_workers()
            made = shards.run(job, self.name, blocks, workers, lambda done: phase.advance(done.shard.pairs))
        with progress.phase(f"joining the token ids of {self.name}"):
            token_id_cache.store(folder, made, mask)
        shutil.rmtree(work, ignore_errors=True)

    def sources(self) -> list[str]:
        """All source sentences in order."""
        return [source for source, _ in self]

    def targets(self) -> list[str]:
        """All target sentences in order."""
        return [target for _, target in self]


@dataclasses.dataclass(frozen=True)
class CorpusMetadata:
    """Facts about a data set in one direction of translation, cached in its folder as `contents.SRC-TGT.json`.

    Attributes:
      digests: of the pairs of each prepared split.
      pairs: the number of pairs of each prepared split.
      line_breaks: the number of pairs of each prepared split that contain a line break.
      blank: rows of training with a blank side, ascending.
      held_out: rows of training that serve as validation, ascending.
      longest: bytes of the longest line of each prepared split; earlier versions did not write it.
    """

    digests: dict[str, str]
    pairs: dict[str, int]
    line_breaks: dict[str, int]
    blank: list[int]
    held_out: list[int]
    longest: dict[str, int] = dataclasses.field(default_factory=dict)

    def train_rows(self, filtered: Sequence[int] | np.ndarray = ()) -> RowsExcept | None:
        """The rows of the training split without those that filters drop; None for all."""
        excluded = np.concatenate([np.array(rows, np.int64) for rows in (self.blank, self.held_out, filtered)])
        return RowsExcept(self.pairs["train"], excluded) if len(excluded) else None


class Corpus:
    """The splits of a data set in one direction of translation.

    Attributes:
      source_language, target_language: language codes.
      names: of the splits.
      dropped: the number of training pairs dropped because a side is blank.
      filters: of training, or None.
      filtered: filter → the number of training pairs that it dropped.
      digest: changes with any split; in hexadecimal.
    """

    def __init__(
        self,
        data: prepared.PreparedDataset,
        languages: tuple[str, str],
        strip_cr: bool = False,
        workers: int = 0,
        filters: FilterChain | None = None,
        cache_dir: str = "",
    ):
        """Makes a corpus of a prepared data set; `strip_cr` as in `Split`, `workers` as in `open_corpus`.

        Args:
          filters: of training.
          cache_dir: the folder under which what they drop is cached.
        """
        self.source_language, self.target_language = self._languages = languages
        self._data, self._strip_cr = data, strip_cr
        metadata = load_or_compute_metadata(data, languages, strip_cr, workers)
        self.dropped, self._longest = len(metadata.blank), metadata.longest
        # Split → the prepared split that holds its rows, and their indices there (None: all).
        self._split_rows: dict[str, tuple[str, np.ndarray | RowsExcept | None]] = {n: (n, None) for n in data.names}
        self.filters, self.filtered = filters, dict[str, int]()
        self._codes_N = np.zeros(0, np.uint8)
        if filters is not None:
            job = ShardJob("", languages, scan=True, strip_cr=strip_cr, filters=filters)
            self._codes_N = load_or_compute_drops(data, metadata, job, workers, cache_dir)
            self.filtered = filter_chain.counts(self._codes_N, filters)
        if (rows := metadata.train_rows(np.flatnonzero(self._codes_N))) is not None:
            self._split_rows["train"] = ("train", rows)
        if metadata.held_out:
            self._split_rows["validation"] = ("train", np.array(metadata.held_out))
        self.names = list(self._split_rows)
        self._digests = {}
        for name, (prepared_split, indices) in self._split_rows.items():
            self._digests[name] = split_digest(metadata.digests[prepared_split], indices)
        self.digest = json_digest(self._digests)
        _log_metadata(metadata)
        self._check_filtered()

    def _check_filtered(self) -> None:
        """Logs what filters dropped; a UserError if that is everything."""
        if self.filters is None:
            return
        rows = self._split_rows["train"][1]
        count = sum(self.filtered.values())
        total = count + (len(self._codes_N) if rows is None else len(rows))
        by_filter = ", ".join(f"{name} {number:,}" for name, number in self.filtered.items())
        if count == total:
            raise UserError(
                f"config.data.filter_…: the filters drop all {total:,} training pairs ({by_filter}): expected some to "
                "be left; loosen them"
            )
        log_info(f"data: filters drop {count:,} of {total:,} training pairs: {by_filter}")

    def filtered_examples(self, name: str, count: int) -> list[Pair]:
        """A few of the training pairs that a filter dropped, spread over the split."""
        rows = filter_chain.rows_of(self._codes_N, name)
        rows = rows[np.unique(np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(np.int64))]
        return list(Split("train", "", self._languages, self._data.records("train"), rows, self._strip_cr))

    @property
    def train(self) -> Split:
        """The training split."""
        return self.split("train")

    def split(self, name: str) -> Split:
        """The split `name`; "test" also names the only split whose name starts with it, and "val" the validation split.

        Raises:
          UserError: no split or several splits match, or its files have changed since they were prepared.
        """
        if name not in self.names and name in local_text.VALIDATION_STEMS and "validation" in self.names:
            name = "validation"
        matches = [other for other in self.names if name == "test" and other.startswith(name)]
        if name not in self.names and len(matches) == 1:
            name = matches[0]
        if name not in self.names:
            available = f"several, {', '.join(matches)}; name one" if matches else f"only {', '.join(self.names)}"
            raise UserError(f"{self._data.folder}: expected a split {name!r}, found {available}")
        prepared_split, rows = self._split_rows[name]
        records = self._data.records(prepared_split)
        longest = self._longest.get(prepared_split)
        return Split(name, self._digests[name], self._languages, records, rows, self._strip_cr, longest)


def split_digest(prepared_digest: str, rows: np.ndarray | RowsExcept | None) -> str:
    """The digest of a split that holds these rows of a prepared one; None for all."""
    digest = hashlib.sha256(prepared_digest.encode())
    if rows is None:
        digest.update(b"all")
    else:
        for start in range(0, len(rows), _CHUNK_ROWS):
            digest.update(rows[start : start + _CHUNK_ROWS].astype("<i8").tobytes())
    return digest.hexdigest()


def open_corpus(data: DataConfig, *, tokenize: bool = False, workers: int = 0) -> Corpus:
    """Opens the data set of a config and prepares it first if necessary; logs what it does.

    Args:
      data: section of the config.
      tokenize: whether training is tokenized in the pass that prepares, if the config names a vocabulary.
      workers: processes that prepare; 0 for one a core.

    Raises:
      UserError: as `validate_source`, or the data cannot be prepared, is damaged, or leaves no training pair.
    """
    validate_source(data)
    name, folder = re.split("[/:]", data.name)[0], data_dir(data)  # without config and version
    make_builder: Callable[[], Any] = functools.partial(_tfds_builder, data)
    if data.name == "text":
        make_builder = functools.partial(local_text.ParallelText, local_text.find_splits(data), folder)
    elif name in WMT_NAMES:
        make_builder = functools.partial(wmt.WmtBuilder, _tfds_builder(data), folder, data.manual_dir)
    filters = FilterChain.from_config(data)
    # TFDS splits the archives of WMT at LF only, and our records of them equal its records.
    languages, strip_cr = (data.source_language, data.target_language), name in WMT_NAMES

    def one_pass() -> prepared.OnePass:
        tokenizer = tokenizers.load_configured(data) if tokenize else None
        finish = functools.partial(_finish_one_pass, languages, folder)
        return prepared.OnePass(languages, strip_cr, tokenizer, filters, workers, finish)

    owned = name in ("text", "cldr", *WMT_NAMES)
    dataset = prepared.prepare(make_builder, owned=owned, one_pass=one_pass)
    return Corpus(dataset, languages, strip_cr, workers, filters, folder)


def _finish_one_pass(
    languages: tuple[str, str], data_dir: str, splits: Mapping[str, ShardedSplit], data_digest: str, folder: epath.Path
) -> None:
    """Writes the metadata, what filters drop, and the token ids of training if it was tokenized."""
    train = splits["train"]
    codes_N = np.zeros(0, np.uint8)
    with progress.phase("data: joining what is known of the pairs"):
        metadata = _compute_metadata(splits)
        _save_metadata(_metadata_path(folder, languages), data_digest, metadata)
        if train.job.filters is not None:
            store = FileStore(_drops_folder(data_dir, metadata, languages, train.job.filters))
            codes_N = store.array(_DROPS, lambda: _resolve_drops(metadata, train), metadata.pairs["train"])
    rows = metadata.train_rows(np.flatnonzero(codes_N))
    if train.job.tokenizer is not None and (rows is None or len(rows)):
        digest = split_digest(metadata.digests["train"], rows)
        ids_folder = token_id_cache.cache_folder(data_dir, digest, languages, train.job.tokenizer)
        with progress.phase("data: joining the token ids"), prepared.lock_cache(ids_folder):
            token_id_cache.store(ids_folder, train, rows.mask if rows is not None else None)


def validate_source(data: DataConfig) -> None:
    """Raises a UserError if files, the data set or the languages that the config names are missing.

    Imports no JAX and reads no sentence; `open_corpus` may still find invalid content.
    """
    addresses = {f"config.data.{field}": getattr(data, field) for field in (*PATH_FIELDS, "tokenizer")}
    for name, address in (addresses | {"TFDS_DATA_DIR": os.environ.get("TFDS_DATA_DIR", "")}).items():
        if reason := object_storage.unsupported_reason(address):
            raise UserError(f"{name}: {reason}")
    FilterChain.from_config(data)
    if data.name == "text":
        local_text.find_splits(data)
    else:
        _validate_tfds(data)


def _validate_tfds(data: DataConfig) -> None:
    """Raises a UserError unless TFDS has the data set in both languages, and it is or can be prepared."""
    with prepared.silence_tfds():
        builder = _tfds_builder(data)
    features = builder.info.features
    languages = {code for code in features or {} if isinstance(features[code], tfds.features.Text)}
    if not {data.source_language, data.target_language} <= languages:
        configs = f"; its configs: {', '.join(builder.builder_configs)}" if builder.builder_configs else ""
        raise UserError(
            f"config.data: {builder.info.full_name} has {', '.join(sorted(languages)) or 'no text by language'}; "
            f"expected source_language = {data.source_language!r} and target_language = {data.target_language!r} in it"
            f"{configs}"
        )
    needs_tensorflow = type(builder).__module__.startswith("tensorflow_datasets.") and builder.name not in WMT_NAMES
    if needs_tensorflow and not prepared.is_prepared(builder) and not importlib.util.find_spec("tensorflow"):
        raise UserError(
            f"{builder.info.full_name} is not prepared in {builder.data_path}, and TFDS prepares it with TensorFlow, "
            f"which is not installed here; {prepared.preparation_instructions(builder)}"
        )


def data_dir(data: DataConfig) -> str:
    """The folder of prepared data and token ids; for an address in object storage, its local copy."""
    folder = data.data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    if object_storage.is_remote(folder):
        return object_storage.local_cache_dir(folder)
    return os.fspath(epath.Path(folder).expanduser())


def _tfds_builder(data: DataConfig) -> Any:
    """The TFDS builder of `data.name`; if that names no config, with the config of the two languages."""
    name, languages = data.name, (data.source_language, data.target_language)
    options = {"data_dir": data_dir(data), "file_format": "array_record"}
    if name.split("/")[0] == "cldr":
        return _cldr_builder(name, languages, options)
    importlib.import_module("tensorflow_datasets.translate")  # registers its data sets
    try:
        if re.fullmatch(r"\w+", name):
            name = "/".join(filter(None, (name, _match_config(_config_names(name, options["data_dir"]), languages))))
        return tfds.builder(name, **options)
    except tfds.core.DatasetNotFoundError as error:
        raise UserError(_unknown_dataset_message(name, str(error), options["data_dir"])) from error
    except Exception as error:  # TFDS and the files that it reads raise exceptions of many types
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if "File format" in reason:
            reason = (
                f"{options['data_dir']} has it in another format than array_record, which only TensorFlow reads; "
                "move that folder away, or choose another config.data.data_dir"
            )
        raise UserError(f"config.data.name: TFDS cannot open {name!r}: {reason}") from error


def _cldr_builder(name: str, languages: tuple[str, str], options: dict[str, Any]) -> Any:
    from transformer.data.cldr.generator import Cldr

    configs = list(Cldr.builder_configs)
    config = name.partition("/")[2] or _match_config(configs, languages)
    if config not in configs:
        raise UserError(
            f"config.data: {name} is offered in {', '.join(configs)}, both directions each; got source_language = "
            f"{languages[0]!r}, target_language = {languages[1]!r}"
        )
    return Cldr(config=config, **options)


def _config_names(name: str, data_dir: str) -> list[str]:
    """The configs of a data set in TFDS, or else those prepared in the data folder."""
    try:
        return list(tfds.builder_cls(name).builder_configs)
    except tfds.core.DatasetNotFoundError:
        return sorted({path.parent.parent.name for path in epath.Path(data_dir).glob(f"{name}/*/*/features.json")})


def _match_config(configs: list[str], languages: tuple[str, str]) -> str:
    """The config for two languages in either order, named as in TFDS: de-en, pt_to_en, ende; or ""."""
    candidates = [separator.join(pair) for pair in (languages, languages[::-1]) for separator in ("-", "_to_", "_", "")]
    return next((name for name in candidates if name in configs), "")


def _unknown_dataset_message(name: str, error: str, data_dir: str) -> str:
    """The message for an unknown data set; `error` of TFDS lists the known ones."""
    known = {"text", "cldr", *re.findall(r"^\s*- (\w+)$", error, re.MULTILINE)}
    close = difflib.get_close_matches(name.split("/")[0], known, 3, 0.7)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    return (
        f"config.data.name: no data set {name!r} in TFDS nor prepared in {data_dir}; {hint}"
        "Expected text for your own files, cldr, or a translation set of TFDS such as wmt14_translate/de-en"
    )


def load_or_compute_metadata(
    data: prepared.PreparedDataset, languages: tuple[str, str], strip_cr: bool = False, workers: int = 0
) -> CorpusMetadata:
    """The metadata of a data set in one direction, from the cache or by reading all pairs; `strip_cr` as in `Split`.

    Raises:
      UserError: no training pair is left.
    """
    if "train" not in data.names:
        raise UserError(f"{data.folder}: expected a split 'train', got {', '.join(data.names) or 'none'}")
    path = _metadata_path(data.folder, languages)
    if metadata := _load_metadata(path, data.digest()):
        return metadata
    with tempfile.TemporaryDirectory(prefix="scan-") as work:
        metadata = _compute_metadata(_scan(data, ShardJob(work, languages, scan=True, strip_cr=strip_cr), workers))
    _save_metadata(path, data.digest(), metadata)
    return metadata


def load_or_compute_drops(
    data: prepared.PreparedDataset, metadata: CorpusMetadata, job: ShardJob, workers: int, cache_dir: str
) -> np.ndarray:
    """Which filter drops each row of training, [N] uint8 as in `filters`, from the cache or by reading all of them.

    Args:
      job: scans with these filters, in any folder.
      cache_dir: the folder under which the result is cached.
    """
    assert job.filters is not None

    def compute() -> np.ndarray:
        with tempfile.TemporaryDirectory(prefix="scan-") as work:
            scanned = _scan(data, dataclasses.replace(job, folder=work), workers, ["train"])
            return _resolve_drops(metadata, scanned["train"])

    folder = _drops_folder(cache_dir, metadata, job.languages, job.filters)
    with user_error_on_oserror(f"{folder}, under config.data.data_dir"):
        object_storage.pull(folder)
        codes_N = FileStore(folder).array(_DROPS, compute, metadata.pairs["train"])
        if folder.exists():
            object_storage.push(folder)
    return codes_N


def _drops_folder(
    cache_dir: str, metadata: CorpusMetadata, languages: tuple[str, str], filters: FilterChain
) -> epath.Path:
    """The cache of what filters drop of this training split."""
    digest = split_digest(metadata.digests["train"], metadata.train_rows())
    return prepared.cache_folder(cache_dir, "filters", digest, languages, filters.digest[:24])


def _resolve_drops(metadata: CorpusMetadata, train: ShardedSplit) -> np.ndarray:
    """Which filter drops each row, from what the shards say of each pair."""
    assert train.job.filters is not None
    hashes = functools.partial(train.known_by_shard, "pair_hash")
    left_out = metadata.blank + metadata.held_out
    return filter_chain.resolve(train.known("filter"), left_out, train.job.filters, hashes)


def _metadata_path(folder: epath.Path, languages: tuple[str, str]) -> epath.Path:
    return folder / f"contents.{'-'.join(languages)}.json"


def _scan(
    data: prepared.PreparedDataset, job: ShardJob, workers: int, names: Sequence[str] = ()
) -> dict[str, ShardedSplit]:
    """Reads all pairs of these splits, by default of all."""
    splits = {}
    for name in names or data.names:
        files = data.records(name).files()
        with progress.phase(f"data: scanning {name}", sum(count for _, count in files), "pairs") as phase:
            blocks = shards.stored_blocks(name, files, job.languages)
            count = workers or shards.default_workers()
            splits[name] = shards.run(job, name, blocks, count, lambda done: phase.advance(done.shard.pairs))
    return splits


def _compute_metadata(splits: Mapping[str, ShardedSplit]) -> CorpusMetadata:
    train = splits["train"]
    is_blank = train.known("blank")
    blank, rows = np.flatnonzero(is_blank), np.flatnonzero(~is_blank)
    if not len(rows):
        raise UserError(f"all {len(is_blank):,} training pairs have a blank side: nothing is left to train on")
    held_out = [] if "validation" in splits else rows[_select_validation(train.known("hash")[rows])].tolist()
    return CorpusMetadata(
        digests={name: split.digest for name, split in splits.items()},
        pairs={name: split.pairs() for name, split in splits.items()},
        line_breaks={name: sum(shard.line_breaks for shard in split.shards) for name, split in splits.items()},
        blank=blank.tolist(),
        held_out=held_out,
        longest={name: max((s.longest for s in split.shards), default=0) for name, split in splits.items()},
    )


def _select_validation(hashes_N: np.ndarray) -> np.ndarray:
    """Selects the sentences to hold out by their hashes, [N] uint64: [N] bool.

    Takes hashes from the lowest up, with all their rows so that equal sentences stay together, while they fit into
    1 / VALIDATION_RATIO of all rows and into MAX_VALIDATION_PAIRS; the rarest sentence if none fits.
    """
    lowest, highest = hashes_N.min(), hashes_N.max()
    if lowest == highest:
        raise UserError("training has one distinct source sentence: none can be held out; bring validation files")
    most = min(max(len(hashes_N) // VALIDATION_RATIO, 1), MAX_VALIDATION_PAIRS)
    size = _CANDIDATES
    while True:
        # All rows up to a hash are candidates, so that no other row has one of their sentences.
        is_all = size >= len(hashes_N)
        limit = highest if is_all else np.partition(hashes_N, size)[size]
        hashes, counts = np.unique(hashes_N[hashes_N <= limit], return_counts=True)
        selected, remaining = [], most
        for value, count in zip(hashes, counts, strict=True):
            if count <= remaining:
                selected.append(value)
                remaining -= count
            if not remaining:
                break
        if is_all or not remaining:
            return np.isin(hashes_N, selected or hashes[np.argmin(counts)])
        size *= 8


def _save_metadata(path: epath.Path, data_digest: str, metadata: CorpusMetadata) -> None:
    prepared.write_cache(path, checksummed_json([METADATA_VERSION, data_digest, dataclasses.asdict(metadata)]))


def _load_metadata(path: epath.Path, data_digest: str) -> CorpusMetadata | None:
    """What `_save_metadata` wrote for the same data and version; None if that is missing or damaged."""
    if not path.exists():
        return None
    if (content := parse_checksummed_json(path.read_bytes())) is None:
        return None
    *key, metadata = content
    return CorpusMetadata(**metadata) if key == [METADATA_VERSION, data_digest] else None


def _log_metadata(metadata: CorpusMetadata) -> None:
    num_train = metadata.pairs["train"]
    if metadata.blank:
        log_info(f"data: {len(metadata.blank):,} of {num_train:,} training pairs have a blank side: left out")
    for name, count in metadata.line_breaks.items():
        if count:
            log_info(f"data: {count:,} of {metadata.pairs[name]:,} pairs of {name} hold a line break: read as a space")
    if metadata.held_out:
        held_out = f"{len(metadata.held_out):,} of {num_train:,} training pairs"
        log_info(f"data: no validation split: {held_out} are held out as one")
