"""Significance of the difference between two systems.

Both tests are those of sacreBLEU, with its seed ($SACREBLEU_SEED) and its numbers of samples: paired bootstrap
resampling (Koehn 2004) and paired approximate randomization (Riezler and Maxwell 2005). The second counts ties, which
sacreBLEU does not.
"""

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from sacrebleu.metrics.base import Metric
from sacrebleu.significance import PairedTest

from transformer.config.schema import LOWER_IS_BETTER
from transformer.evaluation.bleu_tokenizer import DEFAULT
from transformer.evaluation.metrics import DEFAULT_METRICS, METRICS, check_lengths, make_metric
from transformer.runtime.errors import UserError

ALPHA = 0.05
TRIALS = 10_000  # of approximate randomization, sacreBLEU's number
BLOCK = 500  # trials computed at once, as a product turns their booleans into integers


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
        return "worse" if (self.difference > 0) == LOWER_IS_BETTER[self.metric] else "better"

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
    trials = samples or TRIALS
    lines = [list(each) for each in references]
    results = []
    for name in metrics:
        metric = make_metric(name, tokenizer)
        paired = PairedTest(systems, {name: metric}, lines, "bs", samples)
        found: Any = paired()
        ((key, signature),) = found[0].items()  # keyed by sacreBLEU's own name, as are the scores
        theirs, ours = found[1][key]
        # sacreBLEU counts the resamples that differ by more than the systems do: of equal systems none.
        bootstrap_p = ours.p_value if ours.score != theirs.score else 1.0
        results.append(
            PairedTestResult(
                name,
                score=ours.score,
                baseline_score=theirs.score,
                bootstrap_p=bootstrap_p,
                randomization_p=randomization_p(metric, translations, baseline, lines, trials),
                interval=float(ours.ci),
                baseline_interval=float(theirs.ci),
                signatures=(str(signature), str(signature).replace(f"bs:{paired.n_samples}", f"ar:{trials}")),
                samples=(paired.n_samples, trials),
            )
        )
    return results


def randomization_p(
    metric: Metric,
    translations: Sequence[str],
    baseline: Sequence[str],
    references: Sequence[Sequence[str]],
    trials: int = TRIALS,
) -> float:
    """The share of random swaps of translations after which the systems differ at least as much.

    sacreBLEU counts only those that differ more. Where many tie, as with few different sentences or scores of 0 and 1,
    its p is too small: 3 sentences better and none worse have 0.0001 in place of 1/4.
    """
    ours, theirs = (
        np.array(metric._extract_corpus_statistics(list(lines), references)) for lines in (translations, baseline)
    )
    seed = os.environ.get("SACREBLEU_SEED", "12345").lower()
    swapped = np.random.default_rng(None if seed == "none" else int(seed)).integers(
        2, size=(trials, len(ours)), dtype=bool
    )

    def scores(sums: np.ndarray) -> np.ndarray:
        return np.array([metric._aggregate_and_compute(row[None]).score for row in sums])

    def differences(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        return np.abs(scores(first) - scores(second))

    (observed,) = differences(ours.sum(0)[None], theirs.sum(0)[None])
    samples = np.concatenate(
        [
            differences(rows @ theirs + ~rows @ ours, ~rows @ theirs + rows @ ours)
            for rows in np.split(swapped, range(BLOCK, trials, BLOCK))
        ]
    )
    return float((np.sum(samples >= observed - 1e-9) + 1) / (trials + 1))


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
