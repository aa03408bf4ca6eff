"""The page: what sentences hold is text, never markup, and what differs is marked."""

from transformer.reporting import report_page
from transformer.reporting.report_page import Cell

EVIL = '<script>alert("x")</script><img src=x onerror=y>&'


def test_whatever_a_sentence_holds_is_text():
    page = report_page.page(
        EVIL,
        EVIL,
        [
            report_page.section("s", EVIL, report_page.sentence(EVIL, EVIL, EVIL, [(EVIL, EVIL + " more")])),
            report_page.tiles([(EVIL, EVIL, EVIL)]),
            report_page.table([Cell(EVIL)], [[Cell(EVIL)]]),
        ],
    )
    assert "alert(" in page
    assert page.count("<script>") == 1  # its own
    assert "<img" not in page


def test_nothing_is_loaded_from_anywhere():
    page = report_page.page("t", "s", [])
    assert "default-src 'none'" in page
    for word in ("http:", "https:", "@import", "url(", "<link", "src="):
        assert word not in page


def test_words_that_the_other_lacks_are_marked():
    reference, translation = report_page.marked("the old cat sat", "the cat sat down here")
    assert reference == 'the <mark class="lack">old</mark> cat sat'
    assert translation == 'the cat sat <mark class="odd">down here</mark>'
    assert report_page.marked("same text", "same text") == ("same text", "same text")
    assert report_page.marked("", "x") == ("", '<mark class="odd">x</mark>')
    assert report_page.marked("", "") == ("", "")


def test_a_section_without_content_is_left_out():
    assert report_page.section("s", "Title", "") == ""
    assert '<section id="s"><h2>Title</h2>' in report_page.section("s", "Title", "<p>x</p>")


def test_light_and_dark():
    assert "prefers-color-scheme: dark" in report_page.STYLE
    for name in ("ink", "paper", "s1", "odd"):
        assert report_page.STYLE.count(f"--{name}:") == 2
