"""The results of an ablation: means over seeds with intervals, significance, a table and plots."""

import functools
import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import scipy.special  # of JAX's dependencies
from etils import epath

from benchmarks import plots
from benchmarks.ablation_plan import BASE, Variant
from transformer.command_line import markdown_table
from transformer.config import DataConfig
from transformer.evaluation import significance
from transformer.evaluation.metrics import METRICS
from transformer.evaluation.significance import PairedTestResult

CONFIDENCE = 0.95
HEADS = ("change", "params", "updates", "FLOPs", "minutes", "tokens/s")
TEST_HEADS = ("difference", "bootstrap p", "randomization p", "verdict")

Figures = dict[str, Any]  # of a run: eval.py's JSON with target_tokens_per_s and a curve


class Row(NamedTuple):
    """The base or a change with its runs.

    Attributes:
      runs: finished ones, by seed.
      failed: the reasons of others, by seed.
      test: of the median run against the base's; None if there is none of either, and for the base.
    """

    name: str
    variant: Variant
    runs: dict[int, Figures]
    failed: dict[int, str]
    test: PairedTestResult | None = None

    def mean(self, key: str) -> float:
        """The mean over seeds; infinite if a run has none, as eval.py says of a perplexity beyond float."""
        values = [run[key] for run in self.runs.values()]
        return math.inf if None in values else statistics.fmean(values)

    def interval(self, key: str) -> float | None:
        """Half the width of the interval of the mean, by Student's t; None with less than two seeds."""
        values = [run[key] for run in self.runs.values()]
        if len(values) < 2 or None in values:
            return None
        quantile = float(scipy.special.stdtrit(len(values) - 1, (1 + CONFIDENCE) / 2))
        return quantile * statistics.stdev(values) / math.sqrt(len(values))

    def as_json(self, metric: str) -> dict[str, Any]:
        """The change, its costs, runs and comparison with the base."""
        change, config, params, flops = self.variant
        entry: dict[str, Any] = {"fields": dict(change.fields), "comment": change.comment}
        entry |= {
            "published": dict(change.published),
            "params": params,
            "flops_per_update": flops,
            "updates": config.train.num_steps,
        }
        if self.runs:
            entry |= {metric: self.mean(metric), "interval": self.interval(metric)}
            entry["median_seed"] = median_seed(self.runs, metric)
        entry |= {"versus": significance.as_json(BASE, [self.test])} if self.test else {}
        return entry | {"runs": self.runs, "failed": self.failed}


