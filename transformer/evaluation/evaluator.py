"""Evaluation: a model and a data set → translations and scores.

`Evaluator` is what the trainer calls for validation and `CheckpointEvaluator` for eval.py.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from transformer.checkpoints.loading import RestoredModel
from transformer.config import Config, DataConfig
from transformer.config.mixture import Direction
from transformer.data.batching import PAD_EXAMPLE, Batch, JaggedArray, eval_batches, make_batch, select_rows
from transformer.data.tokenizer import Tokenizer
from transformer.decoding.scorer import MAX_BATCH_TOKENS
from transformer.decoding.translator import Translator
from transformer.distributed import consistency, sharding
from transformer.evaluation import bleu_tokenizer
from transformer.evaluation.datasets import EvalDataset
from transformer.evaluation.metrics import DEFAULT_METRICS, Scores, check_lengths, extended_scores, make_metric, score
from transformer.models.loss import LossSums, cross_entropy
from transformer.models.registry import ModelDef, Params
from transformer.runtime.errors import DivergedError
from transformer.runtime.logging import log_info
from transformer.runtime.progress import phase


class CrossEntropy(NamedTuple):
    """Teacher-forced loss of references, without label smoothing.

    Attributes:
      mean: cross-entropy in nats per target token, EOS included.
      tokens: the number of target tokens.
      words: the number of white-space-separated words of the references, plus one for each sentence end.
    """

    mean: float
    tokens: float
    words: int

    @property
    def perplexity(self) -> float:
        """Per subword token: only models with the same vocabulary can be compared by it."""
        return _exp(self.mean)

    @property
    def word_perplexity(self) -> float:
        """Per word, which does not depend on the vocabulary."""
        return _exp(self.mean * self.tokens / max(self.words, 1))


def _exp(nats: float) -> float:
    return math.inf if nats > 700 else math.exp(nats)


@dataclasses.dataclass(frozen=True)
class EvalResult:
    """Translations and scores of a model on a data set.

    Attributes:
      sentences: their number.
      loss, perplexity, word_perplexity: as in `CrossEntropy`.
      scores: by metric, with signatures (`metrics.score`, `metrics.extended_scores`).
      translations: one for each sentence.
      seconds: for loss, translation and scores.
    """

    sentences: int
    loss: float
    perplexity: float
    word_perplexity: float
    scores: Scores
    translations: list[str]
    seconds: float


class Evaluator:
    """Evaluates any params of a model; keeps compiled programs between evaluations."""

    def __init__(self, model: ModelDef, tokenizer: Tokenizer, config: Config, mesh: Mesh):
        self.translator = Translator([model], tokenizer, config.decode, mesh)
        self._tokenizer, self._config, self._mesh = tokenizer, config, mesh
        self._eval_step = make_eval_step(model, mesh)

    def evaluate(
        self,
        params: Params,
        sources: Sequence[str],
        references: Sequence[Sequence[str]],
        metrics: Sequence[str] = DEFAULT_METRICS,
        progress: Callable[[int], None] = lambda count: None,
        direction: Direction | None = None,
        on_translated: Callable[[list[str]], None] = lambda translations: None,
    ) -> EvalResult:
        """Translates and scores every sentence once; the loss is of the first reference.

        Args:
          direction: of the sentences; None for that of the config, without a tag.
          on_translated: takes the translations before they are scored, which may take long or be interrupted.
          progress: called after each batch with the number of sentences translated in it, 0 while losses are computed.
        """
        start, (data, tag, _) = time.perf_counter(), direction or Direction(self._config.data)
        check_lengths(len(sources), references)
        for name in metrics:
            make_metric(name)  # a missing package is reported before anything is translated
        loss = self.teacher_forced_loss(params, sources, references[0], progress, tag)
        with phase("translating", len(sources), "sentences") as translating:

            def advance(count: int) -> None:
                translating.advance(count)
                progress(count)

            translations = self.translator.translate([params], sources, advance, tag)
        self.translator.log_warnings()
        on_translated(translations)
        tokenizer = bleu_tokenizer.choose_bleu_tokenizer(data, references[0]).name
        with phase("computing scores"):
            scores = score(translations, references, metrics, tokenizer)
        return EvalResult(
            sentences=len(sources),
            loss=loss.mean,
            perplexity=loss.perplexity,
            word_perplexity=loss.word_perplexity,
            scores=scores,
            translations=translations,
            seconds=time.perf_counter() - start,
        )

    def teacher_forced_loss(
        self,
        params: Params,
        sources: Sequence[str],
        targets: Sequence[str],
        progress: Callable[[int], None] = lambda count: None,
        tag: str = "",
    ) -> CrossEntropy:
        """The loss of all targets given their sources after a tag, both truncated to the lengths of decoding."""
        decode = self._config.decode
        max_length = decode.max_target_tokens
        target_ids, is_truncated = self._tokenizer.encode_truncated(targets, max_length)
        source_ids, _ = self._tokenizer.encode_truncated(sources, decode.max_source_tokens, tag)
        if any(is_truncated):
            log_info(
                f"warning: {sum(is_truncated):,} references have over {max_length} tokens; the loss is that of their "
                f"first {max_length}"
            )
        source, target = JaggedArray.from_sequences(source_ids), JaggedArray.from_sequences(target_ids)
        sums: list[LossSums] = []
        with phase("loss of references", len(targets), "sentences") as computing:
            for spec in eval_batches(source.lengths, target.lengths, self._rows_of):
                local_rows = select_rows(spec, sharding.local_row_indices(self._mesh, spec.bucket.rows))
                batch = sharding.shard_batch(self._mesh, make_batch(local_rows, source, target))
                sums.append(self._eval_step(params, batch))
                jax.block_until_ready(sums[-2:-1])  # so that what is counted is done, up to one batch
                computing.advance(int((spec.examples_B != PAD_EXAMPLE).sum()))
                progress(0)
            sums = jax.device_get(sums)
        tokens = sum(float(batch_sums.tokens) for batch_sums in sums)
        mean = sum(float(batch_sums.nll) for batch_sums in sums) / max(tokens, 1.0)
        scored = (
            self._tokenizer.decode(ids.tolist()) if truncated else line
            for line, ids, truncated in zip(targets, target_ids, is_truncated, strict=True)
        )
        return CrossEntropy(mean, tokens, words=sum(len(line.split()) + 1 for line in scored))

    def _rows_of(self, width: int) -> int:
        """The number of rows of this width that go through the model at once.

        As many as in training at most, which fit there; fewer where training had more devices, or smaller ones here.
        """
        shards, train = sharding.num_shards("batch", self._mesh), self._config.train
        tokens = min(train.batch_tokens // train.accumulation_steps, MAX_BATCH_TOKENS * shards)
        return max(tokens // width // shards, 1) * shards


def make_eval_step(model: ModelDef, mesh: Mesh) -> Callable[[Params, Batch], LossSums]:
    """Compiles the loss without dropout and label smoothing."""

    def eval_step(params: Params, batch: Batch) -> LossSums:
        with sharding.use_mesh(mesh):
            logits_BTV = model.bind(params)(batch.source_BS, batch.target_BT)
            return cross_entropy(logits_BTV, batch.target_BT, 0.0)

    params = sharding.param_shardings(mesh, model.abstract_params)
    return jax.jit(
        eval_step,
        in_shardings=(params, sharding.batch_sharding(mesh)),
        out_shardings=sharding.replicated(mesh),
    )


class CheckpointEvaluator:
    """Evaluates checkpoints on a data set; keeps compiled programs as long as config and vocabulary are the same.

    Attributes:
      dataset: by default.
    """

    def __init__(self, dataset: EvalDataset):
        self.dataset = dataset
        self._evaluator: Evaluator | None = None
        self._compiled_for: tuple[Config, str] | None = None
        self._logged_for: tuple[Any, ...] | None = None

    def evaluate(
        self,
        restored: RestoredModel,
        dataset: EvalDataset | None = None,
        on_translated: Callable[[list[str]], None] = lambda translations: None,
    ) -> EvalResult:
        """Translates every sentence once; computes the metrics of the config and what belongs to them.

        Args:
          restored: in the direction of the data set.
          dataset: in place of the default one.
          on_translated: as in `Evaluator.evaluate`.

        Raises:
          DivergedError: the loss is not finite.
        """
        # The data, of one direction, changes no program.
        key = dataclasses.replace(restored.config, data=DataConfig()), restored.tokenizer.digest
        metrics = restored.config.eval.metric_names
        data, (_, sources, references) = restored.config.data, dataset or self.dataset
        tokenizer = bleu_tokenizer.choose_bleu_tokenizer(data, references[0])
        if (logged_for := (*key, data)) != self._logged_for:
            self._logged_for = logged_for
            if "bleu" in metrics:
                _log_tokenizer(tokenizer, references[0])
        if self._evaluator is None or key != self._compiled_for:
            self._evaluator = Evaluator(restored.model, restored.tokenizer, restored.config, restored.mesh)
            self._compiled_for = key
        direction = Direction(data, restored.source_tag)
        result = self._evaluator.evaluate(
            restored.params, sources, references, metrics, direction=direction, on_translated=on_translated
        )
        if not math.isfinite(result.loss):
            raise DivergedError(f"{restored.description}: its loss is {result.loss}; evaluate another")
        language = data.target_language
        with phase("computing more scores"):
            extended = extended_scores(sources, result.translations, references, language, tokenizer.name, metrics)
        return dataclasses.replace(result, scores={**result.scores, **extended})


def _log_tokenizer(tokenizer: bleu_tokenizer.BleuTokenizer, references: Sequence[str]) -> None:
    """Logs how BLEU is computed, and whether it suits the references."""
    log_info(str(tokenizer))
    if reason := bleu_tokenizer.short_references(references, tokenizer.name):
        log_info(f"warning: {reason}; use chrF2")


def assert_same_on_hosts(restored: RestoredModel, dataset: EvalDataset) -> None:
    """Raises a UserError on every host unless all have the same checkpoint and data set."""
    value = f"{restored.description}, {len(dataset.sources):,} sentences, digest {dataset.digest}"
    consistency.assert_equal("what is evaluated", value, "give every host the same flags, workdir and data")
