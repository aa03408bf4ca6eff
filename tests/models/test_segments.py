"""Sentences of a row, told apart by their ends."""

import jax.numpy as jnp
import numpy as np

from transformer.data.tokenizer import BOS, EOS, PAD
from transformer.models import base

ROWS = jnp.asarray([[5, 6, EOS, 7, EOS, EOS, PAD], [5, 6, 7, 8, 9, 10, EOS], [PAD] * 7], jnp.int32)
NUMBERS = jnp.asarray([[1, 1, 1, 2, 2, 3, 0], [1] * 7, [0] * 7], jnp.int32)


def test_sentences_are_numbered_and_padding_is_none():
    np.testing.assert_array_equal(base.segment_ids(ROWS), NUMBERS)


def test_positions_start_anew_with_each_sentence():
    np.testing.assert_array_equal(base.position_ids(NUMBERS), [[0, 1, 2, 0, 1, 0, 0], list(range(7)), list(range(7))])


def test_the_decoder_is_fed_bos_and_all_but_the_end_of_each_sentence():
    fed = np.asarray(base.shift_right(ROWS))
    np.testing.assert_array_equal(fed[0, :6], [BOS, 5, 6, BOS, 7, BOS])
    np.testing.assert_array_equal(fed[1], [BOS, 5, 6, 7, 8, 9, 10])
