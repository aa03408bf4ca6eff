"""Translates a corpus into training data: back-translation or distillation, resumable, by any number of commands.

    python -m transformer.translate_corpus --workdir=DIR --input='mono/*.de.xz' --input_side=target --output=FOLDER
    python -m transformer.translate_corpus --workdir=DIR --input=train.en --input_side=source --output=FOLDER

With --input_side=target the text becomes the target side and its translations the source: back-translation (Sennrich
et al. 2016), by a model of the other direction; --tag puts a token before each of them (Caswell et al. 2019). With
--input_side=source the translations become the target: sequence-level distillation (Kim and Rush 2016). FOLDER then has
train.LANG of both languages, which `data.dir` reads.
"""

import argparse
import dataclasses
import functools
import json
import re
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import transformer
from transformer import command_line
from transformer.config import mixture, schema
from transformer.config.mixture import Direction
from transformer.data import synthetic_corpus, text_files
from transformer.data.synthetic_corpus import InputText, Shard, SyntheticCorpus
from transformer.distributed import consistency, multihost
from transformer.runtime import commands, progress, signals
from transformer.runtime.errors import StoppedError, UserError
from transformer.runtime.files import reject_missing_workdirs
from transformer.runtime.logging import log_info

if TYPE_CHECKING:
    from transformer.inference import TranslationModel

SHARD_LINES = 10_000

Translate = Callable[[list[str], Callable[[int], None]], list[str]]


def main(argv: list[str]) -> None:
    """Reads the flags and the text before JAX is imported, then translates."""
    fields, rest = command_line.decode_flags(argv)
    args = _parse(rest)
    args.input = find_text(args.input)
    reject_missing_workdirs(args.workdir, *args.ensemble)
    with multihost.initialize(args):
        try:
            translate_corpus(args, fields)
        except StoppedError as error:
            multihost.stop_all(error)


def find_text(patterns: Sequence[str]) -> list[str]:
    """The files that the patterns name, each of which can be opened.

    Raises:
      UserError: there are none, or one cannot be opened.
    """
    paths = [path for pattern in patterns for path in text_files.expand(pattern, "--input")]
    for path in paths:
        text_files.check_readable(path)
    return paths


def translate_corpus(args: argparse.Namespace, fields: dict[str, Any]) -> None:
    """Translates the shards of this command that are missing, and joins all once none is.

    Args:
      args: the flags.
      fields: of decoding, in place of the checkpoint's own.
    """
    text = synthetic_corpus.scan(args.input)
    log_info(f"{text.num_lines:,} lines to translate; loading JAX and the model of {args.workdir} …")
    from transformer import inference

    consistency.assert_same_code()
    consistency.enable_compilation_cache()
    model = inference.load(args.workdir, args.checkpoint, args.ensemble)
    direction = mixture.find_direction(model.primary.config.data, args.source_language, args.target_language)
    corpus = open_corpus(args, fields, text, model, direction)
    if multihost.process_count() > 1:
        model = model.on_local_devices()
    translator, seed = model.translator(fields)
    translate = functools.partial(translator.translate, model.params, tag=direction.tag, seed=seed)
    shards = part_of(range(corpus.num_shards), *args.part)
    shards = part_of(shards, multihost.process_index(), multihost.process_count())
    with signals.catch_stop_signals(lambda: "this batch of sentences") as stop_signal:
        check_stop = functools.partial(_check_stop, corpus, stop_signal)
        try:
            translate_shards(corpus, shards, translate, args.tag, check_stop)
        finally:
            translator.log_warnings()
        multihost.barrier("shards")
        if multihost.is_primary():
            finish(corpus, check_stop)


def open_corpus(
    args: argparse.Namespace, fields: dict[str, Any], text: InputText, model: "TranslationModel", direction: Direction
) -> SyntheticCorpus:
    """Makes the folder of the corpus, or resumes what is there; on all processes.

    Raises:
      UserError: it was made with other settings, or processes differ in them or do not share the folder.
    """
    settings = describe_settings(args, fields, model)
    about = {
        "version": transformer.__version__,
        "workdirs": [args.workdir, *args.ensemble],
        "checkpoint": f"{args.checkpoint}: {model.primary.description}",
        "input": args.input,
    }
    languages = direction.data.source_language, direction.data.target_language
    corpus = SyntheticCorpus(args.output, text, languages, args.input_side, args.shard_lines, settings, about)
    remedy = "give every host the same flags, workdir and text"
    consistency.assert_equal("what is translated", f"{text.sha256} with {json.dumps(settings)}", remedy)
    with multihost.primary_first("folder of the corpus"):
        corpus.open()
    consistency.assert_shared_workdir(corpus.folder)
    if multihost.process_count() > 1 and multihost.is_primary():
        (corpus.folder / consistency.MARKER_FILE).unlink(missing_ok=True)
    return corpus


def describe_settings(args: argparse.Namespace, fields: dict[str, Any], model: "TranslationModel") -> dict[str, Any]:
    """All but text and shards that the corpus depends on: a resumed command must agree in it."""
    from transformer.checkpoints.loading import params_digest

    settings: dict[str, Any] = {}
    for number, (workdir, member) in enumerate(zip((args.workdir, *args.ensemble), model.models, strict=True), 1):
        settings[f"model{number}" if number > 1 else "model"] = {
            "steps": member.steps,
            "params": params_digest(workdir, member.steps),
            "average": "average" in member.tag,
            "tokenizer": member.tokenizer.digest,
        }
    decode = dataclasses.asdict(model.primary.with_decode(fields).config.decode)
    return {
        **settings,
        "decode": {name: value for name, value in decode.items() if name not in schema.SPEED_FIELDS},
        "tag": args.tag,
    }


