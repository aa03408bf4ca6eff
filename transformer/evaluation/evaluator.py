"""Held-out loss and translation scores; validation during training and eval.py share all of it."""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from transformer.config import Config
from transformer.data.batching import Batch, Ragged, assemble, eval_plan, only_rows
from transformer.data.tokenizer import Tokenizer, cut
from transformer.decoding.translator import Translator
from transformer.distributed import sharding
from transformer.evaluation import bleu_tokenizer
from transformer.evaluation.metrics import HEADLINE, Scores, check_counts, score
from transformer.models.loss import LossSums, cross_entropy
from transformer.models.registry import Model, Params
from transformer.runtime.logging import say


class HeldOutLoss(NamedTuple):
    """How well references are predicted, teacher-forced and without label smoothing.

    Attributes:
      mean: cross-entropy in nats per target token, the end of each sentence counted as one.
      tokens: over which the mean is.
      words: what white space separates in the references, and the end of each sentence.
    """

    mean: float
    tokens: float
    words: int

    @property
    def perplexity(self) -> float:
        """Per subword: only models with the same vocabulary can be compared by it."""
        return _exp(self.mean)

    @property
    def word_perplexity(self) -> float:
        """Per word, whatever pieces words are cut into."""
        return _exp(self.mean * self.tokens / max(self.words, 1))


def _exp(nats: float) -> float:
    return math.inf if nats > 700 else math.exp(nats)


@dataclasses.dataclass(frozen=True)
class Report:
    """What an evaluation found."""

    sentences: int
    held_out: HeldOutLoss
    scores: Scores
    translations: list[str]
    seconds: float

    @property
    def loss(self) -> float:
        """Mean cross-entropy in nats per target token, without smoothing."""
        return self.held_out.mean


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
        metrics: Sequence[str] = HEADLINE,
        progress: Callable[[int], None] = lambda done: None,
    ) -> Report:
        """Translates and scores every sentence once; the loss is against the first reference."""
        start = time.perf_counter()
        check_counts(len(sources), references)
        loss = self.held_out_loss(params, sources, references[0])
        translations = self.translator.translate(params, sources, progress)
        self.translator.say_counts()
        tokenizer = bleu_tokenizer.choose(self._config.data, references[0]).name
        found = score(translations, references, metrics, tokenizer)
        return Report(len(sources), loss, found, translations, time.perf_counter() - start)

    def held_out_loss(self, params: Params, sources: Sequence[str], targets: Sequence[str]) -> HeldOutLoss:
        """Of all targets given their sources; sides are cut as decoding cuts them."""
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
            here = only_rows(planned, sharding.rows_here(self._mesh, planned.bucket.rows))
            batch = sharding.place_batch(self._mesh, assemble(here, source, target))
            sums.append(self._eval_step(params, batch))
        parts = jax.device_get(sums)
        tokens = sum(float(part.tokens) for part in parts)
        mean = sum(float(part.nll) for part in parts) / max(tokens, 1.0)
        return HeldOutLoss(mean, tokens, self._words(targets, encoded, longest))

    def _words(self, targets: Sequence[str], encoded: Sequence[np.ndarray], longest: int) -> int:
        """As `HeldOutLoss` counts them, of what is left of targets that are cut."""
        kept = (
            line if len(ids) <= longest else self._tokenizer.decode(ids[: longest - 1].tolist())
            for line, ids in zip(targets, encoded, strict=True)
        )
        return sum(len(line.split()) + 1 for line in kept)

    def _rows(self, width: int) -> int:
        """As many as go through the model at once in training, whose memory has room for them."""
        multiple, train = sharding.row_multiple(self._mesh), self._config.train
        return max(train.batch_tokens // train.accumulation_steps // width // multiple, 1) * multiple


def make_eval_step(model: Model, mesh: Mesh) -> Callable[[Params, Batch], LossSums]:
    """The compiled loss without dropout or smoothing."""

    def eval_step(params: Params, batch: Batch) -> LossSums:
        with sharding.on_mesh(mesh):
            logits_BTV = model.bind(params)(batch.source_BS, batch.target_BT)
            return cross_entropy(logits_BTV, batch.target_BT, 0.0)

    params = sharding.param_shardings(mesh, model.abstract_params)
    return jax.jit(
        eval_step,
        in_shardings=(params, sharding.batch_sharding(mesh)),
        out_shardings=sharding.replicated(mesh),
    )
