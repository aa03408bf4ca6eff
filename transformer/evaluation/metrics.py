"""Scores of a corpus of translations, by sacreBLEU with its signatures.

They are of detokenized translations against the raw references, so the `sacrebleu` command gives the same
on the written files; BLEU is with the tokenizer that `bleu_tokenizer` chooses. Beside them: BLEU by length of the
source, the BLEU of older papers on tokens, under that name only, and COMET where its package and weights are on this
machine.
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
TITLES = {"bleu": "BLEU", "chrf": "chrF2", "ter": "TER", "chrfpp": "chrF2++"}
HEADLINE = ("bleu", "chrf", "ter")

LENGTHS = (10, 20, 30, 40, 50)  # words of the source, at most; the last group has more

COMPOUND = re.compile(r"(\S)-(\S)")
COMET_MODEL = "Unbabel/wmt22-comet-da"


def make_metric(name: str, tokenizer: str) -> Any:
    """A metric of `METRICS`, BLEU with a tokenizer that `bleu_tokenizer.choose` names."""
    return make_bleu(tokenizer) if name == "bleu" else METRICS[name]()


def score(
    hypotheses: Sequence[str],
    references: Sequence[Sequence[str]],
    metrics: Sequence[str],
    tokenizer: str = DEFAULT,
) -> Scores:
    """Scores of a corpus: each metric and `METRIC_signature`, and `length_ratio` (hypothesis / reference words).

    Args:
      hypotheses: detokenized translations.
      references: one list or several, each as long as the hypotheses.
      metrics: of `METRICS`.
      tokenizer: of BLEU, as `bleu_tokenizer.choose` names it.

    Raises:
      UserError: the counts differ, which sacreBLEU itself would not notice.
    """
    check_counts(len(hypotheses), references)
    scores: Scores = {}
    for name in metrics:
        metric = make_metric(name, tokenizer)
        # Without sentences there is no score; 0 keeps the report readable by machines.
        scores[name] = metric.corpus_score(list(hypotheses), references).score if hypotheses else 0.0
        scores[f"{name}_signature"] = str(metric.get_signature()) if hypotheses else ""
    reference_words = sum(len(line.split()) for line in references[0])
    hypothesis_words = sum(len(line.split()) for line in hypotheses)
    scores["length_ratio"] = hypothesis_words / reference_words if reference_words else 0.0
    return scores


def check_counts(sentences: int, references: Sequence[Sequence[str]]) -> None:
    """Raises a UserError unless each list of references has as many lines as there are sentences."""
    for number, reference in enumerate(references, 1):
        if len(reference) != sentences:
            raise UserError(
                f"expected one reference for each sentence, got {sentences:,} sentences and {len(reference):,} lines "
                f"in reference {number}"
            )


def further(
    sources: Sequence[str],
    hypotheses: Sequence[str],
    references: Sequence[Sequence[str]],
    language: str,
    tokenizer: str = DEFAULT,
) -> Scores:
    """What a whole report holds beside the headline.

    Args:
      language: code of the hypotheses' language, for Moses' tokenizer.
      tokenizer: as `score`.
    """
    scores = score(hypotheses, references, ["chrfpp"])
    del scores["length_ratio"]
    return {
        **scores,
        "bleu_by_source_length": by_source_length(sources, hypotheses, references, tokenizer),
        **legacy(hypotheses, references, language, tokenizer == PUBLISHED),
        **comet(sources, hypotheses, references),
    }


def by_source_length(
    sources: Sequence[str],
    hypotheses: Sequence[str],
    references: Sequence[Sequence[str]],
    tokenizer: str = DEFAULT,
) -> dict[str, Scores]:
    """Number of sentences and corpus BLEU of sources of 0 to 10 words, 11 to 20, and so on, where there are any."""
    groups: dict[str, list[int]] = {name: [] for name in _length_names()}
    names = list(groups)
    for i, source in enumerate(sources):
        words = len(source.split())
        groups[names[sum(words > limit for limit in LENGTHS)]].append(i)
    found: dict[str, Scores] = {}
    for name, members in groups.items():
        if members:
            chosen = [[lines[i] for i in members] for lines in (hypotheses, *references)]
            bleu = make_metric("bleu", tokenizer).corpus_score(chosen[0], chosen[1:]).score
            found[name] = {"sentences": len(members), "bleu": bleu}
    return found


def _length_names() -> list[str]:
    """0-10, 11-20, …, over 50."""
    starts = [0, *(limit + 1 for limit in LENGTHS[:-1])]
    return [*(f"{start}-{limit}" for start, limit in zip(starts, LENGTHS, strict=True)), f"over {LENGTHS[-1]}"]


def legacy(
    hypotheses: Sequence[str], references: Sequence[Sequence[str]], language: str, tokenized: bool = False
) -> Scores:
    """BLEU on Moses tokens, as papers gave it before sacreBLEU; comparable with those and with nothing else.

    tensor2tensor's get_ende_bleu.sh: tokenizer.perl, then hyphens within words split off with ATAT marks,
    then multi-bleu.perl, which is BLEU without smoothing on what white space separates. Papers on English
    to German split compounds, which is worth a point or so; both are given. Here the references are
    tokenized too, where that script takes a file of tokenized ones. sacremoses does what tokenizer.perl
    did in 2017: it keeps the full stop of an abbreviation that ends a line. What is `tokenized` is not again.
    """
    tokenize, signature = (str, "multi-bleu|as it is") if tokenized else moses(language)
    scores: Scores = {}
    whole = [[tokenize(line) for line in side] for side in (hypotheses, *references)]
    parted = [[split_compounds(line) for line in side] for side in whole]
    for name, sides in (("legacy_tokenized_bleu", whole), ("legacy_compound_split_bleu", parted)):
        metric = BLEU(tokenize="none", force=True, smooth_method="none")
        scores[name] = metric.corpus_score(sides[0], sides[1:]).score if hypotheses else 0.0
    return {**scores, "legacy_signature": signature}


def moses(language: str) -> tuple[Callable[[str], str], str]:
    """Moses' tokenizer.perl -l LANGUAGE by sacremoses' port of it, and the signature of a score with it."""
    from importlib.metadata import version

    from sacremoses import MosesTokenizer

    tokenizer = MosesTokenizer(lang=language)
    signature = f"multi-bleu|moses:{language}|sacremoses:{version('sacremoses')}"
    return lambda line: tokenizer.tokenize(line, return_str=True), signature


def split_compounds(line: str) -> str:
    """Text-Format → Text ##AT##-##AT## Format."""
    return COMPOUND.sub(r"\1 ##AT##-##AT## \2", line)


