"""Builds the HTML report of a model of several directions: one table, learning curves and sentences of each.

`eval.py --target_language=CODE` writes the full report of one direction.
"""

import html
from collections.abc import Mapping, Sequence

from etils import epath

from transformer.checkpoints.loading import RestoredModel
from transformer.evaluation import report, summary
from transformer.evaluation.charts import NUM_COLORS, Series, line_chart
from transformer.evaluation.metrics import METRICS, sentence_metric
from transformer.evaluation.report_html import (
    DIFF_LEGEND,
    Column,
    details,
    numbers,
    render_page,
    section,
    table,
)
from transformer.evaluation.summary import Evaluated
from transformer.runtime import files
from transformer.runtime.files import METRICS_FILE


def build(workdir: epath.PathLike, restored: RestoredModel, evaluated: Mapping[str, Evaluated], name: str) -> str:
    """The page as HTML.

    Args:
      workdir: of the model.
      restored: the model, with all directions.
      evaluated: by the name of the direction.
      name: of the data set.
    """
    metrics, ranking = restored.config.eval.metric_names, sentence_metric(restored.config.eval.metric_names)
    columns = [Column("direction"), *numbers("sentences", *(METRICS[m].label for m in metrics), "loss")]
    note = f"The last row is the mean over directions. {' · '.join(summary.signatures(evaluated, metrics))}"
    worst = []
    for direction, each in evaluated.items():
        ranked = report.rank_sentences(each.dataset, each.result.translations, ranking)
        shown = report.worst_sentences(each.dataset, ranked)
        sentences = report.list_sentences(each.dataset, each.result, shown, METRICS[ranking].label)
        worst.append(section(f"worst-{direction}", f"Worst sentences, {direction}", sentences, DIFF_LEGEND))
    return render_page(
        f"{epath.Path(workdir).name}: report of {len(evaluated)} directions",
        f"{name} · {report.described(restored)}",
        [
            section("directions", "Directions", table(columns, summary.direction_rows(evaluated, metrics)), note),
            section("curves", "Learning curves", curves(workdir, list(evaluated), metrics)),
            *worst,
            section("config", "Config", details("all fields", f"<pre>{html.escape(restored.config.to_json())}</pre>")),
        ],
    )


def curves(workdir: epath.PathLike, directions: Sequence[str], metrics: Sequence[str]) -> str:
    """Loss, and the first metric of each direction and their mean, by step."""
    entries = files.read_json_lines(epath.Path(workdir) / METRICS_FILE)

    def series(title: str, key: str, number: int = 0) -> Series:
        points = report.logged_points(entries, key)
        color, faint = number % NUM_COLORS + 1, number >= NUM_COLORS
        return Series(title, points, markers=not key.startswith("train"), color=color, faint=faint)

    first = metrics[0] if metrics[0] != "ter" else "chrf"  # which validation leaves out
    scores = [series(name, f"valid/{name}/{first}", number) for number, name in enumerate(directions, 1)]
    losses = [series("training", "train/loss"), series("validation", "valid/loss", 1)]
    charts = [
        line_chart("loss, nats per token", "step", losses, log_y=True),
        line_chart(METRICS[first].label, "step", [series("mean", f"valid/{first}"), *scores]),
    ]
    return report.chart_grid(charts)
