"""From a corpus to this host's rows of each global batch: token ids cached on disk, read by Grain.

A sentence is tokenized once for each pair of corpus and vocabulary; training then maps flat arrays
of ids into memory. The iterator's whole state is the step.
"""

import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from typing import NamedTuple

import grain
import numpy as np
from etils import epath

from transformer import tokenizer as tokenizers
from transformer.batching import Batch, Ragged, TrainPlan, assemble, host_rows
from transformer.command_line import say
from transformer.config import Config, DataConfig
from transformer.datasets import corpus as corpora
from transformer.datasets.split import Split
from transformer.errors import UserError
from transformer.tokenizer import Tokenizer

CHUNK = 10_000  # pairs tokenized at a time
PREFETCH = 16  # batches made ahead of the device


class TokenIds(NamedTuple):
    """The two sides of a split as ids; pair i is source i and target i."""

    source: Ragged
    target: Ragged


class TrainBatches:
    """A random-access source of one host's part of each global batch, for Grain; index = step."""

    def __init__(self, plan: TrainPlan, ids: TokenIds, num_steps: int, host: int, hosts: int):
        self._plan, self._ids, self._num_steps, self._host, self._hosts = plan, ids, num_steps, host, hosts

    def __len__(self) -> int:
        return self._num_steps

    def __getitem__(self, step: int) -> Batch:
        return assemble(host_rows(self._plan.batch(int(step)), self._host, self._hosts), *self._ids)


def train_iterator(
    plan: TrainPlan, ids: TokenIds, *, start: int, num_steps: int, host: int = 0, hosts: int = 1
) -> grain.DatasetIterator:
    """Yields the batches of steps `start` … `num_steps` - 1, made ahead in threads."""
    source = TrainBatches(plan, ids, num_steps, host, hosts)
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=PREFETCH)
    iterator = iter(grain.MapDataset.source(source).to_iter_dataset(options))
    iterator.set_state({"next_index": start})
    return iterator


def make_plan(config: Config, ids: TokenIds) -> TrainPlan:
    """The plan of training batches.

    Raises:
      UserError: no pair is short enough.
    """
    plan = TrainPlan(
        ids.source.lengths,
        ids.target.lengths,
        num_buckets=config.data.num_buckets,
        batch_tokens=config.train.batch_tokens,
        max_length=config.data.max_length,
        seed=config.train.seed,
    )
    if not plan.kept:
        raise UserError(
            f"config.data.max_length = {config.data.max_length}: none of the {plan.dropped:,} training pairs is that "
            "short; raise it"
        )
    return plan


def get_tokenizer(data: DataConfig, corpus: corpora.Corpus, stored: epath.Path, may_train: bool) -> Tokenizer:
    """The workdir's vocabulary if it has one; else the one named by the config, or a newly trained one, stored.

    Raises:
      UserError: `may_train` is False, as for a workdir that has been trained in, and its vocabulary is gone.
    """
    if (stored / tokenizers.FILE_NAME).exists():
        return tokenizers.load(stored)
    if not may_train:
        raise UserError(
            f"{stored}: the vocabulary of this workdir is missing. A new one would not fit its checkpoints: copy "
            f"tokenizer/{tokenizers.FILE_NAME} back from the newest folder under checkpoints/"
        )
    if data.tokenizer in ("bpe", "unigram"):
        say(f"training a {data.tokenizer} vocabulary of {data.vocab_size:,} pieces")
        tokenizer = tokenizers.train(_sentences(corpus), data.vocab_size, data.tokenizer)
    else:
        tokenizer = tokenizers.load(data.tokenizer)
        if tokenizer.vocab_size != data.vocab_size:
            raise UserError(
                f"config.data.vocab_size = {data.vocab_size}, but {data.tokenizer} has {tokenizer.vocab_size} pieces; "
                f"set data.vocab_size = {tokenizer.vocab_size}"
            )
    tokenizer.save(stored)
    return tokenizer


def _sentences(corpus: corpora.Corpus) -> Iterable[str]:
    for source, target in corpus.split("train"):
        yield source
        yield target


def token_ids(data: DataConfig, corpus: corpora.Corpus, split_name: str, tokenizer: Tokenizer) -> TokenIds:
    """Ids of a whole split, from the cache beside the prepared data or made now and kept there.

    Raises:
      UserError: cached files are not as long as they were written.
    """
    split = corpus.split(split_name)
    languages = f"{corpus.source_language}-{corpus.target_language}"
    key = f"{split.digest[:24]}-{languages}-{tokenizer.digest[:24]}"
    folder = epath.Path(corpora.data_dir(data)) / "token_ids" / key
    if not folder.exists():
        say(f"tokenizing {split_name}: {len(split):,} pairs")
        _write(folder, split, tokenizer)
    return TokenIds(_read(folder, "source"), _read(folder, "target"))


def _write(folder: epath.Path, split: Split, tokenizer: Tokenizer) -> None:
    """Tokenizes into a folder that appears whole or not at all, so that two runs may do it at once."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32
    partial = epath.Path(tempfile.mkdtemp(prefix=folder.name + ".partial", dir=folder.parent))
    try:
        lengths: dict[str, list[int]] = {"source": [], "target": []}
        with (partial / "source.ids").open("wb") as source, (partial / "target.ids").open("wb") as target:
            reader = iter(split)
            while pairs := list(itertools.islice(reader, CHUNK)):
                for side, name, file in ((0, "source", source), (1, "target", target)):
                    sequences = tokenizer.encode([pair[side] for pair in pairs])
                    lengths[name] += [len(ids) for ids in sequences]
                    file.write(np.concatenate(sequences).astype(dtype).tobytes())
        for name, values in lengths.items():
            with (partial / f"{name}.offsets.npy").open("wb") as file:
                np.save(file, np.cumsum([0, *values], dtype=np.int64))
        (partial / "about.json").write_text(json.dumps({"dtype": np.dtype(dtype).name, "split": split.name}))
        try:
            os.rename(partial, folder)
        except OSError:
            if not folder.exists():  # another run was faster, or the rename really failed
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _read(folder: epath.Path, side: str) -> Ragged:
    dtype = np.dtype(json.loads((folder / "about.json").read_text())["dtype"])
    offsets = np.load(folder / f"{side}.offsets.npy", allow_pickle=False)
    path = folder / f"{side}.ids"
    expected = int(offsets[-1]) * dtype.itemsize
    if path.stat().length != expected:
        raise UserError(f"{path}: expected {expected} bytes, got {path.stat().length}; delete {folder} to make it anew")
    flat = np.memmap(path, dtype, mode="r") if expected else np.zeros(0, dtype)
    return Ragged(flat, offsets)
