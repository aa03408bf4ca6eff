"""Compares systems on a test set: where they differ, by length, by frequency of words, by n-grams, by sentence.

The first system is the baseline: each of the others is compared with it. The analyses are those of compare-mt (Neubig
et al. 2019) and MT-Telescope (Rei et al. 2021).
"""

import collections
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from transformer.evaluation import significance
from transformer.evaluation.bleu_tokenizer import split_words
from transformer.evaluation.metrics import (
    DEFAULT_METRICS,
    METRICS,
    group_by_length,
    make_metric,
    sentence_metric,
    sentence_scores,
)
from transformer.evaluation.significance import PairedTestResult, paired_tests, score_with_interval
from transformer.evaluation.systems import System
from transformer.runtime import progress

FREQUENCIES = {"0": 0, "1": 1, "2-4": 4, "5-9": 9, "10-99": 99, "100-999": 999, "1000+": math.inf}  # group → largest
MAX_NGRAM, NUM_NGRAMS = 4, 10  # longest n-grams; shown of each side
NUM_EXAMPLES = 5  # gains, and losses, shown on the terminal
MAX_RESAMPLED = 20_000  # sentences of a length, beyond which sacreBLEU's bootstrap takes over a gigabyte
SMOOTHING = 1.0  # added to each count of matches

Words = Sequence[Sequence[str]]
Ngrams = collections.Counter[tuple[str, ...]]


class Breakdown(NamedTuple):
    """Scores of all systems by groups of sentences or words.

    Attributes:
      key: of the JSON.
      title: of the chart, the metric first.
      x_label: what the groups are of.
      unit: what is counted: sentences or words.
      counts: by group.
      scores, intervals: of each system by group; half the width of a 95% interval, or no intervals at all.
    """

    key: str
    title: str
    x_label: str
    unit: str
    counts: dict[str, int]
    scores: list[dict[str, float]]
    intervals: list[dict[str, float]]


class NgramDifference(NamedTuple):
    """An n-gram, how often each of two systems matches it in the references, and how often these hold it."""

    text: str
    matches: int
    baseline_matches: int
    total: int

    @property
    def log_odds(self) -> float:
        """Above 0 in favor of the system, below 0 of the baseline."""
        return math.log((self.matches + SMOOTHING) / (self.baseline_matches + SMOOTHING))


class Comparison(NamedTuple):
    """Systems, the first of which is the baseline, compared on one test set.

    Attributes:
      sources: empty if unknown.
      tests: of each system but the baseline.
      breakdowns: by length and by frequency of words.
      ngrams: of each system but the baseline: those that differ most in favor of the baseline, and of the system.
      sentence_scores: of each sentence, by system.
      sentence_metric: by which they are.
    """

    systems: Sequence[System]
    sources: Sequence[str]
    references: Sequence[Sequence[str]]
    tests: list[list[PairedTestResult]]
    breakdowns: list[Breakdown]
    ngrams: list[tuple[list[NgramDifference], list[NgramDifference]]]
    sentence_scores: list[list[float]]
    sentence_metric: str = "chrf"

    def differences(self, system: int) -> list[float]:
        """The score of each sentence minus the baseline's."""
        return [a - b for a, b in zip(self.sentence_scores[system], self.sentence_scores[0], strict=True)]


