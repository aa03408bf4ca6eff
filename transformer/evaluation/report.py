"""Builds the HTML report of an evaluation: reports/ and report.html in the workdir.

A self-contained page: scores with signatures, learning curves, the comparison with another system, worst and best
sentences, and attention to the source by layer and head.
"""

import contextlib
import datetime
import html
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from transformer.checkpoints.loading import RestoredModel
from transformer.decoding.alignment import Aligner
from transformer.distributed import multihost
from transformer.evaluation import summary
from transformer.evaluation.charts import Series, bar_chart, line_chart
from transformer.evaluation.continuous import read_evaluations
from transformer.evaluation.evaluator import EvalDataset, EvalResult, result_name
from transformer.evaluation.heatmaps import attention_heatmaps
from transformer.evaluation.metrics import METRIC_NAMES
from transformer.evaluation.report_html import Cell, render_page, section, sentence, stat_cards, table
from transformer.evaluation.significance import ALPHA, SystemComparison, sentence_score
from transformer.runtime.errors import UserError
from transformer.runtime.files import METRICS_FILE, user_error_on_oserror, write_atomic
from transformer.runtime.logging import log_info

REPORT_FILE = "report.html"
NUM_SENTENCES = 8  # shown as worst, and as best
MAX_RANKED = 2000  # sentences
MIN_WORDS = 4  # of a source shown as best or with its attention
MAX_ATTENTION_TOKENS = 40  # of a sentence whose attention is shown
DIFF_LEGEND = (
    'Marked: <mark class="odd">words of a translation</mark> that the reference lacks, and <mark class="lack">words of '
    "the reference</mark> that the translation lacks."
)
ATTENTION_NOTE = (
    "Rows are tokens of the translation, columns tokens of the source; the opacity is the weight, from 0 to 1. "
    "Press a small map to enlarge it."
)


def write(
    workdir: epath.PathLike,
    restored: RestoredModel,
    dataset: EvalDataset,
    result: EvalResult,
    comparison: SystemComparison | None = None,
    fields: Mapping[str, Any] | None = None,
) -> None:
    """Writes reports/NAME[.versus-BASELINE].html, named by `result_name`, and the newest also as report.html.

    If the workdir is not writable, this is logged and not an error.

    Args:
      workdir: of the model.
      restored: the model.
      dataset: on which it was evaluated.
      result: of the evaluation.
      comparison: with a baseline.
      fields: of decoding, other than the checkpoint's own.
    """
    name = result_name(workdir, restored, dataset, fields)
    suffix = re.sub(r"[^\w.-]+", "-", f".versus-{comparison.name}") if comparison else ""
    path, newest = epath.Path(workdir) / "reports" / f"{name}{suffix}.html", epath.Path(workdir) / REPORT_FILE
    text = build(workdir, restored, dataset, result, comparison)  # runs the model on all hosts
    if not multihost.is_primary():
        return
    try:
        with user_error_on_oserror(f"{path}"):
            path.parent.mkdir(exist_ok=True)
            write_atomic(path, text)
        with user_error_on_oserror(f"{newest}"):
            write_atomic(newest, text)
    except UserError as error:
        log_info(f"warning: no report: {error}")
        return
    log_info(f"report: {path}")


def build(
    workdir: epath.PathLike,
    restored: RestoredModel,
    dataset: EvalDataset,
    result: EvalResult,
    comparison: SystemComparison | None = None,
) -> str:
    """The page as HTML."""
    data = restored.config.data
    when = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    subtitle = (
        f"{dataset.name}, {result.sentences:,} sentences, {data.source_language} → {data.target_language} · "
        f"{restored.description} · {when}"
    )
    ranked = rank_sentences(dataset, result.translations)
    sample = f", of {len(ranked):,} sentences ranked, evenly spread" if len(ranked) < result.sentences else ""
    note = f"By chrF2{sample}. {DIFF_LEGEND}"
    best = best_sentences(dataset, ranked)
    return render_page(
        f"{epath.Path(workdir).name}: translation report",
        subtitle,
        [
            _stat_cards(result),
            section("scores", "Scores", _score_table(result)),
            section("curves", "Learning curves", _curves(workdir, dataset.name)),
            section("length", "BLEU by source length", _length_chart(result)),
            _comparison(dataset, result, comparison) if comparison else "",
            section("worst", "Worst sentences", _sentences(dataset, result, ranked[:NUM_SENTENCES]), note),
            section("best", "Best sentences", _sentences(dataset, result, best), note),
            section(
                "attention", "Attention to the source", _attention(restored, dataset, result, ranked), ATTENTION_NOTE
            ),
            section("config", "Config", _config(restored)),
        ],
    )


