"""Writes charts as stand-alone SVG files: those of `transformer.evaluation.charts`, and means with intervals."""

import html
import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence

from etils import epath

from transformer.evaluation import charts
from transformer.runtime.files import write_atomic

HEAD = 26  # above the drawing, for the title
LEGEND_ROW, KEY_WIDTH, LETTER_WIDTH = 14, 28, 6  # of the legend; a name is as wide as its key and letters
NAME_WIDTH, ROW_HEIGHT = 130, 24  # of the rows of intervals
STYLE = """
text { font: 11px system-ui, sans-serif; fill: #5b6470 } .title { font-weight: 600; fill: #20262e }
.grid { stroke: #e2e4e8 } .line { fill: none; stroke-width: 1.8; stroke-linejoin: round } .hit { fill: transparent }
.interval { stroke: #2a6fdb; stroke-width: 1.8 } .seed { fill: #9aa3ad }
.baseline { stroke: #c2570c; stroke-dasharray: 3 3 } .faint { stroke-dasharray: 4 3 }
.end { text-anchor: end } .mid { text-anchor: middle }
.line.s1 { stroke: #2a6fdb } .line.s2 { stroke: #c2570c } .line.s3 { stroke: #2b8a57 }
.line.s4 { stroke: #8250c8 } .line.s5 { stroke: #b8860b } .line.s6 { stroke: #5b6470 }
.dot.s1, .key.s1 { fill: #2a6fdb } .dot.s2, .key.s2 { fill: #c2570c } .dot.s3, .key.s3 { fill: #2b8a57 }
.dot.s4, .key.s4 { fill: #8250c8 } .dot.s5, .key.s5 { fill: #b8860b } .dot.s6, .key.s6 { fill: #5b6470 }
"""


def write(
    path: epath.PathLike, title: str, x_label: str, lines: Mapping[str, Iterable[charts.Point]], log: bool = True
) -> None:
    """Writes a chart of lines by name, log-log by default; writes nothing if there is nothing to draw.

    Lines beyond the number of colors are dashed.
    """
    series = [
        charts.Series(name, list(points), True, i % charts.NUM_COLORS + 1, faint=i >= charts.NUM_COLORS)
        for i, (name, points) in enumerate(lines.items())
    ]
    drawing, names = charts.line_drawing(x_label, series, log)
    if not names:
        return
    spacing = KEY_WIDTH + LETTER_WIDTH * max(len(name) for name, _ in names)
    names_in_row = max((charts.WIDTH - charts.LEFT) // spacing, 1)
    num_rows = -(-len(names) // names_in_row)
    keys = []
    for position, (name, css_class) in enumerate(names):
        row, column = divmod(position, names_in_row)
        x, y = charts.LEFT + spacing * column, LEGEND_ROW * (row + 1 - num_rows) - 6
        color, dash = css_class.split()[0], "- -" if "faint" in css_class else "—"
        keys.append(f'<text class="key {color}" x="{x}" y="{y}">{dash} {html.escape(name)}</text>')
    _write_page(path, title, "".join(keys) + drawing, charts.HEIGHT, HEAD + LEGEND_ROW * num_rows)


def write_intervals(
    path: epath.PathLike, title: str, x_label: str, rows: Mapping[str, tuple[Sequence[float], float | None]]
) -> None:
    """Writes a chart with a row for each name: values as small dots, their mean, and half the width of its interval.

    A dashed line is at the mean of the first row. An interval ends at the latest as far beyond all values as these are
    apart, with an arrow: one of two values may be a hundred times as wide. Writes nothing without rows.
    """
    if not rows:
        return
    means = {name: statistics.fmean(values) for name, (values, _) in rows.items()}
    shown = [x for values, _ in rows.values() for x in values]
    beyond = (max(shown) - min(shown)) or math.inf
    lowest, highest = min(shown) - beyond, max(shown) + beyond
    intervals = {
        name: (max(means[name] - interval, lowest), min(means[name] + interval, highest))
        for name, (_, interval) in rows.items()
        if interval is not None
    }
    ends = [*shown, *itertools.chain.from_iterable(intervals.values())]
    ticks, bottom = charts.ticks(min(ends), max(ends), 5), ROW_HEIGHT * len(rows)
    x = charts.Axis(ticks[0], ticks[-1], NAME_WIDTH, charts.WIDTH - charts.RIGHT)

    def line(css_class: str, x1: float, x2: float, y1: float, y2: float) -> str:
        return f'<line class="{css_class}" x1="{x(x1):.1f}" x2="{x(x2):.1f}" y1="{y1:.1f}" y2="{y2:.1f}"/>'

    def text(css_class: str, left: float, y: float, content: str) -> str:
        return f'<text class="{css_class}" x="{left:.1f}" y="{y:.1f}">{html.escape(content)}</text>'

    parts = [line("grid", tick, tick, 0, bottom) for tick in ticks]
    parts += [text("mid", x(tick), bottom + 16, charts.format_si(tick)) for tick in ticks]
    parts.append(text("mid", (x.start + x.end) / 2, bottom + 34, x_label))
    first = next(iter(means.values()))
    parts.append(line("baseline", first, first, 0, bottom))
    for number, (name, (values, _)) in enumerate(rows.items()):
        y, mean = ROW_HEIGHT * (number + 0.5), means[name]
        parts.append(text("end", NAME_WIDTH - 10, y + 4, name))
        if name in intervals:
            parts.append(line("interval", *intervals[name], y, y))
            parts += [
                text("mid", x(end), y + 4, arrow)
                for end, arrow in ((lowest, "‹"), (highest, "›"))
                if end in intervals[name]
            ]
        parts += [f'<circle class="seed" cx="{x(value):.1f}" cy="{y:.1f}" r="2.5"/>' for value in values]
        tip = f"<title>{html.escape(name)}: {mean:.4g}</title>"
        parts.append(f'<circle class="dot s1" cx="{x(mean):.1f}" cy="{y:.1f}" r="4">{tip}</circle>')
    _write_page(path, title, "".join(parts), bottom + charts.BOTTOM, HEAD)


def _write_page(path: epath.PathLike, title: str, drawing: str, height: int, head: int) -> None:
    """Writes a drawing, with its title and whatever else is in the `head` pixels above it."""
    width, total = charts.WIDTH, height + head
    write_atomic(
        epath.Path(path),
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 {-head} {width} {total}" width="{width}" '
        f'height="{total}"><style>{STYLE}</style><rect y="{-head}" width="{width}" height="{total}" fill="#fff"/>'
        f'<text class="title" x="{charts.LEFT}" y="{16 - head}">{html.escape(title)}</text>{drawing}</svg>\n',
    )
