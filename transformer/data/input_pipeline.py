"""From a corpus to this host's rows of each global batch: token ids cached on disk, read by Grain.

A sentence is tokenized once for each pair of corpus and vocabulary; training then maps flat arrays
of ids into memory. The iterator's whole state is the step at which it starts.
"""

import array
import itertools
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from transformer.config import Config, DataConfig
from transformer.data import corpus as corpora
from transformer.data import tokenizer as tokenizers
from transformer.data.batching import Batch, BatchSchedule, BucketedSchedule, JaggedArray, make_batch, select_rows
from transformer.data.corpus import Split
from transformer.data.packing import PackedSchedule
from transformer.data.tokenizer import Tokenizer
from transformer.runtime import object_storage
from transformer.runtime.errors import UserError
from transformer.runtime.files import sha256, user_error_on_oserror
from transformer.runtime.logging import log_info, log_progress

CHUNK_PAIRS = 10_000  # pairs tokenized at a time
METADATA_FILE = "about.json"
FILES = ("source.ids", "source.offsets.npy", "target.ids", "target.offsets.npy")
PREFETCH_BATCHES = 16  # batches made ahead of the device
MAX_DROPPED_FRACTION = 0.1  # of the training pairs, without a warning


class TokenIds(NamedTuple):
    """The two sides of a split as ids; pair i is source i and target i."""

    source: JaggedArray
    target: JaggedArray


def train_iterator(
    plan: BatchSchedule,
    ids: TokenIds,
    *,
    start: int,
    num_steps: int,
    rows: Callable[[int], np.ndarray] = np.arange,
) -> Iterator[Batch]:
    """Yields this host's rows of the batches of steps `start` … `num_steps` - 1, made ahead in a thread.

    Args:
      rows: which rows of a batch of so many this host reads; all of them at first.
    """
    import grain  # which imports JAX: preparing data does without

    def make(step: int) -> Batch:
        planned = plan.batch(step)
        return make_batch(select_rows(planned, rows(planned.bucket.rows)), *ids)

    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=PREFETCH_BATCHES)
    return iter(grain.MapDataset.range(start, num_steps).map(make).to_iter_dataset(options))


def make_batch_schedule(config: Config, ids: TokenIds) -> BatchSchedule:
    """The plan of training batches; warns where many pairs are too long for it.

    Raises:
      UserError: no pair is short enough.
    """
    lengths = ids.source.lengths, ids.target.lengths
    shared: dict[str, Any] = {
        "batch_tokens": config.train.batch_tokens,
        "max_length": config.data.max_length,
        "length_multiple": config.data.length_multiple,
        "seed": config.train.seed,
    }
    plan: BatchSchedule
    if config.data.batching == "pack":
        plan = PackedSchedule(*lengths, **shared)
    else:
        plan = BucketedSchedule(*lengths, num_buckets=config.data.num_buckets, **shared)
    if not plan.kept:
        raise UserError(
            f"config.data.max_length = {config.data.max_length}: none of the {plan.dropped:,} training pairs is that "
            "short; raise it"
        )
    total = plan.kept + plan.dropped
    if plan.dropped > MAX_DROPPED_FRACTION * total:
        log_info(
            f"warning: {plan.dropped:,} of {total:,} training pairs ({plan.dropped / total:.0%}) are longer than "
            f"data.max_length = {config.data.max_length} and dropped; raise it to train on them"
        )
    return plan


def get_tokenizer(data: DataConfig, corpus: corpora.Corpus, stored: epath.Path) -> Tokenizer:
    """The vocabulary of a run that has no checkpoint yet: what config and corpus make, whatever is stored."""
    wanted = get_or_train_tokenizer(data, corpus)
    path = stored / wanted.file_name
    if path.exists() and sha256(path) == wanted.digest:
        return wanted
    if tokenizers.exists(stored):
        log_info(f"{stored}: replacing the vocabulary, which no checkpoint uses and the config does not ask for")
    wanted.save(stored)
    return wanted


def _configured_tokenizer(data: DataConfig, corpus: corpora.Corpus) -> Tokenizer | None:
    """The vocabulary that a file named by the config makes; None if the config only says how to train one."""
    # Another file of codes may give as many pieces.
    return (
        get_or_train_tokenizer(data, corpus) if data.tokenizer.endswith(".codes") else tokenizers.load_configured(data)
    )


def get_or_train_tokenizer(data: DataConfig, corpus: corpora.Corpus) -> Tokenizer:
    """The vocabulary of a corpus: named by the config, kept beside the prepared data, or trained now and kept there."""
    if given := tokenizers.load_configured(data):
        return given
    split = corpus.split("train")
    languages = f"{corpus.source_language}-{corpus.target_language}"
    key = f"{split.digest[:24]}-{languages}-{tokenizers.cache_key(data)}"
    folder = epath.Path(corpora.data_dir(data)) / "vocabularies" / key
    with user_error_on_oserror(f"{folder}, under config.data.data_dir"):
        object_storage.pull(folder)
        for path in sorted(folder.glob("*.model")):
            if sha256(path) == path.stem:
                object_storage.push(folder)  # which may have failed
                return tokenizers.check_vocab_size(tokenizers.load(path), data)
            log_info(f"{path}: damaged; the vocabulary is trained anew")
            path.unlink()
        log_info(f"training a {data.tokenizer} vocabulary of {data.vocab_size:,} pieces")
        trained = tokenizers.build(data, Sentences(split))
        trained.save(folder, f"{trained.digest}.model")
        object_storage.push(folder)
    return trained


