"""Where systems differ: counts that a person can check, and a page that a browser shows."""

import math
import re

import pytest

from tests.evaluation.test_report import CHROMIUM, browse, section_of
from tests.evaluation.test_significance import FAIR, GOOD, POOR, REFERENCES
from transformer.evaluation import comparison, comparison_html
from transformer.evaluation.metrics import bleu_by_source_length, score
from transformer.evaluation.report_html import render_page
from transformer.evaluation.systems import System
from transformer.runtime.errors import UserError

EVIL = "</script><script>document.title = 'broken'</script>"
SOURCES = [f"{EVIL if i == 3 else 'source'} " + "word " * (i % 25) for i in range(len(REFERENCES))]
SYSTEMS = [System("poor <b>", "/x/poor", POOR), System("good", "/x/good", GOOD), System("fair", "/x/fair", FAIR)]


@pytest.fixture(scope="module")
def compared():
    return comparison.compare(SYSTEMS, SOURCES, [REFERENCES], "13a", samples=100)


def test_scores_by_length_are_those_of_the_groups(compared):
    bleu, chrf, _ = compared.breakdowns
    assert (bleu.key, chrf.key) == ("bleu_by_source_length", "chrf_by_source_length")
    for number, system in enumerate(SYSTEMS):
        groups = bleu_by_source_length(SOURCES, system.translations, [REFERENCES])
        assert bleu.scores[number] == {name: group["bleu"] for name, group in groups.items()}
    assert sum(bleu.counts.values()) == len(SOURCES)
    assert all(interval > 0 for intervals in bleu.intervals for interval in intervals.values())


def test_lengths_of_very_many_sentences_have_no_intervals(compared, monkeypatch):
    """sacreBLEU's bootstrap would hold 1,000 copies of their statistics at once."""
    monkeypatch.setattr(comparison, "MAX_RESAMPLED", 5)
    groups = {"0-10": range(5), "11-20": range(5, 11)}
    found = comparison.by_length("bleu", SYSTEMS, [REFERENCES], groups, "source", "13a")
    assert found.intervals == []
    monkeypatch.setattr(comparison, "MAX_RESAMPLED", 6)
    resampled = comparison.by_length("bleu", SYSTEMS, [REFERENCES], groups, "source", "13a")
    assert found.scores == resampled.scores
    assert "± " not in comparison_html.breakdown_table(found, SYSTEMS)


def test_without_sources_the_lengths_are_those_of_the_references():
    result = comparison.compare(SYSTEMS[:2], [], [REFERENCES], "13a", samples=20)
    assert result.breakdowns[0].key == "bleu_by_reference_length"
    assert result.breakdowns[0].counts == {"0-10": len(REFERENCES)}


def test_f1_counts_each_word_as_often_as_the_reference_has_it():
    references = [["the", "cat", "the"], ["rare"]]
    system = [["the", "the", "the", "dog"], ["rare", "rare"]]
    counts = {"the": 5, "cat": 1, "rare": 1}
    result = comparison.by_frequency([system, references], references, counts, "references")
    assert result.counts == {"1": 2, "5-9": 2}  # cat and rare; the
    # "the": 2 matched of 3 written and 2 expected; once: 1 matched of 2 written and 2 expected
    assert result.scores[0] == pytest.approx({"1": 100 * 2 * 1 / 4, "5-9": 100 * 2 * 2 / 5})
    assert result.scores[1] == {"1": 100, "5-9": 100}


def test_words_are_counted_in_the_training_text_where_it_is_given():
    result = comparison.compare(SYSTEMS[:2], [], [["cat cat"] * 60], "13a", training=["cat"] * 5, samples=20)
    assert result.breakdowns[2].counts == {"5-9": 120}
    assert "training text" in result.breakdowns[2].x_label
    result = comparison.compare(SYSTEMS[:2], [], [["cat"] * 60], "13a", ["cat"], "wiki.de", samples=20)
    assert "wiki.de" in result.breakdowns[2].x_label


def test_ngrams_are_those_that_one_system_matches_more_often():
    references = [["a", "b", "c"], ["a", "b", "c"], ["x", "y"]]
    one = comparison.count_matches([["a", "b", "c"], ["a", "b", "c"], ["x"]], references)
    other = comparison.count_matches([["a", "a"], ["b"], ["x", "y"]], references)
    assert one["a", "b", "c"] == 2
    assert other["a",] == 1  # twice written, once expected
    totals = comparison.collections.Counter(n for line in references for n in comparison.ngrams_of(line))
    for_one, for_other = comparison.ngram_differences(one, other, totals)
    assert for_one[0] == comparison.NgramDifference("a b c", 0, 2, 2)
    assert for_one[0].log_odds == pytest.approx(math.log(1 / 3))
    assert [each.text for each in for_one] == ["a b c", "a", "b"]  # those within it differ by another count
    assert [each.text for each in for_other] == ["x y"]  # y is within it, with the same counts
    assert not any(each.text == "x" for each in (*for_one, *for_other))


