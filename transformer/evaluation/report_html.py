"""HTML elements and styles of the report: a self-contained page, light or dark."""

import difflib
import html
from collections.abc import Sequence
from typing import NamedTuple

STYLE = """
:root { color-scheme: light dark; --ink: #1d2430; --soft: #5c6675; --paper: #fcfcfa; --card: #ffffff; --edge:
  #e2e4e8; --s1: #2a6fdb; --s2: #c2570c; --s3: #2b8a57; --odd: #fde4c4; --odd-ink: #6b3300; --lack: #d8e8fd;
  --lack-ink: #0b3a7e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7ec; --soft: #98a2b1; --paper: #14171c; --card: #1b1f26;
  --edge: #2e343e; --s1: #6aa5ff; --s2: #f2985a; --s3: #66c795; --odd: #573410; --odd-ink: #ffdfb8; --lack: #16365f;
  --lack-ink: #cfe3ff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1060px; padding: 32px 20px 80px; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0; }
h2 { font-size: 1.2rem; margin: 44px 0 12px; }
h3 { font-size: 1rem; margin: 0; }
p { margin: 4px 0 12px; }
.soft, figcaption, th, .shown { color: var(--soft); }
.soft { font-size: .9rem; }
.tiles { display: flex; flex-wrap: wrap; gap: 12px; margin: 24px 0 8px; }
.tile { flex: 1 1 130px; background: var(--card); border: 1px solid var(--edge); border-radius: 10px; padding: 12px
  16px; }
.tile b { display: block; font-size: 1.7rem; font-variant-numeric: tabular-nums; line-height: 1.2; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; }
.scroll { overflow-x: auto; margin-bottom: 16px; }
th { text-align: left; font-weight: 500; }
th, td { padding: 6px 12px 6px 0; border-bottom: 1px solid var(--edge); vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.note { color: var(--soft); font-size: .85rem; overflow-wrap: anywhere; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 400px), 1fr)); gap: 16px; }
.chart, .sentence, .attention { background: var(--card); border: 1px solid var(--edge); border-radius: 10px; margin:
  0; padding: 14px 16px; }
.sentence, .attention { margin-bottom: 12px; }
figcaption { font-size: .9rem; display: flex; justify-content: space-between; flex-wrap: wrap; gap: 8px; }
.key { margin-left: 14px; }
.key::before { content: ""; display: inline-block; width: 14px; height: 3px; margin-right: 6px; vertical-align:
  middle; background: currentColor; }
.key.s1 { color: var(--s1); }
.key.s2 { color: var(--s2); }
.key.s3 { color: var(--s3); }
svg { display: block; max-width: 100%; }
.chart svg { width: 100%; height: auto; }
svg.heat { max-width: none; }
.grid { stroke: var(--edge); }
.line { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
.line.s1 { stroke: var(--s1); }
.line.s2 { stroke: var(--s2); }
.line.s3 { stroke: var(--s3); }
.dot.s1 { fill: var(--s1); }
.dot.s2 { fill: var(--s2); }
.dot.s3 { fill: var(--s3); }
.hit { fill: transparent; }
.bar { fill: var(--s1); }
text { fill: var(--ink); font: 11px system-ui, sans-serif; }
.tick { fill: var(--soft); }
.mid, .value { text-anchor: middle; }
.end { text-anchor: end; }
text.piece { font-size: 12px; }
.frame { fill: none; stroke: var(--edge); }
image, .map img { image-rendering: pixelated; }
@media (prefers-color-scheme: dark) { image, .map img { filter: brightness(1.7); } }
.sentence dl { display: grid; grid-template-columns: 6.5rem 1fr; gap: 2px 12px; margin: 6px 0 0; }
dt { color: var(--soft); font-size: .88rem; }
dd { margin: 0; overflow-wrap: anywhere; }
mark { border-radius: 3px; padding: 0 3px; background: var(--odd); color: var(--odd-ink); text-decoration: underline
  wavy 1px; }
mark.lack { background: var(--lack); color: var(--lack-ink); text-decoration: underline dotted 2px; }
.layer { display: flex; gap: 8px; align-items: center; margin-top: 8px; }
.layer-name { width: 4rem; flex: none; font-size: .85rem; color: var(--soft); }
.map { flex: none; background: none; border: 1px solid var(--edge); border-radius: 6px; padding: 4px; cursor:
  pointer; color: var(--soft); font: 11px system-ui, sans-serif; }
.map img { display: block; width: 84px; height: 84px; }
.map[aria-pressed=true] { border-color: var(--s1); outline: 1px solid var(--s1); }
pre { overflow-x: auto; font-size: .8rem; }
"""

