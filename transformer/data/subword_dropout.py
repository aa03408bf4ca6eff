"""Subword dropout in training: each word of a batch is split in one of several ways drawn ahead by `bpe_dropout`.

`make_dropout` counts the words of the token ids of training, draws SEGMENTATIONS of each word once, and keeps them as a
table (`WordTable`) beside the schedules. `SubwordDropout.make_batch` finds the words in the ids of a batch and chooses
a segmentation of each by a hash of (seed, step, example, side, position of the word): the same after any resume, on any
number of hosts and in any process.

Batches are planned from plain lengths with headroom (`PlannedLengths`), which is chosen so that it suffices for almost
all sentences of a sample. Where the words of a row would still not fit, the last of them keep their plain segmentation,
that of the token ids.

T tokens, W words, N sentences, B rows, M sentences of a row, K segmentations.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from transformer.config import Config, DataConfig
from transformer.config.validation import subword_dropout_error
from transformer.data.batching import (
    PAD_EXAMPLE,
    Batch,
    BatchSchedule,
    BatchSpec,
    JaggedArray,
    LengthArray,
    span_index,
)
from transformer.data.bpe_dropout import GOLDEN, BpeMerges, mix, segment, take
from transformer.data.schedule_store import FileStore, Store
from transformer.data.tokenizer import EOS, PAD, SPACE, BpePiece, Tokenizer
from transformer.runtime import progress
from transformer.runtime.errors import UserError
from transformer.runtime.files import json_digest
from transformer.runtime.logging import log_info

TABLE_VERSION = 1  # increased whenever the same words get other segmentations
SEGMENTATION_BITS = 4
SEGMENTATIONS = 1 << SEGMENTATION_BITS
MAX_WORD_CHARACTERS = 64  # longer words, such as lines of a script without spaces, stay as they are
MAX_TABLE_CHARACTERS = 1 << 23  # of all words in the table, the most frequent ones: at most 0.6 GB
# Shares of sentences for which the planned length suffices, from which `plan` chooses. In packed rows the excess of one
# sentence fits into the headroom of the others, so less is needed.
FITTING_SHARES = (0.4, 0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99, 0.995, 0.999)
PLANNED_FALLBACK_SHARE = 0.005  # the most, in the sample by which it chooses
MAX_FALLBACK_SHARE = 0.01  # of sentences without a warning
SAMPLE_PAIRS = 1 << 15  # from which lengths are predicted

_CHUNK_SENTENCES, _CHUNK_WORDS, _CHUNK_SAMPLE = 1 << 16, 1 << 16, 1 << 13
_UNLIMITED = 1 << 40  # a width
_TABLE, _BATCH, _SAMPLE = 1, 2, 3  # what a key is for
_WORD_FIELDS = [
    ("hash", "u8"),
    ("count", "i8"),  # how often it occurs
    ("side", "i1"),  # where it occurs first: 0 source, 1 target
    ("start", "i8"),  # there, its index in the ids
    ("tokens", "i4"),
    ("characters", "i4"),
]


def check_tokenizer(data: DataConfig, tokenizer: Tokenizer | None) -> None:
    """Raises a UserError if the config asks for subword dropout and the vocabulary, if known yet, is not BPE."""
    if data.subword_dropout and tokenizer is not None and not tokenizer.bpe_pieces():
        raise UserError(subword_dropout_error(data.subword_dropout, f"{data.tokenizer}, another kind of vocabulary"))


class LengthModel(NamedTuple):
    """Predicts how long a sentence of L tokens becomes: (1 + growth) L on average, and spread √L more at most."""

    growth: float
    spread: float

    def plan(self, lengths_N: np.ndarray) -> np.ndarray:
        """Tokens to plan for sentences of these lengths: at least as many."""
        lengths_N = np.asarray(lengths_N, np.int64)
        wanted = np.ceil(lengths_N * (1 + self.growth) + np.sqrt(lengths_N) * self.spread)
        return np.maximum(wanted.astype(np.int64), lengths_N)


class PlannedLengths:
    """The lengths for which batches are planned, computed for the slice asked for.

    Sentences of over `max_length` tokens get more than `limit`, others at most that.

    Attributes:
      key: what the lengths depend on besides the plain ones; in JSON.
    """

    def __init__(self, lengths_N: LengthArray, model: LengthModel, max_length: int, limit: int):
        self._lengths_N, self._model, self._max_length, self._limit = lengths_N, model, max_length, limit
        self.key = [*model, max_length, limit]

    def __len__(self) -> int:
        return len(self._lengths_N)

    def __getitem__(self, part: slice) -> np.ndarray:
        lengths_N = self._lengths_N[part]
        planned_N = np.minimum(self._model.plan(lengths_N), self._limit)
        return np.where(lengths_N > self._max_length, self._limit + 1, planned_N)


class LengthSample(NamedTuple):
    """Lengths of sentences spread over training: plain, and with dropout; of source and target each, [N]."""

    plain: tuple[np.ndarray, np.ndarray]
    made: tuple[np.ndarray, np.ndarray]

    def growth(self, side: int) -> float:
        """How much longer sentences become, in the mean over tokens."""
        return max(float(self.made[side].sum() / self.plain[side].sum()) - 1, 0.0)

    def model(self, side: int, share: float) -> LengthModel:
        """The model by which this share of sentences is at most as long as planned."""
        plain_N, growth = self.plain[side], self.growth(side)
        excess_N = np.sort((self.made[side] - plain_N * (1 + growth)) / np.sqrt(plain_N))
        # Not interpolated: every host must get the same.
        return LengthModel(growth, max(float(excess_N[int(np.ceil(share * (len(excess_N) - 1)))]), 0.0))

    def fallback_share(self, schedule: BatchSchedule) -> float:
        """The share of sentences that would not fit in full into the batches of a schedule of the sample."""
        count = 0
        for step in range(schedule.steps_per_epoch):
            bucket, examples_B = schedule.batch(step)
            examples_BM = examples_B.reshape(len(examples_B), -1)
            for side, width in enumerate((bucket.source, bucket.target)):
                plain_BM, made_BM = (
                    np.where(examples_BM == PAD_EXAMPLE, 0, lengths[side][examples_BM]) for lengths in self
                )
                added_BM = np.maximum(made_BM - plain_BM, 0)
                free_B1 = width - plain_BM.sum(1, keepdims=True)
                count += int(((added_BM > 0) & (added_BM.cumsum(1) > free_B1)).sum())
        return count / max(2 * schedule.kept, 1)


class WordTable(NamedTuple):
    """The segmentations of words.

    Attributes:
      hashes_W: of the words, ascending.
      groups_W: for each of them, its place in the order in which segmentations are kept.
      segmentations: ids; those of the word in place g are g K … (g + 1) K - 1.
    """

    hashes_W: np.ndarray
    groups_W: np.ndarray
    segmentations: JaggedArray


class _Spans(NamedTuple):
    """The words in the ids of some sentences; EOS is a word of its own.

    Attributes:
      starts_W, lengths_W: index of the first token, number of tokens.
      hashes_W: of the ids.
      first_word_N: of each sentence.
      sentence_W, position_W: the sentence of each word, and its position there.
    """

    starts_W: np.ndarray
    lengths_W: np.ndarray
    hashes_W: np.ndarray
    first_word_N: np.ndarray
    sentence_W: np.ndarray
    position_W: np.ndarray


def _find_words(sentences: JaggedArray, begins_V: np.ndarray) -> _Spans:
    """Splits sentences, none empty, into words: `begins_V` says which ids begin one."""
    begins_T = begins_V[sentences.flat]
    begins_T[sentences.offsets[:-1]] = True
    starts_W = np.flatnonzero(begins_T)
    lengths_W = np.diff(starts_W, append=len(sentences.flat))
    position_T = np.arange(len(sentences.flat)) - np.repeat(starts_W, lengths_W)
    hash_T = mix((sentences.flat.astype(np.uint64) << np.uint64(32)) + (position_T + 1).astype(np.uint64))
    hashes_W = np.add.reduceat(hash_T, starts_W) if len(starts_W) else hash_T
    first_word_N = np.searchsorted(starts_W, sentences.offsets[:-1])
    sentence_W = np.repeat(np.arange(len(sentences)), np.diff(first_word_N, append=len(starts_W)))
    position_W = np.arange(len(starts_W)) - first_word_N[sentence_W]
    return _Spans(starts_W, lengths_W, hashes_W, first_word_N, sentence_W, position_W)


def _key(*parts: int) -> np.uint64:
    return np.random.SeedSequence(parts).generate_state(1, np.uint64)[0]


class SubwordDropout:
    """Splits the words of batches at random; picklable, for one thread at a time.

    Args:
      table: of the words of training.
      begins_V: whether an id begins a word.
      seed: of the run.
      longest: the most tokens of a sentence.

    Attributes:
      sample: lengths with and without dropout.
      num_sentences: that were split; source and target count as two.
      num_fallbacks: of these, sentences with words that kept their plain segmentation to fit.
    """

    def __init__(self, table: WordTable, begins_V: np.ndarray, seed: int, longest: int = _UNLIMITED):
        self._table, self._begins_V, self._seed, self._longest = table, begins_V, seed, longest
        self.sample: LengthSample
        self.num_sentences = self.num_fallbacks = self._num_batches = 0

    @property
    def fallback_share(self) -> float:
        """Share of sentences with words that kept their plain segmentation to fit."""
        return self.num_fallbacks / max(self.num_sentences, 1)

    def plan(
        self,
        lengths: Sequence[LengthArray],
        config: Config,
        make: Callable[[Sequence[LengthArray], int], BatchSchedule],
    ) -> tuple[list[PlannedLengths], int]:
        """The lengths for which to plan batches, with as little headroom as suffices for almost all sentences.

        Args:
          lengths: of source and target, plain.
          config: of the run.
          make: a schedule for lengths of source and target, whose second argument is the longest that is kept.

        Returns:
          The lengths of source and target to plan for, and that of the longest sentence that `data.max_length` keeps.
        """
        smallest, largest = 0, len(FITTING_SHARES) - 1
        while smallest < largest:
            middle = (smallest + largest) // 2
            schedule = make(*self._planned_lengths(self.sample.plain, config, FITTING_SHARES[middle]))
            is_enough = self.sample.fallback_share(schedule) <= PLANNED_FALLBACK_SHARE
            smallest, largest = (smallest, middle) if is_enough else (middle + 1, largest)
        return self._planned_lengths(lengths, config, FITTING_SHARES[smallest])

    def _planned_lengths(
        self, lengths: Sequence[LengthArray], config: Config, share: float
    ) -> tuple[list[PlannedLengths], int]:
        """Of source and target, with headroom for this share of sentences; and the most of a sentence."""
        models, longest = [self.sample.model(side, share) for side in (0, 1)], config.data.max_length
        limit = max(int(model.plan(np.array([longest]))[0]) for model in models)
        if config.model.positions == "learned":
            limit = max(min(limit, config.model.max_positions), longest)
        return [PlannedLengths(*each, longest, limit) for each in zip(lengths, models, strict=True)], limit

    def make_batch(self, spec: BatchSpec, source: JaggedArray, target: JaggedArray, step: int) -> Batch:
        """The padded arrays of a batch, or of some of its rows."""
        examples_BM = spec.examples_B.reshape(len(spec.examples_B), -1)
        rows_N, columns_N = np.nonzero(examples_BM != PAD_EXAMPLE)
        examples_N = examples_BM[rows_N, columns_N]
        number_BM = np.full(examples_BM.shape, PAD_EXAMPLE)
        number_BM[rows_N, columns_N] = np.arange(len(rows_N))
        sides = []
        for side, (ids, width) in enumerate(((source, spec.bucket.source), (target, spec.bucket.target))):
            if not len(examples_N):
                sides.append(np.full((len(examples_BM), width), PAD, np.int32))
                continue
            starts = np.asarray(ids.offsets[examples_N])
            plain = take(ids.flat, starts, np.asarray(ids.offsets[examples_N + 1]) - starts)
            made, num_fallbacks = self.split(plain, _key(_BATCH, self._seed, step, side), examples_N, rows_N, width)
            sides.append(made.to_padded(number_BM, width))
            self.num_sentences += len(examples_N)
            self.num_fallbacks += num_fallbacks
        self._num_batches += 1
        self._log_fallbacks()
        return Batch(*sides)

    def split(
        self, plain: JaggedArray, key: np.uint64, examples_N: np.ndarray, rows_N: np.ndarray, width: int
    ) -> tuple[JaggedArray, int]:
        """Chooses a segmentation of every word.

        Args:
          plain: at least one sentence; each ends in EOS.
          key: of this side of the batch.
          examples_N: their numbers, by which segmentations are chosen.
          rows_N: the row that each is in, ascending.
          width: the most tokens of a row.

        Returns:
          The sentences, and in how many of them words kept their plain segmentation to fit.
        """
        if not len(self._table.hashes_W):
            return plain, 0
        spans, table = _find_words(plain, self._begins_V), self._table
        keys_N = mix(key + examples_N.astype(np.uint64) * GOLDEN)
        draws_W = mix(keys_N[spans.sentence_W] + spans.position_W.astype(np.uint64) * GOLDEN)
        index_W = np.minimum(np.searchsorted(table.hashes_W, spans.hashes_W), len(table.hashes_W) - 1)
        is_known_W = table.hashes_W[index_W] == spans.hashes_W
        chosen_W = (table.groups_W[index_W].astype(np.int64) << SEGMENTATION_BITS) + (
            draws_W >> np.uint64(64 - SEGMENTATION_BITS)
        ).astype(np.int64)
        starts_W = np.asarray(table.segmentations.offsets[chosen_W], np.int64)
        lengths_W = np.asarray(table.segmentations.offsets[chosen_W + 1], np.int64) - starts_W
        growth_W = np.where(is_known_W, lengths_W - spans.lengths_W, 0)
        fits_W = _fits(growth_W, spans, plain.lengths, rows_N, width, self._longest)
        is_new_W = is_known_W & fits_W
        starts_W = np.where(is_new_W, starts_W, spans.starts_W)
        lengths_W = np.where(is_new_W, lengths_W, spans.lengths_W)
        index_T, offsets_W = span_index(starts_W, lengths_W)
        is_new_T = np.repeat(is_new_W, lengths_W)
        flat = np.empty(len(index_T), plain.flat.dtype)
        flat[is_new_T] = table.segmentations.flat[index_T[is_new_T]]
        flat[~is_new_T] = plain.flat[index_T[~is_new_T]]
        offsets_N = np.append(offsets_W[spans.first_word_N], offsets_W[-1])
        return JaggedArray(flat, offsets_N), len(np.unique(spans.sentence_W[~fits_W]))

    def _log_fallbacks(self) -> None:
        """Logs how many sentences kept plain segmentations, after 10, 100, 1,000 … batches."""
        batches = self._num_batches
        if batches < 10 or batches != 10 ** (len(str(batches)) - 1):
            return
        share = self.fallback_share
        log_info(
            f"{'warning: ' * (share > MAX_FALLBACK_SHARE)}subword dropout: to fit, words of {self.num_fallbacks:,} of "
            f"{self.num_sentences:,} sentences ({share:.2%}) in {batches:,} batches kept their plain segmentation"
        )


def _fits(
    growth_W: np.ndarray, spans: _Spans, lengths_N: np.ndarray, rows_N: np.ndarray, width: int, longest: int
) -> np.ndarray:
    """Which words may become longer by `growth_W`, bool [W]: those of a row, in order, while they fit.

    Those of a sentence fit while it has at most `longest` tokens, those of a row while it has at most `width`.

    Example: a row of width 9 with 7 tokens, in words that would grow by 1, 0, 2, -1, 1: all but the third and the last.
    """
    added_W = np.maximum(growth_W, 0)
    before_W = np.cumsum(added_W) - added_W
    is_first_N = np.diff(rows_N, prepend=-1) > 0  # the first sentence of a row
    first_N = np.maximum.accumulate(np.where(is_first_N, np.arange(len(rows_N)), 0))
    free_N = width - np.bincount(rows_N, lengths_N).astype(np.int64)[rows_N]
    limit_N = before_W[spans.first_word_N[first_N]] + free_N
    sentence_limit_N = before_W[spans.first_word_N] + longest - lengths_N
    return (growth_W <= 0) | (before_W + added_W <= np.minimum(limit_N, sentence_limit_N)[spans.sentence_W])


def make_dropout(
    config: Config, tokenizer: Tokenizer, sides: tuple[JaggedArray, JaggedArray], folder: epath.Path | None
) -> SubwordDropout:
    """Subword dropout for the token ids of training; its table is read from the folder, or drawn and kept there.

    Args:
      config: of the run, whose `data.subword_dropout` is not 0.
      tokenizer: by which the ids were made.
      sides: the ids of source and target.
      folder: holds schedules; None keeps the table in memory.

    Raises:
      UserError: the vocabulary is not BPE.
    """
    check_tokenizer(config.data, tokenizer)
    rate, seed = config.data.subword_dropout, config.train.seed
    pieces = tokenizer.bpe_pieces()
    begins_V = np.array([piece.text.startswith(SPACE) for piece in pieces])
    begins_V[EOS] = True
    name = f"subword-{json_digest([TABLE_VERSION, SEGMENTATIONS, rate, seed])[:24]}"
    store = Store() if folder is None else FileStore(folder / name)
    draw = functools.cache(functools.partial(_draw_table, pieces, begins_V, sides, rate, seed))

    def make_facts() -> dict[str, Any]:
        table, known_share = draw()
        return {"sizes": [len(array) for array in _arrays(table)], "known_share": known_share}

    def make_array(number: int) -> np.ndarray:
        return _arrays(draw()[0])[number]

    facts = store.facts(make_facts)
    hashes_W, groups_W, flat, offsets = (
        store.array(name, functools.partial(make_array, number), facts["sizes"][number])
        for number, name in enumerate(("hashes", "groups", "ids", "offsets"))
    )
    longest = config.model.max_positions if config.model.positions == "learned" else _UNLIMITED
    dropout = SubwordDropout(WordTable(hashes_W, groups_W, JaggedArray(flat, offsets)), begins_V, seed, longest)
    dropout.sample = _sample_lengths(dropout, sides)
    source, target = (dropout.sample.growth(side) for side in (0, 1))
    log_info(
        f"subword dropout {rate:g}: {SEGMENTATIONS} segmentations of each of {len(hashes_W):,} words, which cover "
        f"{facts['known_share']:.1%} of the running words; sources become {source:.1%} longer, targets {target:.1%}"
    )
    return dropout


def _arrays(table: WordTable) -> tuple[np.ndarray, ...]:
    return table.hashes_W, table.groups_W, table.segmentations.flat, table.segmentations.offsets


def _draw_table(
    pieces: list[BpePiece], begins_V: np.ndarray, sides: tuple[JaggedArray, JaggedArray], rate: float, seed: int
) -> tuple[WordTable, float]:
    """Draws the table; also returns the share of all words of training that are in it, or have one character."""
    merges = BpeMerges(pieces)
    words, total, num_trivial = _count_words(sides, begins_V, merges.characters.lengths)
    words = words[np.lexsort((words["hash"], -words["count"]))]
    words = words[np.cumsum(words["characters"], dtype=np.int64) <= MAX_TABLE_CHARACTERS]
    parts, flat, lengths = [], [], []
    with progress.phase("subword dropout: splitting words", len(words), "words") as phase:
        for side, ids in enumerate(sides):
            own = words[words["side"] == side]
            own = own[np.lexsort((own["hash"], own["characters"]))]
            for part in np.array_split(own, max(-(-len(own) // _CHUNK_WORDS), 1)):
                characters = merges.spell(take(ids.flat, part["start"], part["tokens"]))
                keys_W = mix(part["hash"] ^ _key(_TABLE, seed))
                drawn = segment(merges, characters, rate, keys_W, SEGMENTATIONS)
                parts.append(part)
                flat.append(drawn.flat.astype(ids.flat.dtype))
                lengths.append(drawn.lengths.astype(np.uint8))
                phase.advance(len(part))
    kept = np.concatenate(parts)
    order = np.argsort(kept["hash"])
    offsets = np.concatenate([[0], np.cumsum(np.concatenate(lengths), dtype=np.int64)]).astype(np.uint32)
    table = WordTable(kept["hash"][order], order.astype(np.uint32), JaggedArray(np.concatenate(flat), offsets))
    return table, (int(kept["count"].sum()) + num_trivial) / max(total, 1)


def _count_words(
    sides: tuple[JaggedArray, JaggedArray], begins_V: np.ndarray, num_characters_V: np.ndarray
) -> tuple[np.ndarray, int, int]:
    """Counts the different words of training that dropout may split, of 2 to MAX_WORD_CHARACTERS characters.

    Returns:
      An array with _WORD_FIELDS, the number of all words, and that of words of one character.
    """
    merged, pending = np.zeros(0, _WORD_FIELDS), list[np.ndarray]()
    total = num_trivial = 0
    with progress.phase("subword dropout: counting words", sum(map(len, sides)), "sentences") as phase:
        for side, ids in enumerate(sides):
            for start in range(0, len(ids), _CHUNK_SENTENCES):
                end = min(start + _CHUNK_SENTENCES, len(ids))
                first_token = int(ids.offsets[start])
                flat = np.asarray(ids.flat[first_token : ids.offsets[end]])
                sentences = JaggedArray(flat, np.asarray(ids.offsets[start : end + 1]) - first_token)
                spans = _find_words(sentences, begins_V)
                characters_W = np.add.reduceat(num_characters_V[flat], spans.starts_W)
                is_word_W = flat[spans.starts_W] != EOS
                total += int(is_word_W.sum())
                num_trivial += int((is_word_W & (characters_W == 1)).sum())
                is_split_W = is_word_W & (characters_W > 1) & (characters_W <= MAX_WORD_CHARACTERS)
                counted = np.zeros(int(is_split_W.sum()), _WORD_FIELDS)
                counted["hash"], counted["count"], counted["side"] = spans.hashes_W[is_split_W], 1, side
                counted["start"] = spans.starts_W[is_split_W] + first_token
                counted["tokens"], counted["characters"] = spans.lengths_W[is_split_W], characters_W[is_split_W]
                pending.append(_merge_counts([counted]))
                if sum(map(len, pending)) > max(len(merged), 1 << 20):
                    merged, pending = _merge_counts([merged, *pending]), []
                phase.advance(end - start)
    return _merge_counts([merged, *pending]), total, num_trivial


def _merge_counts(parts: list[np.ndarray]) -> np.ndarray:
    """Each word once, as where it occurs first, with the sum of its counts."""
    words = np.concatenate(parts)
    _, first, inverse = np.unique(words["hash"], return_index=True, return_inverse=True)
    merged = words[first]
    merged["count"] = np.bincount(inverse, words["count"], len(first)).astype(np.int64)
    return merged


def _sample_lengths(dropout: SubwordDropout, sides: tuple[JaggedArray, JaggedArray]) -> LengthSample:
    """Splits sentences spread over training once."""
    count = len(sides[0])
    examples_N = np.unique(np.linspace(0, count - 1, min(SAMPLE_PAIRS, count)).astype(np.int64))
    plain: list[np.ndarray] = []
    made: list[np.ndarray] = []
    for side, ids in enumerate(sides):
        starts_N = np.asarray(ids.offsets[examples_N])
        plain.append(np.asarray(ids.offsets[examples_N + 1]) - starts_N)
        parts = []
        for start in range(0, len(examples_N), _CHUNK_SAMPLE):
            part = slice(start, start + _CHUNK_SAMPLE)
            sentences = take(ids.flat, starts_N[part], plain[side][part])
            rows_N = np.arange(len(sentences))
            parts.append(dropout.split(sentences, _key(_SAMPLE, side), examples_N[part], rows_N, _UNLIMITED)[0].lengths)
        made.append(np.concatenate(parts))
    return LengthSample((plain[0], plain[1]), (made[0], made[1]))
