"""The sections of a page on a comparison of systems: `transformer.compare`, and the report of `eval.py --versus`."""

import html
from collections.abc import Sequence

from transformer.evaluation.charts import Bars, bar_chart, histogram
from transformer.evaluation.comparison import Breakdown, Comparison, NgramDifference, System
from transformer.evaluation.metrics import METRICS
from transformer.evaluation.report_html import (
    DIFF_LEGEND,
    Column,
    details,
    numbers,
    section,
    sentence,
    sentence_browser,
    table,
)
from transformer.evaluation.significance import ALPHA

MAX_SENTENCES = 5000  # on the page, the ones that differ most
WON_LEGEND = (
    f'{DIFF_LEGEND} <mark class="won">Words that match</mark> the reference, but that another system there lacks.'
)


def sections(comparison: Comparison) -> list[str]:
    """Scores, breakdowns, n-grams, and all sentences."""
    baseline, count = comparison.systems[0].label, len(comparison.references[0])
    charts = "".join(breakdown_chart(each, comparison.systems) for each in comparison.breakdowns)
    charts += "".join(
        difference_histogram(comparison, number, f"{system.label} − {baseline}")
        for number, system in enumerate(comparison.systems[1:], 1)
    )
    tables = "".join(breakdown_table(each, comparison.systems) for each in comparison.breakdowns)
    return [
        section(
            "versus",
            f"Compared with {baseline}",
            score_table(comparison),
            f"±: 95% interval of the bootstrap. Significant: both p below {ALPHA}. {count:,} sentences.",
        ),
        section(
            "breakdowns",
            "Where they differ",
            f'<div class="charts">{charts}</div>{details("the same as tables", tables)}',
            "Lines on bars are 95% intervals of the bootstrap. F1 counts words by precision and recall. The outermost "
            "bars of a histogram count all larger differences too.",
        ),
        section(
            "ngrams",
            "N-grams that one system matches more often",
            "".join(
                ngram_tables(baseline, system.label, pair)
                for system, pair in zip(comparison.systems[1:], comparison.ngrams, strict=True)
            ),
            "How often each n-gram of up to four words matches the reference of its sentence. Log-odds: log((system + "
            "1) / (baseline + 1)).",
        ),
        sentence_section(comparison),
    ]


def score_table(comparison: Comparison) -> str:
    """Each metric of each system, and the tests against the baseline."""
    rows = []
    for index, test in enumerate(comparison.tests[0]):
        value = f"{test.baseline_score:.2f} ± {test.baseline_interval:.2f}"
        rows.append([METRICS[test.metric].label, comparison.systems[0].label, value, "", "", "", "baseline"])
        for system, tests in zip(comparison.systems[1:], comparison.tests, strict=True):
            each = tests[index]
            value, difference = f"{each.score:.2f} ± {each.interval:.2f}", f"{each.difference:+.2f}"
            rows.append(["", system.label, value, difference, *each.formatted_p, each.verdict])
    columns = numbers("value", "difference", "bootstrap p", "randomization p")
    signatures = [
        [name, signature]
        for test in comparison.tests[0]
        for name, signature in zip((METRICS[test.metric].label, ""), test.signatures, strict=True)
    ]
    notes = table([Column("score"), Column("signature", "note")], signatures)
    return table([Column("score"), Column("system"), *columns, Column("verdict")], rows) + details("signatures", notes)


def breakdown_chart(breakdown: Breakdown, systems: Sequence[System]) -> str:
    """Grouped bars."""
    series = [
        Bars(
            system.label,
            list(scores.values()),
            [
                f"{system.label}, {group}: {score:.1f}, {breakdown.counts[group]:,} {breakdown.unit}"
                for group, score in scores.items()
            ],
            list(intervals.values()),
        )
        for system, scores, intervals in zip(
            systems, breakdown.scores, breakdown.intervals or [{} for _ in systems], strict=True
        )
    ]
    return bar_chart(breakdown.title, breakdown.x_label, list(breakdown.counts), series)


def breakdown_table(breakdown: Breakdown, systems: Sequence[System]) -> str:
    """The numbers of the chart."""
    rows = []
    for group, count in breakdown.counts.items():
        intervals = [f" ± {intervals[group]:.1f}" for intervals in breakdown.intervals] or [""] * len(systems)
        values = (f"{scores[group]:.1f}{each}" for scores, each in zip(breakdown.scores, intervals, strict=True))
        rows.append([group, f"{count:,}", *values])
    columns = [Column(breakdown.x_label), *numbers(breakdown.unit, *(system.label for system in systems))]
    return f"<h3>{html.escape(breakdown.title)}</h3>{table(columns, rows)}"


def difference_histogram(comparison: Comparison, system: int, title: str) -> str:
    """How many sentences differ by how much."""
    differences = comparison.differences(system)
    names = tuple(f"{comparison.systems[i].label} better" for i in (0, system))
    x_label = f"difference in {METRICS[comparison.sentence_metric].label}"
    return histogram(f"Sentences by {title}", x_label, differences, (names[0], names[1]), system)


def ngram_tables(baseline: str, system: str, pair: tuple[list[NgramDifference], list[NgramDifference]]) -> str:
    """Two tables, one below the other as words may be long: in favor of the baseline, and of the system."""
    columns = [Column("n-gram", "words"), *numbers(baseline, system, "references", "log-odds")]
    blocks = []
    for name, ngrams in zip((baseline, system), pair, strict=True):
        rows = [
            [each.text, f"{each.baseline_matches:,}", f"{each.matches:,}", f"{each.total:,}", f"{each.log_odds:+.2f}"]
            for each in ngrams
        ]
        content = table(columns, rows) if rows else '<p class="soft">none</p>'
        blocks.append(f'<div class="card"><h3>more often by {html.escape(name)}</h3>{content}</div>')
    return f'<div class="charts rows">{"".join(blocks)}</div>'


def sentence_section(comparison: Comparison) -> str:
    """All sentences, those with the largest gains first, with a filter and other orders."""
    systems, scores = comparison.systems, comparison.sentence_scores
    spread = [max(each) - min(each) for each in zip(*scores, strict=True)]
    shown = sorted(range(len(spread)), key=lambda i: -spread[i])[:MAX_SENTENCES]
    gains = [comparison.differences(number) for number in range(1, len(systems))]
    shown.sort(key=lambda i: (-gains[0][i], i))
    articles, label = [], METRICS[comparison.sentence_metric].label
    for i in shown:
        title = f"sentence {i + 1:,} · {label} " + ", ".join(
            f"{each[i]:.1f} {system.label}" for system, each in zip(systems, scores, strict=True)
        )
        values = {"number": float(i + 1), **{f"gain{number}": gain[i] for number, gain in enumerate(gains, 1)}}
        articles.append(
            sentence(
                title,
                comparison.sources[i] if comparison.sources else None,
                comparison.references[0][i],
                [(system.label, system.translations[i]) for system in systems],
                values,
            )
        )
    orders = []
    for number, system in enumerate(systems[1:], 1):
        orders += [(f"{system.label} better first", f"gain{number}", -1)]
        orders += [(f"{systems[0].label} better than {system.label} first", f"gain{number}", 1)]
    orders.append(("in the order of the test set", "number", 1))
    part = f"The {len(shown):,} of {len(spread):,} sentences that differ most. " if len(shown) < len(spread) else ""
    return section("sentences", "All sentences", sentence_browser(articles, orders), f"{part}{WON_LEGEND}")
