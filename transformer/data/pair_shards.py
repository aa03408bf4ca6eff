"""Sentence pairs as ArrayRecord in their own order, however many: memory holds one shard of them."""

import abc
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import tensorflow_datasets as tfds

from transformer.runtime.errors import UserError
from transformer.runtime.logging import say, told

Pair = tuple[str, str]

_SHARD_BYTES = 32 << 20  # of text; TFDS holds one shard in memory while it writes it


class PairShards(tfds.core.ShardBasedBuilder):
    """A TFDS builder by shards: TFDS's GeneratorBasedBuilder needs TensorFlow above 1 GB a split.

    A split of no pairs, which TFDS cannot write, is listed in `info.metadata["empty_splits"]`.

    Attributes:
      languages: of the first and second sentence of each pair.
      origin: where the pairs come from, for messages.
    """

    languages: tuple[str, str]
    origin: str

    @abc.abstractmethod
    def _pairs_by_split(self) -> Mapping[str, Callable[[], Iterator[Pair]]]:
        """For each split a function that goes through its pairs; it is called twice."""

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.Translation(languages=self.languages),
            disable_shuffling=True,
            metadata=tfds.core.MetadataDict(),
        )

    def _shard_iterators_per_split(self, dl_manager: Any) -> dict[str, list[Callable[[], Iterator]]]:
        """Reads everything once for its errors and sizes before a byte is written."""
        del dl_manager  # whose extraction needs TensorFlow
        sources = self._pairs_by_split()
        lengths = {split: _shard_lengths(_read(split, pairs())) for split, pairs in sources.items()}
        if not lengths["train"]:
            raise UserError(f"{self.origin}: no pairs of sentences to train on; got 0")
        self.info.metadata["empty_splits"] = [split for split in lengths if not lengths[split]]
        counts = ", ".join(f"{split} {sum(shards):,}" for split, shards in lengths.items())
        say(f"data: sentence pairs: {counts}")
        return {split: self._shards(split, sources[split](), shards) for split, shards in lengths.items() if shards}

    def _shards(self, split: str, pairs: Iterator[Pair], lengths: list[int]) -> list[Callable[[], Iterator]]:
        """One generator a shard; TFDS runs them in order, so they can share one pass over the pairs."""
        examples = self._examples(split, pairs, sum(lengths))
        return [functools.partial(itertools.islice, examples, length) for length in lengths]

    def _examples(self, split: str, pairs: Iterator[Pair], total: int) -> Iterator[tuple[int, dict[str, str]]]:
        rows = told(pairs, lambda count: f"data: prepared {count:,} of {total:,} pairs of {split}")
        for row, pair in enumerate(rows):
            yield row, dict(zip(self.languages, pair, strict=True))


def _read(split: str, pairs: Iterator[Pair]) -> Iterator[Pair]:
    return told(pairs, lambda count: f"data: read {count:,} pairs of {split}")


def _shard_lengths(pairs: Iterator[Pair]) -> list[int]:
    """Cuts the pairs into shards of about _SHARD_BYTES: their counts."""
    lengths, count, size = [], 0, 0
    for source, target in pairs:
        count += 1
        size += len(source) + len(target)
        if size >= _SHARD_BYTES:
            lengths.append(count)
            count = size = 0
    return [*lengths, count] if count else lengths
