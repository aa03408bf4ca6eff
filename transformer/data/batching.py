"""Bucketing and the batch schedule: a pure function (seed, step, lengths) → global batch, the same on every host.

Lengths count tokens with EOS. A schedule names example ids only; each host slices its rows of a batch and reads
those examples. Step n holds the same examples for any number of hosts or devices and after any resume.

B rows of the global batch, S source length, T target length, N examples.
"""

import abc
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from transformer.data import schedule_store
from transformer.data.schedule_store import Facts
from transformer.data.tokenizer import PAD
from transformer.runtime.rounding import round_up

ROW_MULTIPLE = 8  # rows divide evenly over 1, 2, 4 and 8 devices
SOURCE_COVERAGE = 0.95  # share of a bucket's sources that fit its width; the rest move up to the next bucket
MAX_CANDIDATE_WIDTHS = 256  # lengths above this are considered in coarser steps when buckets are chosen
PAD_EXAMPLE = -1  # in place of an example id: an empty row
PART_PAIRS = 1 << 18  # lengths are read so many at a time


class Batch(NamedTuple):
    """int32 ids. A row holds one sentence, or several if packed, each ending in EOS; the rest is PAD.

    NumPy arrays on the host, JAX arrays on the devices.
    """

    source_BS: Any
    target_BT: Any


class Bucket(NamedTuple):
    """One fixed batch shape."""

    source: int
    target: int
    rows: int


class BatchSpec(NamedTuple):
    """The shape of a global batch and the example id of each row; PAD_EXAMPLE marks an empty row.

    Packed rows name several examples each: [B, M].
    """

    bucket: Bucket
    examples_B: np.ndarray


def span_index(starts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The indices start … start + length - 1 of all spans, one span after another, and where each span begins and ends.

    Example: starts 7, 3 and lengths 2, 1 give the indices 7, 8, 3 and the offsets 0, 2, 3.
    """
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    return np.repeat(starts - offsets[:-1], lengths) + np.arange(offsets[-1]), offsets


class JaggedArray:
    """Sequences of different lengths in one flat array: sequence i is flat[offsets[i] : offsets[i + 1]].

    Both arrays may be mapped from files: only what is asked for is read.
    """

    def __init__(self, flat: np.ndarray, offsets: np.ndarray):
        self.flat, self.offsets = flat, offsets

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """The length of each sequence; `Lengths` reads them piece by piece."""
        return np.diff(self.offsets)

    @classmethod
    def from_sequences(cls, sequences: Sequence[np.ndarray]) -> "JaggedArray":
        offsets = np.cumsum([0, *(len(sequence) for sequence in sequences)], dtype=np.int64)
        return cls(np.concatenate([*sequences, np.zeros(0, np.int32)]).astype(np.int32), offsets)

    def to_padded(self, examples: np.ndarray, width: int) -> np.ndarray:
        """int32 [B, width]: the sequences of each row concatenated, then PAD.

        Args:
          examples: [B] or [B, M]; PAD_EXAMPLE adds nothing. The sequences of a row must fit together; only a
            sequence that is alone in its row is truncated.
        """
        # All tokens are copied by one indexed assignment. With flat = [5 6 2 | 7 2], rows [[1, 0], [0, PAD_EXAMPLE]]
        # and width 6:
        #   lengths       2 3 | 3 0            tokens copied from each sequence
        #   from          3 4  0 1 2  0 1 2    index in flat of each copied token
        #   to            0 1  2 3 4  6 7 8    its index in the raveled output
        #   padded        [[7 2 5 6 2 PAD], [5 6 2 PAD PAD PAD]]
        examples_BM = examples.reshape(len(examples), -1)
        is_real_BM = examples_BM != PAD_EXAMPLE
        safe_BM = np.where(is_real_BM, examples_BM, 0)
        starts_in_flat_BM = np.asarray(self.offsets[safe_BM])
        lengths_BM = np.where(is_real_BM, np.minimum(self.offsets[safe_BM + 1] - starts_in_flat_BM, width), 0)
        lengths = lengths_BM.ravel()
        row_start_B1 = np.arange(len(examples))[:, None] * width
        starts_BM = row_start_B1 + lengths_BM.cumsum(1) - lengths_BM
        from_index, _ = span_index(starts_in_flat_BM.ravel(), lengths)
        to_index = from_index + np.repeat((starts_BM - starts_in_flat_BM).ravel(), lengths)
        padded = np.full((len(examples), width), PAD, np.int32)
        padded.ravel()[to_index] = self.flat[from_index]
        return padded


class LengthArray(Protocol):
    """The lengths of all sequences, read by slices: an array, or what computes the slice asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> np.ndarray: ...


class Lengths:
    """The lengths of the sequences of a JaggedArray and of what is put before each of them: `added` tokens."""

    def __init__(self, jagged: JaggedArray, added: int = 0):
        self._offsets, self._added = jagged.offsets, added

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, part: slice) -> np.ndarray:
        start, stop, _ = part.indices(len(self))
        return np.diff(self._offsets[start : stop + 1]) + self._added


