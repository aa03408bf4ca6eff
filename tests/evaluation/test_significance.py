"""The tests are sacreBLEU's, and equal systems are never different."""

import re
import subprocess
import sys

import numpy as np
import pytest

from transformer.evaluation import metrics, significance
from transformer.runtime.errors import UserError

WORDS = ["red", "green", "blue", "old", "new", "house", "tree", "cat", "dog", "sees", "has", "the", "a", "runs"]
RNG = np.random.default_rng(0)
REFERENCES = [" ".join(RNG.choice(WORDS, 8)) for _ in range(60)]


def noisy(share, seed):
    """The references with a share of their words replaced."""
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS) if rng.random() < share else w for w in line.split()) for line in REFERENCES]


GOOD, FAIR, POOR = noisy(0.1, 1), noisy(0.1, 2), noisy(0.6, 3)


def test_a_clear_difference_is_significant_and_a_small_one_is_not():
    for each in significance.paired_tests(GOOD, POOR, [REFERENCES], "13a", samples=200):
        assert each.is_significant
        assert (each.difference < 0) == (each.metric == "ter")
    (bleu,) = significance.paired_tests(GOOD, FAIR, [REFERENCES], "13a", ["bleu"])
    assert "bs:1000|" in bleu.signatures[0]
    assert "ar:10000|" in bleu.signatures[1]
    assert not bleu.is_significant


def test_scores_of_sentences_are_tested_too():
    """Of 60 lines 40 against 20 are right."""
    better, worse = ([line if i % 3 in kept else "x" for i, line in enumerate(REFERENCES)] for kept in ((0, 1), (2,)))
    (accuracy,) = significance.paired_tests(better, worse, [REFERENCES], "13a", ["accuracy"], samples=500)
    assert (accuracy.score, accuracy.baseline_score) == pytest.approx((200 / 3, 100 / 3))
    assert accuracy.is_significant
    # The standard error of a share of 2/3 among 60, times 1.96.
    assert accuracy.interval == pytest.approx(196 * (2 / 9 / 60) ** 0.5, rel=0.2)
    assert accuracy.signatures[1] == "nrefs:1|ar:500|seed:12345|normalization:strip"
    assert "  accuracy  " in significance.format_table("a", "b", [accuracy])


@pytest.mark.parametrize(("wins", "losses", "exact"), [(3, 0, 0.25), (10, 3, 0.0923), (6, 0, 0.03125)])
def test_samples_that_differ_as_much_as_the_systems_count(wins, losses, exact):
    """The exact p of a sign test, to which sacreBLEU's own is 0.0001, 0.02 and 0.0001."""
    ours = ["x" if i < losses else line for i, line in enumerate(REFERENCES)]
    theirs = ["x" if i >= len(REFERENCES) - wins else line for i, line in enumerate(REFERENCES)]
    p = significance.randomization_p(metrics.make_metric("accuracy"), ours, theirs, [REFERENCES], trials=4000)
    assert p == pytest.approx(exact, abs=0.02)


def test_equal_systems_differ_by_nothing_but_chance():
    """Where no sample differs by more than nothing, sacreBLEU counts none, and its p is the least there is."""
    for each in significance.paired_tests(GOOD, list(GOOD), [REFERENCES], "13a", samples=100):
        assert (each.difference, each.bootstrap_p, each.randomization_p) == (0.0, 1.0, 1.0)
        assert not each.is_significant


@pytest.mark.parametrize(("flag", "field"), [("--paired-bs", "bootstrap_p"), ("--paired-ar", "randomization_p")])
def test_numbers_are_those_of_the_sacrebleu_command(tmp_path, flag, field):
    for name, lines in (("ref", REFERENCES), ("theirs", FAIR), ("ours", GOOD)):
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    paths = [str(tmp_path / name) for name in ("ref", "theirs", "ours")]
    command = [sys.executable, "-m", "sacrebleu", paths[0], "-i", *paths[1:], "-m", "chrf", flag, "-f", "text"]
    result = subprocess.run(
        [*command, f"{flag}-n", "200"], capture_output=True, text=True, check=True, env={"NO_COLOR": "1"}
    )
    (chrf,) = significance.paired_tests(GOOD, FAIR, [REFERENCES], "13a", ["chrf"], samples=200)
    (p,) = re.findall(r"p = (\d\.\d+)", result.stdout)
    assert getattr(chrf, field) == pytest.approx(float(p), abs=5e-5)


def test_unequal_counts_and_none_are_errors():
    with pytest.raises(UserError, match="got 60 and 59"):
        significance.paired_tests(GOOD, POOR[1:], [REFERENCES], "13a")
    with pytest.raises(UserError, match="60 sentences and 59 lines in reference 1"):
        significance.paired_tests(GOOD, POOR, [REFERENCES[1:]], "13a")
    with pytest.raises(UserError, match="no sentences to compare"):
        significance.paired_tests([], [], [[]], "13a")


def test_an_interval_holds_the_score_and_shrinks_with_the_text():
    one, interval = significance.score_with_interval("chrf", POOR, [REFERENCES], "13a")
    assert one == metrics.score(POOR, [REFERENCES], ["chrf"])["chrf"]
    assert 0 < significance.score_with_interval("chrf", POOR * 4, [REFERENCES * 4], "13a")[1] < 0.7 * interval


@pytest.mark.reported
def test_translations_that_match_nothing_have_an_interval_of_0():
    """sacreBLEU's own corpus_score(n_bootstrap=…) fails on them."""
    assert significance.score_with_interval("chrf", ["x", "x y"], [["a b", ""]], "13a") == (0, 0)


def test_two_blank_lines_agree():
    for metric in ("chrf", "accuracy", "rougeL"):
        assert metrics.sentence_scores(metric, ["", "x", "a"], [["", "", "a"]], [0, 1, 2]) == [100, 0, 100]


def test_a_comparison_is_a_table_and_json():
    tests = significance.paired_tests(GOOD, POOR, [REFERENCES], "13a", samples=200)
    text = significance.format_table("mine", "other", tests)
    assert "mine compared with other" in text
    assert text.count("   better\n") == 3
    assert re.search("randomization p   verdict$", text, re.M)
    assert text.count("≤ 0.005") == 6  # no p of 200 samples is smaller
    for test, label in zip(tests, ("BLEU", "chrF2", "TER"), strict=True):
        assert re.search(
            rf"^  {label} +{re.escape(test.signatures[0])}\n +{re.escape(test.signatures[1])}$", text, re.M
        )
    assert "bs:200|seed:12345" in text
    fields = significance.as_json("other", tests)
    assert list(fields) == ["name", "bleu", "chrf", "ter"]
    assert fields["bleu"]["difference"] == fields["bleu"]["ours"] - fields["bleu"]["theirs"] > 0
    assert fields["bleu"]["significant"] is True
