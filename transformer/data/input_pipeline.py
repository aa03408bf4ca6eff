"""Input pipeline: corpus → token ids, cached on disk → this host's rows of each global batch, prefetched by Grain.

Sentences are tokenized once for each corpus and vocabulary; training maps the flat arrays of ids into memory. The only
state of the iterator is the step at which it starts.
"""

import dataclasses
import functools
import pathlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath

from transformer.config import Config, DataConfig, mixture, validation
from transformer.data import mixture_schedule, prepared, subword_dropout, tfds_builders, token_id_cache
from transformer.data.batching import (
    Batch,
    BatchSchedule,
    BucketedSchedule,
    JaggedArray,
    LengthArray,
    Lengths,
    make_batch,
    select_rows,
)
from transformer.data.corpus import Corpus
from transformer.data.mixed_sequences import MixedSequences
from transformer.data.mixture_corpus import MixtureCorpus
from transformer.data.mixture_schedule import MixtureSchedule
from transformer.data.packing import PackedSchedule
from transformer.data.schedule_store import FileStore
from transformer.data.subword_dropout import SubwordDropout
from transformer.data.tokenizer import Tokenizer
from transformer.runtime import progress
from transformer.runtime.errors import UserError
from transformer.runtime.files import json_digest
from transformer.runtime.logging import log_info

PREFETCH_BATCHES = 16  # made ahead of the device
SCHEDULE_VERSION = 2  # increased whenever the same lengths give other batches
MAX_DROPPED_FRACTION = 0.1  # of the training pairs without a warning
LOW_FILL = 0.5  # share of target positions that are not padding, under which there is a warning


@dataclasses.dataclass(frozen=True)
class TokenIds:
    """The ids of a split; pair i is source i and target i.

    Attributes:
      folder: holds schedules of their batches; None keeps those in memory.
      entries: of a mixture, without tags.
      dropout: splits the words of training batches at random; None if `data.subword_dropout` is 0.
    """

    source: JaggedArray
    target: JaggedArray
    folder: epath.Path | None = None
    entries: "tuple[TokenIds, ...]" = ()
    dropout: SubwordDropout | None = None

    def __iter__(self) -> Iterator[JaggedArray]:
        return iter((self.source, self.target))


def train_iterator(
    schedule: BatchSchedule,
    ids: TokenIds,
    *,
    start: int,
    num_steps: int,
    rows: Callable[[int], np.ndarray] = np.arange,
) -> Iterator[Batch]:
    """Yields this host's rows of the batches of steps `start` … `num_steps` - 1, prefetched by a thread.

    Args:
      rows: maps the number of rows of a batch to the indices of those that this host reads; by default all.
    """
    import grain  # imports JAX, which `prepare` does not need

    def make(step: int) -> Batch:
        spec = schedule.batch(step)
        spec = select_rows(spec, rows(spec.bucket.rows))
        return ids.dropout.make_batch(spec, ids.source, ids.target, step) if ids.dropout else make_batch(spec, *ids)

    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=PREFETCH_BATCHES)
    return iter(grain.MapDataset.range(start, num_steps).map(make).to_iter_dataset(options))


def with_subword_dropout(config: Config, ids: TokenIds, tokenizer: Tokenizer) -> TokenIds:
    """The ids of training with what `data.subword_dropout` asks for."""
    if not config.data.subword_dropout:
        return ids
    dropout = subword_dropout.make_dropout(config, tokenizer, (ids.source, ids.target), ids.folder)
    return dataclasses.replace(ids, dropout=dropout)


def training_ids(config: Config, corpus: Corpus | MixtureCorpus, tokenizer: Tokenizer) -> TokenIds:
    """The ids that batches of training are scheduled from and made of."""
    return with_subword_dropout(config, token_ids(config.data, corpus, "train", tokenizer), tokenizer)


def make_batch_schedule(config: Config, ids: TokenIds) -> BatchSchedule:
    """The schedule of training batches; warns if many pairs are too long, or the batches do not suit the data.

    Raises:
      UserError: all pairs are too long.
    """
    with progress.phase("scheduling batches"):
        schedule = _schedule(config, ids, ids.folder)
        warning = fill_warning(config, ids, schedule)
    if not schedule.kept:
        raise UserError(
            f"config.data.max_length = {config.data.max_length}: all {schedule.dropped:,} training pairs are "
            "longer; raise it"
        )
    total = schedule.kept + schedule.dropped
    if schedule.dropped > MAX_DROPPED_FRACTION * total:
        log_info(
            f"warning: {schedule.dropped:,} of {total:,} training pairs ({schedule.dropped / total:.0%}) are longer "
            f"than data.max_length = {config.data.max_length} and dropped; raise it to train on them"
        )
    if warning:
        log_info(f"warning: {warning}")
    return schedule


def _schedule(config: Config, ids: TokenIds, folder: epath.Path | None = None) -> BatchSchedule:
    """The schedule; its arrays are kept in the folder, if there is one."""
    if config.data.mixture:
        return _mixture_schedule(config, ids, folder)
    lengths: Sequence[LengthArray] = (Lengths(ids.source), Lengths(ids.target))
    if not ids.dropout:
        return _schedule_lengths(config, lengths, config.data.max_length, folder)
    planned, longest = ids.dropout.plan(lengths, config, functools.partial(_schedule_lengths, config))
    return _schedule_lengths(config, planned, longest, folder, *(each.key for each in planned))