def part_of(shards: Iterable[int], index: int, count: int) -> list[int]:
    """Every `count`-th shard, from the one of this index on."""
    return list(shards)[index::count]


def translate_shards(
    corpus: SyntheticCorpus, shards: Sequence[int], translate: Translate, tag: str, check_stop: Callable[[], None]
) -> None:
    """Translates those of the shards that are not there, except what other commands hold.

    Args:
      translate: lines and a function that counts finished ones → their translations.
      tag: put before each translation that is not blank; may be empty.
      check_stop: called after each batch; raises to stop.
    """
    missing = set(shards) & set(corpus.missing())
    total, num_blank, is_new = corpus.num_lines(shards), 0, True
    of_others: set[int] = set()  # which this command does not count
    done = total - corpus.num_lines(missing)
    if done:
        log_info(f"{corpus.folder}: resuming, {len(shards) - len(missing):,} of {len(shards):,} shards are there")
    with progress.shown(progress.Phase("translating", total, "lines", completed=done)) as translating:
        while missing and is_new:  # again, as a command that held a shard may have been killed
            is_new = False
            for shard in corpus.read(missing):
                check_stop()
                with corpus.claim(shard.number) as is_mine:
                    of_others = of_others - {shard.number} if is_mine else of_others | {shard.number}
                    translating.total = total - corpus.num_lines(of_others)
                    if is_mine:
                        num_blank += _translate_shard(corpus, shard, translate, tag, translating, check_stop)
                        is_new = True
            missing &= set(corpus.missing())
    if num_blank:
        log_info(f"warning: {num_blank:,} translations are blank; training leaves these pairs out")


def _translate_shard(
    corpus: SyntheticCorpus,
    shard: Shard,
    translate: Translate,
    tag: str,
    translating: progress.Phase,
    check_stop: Callable[[], None],
) -> int:
    """Translates and writes one shard; returns how many translations of lines that are not blank are blank."""
    before = translating.completed

    def advance(count: int) -> None:
        translating.advance(count)
        if (rate := translating.units_per_s) is not None:
            translating.note = f"{rate:,.{0 if rate >= 10 else 1}f} lines/s"
        check_stop()

    translations = translate(shard.lines, advance)
    corpus.write(shard.number, [f"{tag} {line}" if tag and line.strip() else line for line in translations])
    translating.completed = before + len(shard.lines)  # with blank ones, which are in no batch
    pairs = zip(shard.lines, translations, strict=True)
    return sum(bool(line.strip()) and not translation.strip() for line, translation in pairs)


def _check_stop(corpus: SyntheticCorpus, stop_signal: Callable[[], int | None]) -> None:
    """Raises a StoppedError if a stop signal has come."""
    if number := stop_signal():
        there = corpus.num_shards - len(corpus.missing())
        raise signals.stopped(number, f"{there:,} of {corpus.num_shards:,} shards are saved")


def finish(corpus: SyntheticCorpus, check_stop: Callable[[], None]) -> None:
    """Joins the shards if all are there, and logs how to train on them; else logs what is missing."""
    if missing := corpus.missing():
        log_info(
            f"{corpus.folder}: {len(missing):,} of {corpus.num_shards:,} shards are left to other commands, from shard "
            f"{missing[0]} on; the last of them writes the files. Run again if one was stopped"
        )
        return
    corpus.join(check_stop)
    source, target = corpus.paths
    languages = f"--config.data.source_language={source.suffix[1:]} --config.data.target_language={target.suffix[1:]}"
    log_info(f"{source} and {target}: {corpus.num_lines(range(corpus.num_shards)):,} pairs")
    log_info(
        f"train on them: {commands.spelled('train')} --config=configs/text.py --workdir=WORKDIR "
        f"--config.data.dir={corpus.folder} {languages}"
    )


def _parse(rest: list[str]) -> argparse.Namespace:
    """Reads the flags other than --decode.FIELD."""
    parser = command_line.model_parser("python -m transformer.translate_corpus", __doc__)
    parser.add_argument(
        "--input",
        required=True,
        type=command_line.absolute_paths,
        help="text to translate, one sentence a line, perhaps .gz, .xz or .zst; several files by * ? [ ] or commas",
    )
    parser.add_argument(
        "--input_side",
        required=True,
        choices=synthetic_corpus.INPUT_SIDES,
        help="side of the new pairs that the text is: target for back-translation, source for distillation",
    )
    parser.add_argument(
        "--output", required=True, type=command_line.absolute_path, help="folder of the corpus; run again to resume it"
    )
    parser.add_argument(
        "--tag", default="", help="a word put before each translation, such as <bt>; with --input_side=target"
    )
    parser.add_argument(
        "--shard_lines",
        type=command_line.positive_int,
        default=SHARD_LINES,
        help=f"lines that are translated and saved at once (default: {SHARD_LINES:,})",
    )
    parser.add_argument(
        "--part",
        type=_part,
        default=(0, 1),
        metavar="I/N",
        help="translate every N-th shard from the I-th on, I from 1; for several commands on one folder without locks",
    )
    command_line.add_ensemble_flag(parser)
    command_line.add_direction_flags(parser)
    command_line.add_process_flags(parser)
    args = parser.parse_args(rest)
    if args.tag and args.input_side == "source":
        raise UserError("--tag marks synthetic sources: it goes with --input_side=target, got --input_side=source")
    if args.tag != "".join(args.tag.split()):
        raise UserError(f"--tag={args.tag!r}: expected one word without spaces, such as <bt>")
    return args


def _part(text: str) -> tuple[int, int]:
    """The argparse type of --part: I/N → the index from 0, and N."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"expected I/N with I from 1 to N, such as 1/4, got {text!r}")
    return int(match[1]) - 1, int(match[2])


if __name__ == "__main__":
    command_line.run(main)
