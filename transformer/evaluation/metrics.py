"""Corpus metrics: BLEU, chrF2, TER and chrF2++ by sacreBLEU with signatures, tokenized BLEU, and COMET.

Detokenized translations are scored against raw references, so the `sacrebleu` command gives the same scores for the
written files; `bleu_tokenizer` chooses the tokenizer of BLEU. Also: BLEU by source length, the tokenized BLEU of older
papers (legacy), and COMET if its package and weights are installed.
"""

import functools
import importlib.util
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etils import epath
from sacrebleu.metrics import BLEU, CHRF, TER

from transformer.evaluation.bleu_tokenizer import DEFAULT, PUBLISHED, make_bleu
from transformer.runtime.errors import UserError

Scores = dict[str, Any]
METRICS: Mapping[str, Callable[..., Any]] = {
    "bleu": BLEU,
    "chrf": CHRF,
    "ter": TER,
    "chrfpp": functools.partial(CHRF, word_order=2),
}
METRIC_NAMES = {"bleu": "BLEU", "chrf": "chrF2", "ter": "TER", "chrfpp": "chrF2++"}
DEFAULT_METRICS = ("bleu", "chrf", "ter")

LENGTH_BOUNDS = (10, 20, 30, 40, 50)  # upper bounds of groups by source words; the last group has more

COMPOUND_PATTERN = re.compile(r"(\S)-(\S)")
COMET_MODEL = "Unbabel/wmt22-comet-da"


def make_metric(name: str, tokenizer: str) -> Any:
    """A metric of `METRICS`; BLEU with a tokenizer named as in `choose_bleu_tokenizer`."""
    return make_bleu(tokenizer) if name == "bleu" else METRICS[name]()


def score(
    hypotheses: Sequence[str],
    references: Sequence[Sequence[str]],
    metrics: Sequence[str],
    tokenizer: str = DEFAULT,
) -> Scores:
    """Scores a corpus: each metric and `METRIC_signature`, and `length_ratio` (hypothesis / reference words).

    Args:
      hypotheses: detokenized translations.
      references: one or several lists, each as long as the hypotheses.
      metrics: of `METRICS`.
      tokenizer: of BLEU, named as in `choose_bleu_tokenizer`.

    Raises:
      UserError: the numbers of lines differ, which sacreBLEU does not check.
    """
    check_lengths(len(hypotheses), references)
    scores: Scores = {}
    for name in metrics:
        metric = make_metric(name, tokenizer)
        # 0 for an empty corpus, whose score is undefined: the keys stay the same.
        scores[name] = metric.corpus_score(list(hypotheses), references).score if hypotheses else 0.0
        scores[f"{name}_signature"] = str(metric.get_signature()) if hypotheses else ""
    reference_words = sum(len(line.split()) for line in references[0])
    hypothesis_words = sum(len(line.split()) for line in hypotheses)
    scores["length_ratio"] = hypothesis_words / reference_words if reference_words else 0.0
    return scores


def check_lengths(sentences: int, references: Sequence[Sequence[str]]) -> None:
    """Raises a UserError unless each list of references has as many lines as there are sentences."""
    for number, reference in enumerate(references, 1):
        if len(reference) != sentences:
            raise UserError(
                f"expected one reference for each sentence, got {sentences:,} sentences and {len(reference):,} lines "
                f"in reference {number}"
            )


def extended_scores(
    sources: Sequence[str],
    hypotheses: Sequence[str],
    references: Sequence[Sequence[str]],
    language: str,
    tokenizer: str = DEFAULT,
) -> Scores:
    """Computes the metrics of a full evaluation other than DEFAULT_METRICS.

    Args:
      language: code of the hypotheses' language, for Moses' tokenizer.
      tokenizer: as in `score`.
    """
    scores = score(hypotheses, references, ["chrfpp"])
    del scores["length_ratio"]
    return {
        **scores,
        "bleu_by_source_length": bleu_by_source_length(sources, hypotheses, references, tokenizer),
        **tokenized_bleu(hypotheses, references, language, tokenizer == PUBLISHED),
        **comet_score(sources, hypotheses, references),
    }


def bleu_by_source_length(
    sources: Sequence[str],
    hypotheses: Sequence[str],
    references: Sequence[Sequence[str]],
    tokenizer: str = DEFAULT,
) -> dict[str, Scores]:
    """Number of sentences and corpus BLEU of sources with 0 to 10 words, 11 to 20, …; skips empty groups."""
    scores: dict[str, Scores] = {}
    for name, members in group_by_length([len(source.split()) for source in sources]).items():
        group, *group_references = [[lines[i] for i in members] for lines in (hypotheses, *references)]
        bleu = make_metric("bleu", tokenizer).corpus_score(group, group_references).score
        scores[name] = {"sentences": len(members), "bleu": bleu}
    return scores


