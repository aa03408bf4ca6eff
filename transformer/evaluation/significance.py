"""Significance of the difference between two systems.

Both tests are those of sacreBLEU, with its seed ($SACREBLEU_SEED) and its numbers of samples: paired bootstrap
resampling (Koehn 2004) and paired approximate randomization (Riezler and Maxwell 2005).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from sacrebleu.significance import PairedTest

from transformer.evaluation.bleu_tokenizer import DEFAULT
from transformer.evaluation.metrics import DEFAULT_METRICS, METRICS, check_lengths, make_metric
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
      samples: of the two tests.
    """

    metric: str
    score: float
    baseline_score: float
    bootstrap_p: float
    randomization_p: float
    interval: float
    baseline_interval: float
    signatures: tuple[str, str]
    samples: tuple[int, int]

    @property
    def difference(self) -> float:
        """Score minus baseline score."""
        return self.score - self.baseline_score

    @property
    def is_significant(self) -> bool:
        """Whether both p values are below ALPHA."""
        return max(self.bootstrap_p, self.randomization_p) < ALPHA

    @property
    def verdict(self) -> str:
        """What the difference and both p values mean, in words."""
        if not self.is_significant:
            return "may be chance"
        return "better" if (self.difference > 0) == METRICS[self.metric].higher_is_better else "worse"

    @property
    def formatted_p(self) -> tuple[str, str]:
        """Both p values as text; a p value as small as the number of samples allows is an upper bound."""
        bootstrap, randomization = (
            f"≤ {1 / count:g}" if p <= 1 / count else f"{p:.4f}"
            for p, count in zip((self.bootstrap_p, self.randomization_p), self.samples, strict=True)
        )
        return bootstrap, randomization


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
        raise UserError("there are no sentences to compare; name a set that is not empty")
    systems: list[tuple[str, Sequence[str]]] = [("baseline", list(baseline)), ("system", list(translations))]
    results, counts = {}, []
    for test in TESTS:
        instances = {name: make_metric(name, tokenizer) for name in metrics}
        paired = PairedTest(systems, instances, [list(lines) for lines in references], test, samples)
        results[test] = paired()
        counts.append(paired.n_samples)
    return [_paired_test_result(results, name, i, (counts[0], counts[1])) for i, name in enumerate(metrics)]


def _paired_test_result(
    results: dict[str, tuple], metric: str, index: int, samples: tuple[int, int]
) -> PairedTestResult:
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
        interval=float(bootstrap.ci),
        baseline_interval=float(baseline.ci),
        signatures=(str(results["bs"][0][key]), str(results["ar"][0][key])),
        samples=samples,
    )


def score_with_interval(
    metric: str, translations: Sequence[str], references: Sequence[Sequence[str]], tokenizer: str
) -> tuple[float, float]:
    """A corpus score, and half the width of its 95% bootstrap interval; arguments as in `paired_tests`."""
    instances = {metric: make_metric(metric, tokenizer)}
    # A test of a baseline alone is its bootstrap. Metric.corpus_score(n_bootstrap=…) fails where chrF2 is always 0.
    _, results = PairedTest([("", list(translations))], instances, [list(lines) for lines in references], "bs")()
    result: Any
    ((result,),) = (found for name, found in results.items() if name != "System")
    return float(result.score), float(result.ci)


def as_json(name: str, tests: Sequence[PairedTestResult]) -> dict[str, Any]:
    """The `versus` object of eval.py's JSON; `name` is that of the baseline."""
    fields: dict[str, Any] = {"name": name}
    for each in tests:
        fields[each.metric] = {
            "ours": each.score,
            "theirs": each.baseline_score,
            "difference": each.difference,
            "bootstrap_p": each.bootstrap_p,
            "randomization_p": each.randomization_p,
            "significant": each.is_significant,
        }
    return fields


def format_table(name: str, baseline: str, tests: Sequence[PairedTestResult]) -> str:
    """The table of a system and a baseline, by their names, for the terminal."""
    width = max(13, len(name) + 2, len(baseline) + 2)
    labels = [METRICS[each.metric].label for each in tests]
    label_width = max(8, *(len(label) + 2 for label in labels))
    rows = [
        f"{name} compared with {baseline}",
        f"  {'':<{label_width}}{name:>{width}}{baseline:>{width + 2}}{'difference':>13}{'bootstrap p':>13}"
        f"{'randomization p':>17}   verdict",
    ]
    for label, each in zip(labels, tests, strict=True):
        score, baseline_score = f"{each.score:.2f} ±{each.interval:4.2f}", f"{each.baseline_score:.2f} "
        baseline_score += f"±{each.baseline_interval:4.2f}"
        bootstrap_p, randomization_p = each.formatted_p
        rows.append(
            f"  {label:<{label_width}}{score:>{width}}{baseline_score:>{width + 2}}{each.difference:+13.2f}"
            f"{bootstrap_p:>13}{randomization_p:>17}   {each.verdict}"
        )
    rows.append(f"  better, worse: both p below {ALPHA}; ±: 95% interval of the bootstrap")
    for label, each in zip(labels, tests, strict=True):
        rows += [f"  {title:<{label_width}}{line}" for title, line in zip((label, ""), each.signatures, strict=True)]
    return "\n".join(rows)