def check_same_tokenizer(data: DataConfig, corpus: corpora.Corpus, stored: epath.Path, trained: Tokenizer) -> Tokenizer:
    """The vocabulary that the checkpoints were trained with, which must be the workdir's and the config's too.

    Raises:
      UserError: the workdir's is missing or another one, or the config names another.
    """
    given = _configured_tokenizer(data, corpus) or trained
    if given.digest != trained.digest:
        raise UserError(
            f"config.data.tokenizer = {data.tokenizer}: is not the vocabulary of the run in {stored.parent}: that has "
            f"the digest {trained.digest[:16]}, this {given.digest[:16]}. Name the same, or choose another --workdir"
        )
    path = stored / trained.file_name
    found = sha256(path) if path.exists() else "missing"
    if found == trained.digest:
        return trained
    raise UserError(
        f"{stored}: the vocabulary of this workdir is missing or not the one its checkpoints were trained with: its "
        f"digest was {trained.digest[:16]} and is {found[:16]}. Another would not fit them: copy tokenizer/"
        f"{trained.file_name} back from the newest checkpoint"
    )


class Sentences:
    """All sentences of a split, source and target in turn; can be gone through again."""

    def __init__(self, split: Split):
        self._split = split

    def __len__(self) -> int:
        return 2 * len(self._split)

    def __iter__(self) -> Iterator[str]:
        return itertools.chain.from_iterable(self._split)

    def __contains__(self, line: object) -> bool:
        return any(line == other for other in self)


def token_ids(data: DataConfig, corpus: corpora.Corpus, split_name: str, tokenizer: Tokenizer) -> TokenIds:
    """Ids of a whole split, from the cache beside the prepared data or made now and kept there."""
    split = corpus.split(split_name)
    languages = f"{corpus.source_language}-{corpus.target_language}"
    key = f"{split.digest[:24]}-{languages}-{tokenizer.digest[:24]}"
    folder = epath.Path(corpora.data_dir(data)) / "token_ids" / key
    with user_error_on_oserror(f"{folder}, under config.data.data_dir"):
        object_storage.pull(folder)
        if folder.exists():
            try:
                ids = _load_ids(folder)
            except (OSError, ValueError, KeyError, TypeError) as error:
                log_info(f"{folder}: damaged ({error}); made anew")
                shutil.rmtree(folder)
            else:
                object_storage.push(folder)  # which may have failed
                return ids
        log_info(f"tokenizing {split_name}: {len(split):,} pairs")
        _write_ids(folder, split, tokenizer)
        object_storage.push(folder)
        return _load_ids(folder)


def _write_ids(folder: epath.Path, split: Split, tokenizer: Tokenizer) -> None:
    """Tokenizes into a folder that appears whole or not at all, so that two runs may do it at once."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32
    partial = folder.parent / f"{folder.name}.{uuid.uuid4().hex}.partial"  # containers share process numbers
    partial.mkdir()
    try:
        lengths = {"source": array.array("q"), "target": array.array("q")}
        with (partial / "source.ids").open("wb") as source, (partial / "target.ids").open("wb") as target:
            chunks = log_progress(
                _chunks(split), lambda count: f"tokenized {count * CHUNK_PAIRS:,} of {len(split):,} pairs"
            )
            for pairs in chunks:
                for side, name, file in ((0, "source", source), (1, "target", target)):
                    sequences = tokenizer.encode([pair[side] for pair in pairs])
                    lengths[name].extend(len(ids) for ids in sequences)
                    file.write(np.concatenate(sequences).astype(dtype).tobytes())
        for name, values in lengths.items():
            with (partial / f"{name}.offsets.npy").open("wb") as file:
                np.save(file, np.concatenate([[0], np.cumsum(values, dtype=np.int64)]))
        digests = {name: sha256(partial / name) for name in FILES}
        (partial / METADATA_FILE).write_text(json.dumps({"dtype": np.dtype(dtype).name, "sha256": digests}))
        try:
            os.rename(partial, folder)
        except OSError:
            if not folder.exists():  # another run was faster, or the rename really failed
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _chunks(split: Split) -> Iterator[list[tuple[str, str]]]:
    reader = iter(split)
    while pairs := list(itertools.islice(reader, CHUNK_PAIRS)):
        yield pairs


def _load_ids(folder: epath.Path) -> TokenIds:
    """Maps the ids into memory, once their digests are right; a ValueError if they are not."""
    about = json.loads((folder / METADATA_FILE).read_text())
    for name in FILES:
        if sha256(folder / name) != about["sha256"][name]:
            raise ValueError(f"{name} has changed since it was written")
    return TokenIds(*(_load_side(folder, side, np.dtype(about["dtype"])) for side in ("source", "target")))


def _load_side(folder: epath.Path, side: str, dtype: np.dtype) -> JaggedArray:
    offsets = np.load(folder / f"{side}.offsets.npy", allow_pickle=False)
    flat = np.memmap(folder / f"{side}.ids", dtype, mode="r") if offsets[-1] else np.zeros(0, dtype)
    return JaggedArray(flat, offsets)
