"""The Python API: load a trained model once, translate often. `transformer.load` is `load` here."""

import dataclasses
import functools
import os
import threading
from collections.abc import Iterable, Sequence
from typing import Any, overload

from etils import epath

from transformer.checkpoints.loading import RestoredModel, load_checkpoint
from transformer.config import validation
from transformer.data import text_inputs
from transformer.decoding.translator import Hypothesis, Translator, first_text
from transformer.runtime.errors import UserError

MAX_COMPILED = 32  # ways of decoding whose compiled programs are kept


class TranslationModel:
    """A model, or several as an ensemble, read from workdirs; threads may share it.

    Each way of decoding is compiled once for each width of sentences, at first use, and kept.
    """

    def __init__(self, members: Sequence[RestoredModel]):
        self._members = members
        model = members[0].model if len(members) == 1 else [member.model for member in members]
        self._params: Any = members[0].params if len(members) == 1 else tuple(member.params for member in members)
        self._translators = functools.lru_cache(MAX_COMPILED)(
            lambda decode: Translator(model, members[0].tokenizer, decode, members[0].mesh)
        )
        self._lock = threading.Lock()
        self._process = os.getpid()

    @overload
    def translate(
        self,
        sentences: Iterable[str],
        *,
        n_best: None = None,
        prefixes: Iterable[str | None] | None = None,
        constraints: Iterable[Iterable[str] | None] | None = None,
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
        **decode: int | float | str,
    ) -> list[list[Hypothesis]]: ...

    def translate(
        self,
        sentences: Iterable[str],
        *,
        n_best: int | None = None,
        prefixes: Iterable[str | None] | None = None,
        constraints: Iterable[Iterable[str] | None] | None = None,
        **decode: int | float | str,
    ) -> list[str] | list[list[Hypothesis]]:
        """One translation for each sentence, in order; a blank sentence gives an empty one.

        Where a list is meant, any iterable will do, in its own order: a Series, an array, a generator, a file. A line
        end at the end of a text is left out. Warnings on stderr count long sources and translations cut at their limit.

        Args:
          sentences: one line of text each; of a long one only the first `max_source_tokens` tokens count.
          n_best: gives at most so many hypotheses (text, score, finished) of each sentence instead, best first; those
            of beam search are all different.
          prefixes: a text for each sentence that its translation begins with; blank or None for none.
          constraints: a list of phrases for each sentence that its translation holds, or None.
          decode: fields of the config's decode section, such as `beam_size=8`, in place of the model's own; with
            another `method` those of the model's own that it does not read are left out.

        Raises:
          UserError: what is no text, an unknown field, an impossible value, or a prefix or constraint that cannot be
            met; or the model was loaded before this process was forked.
        """
        if os.getpid() != self._process:  # where the threads of JAX are missing, and locks may never open
            raise UserError(
                f"this model was loaded in process {self._process}, of which process {os.getpid()} is a fork, in which "
                'JAX hangs: load it in each process, and start them with multiprocessing.get_context("spawn")'
            )
        translator, seed = self.translator(decode)
        found = translator.translate_nbest(
            self._params,
            sentences,
            n_best=1 if n_best is None else n_best,
            prefixes=prefixes,
            constraints=constraints,
            seed=seed,
        )
        translator.log_warnings()
        return [first_text(one) for one in found] if n_best is None else found

    def translator(self, fields: dict[str, Any]) -> tuple[Translator, int]:
        """The translator that these decode fields ask for, the same one each time, and the seed."""
        decode = validation.override_decode(self.first.config, fields).decode
        for member in self._members[1:]:  # whose learned positions may cover less than this decoding asks for
            validation.validate(dataclasses.asdict(dataclasses.replace(member.config, decode=decode)), strict=False)
        with self._lock:
            return self._translators(dataclasses.replace(decode, seed=0)), decode.seed

    @property
    def first(self) -> RestoredModel:
        """The model whose tokenizer and decoding are those of all."""
        return self._members[0]

    @property
    def params(self) -> Any:
        """What `Translator.translate` takes."""
        return self._params


def load(
    workdir: epath.PathLike, checkpoint: str | int = "latest", ensemble: Iterable[epath.PathLike] = ()
) -> TranslationModel:
    """Reads the model of a workdir.

    Args:
      workdir: a folder that train.py wrote.
      checkpoint: latest, best, a step, average:N or best-average:N; of each workdir.
      ensemble: more workdirs, whose models' probabilities are averaged with those of the first. They must have
        been trained with the same tokenizer; decoding is configured by the first.

    Raises:
      UserError: there is no such checkpoint, or a tokenizer is another.
    """
    if isinstance(ensemble, str | os.PathLike):
        raise UserError(f"ensemble: expected a list of workdirs, got one, {os.fspath(ensemble)!r}; put it into a list")
    ensemble = text_inputs.items(ensemble, "ensemble: expected a list of workdirs")
    members = [load_checkpoint(folder, checkpoint) for folder in (workdir, *ensemble)]
    for folder, member in zip(ensemble, members[1:], strict=True):
        if member.tokenizer.digest != members[0].tokenizer.digest:
            raise UserError(
                f"{folder}: expected the tokenizer of {workdir}, {members[0].tokenizer.digest[:12]}, got "
                f"{member.tokenizer.digest[:12]}; an ensemble shares one: train with data.tokenizer = its .model file"
            )
        ours, theirs = (
            (one.source_language, one.target_language) for one in (members[0].config.data, member.config.data)
        )
        if ours != theirs:
            raise UserError(
                f"{folder}: translates {theirs[0]} to {theirs[1]}, expected {ours[0]} to {ours[1]} as {workdir} does; "
                "an ensemble has one direction"
            )
    return TranslationModel(members)