def median_seed(runs: dict[int, Figures], metric: str) -> int:
    """The seed with the median score; of an even number the lower of the middle two."""
    return sorted(runs, key=lambda seed: runs[seed][metric])[(len(runs) - 1) // 2]


@functools.cache  # the table is written after each run
def paired_test(
    translations: epath.Path, baseline: epath.Path, data: DataConfig, split: str, metric: str
) -> PairedTestResult:
    """Tests the translations of a split in two files."""
    from transformer.evaluation import bleu_tokenizer, datasets, systems  # which import JAX

    dataset = datasets.load_eval_dataset(data, split, None, None)
    tokenizer = bleu_tokenizer.choose_bleu_tokenizer(data, dataset.references[0]).name
    ours, theirs = (systems.read_translations(path, dataset, f"{path}") for path in (translations, baseline))
    return significance.paired_tests(ours, theirs, dataset.references, tokenizer, [metric])[0]


def table(rows: Sequence[Row], metric: str) -> str:
    """The results as Markdown: a line for each change, one for each run that failed, and what the columns are."""
    perplexity = perplexity_key(rows)
    published = [key for key in (perplexity, metric) if any(key in row.variant.change.published for row in rows)]
    label = METRICS[metric].label
    heads = [*HEADS, perplexity.replace("_", " "), label, *TEST_HEADS]
    for key in published:
        heads += [f"published {METRICS[key].label if key in METRICS else key}", "agrees"]
    lines = [_cells(row, rows[0], perplexity, metric, published) for row in rows]
    for row in rows:
        for seed, reason in row.failed.items():
            cells = [f"{row.name}, seed {seed}", *[""] * (len(heads) - 1)]
            cells[heads.index("verdict")] = f"failed: {reason.replace('|', '/')}"
            lines.append(cells)
    return "\n".join([*markdown_table(heads, lines), "", *_notes(rows, metric, label)])


def perplexity_key(rows: Sequence[Row]) -> str:
    """The perplexity that can be compared: per subword token, or per word if vocabularies differ."""
    vocabularies = {(row.variant.config.data.tokenizer, row.variant.config.data.vocab_size) for row in rows}
    return "perplexity" if len(vocabularies) == 1 else "word_perplexity"


def _cells(row: Row, base: Row, perplexity: str, metric: str, published: Sequence[str]) -> list[str]:
    cells = [row.name, f"{row.variant.params:,}"]
    if not row.runs:
        return cells + [""] * (len(HEADS) + len(TEST_HEADS) + 2 * len(published))
    cells += [f"{row.mean('step'):,.0f}", f"{row.mean('train_flops'):.2e}"]
    cells += [f"{60 * row.mean('train_hours'):.1f}", f"{row.mean('target_tokens_per_s'):,.0f}"]
    cells += [with_interval(row.mean(perplexity), row.interval(perplexity), 3)]
    cells += [with_interval(row.mean(metric), row.interval(metric), 2)]
    compared = base.runs and row.name != BASE
    cells.append(f"{row.mean(metric) - base.mean(metric):+.2f}" if compared else "")
    cells += [*row.test.formatted_p, row.test.verdict] if row.test else ["", "", ""]
    for key in published:
        cells += [f"{row.variant.change.published.get(key, '')}", agrees(row, base, key)]
    return cells


def with_interval(mean: float, interval: float | None, digits: int) -> str:
    """The mean, with half the width of its interval if that is known."""
    return f"{mean:.{digits}f}" + ("" if interval is None else f" ± {interval:.{digits}f}")


def agrees(row: Row, base: Row, key: str) -> str:
    """Whether the difference to the base has the sign of the published one: yes, no, or chance.

    Chance is a difference within the interval of the base. "" if either difference is 0 or unknown.
    """
    theirs, base_theirs = (each.variant.change.published.get(key) for each in (row, base))
    if theirs is None or base_theirs is None or not base.runs:
        return ""
    ours = row.mean(key) - base.mean(key)
    if not ours or theirs == base_theirs:
        return ""
    if abs(ours) <= (base.interval(key) or 0.0):
        return "chance"
    return "yes" if (ours > 0) == (theirs > base_theirs) else "no"


def _notes(rows: Sequence[Row], metric: str, label: str) -> Iterable[str]:
    for row in rows:
        if row.name != BASE or row.variant.change.fields:
            comment = row.variant.change.comment
            yield f"- **{row.name}**: {row.variant.change}{'. ' * bool(comment)}{comment.rstrip('.')}."
    seeds = sorted({len(row.runs) for row in rows if row.runs})
    yield (
        f"- Means over seeds, {' or '.join(map(str, seeds)) or 'none'} of each change; ±: half the width of the "
        f"{CONFIDENCE:.0%} interval of the mean by Student's t, which needs two seeds."
    )
    if signature := next((run[f"{metric}_signature"] for row in rows for run in row.runs.values()), ""):
        yield f"- {label}: {signature}."
    if test := next((row.test for row in rows if row.test), None):
        yield (
            f"- p: of the median seed of a change and that of the base, of an even number the lower of the middle two, "
            f"on the same sentences; {test.signatures[0]}; {test.signatures[1]}. Better, worse: both p below "
            f"{significance.ALPHA}."
        )


def curve(logged: Iterable[Figures], key: str) -> list[Figures]:
    """The score of each validation, and the cost of training until then."""
    return [
        {"step": row["step"], "score": row[key], "flops": row["train/flops"], "minutes": 60 * row["train/hours"]}
        for row in logged
        if key in row
    ]


def draw(output: epath.Path, rows: Sequence[Row], metric: str) -> None:
    """Plots the scores with their intervals, and the validation scores of the median seeds by time and by FLOPs."""
    finished = [row for row in rows if row.runs]
    label = METRICS[metric].label
    plots.write_intervals(
        output / "ablation.svg",
        f"{label} of each seed, their mean and its {CONFIDENCE:.0%} interval",
        label,
        {row.name: ([run[metric] for run in row.runs.values()], row.interval(metric)) for row in finished},
    )
    for key, unit in (("minutes", "minutes of training, compilation included"), ("flops", "training FLOPs")):
        curves = {row.name: row.runs[median_seed(row.runs, metric)]["curve"] for row in finished}
        lines = {name: [(point[key], point["score"]) for point in curve] for name, curve in curves.items()}
        plots.write(output / f"curves_by_{key}.svg", f"Validation {label}, median seeds", unit, lines, log=False)
