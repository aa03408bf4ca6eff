"""reports/ and report.html in the workdir: what eval.py found, for a person to look at.

One file, which loads nothing from anywhere: scores with signatures, learning curves, the comparison with
another system, worst and best sentences, and attention to the source by layer and head.
"""

import contextlib
import datetime
import html
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from transformer.decoding.alignment import Aligner
from transformer.distributed import multihost
from transformer.evaluation import summary
from transformer.evaluation.charts import Series, bar_chart, line_chart
from transformer.evaluation.continuous import read_evaluations
from transformer.evaluation.evaluator import Evaluation, result_name
from transformer.evaluation.heatmaps import sentence_maps
from transformer.evaluation.metrics import TITLES
from transformer.evaluation.report_html import Cell, page, section, sentence, table, tiles
from transformer.evaluation.significance import LEVEL, Versus, sentence_score
from transformer.runtime.errors import UserError
from transformer.runtime.files import METRICS_FILE, user_error_on_oserror, write_atomic
from transformer.runtime.logging import log_info

REPORT_FILE = "report.html"
SENTENCES = 8  # shown as worst, and as best
SCORED = 2000  # sentences ranked at most
FEWEST_WORDS = 4  # of a source that may be shown as best, or whose attention is: shorter ones tell little
MAPPED_LENGTH = 40  # tokens, at most, of a sentence whose attention is drawn
MARKS = (
    'Marked: <mark class="odd">words of a translation</mark> that the reference lacks, and <mark class="lack">words of '
    "the reference</mark> that the translation lacks."
)
ATTENTION_NOTE = (
    "Rows are tokens of the translation, columns tokens of the source; the fuller the colour, the larger the weight, "
    "from 0 to 1. Press a small map to see it large."
)


def write(
    workdir: epath.PathLike,
    evaluation: Evaluation,
    versus: Versus | None = None,
    fields: Mapping[str, Any] | None = None,
) -> None:
    """Writes the page and says where; a workdir that cannot be written costs the page, not the scores.

    It is kept as reports/NAME[.versus-OTHER].html, with the name of `result_name`; report.html is the newest.

    Args:
      fields: of decoding, other than the checkpoint's own.
    """
    name = result_name(workdir, evaluation.trained, evaluation.chosen, fields)
    other = re.sub(r"[^\w.-]+", "-", f".versus-{versus.name}") if versus else ""
    path, newest = epath.Path(workdir) / "reports" / f"{name}{other}.html", epath.Path(workdir) / REPORT_FILE
    text = build(workdir, evaluation, versus)  # for which all hosts must run the model
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


def build(workdir: epath.PathLike, evaluation: Evaluation, versus: Versus | None = None) -> str:
    """The page."""
    trained, chosen = evaluation.trained, evaluation.chosen
    data = trained.config.data
    when = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    subtitle = (
        f"{chosen.name}, {evaluation.report.sentences:,} sentences, {data.source_language} → {data.target_language} · "
        f"{trained.description} · {when}"
    )
    ranked = ranking(evaluation)
    part = f"of {len(ranked):,} sentences ranked, evenly spread" if len(ranked) < evaluation.report.sentences else ""
    by = f"By chrF2{part and ', '}{part}. {MARKS}"
    return page(
        f"{epath.Path(workdir).name}: translation report",
        subtitle,
        [
            _tiles(evaluation),
            section("scores", "Scores", _score_table(evaluation)),
            section("curves", "Learning curves", _curves(workdir, chosen.name)),
            section("length", "BLEU by source length", _lengths(evaluation)),
            _comparison(evaluation, versus) if versus else "",
            section("worst", "Worst sentences", _sentences(evaluation, ranked[:SENTENCES]), by),
            section("best", "Best sentences", _sentences(evaluation, best(evaluation, ranked)), by),
            section("attention", "Attention to the source", _attention(evaluation, ranked), ATTENTION_NOTE),
            section("config", "Config", _config(evaluation)),
        ],
    )


