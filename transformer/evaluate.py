"""Held-out loss and translation scores; validation during training and eval.py share all of it.

Scores are of detokenized translations against the raw references, by sacreBLEU, with its signatures.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence

import jax
from jax.sharding import Mesh
from sacrebleu.metrics import BLEU, CHRF, TER

from transformer import sharding
from transformer.batching import Ragged, assemble, eval_plan
from transformer.command_line import say
from transformer.config import Config
from transformer.errors import UserError
from transformer.step import Model, Params, make_eval_step
from transformer.tokenizer import Tokenizer, cut
from transformer.translator import Translator

Scores = dict[str, float | str]
METRICS = {"bleu": BLEU, "chrf": CHRF, "ter": TER}


@dataclasses.dataclass(frozen=True)
class Report:
    """What an evaluation found. `loss` is the mean cross-entropy in nats per target token, without smoothing."""

    sentences: int
    loss: float
    scores: Scores
    translations: list[str]
    seconds: float


def score(hypotheses: Sequence[str], references: Sequence[Sequence[str]], metrics: Sequence[str]) -> Scores:
    """Scores of a corpus: each metric and `METRIC_signature`, and `length_ratio` (hypothesis / reference words).

    Args:
      hypotheses: detokenized translations.
      references: one list or several, each as long as the hypotheses.
      metrics: of `METRICS`.

    Raises:
      UserError: the counts differ, which sacreBLEU itself would not notice.
    """
    _check_counts(len(hypotheses), references)
    scores: Scores = {}
    for name in metrics:
        metric = METRICS[name]()
        # Without sentences there is no score; 0 keeps the report readable by machines.
        scores[name] = metric.corpus_score(list(hypotheses), references).score if hypotheses else 0.0
        scores[f"{name}_signature"] = str(metric.get_signature()) if hypotheses else ""
    reference_words = sum(len(line.split()) for line in references[0])
    hypothesis_words = sum(len(line.split()) for line in hypotheses)
    scores["length_ratio"] = hypothesis_words / reference_words if reference_words else 0.0
    return scores


def _check_counts(sentences: int, references: Sequence[Sequence[str]]) -> None:
    for number, reference in enumerate(references, 1):
        if len(reference) != sentences:
            raise UserError(
                f"expected one reference for each sentence, got {sentences:,} sentences and {len(reference):,} lines "
                f"in reference {number}"
            )


class Evaluator:
    """Evaluates any params of one model; compiled shapes are kept between evaluations."""

    def __init__(self, model: Model, tokenizer: Tokenizer, config: Config, mesh: Mesh):
        self.translator = Translator(model, tokenizer, config.decode, mesh)
        self._tokenizer, self._config, self._mesh = tokenizer, config, mesh
        self._eval_step = make_eval_step(model, mesh)

    def evaluate(
        self,
        params: Params,
        sources: Sequence[str],
        references: Sequence[Sequence[str]],
        metrics: Sequence[str] = tuple(METRICS),
        progress: Callable[[int], None] = lambda done: None,
    ) -> Report:
        """Translates and scores every sentence once; the loss is against the first reference."""
        start = time.perf_counter()
        _check_counts(len(sources), references)
        loss = self.held_out_loss(params, sources, references[0])
        translations = self.translator.translate(params, sources, progress)
        self.translator.say_truncated()
        scores = score(translations, references, metrics)
        return Report(len(sources), loss, scores, translations, time.perf_counter() - start)

    def held_out_loss(self, params: Params, sources: Sequence[str], targets: Sequence[str]) -> float:
        """Mean cross-entropy in nats per target token; sides are cut as decoding cuts them."""
        decode = self._config.decode
        longest = decode.max_source_tokens + decode.max_extra_length
        encoded = self._tokenizer.encode(targets)
        over = sum(len(ids) > longest for ids in encoded)
        if over:
            say(f"warning: {over:,} references have over {longest} tokens; the loss is that of their first {longest}")
        target = Ragged.from_sequences([cut(ids, longest) for ids in encoded])
        source = Ragged.from_sequences([cut(ids, decode.max_source_tokens) for ids in self._tokenizer.encode(sources)])
        sums = []
        for planned in eval_plan(source.lengths, target.lengths, self._rows):
            batch = sharding.place_batch(self._mesh, assemble(planned, source, target))
            sums.append(self._eval_step(params, batch))
        parts = jax.device_get(sums)
        return sum(float(part.nll) for part in parts) / max(sum(float(part.tokens) for part in parts), 1.0)

    def _rows(self, width: int) -> int:
        multiple = sharding.row_multiple(self._mesh)
        return max(self._config.train.batch_tokens // width // multiple, 1) * multiple
