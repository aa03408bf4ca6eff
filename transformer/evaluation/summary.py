"""Formats an evaluation as one JSON object and as a table for the terminal."""

import math
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any, NamedTuple

from transformer.checkpoints.loading import RestoredModel
from transformer.evaluation import significance
from transformer.evaluation.comparison import Comparison
from transformer.evaluation.datasets import EvalDataset
from transformer.evaluation.evaluator import EvalResult
from transformer.evaluation.metrics import METRICS
from transformer.models.flops import TrainingCost


class Evaluated(NamedTuple):
    """A direction that was evaluated.

    Attributes:
      restored: the model in this direction.
      dataset: of this direction.
    """

    restored: RestoredModel
    dataset: EvalDataset
    result: EvalResult


def as_json(restored: RestoredModel, result: EvalResult, comparison: Comparison | None = None) -> dict[str, Any]:
    """The fields of eval.py's JSON; non-finite values are null."""
    cost = TrainingCost.from_metrics(restored.metrics)
    first = (*restored.config.eval.metric_names, "length_ratio")
    headline = {name: value for name, value in result.scores.items() if name.removesuffix("_signature") in first}
    fields = {
        "step": restored.step,
        "steps": restored.steps,  # several if their mean is evaluated
        "sentences": result.sentences,
        "loss": result.loss,
        **headline,
        "seconds": round(result.seconds, 3),
        "train_flops": cost and cost.flops,
        "train_tokens": cost and cost.tokens,
        "train_hours": cost and cost.seconds / 3600,
        "perplexity": finite(result.perplexity),
        "word_perplexity": finite(result.word_perplexity),
        **{name: value for name, value in result.scores.items() if name not in headline},
    }
    if comparison:
        fields["versus"] = significance.as_json(comparison.systems[0].name, comparison.tests[0])
    return fields


def directions_as_json(evaluated: Mapping[str, Evaluated]) -> dict[str, Any]:
    """The fields of eval.py's JSON for several directions: means of the scores, and those of each under its name."""
    by_direction = {name: as_json(each.restored, each.result) for name, each in evaluated.items()}
    first, results = next(iter(by_direction.values())), [each.result for each in evaluated.values()]
    metrics = next(iter(evaluated.values())).restored.config.eval.metric_names
    return {
        "step": first["step"],
        "steps": first["steps"],
        "sentences": sum(result.sentences for result in results),
        "loss": mean(result.loss for result in results),
        **{name: mean(result.scores[name] for result in results) for name in metrics},
        "seconds": round(sum(result.seconds for result in results), 3),
        **{name: first[name] for name in ("train_flops", "train_tokens", "train_hours")},
        "directions": by_direction,
    }


def direction_rows(evaluated: Mapping[str, Evaluated], metrics: Sequence[str]) -> list[list[str]]:
    """Name, sentences, scores and loss of each direction, and means as the last row."""
    results = {name: each.result for name, each in evaluated.items()}
    rows = [
        [name, f"{result.sentences:,}", *(f"{result.scores[m]:.2f}" for m in metrics), f"{result.loss:.3f}"]
        for name, result in results.items()
    ]
    scores = [f"{mean(result.scores[m] for result in results.values()):.2f}" for m in metrics]
    total = sum(result.sentences for result in results.values())
    return [*rows, ["mean", f"{total:,}", *scores, f"{mean(result.loss for result in results.values()):.3f}"]]


def format_directions(restored: RestoredModel, evaluated: Mapping[str, Evaluated]) -> str:
    """The table for the terminal, a line for each direction."""
    metrics = restored.config.eval.metric_names
    heads = ["direction", "sentences", *(METRICS[name].label for name in metrics), "loss"]
    rows = [heads, *direction_rows(evaluated, metrics)]
    widths = [max(len(head), 8) for head in heads]
    lines = ["  ".join(["", row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
    return "\n".join([restored.description, *lines, *(f"  {line}" for line in signatures(evaluated, metrics[:1]))])


def signatures(evaluated: Mapping[str, Evaluated], metrics: Sequence[str]) -> list[str]:
    """The signatures of metrics, each with its directions if these have several; an empty set has none."""
    lines = []
    for metric in metrics:
        directions: dict[str, list[str]] = {}
        for name, each in evaluated.items():
            if signature := each.result.scores[f"{metric}_signature"]:
                directions.setdefault(signature, []).append(name)
        for signature, names in directions.items():
            of = f" of {', '.join(names)}" if len(directions) > 1 else ""
            lines.append(f"{METRICS[metric].label}{of} {signature}")
    return lines


def finite(value: float) -> float | None:
    """None for infinity, which JSON lacks."""
    return value if math.isfinite(value) else None


def score_rows(result: EvalResult) -> list[tuple[str, str, str]]:
    """Name, value and signature or meaning of each score; those for older papers come last."""
    scores = result.scores
    rows = [
        (METRICS[name].label, f"{value:.2f}", scores[f"{name}_signature"])
        for name, value in scores.items()
        if name in METRICS
    ]
    if "comet" in scores:
        rows.append(("COMET", f"{scores['comet']:.4f}", scores["comet_signature"]))
    rows += [
        ("loss", f"{result.loss:.3f}", "nats per target token, without label smoothing"),
        ("perplexity", f"{result.perplexity:.2f}", "per subword of this vocabulary"),
        ("", f"{result.word_perplexity:.2f}", "per word, the end of a sentence counted as one"),
        ("length ratio", f"{scores['length_ratio']:.3f}", "hypothesis words / reference words"),
    ]
    if "legacy_signature" in scores:
        note = f"for older papers only: {scores['legacy_signature']}"
        split_note = "the same with compounds split, as get_ende_bleu.sh does"
        rows.append(("legacy BLEU", f"{scores['legacy_tokenized_bleu']:.2f}", note))
        rows.append(("", f"{scores['legacy_compound_split_bleu']:.2f}", split_note))
    return rows


def format_table(restored: RestoredModel, dataset: EvalDataset, result: EvalResult) -> str:
    """The table for the terminal."""
    rows = [f"{dataset.name}: {result.sentences:,} sentences, {restored.description}, {result.seconds:.1f} s"]
    if not result.sentences:
        rows.append("  no sentences, so there is nothing to score")
    rows += [f"  {title:<13}{value:>7}   {note}" for title, value, note in score_rows(result)]
    if groups := result.scores.get("bleu_by_source_length"):
        cells = " · ".join(f"{words}: {group['bleu']:.1f} ({group['sentences']:,})" for words, group in groups.items())
        rows.append(f"  BLEU by words of the source (sentences)  {cells}")
    cost = TrainingCost.from_metrics(restored.metrics)
    if cost:
        rows.append(f"  trained on {cost}")
    return "\n".join(rows)
