"""Load once, translate often, from Python (`transformer.load`) or as a command that streams lines:

python -m transformer.translate --workdir=DIR < source.txt > translations.txt
"""

import argparse
import contextlib
import dataclasses
import functools
import itertools
import os
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import BinaryIO, NamedTuple, TypeVar

import numpy as np
from etils import epath

from transformer import command_line
from transformer.checkpoints.loading import RestoredModel
from transformer.command_line import absolute_path, positive_int
from transformer.config import validation
from transformer.data import text_files
from transformer.data.tokenizer import Tokenizer
from transformer.decoding.alignment import Aligner, Alignment, Attention, to_pharaoh
from transformer.decoding.translator import first_text
from transformer.inference import load
from transformer.runtime import environment, streams
from transformer.runtime.errors import UserError
from transformer.runtime.files import open_atomic, user_error_on_oserror

Item = TypeVar("Item")


def batched(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
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
    for group in batched(items, size):
        out.write(streams.printable("".join(f"{line}\n" for line in translate(group)), out).encode())
        out.flush()


class Line(NamedTuple):
    """A line of the source, numbered from 1, with its lines of the other files."""

    number: int
    source: str
    prefix: str | None
    phrases: list[str] | None


def read_aligned_lines(
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
    environment.enable_compilation_cache()
    loaded = load(args.workdir, args.checkpoint, args.ensemble)
    translator, seed = loaded.translator(fields)
    # Alignments cut a long source where decoding does.
    first = dataclasses.replace(loaded.first, config=validation.override_decode(loaded.first.config, fields))

    def translate(group: list[Line], note: Note) -> list[str]:
        found = translator.translate_nbest(
            loaded.params,
            [line.source for line in group],
            n_best=args.n_best or 1,
            prefixes=[line.prefix or "" for line in group] if args.prefix_file else None,
            constraints=[line.phrases or [] for line in group] if args.constraint_file else None,
            seed=seed,
            first=group[0].number,
        )
        if args.n_best is None:
            best = [first_text(one) for one in found]
            note([line.source for line in group], best)
            return best
        return [
            f"{line.number - 1} ||| {one.text} ||| {one.score:.6f}"
            for line, several in zip(group, found, strict=True)
            for one in several
        ]

    lines = read_aligned_lines(
        text_files.decode_lines(sys.stdin.buffer, "stdin"), args.prefix_file, args.constraint_file
    )
    try:
        with alignment_writer(args, first) as note:
            translate_stream(functools.partial(translate, note=note), lines, sys.stdout.buffer, args.batch_size)
    finally:
        translator.log_warnings()


def _parse(rest: list[str]) -> argparse.Namespace:
    """Reads the flags other than --decode.FIELD."""
    parser = argparse.ArgumentParser(
        prog="python -m transformer.translate",
        description=main.__doc__,
        epilog="--decode.FIELD=VALUE sets any field of the decode section of transformer/config/schema.py.",
        allow_abbrev=False,
    )
    positive, path = command_line.positive_int, command_line.absolute_path
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
        type=command_line.absolute_paths,
        default=[],
        help="more workdirs of the same tokenizer, commas between: the models' probabilities are averaged",
    )
    parser.add_argument("--mbr", type=positive, help="of so many samples, the one most like the others by chrF")
    add_alignment_flags(parser)
    args = parser.parse_args(rest)
    check_alignment_flags(args)
    if args.n_best and (args.alignments or args.attention):
        raise UserError("--alignments and --attention are of one translation a line; leave out --n_best")
    return args


Note = Callable[[Sequence[str], Sequence[str]], None]


def add_alignment_flags(parser: argparse.ArgumentParser) -> None:
    """What `recorded` reads."""
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
def alignment_writer(args: argparse.Namespace, trained: RestoredModel) -> Iterator[Note]:
    """What to call with sources and their translations, to note them in the files that the flags name.

    The files take their place when the block ends, and never if it fails. The .npz holds, for line n from 0,
    `weights_n` float32 [L, H, T, S] and the pieces `source_n` and `target_n`; blank lines are left out.
    """
    config = trained.config
    if not (args.alignments or args.attention):
        yield lambda sources, translations: None
        return
    layers = config.model.num_cross_attention_layers
    aligner = Aligner(trained.model, trained.tokenizer, layers, config.decode, trained.mesh, args.alignment_layer)
    done = 0
    with contextlib.ExitStack() as stack:
        lines = _open(stack, args.alignments)
        arrays = _open(stack, args.attention)
        archive = arrays and stack.enter_context(zipfile.ZipFile(arrays, "w", zipfile.ZIP_DEFLATED))

        def note(sources: Sequence[str], translations: Sequence[str]) -> None:
            nonlocal done
            links: list[Alignment] = [[] for _ in sources]
            for place, attention in aligner.attention(trained.params, sources, translations):
                if lines:
                    links[place] = aligner.word_alignment(attention)
                if archive:
                    _write_npz(archive, done + place, attention, trained.tokenizer)
            if lines:
                lines.write("".join(f"{to_pharaoh(each)}\n" for each in links).encode())
            done += len(sources)

        yield note


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
