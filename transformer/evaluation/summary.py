"""What an evaluation found, as one JSON object for machines and as a table for people."""

import math
from typing import Any

from transformer.evaluation import significance
from transformer.evaluation.evaluator import Evaluation
from transformer.evaluation.metrics import HEADLINE, TITLES
from transformer.evaluation.significance import Versus
from transformer.models.flops import Spent


def as_json(evaluation: Evaluation, versus: Versus | None = None) -> dict[str, Any]:
    """The keys that others rely on first, in their order, then what `scores.further` found."""
    trained, report = evaluation.trained, evaluation.report
    spent = Spent.of(trained.metrics)
    fields = {
        "step": trained.step,
        "steps": trained.steps,  # several where their mean was scored
        "sentences": report.sentences,
        "loss": report.loss,
        **report.scores,
        "seconds": round(report.seconds, 3),
        "train_flops": spent and spent.flops,
        "train_tokens": spent and spent.tokens,
        "train_hours": spent and spent.seconds / 3600,
        "perplexity": finite(report.held_out.perplexity),
        "word_perplexity": finite(report.held_out.word_perplexity),
        **evaluation.further,
    }
    if versus:
        fields["versus"] = significance.as_json(versus)
    return fields


def finite(value: float) -> float | None:
    """JSON has no infinity."""
    return value if math.isfinite(value) else None


def score_rows(evaluation: Evaluation) -> list[tuple[str, str, str]]:
    """Name, value and signature or meaning of each score; what only older papers compare with comes last."""
    held_out, found = evaluation.report.held_out, {**evaluation.report.scores, **evaluation.further}
    rows = [(TITLES[name], f"{found[name]:.2f}", found[f"{name}_signature"]) for name in (*HEADLINE, "chrfpp")]
    if "comet" in found:
        rows.append(("COMET", f"{found['comet']:.4f}", found["comet_signature"]))
    return [
        *rows,
        ("loss", f"{held_out.mean:.3f}", "nats per target token, without label smoothing"),
        ("perplexity", f"{held_out.perplexity:.2f}", "per subword of this vocabulary"),
        ("", f"{held_out.word_perplexity:.2f}", "per word, the end of a sentence counted as one"),
        ("length ratio", f"{found['length_ratio']:.3f}", "hypothesis words / reference words"),
        ("legacy BLEU", f"{found['legacy_tokenized_bleu']:.2f}", f"for older papers only: {found['legacy_signature']}"),
        ("", f"{found['legacy_compound_split_bleu']:.2f}", "the same with compounds split, as get_ende_bleu.sh does"),
    ]


def table(evaluation: Evaluation) -> str:
    """Scores for people."""
    trained, report = evaluation.trained, evaluation.report
    rows = [f"{evaluation.chosen.name}: {report.sentences:,} sentences, {trained.description}, {report.seconds:.1f} s"]
    if not report.sentences:
        rows.append("  no sentences, so there is nothing to score")
    rows += [f"  {title:<13}{value:>7}   {note}" for title, value, note in score_rows(evaluation)]
    groups = evaluation.further["bleu_by_source_length"]
    if groups:
        shown = " · ".join(f"{words}: {group['bleu']:.1f} ({group['sentences']:,})" for words, group in groups.items())
        rows.append(f"  BLEU by words of the source (sentences)  {shown}")
    spent = Spent.of(trained.metrics)
    if spent:
        rows.append(f"  trained on {spent}")
    return "\n".join(rows)
