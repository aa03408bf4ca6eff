"""Builds the HTML report of an evaluation: reports/ and report.html in the workdir.

A self-contained page: scores with signatures, learning curves, the comparison with another system, worst and best
sentences, and attention by layer and head.
"""

import datetime
import html
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from etils import epath

from transformer.checkpoints.loading import RestoredModel
from transformer.config import Config
from transformer.config.schema import ALWAYS_VALIDATED, LOWER_IS_BETTER
from transformer.decoding.alignment import Aligner, Attention
from transformer.distributed import multihost
from transformer.evaluation import comparison_html, summary
from transformer.evaluation.bleu_tokenizer import choose_bleu_tokenizer
from transformer.evaluation.charts import Series, line_chart
from transformer.evaluation.comparison import Comparison, by_length
from transformer.evaluation.continuous import is_of, read_evaluations
from transformer.evaluation.datasets import EvalDataset
from transformer.evaluation.evaluator import EvalResult
from transformer.evaluation.heatmaps import attention_heatmaps
from transformer.evaluation.metrics import METRICS, group_by_length, sentence_metric, sentence_scores
from transformer.evaluation.report_html import (
    DIFF_LEGEND,
    Column,
    details,
    numbers,
    render_page,
    section,
    sentence,
    stat_cards,
    table,
)
from transformer.evaluation.systems import System, evaluated
from transformer.models.flops import format_count
from transformer.runtime import files
from transformer.runtime.errors import UserError
from transformer.runtime.files import METRICS_FILE, user_error_on_oserror, write_atomic
from transformer.runtime.logging import log_info

REPORT_FILE = "report.html"
NUM_SENTENCES = 8  # shown as worst, and as best
MAX_RANKED = 2000  # sentences
MIN_WORDS = 4  # of a source shown as best or with its attention
MAX_SHARED = 0.5  # share of the words of a sentence that one shown before it may have
MAX_ATTENTION_TOKENS = 40  # of a sentence whose attention is shown
ATTENTION_NOTE = (
    "Rows are the tokens that attend, columns those that they attend to; the opacity is the weight, from 0 to 1. A dot "
    "begins a word. Press a small map to enlarge it."
)


def write(
    workdir: epath.PathLike,
    name: str,
    restored: RestoredModel,
    dataset: EvalDataset,
    result: EvalResult,
    comparison: Comparison | None = None,
) -> None:
    """Writes reports/NAME[.versus-BASELINE].html, and the newest also as report.html.

    If the workdir is not writable, this is logged and not an error.

    Args:
      workdir: of the model.
      name: of the result, by `results.result_name`.
      restored: the model.
      dataset: on which it was evaluated.
      result: of the evaluation.
      comparison: with a baseline.
    """
    text = build(workdir, restored, dataset, result, comparison)  # runs the model on all hosts
    suffix = re.sub(r"[^\w.-]+", "-", f".versus-{comparison.systems[0].name}") if comparison else ""
    save(workdir, f"{name}{suffix}", text)


@multihost.primary_only
def save(workdir: epath.PathLike, name: str, text: str) -> None:
    """Writes a page as reports/NAME.html and as report.html; logs if the workdir is not writable."""
    path, newest = epath.Path(workdir) / "reports" / f"{name}.html", epath.Path(workdir) / REPORT_FILE
    try:
        for file in (path, newest):
            with user_error_on_oserror(f"{file}"):
                file.parent.mkdir(exist_ok=True)
                write_atomic(file, text)
    except UserError as error:
        log_info(f"warning: no report: {error}")
        return
    log_info(f"report: {path}")


def build(
    workdir: epath.PathLike,
    restored: RestoredModel,
    dataset: EvalDataset,
    result: EvalResult,
    comparison: Comparison | None = None,
) -> str:
    """The page as HTML."""
    data, metrics = restored.config.data, restored.config.eval.metric_names
    subtitle = (
        f"{dataset.name}, {result.sentences:,} sentences, {data.source_language} → {data.target_language} · "
        f"{described(restored)}"
    )
    direction = f"{data.source_language}-{data.target_language}"
    ranking = sentence_metric(metrics)
    ranked, label = rank_sentences(dataset, result.translations, ranking), METRICS[ranking].label
    sample = f", of {len(ranked):,} sentences ranked, evenly spread" if len(ranked) < result.sentences else ""
    note = f"By {label}, of different lengths{sample}. {DIFF_LEGEND}"
    this = evaluated(workdir, restored, result.translations)
    systems = comparison.systems if comparison else [this]
    worst = worst_sentences(dataset, ranked)
    best = best_sentences(dataset, ranked, worst)
    score_columns = [Column("score"), *numbers("value"), Column("signature or meaning", "note")]
    return render_page(
        f"{epath.Path(workdir).name}: {'translation' if 'bleu' in metrics else 'evaluation'} report",
        subtitle,
        [
            _stat_cards(result, metrics),
            _runs(systems),
            section("scores", "Scores", table(score_columns, summary.score_rows(result))),
            section("curves", "Learning curves", _curves(systems, dataset, metrics, direction)),
            *(
                comparison_html.sections(comparison)
                if comparison
                else [_length_section(this, dataset, restored.config)]
            ),
            section("worst", "Worst sentences", list_sentences(dataset, result, worst, label), note),
            section("best", "Best sentences", list_sentences(dataset, result, best, label), note),
            section("attention", "Attention", _attention(restored, dataset, result, ranked, label), ATTENTION_NOTE),
            section("config", "Config", details("all fields", f"<pre>{html.escape(restored.config.to_json())}</pre>")),
        ],
    )


