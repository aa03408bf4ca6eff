"""The Python API: a trained model translates, scores, shows its attention. `transformer.load` is `load` here."""

import dataclasses
import functools
import os
import threading
from collections.abc import Iterable, Sequence
from typing import Any, overload

from etils import epath

from transformer.attention import fused
from transformer.checkpoints.loading import RestoredModel, load_checkpoint
from transformer.config import DecodeConfig, mixture, validation
from transformer.data import text_inputs
from transformer.data.tokenizer import Tokenizer
from transformer.decoding.alignment import Aligner, Attention
from transformer.decoding.scorer import Scorer, TargetScore
from transformer.decoding.translator import Hypothesis, Translator, first_text
from transformer.runtime.errors import UserError

MAX_COMPILED = 32  # decode configs whose compiled programs are kept
SCORE_FIELDS = ("max_source_tokens", "max_extra_length", "batch_rows")  # of the decode section


class TranslationModel:
    """A trained model, or several as an ensemble; threads may share it.

    Each decode config is compiled once for each width of sentences, at first use, and kept.

    Attributes:
      models: all of them.
      primary: the model whose tokenizer and decode config apply to all.
      params: of each model.
      scorer: scores given translations.
    """

    def __init__(self, models: Sequence[RestoredModel]):
        self.models, self.primary = models, models[0]
        self.params = tuple(model.params for model in models)
        definitions = [model.model for model in models]
        self._translators = functools.lru_cache(MAX_COMPILED)(
            lambda decode: Translator(definitions, self.primary.tokenizer, decode, self.primary.mesh)
        )
        self.scorer = Scorer(definitions, self.primary.tokenizer, self.primary.mesh)
        self._lock = threading.Lock()
        self._process = os.getpid()

    def __repr__(self) -> str:
        """Family, size, languages and step of each model."""
        return f"TranslationModel({' + '.join(map(_describe, self.models))})"

    def on_local_devices(self) -> "TranslationModel":
        """The model on the devices of this process alone, which then translates without the others.

        All processes must call it: they agree here on the attention that all their devices can run.
        """
        for model in self.models:
            fused.try_for_translating(model.config)
        return TranslationModel([model.on_local_devices() for model in self.models])

    @overload
    def translate(
        self,
        sentences: Iterable[str],
        *,
        n_best: None = None,
        prefixes: Iterable[str | None] | None = None,
        constraints: Iterable[Iterable[str] | None] | None = None,
        source_language: str | None = None,
        target_language: str | None = None,
        **decode: int | float | str,
    ) -> list[str]: ...

    @overload
    def translate(
        self,
        sentences: Iterable[str],
        *,
        n_best: int,
        prefixes: Iterable[str | None] | None = None,
        constraints: Iterable[Iterable[str] | None] | None = None,
        source_language: str | None = None,
        target_language: str | None = None,
        **decode: int | float | str,
    ) -> list[list[Hypothesis]]: ...

    def translate(
        self,
        sentences: Iterable[str],
        *,
        n_best: int | None = None,
        prefixes: Iterable[str | None] | None = None,
        constraints: Iterable[Iterable[str] | None] | None = None,
        source_language: str | None = None,
        target_language: str | None = None,
        **decode: int | float | str,
    ) -> list[str] | list[list[Hypothesis]]:
        """Returns one translation for each sentence, in order; that of a blank sentence is empty.

        Lists may be any iterable, such as a Series, an array, a generator or a file. One line end at the end of a text
        is stripped. Warnings on stderr count long sources and translations cut at their limit.

        Args:
          sentences: one line of text each; a long one is cut to its first `max_source_tokens` tokens.
          n_best: returns at most this many hypotheses (text, score, finished) of each sentence instead, best first;
            those of beam search are all different.
          prefixes: for each sentence a text that its translation begins with; blank or None for no constraint.
          constraints: for each sentence a list of phrases that its translation holds, or None.
          source_language, target_language: the direction, of a model of several; mostly the target is enough.
          decode: fields of the config's decode section, such as `beam_size=8`, in place of the model's own; with
            another `method` the model's own fields that do not apply to it are left out.

        Raises:
          UserError: an item is not text, a field is unknown, a value is invalid, a prefix or constraint cannot be met,
            the direction is none of the model's or is not given, or this process was forked after the model was loaded.
        """
        self._reject_fork()
        tag = self.source_tag(source_language, target_language)
        translator, seed = self.translator(decode)
        translations = translator.translate_nbest(
            self.params,
            sentences,
            n_best=1 if n_best is None else n_best,
            prefixes=prefixes,
            constraints=constraints,
            seed=seed,
            tag=tag,
        )
        translator.log_warnings()
        return [first_text(hypotheses) for hypotheses in translations] if n_best is None else translations

    def source_tag(self, source_language: str | None, target_language: str | None) -> str:
        """The tag of the target language before each source, empty for none; a UserError as `mixture.find_tag`."""
        return mixture.find_tag(self.primary.config.data, source_language, target_language)

    def score(
        self,
        sources: Iterable[str],
        targets: Iterable[str],
        *,
        source_language: str | None = None,
        target_language: str | None = None,
        **decode: int,
    ) -> list[TargetScore]:
        """Returns the log-probability of each target given its source, in order, and of each token.

        Natural logarithms; the end of the sentence is a token too. Warnings on stderr count pairs that are truncated
        or have a blank side.

        Args:
          sources: one line of text each.
          targets: a translation of each.
          source_language, target_language: as in `translate`.
          decode: `max_source_tokens` and `max_extra_length`, which limit the lengths, and `batch_rows`, in place of the
            model's own.

        Raises:
          UserError: an item is not text, the numbers of lines differ, another field is given, a value is invalid, or
            this process was forked after the model was loaded.
        """
        self._reject_fork()
        config = self.scoring_config(decode)
        tag = self.source_tag(source_language, target_language)
        scores = self.scorer.score(self.params, sources, targets, config, tag)
        self.scorer.log_warnings(config)
        return scores

    def attention(
        self,
        sources: Iterable[str],
        targets: Iterable[str],
        *,
        source_language: str | None = None,
        target_language: str | None = None,
    ) -> list[Attention | None]:
        """Returns the attention weights of each pair under the first model, given the target; None if a side is blank.

        `tokenizer.pieces(attention.source)` are the subword tokens that a weight is of. Long texts are truncated as in
        translation, without a warning.

        Args:
          sources: one line of text each.
          targets: a translation of each.
          source_language, target_language: as in `translate`.

        Raises:
          UserError: an item is not text, the numbers of lines differ, or this process was forked after the model was
            loaded.
        """
        self._reject_fork()
        source_lines, target_lines = text_inputs.pairs(sources, targets)
        tag = self.source_tag(source_language, target_language)
        found = dict(self._aligner.attention(self.primary.params, source_lines, target_lines, tag))
        return [found.get(i) for i in range(len(source_lines))]

    @functools.cached_property
    def _aligner(self) -> Aligner:
        model = self.primary
        return Aligner(model.model, model.tokenizer, model.config.decode, model.mesh, self_attention=True)

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of all models."""
        return self.primary.tokenizer

    def scoring_config(self, fields: dict[str, Any]) -> DecodeConfig:
        """The decode config with these fields, of which scoring reads SCORE_FIELDS alone; others are errors."""
        if unread := sorted(fields.keys() - set(SCORE_FIELDS)):
            raise UserError(f"scoring reads decode.{', '.join(SCORE_FIELDS)}, got {unread[0]}; leave it out")
        return self._decode_config(fields)

    def _reject_fork(self) -> None:
        if os.getpid() != self._process:  # a fork lacks the threads of JAX, and its locks may stay locked
            raise UserError(
                f"this model was loaded in process {self._process}, of which process {os.getpid()} is a fork, in which "
                'JAX hangs: load it in each process, and start them with multiprocessing.get_context("spawn")'
            )

    def translator(self, fields: dict[str, Any]) -> tuple[Translator, int]:
        """Returns the translator for these decode fields, cached, and their seed."""
        decode = self._decode_config(fields)
        with self._lock:
            return self._translators(dataclasses.replace(decode, seed=0)), decode.seed

    def _decode_config(self, fields: dict[str, Any]) -> DecodeConfig:
        decode = validation.override_decode(self.primary.config, fields).decode
        for member in self.models[1:]:  # its learned positions may be too few for these fields
            validation.validate(dataclasses.asdict(dataclasses.replace(member.config, decode=decode)), strict=False)
        return decode


def _describe(model: RestoredModel) -> str:
    languages = _languages(model)
    return f"{model.config.model.family}, {model.model.num_params():,} params, {languages}, {model.description}"


def _languages(model: RestoredModel) -> str:
    """The directions and their tags, for messages."""
    data, directions = model.config.data, mixture.directions(model.config.data)
    if not data.mixture:
        return f"{data.source_language} to {data.target_language}"
    return ", ".join(" ".join(filter(None, (direction.name, direction.tag))) for direction in directions)


def load(
    workdir: epath.PathLike, checkpoint: str | int = "latest", ensemble: Iterable[epath.PathLike] = ()
) -> TranslationModel:
    """Loads the model of a workdir.

    Args:
      workdir: a folder that train.py wrote.
      checkpoint: latest, best, a step, average:N or best-average:N; of each workdir.
      ensemble: more workdirs, whose models' probabilities are averaged with those of the first. They must share its
        tokenizer and languages; its decode config applies.

    Raises:
      UserError: the checkpoint does not exist, or tokenizers or languages differ.
    """
    if isinstance(ensemble, str | os.PathLike):
        raise UserError(f"ensemble: expected a list of workdirs, got one, {os.fspath(ensemble)!r}; put it into a list")
    ensemble = text_inputs.items(ensemble, "ensemble: expected a list of workdirs")
    primary, *others = models = [load_checkpoint(folder, checkpoint) for folder in (workdir, *ensemble)]
    for folder, member in zip(ensemble, others, strict=True):
        if member.tokenizer.digest != primary.tokenizer.digest:
            raise UserError(
                f"{folder}: expected the tokenizer of {workdir}, {primary.tokenizer.digest[:12]}, got "
                f"{member.tokenizer.digest[:12]}; an ensemble shares one: train with data.tokenizer = its .model file"
            )
        expected, got = _languages(primary), _languages(member)
        if got != expected:
            raise UserError(
                f"{folder}: translates {got}, expected {expected} as {workdir} does; an ensemble has one direction"
            )
    return TranslationModel(models)
