"""Line and bar charts as SVG, styled by the page (`report_html`)."""

import html
import math
from collections.abc import Sequence
from typing import NamedTuple

WIDTH, HEIGHT = 460, 250
LEFT, RIGHT, TOP, BOTTOM = 52, 16, 14, 34
MAX_POINTS = 400  # of a line

Point = tuple[float, float]


class Series(NamedTuple):
    """A named line of points by increasing x; `markers` draws the points too."""

    name: str
    points: Sequence[Point]
    markers: bool = False


class Axis(NamedTuple):
    """Maps values to coordinates."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


class LogAxis(Axis):
    """A logarithmic axis."""

    def __call__(self, value: float) -> float:
        return Axis(math.log(self.low), math.log(self.high), self.start, self.end)(math.log(value))


def line_chart(title: str, x_label: str, series: Sequence[Series], log: bool = False) -> str:
    """A figure with a line for each series, "" without finite points; `log` is for both axes."""

    def is_drawn(point: Point) -> bool:
        return all(math.isfinite(number) and (number > 0 or not log) for number in point)

    lines = [line._replace(points=downsample([p for p in line.points if is_drawn(p)])) for line in series]
    lines = [line for line in lines if line.points]
    if not lines:
        return ""
    xs, ys = zip(*(point for line in lines for point in line.points), strict=True)
    axis_type, x_ticks_of, y_ticks_of = (LogAxis, power_ticks, log_ticks) if log else (Axis, ticks, ticks)
    x_ticks, y_ticks = x_ticks_of(min(xs), max(xs), 5), y_ticks_of(min(ys), max(ys), 5)
    x = axis_type(min(xs), max(max(xs), min(xs) + 1e-9), LEFT, WIDTH - RIGHT)
    y = axis_type(min(y_ticks[0], min(ys)), max(y_ticks[-1], max(ys)), HEIGHT - BOTTOM, TOP)
    parts = [_grid(x, y, x_ticks, y_ticks, x_label)]
    for number, line in enumerate(lines, 1):
        path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in line.points)
        parts.append(f'<polyline class="line s{number}" points="{path}"/>')
        for a, b in line.points:
            tip = f"<title>{html.escape(line.name)}, {x_label} {format_si(a)}: {b:.4g}</title>"
            css_class = f"dot s{number}" if line.markers else "hit"
            radius = 3 if line.markers else 6
            parts.append(f'<circle class="{css_class}" cx="{x(a):.1f}" cy="{y(b):.1f}" r="{radius}">{tip}</circle>')
    keys = [f'<span class="key s{i}">{html.escape(line.name)}</span>' for i, line in enumerate(lines, 1)]
    return _figure(title, "" if lines[0].name == title else "".join(keys), "".join(parts))


def bar_chart(title: str, x_label: str, bars: Sequence[tuple[str, float, str]]) -> str:
    """A figure with a bar for each (name, value, note), from 0; "" without bars."""
    if not bars:
        return ""
    y_ticks = ticks(0, max(max(value for _, value, _ in bars), 1e-9), 5)
    y, step = Axis(0, y_ticks[-1], HEIGHT - BOTTOM, TOP), (WIDTH - LEFT - RIGHT) / len(bars)
    parts = [_grid(Axis(0, 1, LEFT, WIDTH - RIGHT), y, [], y_ticks, x_label)]
    for i, (name, value, note) in enumerate(bars):
        left, wide, top = LEFT + i * step + step * 0.18, step * 0.64, y(value)
        parts.append(
            f'<rect class="bar" x="{left:.1f}" y="{top:.1f}" width="{wide:.1f}" height="{y(0) - top:.1f}" rx="2">'
            f"<title>{html.escape(note)}</title></rect>"
            f'<text class="value" x="{left + wide / 2:.1f}" y="{top - 4:.1f}">{value:.1f}</text>'
            f'<text class="tick mid" x="{left + wide / 2:.1f}" y="{HEIGHT - BOTTOM + 14}">{html.escape(name)}</text>'
        )
    return _figure(title, "", "".join(parts))


def _figure(title: str, legend: str, drawing: str) -> str:
    name = html.escape(title)
    return (
        f'<figure class="chart"><figcaption>{name}<span class="legend">{legend}</span></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{name}">{drawing}</svg></figure>'
    )


def _grid(x: Axis, y: Axis, x_ticks: Sequence[float], y_ticks: Sequence[float], x_label: str) -> str:
    parts = []
    for value in y_ticks:
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>')
        parts.append(f'<text class="tick end" x="{LEFT - 6}" y="{y(value) + 3.5:.1f}">{format_si(value)}</text>')
    for value in x_ticks:
        if x.low <= value <= x.high:
            parts.append(
                f'<text class="tick mid" x="{x(value):.1f}" y="{HEIGHT - BOTTOM + 14}">{format_si(value)}</text>'
            )
    parts.append(
        f'<text class="tick mid" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 4}">{html.escape(x_label)}</text>'
    )
    return "".join(parts)


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers that cover a range, in steps of 1, 2 or 5 times a power of ten."""
    spread = high - low or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(spread / about))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= spread / about * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, max(last, first + 1) + 1)]


def log_ticks(low: float, high: float, about: int) -> list[float]:
    """Powers of ten that cover a range above 0, or of two if it is narrow."""
    return power_ticks(low, high, about, 10) if high >= 100 * low else power_ticks(low, high, about)


def power_ticks(low: float, high: float, about: int, base: float = 2) -> list[float]:
    """Powers of a base with equal ratios that cover a range above 0."""
    first, last = math.floor(math.log(low, base) + 1e-9), math.ceil(math.log(high, base) - 1e-9)
    every = max(-(-(last - first) // about), 1)
    return [float(base) ** power for power in range(first, max(last, first + 1) + every, every)]


def format_si(value: float) -> str:
    """Formats a number with an SI prefix: 12,000 as 12k."""
    if abs(value) >= 1e9:
        return f"{value / 1e9:.4g}G"
    if abs(value) >= 1e6:
        return f"{value / 1e6:.4g}M"
    return f"{value / 1e3:.4g}k" if abs(value) >= 1e4 else f"{value:.4g}"


def downsample(points: Sequence[Point]) -> list[Point]:
    """About MAX_POINTS evenly spaced points, including the last."""
    every = -(-len(points) // MAX_POINTS)
    return [*points[: -1 or None : max(every, 1)], *points[-1:]] if points else []
