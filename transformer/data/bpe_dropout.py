"""BPE-dropout: random segmentations of words by a BPE vocabulary (Provilkov et al. 2020), for many words at once.

A word begins as its characters. At each step every pair of neighbours that can be merged is left out with some
probability, independently, and of the others the one whose merge was learnt first is merged, the leftmost if there are
several; if there is none, the word is done. All draws are hashes of (key, step, position), so a segmentation depends on
no other.

R segmentations, N symbols of each: ids of the vocabulary.
"""

import itertools
from collections.abc import Sequence

import numpy as np

from transformer.data.batching import JaggedArray, span_index
from transformer.data.tokenizer import BpePiece

NONE = np.iinfo(np.int32).max  # in place of a rank
GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # an odd number by which counters of a hash are multiplied

_CHUNK_SYMBOLS = 1 << 19  # segmented at a time


def mix(values: np.ndarray) -> np.ndarray:
    """A hash of 64 bits of each value (the last part of SplitMix64); uint64 to uint64, the same everywhere."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def take(flat: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> JaggedArray:
    """Sequences flat[start : start + length], one after another."""
    index, offsets = span_index(starts, lengths)
    return JaggedArray(np.asarray(flat[index]), offsets)


class BpeMerges:
    """The merges of a BPE vocabulary.

    Attributes:
      characters: the ids of the characters of each id; an id that no merge makes, or one with a character that is not
        in the vocabulary, is its own only one.
    """

    def __init__(self, pieces: Sequence[BpePiece]):
        ids = {piece.text: number for number, piece in enumerate(pieces) if piece.is_merged}
        spelled = [[ids.get(c, -1) for c in piece.text] if piece.is_merged else [-1] for piece in pieces]
        self.characters = JaggedArray.from_sequences(
            [np.array([number] if -1 in word else word) for number, word in enumerate(spelled)]
        )
        pairs = [
            (ids[text[:cut]] * len(pieces) + ids[text[cut:]], number)
            for text, number in ids.items()
            for cut in range(1, len(text))
            if text[:cut] in ids and text[cut:] in ids
        ]
        keys_and_merged = np.array(sorted(pairs), np.int64).reshape(-1, 2)
        self._keys, merged = keys_and_merged[:, 0].copy(), keys_and_merged[:, 1]
        _, rank_V = np.unique([-piece.score for piece in pieces], return_inverse=True)
        self._merged, self._ranks, self._size = merged.astype(np.int32), rank_V[merged].astype(np.int32), len(pieces)

    def spell(self, words: JaggedArray) -> JaggedArray:
        """The characters of each word, of which `words` has the ids."""
        starts, lengths = self.characters.offsets[words.flat], self.characters.lengths[words.flat]
        spelled = take(self.characters.flat, starts, lengths)
        return JaggedArray(spelled.flat, spelled.offsets[words.offsets])

    def find(self, left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What two symbols are merged into, and the rank of that merge, the first is 0; NONE for a pair without one."""
        if not len(self._keys):
            return np.zeros_like(left), np.full_like(left, NONE)
        wanted = left.astype(np.int64) * self._size + right
        index = np.minimum(np.searchsorted(self._keys, wanted), len(self._keys) - 1)
        return self._merged[index], np.where(self._keys[index] == wanted, self._ranks[index], NONE)


def segment(merges: BpeMerges, words: JaggedArray, rate: float, keys_W: np.ndarray, count: int) -> JaggedArray:
    """`count` segmentations of each word, those of the first word first.

    Args:
      merges: of the vocabulary.
      words: the ids of the characters of each word; shorter words first.
      rate: the probability with which a merge is left out at a step.
      keys_W: a key of the draws of each word, uint64.
      count: of segmentations.
    """
    lengths = words.lengths
    assert (np.diff(lengths) >= 0).all()
    bounds = [0, *(np.flatnonzero(np.diff(lengths)) + 1).tolist(), len(lengths)]
    flat, sizes = [np.zeros(0, np.int32)], [np.zeros(0, np.int64)]
    for first, last in itertools.pairwise(bounds):
        step = max(_CHUNK_SYMBOLS // max(int(lengths[first]) * count, 1), 1) if last > first else 1
        for start in range(first, last, step):
            end = min(start + step, last)
            symbols_WN = words.flat[words.offsets[start] : words.offsets[end]].reshape(end - start, -1)
            keys_WK = mix(keys_W[start:end, None] + np.arange(count, dtype=np.uint64) * GOLDEN)
            made_RN = _segment_equal_lengths(merges, np.repeat(symbols_WN, count, axis=0), rate, keys_WK.ravel())
            flat.append(made_RN[made_RN >= 0])
            sizes.append((made_RN >= 0).sum(1))
    return JaggedArray(np.concatenate(flat), np.concatenate([[0], np.cumsum(np.concatenate(sizes))]))


def _segment_equal_lengths(merges: BpeMerges, symbols_RN: np.ndarray, rate: float, keys_R: np.ndarray) -> np.ndarray:
    """A segmentation of each row: ids, then -1, int32 [R, N].

    At every step each row that is not done merges one pair, so these rows always have equally many symbols.
    """
    made_RN = np.full(symbols_RN.shape, -1, np.int32)
    threshold = np.uint64(min(int(rate * 2.0**64), 2**64 - 1))
    active, symbols, keys = np.arange(len(symbols_RN)), symbols_RN.astype(np.int32), keys_R
    merged, ranks = merges.find(symbols[:, :-1], symbols[:, 1:])
    longest = symbols.shape[1]
    while len(active) and symbols.shape[1] > 1:
        counters = np.arange(symbols.shape[1] - 1, dtype=np.uint64) + np.uint64(symbols.shape[1] * longest)
        is_left_out = mix(keys[:, None] + counters * GOLDEN) < threshold
        candidates = np.where(is_left_out, NONE, ranks)
        best = candidates.argmin(1)
        is_done = candidates[np.arange(len(best)), best] == NONE
        made_RN[active[is_done], : symbols.shape[1]] = symbols[is_done]
        active, symbols, keys, merged, ranks, best = (
            rows[~is_done] for rows in (active, symbols, keys, merged, ranks, best)
        )
        symbols, merged, ranks = _merge_pairs(merges, symbols, merged, ranks, best)
    made_RN[active, : symbols.shape[1]] = symbols
    return made_RN


def _merge_pairs(
    merges: BpeMerges, symbols: np.ndarray, merged: np.ndarray, ranks: np.ndarray, best: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Merges pair `best` of each row: the symbols, one fewer, and of each pair of them what `BpeMerges.find` says.

    Example: symbols a b c d, best 1: the pairs ab, bc, cd become a(bc), (bc)d, both of which are new.
    """
    rows = np.arange(len(symbols))
    symbols[rows, best] = merged[rows, best]
    columns = np.arange(symbols.shape[1] - 1)
    symbols = np.take_along_axis(symbols, columns + (columns > best[:, None]), 1)
    columns = columns[:-1]
    kept = columns + (columns >= best[:, None])
    merged, ranks = np.take_along_axis(merged, kept, 1), np.take_along_axis(ranks, kept, 1)
    for pair in (best - 1, best):
        changed = np.flatnonzero((pair >= 0) & (pair < len(columns)))
        at = changed, pair[changed]
        merged[at], ranks[at] = merges.find(symbols[at], symbols[changed, pair[changed] + 1])
    return symbols, merged, ranks
