"""The page: what sentences hold is text, never markup, and what differs is marked."""

import re

from transformer.evaluation import report_html
from transformer.evaluation.report_html import Column

EVIL = '<script>alert("x")</script><img src=x onerror=y>&'


def test_whatever_a_sentence_holds_is_text():
    page = report_html.render_page(
        EVIL,
        EVIL,
        [
            report_html.section("s", EVIL, report_html.sentence(EVIL, EVIL, EVIL, [(EVIL, EVIL + " more")])),
            report_html.details(EVIL, "<p>x</p>"),
            report_html.sentence_browser([report_html.sentence(EVIL, EVIL, EVIL, [(EVIL, EVIL)])], [(EVIL, "a", 1)]),
            report_html.stat_cards([(EVIL, EVIL, EVIL)]),
            report_html.table([Column(EVIL)], [[EVIL]]),
        ],
    )
    assert "alert(" in page
    assert page.count("<script>") == 1  # its own
    assert "<img" not in page


def test_nothing_is_loaded_from_anywhere():
    page = report_html.render_page("t", "s", [])
    assert "default-src 'none'" in page
    for word in ("http:", "https:", "@import", "url(", "<link", "src="):
        assert word not in page


def sides(reference, *texts):
    """The reference and the translations as HTML."""
    html = report_html.sentence("t", None, reference, [(f"s{i}", text) for i, text in enumerate(texts)])
    *translations, reference = re.findall('<dd dir="auto">(.*?)</dd>', html)
    return reference, *translations


def test_words_that_the_other_lacks_are_marked():
    assert sides("the old cat sat", "the cat sat down here") == (
        'the <mark class="lack">old</mark> cat sat',
        'the cat sat <mark class="odd">down here</mark>',
    )
    assert sides("same text", "same text") == ("same text", "same text")
    assert sides("", "x") == ("", '<mark class="odd">x</mark>')
    assert sides("", "") == ("", "")


def test_of_several_the_words_that_only_some_match_are_marked():
    assert sides("the old cat sat", "the old cat stood", "a old dog sat") == (
        "the old cat sat",
        '<mark class="won">the</mark> old <mark class="won">cat</mark> <mark class="odd">stood</mark>',
        '<mark class="odd">a</mark> old <mark class="odd">dog</mark> <mark class="won">sat</mark>',
    )
    assert sides("the cat", "the", "a cat", "")[0] == "the cat"


def test_a_section_without_content_is_left_out():
    assert report_html.section("s", "Title", "") == ""
    assert '<section id="s"><h2>Title</h2>' in report_html.section("s", "Title", "<p>x</p>")


def test_light_and_dark():
    assert "prefers-color-scheme: dark" in report_html.STYLE
    for name in ("ink", "paper", "s1", "odd"):
        assert report_html.STYLE.count(f"--{name}:") == 2
