"""The plan of global batches: a pure function of (seed, step, lengths), the same on every host.

Lengths count tokens with EOS. A plan names example ids only; hosts slice its rows and read what it
names. Whatever the number of hosts or devices, and after any resume, step n holds the same examples.

B rows of the global batch, S source length, T target length, N examples.
"""

import abc
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from transformer.config.schema import round_up
from transformer.data.tokenizer import PAD

ROW_MULTIPLE = 8  # rows divide evenly over 1, 2, 4 and 8 devices
FIT = 0.95  # share of a bucket's sources that its width must hold; the others go one bucket up
FINEST = 256  # widths told apart when buckets are chosen
PADDING_ROW = -1


class Batch(NamedTuple):
    """Ids int32: in each row sentences that end in EOS, one or in a packed batch several, and then PAD.

    NumPy arrays on the host, JAX arrays on the devices.
    """

    source_BS: Any
    target_BT: Any


class Bucket(NamedTuple):
    """One fixed batch shape."""

    source: int
    target: int
    rows: int


class PlannedBatch(NamedTuple):
    """The shape of a global batch and the example of each row, PADDING_ROW where there is none.

    Packed rows name several examples each: [B, M].
    """

    bucket: Bucket
    examples_B: np.ndarray


class Ragged:
    """Sequences of different lengths in one flat array: sequence i is flat[offsets[i] : offsets[i + 1]]."""

    def __init__(self, flat: np.ndarray, offsets: np.ndarray):
        self.flat, self.offsets = flat, offsets
        self.lengths = np.diff(offsets)

    def __len__(self) -> int:
        return len(self.lengths)

    @classmethod
    def from_sequences(cls, sequences: Sequence[np.ndarray]) -> "Ragged":
        offsets = np.cumsum([0, *(len(sequence) for sequence in sequences)], dtype=np.int64)
        return cls(np.concatenate([*sequences, np.zeros(0, np.int32)]).astype(np.int32), offsets)

    def rectangle(self, examples: np.ndarray, width: int) -> np.ndarray:
        """int32 [B, width]: the sequences of each row one after another, then PAD.

        Args:
          examples: [B] or [B, M]; PADDING_ROW stands for none. Those of a row must fit together, except
            that a single one is cut.
        """
        examples_BM = examples.reshape(len(examples), -1)
        real = examples_BM != PADDING_ROW
        safe = np.where(real, examples_BM, 0)
        lengths_BM = np.where(real, np.minimum(self.lengths[safe], width), 0)
        ends = lengths_BM.cumsum()
        within = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - lengths_BM.ravel(), lengths_BM.ravel())
        starts_BM = lengths_BM.cumsum(1) - lengths_BM + np.arange(len(examples))[:, None] * width
        out = np.full((len(examples), width), PAD, np.int32)
        place = np.repeat(starts_BM.ravel(), lengths_BM.ravel()) + within
        out.ravel()[place] = self.flat[np.repeat(self.offsets[safe].ravel(), lengths_BM.ravel()) + within]
        return out


def assemble(planned: PlannedBatch, source: Ragged, target: Ragged) -> Batch:
    """The rectangles that a plan names."""
    bucket, examples_B = planned
    return Batch(source.rectangle(examples_B, bucket.source), target.rectangle(examples_B, bucket.target))