def test_the_sentences_that_differ_most_come_first_and_last():
    ours, theirs = list(REFERENCES), list(REFERENCES)
    theirs[7], ours[9] = "nothing of it", "no"
    theirs[11] = REFERENCES[11] + " really"
    pair = [System("theirs", "theirs", theirs), System("ours", "ours", ours)]
    result = comparison.compare(pair, SOURCES, [REFERENCES], "13a", samples=20)
    assert comparison.largest_differences(result) == [7, 11, 9]
    text = comparison.format_examples(result)
    assert text.index("sentence 8:") < text.index("sentence 12:") < text.index("sentence 10:")
    assert f"    reference   {REFERENCES[7]}" in text
    assert "chrF2 100.0 against" in text


def test_all_systems_are_in_the_json(compared):
    fields = comparison.as_json(compared)
    assert fields["sentences"] == len(REFERENCES)
    assert "tok:13a" in fields["signatures"]["bleu"][0]
    assert [each["name"] for each in fields["systems"]] == ["poor <b>", "good", "fair"]
    for each, system in zip(fields["systems"], SYSTEMS, strict=True):
        assert each["bleu"] == pytest.approx(score(system.translations, [REFERENCES], ["bleu"])["bleu"])
        assert {"bleu_interval", "ter", "chrf_by_source_length", "f1_by_frequency", "path"} < each.keys()
    assert "versus" not in fields["systems"][0]
    assert fields["systems"][1]["versus"]["bleu"]["significant"]


def test_nothing_to_compare_is_an_error():
    with pytest.raises(UserError, match="no sentences to compare"):
        comparison.compare([System("a", "a", []), System("b", "b", [])], [], [[]], "13a")


@pytest.fixture(scope="module")
def page(compared):
    return render_page("compared", "of a test", comparison_html.sections(compared))


def test_the_page_has_every_sentence_and_every_system(page):
    for name in ("versus", "breakdowns", "ngrams", "sentences"):
        assert "poor &lt;b&gt;" in section_of(page, name)
    versus = section_of(page, "versus")
    assert '<th class="number">randomization p</th><th class="">verdict</th>' in versus
    assert '<td class="number">≤ 0.01</td>' in versus
    assert len(re.findall("nrefs:1.(?:bs|ar):100.seed", versus)) == 2 * 3
    sentences = section_of(page, "sentences")
    assert sentences.count('<article class="sentence"') == len(REFERENCES)
    assert sentences.count("<option") == 5  # two for each system but the baseline, and the order of the set
    assert section_of(page, "breakdowns").count('<figure class="chart">') == 3 + 2
    assert "<b>" not in page.replace("<b></b>", "")


def test_only_the_sentences_that_differ_most_are_on_the_page_of_a_large_set(compared, monkeypatch):
    monkeypatch.setattr(comparison_html, "MAX_SENTENCES", 7)
    section = comparison_html.sentence_section(compared)
    assert section.count('<article class="sentence"') == 7
    assert f"The 7 of {len(REFERENCES)} sentences that differ most." in section


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium to open the page with; install Debian's package chromium")
def test_a_browser_filters_and_sorts(page, compared, tmp_path):
    """Both widths show the page without a sideways scroll; the console stays empty.

    A table that is wider than its frame has a shade at the edge, which another background covers at the end.
    """
    act = """<script>
    const [search, order, count] = document.querySelectorAll('.browser input, .browser select, .browser output');
    order.value = 'number 1'; order.dispatchEvent(new Event('change'));
    search.value = 'BROKEN'; search.dispatchEvent(new Event('input'));
    document.title = `${count.textContent}; first ${document.querySelector('.list .sentence').dataset.number}; `
      + `wide ${document.documentElement.scrollWidth > innerWidth}`;
    const frame = document.querySelector('.scroll'), style = getComputedStyle(frame);
    document.title += `; cut ${frame.scrollWidth > frame.clientWidth} ${style.backgroundAttachment}`;
    </script></body>"""
    path = tmp_path / "page.html"
    path.write_text(page.replace("</body>", act))
    for size, cut in (("390,900", "true"), ("1300,900", "false")):
        shown = browse(path, tmp_path, "--dump-dom", f"--window-size={size}")
        hint = f"cut {cut} local, local, scroll, scroll"
        assert f"<title>1 of {len(REFERENCES)}; first 1; wide false; {hint}</title>" in shown.stdout
        assert "CONSOLE" not in shown.stderr


@pytest.mark.slow
@pytest.mark.reported
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium to open the page with; install Debian's package chromium")
@pytest.mark.parametrize("size", ["390,900", "1300,900"])
def test_long_words_fit_into_the_tables_of_ngrams(tmp_path, size):
    word = "Rindfleischetikettierungsüberwachungsaufgabenübertragungsgesetz"
    systems = [System("base-averaged", "a", POOR), System("modern-rotary", "b", [f"{line} {word}" for line in GOOD])]
    result = comparison.compare(systems, [], [[f"{line} {word}" for line in REFERENCES]], "13a", samples=20)
    act = """<script>document.title = [...document.querySelectorAll('#ngrams .scroll')].map(
      frame => frame.scrollWidth - frame.clientWidth)</script></body>"""
    path = tmp_path / "page.html"
    path.write_text(render_page("", "", comparison_html.sections(result)).replace("</body>", act))
    assert "<title>0,0</title>" in browse(path, tmp_path, "--dump-dom", f"--window-size={size}").stdout
