"""The page: what sentences hold is text, never markup, and what differs is marked."""

from transformer.evaluation import report_html
from transformer.evaluation.report_html import Cell

EVIL = '<script>alert("x")</script><img src=x onerror=y>&'


def test_whatever_a_sentence_holds_is_text():
    page = report_html.render_page(
        EVIL,
        EVIL,
        [
            report_html.section("s", EVIL, report_html.sentence(EVIL, EVIL, EVIL, [(EVIL, EVIL + " more")])),
            report_html.stat_cards([(EVIL, EVIL, EVIL)]),
            report_html.table([Cell(EVIL)], [[Cell(EVIL)]]),
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


def test_words_that_the_other_lacks_are_marked():
    reference, translation = report_html.diff_html("the old cat sat", "the cat sat down here")
    assert reference == 'the <mark class="lack">old</mark> cat sat'
    assert translation == 'the cat sat <mark class="odd">down here</mark>'
    assert report_html.diff_html("same text", "same text") == ("same text", "same text")
    assert report_html.diff_html("", "x") == ("", '<mark class="odd">x</mark>')
    assert report_html.diff_html("", "") == ("", "")


def test_a_section_without_content_is_left_out():
    assert report_html.section("s", "Title", "") == ""
    assert '<section id="s"><h2>Title</h2>' in report_html.section("s", "Title", "<p>x</p>")


def test_light_and_dark():
    assert "prefers-color-scheme: dark" in report_html.STYLE
    for name in ("ink", "paper", "s1", "odd"):
        assert report_html.STYLE.count(f"--{name}:") == 2
