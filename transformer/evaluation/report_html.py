"""HTML elements and styles of reports and comparisons: a self-contained page, light or dark."""

import difflib
import html
import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

STYLE = """
:root { color-scheme: light dark; --ink: #1d2430; --soft: #5c6675; --paper: #fcfcfa; --card: #ffffff; --edge:
  #e2e4e8; --s1: #2a6fdb; --s2: #c2570c; --s3: #2b8a57; --s4: #8e44ad; --s5: #b8860b; --s6: #5b6470;
  --odd: #fde4c4; --odd-ink: #6b3300; --lack: #d8e8fd;
  --lack-ink: #0b3a7e; --won: #d3f0dc; --won-ink: #0c5128; --shade: #1d243044; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7ec; --soft: #98a2b1; --paper: #14171c; --card: #1b1f26;
  --edge: #2e343e; --s1: #6aa5ff; --s2: #f2985a; --s3: #66c795; --s4: #c792ea; --s5: #e0b53c; --s6: #a3adbb;
  --odd: #573410; --odd-ink: #ffdfb8; --lack: #16365f;
  --lack-ink: #cfe3ff; --won: #14452a; --won-ink: #c8f3d8; --shade: #e4e7ec66; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1060px; padding: 32px 20px 80px; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0; }
h2 { font-size: 1.2rem; margin: 44px 0 12px; }
h3 { font-size: 1rem; margin: 16px 0 8px; }
h4, .card h3 { font-size: .95rem; font-weight: 600; margin: 0; }
p { margin: 4px 0 12px; }
.soft, figcaption, th, .shown { color: var(--soft); }
.soft { font-size: .9rem; }
.tiles { display: flex; flex-wrap: wrap; gap: 12px; margin: 24px 0 8px; }
.tile { flex: 1 1 130px; background: var(--card); border: 1px solid var(--edge); border-radius: 10px; padding: 12px
  16px; }
.tile b { display: block; font-size: 1.7rem; font-variant-numeric: tabular-nums; line-height: 1.2; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; }
.scroll { overflow-x: auto; margin-bottom: 16px; --cover: var(--paper); background: linear-gradient(to right,
  var(--cover) 40%, transparent) left / 36px 100% no-repeat local, linear-gradient(to left, var(--cover) 40%,
  transparent) right / 36px 100% no-repeat local, linear-gradient(to right, var(--shade), transparent) left / 16px
  100% no-repeat, linear-gradient(to left, var(--shade), transparent) right / 16px 100% no-repeat; }
.card .scroll, .attention .scroll { --cover: var(--card); }
th { text-align: left; font-weight: 500; }
th, td { padding: 6px 12px 6px 0; border-bottom: 1px solid var(--edge); vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.number + :not(.number) { padding-left: 12px; }
td.note { color: var(--soft); font-size: .85rem; overflow-wrap: anywhere; }
.maps { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 12px; }
.maps > *, .charts > * { min-width: 0; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 400px), 1fr)); gap: 16px; }
.chart, .card, .sentence, .attention { background: var(--card); border: 1px solid var(--edge); border-radius: 10px;
  margin: 0; padding: 14px 16px; }
.sentence, .attention { margin-bottom: 12px; }
figcaption { font-size: .9rem; display: flex; justify-content: space-between; flex-wrap: wrap; gap: 8px; }
.key { margin-left: 14px; }
.key::before { content: ""; display: inline-block; width: 14px; height: 3px; margin-right: 6px; vertical-align:
  middle; background: currentColor; }
.s1 { --color: var(--s1); }
.s2 { --color: var(--s2); }
.s3 { --color: var(--s3); }
.s4 { --color: var(--s4); }
.s5 { --color: var(--s5); }
.s6 { --color: var(--s6); }
.key { color: var(--color); white-space: nowrap; }
.key.faint::before { height: 1px; }
svg { display: block; max-width: 100%; }
.chart svg { width: 100%; height: auto; }
svg.heat { height: auto; }
.grid { stroke: var(--edge); }
.line { fill: none; stroke: var(--color); stroke-width: 1.8; stroke-linejoin: round; }
.line.faint { stroke-width: 1; opacity: .6; }
.dot, .bar { fill: var(--color); }
.hit { fill: transparent; }
.interval { stroke: var(--ink); stroke-width: 1.2; }
text { fill: var(--ink); font: 11px system-ui, sans-serif; }
.tick { fill: var(--soft); }
.mid, .value { text-anchor: middle; }
.end { text-anchor: end; }
text.piece { font-size: 12px; }
.frame { fill: none; stroke: var(--edge); }
image, .map img { image-rendering: pixelated; }
@media (prefers-color-scheme: dark) { image, .map img { filter: brightness(1.7); } }
.sentence dl { display: grid; grid-template-columns: 6.5rem 1fr; gap: 2px 12px; margin: 6px 0 0; }
dt { color: var(--soft); font-size: .88rem; overflow-wrap: anywhere; }
@media (max-width: 560px) { body { padding: 20px 12px 60px; } .chart text { font-size: 13.5px; }
  .sentence dl { grid-template-columns: 1fr; gap: 0; } dt { margin-top: 4px; } }
dd { margin: 0; overflow-wrap: anywhere; }
mark { border-radius: 3px; padding: 0 3px; background: var(--odd); color: var(--odd-ink); text-decoration: underline
  wavy 1px; }
mark.lack { background: var(--lack); color: var(--lack-ink); text-decoration: underline dotted 2px; }
mark.won { background: var(--won); color: var(--won-ink); text-decoration: none; }
.browser { display: flex; flex-wrap: wrap; gap: 8px 12px; align-items: center; margin-bottom: 12px; position: sticky;
  top: 0; background: var(--paper); padding: 8px 0; z-index: 1; }
.browser input, .browser select { font: inherit; font-size: .92rem; color: inherit; background: var(--card); border: 1px
  solid var(--edge); border-radius: 6px; padding: 6px 10px; min-width: 0; max-width: 100%; }
.browser input { flex: 1 1 200px; }
.list .sentence { content-visibility: auto; contain-intrinsic-size: auto 9rem; }
details { margin: 12px 0; }
summary { cursor: pointer; color: var(--soft); font-size: .9rem; }
td.words { min-width: 8.5rem; overflow-wrap: anywhere; }
.card th { white-space: normal; overflow-wrap: anywhere; min-width: min(5.5rem, 13vw); }
.rows { grid-template-columns: minmax(0, 1fr); }
.charts + .charts { margin-top: 16px; }
.card table { font-size: .85rem; }
.layer { display: flex; gap: 8px; align-items: center; margin-top: 8px; }
.layer-name { width: 4rem; flex: none; font-size: .85rem; color: var(--soft); }
.map { flex: none; background: none; border: 1px solid var(--edge); border-radius: 6px; padding: 4px; cursor:
  pointer; color: var(--soft); font: 11px system-ui, sans-serif; }
.map img { display: block; width: 84px; height: 84px; }
.map[aria-pressed=true] { border-color: var(--s1); outline: 1px solid var(--s1); }
pre { overflow-x: auto; font-size: .8rem; }
"""

