"""Which rows of a prepared data set are for training and which are held out, and the digests of its splits.

Both follow from one pass over the pairs, and are cached beside the data (`CorpusMetadata`), as is what filters drop
(`load_or_compute_drops`). Training leaves out pairs with a blank side. Without a validation split, a part of training
is held out by a hash of the source sentence, before filters.

N pairs.
"""

import dataclasses
import functools
import hashlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from transformer.data import filters as filter_chain
from transformer.data import prepared, shards
from transformer.data.filters import FilterChain
from transformer.data.schedule_store import FileStore
from transformer.data.shards import ShardedSplit, ShardJob
from transformer.runtime import object_storage, progress
from transformer.runtime.errors import UserError
from transformer.runtime.files import checksummed_json, parse_checksummed_json, user_error_on_oserror
from transformer.runtime.logging import log_info

VALIDATION_RATIO = 100  # without a validation split, one training pair in this many is held out
MAX_VALIDATION_PAIRS = 2000  # held out
METADATA_VERSION = 1  # increased whenever the same data gives other metadata

_CHUNK_ROWS = 1 << 18
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
        """The row of an index, or [M] int64 of a slice or of M indices."""
        wanted: Any
        if isinstance(index, slice):
            start, stop, _ = index.indices(len(self))
            wanted = np.arange(start, stop)
        else:
            wanted = np.asarray(index, np.int64)
        return wanted + np.searchsorted(self._kept_before, wanted, side="right")

    def mask(self, first: int, last: int) -> np.ndarray | None:
        """Which of first ≤ row < last are among these rows, bool; None for all."""
        start, stop = np.searchsorted(self._excluded, [first, last])
        if start == stop:
            return None
        kept = np.ones(last - first, bool)
        kept[self._excluded[start:stop] - first] = False
        return kept


def split_digest(prepared_digest: str, rows: np.ndarray | RowsExcept | None) -> str:
    """The digest of a split that holds these rows of a prepared one; None for all."""
    digest = hashlib.sha256(prepared_digest.encode())
    if rows is None:
        digest.update(b"all")
    else:
        for start in range(0, len(rows), _CHUNK_ROWS):
            digest.update(rows[start : start + _CHUNK_ROWS].astype("<i8").tobytes())
    return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class CorpusMetadata:
    """Facts about a data set in one direction of translation, cached in its folder as `contents.SRC-TGT.json`.

    Attributes:
      digests: of the pairs of each prepared split.
      pairs: the number of pairs of each prepared split.
      line_breaks: the number of pairs of each prepared split that contain a line break.
      blank: rows of training with a blank side, ascending.
      held_out: rows of training that serve as validation, ascending.
    """

    digests: dict[str, str]
    pairs: dict[str, int]
    line_breaks: dict[str, int]
    blank: list[int]
    held_out: list[int]

    def train_rows(self, filtered: Sequence[int] | np.ndarray = ()) -> RowsExcept | None:
        """The rows of the training split without those that filters drop; None for all."""
        excluded = np.concatenate([np.array(rows, np.int64) for rows in (self.blank, self.held_out, filtered)])
        return RowsExcept(self.pairs["train"], excluded) if len(excluded) else None


def load_or_compute_metadata(
    data: prepared.PreparedDataset, languages: tuple[str, str], strip_cr: bool = False, workers: int = 0
) -> CorpusMetadata:
    """The metadata of a data set in one direction, from the cache or by reading all pairs; `strip_cr` as in `Split`.

    Raises:
      UserError: no training pair is left.
    """
    if "train" not in data.names:
        raise UserError(f"{data.folder}: expected a split 'train', got {', '.join(data.names) or 'none'}")
    if metadata := _load_metadata(data, languages):
        return metadata
    with tempfile.TemporaryDirectory(prefix="scan-") as work:
        scanned = _scan(data, ShardJob(work, languages, scan=True, strip_cr=strip_cr), workers)
        return store_metadata(scanned, languages, data.folder, data.digest())


def store_metadata(
    splits: Mapping[str, ShardedSplit], languages: tuple[str, str], folder: epath.Path, data_digest: str
) -> CorpusMetadata:
    """Computes the metadata from what the shards say of each pair, and caches it in the folder of the data.

    Raises:
      UserError: no training pair is left.
    """
    metadata = _compute_metadata(splits)
    content = checksummed_json([METADATA_VERSION, data_digest, dataclasses.asdict(metadata)])
    prepared.write_cache(_metadata_path(folder, languages), content)
    return metadata


def _load_metadata(data: prepared.PreparedDataset, languages: tuple[str, str]) -> CorpusMetadata | None:
    """What `store_metadata` wrote for the same data and version; None if that is missing or damaged."""
    path = _metadata_path(data.folder, languages)
    if not path.exists() or (content := parse_checksummed_json(path.read_bytes())) is None:
        return None
    *key, metadata = content
    if key != [METADATA_VERSION, data.digest()]:
        return None
    metadata.pop("longest", None)  # which earlier versions wrote
    return CorpusMetadata(**metadata)


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


def store_drops(
    cache_dir: str, metadata: CorpusMetadata, languages: tuple[str, str], train: ShardedSplit
) -> np.ndarray:
    """Which filter drops each row of training, as `load_or_compute_drops`, from shards that were filtered."""
    assert train.job.filters is not None
    store = FileStore(_drops_folder(cache_dir, metadata, languages, train.job.filters))
    return store.array(_DROPS, lambda: _resolve_drops(metadata, train), metadata.pairs["train"])


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


def log_metadata(metadata: CorpusMetadata) -> None:
    """Logs what training leaves out, and line breaks that are read as spaces."""
    num_train = metadata.pairs["train"]
    if metadata.blank:
        log_info(f"data: {len(metadata.blank):,} of {num_train:,} training pairs have a blank side: left out")
    for name, count in metadata.line_breaks.items():
        if count:
            log_info(f"data: {count:,} of {metadata.pairs[name]:,} pairs of {name} hold a line break: read as a space")
    if metadata.held_out:
        held_out = f"{len(metadata.held_out):,} of {num_train:,} training pairs"
        log_info(f"data: no validation split: {held_out} are held out as one")