def compare(
    systems: Sequence[System],
    sources: Sequence[str],
    references: Sequence[Sequence[str]],
    tokenizer: str,
    training: Iterable[str] | None = None,
    training_name: str = "training text",
    samples: int = 0,
    metrics: Sequence[str] = DEFAULT_METRICS,
) -> Comparison:
    """Compares systems.

    Args:
      systems: two or more; the first is the baseline.
      sources: for the lengths; those of the first references if it is empty.
      references: one or several lists, each as long as the translations.
      tokenizer: of BLEU, also for words, named as in `choose_bleu_tokenizer`.
      training: text of the target language in which words are counted; None: the first references.
      training_name: of that text, for charts.
      samples: of the significance tests, as in `paired_tests`.
      metrics: to compare by; the first two also by length, and `metrics.sentence_metric` by sentence.

    Raises:
      UserError: as `paired_tests`.
    """
    baseline, *others = systems
    tests = [
        paired_tests(each.translations, baseline.translations, references, tokenizer, metrics, samples=samples)
        for each in others
    ]
    words = [split_words(each.translations, tokenizer) for each in systems]
    reference_words = split_words(references[0], tokenizer)
    lengths = [len(line.split()) for line in sources] if sources else [len(line) for line in reference_words]
    if training:
        counts = count_words(training, tokenizer)
    else:
        counts = collections.Counter(itertools.chain.from_iterable(reference_words))
    side = "source" if sources else "reference"
    breakdowns = [
        by_length(name, systems, references, group_by_length(lengths), side, tokenizer) for name in metrics[:2]
    ]
    breakdowns.append(by_frequency(words, reference_words, counts, training_name if training else "references"))
    matches = [count_matches(each, reference_words) for each in words]
    ranking = sentence_metric(metrics)
    totals = collections.Counter(ngram for line in reference_words for ngram in ngrams_of(line))
    return Comparison(
        systems,
        sources,
        references,
        tests,
        breakdowns,
        [ngram_differences(matches[0], each, totals) for each in matches[1:]],
        [sentence_scores(ranking, each.translations, references, range(len(lengths))) for each in systems],
        ranking,
    )


def count_words(training: Iterable[str], tokenizer: str) -> collections.Counter[str]:
    """How often each word occurs in a long text, of which only a part is in memory; logs its progress."""
    counts: collections.Counter[str] = collections.Counter()
    lines = progress.track(training, "counting the words of the training text", unit="lines")
    while group := list(itertools.islice(lines, 4096)):
        counts.update(itertools.chain.from_iterable(split_words(group, tokenizer)))
    return counts


def by_length(
    metric: str,
    systems: Sequence[System],
    references: Sequence[Sequence[str]],
    groups: Mapping[str, Sequence[int]],
    side: str,
    tokenizer: str,
) -> Breakdown:
    """A corpus metric of the sentences of each length, with bootstrap intervals unless these are very many."""
    scores: list[dict[str, float]] = [{} for _ in systems]
    intervals: list[dict[str, float]] = [{} for _ in systems]
    resamples = max(map(len, groups.values()), default=0) <= MAX_RESAMPLED
    for group, members in groups.items():
        group_references = [[lines[i] for i in members] for lines in references]
        for number, system in enumerate(systems):
            lines = [system.translations[i] for i in members]
            if resamples:
                scored = score_with_interval(metric, lines, group_references, tokenizer)
                scores[number][group], intervals[number][group] = scored
            else:
                scores[number][group] = make_metric(metric, tokenizer).corpus_score(lines, group_references).score
    counts = {group: len(members) for group, members in groups.items()}
    title = f"{METRICS[metric].label} by {side} length"
    return Breakdown(
        f"{metric}_by_{side}_length",
        title,
        f"words of the {side}",
        "sentences",
        counts,
        scores,
        intervals if resamples else [],
    )


def by_frequency(systems: Sequence[Words], references: Words, counts: Mapping[str, int], text: str) -> Breakdown:
    """F1 of the words of each frequency, in percent.

    Precision is the share of a system's words that match the reference of their sentence, each as often as it is
    there; recall is the share of the references' words that are matched.
    """

    def group_of(word: str) -> str:
        return next(name for name, largest in FREQUENCIES.items() if counts.get(word, 0) <= largest)

    expected = collections.Counter(group_of(word) for line in references for word in line)
    scores = []
    for lines in systems:
        produced = collections.Counter(group_of(word) for line in lines for word in line)
        matched: collections.Counter[str] = collections.Counter()
        for line, reference in zip(lines, references, strict=True):
            for word, count in (collections.Counter(line) & collections.Counter(reference)).items():
                matched[group_of(word)] += count
        scores.append(
            {name: 200 * matched[name] / (produced[name] + expected[name]) for name in FREQUENCIES if expected[name]}
        )
    groups = {name: expected[name] for name in FREQUENCIES if expected[name]}
    title, x_label = "F1 of words by frequency", f"occurrences of the word in the {text}"
    return Breakdown("f1_by_frequency", title, x_label, "words", groups, scores, [])