def rank_sentences(dataset: EvalDataset, translations: Sequence[str]) -> list[tuple[float, int]]:
    """chrF2 and index of each sentence, worst first; for large data sets of an evenly spread sample."""
    step = -(-len(translations) // MAX_RANKED) or 1
    references = dataset.references
    return sorted((sentence_score(translations[i], references, i), i) for i in range(0, len(translations), step))


def best_sentences(dataset: EvalDataset, ranked: Sequence[tuple[float, int]]) -> list[tuple[float, int]]:
    """The best sentences except those shown as worst; the longest first among equal scores."""
    words = [len(source.split()) for source in dataset.sources]
    candidates = [each for each in ranked[NUM_SENTENCES:] if words[each[1]] >= MIN_WORDS]
    return sorted(candidates, key=lambda each: (-each[0], -words[each[1]], each[1]))[:NUM_SENTENCES]


def _config(restored: RestoredModel) -> str:
    fields = html.escape(restored.config.to_json())
    return f"<details><summary>all fields</summary><pre>{fields}</pre></details>"


def _stat_cards(result: EvalResult) -> str:
    scores = result.scores
    return stat_cards(
        [
            ("BLEU", f"{scores['bleu']:.2f}", "sacreBLEU, higher is better"),
            ("chrF2", f"{scores['chrf']:.2f}", "character n-grams, higher is better"),
            ("TER", f"{scores['ter']:.2f}", "edits, lower is better"),
            ("perplexity", f"{result.perplexity:.2f}", "per subword, lower is better"),
        ]
    )


def _score_table(result: EvalResult) -> str:
    rows = [[Cell(name), Cell(value, "number"), Cell(note, "note")] for name, value, note in summary.score_rows(result)]
    return table([Cell("score"), Cell("value", "number"), Cell("signature or meaning")], rows)


def _length_chart(result: EvalResult) -> str:
    groups = result.scores["bleu_by_source_length"]
    bars = [(words, group["bleu"], f"{group['sentences']:,} sentences") for words, group in groups.items()]
    return f'<div class="charts">{bar_chart("BLEU", "words of the source", bars)}</div>' if bars else ""


def _curves(workdir: epath.PathLike, name: str) -> str:
    """Loss, BLEU, learning rate and speed by step, with the results of --watch on this data set."""
    metrics = list(_read_metrics(epath.Path(workdir) / METRICS_FILE))
    evaluations = {entry["step"]: entry for entry in read_evaluations(workdir) if entry["name"] == name}

    def training(title: str, key: str, markers: bool = False) -> Series:
        return Series(title, [(m["step"], m[key]) for m in metrics if key in m], markers)

    def evaluated(key: str) -> Series:
        return Series(
            name, [(step, evaluations[step][key]) for step in sorted(evaluations) if key in evaluations[step]], True
        )

    charts = [
        line_chart(
            "loss, nats per token",
            "step",
            [training("training", "train/loss"), training("validation", "valid/loss", True), evaluated("loss")],
        ),
        line_chart("BLEU", "step", [training("validation", "valid/bleu", True), evaluated("bleu")]),
        line_chart("learning rate", "step", [training("learning rate", "train/learning_rate")]),
        line_chart(
            "target tokens per second", "step", [training("target tokens per second", "train/target_tokens_per_s")]
        ),
    ]
    drawn = "".join(charts)
    return f'<div class="charts">{drawn}</div>' if drawn else ""


def _read_metrics(path: epath.Path) -> Iterator[dict[str, Any]]:
    """Lines with a step; skips one that is being written."""
    with contextlib.suppress(FileNotFoundError):
        for line in path.read_bytes().split(b"\n"):
            with contextlib.suppress(ValueError, KeyError, TypeError):
                values = json.loads(line)
                float(values["step"])
                yield values


def _comparison(dataset: EvalDataset, result: EvalResult, comparison: SystemComparison) -> str:
    rows = []
    for each in comparison.tests:
        p_values = (f"{p:.4f}" for p in (each.bootstrap_p, each.randomization_p))
        numbers = [f"{each.score:.2f}", f"{each.baseline_score:.2f}", f"{each.difference:+.2f}", *p_values]
        verdict = "significant" if each.is_significant else "may be chance"
        rows.append([Cell(METRIC_NAMES[each.metric]), *(Cell(number, "number") for number in numbers), Cell(verdict)])
    names = ["this", "other", "difference", "bootstrap p", "randomization p"]
    content = table([Cell("score"), *(Cell(name, "number") for name in names), Cell("")], rows)
    _, sources, references = dataset
    for i, score, baseline_score in comparison.sentences:
        pair = [("this", result.translations[i]), ("other", comparison.translations[i])]
        title = f"sentence {i + 1:,} · chrF2 {score:.1f} against {baseline_score:.1f}"
        content += sentence(title, sources[i], references[0][i], pair)
    note = f"Significant: both p below {ALPHA}. Then the sentences that differ most in chrF2."
    return section("versus", f"Against {comparison.name}", content, note)


def _sentences(dataset: EvalDataset, result: EvalResult, ranked: Sequence[tuple[float, int]]) -> str:
    _, sources, references = dataset
    return "".join(
        sentence(
            f"sentence {i + 1:,} · chrF2 {score:.1f}",
            sources[i],
            references[0][i],
            [("translation", result.translations[i])],
        )
        for score, i in ranked
    )


def _attention(
    restored: RestoredModel, dataset: EvalDataset, result: EvalResult, ranked: Sequence[tuple[float, int]]
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
    aligner = Aligner(
        restored.model, restored.tokenizer, config.model.num_cross_attention_layers, config.decode, restored.mesh
    )
    pairs = [[side[i] for _, i in selected] for side in sides]
    maps = dict(aligner.attention(restored.params, pairs[0], pairs[1]))
    return "".join(
        attention_heatmaps(
            f"sentence {i + 1:,} · chrF2 {score:.1f}",
            maps[number].weights_LHTS,
            restored.tokenizer.pieces(maps[number].source),
            restored.tokenizer.pieces(maps[number].target),
            aligner.layer,
        )
        for number, (score, i) in enumerate(selected)
    )
