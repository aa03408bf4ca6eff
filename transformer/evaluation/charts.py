"""Line charts, bar charts and histograms as SVG, styled by the page (`report_html`)."""

import collections
import html
import math
from collections.abc import Sequence
from typing import NamedTuple

WIDTH, HEIGHT = 460, 262
LEFT, RIGHT, TOP, BOTTOM = 52, 16, 22, 42
TICK_Y, AXIS_LABEL_Y = HEIGHT - BOTTOM + 20, HEIGHT - 4  # baselines
LINE_HEIGHT = 14  # of labels
MAX_POINTS = 400  # of a line
NUM_COLORS = 6  # of the page, as CSS classes s1 to s6
MIN_LABEL_WIDTH = 42  # of a bar that has its value above it
BIN_WIDTHS = (0.5, 1, 2, 5, 10)  # of a histogram; the smallest that needs at most MAX_BINS
MAX_BINS = 40
SI_PREFIXES = {"E": 1e18, "P": 1e15, "T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3}
COVERED_BY_AXIS = 0.98  # share of the values of a histogram that are not 0

Point = tuple[float, float]


class Series(NamedTuple):
    """A named line of points by increasing x.

    Attributes:
      markers: whether points are drawn too.
      color: from 1; 0 for the line's number in the chart.
      faint: whether the line is drawn thin, as one of two of a color.
    """

    name: str
    points: Sequence[Point]
    markers: bool = False
    color: int = 0
    faint: bool = False


class Bars(NamedTuple):
    """The bars of one name, one in each group.

    Attributes:
      values: from 0 up.
      notes: shown while the pointer is on a bar.
      intervals: half the widths of confidence intervals; none are drawn if it is empty.
    """

    name: str
    values: Sequence[float]
    notes: Sequence[str]
    intervals: Sequence[float] = ()


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


def line_chart(title: str, x_label: str, series: Sequence[Series], log_y: bool = False) -> str:
    """A figure of `line_drawing`; "" without finite points. No legend if its first line is named as the figure."""
    drawing, keys = line_drawing(x_label, series, log_y=log_y)
    if not keys:
        return ""
    return _figure(title, [] if keys[0][0] == title else keys, drawing)


def line_drawing(
    x_label: str, series: Sequence[Series], log: bool = False, log_y: bool = False
) -> tuple[str, list[tuple[str, str]]]:
    """A line for each series with finite points, and the lines' (name, CSS class); `log` is for both axes.

    A line of one point is a marker with its value.
    """
    log_y = log or log_y

    def is_drawn(point: Point) -> bool:
        x, y = point
        return math.isfinite(x) and math.isfinite(y) and (x > 0 or not log) and (y > 0 or not log_y)

    lines = [line._replace(points=downsample([p for p in line.points if is_drawn(p)])) for line in series]
    lines = [line._replace(color=line.color or i) for i, line in enumerate((l for l in lines if l.points), 1)]
    if not lines:
        return "", []
    xs, ys = zip(*(point for line in lines for point in line.points), strict=True)
    left, right = min(xs), max(xs)
    if left == right:
        left, right = (left / 2, right * 2) if log else (left - 1, right + 1)
    x_ticks = (power_ticks if log else ticks)(min(xs), max(xs), 5)
    y_ticks = (log_ticks if log_y else ticks)(min(ys), max(ys), 5)
    x = (LogAxis if log else Axis)(left, right, LEFT, WIDTH - RIGHT)
    low, high = min(y_ticks[0], min(ys)), max(y_ticks[-1], max(ys))
    y = (LogAxis if log_y else Axis)(low, high, HEIGHT - BOTTOM, TOP)
    parts = [_grid(x, y, x_ticks, y_ticks, x_label)]
    for line in lines:
        path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in line.points)
        parts.append(f'<polyline class="line s{line.color}{" faint" if line.faint else ""}" points="{path}"/>')
        for a, b in line.points:
            tip = f"<title>{html.escape(line.name)}, {x_label} {format_si(a)}: {b:.4g}</title>"
            is_dot = line.markers or len(line.points) == 1
            css_class, radius = (f"dot s{line.color}", 3) if is_dot else ("hit", 6)
            parts.append(f'<circle class="{css_class}" cx="{x(a):.1f}" cy="{y(b):.1f}" r="{radius}">{tip}</circle>')
    parts += _values_of_single_points([line.points[0] for line in lines if len(line.points) == 1], x, y)
    keys = [(line.name, f"s{line.color}{' faint' if line.faint else ''}") for line in lines]
    return "".join(parts), keys


def _values_of_single_points(points: Sequence[Point], x: Axis, y: Axis) -> list[str]:
    """The values beside the points, except for one that would cover another."""
    shown: list[Point] = []
    for a, b in points:
        if all(a != other_a or abs(y(b) - y(other_b)) >= LINE_HEIGHT for other_a, other_b in shown):
            shown.append((a, b))
    is_right = [x(a) > (x.start + x.end) / 2 for a, _ in shown]
    return [
        _text("end" if right else "", x(a) + (-8 if right else 8), y(b) + 4, f"{b:.4g}")
        for (a, b), right in zip(shown, is_right, strict=True)
    ]


