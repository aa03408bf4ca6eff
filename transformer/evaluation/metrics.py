"""Corpus metrics: BLEU, chrF2, TER and chrF2++ by sacreBLEU with signatures, exact match, accuracy, ROUGE, and COMET.

Detokenized translations are scored against raw references, so the `sacrebleu` command gives the same scores for the
written files; `bleu_tokenizer` chooses the tokenizer of BLEU. Also: BLEU by source length, the tokenized BLEU of older
papers (legacy), and COMET if its package and weights are installed.

All scores are from 0 to 100, but TER may exceed it and COMET is its own.
"""

import functools
import importlib.util
import os
import re
import string
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from sacrebleu.metrics import BLEU, CHRF, TER
from sacrebleu.metrics.base import Metric, Score, Signature

from transformer.config import EvalConfig
from transformer.evaluation.bleu_tokenizer import DEFAULT, TOKENIZED, make_bleu
from transformer.runtime.errors import UserError
from transformer.runtime.logging import log_info

Scores = dict[str, Any]
DEFAULT_METRICS = EvalConfig().metric_names

LENGTH_BOUNDS = (10, 20, 30, 40, 50)  # upper bounds of groups by source words; the last group has more

COMPOUND_PATTERN = re.compile(r"(\S)-(\S)")
COMET_MODEL = "Unbabel/wmt22-comet-da"


class SentenceMean(Metric):
    """The mean of a score of sentences, the best one over the references of each, as a metric of sacreBLEU.

    So its significance tests and intervals take it.

    Args:
      name: of the metric.
      sentence_score: of a hypothesis and a reference, from 0 to 1.
      signature: what distinguishes it from variants.
    """

    def __init__(self, name: str, sentence_score: Callable[[str, str], float], signature: Mapping[str, str]):
        super().__init__()
        self._name, self._sentence_score, self._signature = name, sentence_score, signature

    def get_signature(self) -> Signature:
        """The number of references, and what was given."""
        signature = Signature(self.__dict__)
        signature.info |= {"version": None, **self._signature}  # sacreBLEU's own version does not matter
        return signature

    def _preprocess_segment(self, sent: str) -> str:
        return sent

    def _extract_reference_info(self, refs: Sequence[str]) -> dict[str, Any]:
        return {"references": refs}

    def _compute_segment_statistics(self, hypothesis: str, ref_kwargs: dict) -> list[float]:
        """Score and count, which add up over sentences."""
        return [max(self._sentence_score(hypothesis, reference) for reference in ref_kwargs["references"]), 1.0]

    def _aggregate_and_compute(self, stats: Any) -> Score:
        return self._compute_score_from_stats(np.sum(stats, axis=0))

    def _compute_score_from_stats(self, stats: Any) -> Score:
        return Score(self._name, 100 * float(stats[0]) / float(stats[1]))


def normalize_answer(text: str) -> str:
    """Lowercases and removes punctuation, articles and extra spaces, as SQuAD's evaluate-v1.1.py does."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _exact_match(hypothesis: str, reference: str) -> float:
    return float(normalize_answer(hypothesis) == normalize_answer(reference))


def _accuracy(hypothesis: str, reference: str) -> float:
    return float(hypothesis.strip() == reference.strip())


def make_rouge(name: str) -> SentenceMean:
    """F1 of ROUGE by Google's package rouge-score, without stemming; `name` is of its types.

    Raises:
      UserError: the package is not installed.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise UserError(
            f"eval.metrics: {name} needs the package rouge-score, which is not installed ({error}); "
            "pip install rouge-score"
        ) from error
    scorer = RougeScorer([name])

    def f1(hypothesis: str, reference: str) -> float:
        return scorer.score(reference, hypothesis)[name].fmeasure

    return SentenceMean(name, f1, {"stem": "no", "rouge-score": version("rouge-score")})


class MetricDefinition(NamedTuple):
    """A metric that `eval.metrics` may name.

    Attributes:
      label: in tables and charts.
      make: makes it, as a metric of sacreBLEU.
      meaning: in a few words.
      ranks_sentences: whether its scores of single sentences can be compared.
    """

    label: str
    make: Callable[[], Metric]
    meaning: str
    ranks_sentences: bool = True


