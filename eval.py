"""Translates a test set with a checkpoint and scores it: a table on stderr, one JSON object last on stdout.

    python eval.py --workdir=DIR [--checkpoint=WHICH] [--split=test]
    python eval.py --workdir=DIR --source=FILE --reference=FILE[,FILE…]
    python eval.py --workdir=DIR --versus=DIR-or-FILE [--versus_checkpoint=WHICH]
    python eval.py --workdir=DIR --watch

WHICH is latest, best, a step, or the mean of several: average:N of the newest N, best-average:N of the N with
the best validation scores. Model, vocabulary and decoding settings are those saved with the checkpoint;
--decode.FIELD=VALUE sets another. DIR/report.html shows it all: scores, learning curves, sentences, attention;
DIR/reports/ keeps one of each evaluation.
"""

import argparse
import dataclasses
import json
import os
from typing import TYPE_CHECKING, Any

from etils import epath

from transformer import command_line
from transformer.distributed import multihost
from transformer.runtime.errors import UserError
from transformer.runtime.files import check_writable, user_error_on_oserror
from transformer.runtime.logging import log_info

if TYPE_CHECKING:
    from transformer.checkpoints.loading import RestoredModel
    from transformer.evaluation.evaluator import Evaluation, Scorer

SAMPLES = 5


def main(argv: list[str]) -> None:
    """Checks its flags before it imports JAX."""
    fields, rest = command_line.decode_flags(argv)
    args = parse(rest)

    if args.watch and fields:
        raise UserError(f"--watch decodes as each checkpoint says; leave out --decode.{min(fields)}")
    if args.watch and multihost.is_multiprocess(args):
        raise UserError("--watch runs in one process; start it on one host alone")
    with multihost.initialize(args):
        from transformer.runtime import environment

        environment.enable_compilation_cache()
        if args.watch:
            watch(args)
        else:
            evaluate(args, fields)


def evaluate(args: argparse.Namespace, fields: dict[str, Any]) -> None:
    """Once, of one checkpoint, decoding as its config says but for these fields."""
    from transformer.checkpoints.loading import load_checkpoint
    from transformer.config import validation
    from transformer.distributed import consistency
    from transformer.evaluation import bleu_tokenizer, evaluator, report, significance, summary

    if args.output:
        check_output(args.output)
    consistency.assert_same_code()
    trained = load_checkpoint(args.workdir, args.checkpoint)
    changed = {name: value for name, value in fields.items() if value != getattr(trained.config.decode, name)}
    trained = dataclasses.replace(trained, config=validation.with_decode(trained.config, fields))
    data = trained.config.data
    with multihost.primary_first("evaluation set"):
        chosen = evaluator.open_set(data, args.split, args.source, args.reference)
    evaluator.check_hosts(trained, chosen)
    other = None
    if args.versus:
        which = args.versus_checkpoint or ("latest" if args.checkpoint.isdecimal() else args.checkpoint)
        other = evaluator.translations_of_other(args.versus, which, chosen, data.target_language, fields)
    evaluation = with_bar(evaluator.Scorer(chosen), trained)
    show_samples(evaluation)
    log_info(summary.table(evaluation))
    save_translations(evaluation, args.output, evaluator.translations_path(args.workdir, trained, chosen, changed))
    versus = None
    if other:
        ours = evaluation.report.translations
        tokenizer = bleu_tokenizer.choose(data, chosen.references[0]).name
        versus = significance.against(*other, ours, chosen.references, tokenizer)
        log_info(f"\n{significance.table(versus)}\n")
        log_info(significance.examples(versus, chosen.sources, chosen.references, ours))
    report.write(args.workdir, evaluation, versus, changed)
    if multihost.is_primary():
        print(json.dumps(summary.as_json(evaluation, versus)))


@multihost.primary_only
def check_output(path: str) -> None:
    """Before anything is translated."""
    with user_error_on_oserror(f"--output={path}"):
        check_writable(path)