# Enlarges a small attention map when it is pressed; filters and sorts sentences.
SCRIPT = """
for (const map of document.querySelectorAll('.map')) map.addEventListener('click', () => {
  const section = map.closest('.attention');
  section.querySelector('image.large').setAttribute('href', map.querySelector('img').src);
  section.querySelector('.shown').textContent = map.title;
  for (const other of section.querySelectorAll('.map')) other.setAttribute('aria-pressed', other === map);
});
for (const browser of document.querySelectorAll('.browser')) {
  const [search, order, count] = browser.querySelectorAll('input, select, output'), list = browser.nextElementSibling;
  const items = [...list.children], texts = new Map(items.map(item => [item, item.textContent.toLowerCase()]));
  const filter = () => {
    let shown = 0;
    for (const item of items) {
      item.hidden = !texts.get(item).includes(search.value.toLowerCase());
      shown += !item.hidden;
    }
    count.textContent = `${shown} of ${items.length}`;
  };
  search.addEventListener('input', filter);
  order.addEventListener('change', () => {
    const [key, sign] = order.value.split(' ');
    list.append(...items.sort((a, b) => sign * (a.dataset[key] - b.dataset[key])));
  });
  filter();
}
"""
DIFF_LEGEND = (
    'Marked: <mark class="odd">words of a translation</mark> that the reference lacks, and <mark class="lack">words of '
    "the reference</mark> that the translation lacks."
)