METRICS: Mapping[str, MetricDefinition] = {
    "bleu": MetricDefinition("BLEU", BLEU, "sacreBLEU", ranks_sentences=False),
    "chrf": MetricDefinition("chrF2", CHRF, "character n-grams"),
    "ter": MetricDefinition("TER", TER, "edits", ranks_sentences=False),
    "chrfpp": MetricDefinition("chrF2++", functools.partial(CHRF, word_order=2), "character n-grams and words"),
    "exact_match": MetricDefinition(
        "exact match",
        functools.partial(SentenceMean, "exact_match", _exact_match, {"normalization": "squad"}),
        "equal but for case, punctuation and articles",
    ),
    "accuracy": MetricDefinition(
        "accuracy", functools.partial(SentenceMean, "accuracy", _accuracy, {"normalization": "strip"}), "equal lines"
    ),
    "rouge1": MetricDefinition("ROUGE-1", functools.partial(make_rouge, "rouge1"), "F1 of words"),
    "rouge2": MetricDefinition("ROUGE-2", functools.partial(make_rouge, "rouge2"), "F1 of pairs of words"),
    "rougeL": MetricDefinition(
        "ROUGE-L", functools.partial(make_rouge, "rougeL"), "F1 of the longest common subsequence"
    ),
}


def make_metric(name: str, tokenizer: str = DEFAULT) -> Metric:
    """A metric of `METRICS`; BLEU with a tokenizer named as in `choose_bleu_tokenizer`.

    Raises:
      UserError: its package is not installed.
    """
    return make_bleu(tokenizer) if name == "bleu" else METRICS[name].make()


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


def sentence_metric(metrics: Sequence[str]) -> str:
    """The metric by which sentences are ranked: chrF2 beside BLEU, else the first that can be, or chrF2."""
    return next((name for name in metrics if METRICS[name].ranks_sentences and "bleu" not in metrics), "chrf")


def sentence_scores(
    metric: str, hypotheses: Sequence[str], references: Sequence[Sequence[str]], indices: Sequence[int]
) -> list[float]:
    """A metric of single sentences against their references, those with these indices; 100 if both are blank."""
    scorer = make_metric(metric)
    scores = []
    for i in indices:
        own = [lines[i] for lines in references]
        is_blank = not hypotheses[i].strip() and any(not line.strip() for line in own)
        scores.append(100.0 if is_blank else scorer.sentence_score(hypotheses[i], own).score)
    return scores


def extended_scores(
    sources: Sequence[str],
    hypotheses: Sequence[str],
    references: Sequence[Sequence[str]],
    language: str,
    tokenizer: str = DEFAULT,
    metrics: Sequence[str] = DEFAULT_METRICS,
) -> Scores:
    """Computes what a full evaluation adds to some metrics: chrF2++ to chrF2; COMET and variants of BLEU to BLEU.

    Args:
      language: code of the hypotheses' language, for Moses' tokenizer.
      tokenizer: as in `score`.
      metrics: those of `score`.
    """
    scores = score(hypotheses, references, ["chrfpp"] if "chrf" in metrics else [])
    del scores["length_ratio"]
    if "bleu" not in metrics:
        return scores
    return {
        **scores,
        "bleu_by_source_length": bleu_by_source_length(sources, hypotheses, references, tokenizer),
        **tokenized_bleu(hypotheses, references, language, tokenizer in TOKENIZED),
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
    rows = [{"src": s, "mt": h, "ref": r} for s, h, r in zip(sources, hypotheses, references[0], strict=True)]
    try:
        model = importlib.import_module("comet").load_from_checkpoint(path)
        prediction = model.predict(rows, batch_size=8, gpus=0, progress_bar=False)
    except Exception as error:  # of another package, beside scores that are computed
        log_info(f"warning: no COMET, which failed with {type(error).__name__}: {error}")
        return {}
    return {"comet": float(prediction.system_score), "comet_signature": f"comet|{epath.Path(path).name}"}


def find_comet_weights() -> str | None:
    """The file of COMET's weights; None if it or the package is not installed."""
    if importlib.util.find_spec("comet") is None:
        return None
    os.environ["HF_HUB_OFFLINE"] = "1"  # read once, by the import; COMET's encoder is read from the cache too
    if path := os.environ.get("COMET_CHECKPOINT"):
        if not os.path.isfile(path):
            raise UserError(f"COMET_CHECKPOINT={path}: expected a file of COMET's weights, but it is missing")
        return path
    cached = importlib.import_module("huggingface_hub").try_to_load_from_cache(COMET_MODEL, "checkpoints/model.ckpt")
    return cached if isinstance(cached, str) else None
