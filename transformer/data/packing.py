"""Packing: several sentences in one row, so that hardly a slot is padding.

Which lengths share a row is settled once, from the histogram of lengths alone; every epoch deals the
sentences of each pair of lengths anew over the places for them and shuffles the rows. So all epochs have
equally many batches, and any of them is known without those before it.

M sentences of a row at most; N examples, R rows of an epoch.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from transformer.config.schema import round_up
from transformer.data.batching import PADDING_ROW, Bucket, PlannedBatch, TrainPlan, even_parts, rows_for, shuffled

SLACK = 1.03  # width of source rows over what the mean ratio of lengths asks, so that targets fill the row


class Rows(NamedTuple):
    """Sentence lengths that share a row, for all rows: `counts_R[r]` classes from `classes`, one row after another."""

    classes: np.ndarray
    counts_R: np.ndarray


class PackedPlan(TrainPlan):
    """Batches of one shape whose rows hold several sentences, both sides of each in the same row.

    Rows have `max_length` target tokens and as many source tokens as suit the lengths, both rounded up to a multiple
    of `length_multiple`.
    """

    def __init__(
        self,
        source_N: np.ndarray,
        target_N: np.ndarray,
        *,
        batch_tokens: int,
        max_length: int,
        seed: int,
        length_multiple: int = 1,
    ):
        super().__init__(source_N, target_N, max_length, seed)
        if not self.kept:
            return
        source_N, target_N = source_N[self._kept], target_N[self._kept]
        # Sentences of equal lengths on both sides are of one class, and can stand in for each other.
        classes, self._class_N, counts = np.unique(
            source_N * (max_length + 1) + target_N, return_inverse=True, return_counts=True
        )
        sources, targets = np.divmod(classes, max_length + 1)
        target = round_up(max_length, length_multiple)
        suitable = max(round(SLACK * target * source_N.sum() / target_N.sum()), int(sources.max()))
        source = round_up(suitable, length_multiple)
        packed = pack(sources, targets, counts, source, target)
        self.buckets = [Bucket(source, target, rows_for(batch_tokens, target))]
        self._by_class = np.argsort(packed.classes, kind="stable")
        self._row_places = np.cumsum([0, *packed.counts_R])
        self._most = int(packed.counts_R.max())
        rows = self.buckets[0].rows
        self.steps_per_epoch = -(-len(packed.counts_R) // rows)
        self.batches = [self.steps_per_epoch]
        self.fill = int(target_N.sum()) / self.slots()

    def _plan_epoch(self, epoch: int) -> Callable[[int], PlannedBatch]:
        order = shuffled(self.kept, self.seed, epoch, 0)
        dealt = np.empty(self.kept, np.int64)
        dealt[self._by_class] = self._kept[order[np.argsort(self._class_N[order], kind="stable")]]
        rows = shuffled(len(self._row_places) - 1, self.seed, epoch, 1)
        parts = even_parts(rows, self.steps_per_epoch)
        # Made when asked for: a whole epoch as rectangles would be many times the size of the order itself.
        return lambda index: PlannedBatch(self.buckets[0], self._examples(dealt, parts[index]))

    def _examples(self, dealt: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """The examples of each of these rows and then padding: [rows of the batch, M]."""
        column = np.arange(self._most)
        place = self._row_places[rows][:, None] + column
        inside = place < self._row_places[rows + 1][:, None]
        examples_BM = np.full((self.buckets[0].rows, self._most), PADDING_ROW)
        examples_BM[: len(rows)][inside] = dealt[place[inside]]
        return examples_BM


def pack(sources: np.ndarray, targets: np.ndarray, counts: np.ndarray, source: int, target: int) -> Rows:
    """Best fit decreasing over a histogram of lengths.

    All rows that have the same room left are dealt with at once, so the work depends on the number of
    different lengths and hardly on that of sentences (in the spirit of Krell et al. 2021).

    Args:
      sources, targets, counts: the two lengths of each class, and how many sentences it has.
      source, target: slots of a row on each side; every class fits an empty one.
    """
    rooms = _Rooms(source, target)
    for index in np.argsort(-(sources / source + targets / target), kind="stable"):
        lengths, left = (int(sources[index]), int(targets[index])), int(counts[index])
        while left:
            rows = rooms.take(lengths, left)
            rooms.put(int(index), lengths, rows)
            left -= len(rows.numbers)
    return rooms.rows()


class _Taken(NamedTuple):
    """Some rows, and the room that each of them has."""

    numbers: np.ndarray
    room: tuple[int, int]


class _Rooms:
    """Rows by the room that they have left on each side."""

    def __init__(self, source: int, target: int):
        self._full = (source, target)
        self._opened = 0
        self._rows: dict[tuple[int, int], list[np.ndarray]] = {}
        self._slots: list[tuple[int, int]] = []  # rooms that some row has; the same in the two columns below
        self._columns = np.zeros((2, 64), np.int64)
        self._placed: list[tuple[int, np.ndarray]] = []

    def take(self, lengths: tuple[int, int], count: int) -> _Taken:
        """At most `count` rows of the one room that this pair of lengths fits best; new ones if it fits none."""
        (s, t), (full_s, full_t) = lengths, self._full
        left_s, left_t = self._columns[0, : len(self._slots)] - s, self._columns[1, : len(self._slots)] - t
        share_s, share_t = left_s / full_s, left_t / full_t
        # Room that is out of balance comes to waste, a large one hardly.
        waste = np.where((left_s >= 0) & (left_t >= 0), 20 * np.abs(share_s - share_t) + share_s + share_t, np.inf)
        slot = int(waste.argmin()) if len(waste) else -1
        if slot < 0 or np.isinf(waste[slot]):
            # As many as hold them all: sentences of one class share rows with each other too.
            new = -(-count // min(full_s // s, full_t // t))
            self._opened += new
            return _Taken(np.arange(self._opened - new, self._opened), self._full)
        room = self._slots[slot]
        numbers = np.concatenate(self._rows.pop(room))
        if len(numbers) > count:
            self._rows[room] = [numbers[count:]]
        else:
            self._close(slot)
        return _Taken(numbers[:count], room)

    def put(self, index: int, lengths: tuple[int, int], rows: _Taken) -> None:
        """One sentence of a class into each of these rows."""
        self._placed.append((index, rows.numbers))
        room = rows.room[0] - lengths[0], rows.room[1] - lengths[1]
        if min(room) == 0:
            return
        if room not in self._rows:
            self._open(room)
        self._rows.setdefault(room, []).append(rows.numbers)

    def _open(self, room: tuple[int, int]) -> None:
        if len(self._slots) == self._columns.shape[1]:
            self._columns = np.concatenate([self._columns, np.zeros_like(self._columns)], axis=1)
        self._columns[:, len(self._slots)] = room
        self._slots.append(room)

    def _close(self, slot: int) -> None:
        """The last room takes the place of one that no row has any more."""
        last = self._slots.pop()
        if slot < len(self._slots):
            self._slots[slot] = last
            self._columns[:, slot] = last

    def rows(self) -> Rows:
        """All of them, with what was put into each."""
        numbers = np.concatenate([numbers for _, numbers in self._placed])
        classes = np.repeat([index for index, _ in self._placed], [len(numbers) for _, numbers in self._placed])
        return Rows(classes[np.argsort(numbers, kind="stable")], np.bincount(numbers, minlength=self._opened))