# The browser loads nothing, whatever the sentences contain.
CONTENT_SECURITY_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


class Column(NamedTuple):
    """A column of a table: its title, and the CSS class of its cells."""

    title: str
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
    cards = (
        f'<div class="tile"><span class="soft">{html.escape(name)}</span><b>{html.escape(value)}</b>'
        f'<span class="soft">{html.escape(meaning)}</span></div>'
        for name, value, meaning in values
    )
    return f'<div class="tiles">{"".join(cards)}</div>'


def table(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> str:
    """A table with a head; the rows are text."""

    def row(texts: Sequence[str], tag: str) -> str:
        cells = zip(columns, texts, strict=True)
        return (
            "<tr>" + "".join(f'<{tag} class="{c.css_class}">{html.escape(text)}</{tag}>' for c, text in cells) + "</tr>"
        )

    head, body = row([column.title for column in columns], "th"), "".join(row(texts, "td") for texts in rows)
    return f'<div class="scroll"><table><thead>{head}</thead><tbody>{body}</tbody></table></div>'


def numbers(*titles: str) -> list[Column]:
    """Columns of numbers."""
    return [Column(title, "number") for title in titles]


def details(summary: str, content: str) -> str:
    """Content that opens when its summary is pressed; "" without content."""
    return f"<details><summary>{html.escape(summary)}</summary>{content}</details>" if content else ""


def sentence(
    title: str,
    source: str | None,
    reference: str,
    translations: Sequence[tuple[str, str]],
    values: Mapping[str, float] | None = None,
) -> str:
    """A source with its reference and (name, translation) pairs, with marked differences.

    Of several translations, the words that match the reference where another one does not are marked too, and those of
    the reference that all of them lack.

    Args:
      values: for the orders of `sentence_browser`.
    """
    expected = reference.split()
    sides = [text.split() for _, text in translations]
    matches = [_matches(expected, words) for words in sides]
    by_all = set.intersection(*(set(match) for match in matches))
    rows = [("source", html.escape(source))] if source is not None else []
    for (name, _), words, match in zip(translations, sides, matches, strict=True):
        won = {place for number, place in match.items() if number not in by_all}
        found = set(match.values())
        classes = ["won" if i in won else "" if i in found else "odd" for i in range(len(words))]
        rows.append((name, _marked(words, classes)))
    by_any = set.union(*(set(match) for match in matches))
    rows.append(("reference", _marked(expected, ["" if i in by_any else "lack" for i in range(len(expected))])))
    items = "".join(f'<dt>{html.escape(name)}</dt><dd dir="auto">{text}</dd>' for name, text in rows)
    data = "".join(f' data-{name}="{value:.10g}"' for name, value in (values or {}).items())
    return f'<article class="sentence"{data}><span class="soft">{html.escape(title)}</span><dl>{items}</dl></article>'


def sentence_browser(articles: Sequence[str], orders: Sequence[tuple[str, str, int]]) -> str:
    """Sentences with a text filter and a choice of orders.

    Args:
      articles: by `sentence`, in the first order.
      orders: each (name, key of the values of `sentence`, 1 for ascending or -1).
    """
    options = "".join(f'<option value="{key} {sign}">{html.escape(name)}</option>' for name, key, sign in orders)
    return (
        '<div class="browser"><input type="search" placeholder="filter by text" aria-label="filter by text">'
        f'<select aria-label="order">{options}</select><output class="soft">{len(articles):,}</output></div>'
        f'<div class="list">{"".join(articles)}</div>'
    )


def _matches(expected: Sequence[str], actual: Sequence[str]) -> dict[int, int]:
    """Index of each matched reference word → index of the word that matches it."""
    blocks = difflib.SequenceMatcher(None, expected, actual, autojunk=False).get_matching_blocks()
    return {block.a + i: block.b + i for block in blocks for i in range(block.size)}


def _marked(words: Sequence[str], classes: Sequence[str]) -> str:
    """The words as HTML; neighbors of one CSS class share a mark."""
    parts = []
    for css_class, group in itertools.groupby(zip(words, classes, strict=True), key=lambda pair: pair[1]):
        text = html.escape(" ".join(word for word, _ in group))
        parts.append(f'<mark class="{css_class}">{text}</mark>' if css_class else text)
    return " ".join(parts)
