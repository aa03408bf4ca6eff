"""Charts: round ticks, points where they belong, and no more of them than can be seen."""

import math
import re

import numpy as np
import pytest

from transformer.evaluation import charts
from transformer.evaluation.charts import Bars, Series


@pytest.mark.parametrize(
    ("low", "high", "wanted"),
    [
        (0, 10, [0, 2, 4, 6, 8, 10]),
        (0.3, 1.1, [0.2, 0.4, 0.6, 0.8, 1.0, 1.2]),
        (3, 3, [3, 4]),
        (0, 0, [0, 0.2]),
        (37.2, 38.9, [37, 37.5, 38, 38.5, 39]),
    ],
)
def test_ticks_are_round_and_cover_the_range(low, high, wanted):
    result = charts.ticks(low, high, 5)
    assert result[: len(wanted)] == pytest.approx(wanted)
    assert result[0] <= low + 1e-9
    assert result[-1] >= high - 1e-9


def circles(svg):
    return [tuple(map(float, place)) for place in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', svg)]


def test_points_stand_where_their_numbers_are():
    svg = charts.line_chart("loss", "step", [Series("a", [(0, 0.0), (50, 5.0), (100, 10.0)])])
    (left, bottom), middle, (right, top) = circles(svg)
    assert (left, right) == (charts.LEFT, charts.WIDTH - charts.RIGHT)
    assert (bottom, top) == (charts.HEIGHT - charts.BOTTOM, charts.TOP)
    assert middle == pytest.approx(((left + right) / 2, (bottom + top) / 2))


def test_each_line_has_a_name_and_a_colour_of_its_own():
    svg = charts.line_chart("a<b", "step", [Series("x & y", [(1, 2.0)], True), Series("z", [(1, 3.0), (2, 4.0)])])
    assert "a&lt;b" in svg
    assert "x &amp; y" in svg
    assert svg.count("<polyline") == 2
    assert 'class="dot s1"' in svg
    assert 'class="hit"' in svg


def test_non_finite_values_are_left_out_and_an_empty_series_is_empty():
    assert len(circles(charts.line_chart("t", "x", [Series("a", [(0, 1.0), (1, math.nan), (2, 3.0)])]))) == 2
    assert charts.line_chart("t", "x", [Series("a", []), Series("b", [(0, math.inf)])]) == ""
    assert charts.bar_chart("t", "x", [], []) == ""


def test_long_runs_are_thinned_to_what_can_be_seen():
    points = [(i, float(i)) for i in range(100_001)]
    thin = charts.downsample(points)
    assert len(thin) <= charts.MAX_POINTS + 2
    assert (thin[0], thin[-1]) == (points[0], points[-1])
    assert charts.downsample(points[:3]) == points[:3]
    assert charts.downsample(points[:1]) == points[:1]


def test_bars_are_as_high_as_their_values_and_stand_side_by_side():
    series = [Bars("a", [20.0, 10.0], ["5 sentences", "7 sentences"], [2.0, 1.0]), Bars("b", [15.0, 5.0], ["x", "y"])]
    svg = charts.bar_chart("BLEU", "words", ["0-10", "11-20"], series)
    bars = re.findall(r'<rect class="bar (s\d)" x="([\d.]+)" y="[\d.]+" width="([\d.]+)" height="([\d.]+)"', svg)
    colors, lefts, widths, heights = zip(*bars, strict=True)
    assert colors == ("s1", "s2", "s1", "s2")
    assert np.array(heights, float) / float(heights[0]) == pytest.approx([1, 0.75, 0.5, 0.25], rel=1e-2)
    assert float(lefts[1]) == pytest.approx(float(lefts[0]) + float(widths[0]), abs=0.2)
    assert "<title>5 sentences</title>" in svg
    assert svg.count('class="interval"') == 2
    assert 'class="key s2">b<' in svg


def test_an_interval_does_not_leave_the_chart():
    svg = charts.bar_chart("BLEU", "words", ["0-10"], [Bars("a", [99.0], [""], [5.0])])
    assert min(map(float, re.findall(r'y2="([\d.]+)"', svg))) >= charts.TOP


def test_a_histogram_counts_each_value_once_by_its_sign():
    values = [-0.5, -1, -1.5, 0, 0, 0.5, 1, 3]
    svg = charts.histogram("t", "difference", [10 * value for value in values], ("a better", "b better"))
    bars = re.findall(r'class="bar (s\d)".*?<title>(.*?)</title>', svg)
    assert bars == [
        ("s1", "-16 to -14: 1 sentences"),
        ("s1", "-12 to -10: 1 sentences"),
        ("s1", "-6 to -4: 1 sentences"),
        ("s2", "4 to 6: 1 sentences"),
        ("s2", "10 to 12: 1 sentences"),
        ("s2", "over 28: 1 sentences"),
    ]
    assert "2 equal sentences are not shown" in svg
    assert charts.histogram("t", "x", [0.0], ("a", "b")) == ""
    third = charts.histogram("t", "x", [-1.0, 1.0], ("a", "c"), series=2)
    assert re.findall(r'class="bar (s\d)', third) == ["s1", "s3"]


def test_the_axis_of_a_histogram_fits_most_values():
    """Two of 400 are far off: they are in the outermost bins."""
    values = [*([-3.5, 4.5] * 199), -95.0, 97.0]
    svg = charts.histogram("t", "x", values, ("a", "b"))
    assert re.findall(r">(-?\d+)</text>", svg)[-5:] == ["-4", "-2", "0", "2", "4"]
    assert re.findall("<title>(.*?)</title>", svg) == [
        "under -4: 1 sentences",
        "-4 to -3.5: 199 sentences",
        "over 4: 200 sentences",
    ]


def test_a_single_point_is_a_marker_with_its_value():
    svg = charts.line_chart("loss", "step", [Series("a", [(500, 2.345)])])
    assert 'class="dot s1"' in svg
    assert ">2.345</text>" in svg
    ((x, _),) = circles(svg)
    assert x == (charts.LEFT + charts.WIDTH - charts.RIGHT) / 2
    assert ">500</text>" in svg
    at_the_end = charts.line_chart("loss", "step", [Series("a", [(0, 1.0), (9, 2.0)]), Series("b", [(9, 1.5)])])
    assert re.findall(r'<text class="end" x="([\d.]+)" y="[\d.]+">1.5</text>', at_the_end) == ["436.0"]
    close = charts.line_chart(
        "loss", "step", [Series("a", [(9, 1.0)]), Series("b", [(9, 1.001)]), Series("c", [(9, 2.0)])]
    )
    assert re.findall(r'<text class=""[^>]*>([\d.]+)<', close) == ["1", "2"]


def test_the_label_of_a_bar_as_high_as_the_chart_is_inside_and_labels_do_not_touch():
    """Five characters of the largest font of the page, 13.5 units, are about 40 wide."""
    svg = charts.bar_chart("BLEU", "words", ["a"] * 5, [Bars("a", [100.0] * 5, [""] * 5)])
    labels = re.findall(r'class="value" x="([\d.]+)" y="([\d.]+)"', svg)
    assert len(labels) == 5
    assert all(float(y) > 13.5 for _, y in labels)
    assert 'class="value"' not in charts.bar_chart("BLEU", "words", ["a"] * 8, [Bars("a", [50.0] * 8, [""] * 8)])


def test_lines_of_one_run_share_a_color_and_a_log_axis_may_be_of_the_values_alone():
    lines = [Series("a", [(0, 1.0), (5, 10.0), (10, 100.0)], color=2, faint=True), Series("b", [(10, 1.0)], True, 2)]
    svg = charts.line_chart("loss", "step", lines, log_y=True)
    assert 'class="line s2 faint"' in svg
    assert 'class="dot s2"' in svg
    (_, bottom), (_, middle), (_, top) = circles(svg)[:3]
    assert middle == pytest.approx((top + bottom) / 2, abs=0.2)


def test_numbers_are_short():
    assert [charts.format_si(value) for value in (0, 0.0005, 12, 9500, 12000, 2.5e6, 2e10, 1.5e14)] == [
        "0",
        "0.0005",
        "12",
        "9500",
        "12k",
        "2.5M",
        "20G",
        "150T",
    ]


def test_equal_factors_are_equally_far_apart_on_a_log_chart():
    line = charts.Series("a", [(16, 1e3), (64, 1e4), (256, 1e5), (0, 5), (4, 0)], markers=True)
    drawn, _ = charts.line_drawing("x", [line], log=True)
    xs, ys = zip(*((float(a), float(b)) for a, b in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', drawn)), strict=True)
    assert len(xs) == 3
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.2)
    assert ys[1] - ys[0] == pytest.approx(ys[2] - ys[1], abs=0.2)
    assert charts.power_ticks(16, 256, 5) == [16, 32, 64, 128, 256]
    assert charts.power_ticks(16, 4096, 5)[:3] == [16, 64, 256]
    assert charts.log_ticks(1e3, 1e6, 5) == [1e3, 1e4, 1e5, 1e6]
    assert charts.log_ticks(20, 60, 5) == [16, 32, 64]
    assert charts.log_ticks(1, 1, 5) == [1, 2]
