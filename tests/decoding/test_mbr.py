"""The chrF of sacreBLEU, and the translation that is most like the others by it."""

import numpy as np
import pytest
from sacrebleu.metrics import CHRF

from transformer.decoding.mbr import expected_chrf, pairwise_chrf

TEXTS = [
    "",
    " ",
    "a",
    "ab",
    "Der Zug kam um 23:29 Uhr in Madrid an.",
    "Der Zug kam  um 23:29 Uhr in Madrid an .",
    "Der Bus kam um 23:28 Uhr in Rom an.",
    "aaaaaaaaaa",
    "漢字 かな",
    "völlig anders",
]


def test_pairwise_scores_are_those_of_sacrebleu():
    metric = CHRF()
    letters = np.array(list("abc de"))
    rng = np.random.default_rng(0)
    texts = TEXTS + ["".join(rng.choice(letters, rng.integers(1, 30))) for _ in range(20)]
    got = pairwise_chrf(texts)
    want = [[metric.sentence_score(one, [other]).score for other in texts] for one in texts]
    np.testing.assert_allclose(got, want, atol=1e-9)
    assert len(np.unique(got.round(6))) > 100


def test_the_expected_score_counts_a_translation_as_often_as_it_was_drawn():
    near, nearer, far = "the cat sat", "the cat sits", "dogs run"
    assert np.argmax(expected_chrf([near, nearer, far])) in (0, 1)
    assert np.argmax(expected_chrf([near, far, far, far])) == 1
    matrix = pairwise_chrf([near, far, far])
    assert expected_chrf([near, far, far])[0] == pytest.approx((100 + 2 * matrix[0, 1]) / 3)


def test_nothing_but_empty_texts_score_nothing():
    assert expected_chrf(["", ""]).tolist() == [0, 0]
