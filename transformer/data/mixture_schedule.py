"""The batch schedule of a mixture: as without a mixture, a pure function (seed, step, lengths) → batch.

Steps are divided into rounds, each of which is planned by itself. A round has a fixed number of batches of each shape
and, up to rounding, a fixed number of pairs of each entry and shape, in proportion to the shares, both spread evenly.
How often an entry and shape was drawn before a round follows from the round's number. From there on an entry continues
its own epochs, in each of which every pair of it occurs once, in a new order. A stage, which has other shares, begins a
new round; what is left of the last one is passed over.

E entries, K shapes of batches.
"""

import bisect
import functools
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from transformer.config import mixture
from transformer.config.schema import DataConfig
from transformer.data import schedule_store
from transformer.data.batching import (
    BatchSchedule,
    BatchSpec,
    Bucket,
    LengthArray,
    assign_buckets,
    choose_buckets,
    group_by_bucket,
    id_dtype,
    kept_parts,
    permutation,
    planned_batches,
)
from transformer.data.schedule_store import Facts
from transformer.runtime.errors import UserError
from transformer.runtime.files import json_digest

SCHEDULE_VERSION = 2  # increased whenever the same lengths give other batches
ROUND_EXAMPLES = 1 << 16  # of a round, at least
ROUND_BATCHES = 16  # of each shape in a round, on average at least
SAMPLE_PAIRS = 1 << 18  # whose lengths decide the shapes
LARGE = 1 << 20  # pairs of an entry and shape from which on their order is kept in a file
PRECISION = 1 << 20  # of the pairs of an entry and shape in a round, which is a fraction


class _Stage(NamedTuple):
    """Rounds with the same shares.

    Attributes:
      start: updates before it.
      first_round: rounds before it.
      shares: of each entry.
      num_batches: of each shape in a round.
      pairs: [E][K], of a round; a fraction, of which rounds take the integer parts in turn.
      drawn: [E][K], pairs drawn before it.
    """

    start: int
    first_round: int
    shares: list[float]
    num_batches: list[int]
    pairs: list[list[Fraction]]
    drawn: list[list[int]]

    @property
    def steps(self) -> int:
        """Updates of a round."""
        return sum(self.num_batches)

    def drawn_after(self, rounds: int) -> list[list[int]]:
        """[E][K], pairs drawn before the stage and in so many rounds of it."""
        return [
            [before + int(rounds * count) for before, count in zip(*row, strict=True)]
            for row in zip(self.drawn, self.pairs, strict=True)
        ]