def group_by_length(lengths: Sequence[int]) -> dict[str, list[int]]:
    """The indices of lengths from 0 to 10, 11 to 20, …, by the names of these groups; skips empty ones."""
    names = _length_names()
    groups: dict[str, list[int]] = {name: [] for name in names}
    for i, length in enumerate(lengths):
        groups[names[sum(length > limit for limit in LENGTH_BOUNDS)]].append(i)
    return {name: members for name, members in groups.items() if members}


def _length_names() -> list[str]:
    """0-10, 11-20, …, over 50."""
    starts = [0, *(limit + 1 for limit in LENGTH_BOUNDS[:-1])]
    return [
        *(f"{start}-{limit}" for start, limit in zip(starts, LENGTH_BOUNDS, strict=True)),
        f"over {LENGTH_BOUNDS[-1]}",
    ]


def tokenized_bleu(
    hypotheses: Sequence[str], references: Sequence[Sequence[str]], language: str, tokenized: bool = False
) -> Scores:
    """BLEU of Moses tokens, as reported before sacreBLEU; comparable only with papers of that time.

    tensor2tensor's get_ende_bleu.sh: tokenizer.perl, then compounds split at hyphens with ATAT marks, then
    multi-bleu.perl, which is BLEU of white-space-separated tokens without smoothing. Splitting compounds, usual in
    papers on English to German, adds about a point; both scores are given. The references are tokenized here, whereas
    that script reads tokenized ones. sacremoses equals tokenizer.perl of 2017: it keeps the full stop of an
    abbreviation at the end of a line. Text that is `tokenized` already is not tokenized again.
    """
    tokenize, signature = (str, "multi-bleu|as it is") if tokenized else moses_tokenizer(language)
    scores: Scores = {}
    unsplit = [[tokenize(line) for line in side] for side in (hypotheses, *references)]
    split = [[split_compounds(line) for line in side] for side in unsplit]
    for name, sides in (("legacy_tokenized_bleu", unsplit), ("legacy_compound_split_bleu", split)):
        metric = BLEU(tokenize="none", force=True, smooth_method="none")
        scores[name] = metric.corpus_score(sides[0], sides[1:]).score if hypotheses else 0.0
    return {**scores, "legacy_signature": signature}


def moses_tokenizer(language: str) -> tuple[Callable[[str], str], str]:
    """Moses' tokenizer.perl -l LANGUAGE, ported by sacremoses, and the signature of scores with it."""
    from importlib.metadata import version

    from sacremoses import MosesTokenizer

    tokenizer = MosesTokenizer(lang=language)
    signature = f"multi-bleu|moses:{language}|sacremoses:{version('sacremoses')}"
    return lambda line: tokenizer.tokenize(line, return_str=True), signature


def split_compounds(line: str) -> str:
    """Text-Format → Text ##AT##-##AT## Format."""
    return COMPOUND_PATTERN.sub(r"\1 ##AT##-##AT## \2", line)


def comet_score(sources: Sequence[str], hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> Scores:
    """COMET with the first references; empty if its package or weights are not installed: nothing is downloaded.

    The weights are those of COMET_MODEL in the cache of Hugging Face, or the file $COMET_CHECKPOINT. Loading them by
    PyTorch may execute code in the file.
    """
    path = find_comet_weights()
    if path is None or not hypotheses:
        return {}
    os.environ["HF_HUB_OFFLINE"] = "1"  # its encoder is read from the cache too
    package = importlib.import_module("comet")
    model = package.load_from_checkpoint(path)
    rows = [{"src": s, "mt": h, "ref": r} for s, h, r in zip(sources, hypotheses, references[0], strict=True)]
    prediction = model.predict(rows, batch_size=8, gpus=0, progress_bar=False)
    return {"comet": float(prediction.system_score), "comet_signature": f"comet|{epath.Path(path).name}"}


def find_comet_weights() -> str | None:
    """The file of COMET's weights; None if it or the package is not installed."""
    if importlib.util.find_spec("comet") is None:
        return None
    if path := os.environ.get("COMET_CHECKPOINT"):
        if not os.path.isfile(path):
            raise UserError(f"COMET_CHECKPOINT={path}: expected a file of COMET's weights, but it is missing")
        return path
    cached = importlib.import_module("huggingface_hub").try_to_load_from_cache(COMET_MODEL, "checkpoints/model.ckpt")
    return cached if isinstance(cached, str) else None