@multihost.primary_only
def save_translations(evaluation: "Evaluation", asked: str | None, usual: epath.Path) -> None:
    """Where it was asked for, or in the workdir: if that cannot be written it costs the file, not the scores."""
    from transformer.evaluation import evaluator

    try:
        evaluator.write_translations(evaluation, asked or usual)
    except UserError as error:
        if asked:
            raise
        log_info(f"warning: no file of translations: {error}")
        return
    log_info(f"translations: {asked or usual}")


def watch(args: argparse.Namespace) -> None:
    """Every checkpoint as it lands; a JSON object a line on stdout."""
    from transformer.evaluation import continuous, evaluator

    continuous.Watch(
        args.workdir,
        lambda config: evaluator.open_set(config.data, args.split, args.source, args.reference),
        lambda entry: print(json.dumps(entry), flush=True),
    ).until_stopped()


def parse(rest: list[str]) -> argparse.Namespace:
    """Reads the flags other than --decode.FIELD."""
    parser = argparse.ArgumentParser(
        prog="eval.py",
        description=(__doc__ or "").split("\n")[0],
        epilog="--decode.FIELD=VALUE sets any field of the decode section of transformer/config/schema.py.",
        allow_abbrev=False,
    )
    parser.add_argument("--workdir", required=True, type=command_line.absolute_path, help="folder that train.py wrote")
    parser.add_argument("--checkpoint", help="latest (default), best, a step, average:N or best-average:N")
    parser.add_argument("--split", help="split of the config's data set, such as validation (default: test)")
    parser.add_argument(
        "--source", type=command_line.absolute_path, help="text file to translate instead, one sentence a line"
    )
    parser.add_argument(
        "--reference",
        type=command_line.absolute_paths,
        default=[],
        help="its references; several files with commas between",
    )
    parser.add_argument(
        "--output",
        type=command_line.absolute_path,
        help="where translations go (default: WORKDIR/translations/STEP.NAME.txt, with decode fields in it)",
    )
    parser.add_argument(
        "--versus",
        type=command_line.absolute_path,
        help="another workdir, or a file of translations: is the difference more than chance?",
    )
    parser.add_argument("--versus_checkpoint", help="of that workdir (default: as --checkpoint; latest for a step)")
    parser.add_argument("--watch", action="store_true", help="score every checkpoint as it lands, until a signal")
    command_line.add_process_flags(parser)
    args = parser.parse_args(rest)
    if bool(args.source) != bool(args.reference):
        raise UserError("--source and --reference go together")
    read = filter(None, (args.source, args.versus, *args.reference))
    if args.output and os.path.realpath(args.output) in map(os.path.realpath, read):
        raise UserError(f"--output={args.output} would overwrite what is read; name another file")
    if args.source and args.split:
        raise UserError("expected --split, or --source with --reference, got both")
    if args.versus_checkpoint and not args.versus:
        raise UserError("--versus_checkpoint goes with --versus=DIR, got none")
    for flag in ("checkpoint", "output", "versus"):
        if args.watch and getattr(args, flag):
            raise UserError(f"--watch scores every checkpoint by itself; leave out --{flag}")
    args.checkpoint = args.checkpoint or "latest"
    return args


def with_bar(scorer: "Scorer", trained: "RestoredModel") -> "Evaluation":
    """Evaluates, with a progress bar on a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(f"translating {scorer.chosen.name}", total=len(scorer.chosen.sources))
        return scorer.evaluate(trained, lambda done: bar.advance(task, advance=done))


def show_samples(evaluation: "Evaluation") -> None:
    """A few sentences, spread over the set."""
    _, sources, references = evaluation.chosen
    for i in range(0, len(sources), -(-len(sources) // SAMPLES) or 1):
        translation = evaluation.report.translations[i]
        log_info(f"  source      {sources[i]}\n  translation {translation}\n  reference   {references[0][i]}\n")


if __name__ == "__main__":
    command_line.run(main)