# Enlarges a small attention map when it is pressed.
SCRIPT = """
for (const map of document.querySelectorAll('.map')) map.addEventListener('click', () => {
  const section = map.closest('.attention');
  section.querySelector('image.large').setAttribute('href', map.querySelector('img').src);
  section.querySelector('.shown').textContent = map.title;
  for (const other of section.querySelectorAll('.map')) other.setAttribute('aria-pressed', other === map);
});
"""

# The browser loads nothing, whatever the sentences contain.
CONTENT_SECURITY_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


class Cell(NamedTuple):
    """A table cell: its text and CSS class."""

    text: str
    css_class: str = ""


def render_page(title: str, subtitle: str, sections: Sequence[str]) -> str:
    """The document; `sections` are HTML, of which empty ones are skipped."""
    body = "\n".join(section for section in sections if section)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{CONTENT_SECURITY_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f'<header><h1>{html.escape(title)}</h1><p class="soft">{html.escape(subtitle)}</p></header>\n'
        f"{body}\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def section(name: str, title: str, content: str, note: str = "") -> str:
    """A section with a heading; "" without content."""
    if not content:
        return ""
    paragraph = f'<p class="soft">{note}</p>' if note else ""
    return f'<section id="{name}"><h2>{html.escape(title)}</h2>{paragraph}{content}</section>'


def stat_cards(values: Sequence[tuple[str, str, str]]) -> str:
    """Cards with large figures, each (name, value, meaning)."""
    return (
        '<div class="tiles">'
        + "".join(
            f'<div class="tile"><span class="soft">{html.escape(name)}</span><b>{html.escape(value)}</b>'
            f'<span class="soft">{html.escape(meaning)}</span></div>'
            for name, value, meaning in values
        )
        + "</div>"
    )


def table(head: Sequence[Cell], rows: Sequence[Sequence[Cell]]) -> str:
    """A table with a head."""

    def row(cells: Sequence[Cell], tag: str) -> str:
        return "<tr>" + "".join(f'<{tag} class="{c.css_class}">{html.escape(c.text)}</{tag}>' for c in cells) + "</tr>"

    body = "".join(row(cells, "td") for cells in rows)
    return f'<div class="scroll"><table><thead>{row(head, "th")}</thead><tbody>{body}</tbody></table></div>'


def sentence(title: str, source: str, reference: str, translations: Sequence[tuple[str, str]]) -> str:
    """A source with its reference and (name, translation) pairs, with marked differences."""
    rows = [("source", html.escape(source))]
    rows += [(name, diff_html(reference, text)[1]) for name, text in translations]
    rows.append(("reference", diff_html(reference, translations[0][1])[0]))
    items = "".join(f'<dt>{html.escape(name)}</dt><dd dir="auto">{text}</dd>' for name, text in rows)
    return f'<article class="sentence"><span class="soft">{html.escape(title)}</span><dl>{items}</dl></article>'


def diff_html(reference: str, translation: str) -> tuple[str, str]:
    """Reference and translation as HTML, with marked words that the other lacks."""
    expected, actual = reference.split(), translation.split()
    left, right = [], []
    for tag, a, b, c, d in difflib.SequenceMatcher(None, expected, actual, autojunk=False).get_opcodes():
        is_equal = tag == "equal"
        left += [_words(expected[a:b], "" if is_equal else '<mark class="lack">')]
        right += [_words(actual[c:d], "" if is_equal else '<mark class="odd">')]
    return " ".join(filter(None, left)), " ".join(filter(None, right))


def _words(words: Sequence[str], mark: str) -> str:
    text = html.escape(" ".join(words))
    return f"{mark}{text}</mark>" if mark and text else text
