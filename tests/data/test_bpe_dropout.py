"""Segmentations by BPE with dropout: the distribution of the paper's algorithm, and the text of the words."""

import collections
import itertools

import numpy as np
import pytest

from tests.conftest import ROOT
from transformer.data import tokenizer
from transformer.data.batching import JaggedArray
from transformer.data.bpe_dropout import BpeMerges, segment
from transformer.data.tokenizer import BpePiece

DRAWS = 40_000


def merges_of(*texts):
    """A vocabulary whose pieces are learnt in this order."""
    return BpeMerges([BpePiece(text, -float(rank), True) for rank, text in enumerate(texts)])


def drawn(merges, words, rate, count, first_key=1):
    """The segmentations of words that are spelled with ids, shorter words first."""
    keys_W = np.arange(first_key, first_key + len(words), dtype=np.uint64)
    made = segment(merges, JaggedArray.from_sequences([np.array(word) for word in words]), rate, keys_W, count)
    return [tuple(made.flat[a:b].tolist()) for a, b in itertools.pairwise(made.offsets)]


def exact_distribution(texts, word, rate):
    """Of Algorithm 1 of Provilkov et al. 2020, by all subsets of pairs that may be left out at each step."""
    result = collections.Counter()

    def advance(symbols, probability):
        pairs = [(texts.index(a + b), i) for i, (a, b) in enumerate(itertools.pairwise(symbols)) if a + b in texts]
        for kept in itertools.product([True, False], repeat=len(pairs)):
            chance = probability * np.prod([1 - rate if keep else rate for keep in kept])
            left = [pair for pair, keep in zip(pairs, kept, strict=True) if keep]
            if not left:
                result[symbols] += chance
                continue
            i = min(left)[1]
            advance((*symbols[:i], symbols[i] + symbols[i + 1], *symbols[i + 2 :]), chance)

    advance(tuple(word), 1.0)
    return result


@pytest.mark.parametrize("rate", [0.1, 0.5])
@pytest.mark.parametrize("word", ["ab", "abc", "aabbc"])
def test_the_distribution_is_that_of_the_paper(word, rate):
    texts = ["a", "b", "c", "bc", "ab", "aa", "abc", "bb", "aab", "aabbc"]
    wanted = exact_distribution(texts, word, rate)
    got = collections.Counter(drawn(merges_of(*texts), [[texts.index(c) for c in word]], rate, DRAWS))
    assert sum(wanted.values()) == pytest.approx(1)
    for symbols, probability in wanted.items():
        deviation = np.sqrt(probability * (1 - probability) / DRAWS)
        share = got.pop(tuple(texts.index(symbol) for symbol in symbols), 0) / DRAWS
        assert share == pytest.approx(probability, abs=5 * deviation + 1 / DRAWS), symbols
    assert not got


@pytest.mark.parametrize("rate", [0.0, 0.05, 0.3, 0.9])
def test_the_share_of_merges_left_out_is_the_rate(rate):
    """Of words with one merge, each with a key of its own."""
    made = drawn(merges_of("a", "b", "ab"), [[0, 1]] * (DRAWS // 4), rate, 4)
    share = sum(len(ids) == 2 for ids in made) / DRAWS
    assert share == pytest.approx(rate, abs=5 * np.sqrt(rate * (1 - rate) / DRAWS))


@pytest.fixture(scope="module")
def trained():
    lines = (ROOT / "docs" / "data.md").read_text().splitlines()
    return tokenizer.train([line for line in lines if line], 700, "bpe"), sorted(
        {w for line in lines for w in line.split()}
    )


def spelled(merges, trained, words):
    """The words whose tokens are merged from characters, by length, and the ids of their characters."""
    ids = JaggedArray.from_sequences([ids[:-1] for ids in trained.encode(words)])
    characters = merges.spell(ids)
    order = np.argsort(characters.lengths, kind="stable")
    rows = [characters.flat[characters.offsets[i] : characters.offsets[i + 1]] for i in order]
    return [words[i] for i in order], rows


def test_without_dropout_it_splits_as_sentencepiece_does(trained):
    vocabulary, words = trained
    merges = BpeMerges(vocabulary.bpe_pieces())
    words, rows = spelled(merges, vocabulary, [*words, "naïve☃déjà", "☃☃", "x" * 40])
    assert len(words) > 400
    for word, ids in zip(words, drawn(merges, rows, 0.0, 1), strict=True):
        assert ids == tuple(vocabulary.encode([word])[0][:-1].tolist())


def test_every_segmentation_is_of_the_same_word(trained):
    vocabulary, words = trained
    merges = BpeMerges(vocabulary.bpe_pieces())
    words, rows = spelled(merges, vocabulary, [*words, "naïve☃déjà"])
    made = drawn(merges, rows, 0.2, 8)
    for number, ids in enumerate(made):
        assert vocabulary.decode(ids) == vocabulary.decode(vocabulary.encode([words[number // 8]])[0])
    assert len(set(made)) > 2 * len(words)


def test_a_word_s_segmentations_depend_on_its_key_alone(trained):
    vocabulary, words = trained
    merges = BpeMerges(vocabulary.bpe_pieces())
    _, rows = spelled(merges, vocabulary, words)
    made = drawn(merges, rows, 0.3, 4)
    for number in (3, 100, 300):
        assert (
            drawn(merges, rows[number : number + 2], 0.3, 4, first_key=1 + number) == made[4 * number : 4 * number + 8]
        )
    assert drawn(merges, rows, 0.3, 4, first_key=10_000) != made


def test_without_merges_words_stay_characters():
    assert drawn(merges_of("a", "b"), [[0, 1, 1]], 0.1, 2) == [(0, 1, 1)] * 2
    assert drawn(merges_of("a", "b"), [], 0.1, 2) == []


def test_only_sentencepiece_bpe_has_merges(trained):
    assert len(trained[0].bpe_pieces()) == 700
    assert tokenizer.train(["a b c ab"] * 9, 264, "unigram").bpe_pieces() == []
