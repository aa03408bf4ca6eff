"""Writes charts of `transformer.evaluation.charts` as stand-alone SVG files for the documentation."""

import html
import re
from collections.abc import Iterable, Mapping

from etils import epath

from transformer.evaluation import charts
from transformer.runtime.files import write_atomic

HEAD = 40  # above the drawing, for title and legend
STYLE = """
text { font: 11px system-ui, sans-serif; fill: #5b6470 } .title { font-weight: 600; fill: #20262e }
.grid { stroke: #e2e4e8 } .line { fill: none; stroke-width: 1.8; stroke-linejoin: round } .hit { fill: transparent }
.end { text-anchor: end } .mid { text-anchor: middle }
.line.s1 { stroke: #2a6fdb } .line.s2 { stroke: #c2570c } .line.s3 { stroke: #2b8a57 }
.line.s4 { stroke: #8250c8 } .line.s5 { stroke: #b8860b } .line.s6 { stroke: #5b6470 }
.dot.s1, .key.s1 { fill: #2a6fdb } .dot.s2, .key.s2 { fill: #c2570c } .dot.s3, .key.s3 { fill: #2b8a57 }
.dot.s4, .key.s4 { fill: #8250c8 } .dot.s5, .key.s5 { fill: #b8860b } .dot.s6, .key.s6 { fill: #5b6470 }
"""


def write(
    path: epath.PathLike, title: str, x_label: str, lines: Mapping[str, Iterable[charts.Point]], log: bool = True
) -> None:
    """Writes a chart of lines by name, log-log by default; writes nothing if there is nothing to draw."""
    series = [charts.Series(name, list(points), markers=True) for name, points in lines.items()]
    figure = charts.line_chart(title, x_label, series, log)
    drawing = re.search(r"<svg[^>]*>(.*)</svg>", figure, re.DOTALL)
    if not drawing:
        return
    names = re.findall(r'<span class="key (s\d)">([^<]*)</span>', figure)
    spacing = min(130, (charts.WIDTH - charts.LEFT) // max(len(names), 1))
    keys = "".join(
        f'<text class="key {name}" x="{charts.LEFT + spacing * position}" y="-6">— {text}</text>'
        for position, (name, text) in enumerate(names)
    )
    width, height = charts.WIDTH, charts.HEIGHT + HEAD
    write_atomic(
        epath.Path(path),
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 {-HEAD} {width} {height}" width="{width}" '
        f'height="{height}"><style>{STYLE}</style><rect y="{-HEAD}" width="{width}" height="{height}" fill="#fff"/>'
        f'<text class="title" x="{charts.LEFT}" y="-24">{html.escape(title)}</text>{keys}{drawing[1]}</svg>\n',
    )