def ranking(evaluation: Evaluation) -> list[tuple[float, int]]:
    """chrF2 and place of each sentence, the worst first; of large sets a part, evenly spread."""
    translations = evaluation.report.translations
    every = -(-len(translations) // SCORED) or 1
    references = evaluation.chosen.references
    return sorted((sentence_score(translations[i], references, i), i) for i in range(0, len(translations), every))


def best(evaluation: Evaluation, ranked: Sequence[tuple[float, int]]) -> list[tuple[float, int]]:
    """The best sentences, the longest first among equals, and none that was among the worst."""
    words = [len(source.split()) for source in evaluation.chosen.sources]
    able = [each for each in ranked[SENTENCES:] if words[each[1]] >= FEWEST_WORDS]
    return sorted(able, key=lambda each: (-each[0], -words[each[1]], each[1]))[:SENTENCES]


def _config(evaluation: Evaluation) -> str:
    fields = html.escape(evaluation.trained.config.to_json())
    return f"<details><summary>all fields</summary><pre>{fields}</pre></details>"


def _tiles(evaluation: Evaluation) -> str:
    scores, held_out = evaluation.report.scores, evaluation.report.held_out
    return tiles(
        [
            ("BLEU", f"{scores['bleu']:.2f}", "sacreBLEU, higher is better"),
            ("chrF2", f"{scores['chrf']:.2f}", "of characters, higher is better"),
            ("TER", f"{scores['ter']:.2f}", "edits, lower is better"),
            ("perplexity", f"{held_out.perplexity:.2f}", "per subword, lower is better"),
        ]
    )


def _score_table(evaluation: Evaluation) -> str:
    rows = [
        [Cell(name), Cell(value, "number"), Cell(note, "note")] for name, value, note in summary.score_rows(evaluation)
    ]
    return table([Cell("score"), Cell("value", "number"), Cell("signature, or what it is")], rows)


def _lengths(evaluation: Evaluation) -> str:
    groups = evaluation.further["bleu_by_source_length"]
    bars = [(words, group["bleu"], f"{group['sentences']:,} sentences") for words, group in groups.items()]
    return f'<div class="charts">{bar_chart("BLEU", "words of the source", bars)}</div>' if bars else ""


def _curves(workdir: epath.PathLike, name: str) -> str:
    """Loss, BLEU, speed and learning rate against the step, and what --watch scored on this set."""
    metrics = list(_read_metrics(epath.Path(workdir) / METRICS_FILE))
    watched = {entry["step"]: entry for entry in read_evaluations(workdir) if entry["name"] == name}

    def series(title: str, key: str, marked: bool = False) -> Series:
        return Series(title, [(m["step"], m[key]) for m in metrics if key in m], marked)

    def scored(key: str) -> Series:
        return Series(name, [(step, watched[step][key]) for step in sorted(watched) if key in watched[step]], True)

    charts = [
        line_chart(
            "loss, nats per token",
            "step",
            [series("training", "train/loss"), series("validation", "valid/loss", True), scored("loss")],
        ),
        line_chart("BLEU", "step", [series("validation", "valid/bleu", True), scored("bleu")]),
        line_chart("learning rate", "step", [series("learning rate", "train/learning_rate")]),
        line_chart(
            "target tokens per second", "step", [series("target tokens per second", "train/target_tokens_per_s")]
        ),
    ]
    shown = "".join(charts)
    return f'<div class="charts">{shown}</div>' if shown else ""


def _read_metrics(path: epath.Path) -> Iterator[dict[str, Any]]:
    """Lines with a step; one that is being written is left out."""
    with contextlib.suppress(FileNotFoundError):
        for line in path.read_bytes().split(b"\n"):
            with contextlib.suppress(ValueError, KeyError, TypeError):
                values = json.loads(line)
                float(values["step"])
                yield values


def _comparison(evaluation: Evaluation, versus: Versus) -> str:
    rows = []
    for each in versus.comparisons:
        p_values = (f"{p:.4f}" for p in (each.bootstrap_p, each.randomization_p))
        numbers = [f"{each.ours:.2f}", f"{each.theirs:.2f}", f"{each.difference:+.2f}", *p_values]
        verdict = "significant" if each.is_significant else "may be chance"
        rows.append([Cell(TITLES[each.metric]), *(Cell(number, "number") for number in numbers), Cell(verdict)])
    names = ["this", "other", "difference", "bootstrap p", "randomization p"]
    shown = table([Cell("score"), *(Cell(name, "number") for name in names), Cell("")], rows)
    _, sources, references = evaluation.chosen
    for place, ours, theirs in versus.sentences:
        pair = [("this", evaluation.report.translations[place]), ("other", versus.translations[place])]
        title = f"sentence {place + 1:,} · chrF2 {ours:.1f} against {theirs:.1f}"
        shown += sentence(title, sources[place], references[0][place], pair)
    note = f"Significant: both p below {LEVEL}. Then the sentences that differ most in chrF2."
    return section("versus", f"Against {versus.name}", shown, note)


def _sentences(evaluation: Evaluation, ranked: Sequence[tuple[float, int]]) -> str:
    _, sources, references = evaluation.chosen
    return "".join(
        sentence(
            f"sentence {i + 1:,} · chrF2 {score:.1f}",
            sources[i],
            references[0][i],
            [("translation", evaluation.report.translations[i])],
        )
        for score, i in ranked
    )


def _attention(evaluation: Evaluation, ranked: Sequence[tuple[float, int]]) -> str:
    """Of a bad, a middling and a good translation."""
    trained, translations = evaluation.trained, evaluation.report.translations
    sides = [evaluation.chosen.sources, translations]
    lengths = [[len(ids) for ids in trained.tokenizer.encode([side[i] for _, i in ranked])] for side in sides]
    able = [
        (score, i)
        for (score, i), *both in zip(ranked, *lengths, strict=True)
        if max(both) <= MAPPED_LENGTH and len(sides[0][i].split()) >= FEWEST_WORDS and translations[i].strip()
    ]
    chosen = list(dict.fromkeys(able[part * (len(able) - 1) // 4] for part in (0, 2, 4))) if able else []
    config = trained.config
    aligner = Aligner(trained.model, trained.tokenizer, config.model.looking_layers, config.decode, trained.mesh)
    pairs = [[side[i] for _, i in chosen] for side in sides]
    maps = dict(aligner.attention(trained.params, pairs[0], pairs[1]))
    return "".join(
        sentence_maps(
            f"sentence {i + 1:,} · chrF2 {score:.1f}",
            maps[number].weights_LHTS,
            trained.tokenizer.pieces(maps[number].source),
            trained.tokenizer.pieces(maps[number].target),
            aligner.layer,
        )
        for number, (score, i) in enumerate(chosen)
    )
