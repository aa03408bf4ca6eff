"""Packing: several sentences in one row, so that almost no token position is padding.

Which lengths share a row is decided once, from the histogram of lengths alone. Every epoch assigns the sentences of
each pair of lengths to the row positions of that pair in a new order, and shuffles the rows. So all epochs have equally
many batches, and each batch is known without those before it.

M sentences of a row at most; N examples, R rows of an epoch.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from transformer.data import schedule_store
from transformer.data.batching import (
    PAD_EXAMPLE,
    BatchSchedule,
    BatchSpec,
    Bucket,
    LengthArray,
    id_dtype,
    part_bounds,
    permutation,
    rows_per_batch,
)
from transformer.data.schedule_store import Facts
from transformer.runtime.rounding import round_up

SOURCE_SLACK = 1.03  # source width over what the mean length ratio requires, so that the targets fill the row


class PackedRows(NamedTuple):
    """The classes of sentences in each row: `counts_R[r]` elements of `classes` for each row in turn."""

    classes: np.ndarray
    counts_R: np.ndarray


class PackedSchedule(BatchSchedule):
    """Batches of one shape whose rows hold several sentences, both sides of each in the same row.

    Rows have `max_length` target tokens and as many source tokens as suit the lengths, both rounded up to a multiple
    of `length_multiple`.
    """

    def __init__(
        self,
        source_N: LengthArray,
        target_N: LengthArray,
        *,
        batch_tokens: int,
        max_length: int,
        seed: int,
        length_multiple: int = 1,
        store: schedule_store.Store | None = None,
    ):
        super().__init__(source_N, target_N, max_length, seed, store)
        self._batch_tokens, self._length_multiple = batch_tokens, length_multiple
        packed: list[np.ndarray] = []  # if the facts are computed now

        def plan() -> Facts:
            facts, rows = self._pack()
            packed.append(rows)
            return facts

        facts = self._store.facts(plan)
        self._set_facts(facts)
        self._num_rows, self._max_per_row = facts["rows"], facts["max_per_row"]
        if not self.kept:
            return
        stored = self._store.array(
            "rows", lambda: packed[0] if packed else self._pack()[1], self.kept + self._num_rows + 1
        )
        self._positions_by_class, self._row_offsets = stored[: self.kept], stored[self.kept :]

    def _pack(self) -> tuple[Facts, np.ndarray]:
        """Facts; then the positions of the sentences by class and the position at which each row starts."""
        # Sentences with equal lengths on both sides form a class and are interchangeable.
        base = self._max_length + 1
        classes, counts = np.zeros(0, np.int64), np.zeros(0, np.int64)
        for _, source_N, target_N in self._kept_parts():
            found, found_counts = np.unique(source_N * base + target_N, return_counts=True)
            classes, index = np.unique(np.concatenate([classes, found]), return_inverse=True)
            counts = np.bincount(index, weights=np.concatenate([counts, found_counts])).astype(np.int64)
        if not len(classes):
            facts = {"kept": 0, "buckets": [], "batches": [], "target_tokens": 0, "rows": 0, "max_per_row": 0}
            return facts, np.zeros(1, np.int32)
        sources, targets = np.divmod(classes, base)
        target = round_up(self._max_length, self._length_multiple)
        source_tokens, target_tokens = int((sources * counts).sum()), int((targets * counts).sum())
        suitable = max(round(SOURCE_SLACK * target * source_tokens / target_tokens), int(sources.max()))
        source = round_up(suitable, self._length_multiple)
        packed = pack(sources, targets, counts, source, target)
        bucket = Bucket(source, target, rows_per_batch(self._batch_tokens, target))
        rows, kept = len(packed.counts_R), int(counts.sum())
        stored = np.empty(kept + rows + 1, id_dtype(len(self._source_N)))
        stored[:kept] = np.argsort(packed.classes, kind="stable")
        stored[kept] = 0
        stored[kept + 1 :] = np.cumsum(packed.counts_R)
        facts = {"kept": kept, "buckets": [bucket], "batches": [-(-rows // bucket.rows)], "rows": rows}
        return {**facts, "target_tokens": target_tokens, "max_per_row": int(packed.counts_R.max())}, stored

    def _plan_epoch(self, epoch: int) -> Callable[[int], BatchSpec]:
        planned = self._store.array(f"epoch-{epoch}", lambda: self._order(epoch), self.kept + self._num_rows)
        assigned, rows = planned[: self.kept], planned[self.kept :]

        def spec(index: int) -> BatchSpec:
            start, end = part_bounds(self._num_rows, self.steps_per_epoch, index)
            # Padded to [rows, M] on request: for a whole epoch that would take many times the memory of `assigned`.
            return BatchSpec(self.buckets[0], self._examples(assigned, np.array(rows[start:end], np.int64)))

        return spec

    def _order(self, epoch: int) -> np.ndarray:
        # Positions number the sentences of all rows, one row after another. With classes a b | b of 2 rows, the
        # positions of a are [0], those of b [1 2]. If the kept examples 0, 1, 2 have the classes b a b and their
        # order in this epoch is 2 0 1, example 1 gets position 0, example 2 position 1 and example 0 position 2.
        dtype = id_dtype(len(self._source_N))
        kept, class_N, end = np.empty(self.kept, dtype), np.empty(self.kept, np.int32), 0
        if (self._max_length + 1) ** 2 > 1 << 31:
            class_N = class_N.astype(np.int64)
        for ids, source, target in self._kept_parts():
            kept[end : end + len(ids)] = ids
            class_N[end : end + len(ids)] = source * (self._max_length + 1) + target
            end += len(ids)
        order = permutation(self.kept, self.seed, epoch, 0)
        planned = np.empty(self.kept + self._num_rows, dtype)
        planned[self._positions_by_class] = kept[order[np.argsort(class_N[order], kind="stable")]]
        planned[self.kept :] = permutation(self._num_rows, self.seed, epoch, 1)
        return planned

    def _examples(self, assigned: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """The examples of these rows, then empty rows: [rows of the batch, M]."""
        starts, ends = (np.asarray(self._row_offsets[index], np.int64)[:, None] for index in (rows, rows + 1))
        positions = starts + np.arange(self._max_per_row)
        is_real = positions < ends
        examples_BM = np.full((self.buckets[0].rows, self._max_per_row), PAD_EXAMPLE)
        examples_BM[: len(rows)][is_real] = assigned[positions[is_real]]
        return examples_BM


def pack(sources: np.ndarray, targets: np.ndarray, counts: np.ndarray, source: int, target: int) -> PackedRows:
    """Best fit decreasing over a histogram of lengths.

    Handles all rows with equal free space at once, so the time depends on the number of different lengths and hardly
    on the number of sentences (in the spirit of Krell et al. 2021).

    Args:
      sources, targets, counts: the two lengths of each class, and its number of sentences.
      source, target: token positions of a row on each side; every class fits into an empty row.
    """
    open_rows = _OpenRows(source, target)
    for index in np.argsort(-(sources / source + targets / target), kind="stable"):
        lengths, remaining = (int(sources[index]), int(targets[index])), int(counts[index])
        while remaining:
            group = open_rows.allocate(lengths, remaining)
            open_rows.place(int(index), lengths, group)
            remaining -= len(group.rows)
    return open_rows.packed()


class _RowGroup(NamedTuple):
    """Rows with equal free space: their indices, and the free (source, target) token positions of each."""

    rows: np.ndarray
    free: tuple[int, int]


class _OpenRows:
    """Rows grouped by their free space on each side."""

    def __init__(self, source: int, target: int):
        self._capacity = (source, target)
        self._num_rows = 0
        self._rows: dict[tuple[int, int], list[np.ndarray]] = {}
        self._free: list[tuple[int, int]] = []  # the keys of `_rows`; the same in the first columns of `_free_array`
        self._free_array = np.zeros((2, 64), np.int64)
        self._placed: list[tuple[int, np.ndarray]] = []

    def allocate(self, lengths: tuple[int, int], count: int) -> _RowGroup:
        """At most `count` rows with the free space that these lengths fit best; new rows if they fit nowhere."""
        (s, t), (full_s, full_t) = lengths, self._capacity
        left_s, left_t = self._free_array[0, : len(self._free)] - s, self._free_array[1, : len(self._free)] - t
        share_s, share_t = left_s / full_s, left_t / full_t
        # Prefer rows whose remaining source and target space are balanced: unbalanced space is wasted in the end.
        waste = np.where((left_s >= 0) & (left_t >= 0), 20 * np.abs(share_s - share_t) + share_s + share_t, np.inf)
        best = int(waste.argmin()) if len(waste) else -1
        if best < 0 or np.isinf(waste[best]):
            # Enough for `count` sentences of this class, since they share rows with each other too.
            num_new = -(-count // min(full_s // s, full_t // t))
            self._num_rows += num_new
            return _RowGroup(np.arange(self._num_rows - num_new, self._num_rows), self._capacity)
        free = self._free[best]
        rows = np.concatenate(self._rows.pop(free))
        if len(rows) > count:
            self._rows[free] = [rows[count:]]
        else:
            self._remove(best)
        return _RowGroup(rows[:count], free)

    def place(self, class_index: int, lengths: tuple[int, int], group: _RowGroup) -> None:
        """Adds a sentence of the class to each row of the group."""
        self._placed.append((class_index, group.rows))
        free = group.free[0] - lengths[0], group.free[1] - lengths[1]
        if min(free) == 0:
            return
        if free not in self._rows:
            self._add(free)
        self._rows.setdefault(free, []).append(group.rows)

    def _add(self, free: tuple[int, int]) -> None:
        if len(self._free) == self._free_array.shape[1]:
            self._free_array = np.concatenate([self._free_array, np.zeros_like(self._free_array)], axis=1)
        self._free_array[:, len(self._free)] = free
        self._free.append(free)

    def _remove(self, index: int) -> None:
        """Removes an entry of `_free`; the last entry takes its index."""
        last = self._free.pop()
        if index < len(self._free):
            self._free[index] = last
            self._free_array[:, index] = last

    def packed(self) -> PackedRows:
        """All rows with their classes."""
        rows = np.concatenate([rows for _, rows in self._placed])
        classes = np.repeat([index for index, _ in self._placed], [len(rows) for _, rows in self._placed])
        return PackedRows(classes[np.argsort(rows, kind="stable")], np.bincount(rows, minlength=self._num_rows))