def _schedule_lengths(
    config: Config, lengths: Sequence[LengthArray], max_length: int, folder: epath.Path | None = None, *key_parts: Any
) -> BatchSchedule:
    """The schedule for these lengths of source and target; `key_parts` say how they differ from those of the ids."""
    options: dict[str, Any] = {
        "batch_tokens": config.train.batch_tokens,
        "max_length": max_length,
        "length_multiple": config.data.length_multiple,
        "seed": config.train.seed,
    }
    if config.data.batching == "bucket":
        options["num_buckets"] = config.data.num_buckets
    if folder is not None:
        parts = [SCHEDULE_VERSION, config.data.batching, len(lengths[0]), options, *key_parts]
        options["store"] = FileStore(folder / json_digest(parts)[:24])
    return (
        PackedSchedule(*lengths, **options) if config.data.batching == "pack" else BucketedSchedule(*lengths, **options)
    )


def _mixture_schedule(config: Config, ids: TokenIds, folder: epath.Path | None) -> MixtureSchedule:
    lengths = []
    for entry, own in zip(config.data.mixture, ids.entries, strict=True):
        lengths.append((Lengths(own.source, added=len(mixture.tags_of(entry))), Lengths(own.target)))
    options: dict[str, Any] = {"batch_tokens": config.train.batch_tokens, "seed": config.train.seed}
    if folder is None:
        return MixtureSchedule(config.data, lengths, **options)
    names = ("num_buckets", "max_length", "length_multiple")
    shapes = {name: getattr(config.data, name) for name in names}
    key = mixture_schedule.store_key(config.data, [len(own.source) for own in ids.entries], {**options, **shapes})
    return MixtureSchedule(config.data, lengths, **options, store_of=lambda name: FileStore(folder / key / name))


def fill_warning(config: Config, ids: TokenIds, schedule: BatchSchedule) -> str:
    """What to change where most positions are padding, or many shapes have one batch; empty for other schedules."""
    fill, steps, shapes = schedule.fill, schedule.steps_per_epoch, sum(map(bool, schedule.num_batches))
    has_many_shapes = shapes > 1 and steps < 2 * shapes
    if not steps or (fill >= LOW_FILL and not has_many_shapes):
        return ""
    changes: dict[str, int | str] = {}
    if config.data.batching == "bucket":
        changes["data.num_buckets"] = max(steps // 4, 1) if has_many_shapes else min(max(2 * shapes, 8), 64)
        changes["data.batching"] = "pack"
    batch_tokens = max(round(fill * schedule.num_token_positions()) // (4 * shapes), config.data.max_row_length)
    if batch_tokens < config.train.batch_tokens:
        changes["train.batch_tokens"] = batch_tokens
    effects = []
    for name, value in changes.items():
        if value == validation.get_field(config, name):
            continue
        changed_config = validation.replace_field(config, name, value)
        try:
            validation.check_consistency(changed_config, needs_data=False, strict=False)
        except UserError:  # of a mixture or an attention that does not support packed rows
            continue
        changed = _schedule(changed_config, ids)
        compiles_less = has_many_shapes and (len(changed.buckets) < shapes or changed.steps_per_epoch > steps)
        if changed.fill <= fill and not compiles_less:
            continue
        effects.append(f"{name} = {value} gives fill {changed.fill:.2f}, shapes: {len(changed.buckets)}")
    return (
        f"shapes of batches: {shapes}, each of which is compiled, for {steps:,} batches {schedule.period}; "
        f"fill {fill:.2f} (target tokens / token positions). "
        f"{'; '.join(effects) or 'More pairs would help'}"
    )


def token_ids(
    data: DataConfig, corpus: Corpus | MixtureCorpus, split_name: str, tokenizer: Tokenizer, workers: int = 0
) -> TokenIds:
    """The ids of a split, from the cache beside the prepared data, or tokenized now and cached there.

    Args:
      data, corpus, split_name, tokenizer: what they are the ids of.
      workers: processes that tokenize; 0 for one a core.
    """
    if isinstance(corpus, MixtureCorpus):
        own = [(mixture.entry_data(data, e), c) for e, c in zip(data.mixture, corpus.corpora, strict=True)]
        return _mix(data, tuple(token_ids(*each, split_name, tokenizer, workers) for each in own), tokenizer)
    split, languages = corpus.split(split_name), (corpus.source_language, corpus.target_language)
    folder = token_id_cache.cache_folder(tfds_builders.data_dir(data), split.digest, languages, tokenizer)
    schedules = folder.parent.parent / "schedules" / folder.name
    with prepared.synchronize_cache(folder):
        if folder.exists():
            try:
                return TokenIds(*token_id_cache.load(folder), schedules)
            except (OSError, ValueError, KeyError, TypeError) as error:
                log_info(f"{folder}: damaged ({error}); tokenizing again")
                shutil.rmtree(folder)
        log_info(f"tokenizing {split_name}: {len(split):,} pairs")
        try:
            split.make_token_ids(pathlib.Path(folder), tokenizer, workers)
        except OSError:
            if not folder.exists():  # otherwise another run was faster, on a file system without locks
                raise
        return TokenIds(*token_id_cache.load(folder), schedules)


def _mix(data: DataConfig, entries: tuple[TokenIds, ...], tokenizer: Tokenizer) -> TokenIds:
    """The ids of all entries, tags before their sources."""
    tags = [[tokenizer.tag_id(tag) for tag in mixture.tags_of(entry)] for entry in data.mixture]
    source = MixedSequences([ids.source for ids in entries], tags)
    target = MixedSequences([ids.target for ids in entries], [[] for _ in entries])
    folders = [ids.folder for ids in entries if ids.folder is not None]
    digest = json_digest([folder.name for folder in folders])
    folder = folders[0].parent / f"mixture-{digest[:24]}" if folders else None
    return TokenIds(source, target, folder, entries)