def choose_buckets(
    source_N: np.ndarray, target_N: np.ndarray, num_buckets: int, batch_tokens: int, length_multiple: int = 1
) -> list[Bucket]:
    """At most `num_buckets` shapes that waste the least padding on these lengths.

    Target widths are chosen by dynamic programming over all ways to cut the range of target lengths;
    a bucket's source width holds all but the longest few of its sources, and those move up. Rows are
    as many as `batch_tokens` target tokens allow, in multiples of 8 where there are 8. Widths are multiples of
    `length_multiple`.
    """
    longest = int(max(target_N.max(), source_N.max()))
    unit = round_up(-(-longest // FINEST), length_multiple)  # for long sequences, widths in larger steps
    widths = _choose_widths(-(-source_N // unit), -(-target_N // unit), num_buckets)
    return [Bucket(s * unit, t * unit, rows_for(batch_tokens, t * unit)) for s, t in widths]


def _choose_widths(source_N: np.ndarray, target_N: np.ndarray, num_buckets: int) -> list[tuple[int, int]]:
    """Source and target widths of the buckets."""
    longest = int(target_N.max())
    counts = np.zeros((longest + 1, int(source_N.max()) + 1), np.int64)
    np.add.at(counts, (target_N, source_N), 1)
    upto = counts.cumsum(0).cumsum(1)  # upto[t, s]: pairs with target ≤ t and source ≤ s
    cost = np.full((longest + 1, longest + 1), np.inf)  # cost[a, b]: slots of a bucket for targets in (a, b]
    width = np.zeros((longest + 1, longest + 1), np.int64)
    for end in range(1, longest + 1):
        inside = upto[end] - upto[:end]
        total = inside[:, -1]
        width[:end, end] = (inside >= np.ceil(FIT * total)[:, None]).argmax(1)
        cost[:end, end] = total * (end + width[:end, end])
    buckets, widest = [], 0
    for start, end in _cheapest_cuts(cost, num_buckets):
        last = end == longest
        widest = max(widest, int(source_N.max()) if last else int(width[start, end]))
        buckets.append((max(widest, 1), end))
    return buckets


def _cheapest_cuts(cost: np.ndarray, num_buckets: int) -> list[tuple[int, int]]:
    """Cuts 0 … n into at most `num_buckets` intervals of least total cost."""
    n = len(cost) - 1
    best, back = cost[0].copy(), [np.zeros(n + 1, np.int64)]
    best[0] = 0
    for _ in range(num_buckets - 1):
        through = best[:, None] + cost
        cheaper = through.min(0) < best
        back.append(np.where(cheaper, through.argmin(0), back[0] * 0 - 1))
        best = np.minimum(best, through.min(0))
    intervals, end = [], n
    for cut in reversed(back):
        if end and cut[end] >= 0:
            intervals.append((int(cut[end]), end))
            end = int(cut[end])
    return intervals[::-1]


def rows_for(batch_tokens: int, width: int) -> int:
    """Rows of a batch of `batch_tokens` slots, in multiples of 8 where there are 8."""
    rows = max(batch_tokens // width, 1)
    return rows if rows < ROW_MULTIPLE else rows - rows % ROW_MULTIPLE


def assign(source_N: np.ndarray, target_N: np.ndarray, buckets: Sequence[Bucket]) -> np.ndarray:
    """The first bucket that holds each pair, int [N]; -1 where none does."""
    bucket_N = np.full(len(source_N), -1)
    for index in reversed(range(len(buckets))):
        bucket_N[(source_N <= buckets[index].source) & (target_N <= buckets[index].target)] = index
    return bucket_N


def shuffled(n: int, *key: int) -> np.ndarray:
    """A permutation of 0 … n - 1 drawn from `key`, by raw random bits, whose stream NumPy never changes."""
    bits = np.random.Philox(np.random.SeedSequence(key)).random_raw(n)
    return np.argsort(bits, kind="stable")


class TrainPlan(abc.ABC):
    """Batches without end: every epoch holds each kept pair once, in an order of its own.

    Attributes:
      buckets: the shapes, shortest first.
      kept, dropped: how many pairs have both sides within `max_length` tokens, and how many have not.
      batches: how many of each shape an epoch has; the same for all.
      steps_per_epoch: their sum.
      fill: real target tokens over target slots.
    """

    def __init__(self, source_N: np.ndarray, target_N: np.ndarray, max_length: int, seed: int):
        self._kept = np.flatnonzero((source_N <= max_length) & (target_N <= max_length))
        self.kept, self.dropped, self.seed = len(self._kept), len(source_N) - len(self._kept), seed
        self.buckets: list[Bucket] = []
        self.batches: list[int] = []
        self.steps_per_epoch, self.fill = 0, 0.0
        self._epoch = functools.lru_cache(maxsize=2)(self._plan_epoch)

    def batch(self, step: int) -> PlannedBatch:
        """The global batch of update `step`, counted from 0."""
        epoch, index = divmod(step, self.steps_per_epoch)
        return self._epoch(epoch)(index)

    def slots(self, filled: Callable[[int], int] = lambda rows: rows) -> int:
        """Target slots of an epoch, where batches of so many rows are filled up to `filled` of that."""
        return sum(n * filled(b.rows) * b.target for n, b in zip(self.batches, self.buckets, strict=True))

    @abc.abstractmethod
    def _plan_epoch(self, epoch: int) -> Callable[[int], PlannedBatch]:
        """The batches of an epoch by their number in it, a function of the seed and the lengths alone."""


class BucketPlan(TrainPlan):
    """Batches of rows of one sentence each, in a few shapes by length."""

    def __init__(
        self,
        source_N: np.ndarray,
        target_N: np.ndarray,
        *,
        num_buckets: int,
        batch_tokens: int,
        max_length: int,
        seed: int,
        length_multiple: int = 1,
    ):
        super().__init__(source_N, target_N, max_length, seed)
        if not self.kept:
            return
        kept_source, kept_target = source_N[self._kept], target_N[self._kept]
        self.buckets = choose_buckets(kept_source, kept_target, num_buckets, batch_tokens, length_multiple)
        bucket_N = assign(kept_source, kept_target, self.buckets)
        self._members = [self._kept[bucket_N == index] for index in range(len(self.buckets))]
        self.batches = [-(-len(m) // b.rows) for m, b in zip(self._members, self.buckets, strict=True)]
        self.steps_per_epoch = sum(self.batches)
        self.fill = int(kept_target.sum()) / self.slots()

    def _plan_epoch(self, epoch: int) -> Callable[[int], PlannedBatch]:
        planned: list[PlannedBatch] = []
        for index, (bucket, members) in enumerate(zip(self.buckets, self._members, strict=True)):
            order = members[shuffled(len(members), self.seed, epoch, index)]
            parts = even_parts(order, self.batches[index])
            planned += [PlannedBatch(bucket, _padded(part, bucket.rows)) for part in parts]
        order = shuffled(len(planned), self.seed, epoch, len(self.buckets))
        return lambda index: planned[order[index]]


def even_parts(order: np.ndarray, parts: int) -> list[np.ndarray]:
    """An epoch's rows as batches of even size, so that none has so few tokens that they weigh far more than others."""
    return [part for part in np.array_split(order, max(parts, 1)) if len(part)]


def ladder(length: int, smallest: int = 16) -> int:
    """The width evaluation gives a sequence: the next power of two, so its shape depends on itself alone."""
    return max(smallest, 1 << (length - 1).bit_length())


def eval_plan(source_N: np.ndarray, target_N: np.ndarray, rows_of: Callable[[int], int]) -> list[PlannedBatch]:
    """Every pair exactly once, in batches of `rows_of(width)`; the last of each width is filled with padding rows.

    Pairs of a width are sorted by length, so that those of a batch take about as long to translate.
    """
    widths_N = np.array([ladder(int(n)) for n in np.maximum(source_N, target_N)], np.int64)
    planned = []
    for width in np.unique(widths_N):
        rows = rows_of(int(width))
        bucket = Bucket(int(width), int(width), rows)
        members = np.flatnonzero(widths_N == width)
        members = members[np.argsort(np.maximum(source_N, target_N)[members], kind="stable")]
        planned += [PlannedBatch(bucket, _padded(members[i : i + rows], rows)) for i in range(0, len(members), rows)]
    return planned


def _padded(examples: np.ndarray, rows: int) -> np.ndarray:
    """Padding rows at the end, up to so many."""
    missing = ((0, rows - len(examples)), *((0, 0),) * (examples.ndim - 1))
    return np.pad(examples, missing, constant_values=PADDING_ROW)


def only_rows(planned: PlannedBatch, rows: np.ndarray) -> PlannedBatch:
    """Some rows of a global batch by their numbers, such as those of one host; numbers past its end are padding."""
    examples_B = _padded(planned.examples_B, max(int(rows.max(initial=-1)) + 1, len(planned.examples_B)))
    return PlannedBatch(planned.bucket, examples_B[rows])
