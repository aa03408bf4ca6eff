"""The translate command: streams lines from stdin to stdout. Its Python API is `transformer.load`.

python -m transformer.translate --workdir=DIR < source.txt > translations.txt
python -m transformer.translate --workdir=DIR    # translates each line that is typed, until Ctrl-D
"""

import argparse
import contextlib
import dataclasses
import itertools
import os
import signal
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple, TypeVar

import numpy as np
from etils import epath

from transformer import command_line
from transformer.checkpoints.loading import RestoredModel
from transformer.command_line import absolute_path, positive_int
from transformer.data import text_files
from transformer.data.tokenizer import Tokenizer
from transformer.decoding.alignment import Aligner, Alignment, Attention, to_pharaoh
from transformer.decoding.translator import Hypothesis, first_text
from transformer.inference import load
from transformer.runtime import environment, progress, streams
from transformer.runtime.errors import StoppedError, UserError
from transformer.runtime.files import open_atomic, user_error_on_oserror
from transformer.runtime.logging import log_info

MAX_LINES = 4096  # read before the first is written, by default

Item = TypeVar("Item")


def batched(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Yields items in groups of `size`, the last one shorter."""
    group: list[Item] = []
    try:
        for item in items:
            group.append(item)
            if len(group) == size:
                yield group
                group = []
    except UserError:  # an invalid line: those before it are still translated
        if group:
            yield group
        raise
    if group:
        yield group


def translate_stream(
    translate: Callable[[list[Item]], list[str]], items: Iterable[Item], out: BinaryIO, size: int
) -> None:
    """Writes the lines that `translate` returns for each group of `size` items, group by group."""
    with progress.phase("translating", unit="lines") as translating:
        for group in batched(items, size):
            lines = translate(group)
            with progress.hidden():
                write_lines(lines, out)
            translating.advance(len(group))


def translate_interactively(translate: Callable[[list[Item]], list[str]], items: Iterable[Item], out: BinaryIO) -> None:
    """Writes the lines that `translate` returns for each item before the next is read.

    Raises:
      StoppedError: by SIGINT. A second one ends the process at once, even while a program is compiled.
    """

    def stop(number: int, _: object) -> None:
        signal.signal(number, signal.SIG_DFL)
        log_info("")  # ends the line on which the terminal shows ^C
        raise StoppedError(number, "")

    previous = signal.signal(signal.SIGINT, stop)
    log_info("ready")
    try:
        for item in items:
            with progress.phase("translating"):
                lines = translate([item])
            write_lines(lines, out)
    finally:
        signal.signal(signal.SIGINT, previous)


def write_lines(lines: Iterable[str], out: BinaryIO) -> None:
    """Writes lines at once."""
    out.write(streams.printable("".join(f"{line}\n" for line in lines), out).encode())
    out.flush()


class Line(NamedTuple):
    """A source line, numbered from 1, with its prefix and phrases."""

    number: int
    source: str
    prefix: str | None
    phrases: list[str] | None


def read_aligned_lines(
    sources: Iterable[str], prefix_file: epath.PathLike | None, constraint_file: epath.PathLike | None
) -> Iterator[Line]:
    """Reads sources, prefixes and phrases line by line.

    Phrases of a line of the constraint file are separated by tabs.

    Raises:
      UserError: the numbers of lines differ.
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


def format_nbest(lines: Sequence[Line], translations: Sequence[Sequence[Hypothesis]]) -> list[str]:
    """Lines of n-best lists, `INDEX ||| TEXT ||| SCORE`, INDEX from 0."""
    return [
        f"{line.number - 1} ||| {hypothesis.text} ||| {hypothesis.score:.6f}"
        for line, hypotheses in zip(lines, translations, strict=True)
        for hypothesis in hypotheses
    ]


def main(argv: list[str]) -> None:
    """Reads source lines on stdin and writes their translations to stdout, one for one; at a terminal line by line."""
    fields, rest = command_line.decode_flags(argv)
    args = _parse(rest)
    fields = _add_shorthands(fields, args)
    environment.enable_compilation_cache()
    model = load(args.workdir, args.checkpoint, args.ensemble)
    translator, seed = model.translator(fields)
    tag = model.source_tag(args.source_language, args.target_language)

    def translate(group: list[Line]) -> list[str]:
        sources = [line.source for line in group]
        translations = translator.translate_nbest(
            model.params,
            sources,
            n_best=args.n_best or 1,
            prefixes=[line.prefix for line in group] if args.prefix_file else None,
            constraints=[line.phrases for line in group] if args.constraint_file else None,
            seed=seed,
            first=group[0].number,
            tag=tag,
        )
        if args.n_best:
            return format_nbest(group, translations)
        texts = [first_text(hypotheses) for hypotheses in translations]
        write_alignments(sources, texts)
        return texts

    stdin = text_files.decode_lines(sys.stdin.buffer, "stdin")
    lines = read_aligned_lines(stdin, args.prefix_file, args.constraint_file)
    # With the fields of this command: alignments truncate a long source as decoding does.
    stopped = None
    try:
        trained = dataclasses.replace(model.primary.with_decode(fields), source_tag=tag)
        with alignment_writer(args, trained) as write_alignments:
            if sys.stdin.isatty():
                try:
                    translate_interactively(translate, lines, sys.stdout.buffer)
                except StoppedError as error:  # a usual end: the alignments so far are kept
                    stopped = error
            else:
                batch_size = args.batch_size or min(16 * translator.rows, MAX_LINES)
                translate_stream(translate, lines, sys.stdout.buffer, batch_size)
    finally:
        translator.log_warnings()
    if stopped:
        raise stopped


def _add_shorthands(fields: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Adds the decode fields of --beam_size and --mbr.

    Raises:
      UserError: a --decode flag sets one of them too.
    """
    for flag, shorthand in (
        ("--beam_size", {"beam_size": args.beam_size} if args.beam_size else {}),
        ("--mbr", {"method": "mbr", "mbr_samples": args.mbr} if args.mbr else {}),
    ):
        if conflicts := sorted(fields.keys() & shorthand.keys()):
            raise UserError(f"{flag} and --decode.{conflicts[0]} set the same; give one of them")
        fields = fields | shorthand
    return fields


def _parse(rest: list[str]) -> argparse.Namespace:
    """Reads the flags other than --decode.FIELD."""
    parser = command_line.model_parser("python -m transformer.translate", main.__doc__)
    parser.add_argument(
        "--batch_size",
        type=positive_int,
        help="lines read before the first is written; typed ones are translated one by one (default: 16 times "
        f"the sentences decoded at once, at most {MAX_LINES:,})",
    )
    parser.add_argument("--beam_size", type=positive_int, help="the same as --decode.beam_size")
    parser.add_argument(
        "--n_best", type=positive_int, help="write up to so many lines for each: INDEX ||| TEXT ||| SCORE, INDEX from 0"
    )
    parser.add_argument(
        "--prefix_file", type=absolute_path, help="for each line what its translation begins with, or a blank line"
    )
    parser.add_argument(
        "--constraint_file", type=absolute_path, help="for each line the phrases its translation holds, tabs between"
    )
    command_line.add_ensemble_flag(parser)
    command_line.add_direction_flags(parser)
    parser.add_argument("--mbr", type=positive_int, help="of so many samples, the one most like the others by chrF")
    add_alignment_flags(parser)
    args = parser.parse_args(rest)
    check_alignment_flags(args)
    if args.n_best and (args.alignments or args.attention):
        raise UserError("--alignments and --attention are of one translation a line; leave out --n_best")
    return args


WriteAlignments = Callable[[Sequence[str], Sequence[str]], None]


def add_alignment_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that `alignment_writer` reads."""
    parser.add_argument(
        "--alignments", type=absolute_path, help="write word alignments there, 0-0 1-2 ..., a line for each translation"
    )
    parser.add_argument(
        "--attention", type=absolute_path, help="write the attention to the source there, an .npz of arrays"
    )
    parser.add_argument(
        "--alignment_layer",
        type=positive_int,
        help="of the decoder, from 1 (default: the last of up to three layers, else the last but one)",
    )


def check_alignment_flags(args: argparse.Namespace) -> None:
    """Raises a UserError for flags that do not go together."""
    if args.alignment_layer and not args.alignments:
        raise UserError("--alignment_layer goes with --alignments=FILE, got none; --attention has all layers")
    if args.alignments and args.attention and os.path.realpath(args.alignments) == os.path.realpath(args.attention):
        raise UserError(f"--alignments and --attention are both {args.alignments}; name two files")


@contextlib.contextmanager
def alignment_writer(args: argparse.Namespace, trained: RestoredModel) -> Iterator[WriteAlignments]:
    """Yields a function that writes alignments and attention of sources and translations to the files of the flags.

    The files appear when the block ends without an error. The .npz holds, for line n from 0, `weights_n` float32
    [L, H, T, S] and the subword tokens `source_n` and `target_n`; blank lines are left out.
    """
    config = trained.config
    if not (args.alignments or args.attention):
        yield lambda sources, translations: None
        return
    aligner = Aligner(trained.model, trained.tokenizer, config.decode, trained.mesh, args.alignment_layer)
    num_lines = 0
    with contextlib.ExitStack() as stack:
        lines = _open(stack, args.alignments)
        arrays = _open(stack, args.attention)
        archive = arrays and stack.enter_context(zipfile.ZipFile(arrays, "w", zipfile.ZIP_DEFLATED))

        def write(sources: Sequence[str], translations: Sequence[str]) -> None:
            nonlocal num_lines
            alignments: list[Alignment] = [[] for _ in sources]
            for index, attention in aligner.attention(trained.params, sources, translations, trained.source_tag):
                if lines:
                    alignments[index] = aligner.word_alignment(attention)
                if archive:
                    _write_npz(archive, num_lines + index, attention, trained.tokenizer)
            if lines:
                lines.write("".join(f"{to_pharaoh(alignment)}\n" for alignment in alignments).encode())
            num_lines += len(sources)

        yield write


def _open(stack: contextlib.ExitStack, path: str | None) -> BinaryIO | None:
    if not path:
        return None
    stack.enter_context(user_error_on_oserror(path))
    return stack.enter_context(open_atomic(path))


def _write_npz(archive: zipfile.ZipFile, number: int, attention: Attention, tokenizer: Tokenizer) -> None:
    arrays = {
        "weights": attention.weights_LHTS,
        "source": np.array(tokenizer.pieces(attention.source)),
        "target": np.array(tokenizer.pieces(attention.target)),
    }
    for name, array in arrays.items():
        with archive.open(f"{name}_{number}.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array(file, array, allow_pickle=False)


if __name__ == "__main__":
    command_line.run(main)
