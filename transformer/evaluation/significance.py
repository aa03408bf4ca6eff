"""Compares two systems: significance of the difference, and the sentences that differ most.

Both tests are those of sacreBLEU, with its seed ($SACREBLEU_SEED) and its numbers of samples: paired bootstrap
resampling (Koehn 2004) and paired approximate randomization (Riezler and Maxwell 2005).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from sacrebleu.metrics import CHRF
from sacrebleu.significance import PairedTest

from transformer.evaluation.bleu_tokenizer import DEFAULT
from transformer.evaluation.metrics import DEFAULT_METRICS, METRIC_NAMES, check_lengths, make_metric
from transformer.runtime.errors import UserError

ALPHA = 0.05
TESTS = {"bs": "paired bootstrap", "ar": "approximate randomization"}


class PairedTestResult(NamedTuple):
    """A metric of two systems, the evaluated one and a baseline.

    Attributes:
      metric: of `metrics.METRICS`.
      score, baseline_score: of the corpus.
      bootstrap_p, randomization_p: the probability of a difference as large if the systems were equal.
      interval, baseline_interval: half the width of the 95% interval of the bootstrap.
      signatures: of the two tests.
    """

    metric: str
    score: float
    baseline_score: float
    bootstrap_p: float
    randomization_p: float
    interval: float
    baseline_interval: float
    signatures: tuple[str, str]

    @property
    def difference(self) -> float:
        """Score minus baseline score."""
        return self.score - self.baseline_score

    @property
    def is_significant(self) -> bool:
        """Whether both p values are below ALPHA."""
        return max(self.bootstrap_p, self.randomization_p) < ALPHA


def paired_tests(
    translations: Sequence[str],
    baseline: Sequence[str],
    references: Sequence[Sequence[str]],
    tokenizer: str = DEFAULT,
    metrics: Sequence[str] = DEFAULT_METRICS,
    samples: int = 0,
) -> list[PairedTestResult]:
    """Runs both tests for each metric.

    Args:
      translations: of the evaluated system.
      baseline: translations of the other system.
      references: as in `metrics.score`, like `tokenizer` and `metrics`.
      tokenizer: of BLEU.
      metrics: to compare.
      samples: of each test; 0 is sacreBLEU's default, 1,000 resamples and 10,000 trials.

    Raises:
      UserError: the numbers of lines differ, or there are no sentences.
    """
    check_lengths(len(translations), references)
    if len(translations) != len(baseline):
        raise UserError(
            f"expected two systems with equal numbers of translations, got {len(translations):,} and {len(baseline):,}"
        )
    if not translations:
        raise UserError("--versus: there are no sentences to compare; name a set that is not empty")
    systems: list[tuple[str, Sequence[str]]] = [("baseline", list(baseline)), ("system", list(translations))]
    results = {}
    for test in TESTS:
        instances = {name: make_metric(name, tokenizer) for name in metrics}
        results[test] = PairedTest(systems, instances, [list(lines) for lines in references], test, samples)()
    return [_paired_test_result(results, name, i) for i, name in enumerate(metrics)]


def _paired_test_result(results: dict[str, tuple], metric: str, index: int) -> PairedTestResult:
    # results[test] is (signatures, scores). sacreBLEU keys both by its own names of the metrics, in their order, except
    # that "System" comes first among the scores: {"System": ["baseline", "system"], "BLEU": [Result, Result], …}.
    key = list(results["bs"][1])[index + 1]
    (baseline, bootstrap), (_, randomization) = (results[test][1][key] for test in TESTS)
    # sacreBLEU counts the samples that differ by more than the systems do, so equal systems get p values near 0.
    is_equal = bootstrap.score == baseline.score
    bootstrap_p, randomization_p = (1.0, 1.0) if is_equal else (bootstrap.p_value, randomization.p_value)
    return PairedTestResult(
        metric,
        score=bootstrap.score,
        baseline_score=baseline.score,
        bootstrap_p=bootstrap_p,
        randomization_p=randomization_p,
        interval=bootstrap.ci,
        baseline_interval=baseline.ci,
        signatures=(str(results["bs"][0][key]), str(results["ar"][0][key])),
    )


class SentenceDifference(NamedTuple):
    """A sentence by its number in the data set, from 0, with the chrF2 of both systems."""

    number: int
    score: float
    baseline_score: float


def largest_differences(
    translations: Sequence[str], baseline: Sequence[str], references: Sequence[Sequence[str]], count: int = 5
) -> list[SentenceDifference]:
    """The `count` sentences with the largest gain in chrF2, best first, and with the largest loss, worst last."""
    differences = [
        SentenceDifference(i, *(sentence_score(side[i], references, i) for side in (translations, baseline)))
        for i in range(len(translations))
        if translations[i] != baseline[i]
    ]
    ranked = sorted(differences, key=lambda each: each.baseline_score - each.score)
    better = [each for each in ranked if each.score > each.baseline_score][:count]
    worse = [each for each in ranked if each.score < each.baseline_score][-count:]
    return better + worse


def sentence_score(hypothesis: str, references: Sequence[Sequence[str]], index: int) -> float:
    """chrF2 of one sentence against its references; 100 if both are blank."""
    sentence_references = [lines[index] for lines in references]
    if not hypothesis.strip() and any(not line.strip() for line in sentence_references):
        return 100.0
    return CHRF().sentence_score(hypothesis, sentence_references).score


class SystemComparison(NamedTuple):
    """The evaluated system compared with a baseline, given by its name and translations."""

    name: str
    translations: Sequence[str]
    tests: list[PairedTestResult]
    sentences: list[SentenceDifference]


def compare_systems(
    name: str,
    baseline: Sequence[str],
    translations: Sequence[str],
    references: Sequence[Sequence[str]],
    tokenizer: str = DEFAULT,
    samples: int = 0,
) -> SystemComparison:
    """Compares by DEFAULT_METRICS; `samples` and errors as in `paired_tests`."""
    tests = paired_tests(translations, baseline, references, tokenizer, samples=samples)
    return SystemComparison(name, baseline, tests, largest_differences(translations, baseline, references))


def as_json(comparison: SystemComparison) -> dict[str, Any]:
    """The `versus` object of eval.py's JSON."""
    fields: dict[str, Any] = {"name": comparison.name}
    for each in comparison.tests:
        fields[each.metric] = {
            "ours": each.score,
            "theirs": each.baseline_score,
            "difference": each.difference,
            "bootstrap_p": each.bootstrap_p,
            "randomization_p": each.randomization_p,
            "significant": each.is_significant,
        }
    return fields