def bar_chart(title: str, x_label: str, groups: Sequence[str], series: Sequence[Bars]) -> str:
    """A figure with a bar of each series in each group, from 0; "" without groups."""
    if not groups:
        return ""
    tops = (sum(top) for bars in series for top in zip(bars.values, bars.intervals or [0.0] * len(groups), strict=True))
    y_ticks = ticks(0, max(1e-9, *tops), 5)
    y, step = Axis(0, y_ticks[-1], HEIGHT - BOTTOM, TOP), (WIDTH - LEFT - RIGHT) / len(groups)
    width = step * 0.72 / len(series)
    parts = [_grid(Axis(0, 1, LEFT, WIDTH - RIGHT), y, [], y_ticks, x_label)]
    for i, group in enumerate(groups):
        middle = LEFT + (i + 0.5) * step
        parts.append(_text("tick mid", middle, TICK_Y, group))
        for j, bars in enumerate(series):
            left = middle + (j - len(series) / 2) * width
            parts.append(_bar(left, width, y, bars.values[i], _color(j), bars.notes[i]))
            label_y = y(bars.values[i])
            if bars.intervals:
                low, high = (bars.values[i] + sign * bars.intervals[i] for sign in (-1, 1))
                label_y = y(high)
                x = left + width / 2
                parts.append(
                    f'<line class="interval" x1="{x:.1f}" x2="{x:.1f}" y1="{y(max(low, 0)):.1f}" y2="{label_y:.1f}"/>'
                )
            if width >= MIN_LABEL_WIDTH:
                parts.append(_text("value", left + width / 2, label_y - 4, f"{bars.values[i]:.1f}"))
    keys = [(bars.name, _color(j)) for j, bars in enumerate(series)]
    return _figure(title, keys if len(series) > 1 else [], "".join(parts))


def histogram(title: str, x_label: str, values: Sequence[float], names: tuple[str, str], series: int = 1) -> str:
    """A figure with the counts of values in bins, "" if all are 0; their number is in the axis label.

    The axis is symmetric around 0 and covers most values. Those beyond it are in the outermost bins.

    Args:
      names: of negative and of positive values.
      series: index of the series of a bar chart whose color positive values have; negative ones have that of the first.
    """
    sizes = sorted(abs(value) for value in values if value)
    if not sizes:
        return ""
    limit = sizes[math.ceil(COVERED_BY_AXIS * len(sizes)) - 1]
    width = next((width for width in BIN_WIDTHS if 2 * limit / width <= MAX_BINS), BIN_WIDTHS[-1])
    half = math.ceil(limit / width)  # bins on each side
    numbers = (math.floor(value / width) if value > 0 else math.ceil(value / width) - 1 for value in values if value)
    bins = collections.Counter(min(max(number, -half), half - 1) for number in numbers)
    y_ticks = ticks(0, max(bins.values()), 5)
    x, y = Axis(-half * width, half * width, LEFT, WIDTH - RIGHT), Axis(0, y_ticks[-1], HEIGHT - BOTTOM, TOP)
    equal = len(values) - len(sizes)
    label = f"{x_label}; {equal:,} equal sentences are not shown" if equal else x_label
    parts = [_grid(x, y, ticks(x.low, x.high, 6), y_ticks, label)]
    for number, count in sorted(bins.items()):
        left, right = number * width, (number + 1) * width
        limits = {-half: f"under {right:g}", half - 1: f"over {left:g}"}.get(number, f"{left:g} to {right:g}")
        color = _color(0 if number < 0 else series)
        parts.append(_bar(x(left) + 0.5, x(right) - x(left) - 1, y, count, color, f"{limits}: {count:,} sentences"))
    return _figure(title, [(names[0], _color(0)), (names[1], _color(series))], "".join(parts))


def _color(index: int) -> str:
    return f"s{index % NUM_COLORS + 1}"


def _bar(left: float, width: float, y: Axis, value: float, color: str, note: str) -> str:
    return (
        f'<rect class="bar {color}" x="{left:.1f}" y="{y(value):.1f}" width="{width:.1f}" '
        f'height="{y(0) - y(value):.1f}" rx="1"><title>{html.escape(note)}</title></rect>'
    )


def _figure(title: str, keys: Sequence[tuple[str, str]], drawing: str) -> str:
    """The figure with a legend of (name, CSS class)."""
    name = html.escape(title)
    legend = "".join(f'<span class="key {css_class}">{html.escape(key)}</span>' for key, css_class in keys)
    return (
        f'<figure class="chart"><figcaption>{name}<span class="legend">{legend}</span></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{name}">{drawing}</svg></figure>'
    )


def _grid(x: Axis, y: Axis, x_ticks: Sequence[float], y_ticks: Sequence[float], x_label: str) -> str:
    parts = [_text("tick mid", (LEFT + WIDTH - RIGHT) / 2, AXIS_LABEL_Y, x_label)]
    for value in y_ticks:
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>')
        parts.append(_text("tick end", LEFT - 6, y(value) + 3.5, format_si(value)))
    shown = [value for value in x_ticks if x.low <= value <= x.high]
    return "".join([*parts, *(_text("tick mid", x(value), TICK_Y, format_si(value)) for value in shown)])


def _text(css_class: str, x: float, y: float, text: str) -> str:
    return f'<text class="{css_class}" x="{x:.1f}" y="{y:.1f}">{html.escape(text)}</text>'


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
    """Formats a number with an SI prefix from 10,000 on: 12,000 as 12k, 1.5e14 as 150T."""
    for prefix, unit in SI_PREFIXES.items():
        if abs(value) >= max(unit, 1e4):
            return f"{value / unit:.4g}{prefix}"
    return f"{value:.4g}"


def downsample(points: Sequence[Point]) -> list[Point]:
    """About MAX_POINTS evenly spaced points, including the last."""
    every = -(-len(points) // MAX_POINTS)
    return [*points[:-1:every], *points[-1:]] if points else []
