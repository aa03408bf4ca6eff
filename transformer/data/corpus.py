"""Opens the corpus of a config: splits of sentence pairs from TFDS, the user's text files or WMT archives.

`open_corpus` prepares the data set if necessary (`prepared`) and returns a `Corpus`, whose `split(name)` is a `Split`:
random access to (source, target). Training drops pairs with a blank side and what the filters of the config drop;
other splits keep all. Without a validation split, a part of training is held out (`corpus_metadata`).
"""

import dataclasses
import functools
import operator
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath

from transformer.config.schema import PATH_FIELDS, WMT_NAMES, DataConfig
from transformer.data import corpus_metadata, local_text, prepared, records, shards, tfds_builders, token_id_cache, wmt
from transformer.data import filters as filter_chain
from transformer.data import tokenizer as tokenizers
from transformer.data.corpus_metadata import RowsExcept, split_digest
from transformer.data.filters import FilterChain
from transformer.data.records import RecordReader
from transformer.data.shards import ShardedSplit, ShardJob
from transformer.data.text_files import Pair
from transformer.data.tokenizer import Tokenizer
from transformer.runtime import object_storage, progress
from transformer.runtime.errors import UserError
from transformer.runtime.files import json_digest
from transformer.runtime.logging import log_info

_CHUNK_PAIRS = 4096


class Split:
    """Random access to sentence pairs; picklable and thread-safe.

    A sentence is one line: a line break in it, which data sets of TFDS may have, is read as a space.

    Attributes:
      name: in the data set.
      digest: changes with any pair and with their order; in hexadecimal.
    """

    def __init__(
        self,
        name: str,
        digest: str,
        languages: tuple[str, str],
        records: RecordReader,
        rows: np.ndarray | RowsExcept | None,
        strip_cr: bool = False,
    ):
        """Makes a split of serialized examples.

        Args:
          records: the examples.
          rows: the indices of the split's examples, ascending; None for all.
          strip_cr: removes a CR at the end, for records made from lines that were split at b"\\n" only.
        """
        self.name, self.digest = name, digest
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

    def select(self, indices_M: np.ndarray) -> "Split":
        """The pairs at these indices, ascending, perhaps several times."""
        return Split(self.name, "", self._languages, self._records, self._rows[indices_M], self._strip_cr)

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
        metadata = corpus_metadata.load_or_compute_metadata(data, languages, strip_cr, workers)
        self.dropped = len(metadata.blank)
        # Split → the prepared split that holds its rows, and their indices there (None: all).
        self._split_rows: dict[str, tuple[str, np.ndarray | RowsExcept | None]] = {n: (n, None) for n in data.names}
        self.filters, self.filtered = filters, dict[str, int]()
        self._codes_N = np.zeros(0, np.uint8)
        if filters is not None:
            job = ShardJob("", languages, scan=True, strip_cr=strip_cr, filters=filters)
            self._codes_N = corpus_metadata.load_or_compute_drops(data, metadata, job, workers, cache_dir)
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
        corpus_metadata.log_metadata(metadata)
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
        return Split(name, self._digests[name], self._languages, records, rows, self._strip_cr)


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
    name, folder = re.split("[/:]", data.name)[0], tfds_builders.data_dir(data)  # without config and version
    make_builder: Callable[[], Any] = functools.partial(tfds_builders.make_builder, data)
    if data.name == "text":
        make_builder = functools.partial(local_text.ParallelText, local_text.find_splits(data), folder)
    elif name in WMT_NAMES:
        make_builder = functools.partial(wmt.WmtBuilder, tfds_builders.make_builder(data), folder, data.manual_dir)
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
        metadata = corpus_metadata.store_metadata(splits, languages, folder, data_digest)
        if train.job.filters is not None:
            codes_N = corpus_metadata.store_drops(data_dir, metadata, languages, train)
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
        tfds_builders.validate(data)
