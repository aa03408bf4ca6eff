"""Token ids of the entries of a mixture as one: example ids count through the entries, tags come before each sequence.

B rows of a batch.
"""

import functools
from collections.abc import Sequence

import numpy as np

from transformer.data.batching import PAD_EXAMPLE, JaggedArray
from transformer.data.tokenizer import PAD


class MixedSequences(JaggedArray):
    """One side of all entries, one entry after another, each sequence with the tags of its entry.

    Nothing is copied: a batch is read from the entries themselves.
    """

    def __init__(self, entries: Sequence[JaggedArray], tags: Sequence[Sequence[int]]):
        self._entries, self._tags = entries, [np.array(own, np.int32) for own in tags]
        self._starts = np.cumsum([0, *map(len, entries)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """The length of each sequence, tags included."""
        return np.concatenate([entry.lengths + len(own) for entry, own in zip(self._entries, self._tags, strict=True)])

    def to_padded(self, examples: np.ndarray, width: int) -> np.ndarray:
        """int32 [B, width]: tags and sequence of each row, then PAD; PAD_EXAMPLE is an empty row."""
        padded = np.full((len(examples), width), PAD, np.int32)
        entry_B = np.where(examples == PAD_EXAMPLE, -1, np.searchsorted(self._starts, examples, side="right") - 1)
        for index in np.unique(entry_B[entry_B >= 0]):
            rows, own = entry_B == index, self._tags[index]
            padded[rows, : len(own)] = own
            sequences = self._entries[index].to_padded(examples[rows] - self._starts[index], width - len(own))
            padded[rows, len(own) :] = sequences
        return padded
