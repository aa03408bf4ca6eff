"""Whether the difference between two sets of translations is more than chance, and which sentences make it.

Both tests are sacreBLEU's own, with its seed ($SACREBLEU_SEED) and its numbers of samples: paired bootstrap
resampling (Koehn 2004) and paired approximate randomization (Riezler and Maxwell 2005).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from sacrebleu.metrics import CHRF
from sacrebleu.significance import PairedTest

from transformer.evaluation.bleu_tokenizer import DEFAULT
from transformer.evaluation.metrics import HEADLINE, TITLES, check_counts, make_metric
from transformer.runtime.errors import UserError

LEVEL = 0.05
TESTS = {"bs": "paired bootstrap", "ar": "approximate randomization"}


class Comparison(NamedTuple):
    """One metric of two systems.

    Attributes:
      metric: of `scores.METRICS`.
      ours, theirs: corpus scores.
      bootstrap_p, randomization_p: how likely a difference as large would be if the systems were equal.
      ours_interval, theirs_interval: half the width of the 95% interval of the bootstrap.
      signatures: of the two tests.
    """

    metric: str
    ours: float
    theirs: float
    bootstrap_p: float
    randomization_p: float
    ours_interval: float
    theirs_interval: float
    signatures: tuple[str, str]

    @property
    def difference(self) -> float:
        """Ours minus theirs."""
        return self.ours - self.theirs

    @property
    def is_significant(self) -> bool:
        """By both tests, at LEVEL."""
        return max(self.bootstrap_p, self.randomization_p) < LEVEL


def compare(
    ours: Sequence[str],
    theirs: Sequence[str],
    references: Sequence[Sequence[str]],
    tokenizer: str = DEFAULT,
    metrics: Sequence[str] = HEADLINE,
    samples: int = 0,
) -> list[Comparison]:
    """Both tests of each metric; `samples` 0 is sacreBLEU's default, 1,000 resamples and 10,000 trials.

    `tokenizer` is as in `scores.score`.

    Raises:
      UserError: the counts differ, or there are no sentences.
    """
    check_counts(len(ours), references)
    if len(ours) != len(theirs):
        raise UserError(f"expected as many translations to compare with, got {len(ours):,} and {len(theirs):,}")
    if not ours:
        raise UserError("--versus: there are no sentences to compare; name a set that has some")
    systems: list[tuple[str, Sequence[str]]] = [("theirs", list(theirs)), ("ours", list(ours))]
    found = {}
    for test in TESTS:
        instances = {name: make_metric(name, tokenizer) for name in metrics}
        found[test] = PairedTest(systems, instances, [list(lines) for lines in references], test, samples)()
    return [_comparison(found, name, i) for i, name in enumerate(metrics)]


def _comparison(found: dict[str, tuple], metric: str, number: int) -> Comparison:
    # sacreBLEU keys its results by its own names of the metrics, in their order; the first is "System".
    key = list(found["bs"][1])[number + 1]
    (theirs, ours), (_, shuffled) = (found[test][1][key] for test in TESTS)
    # It counts samples that differ by more than the systems do, and so takes equal ones for surely different.
    same = ours.score == theirs.score
    bootstrap_p, randomization_p = (1.0, 1.0) if same else (ours.p_value, shuffled.p_value)
    signatures = tuple(str(found[test][0][key]) for test in TESTS)
    return Comparison(
        metric,
        ours.score,
        theirs.score,
        bootstrap_p,
        randomization_p,
        ours.ci,
        theirs.ci,
        (signatures[0], signatures[1]),
    )


class Differing(NamedTuple):
    """A sentence by its place in the set, with its chrF2 in both systems."""

    place: int
    ours: float
    theirs: float


def differing(
    ours: Sequence[str], theirs: Sequence[str], references: Sequence[Sequence[str]], count: int = 5
) -> list[Differing]:
    """The `count` sentences that gain most in chrF2, best first, and as many that lose most, the worst last."""
    chosen = [i for i, (one, other) in enumerate(zip(ours, theirs, strict=True)) if one != other]
    scored = [Differing(i, *(sentence_score(side[i], references, i) for side in (ours, theirs))) for i in chosen]
    ranked = sorted(scored, key=lambda each: each.theirs - each.ours)
    better = [each for each in ranked if each.ours > each.theirs][:count]
    worse = [each for each in ranked if each.ours < each.theirs][-count:]
    return better + worse


def sentence_score(hypothesis: str, references: Sequence[Sequence[str]], place: int) -> float:
    """chrF2 of one sentence against its references; 100 where both are blank."""
    own = [lines[place] for lines in references]
    if not hypothesis.strip() and any(not line.strip() for line in own):
        return 100.0
    return CHRF().sentence_score(hypothesis, own).score


class Versus(NamedTuple):
    """Everything about another system's translations of the same sentences, and its name."""

    name: str
    translations: Sequence[str]
    comparisons: list[Comparison]
    sentences: list[Differing]


def against(
    name: str,
    theirs: Sequence[str],
    ours: Sequence[str],
    references: Sequence[Sequence[str]],
    tokenizer: str = DEFAULT,
    samples: int = 0,
) -> Versus:
    """Compares by all headline metrics; `samples` and errors as `compare`."""
    comparisons = compare(ours, theirs, references, tokenizer, samples=samples)
    return Versus(name, theirs, comparisons, differing(ours, theirs, references))


def as_json(versus: Versus) -> dict[str, Any]:
    """For machines."""
    fields: dict[str, Any] = {"name": versus.name}
    for each in versus.comparisons:
        fields[each.metric] = {
            "ours": each.ours,
            "theirs": each.theirs,
            "difference": each.difference,
            "bootstrap_p": each.bootstrap_p,
            "randomization_p": each.randomization_p,
            "significant": each.is_significant,
        }
    return fields


def table(versus: Versus) -> str:
    """For people."""
    rows = [
        f"against {versus.name}",
        f"  {'':<8}{'this':>13}{'other':>15}{'difference':>13}{'bootstrap p':>13}{'randomization p':>17}",
    ]
    for each in versus.comparisons:
        verdict = "significant" if each.is_significant else "may be chance"
        rows.append(
            f"  {TITLES[each.metric]:<8}{each.ours:7.2f} ±{each.ours_interval:4.2f}{each.theirs:9.2f} "
            f"±{each.theirs_interval:4.2f}{each.difference:+13.2f}{each.bootstrap_p:13.4f}{each.randomization_p:17.4f}"
            f"   {verdict}"
        )
    rows.append(f"  significant: both p below {LEVEL}; ±: 95% interval of the bootstrap")
    rows += [f"  {signature}" for signature in versus.comparisons[0].signatures]
    return "\n".join(rows)


def examples(versus: Versus, sources: Sequence[str], references: Sequence[Sequence[str]], ours: Sequence[str]) -> str:
    """The sentences that differ most, for people."""
    return "\n".join(
        f"  sentence {each.place + 1:,}: chrF2 {each.ours:.1f} against {each.theirs:.1f}\n"
        f"    source      {sources[each.place]}\n"
        f"    this        {ours[each.place]}\n"
        f"    other       {versus.translations[each.place]}\n"
        f"    reference   {references[0][each.place]}\n"
        for each in versus.sentences
    )