def pad(sequences: Sequence[np.ndarray], width: int | None = None) -> np.ndarray:
    """int32 [B, width]: a sequence in each row, then PAD; by default as wide as the longest."""
    jagged = JaggedArray.from_sequences(sequences)
    return jagged.to_padded(np.arange(len(jagged)), int(jagged.lengths.max()) if width is None else width)


def make_batch(spec: BatchSpec, source: JaggedArray, target: JaggedArray) -> Batch:
    """The padded arrays of a batch."""
    bucket, examples_B = spec
    return Batch(source.to_padded(examples_B, bucket.source), target.to_padded(examples_B, bucket.target))


def choose_buckets(
    source_N: LengthArray,
    target_N: LengthArray,
    num_buckets: int,
    batch_tokens: int,
    length_multiple: int = 1,
    max_length: int | None = None,
) -> list[Bucket]:
    """At most `num_buckets` shapes with the least padding for these lengths.

    Target widths are chosen by dynamic programming over all ways to divide the range of target lengths. The source
    width of a bucket covers SOURCE_COVERAGE of its sources; longer ones move up. A batch has as many rows as
    `batch_tokens` target tokens allow, rounded down to a multiple of 8 if that leaves any. Widths are multiples of
    `length_multiple`. Pairs with a side over `max_length` are left out.
    """
    parts = functools.partial(kept_parts, source_N, target_N, max_length)
    longest = max(int(max(source.max(), target.max())) for _, source, target in parts())
    unit = round_up(-(-longest // MAX_CANDIDATE_WIDTHS), length_multiple)
    size = -(-longest // unit) + 1
    counts = np.zeros(size * size, np.int64)
    for _, source, target in parts():
        counts += np.bincount(-(-target // unit) * size + -(-source // unit), minlength=size * size)
    widest = round_up(longest, length_multiple)  # the last of the coarser steps may end after it
    units = _choose_widths(counts.reshape(size, size), num_buckets)
    widths = [(min(source * unit, widest), min(target * unit, widest)) for source, target in units]
    return [Bucket(source, target, rows_per_batch(batch_tokens, target)) for source, target in widths]


def kept_parts(
    source_N: LengthArray, target_N: LengthArray, max_length: int | None
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Ids, source and target lengths of the pairs within `max_length`, int64, in parts that fit into a cache.

    Parts without such a pair are left out.
    """
    for start in range(0, len(source_N), PART_PAIRS):
        source = np.asarray(source_N[start : start + PART_PAIRS], np.int64)
        target = np.asarray(target_N[start : start + PART_PAIRS], np.int64)
        if max_length is None:
            yield np.arange(start, start + len(source)), source, target
            continue
        kept = np.flatnonzero((source <= max_length) & (target <= max_length))
        if len(kept):
            yield kept + start, source[kept], target[kept]


def _choose_widths(counts: np.ndarray, num_buckets: int) -> list[tuple[int, int]]:
    """Source and target widths of the buckets; counts[t, s] pairs have target length t and source length s.

    Example: (source, target) lengths (1, 1), (2, 1), (2, 2) and 1 bucket give widths [(2, 2)] and cost 3 × (2 + 2)
    = 12; 2 buckets give [(2, 1), (2, 2)] and cost 2 × (2 + 1) + 1 × (2 + 2) = 10, for
      counts = [[0 0 0], [0 1 1], [0 0 1]]
      cumulative_counts[t] = [0 0 0], [0 1 2], [0 1 3]     pairs with target ≤ t and source ≤ 0, 1, 2
      cost = [[inf 6 12], [inf inf 4], [inf inf inf]]      cost[a, b]: a bucket of all pairs with a < target ≤ b
    """
    longest, longest_source = (int(np.flatnonzero(counts.any(axis))[-1]) for axis in (1, 0))
    cumulative_counts = counts[: longest + 1, : longest_source + 1].cumsum(0).cumsum(1)
    cost = np.full((longest + 1, longest + 1), np.inf)
    source_width = np.zeros((longest + 1, longest + 1), np.int64)
    for end in range(1, longest + 1):
        counts_by_source = cumulative_counts[end] - cumulative_counts[:end]  # row a: pairs with a < target ≤ end
        total = counts_by_source[:, -1]
        source_width[:end, end] = (counts_by_source >= np.ceil(SOURCE_COVERAGE * total)[:, None]).argmax(1)
        cost[:end, end] = total * (end + source_width[:end, end])
    widths, widest = [], 0
    for start, end in _optimal_boundaries(cost, num_buckets):
        is_last = end == longest
        widest = max(widest, longest_source if is_last else int(source_width[start, end]))
        widths.append((max(widest, 1), end))
    return widths


def _optimal_boundaries(cost: np.ndarray, num_buckets: int) -> list[tuple[int, int]]:
    """Divides 0 … n into at most `num_buckets` intervals (start, end] of least total cost; n + 1 = len(cost).

    Example, for the cost of `_choose_widths`: with one interval best = [0 6 12]. With two, best[2] = min(12, best[1]
    + cost[1, 2]) = 10 and starts[1][2] = 1, so from n = 2 backwards the intervals are (1, 2] and (0, 1].
    """
    n = len(cost) - 1
    best = cost[0].copy()  # best[e]: least cost of dividing 0 … e
    best[0] = 0
    starts = [np.zeros(n + 1, np.int64)]  # starts[k][e]: where the last of k + 1 intervals begins; -1: k serve as well
    for _ in range(num_buckets - 1):
        total = best[:, None] + cost
        cheaper = total.min(0) < best
        starts.append(np.where(cheaper, total.argmin(0), np.full(n + 1, -1)))
        best = np.minimum(best, total.min(0))
    intervals, end = [], n
    for start in reversed(starts):
        if end and start[end] >= 0:
            intervals.append((int(start[end]), end))
            end = int(start[end])
    return intervals[::-1]


def rows_per_batch(batch_tokens: int, width: int) -> int:
    """Rows of `width` tokens in a batch of `batch_tokens`: a multiple of 8, or fewer than 8, or 1 if none fits."""
    rows = max(batch_tokens // width, 1)
    return rows if rows < ROW_MULTIPLE else rows - rows % ROW_MULTIPLE


def assign_buckets(source_N: np.ndarray, target_N: np.ndarray, buckets: Sequence[Bucket]) -> np.ndarray:
    """The first bucket that holds each pair, int16 [N]; -1 if none does."""
    bucket_N = np.full(len(source_N), -1, np.int16)
    for index in reversed(range(len(buckets))):
        bucket_N[(source_N <= buckets[index].source) & (target_N <= buckets[index].target)] = index
    return bucket_N


def permutation(n: int, *key: int) -> np.ndarray:
    """A random permutation of 0 … n - 1 by `key`, from raw random bits, whose stream NumPy never changes."""
    bits = np.random.Philox(np.random.SeedSequence(key)).random_raw(n)
    return np.argsort(bits, kind="stable").astype(id_dtype(n))


def id_dtype(n: int) -> type[np.signedinteger]:
    """The smallest integers for example ids below n and PAD_EXAMPLE."""
    return np.int32 if n <= 1 << 31 else np.int64


class BatchSchedule(abc.ABC):
    """Endless training batches: every epoch holds each kept pair once, in a new order.

    Arrays in proportion to the number of pairs are kept in a store, where the processes of a node share them.

    Attributes:
      buckets: the shapes, shortest first.
      kept: the number of pairs with both sides within `max_length` tokens.
      dropped: the number of all other pairs.
      num_batches: of each shape in an epoch; the same in every epoch.
      steps_per_epoch: their sum.
      fill: target tokens divided by target token positions, padding included; with subword dropout, planned tokens.
      period: what repeats after `steps_per_epoch`, for messages.
    """

    period = "an epoch"

    def __init__(
        self,
        source_N: LengthArray,
        target_N: LengthArray,
        max_length: int,
        seed: int,
        store: schedule_store.Store | None = None,
    ):
        self._source_N, self._target_N, self._max_length, self.seed = source_N, target_N, max_length, seed
        self._store = store or schedule_store.Store()
        self.kept, self.dropped = 0, len(source_N)
        self.buckets: list[Bucket] = []
        self.num_batches: list[int] = []
        self.steps_per_epoch, self.fill = 0, 0.0
        self._epoch = functools.lru_cache(maxsize=2)(self._plan_epoch)

    def batch(self, step: int) -> BatchSpec:
        """The global batch of update `step`, counted from 0."""
        epoch, index = divmod(step, self.steps_per_epoch)
        return self._epoch(epoch)(index)

    def summary(self) -> list[str]:
        """Lines for the log, besides what is logged of every schedule."""
        return []

    def num_token_positions(self, padded_rows: Callable[[int], int] = lambda rows: rows) -> int:
        """Target token positions of an epoch, with batches of `rows` rows padded to `padded_rows(rows)`."""
        return sum(n * padded_rows(b.rows) * b.target for n, b in zip(self.num_batches, self.buckets, strict=True))

    def _kept_parts(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Ids, source and target lengths of the kept pairs, in parts."""
        return kept_parts(self._source_N, self._target_N, self._max_length)

    def _set_facts(self, facts: Facts) -> None:
        """Sets the attributes."""
        self.kept, self.dropped = facts["kept"], len(self._source_N) - facts["kept"]
        self.buckets, self.num_batches = [Bucket(*bucket) for bucket in facts["buckets"]], facts["batches"]
        self.steps_per_epoch = sum(self.num_batches)
        if self.kept:
            self.fill = facts["target_tokens"] / self.num_token_positions()

    @abc.abstractmethod
    def _plan_epoch(self, epoch: int) -> Callable[[int], BatchSpec]:
        """Maps an index in the epoch to its batch; a pure function of the seed and the lengths."""


class BucketedSchedule(BatchSchedule):
    """Batches with one sentence a row, in a few shapes by length."""

    def __init__(
        self,
        source_N: LengthArray,
        target_N: LengthArray,
        *,
        num_buckets: int,
        batch_tokens: int,
        max_length: int,
        seed: int,
        length_multiple: int = 1,
        store: schedule_store.Store | None = None,
    ):
        super().__init__(source_N, target_N, max_length, seed, store)

        def plan() -> Facts:
            kept = sum(len(ids) for ids, _, _ in self._kept_parts())
            if not kept:
                return {"kept": 0, "buckets": [], "batches": [], "members": [], "target_tokens": 0}
            buckets = choose_buckets(source_N, target_N, num_buckets, batch_tokens, length_multiple, max_length)
            members, target_tokens = np.zeros(len(buckets), np.int64), 0
            for _, source, target in self._kept_parts():
                members += np.bincount(assign_buckets(source, target, buckets), minlength=len(buckets))
                target_tokens += int(target.sum())
            batches = [-(-int(n) // bucket.rows) for n, bucket in zip(members, buckets, strict=True)]
            facts = {"kept": kept, "buckets": buckets, "batches": batches, "target_tokens": target_tokens}
            return {**facts, "members": members.tolist()}

        facts = self._store.facts(plan)
        self._set_facts(facts)
        self._num_pairs: list[int] = facts["members"]  # of each bucket

    def _plan_epoch(self, epoch: int) -> Callable[[int], BatchSpec]:
        planned = self._store.array(f"epoch-{epoch}", lambda: self._order(epoch), self.kept + self.steps_per_epoch)
        return planned_batches(planned, self.buckets, self._num_pairs, self.num_batches)

    def _order(self, epoch: int) -> np.ndarray:
        """What `planned_batches` takes."""
        dtype = id_dtype(len(self._source_N))
        planned, members = np.empty(self.kept + self.steps_per_epoch, dtype), np.empty(self.kept, dtype)
        first_pairs = np.cumsum([0, *self._num_pairs])
        group_by_bucket(members, self._kept_parts(), self.buckets, first_pairs[:-1])
        for index, (start, end) in enumerate(itertools.pairwise(first_pairs)):
            planned[start:end] = members[start:end][permutation(int(end - start), self.seed, epoch, index)]
        planned[self.kept :] = permutation(self.steps_per_epoch, self.seed, epoch, len(self.buckets))
        return planned


def group_by_bucket(
    members: np.ndarray,
    parts: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]],
    buckets: Sequence[Bucket],
    starts: np.ndarray,
    first_id: int = 0,
) -> None:
    """Writes the ids of pairs into `members`, those of each bucket together and in order.

    Args:
      parts: ids, source and target lengths, as of `kept_parts`.
      starts: where each bucket begins.
      first_id: added to the ids.
    """
    ends = starts.copy()
    for ids, source, target in parts:
        bucket_N = assign_buckets(source, target, buckets)
        for index in range(len(buckets)):
            found = ids[bucket_N == index] + first_id
            members[ends[index] : ends[index] + len(found)] = found
            ends[index] += len(found)


def planned_batches(
    planned: np.ndarray, buckets: Sequence[Bucket], num_pairs: Sequence[int], num_batches: Sequence[int]
) -> Callable[[int], BatchSpec]:
    """Maps an index in an epoch to its batch.

    Args:
      planned: the example ids in the order of this epoch, one bucket after another; then the order of all batches.
      buckets: the shapes.
      num_pairs, num_batches: of each bucket.
    """
    pairs, order = planned[: sum(num_pairs)], planned[sum(num_pairs) :]
    first_pairs, first_batches = np.cumsum([0, *num_pairs]), np.cumsum([0, *num_batches])

    def spec(index: int) -> BatchSpec:
        batch = int(order[index])
        number = int(np.searchsorted(first_batches, batch, side="right")) - 1
        start, end = part_bounds(num_pairs[number], num_batches[number], batch - int(first_batches[number]))
        examples = np.array(pairs[first_pairs[number] + start : first_pairs[number] + end], np.int64)
        return BatchSpec(buckets[number], pad_rows(examples, buckets[number].rows))

    return spec


def part_bounds(size: int, num_parts: int, part: int) -> tuple[int, int]:
    """Where a part begins and ends if `size` rows of an epoch are divided evenly.

    Batches of an epoch have even sizes, as tokens of a much smaller batch would weigh more. The first parts have one
    row more, as of np.array_split.
    """
    share, longer = divmod(size, num_parts)
    start = part * share + min(part, longer)
    return start, start + share + (part < longer)


def round_up_to_power_of_two(length: int, smallest: int = 16) -> int:
    """The next power of two. As the padded width of a sequence in evaluation it depends on that sequence alone."""
    return max(smallest, 1 << (length - 1).bit_length())


def eval_batches(source_N: np.ndarray, target_N: np.ndarray, rows_of: Callable[[int], int]) -> list[BatchSpec]:
    """Every pair exactly once, in batches of `rows_of(width)` rows; the last of each width ends in empty rows.

    Pairs of a width are sorted by length, so that those of a batch take about as long to translate.
    """
    widths_N = np.array([round_up_to_power_of_two(int(n)) for n in np.maximum(source_N, target_N)], np.int64)
    specs = []
    for width in np.unique(widths_N):
        rows = rows_of(int(width))
        bucket = Bucket(int(width), int(width), rows)
        members = np.flatnonzero(widths_N == width)
        members = members[np.argsort(np.maximum(source_N, target_N)[members], kind="stable")]
        specs += [BatchSpec(bucket, pad_rows(members[i : i + rows], rows)) for i in range(0, len(members), rows)]
    return specs


def pad_rows(examples: np.ndarray, rows: int) -> np.ndarray:
    """Appends empty rows up to `rows`."""
    padding = ((0, rows - len(examples)), *((0, 0),) * (examples.ndim - 1))
    return np.pad(examples, padding, constant_values=PAD_EXAMPLE)


def select_rows(spec: BatchSpec, rows: np.ndarray) -> BatchSpec:
    """The rows of a global batch with these indices, such as those of one host; indices past its end are empty rows."""
    examples_B = pad_rows(spec.examples_B, max(int(rows.max(initial=-1)) + 1, len(spec.examples_B)))
    return BatchSpec(spec.bucket, examples_B[rows])
