"""Prefixes and phrases as people write them: into ids of a fixed shape, or refused."""

import io

import numpy as np
import pytest
import sentencepiece

from tests.decoding.test_translator import LINES
from transformer.data import tokenizer
from transformer.data.batching import PAD_EXAMPLE
from transformer.data.tokenizer import EOS, PAD
from transformer.decoding.constraints import PaddedSizes, encode_constraints, pad_constraints
from transformer.runtime.errors import UserError


@pytest.fixture(scope="module")
def vocabulary():
    return tokenizer.train(LINES, 300, "bpe")


def test_a_phrase_without_spaces_may_follow_another_word_directly():
    vocabulary = tokenizer.train(["私は東京に住んでいます", "東京は大きい", "the red 50% house"] * 20, 310, "bpe")
    encoded = encode_constraints(vocabulary, None, [["東京", "red"]], [99])[0].phrases
    assert [vocabulary.pieces(phrase)[0][0] == "▁" for phrase in encoded] == [False, True]
    assert [vocabulary.decode(phrase) for phrase in encoded] == ["東京", "red"]
    for text in ("東京", "大き", "x", "50%"):
        (inside,) = vocabulary.encode_inside([text])
        assert not vocabulary.pieces(inside)[0].startswith("▁")
        assert vocabulary.decode(inside) == text


def test_without_constraints_all_sizes_are_zero(vocabulary):
    for prefixes, constraints in ((None, None), (["", " "], None), (None, [[], []]), ([" ", ""], [[], ()])):
        assert [encoded.length() for encoded in encode_constraints(vocabulary, prefixes, constraints, [9, 0])] == [
            0,
            0,
        ]
        assert encode_constraints(vocabulary, prefixes, constraints, [9, 0])[0].padded_sizes() == PaddedSizes(0, 0, 0)


def test_ids_have_no_end_and_a_phrase_counts_once(vocabulary):
    (encoded,) = encode_constraints(vocabulary, ["the old"], [["red house", "cat", "red house", "red  house"]], [99])
    assert vocabulary.decode(encoded.prefix) == "the old"
    assert [vocabulary.decode(phrase) for phrase in encoded.phrases] == ["red house", "cat"]
    assert EOS not in np.concatenate([encoded.prefix, *encoded.phrases])


def test_what_fits_to_the_last_token_is_taken(vocabulary):
    ids = vocabulary.encode(["cat sees"])[0]
    assert len(encode_constraints(vocabulary, None, [["cat sees"]], [len(ids)])) == 1
    with pytest.raises(UserError, match=f"sentence 7: its prefix and phrases take {len(ids) - 1} tokens"):
        encode_constraints(vocabulary, None, [["cat sees"]], [len(ids) - 1], first=7)


def test_text_without_a_spelling_is_refused():
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES), model_writer=model, vocab_size=40, model_type="bpe", minloglevel=2
    )
    plain = tokenizer.Tokenizer(model.getvalue())
    assert encode_constraints(plain, ["red"], None, [9])[0].length() > 0
    for prefixes, constraints in ((["漢"], None), (None, [["red", "漢"]])):
        with pytest.raises(UserError, match="sentence 1: the vocabulary cannot write '漢'"):
            encode_constraints(plain, prefixes, constraints, [99])


def test_shapes_are_on_a_ladder_and_rectangles_fill_them(vocabulary):
    encoded_list = encode_constraints(vocabulary, ["red", "", "x" * 20], [["cat"], [], ["a", "a", "z" * 10]], [99] * 3)
    assert [encoded.padded_sizes() for encoded in encoded_list] == [
        PaddedSizes(16, 4, 8),
        PaddedSizes(0, 0, 0),
        PaddedSizes(32, 4, 16),
    ]
    rows_B = np.array([2, 0, PAD_EXAMPLE])
    prefix_BP, phrases_BKL = pad_constraints(encoded_list, rows_B, PaddedSizes(32, 4, 16))
    assert (prefix_BP.shape, phrases_BKL.shape) == ((3, 32), (3, 4, 16))
    assert prefix_BP.dtype == phrases_BKL.dtype == np.int32
    for row, index in enumerate(rows_B[:2]):
        assert prefix_BP[row][prefix_BP[row] != PAD].tolist() == encoded_list[index].prefix.tolist()
        held = [phrase[phrase != PAD].tolist() for phrase in phrases_BKL[row]]
        assert [phrase for phrase in held if phrase] == [phrase.tolist() for phrase in encoded_list[index].phrases]
    assert not prefix_BP[2].any()
    assert not phrases_BKL[2].any()
    assert pad_constraints(encoded_list, np.array([1]), PaddedSizes(0, 0, 0)) == (None, None)
