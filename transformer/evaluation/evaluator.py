"""A model and a set of sentences → translations and all scores: what eval.py does, once or for many checkpoints."""

import contextlib
import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from transformer.checkpoints.loading import RestoredModel, load_checkpoint
from transformer.config import Config, DataConfig, validation
from transformer.data import corpus, text_files
from transformer.data.batching import Batch, JaggedArray, eval_batches, make_batch, select_rows
from transformer.data.tokenizer import Tokenizer, truncate
from transformer.decoding.translator import Translator
from transformer.distributed import consistency, multihost, sharding
from transformer.evaluation import bleu_tokenizer
from transformer.evaluation.metrics import HEADLINE, Scores, check_counts, further, score
from transformer.models.loss import LossSums, cross_entropy
from transformer.models.registry import Model, Params
from transformer.runtime.errors import DivergedError, UserError
from transformer.runtime.files import user_error_on_oserror, write_atomic
from transformer.runtime.logging import log_info


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
            log_info(
                f"warning: {over:,} references have over {longest} tokens; the loss is that of their first {longest}"
            )
        target = JaggedArray.from_sequences([truncate(ids, longest) for ids in encoded])
        source = JaggedArray.from_sequences(
            [truncate(ids, decode.max_source_tokens) for ids in self._tokenizer.encode(sources)]
        )
        sums = []
        for planned in eval_batches(source.lengths, target.lengths, self._rows):
            here = select_rows(planned, sharding.local_row_indices(self._mesh, planned.bucket.rows))
            batch = sharding.shard_batch(self._mesh, make_batch(here, source, target))
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
        multiple, train = sharding.batch_divisor(self._mesh), self._config.train
        return max(train.batch_tokens // train.accumulation_steps // width // multiple, 1) * multiple


def make_eval_step(model: Model, mesh: Mesh) -> Callable[[Params, Batch], LossSums]:
    """The compiled loss without dropout or smoothing."""

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


SETS_FILE = "sets.json"  # name → digest of the first set of that name


class EvaluationSet(NamedTuple):
    """What is translated and what it is held against.

    Attributes:
      name: of the split or the file of sources.
      references: one list or several, each as long as the sources.
    """

    name: str
    sources: list[str]
    references: list[list[str]]

    @property
    def digest(self) -> str:
        """Changes when any sentence does."""
        return hashlib.sha256(json.dumps([self.sources, self.references]).encode()).hexdigest()[:16]


def open_set(
    data: DataConfig, split: str | None, source: str | None, references: Sequence[str] | None
) -> EvaluationSet:
    """The sentences of files, or of a split of the config's data.

    Args:
      split: its name; None is "test".
      source: a file of sentences, in place of a split.
      references: the files of its references.

    Raises:
      UserError: there is no such split or file, or counts differ.
    """
    if source and references:
        lines = [list(text_files.read_lines(path)) for path in references]
        chosen = EvaluationSet(epath.Path(source).name, list(text_files.read_lines(source)), lines)
        check_counts(len(chosen.sources), chosen.references)
        return chosen
    try:
        found = corpus.open_corpus(data).split(split or "test")
    except UserError as error:
        raise UserError(f"{error}. Or name another --split, or score files with --source and --reference") from error
    return EvaluationSet(found.name, found.sources(), [found.targets()])


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """One model on one set: what `evaluate` and `scores.further` found."""

    trained: RestoredModel
    chosen: EvaluationSet
    report: Report
    further: Scores


class Scorer:
    """Evaluates model after model on one set; compiled shapes are kept as long as config and vocabulary stay."""

    def __init__(self, chosen: EvaluationSet):
        self.chosen = chosen
        self._evaluator: Evaluator | None = None
        self._of: tuple[Config, str] | None = None

    def evaluate(self, trained: RestoredModel, progress: Callable[[int], None] = lambda done: None) -> Evaluation:
        """Translates and scores every sentence once.

        Raises:
          DivergedError: the loss is not a finite number.
        """
        of = trained.config, trained.tokenizer.digest
        data, (_, sources, references) = trained.config.data, self.chosen
        tokenizer = bleu_tokenizer.choose(data, references[0])
        if self._evaluator is None or of != self._of:
            log_info(str(tokenizer))
            short = bleu_tokenizer.short(references[0], tokenizer.name)
            if 2 * short > len(references[0]):
                log_info(
                    f"warning: {short:,} of {len(references[0]):,} references have under four tokens, of which BLEU "
                    "finds nothing; go by chrF2"
                )
            self._evaluator = Evaluator(trained.model, trained.tokenizer, trained.config, trained.mesh)
            self._of = of
        report = self._evaluator.evaluate(trained.params, sources, references, progress=progress)
        if not math.isfinite(report.loss):
            raise DivergedError(f"{trained.description}: its loss is {report.loss}; evaluate another")
        found = further(sources, report.translations, references, data.target_language, tokenizer.name)
        return Evaluation(trained, self.chosen, report, found)


def check_hosts(trained: RestoredModel, chosen: EvaluationSet) -> None:
    """Raises a UserError on every host unless all have the same checkpoint and sentences."""
    what = f"{trained.description}, {len(chosen.sources):,} sentences, digest {chosen.digest}"
    consistency.assert_equal("what is evaluated", what, "give every host the same flags, workdir and data")


@multihost.primary_only
def write_translations(evaluation: Evaluation, path: epath.PathLike) -> None:
    """One translation a line; the file appears whole or not at all."""
    path = epath.Path(path)
    with user_error_on_oserror(f"{path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, "".join(f"{line}\n" for line in evaluation.report.translations))


def result_name(
    workdir: epath.PathLike, trained: RestoredModel, chosen: EvaluationSet, fields: Mapping[str, Any] | None = None
) -> str:
    """STEP.SET, which names the files of an evaluation.

    SET is the name of the split or file. Where the workdir has results of another set of that name, a digest of its
    sentences is added to it.

    Args:
      fields: of decoding, other than the checkpoint's own; they are part of the name, so that a file is never taken
        for one decoded as the config says.
    """
    name, others = chosen.name, "".join(f".{name}={value}" for name, value in sorted((fields or {}).items()))
    if _first_of_name(workdir, chosen) != chosen.digest:
        name += f"-{chosen.digest[:8]}"
    return f"{trained.tag}.{name}{others}"


def _first_of_name(workdir: epath.PathLike, chosen: EvaluationSet) -> str:
    """The digest of the set that was the first of its name in this workdir; of this one, if none was."""
    path = epath.Path(workdir) / "translations" / SETS_FILE
    try:
        digests = {**json.loads(path.read_text())}
    except (OSError, ValueError, TypeError):
        digests = {}
    if chosen.name not in digests and multihost.is_primary():
        # A workdir that cannot be written costs the name, as it costs the files.
        with contextlib.suppress(UserError), user_error_on_oserror(f"{path}"):
            path.parent.mkdir(exist_ok=True)
            write_atomic(path, json.dumps({**digests, chosen.name: chosen.digest}, indent=1) + "\n")
    return digests.get(chosen.name, chosen.digest)


def translations_path(
    workdir: epath.PathLike, trained: RestoredModel, chosen: EvaluationSet, fields: Mapping[str, Any] | None = None
) -> epath.Path:
    """WORKDIR/translations/NAME.txt, with the name of `result_name`."""
    return epath.Path(workdir) / "translations" / f"{result_name(workdir, trained, chosen, fields)}.txt"


def translations_of_other(
    path: epath.PathLike, which: str, chosen: EvaluationSet, language: str, fields: Mapping[str, Any] | None = None
) -> tuple[str, Sequence[str]]:
    """What another system makes of the same sources, with a name for it.

    Args:
      path: a workdir, whose checkpoint `which` translates them now, or a file that holds translations.
      language: code of the language that ours are in.
      fields: of decoding, in place of the workdir's own.

    Raises:
      UserError: it is neither, holds another number of lines, or translates into another language.
    """
    path = epath.Path(path)
    if not path.is_dir():
        lines = list(text_files.read_lines(path))
        if len(lines) != len(chosen.sources):
            raise UserError(
                f"--versus={path}: expected a translation of each of the {len(chosen.sources):,} sentences of "
                f"{chosen.name}, got {len(lines):,} lines; name translations of the same set"
            )
        return path.name, lines
    if not (path / "checkpoints").is_dir():
        raise UserError(f"--versus={path}: expected a workdir of train.py or a file of translations, found neither")
    other = load_checkpoint(path, which)
    if other.config.data.target_language != language:
        raise UserError(
            f"--versus={path}: translates into {other.config.data.target_language!r}, expected {language!r}; "
            "name a model of the same direction"
        )
    decode = validation.with_decode(other.config, dict(fields or {})).decode
    translator = Translator(other.model, other.tokenizer, decode, other.mesh)
    translations = translator.translate(other.params, chosen.sources)
    translator.say_counts()
    return f"{path.name}, {other.description}", translations