def format_table(comparison: SystemComparison) -> str:
    """The table for the terminal."""
    rows = [
        f"against {comparison.name}",
        f"  {'':<8}{'this':>13}{'other':>15}{'difference':>13}{'bootstrap p':>13}{'randomization p':>17}",
    ]
    for each in comparison.tests:
        verdict = "significant" if each.is_significant else "may be chance"
        rows.append(
            f"  {METRIC_NAMES[each.metric]:<8}{each.score:7.2f} ±{each.interval:4.2f}{each.baseline_score:9.2f} "
            f"±{each.baseline_interval:4.2f}{each.difference:+13.2f}{each.bootstrap_p:13.4f}"
            f"{each.randomization_p:17.4f}   {verdict}"
        )
    rows.append(f"  significant: both p below {ALPHA}; ±: 95% interval of the bootstrap")
    rows += [f"  {signature}" for signature in comparison.tests[0].signatures]
    return "\n".join(rows)


def format_examples(
    comparison: SystemComparison,
    sources: Sequence[str],
    references: Sequence[Sequence[str]],
    translations: Sequence[str],
) -> str:
    """The sentences that differ most, for the terminal."""
    return "\n".join(
        f"  sentence {each.number + 1:,}: chrF2 {each.score:.1f} against {each.baseline_score:.1f}\n"
        f"    source      {sources[each.number]}\n"
        f"    this        {translations[each.number]}\n"
        f"    other       {comparison.translations[each.number]}\n"
        f"    reference   {references[0][each.number]}\n"
        for each in comparison.sentences
    )