def ngrams_of(words: Sequence[str]) -> Iterable[tuple[str, ...]]:
    """All n-grams up to MAX_NGRAM words."""
    return (tuple(words[i : i + n]) for n in range(1, MAX_NGRAM + 1) for i in range(len(words) - n + 1))


def count_matches(system: Words, references: Words) -> Ngrams:
    """How often a system's n-grams are in the reference of their sentence, each at most as often as it is there."""
    matches: Ngrams = collections.Counter()
    for line, reference in zip(system, references, strict=True):
        matches.update(collections.Counter(ngrams_of(line)) & collections.Counter(ngrams_of(reference)))
    return matches


def ngram_differences(
    baseline: Ngrams, system: Ngrams, totals: Ngrams
) -> tuple[list[NgramDifference], list[NgramDifference]]:
    """The n-grams that differ most in favor of the baseline, and of the system, by smoothed log-odds.

    Of equal odds the longer n-gram comes first, and n-grams within one that is listed with the same counts are left
    out.
    """
    ngrams = [
        NgramDifference(" ".join(words), system[words], baseline[words], totals[words])
        for words in baseline.keys() | system.keys()
    ]
    ngrams.sort(key=lambda each: (-abs(each.log_odds), -len(each.text.split()), each.text))
    for_baseline = _distinct(each for each in ngrams if each.log_odds < 0)
    return for_baseline, _distinct(each for each in ngrams if each.log_odds > 0)


def _distinct(ngrams: Iterable[NgramDifference]) -> list[NgramDifference]:
    kept: list[NgramDifference] = []
    for each in ngrams:
        if not any(f" {each.text} " in f" {other.text} " and each[1:3] == other[1:3] for other in kept):
            kept.append(each)
        if len(kept) == NUM_NGRAMS:
            break
    return kept


def largest_differences(comparison: Comparison) -> list[int]:
    """Indices of the sentences with the largest gains of system 1, best first, and losses, worst last."""
    differences = comparison.differences(1)
    ranked = sorted(range(len(differences)), key=lambda i: -differences[i])
    better = [i for i in ranked if differences[i] > 0][:NUM_EXAMPLES]
    return better + [i for i in ranked if differences[i] < 0][-NUM_EXAMPLES:]


def format_examples(comparison: Comparison) -> str:
    """The sentences in which system 1 differs most from the baseline, for the terminal."""
    baseline, system = comparison.systems[:2]
    label = METRICS[comparison.sentence_metric].label
    width = max(12, *(len(each.label) + 2 for each in (baseline, system)))
    blocks = []
    for i in largest_differences(comparison):
        scores = [scores[i] for scores in comparison.sentence_scores]
        rows = [("source", comparison.sources[i])] if comparison.sources else []
        rows += [(each.label, each.translations[i]) for each in (system, baseline)]
        rows.append(("reference", comparison.references[0][i]))
        title = f"  sentence {i + 1:,}: {label} {scores[1]:.1f} against {scores[0]:.1f}\n"
        blocks.append(title + "".join(f"    {name:<{width}}{text}\n" for name, text in rows))
    return "\n".join(blocks)


def as_json(comparison: Comparison) -> dict[str, Any]:
    """The JSON of `transformer.compare`: `systems`, each with scores by metric, length and frequency; signatures."""
    systems = []
    for number, system in enumerate(comparison.systems):
        fields: dict[str, Any] = {"name": system.label, "path": system.name}
        for test in comparison.tests[max(number - 1, 0)]:
            score, interval = (
                (test.baseline_score, test.baseline_interval) if number == 0 else (test.score, test.interval)
            )
            fields |= {test.metric: score, f"{test.metric}_interval": interval}
        fields |= {breakdown.key: breakdown.scores[number] for breakdown in comparison.breakdowns}
        if number:
            baseline = comparison.systems[0].label
            fields["versus"] = significance.as_json(baseline, comparison.tests[number - 1])
        systems.append(fields)
    signatures = {test.metric: test.signatures for test in comparison.tests[0]}
    return {"sentences": len(comparison.references[0]), "signatures": signatures, "systems": systems}