def comet(sources: Sequence[str], hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> Scores:
    """COMET against the first references; nothing where its package or weights are missing: none are fetched.

    Weights are those of COMET_MODEL in the cache of Hugging Face, or the file that $COMET_CHECKPOINT names.
    COMET loads them with PyTorch, which may execute what is in them.
    """
    path = comet_weights()
    if path is None or not hypotheses:
        return {}
    os.environ["HF_HUB_OFFLINE"] = "1"  # its encoder is looked for in the cache too
    package = importlib.import_module("comet")
    model = package.load_from_checkpoint(path)
    rows = [{"src": s, "mt": h, "ref": r} for s, h, r in zip(sources, hypotheses, references[0], strict=True)]
    found = model.predict(rows, batch_size=8, gpus=0, progress_bar=False)
    return {"comet": float(found.system_score), "comet_signature": f"comet|{epath.Path(path).name}"}


def comet_weights() -> str | None:
    """The file of COMET's weights, if it and the package are here."""
    if importlib.util.find_spec("comet") is None:
        return None
    named = os.environ.get("COMET_CHECKPOINT")
    if named:
        if not os.path.isfile(named):
            raise UserError(f"COMET_CHECKPOINT={named}: expected a file of COMET's weights, found none")
        return named
    found = importlib.import_module("huggingface_hub").try_to_load_from_cache(COMET_MODEL, "checkpoints/model.ckpt")
    return found if isinstance(found, str) else None