def rank_sentences(dataset: EvalDataset, translations: Sequence[str], metric: str) -> list[tuple[float, int]]:
    """Score and index of each sentence, worst first; for large data sets of an evenly spread sample."""
    indices = range(0, len(translations), -(-len(translations) // MAX_RANKED) or 1)
    return sorted(zip(sentence_scores(metric, translations, dataset.references, indices), indices, strict=True))


def varied_sentences(dataset: EvalDataset, ranked: Sequence[tuple[float, int]]) -> list[tuple[float, int]]:
    """The first NUM_SENTENCES, taken in turn from each group of lengths, without any that repeats words of another.

    Repeats fill up what is missing.
    """
    groups = group_by_length([len(dataset.sources[i].split()) for _, i in ranked]).values()
    in_turn = [ranked[i] for turn in itertools.zip_longest(*groups) for i in turn if i is not None]
    shown: list[tuple[float, int]] = []
    words: list[set[str]] = []
    for each in in_turn:
        own = set(dataset.sources[each[1]].split())
        if all(len(own & other) <= MAX_SHARED * min(len(own), len(other)) for other in words):
            shown.append(each)
            words.append(own)
        if len(shown) == NUM_SENTENCES:
            break
    repeats = [each for each in in_turn if each not in shown]
    rank = {each: number for number, each in enumerate(ranked)}
    return sorted([*shown, *repeats[: NUM_SENTENCES - len(shown)]], key=lambda each: rank[each])


def worst_sentences(dataset: EvalDataset, ranked: Sequence[tuple[float, int]]) -> list[tuple[float, int]]:
    """Some of the worst quarter of the sentences, none of them perfect, of different lengths and words."""
    return varied_sentences(dataset, [each for each in ranked[: max(len(ranked) // 4, NUM_SENTENCES)] if each[0] < 100])


def best_sentences(
    dataset: EvalDataset, ranked: Sequence[tuple[float, int]], worst: Sequence[tuple[float, int]]
) -> list[tuple[float, int]]:
    """Some of the best sentences that are not among the worst, of different lengths and words."""
    words = [len(source.split()) for source in dataset.sources]
    candidates = [each for each in ranked if each not in worst and words[each[1]] >= MIN_WORDS]
    return varied_sentences(dataset, sorted(candidates, key=lambda each: (-each[0], -words[each[1]], each[1])))


def _runs(systems: Sequence[System]) -> str:
    """Size and cost of each model whose training is known."""
    rows = []
    for system in systems:
        if run := system.run:
            cost = run.cost
            costs = (format_count(cost.tokens), f"{cost.flops:.1e}", f"{cost.seconds / 3600:.2f}") if cost else "–––"
            rows.append([system.label, run.description, format_count(run.num_params), *costs])
    columns = [Column("system"), Column("checkpoint"), *numbers("params", "target tokens", "FLOPs", "hours")]
    return table(columns, rows) if rows else ""


def _stat_cards(result: EvalResult, metrics: Sequence[str]) -> str:
    cards = []
    for name in metrics:
        metric = METRICS[name]
        note = f"{metric.meaning}, {'lower' if LOWER_IS_BETTER[name] else 'higher'} is better"
        cards.append((metric.label, f"{result.scores[name]:.2f}", note))
    return stat_cards([*cards, ("perplexity", f"{result.perplexity:.2f}", "per subword, lower is better")])


def _length_section(system: System, dataset: EvalDataset, config: Config) -> str:
    """The first metric by source length, with bootstrap intervals."""
    groups = group_by_length([len(source.split()) for source in dataset.sources])
    tokenizer = choose_bleu_tokenizer(config.data, dataset.references[0]).name
    breakdown = by_length(config.eval.metric_names[0], [system], dataset.references, groups, "source", tokenizer)
    chart = comparison_html.breakdown_chart(breakdown, [system])
    return section("length", breakdown.title, chart_grid([chart]))


def in_direction(entries: Iterable[Mapping[str, Any]], direction: str) -> list[dict[str, Any]]:
    """Lines of metrics, with the scores of a direction in place of the means over all."""
    part = f"/{direction}/"
    return [{**entry, **{key.replace(part, "/"): entry[key] for key in entry if part in key}} for entry in entries]


def _curves(systems: Sequence[System], dataset: EvalDataset, metrics: Sequence[str], direction: str) -> str:
    """Loss, the first metric that is known, learning rate and speed by step; with results of --watch on this data set.

    Validation is that of the direction, such as en-de, where a run has several. A run of an earlier version was
    validated by BLEU and chrF2 alone.
    """
    runs = [(system.label, system.run) for system in systems if system.run]
    many, name = len(runs) > 1, dataset.name
    entries = []
    for _, run in runs:
        logged = in_direction(files.read_json_lines(run.workdir / METRICS_FILE), direction)
        evaluations = (each for each in read_evaluations(run.workdir) if is_of(each, dataset))
        renamed = ({"step": each["step"], **{f"set/{key}": each[key] for key in each}} for each in evaluations)
        entries.append([*logged, *renamed])

    def lines(title: str, key: str) -> list[Series]:
        """A line of a key for each run: train/, valid/ or, of the results on this data set, set/."""
        kind = key.partition("/")[0]
        return [
            Series(
                ", ".join(filter(None, (label if many else "", title))),
                logged_points(run_entries, key),
                markers=kind != "train",
                color=number + 2 * (kind == "set") if many else 0,
                faint=key == "train/loss" and many,
            )
            for number, ((label, _), run_entries) in enumerate(zip(runs, entries, strict=True), 1)
        ]

    def metric_chart(key: str) -> str:
        scores = [*lines("validation", f"valid/{key}"), *lines(name, f"set/{key}")]
        return line_chart(METRICS[key].label, "step", scores)

    speed = "target tokens per second"
    losses = [*lines("training", "train/loss"), *lines("validation", "valid/loss"), *lines(name, "set/loss")]
    charts = [
        line_chart("loss, nats per token", "step", losses, log_y=True),
        next(filter(None, map(metric_chart, (*metrics, *ALWAYS_VALIDATED))), ""),
        line_chart("learning rate", "step", lines("" if many else "learning rate", "train/learning_rate")),
        line_chart(speed, "step", lines("" if many else speed, "train/target_tokens_per_s")),
    ]
    return chart_grid(charts)


def described(restored: RestoredModel) -> str:
    """The model and the time now, for the head of a page."""
    when = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    return f"{restored.description} · {when}"


def logged_points(entries: Iterable[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    """(step, value) of a key in lines of metrics, by step; of lines of one step the last."""
    return sorted({entry["step"]: entry[key] for entry in entries if key in entry}.items())


def chart_grid(charts: Iterable[str]) -> str:
    """Charts side by side; empty if all are."""
    drawn = "".join(charts)
    return f'<div class="charts">{drawn}</div>' if drawn else ""


def list_sentences(dataset: EvalDataset, result: EvalResult, ranked: Sequence[tuple[float, int]], label: str) -> str:
    """Sentences by score; `label` is that of the metric."""
    _, sources, references = dataset
    return "".join(
        sentence(
            f"sentence {i + 1:,} · {label} {score:.1f}",
            sources[i],
            references[0][i],
            [("translation", result.translations[i])],
        )
        for score, i in ranked
    )


def _attention(
    restored: RestoredModel, dataset: EvalDataset, result: EvalResult, ranked: Sequence[tuple[float, int]], label: str
) -> str:
    """The attention of a bad, a medium and a good translation."""
    translations = result.translations
    sides = [dataset.sources, translations]
    lengths = [[len(ids) for ids in restored.tokenizer.encode([side[i] for _, i in ranked])] for side in sides]
    candidates = [
        (score, i)
        for (score, i), *pair_lengths in zip(ranked, *lengths, strict=True)
        if max(pair_lengths) <= MAX_ATTENTION_TOKENS
        and len(sides[0][i].split()) >= MIN_WORDS
        and translations[i].strip()
    ]
    last = len(candidates) - 1
    selected = list(dict.fromkeys(candidates[quarter * last // 4] for quarter in (0, 2, 4))) if candidates else []
    config = restored.config
    aligner = Aligner(restored.model, restored.tokenizer, config.decode, restored.mesh, self_attention=True)
    pairs = [[side[i] for _, i in selected] for side in sides]
    maps = dict(aligner.attention(restored.params, pairs[0], pairs[1], restored.source_tag))
    return "".join(
        f"<h3>sentence {i + 1:,} · {label} {score:.1f}</h3>{_attention_maps(restored, maps[number], aligner.layer)}"
        for number, (score, i) in enumerate(selected)
    )


def _attention_maps(restored: RestoredModel, attention: Attention, layer: int) -> str:
    """Cross-attention and, of a Transformer, self-attention of one sentence."""
    source, target = (restored.tokenizer.pieces(ids) for ids in (attention.source, attention.target))
    kinds = [
        ("translation to source", attention.weights_LHTS, source, target),
        ("source to itself", attention.encoder_LHSS, source, source),
        ("translation to what precedes it", attention.decoder_LHTT, ["<s>", *target[:-1]], target),
    ]
    drawn = [
        attention_heatmaps(title, weights, columns, rows, min(layer, len(weights)))
        for title, weights, columns, rows in kinds
        if weights is not None
    ]
    return f'<div class="maps">{"".join(drawn)}</div>'