class MixtureSchedule(BatchSchedule):
    """Batches with one sentence a row from several entries, in shapes by length that all entries share.

    The attributes of `BatchSchedule` are those of the first round in place of an epoch; `num_batches` are the most of
    any stage. Example ids count through the entries.

    Attributes:
      pairs: the number of kept pairs of each entry.
    """

    period = "a round of the mixture"

    def __init__(
        self,
        data: DataConfig,
        lengths: Sequence[tuple[LengthArray, LengthArray]],
        *,
        batch_tokens: int,
        seed: int,
        store_of: Callable[[str], schedule_store.Store] = lambda name: schedule_store.Store(),
    ):
        """Plans the rounds.

        Args:
          data: with the mixture.
          lengths: of sources and targets of each entry, tags included.
          batch_tokens: as in `choose_buckets`.
          seed: of the order.
          store_of: the store of a part of the schedule, by name.
        """
        store = store_of("mixture")
        super().__init__(np.zeros(0), np.zeros(0), data.max_length, seed, store)
        self._data, self._lengths, self._batch_tokens, self._store_of = data, lengths, batch_tokens, store_of
        self._starts = np.cumsum([0, *(len(source) for source, _ in lengths)])
        facts = self._store.facts(self._measure)
        self.pairs: list[int] = facts["pairs"]
        self.buckets = [Bucket(*bucket) for bucket in facts["buckets"]]
        self._members: list[list[int]] = facts["members"]
        self.kept = sum(self.pairs)
        self.dropped = int(self._starts[-1]) - self.kept
        self._first_members = np.cumsum([0, *(count for row in self._members for count in row)])
        self._member_ids = self._store.array("members", self._collect, self.kept)
        self._stages = self._plan_stages()
        self.num_batches = np.max([stage.num_batches for stage in self._stages], axis=0).tolist()
        self.steps_per_epoch = self._stages[0].steps
        self.fill = self._fill(self._stages[0], facts["target_tokens"])
        self._order_of = functools.lru_cache(maxsize=4 * len(lengths) * len(self.buckets))(self._order_members)

    def batch(self, step: int) -> BatchSpec:
        """The global batch of update `step`, counted from 0."""
        stage = self._stages[bisect.bisect_right(self._stages, step, key=lambda stage: stage.start) - 1]
        rounds, index = divmod(step - stage.start, stage.steps)
        return self._epoch(stage.first_round + rounds)(index)

    def summary(self) -> list[str]:
        """The shares of each stage."""
        lines = []
        for stage in self._stages:
            parts = [
                f"{entry.source_language}-{entry.target_language} {share:.1%} of {count:,} pairs"
                + "".join(f", {tag}" for tag in mixture.tags_of(entry))
                for entry, share, count in zip(self._data.mixture, stage.shares, self.pairs, strict=True)
                if share
            ]
            lines.append(f"mixture from update {stage.start + 1:,} on: {' · '.join(parts)}")
        return lines

    def examples(self, num_steps: int) -> list[float]:
        """About how many examples of each entry the first updates have."""
        totals = [0.0] * len(self._lengths)
        ends = [*(stage.start for stage in self._stages[1:]), num_steps]
        for stage, end in zip(self._stages, ends, strict=True):
            rounds = max(min(end, num_steps) - stage.start, 0) / stage.steps
            totals = [total + rounds * float(sum(row)) for total, row in zip(totals, stage.pairs, strict=True)]
        return totals

    def _parts(self, index: int) -> Any:
        """Ids within the source, source and target lengths of the kept pairs of an entry, in parts."""
        return kept_parts(*self._lengths[index], self._max_length)

    def _measure(self) -> Facts:
        """Counts the pairs, chooses the shapes, and counts pairs and target tokens of each entry and shape."""
        pairs = [sum(len(ids) for ids, _, _ in self._parts(index)) for index in range(len(self._lengths))]
        for number, (entry, count) in enumerate(zip(self._data.mixture, pairs, strict=True), 1):
            if not count:
                with mixture.entry_errors(number, entry):
                    raise UserError(
                        f"all {len(self._lengths[number - 1][0]):,} training pairs are longer than data.max_length = "
                        f"{self._max_length} tokens, tags included; raise it, or leave the entry out"
                    )
        source_N, target_N = self._sample_lengths(pairs)
        buckets = choose_buckets(
            source_N, target_N, self._data.num_buckets, self._batch_tokens, self._data.length_multiple
        )
        members = np.zeros((len(pairs), len(buckets)), np.int64)
        tokens = np.zeros((len(pairs), len(buckets)), np.int64)
        for index in range(len(pairs)):
            for _, source, target in self._parts(index):
                bucket_N = assign_buckets(source, target, buckets)
                members[index] += np.bincount(bucket_N, minlength=len(buckets))
                tokens[index] += np.bincount(bucket_N, weights=target, minlength=len(buckets)).astype(np.int64)
        counts = {"members": members.tolist(), "target_tokens": tokens.tolist()}
        return {"pairs": pairs, "buckets": buckets, **counts}

    def _sample_lengths(self, pairs: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Source and target lengths of pairs by the shares of their entries, and of one as long as the longest."""
        lengths: list[tuple[Any, Any]] = []
        longest_source = longest_target = 1
        for index, share in enumerate(mixture.shares(self._data, pairs)):
            count = max(round(share * SAMPLE_PAIRS), 1)
            chosen = np.arange(count) * pairs[index] // count
            first = 0
            for ids, source, target in self._parts(index):
                start, stop = np.searchsorted(chosen, [first, first + len(ids)])
                here = chosen[start:stop] - first
                lengths.append((source[here], target[here]))
                longest_source, longest_target = max(longest_source, source.max()), max(longest_target, target.max())
                first += len(ids)
        lengths.append(([longest_source], [longest_target]))
        source_N, target_N = (np.concatenate(side) for side in zip(*lengths, strict=True))
        return source_N, target_N

    def _collect(self) -> np.ndarray:
        """Example ids of the kept pairs, by entry, then by shape."""
        members = np.empty(self.kept, id_dtype(int(self._starts[-1])))
        first_members = self._first_members[:-1].reshape(len(self._lengths), -1)
        for index, first_id in enumerate(self._starts[:-1]):
            group_by_bucket(members, self._parts(index), self.buckets, first_members[index], int(first_id))
        return members

    def _plan_stages(self) -> list[_Stage]:
        stages: list[_Stage] = []
        examples = max(ROUND_EXAMPLES, ROUND_BATCHES * sum(bucket.rows for bucket in self.buckets))
        for start, entries in mixture.stages(self._data):
            if not entries:  # no update of the run is in it, which the config was checked for
                continue
            shares = mixture.shares(self._data, self.pairs, entries)
            columns, batches = [], []
            for bucket, counts in zip(self.buckets, zip(*self._members, strict=True), strict=True):
                rates = zip(shares, self.pairs, counts, strict=True)
                column, number = _round_column(
                    [examples * share * count / kept for share, kept, count in rates], bucket.rows
                )
                columns.append(column)
                batches.append(number)
            pairs = [list(row) for row in zip(*columns, strict=True)]
            first_round, drawn = 0, [[0] * len(self.buckets) for _ in self._lengths]
            if stages:
                before = stages[-1]
                rounds = -(-(start - before.start) // before.steps)
                first_round, drawn = before.first_round + rounds, before.drawn_after(rounds)
            stages.append(_Stage(start, first_round, shares, batches, pairs, drawn))
        return stages

    def _fill(self, stage: _Stage, tokens: Sequence[Sequence[int]]) -> float:
        """Target tokens divided by target token positions, in a round."""
        real = sum(
            float(pairs) * own / count
            for rows in zip(stage.pairs, tokens, self._members, strict=True)
            for pairs, own, count in zip(*rows, strict=True)
            if count
        )
        return real / sum(n * b.rows * b.target for n, b in zip(stage.num_batches, self.buckets, strict=True))

    def _plan_epoch(self, epoch: int) -> Callable[[int], BatchSpec]:
        """Maps an index in a round to its batch."""
        stage = self._stages[bisect.bisect_right(self._stages, epoch, key=lambda stage: stage.first_round) - 1]
        drawn, after = (stage.drawn_after(epoch - stage.first_round + n) for n in (0, 1))
        sizes = [sum(b) - sum(a) for a, b in zip(zip(*drawn, strict=True), zip(*after, strict=True), strict=True)]
        planned = self._store.array(
            f"epoch-{epoch}", lambda: self._order(epoch, drawn, after, stage.num_batches), sum(sizes) + stage.steps
        )
        return planned_batches(planned, self.buckets, sizes, stage.num_batches)

    def _order(self, epoch: int, drawn: list[list[int]], after: list[list[int]], batches: list[int]) -> np.ndarray:
        """The pairs of a round, one shape after another, then the order of its batches."""
        planned = []
        for bucket in range(len(self.buckets)):
            parts = [
                self._draw(index, bucket, drawn[index][bucket], after[index][bucket])
                for index in range(len(self._lengths))
            ]
            planned.append(np.concatenate(parts)[interleave([len(part) for part in parts], self.seed, epoch, bucket)])
        planned.append(interleave(batches, self.seed, epoch, len(self.buckets)))
        return np.concatenate(planned).astype(id_dtype(int(self._starts[-1])))

    def _draw(self, index: int, bucket: int, start: int, end: int) -> np.ndarray:
        """Pairs of an entry and shape: those drawn after `start` others and before `end`."""
        size, parts = self._members[index][bucket], [np.zeros(0, np.int64)]
        while start < end:
            epoch, first = divmod(start, size)
            stop = min(size, first + end - start)
            parts.append(self._order_of(index, bucket, epoch)[first:stop])
            start += stop - first
        return np.concatenate(parts)

    def _order_members(self, index: int, bucket: int, epoch: int) -> np.ndarray:
        """The pairs of an entry and shape in the order of an epoch of theirs."""
        number = index * len(self.buckets) + bucket
        first, last = self._first_members[number : number + 2]

        def order() -> np.ndarray:
            return self._member_ids[first:last][permutation(int(last - first), self.seed, index, bucket, epoch)]

        if last - first < LARGE:
            return order()
        return self._store_of(f"entry-{index}-{bucket}").array(f"epoch-{epoch}", order, int(last - first))


def _round_column(counts: Sequence[float], rows: int) -> tuple[list[Fraction], int]:
    """Pairs of each entry in a round, of one shape with so many rows, and the number of batches, none of them empty.

    The pairs are fractions, of which rounds take the integer parts in turn; integers where too few of them would leave
    a batch empty.
    """
    column = [Fraction(max(round(count * PRECISION), 1), PRECISION) if count else Fraction(0) for count in counts]
    batches = -(-sum(map(math.ceil, column)) // rows)
    if sum(map(math.floor, column)) < batches:
        column = [Fraction(max(round(count), 1)) if count else Fraction(0) for count in column]
        batches = -(-int(sum(column)) // rows)
    return column, batches


def interleave(sizes: Sequence[int], *key: int) -> np.ndarray:
    """An order of the elements of several lists, one list after another, that spreads each list evenly.

    Element k of a list with n elements is put at a random place between k / n and (k + 1) / n of the whole.
    """
    bits = np.random.Philox(np.random.SeedSequence(key)).random_raw(sum(sizes))
    within = np.concatenate([np.zeros(0), *(np.arange(size) for size in sizes)])
    return np.argsort((within + bits / 2.0**64) / np.repeat(np.array(sizes, float), sizes), kind="stable")


def store_key(data: DataConfig, pairs: Sequence[int], options: dict[str, Any]) -> str:
    """Identifies the schedule of a mixture among those of the same token ids; `pairs` of each entry."""
    entries = mixture.without_paths(data.mixture)
    parts = [SCHEDULE_VERSION, entries, data.mixture_temperature, list(pairs), options]
    return json_digest(parts)[:24]
