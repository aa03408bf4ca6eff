"""Load once, translate often, from Python (`transformer.load`) or as a command that streams lines:

python -m transformer.translate --workdir=DIR < source.txt > translations.txt
"""

import argparse
import dataclasses
import functools
import itertools
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple, TypeVar, overload

from etils import epath

from transformer import command_line
from transformer.checkpoints.loading import Trained, load_trained
from transformer.config import validation
from transformer.data import text_files, texts
from transformer.decoding import alignment
from transformer.decoding.translator import Hypothesis, Translator, best_text
from transformer.runtime import compilation, streams
from transformer.runtime.errors import UserError

Item = TypeVar("Item")
PROGRAMS = 32  # ways of decoding whose compiled programs are kept


class LoadedModel:
    """A model, or several as an ensemble, read from workdirs; threads may share it.

    Each way of decoding is compiled once for each width of sentences, at first use, and kept.
    """

    def __init__(self, members: Sequence[Trained]):
        self._members = members
        model = members[0].model if len(members) == 1 else [member.model for member in members]
        self._params: Any = members[0].params if len(members) == 1 else tuple(member.params for member in members)
        self._translators = functools.lru_cache(PROGRAMS)(
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
        found = translator.hypotheses(
            self._params,
            sentences,
            n_best=1 if n_best is None else n_best,
            prefixes=prefixes,
            constraints=constraints,
            seed=seed,
        )
        translator.say_counts()
        return [best_text(one) for one in found] if n_best is None else found

    def translator(self, fields: dict[str, Any]) -> tuple[Translator, int]:
        """The translator that these decode fields ask for, the same one each time, and the seed."""
        decode = validation.with_decode(self.first.config, fields).decode
        for member in self._members[1:]:  # whose learned positions may cover less than this decoding asks for
            validation.resolve(dataclasses.asdict(dataclasses.replace(member.config, decode=decode)), is_new=False)
        with self._lock:
            return self._translators(dataclasses.replace(decode, seed=0)), decode.seed

    @property
    def first(self) -> Trained:
        """The model whose tokenizer and decoding are those of all."""
        return self._members[0]

    @property
    def params(self) -> Any:
        """What `Translator.translate` takes."""
        return self._params


def load(
    workdir: epath.PathLike, checkpoint: str | int = "latest", ensemble: Iterable[epath.PathLike] = ()
) -> LoadedModel:
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
    ensemble = texts.items(ensemble, "ensemble: expected a list of workdirs")
    members = [load_trained(folder, checkpoint) for folder in (workdir, *ensemble)]
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
    return LoadedModel(members)


def chunks(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Items, such as lines, in groups of `size`, the last one shorter."""
    group: list[Item] = []
    try:
        for item in items:
            group.append(item)
            if len(group) == size:
                yield group
                group = []
    except UserError:  # a line that is no text: those before it still count
        if group:
            yield group
        raise
    if group:
        yield group


def translate_stream(
    translate: Callable[[list[Item]], list[str]], items: Iterable[Item], out: BinaryIO, size: int
) -> None:
    """Writes the lines that `translate` gives for each group of `size` items, as soon as it has them."""
    for group in chunks(items, size):
        out.write(streams.printable("".join(f"{line}\n" for line in translate(group)), out).encode())
        out.flush()


class Line(NamedTuple):
    """A line of the source, numbered from 1, with its lines of the other files."""

    number: int
    source: str
    prefix: str | None
    phrases: list[str] | None


def read_together(
    sources: Iterable[str], prefix_file: epath.PathLike | None, constraint_file: epath.PathLike | None
) -> Iterator[Line]:
    """Lines that belong together.

    A line of the constraint file holds the phrases of its sentence with tabs between; an empty one, none.

    Raises:
      UserError: the files have different counts of lines.
    """
    others = [text_files.read_lines(path) if path else itertools.repeat("") for path in (prefix_file, constraint_file)]
    end = object()
    for number, source in enumerate(itertools.chain(sources, [end]), 1):
        prefix, phrases = (next(lines, end) for lines in others)
        for path, line in ((prefix_file, prefix), (constraint_file, phrases)):
            if path and (source is end) != (line is end):
                less, more = ("stdin", path) if source is end else (path, "stdin")
                raise UserError(f"{less} has {number - 1:,} lines and {more} has more: expected one for each sentence")
        if source is end:
            return
        split = str(phrases).split("\t") if phrases else []
        yield Line(number, str(source), str(prefix) if prefix_file else None, split if constraint_file else None)


def main(argv: list[str]) -> None:
    """Reads source lines on stdin and writes their translations to stdout, one for one."""
    fields, rest = command_line.decode_flags(argv)
    args = _parse(rest)
    for flag, name, values in (
        ("--beam_size", "beam_size", {"beam_size": args.beam_size}),
        ("--mbr", "mbr_samples", {"method": "mbr", "mbr_samples": args.mbr}),
    ):
        if values[name]:
            twice = sorted(fields.keys() & values.keys())
            if twice:
                raise UserError(f"{flag} and --decode.{twice[0]} set the same; give one of them")
            fields.update(values)
    compilation.enable_cache()
    loaded = load(args.workdir, args.checkpoint, args.ensemble)
    translator, seed = loaded.translator(fields)
    # Alignments cut a long source where decoding does.
    first = dataclasses.replace(loaded.first, config=validation.with_decode(loaded.first.config, fields))

    def translate(group: list[Line], note: alignment.Note) -> list[str]:
        found = translator.hypotheses(
            loaded.params,
            [line.source for line in group],
            n_best=args.n_best or 1,
            prefixes=[line.prefix or "" for line in group] if args.prefix_file else None,
            constraints=[line.phrases or [] for line in group] if args.constraint_file else None,
            seed=seed,
            first=group[0].number,
        )
        if args.n_best is None:
            best = [best_text(one) for one in found]
            note([line.source for line in group], best)
            return best
        return [
            f"{line.number - 1} ||| {one.text} ||| {one.score:.6f}"
            for line, several in zip(group, found, strict=True)
            for one in several
        ]

    lines = read_together(text_files.decode_lines(sys.stdin.buffer, "stdin"), args.prefix_file, args.constraint_file)
    try:
        with alignment.recorded(args, first) as note:
            translate_stream(functools.partial(translate, note=note), lines, sys.stdout.buffer, args.batch_size)
    finally:
        translator.say_counts()


def _parse(rest: list[str]) -> argparse.Namespace:
    """Reads the flags other than --decode.FIELD."""
    parser = argparse.ArgumentParser(
        prog="python -m transformer.translate",
        description=main.__doc__,
        epilog="--decode.FIELD=VALUE sets any field of the decode section of transformer/config/schema.py.",
        allow_abbrev=False,
    )
    positive, path = command_line.positive_int, command_line.full_path
    command_line.add_model_flags(parser)
    parser.add_argument("--batch_size", type=positive, default=256, help="lines read before the first is written")
    parser.add_argument("--beam_size", type=positive, help="the same as --decode.beam_size")
    parser.add_argument(
        "--n_best", type=positive, help="write up to so many lines for each: INDEX ||| TEXT ||| SCORE, INDEX from 0"
    )
    parser.add_argument(
        "--prefix_file", type=path, help="for each line what its translation begins with; a blank line asks nothing"
    )
    parser.add_argument(
        "--constraint_file", type=path, help="for each line the phrases its translation holds, tabs between"
    )
    parser.add_argument(
        "--ensemble",
        type=command_line.full_paths,
        default=[],
        help="more workdirs of the same tokenizer, commas between: the models' probabilities are averaged",
    )
    parser.add_argument("--mbr", type=positive, help="of so many samples, the one most like the others by chrF")
    alignment.add_flags(parser)
    args = parser.parse_args(rest)
    alignment.check_flags(args)
    if args.n_best and (args.alignments or args.attention):
        raise UserError("--alignments and --attention are of one translation a line; leave out --n_best")
    return args


if __name__ == "__main__":
    command_line.run(main)
