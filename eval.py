"""Translates a test set with a checkpoint and scores it: a table on stderr, one JSON object last on stdout.

    python eval.py --workdir=DIR [--checkpoint=WHICH] [--split=test]
    python eval.py --workdir=DIR --source=FILE --reference=FILE[,FILE…]
    python eval.py --workdir=DIR --test_set=wmt14/full
    python eval.py --workdir=DIR --versus=DIR-or-FILE [--versus_checkpoint=WHICH]
    python eval.py --workdir=DIR --watch
    python eval.py --workdir=DIR --target_language=CODE

WHICH is latest, best, a step, or the mean of several: average:N of the newest N, best-average:N of the N with
the best validation scores. Model, vocabulary and decoding settings are those saved with the checkpoint;
--decode.FIELD=VALUE overrides one, --metrics the scores. DIR/report.html shows scores, learning curves, sentences and
attention; DIR/reports/ keeps the report of each evaluation. Of a model of several directions, all are evaluated unless
--source_language and --target_language choose.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from etils import epath

from transformer import command_line
from transformer.config import mixture, schema
from transformer.distributed import multihost
from transformer.runtime import progress
from transformer.runtime.errors import UserError
from transformer.runtime.files import check_writable, reject_missing_workdirs
from transformer.runtime.logging import log_info

if TYPE_CHECKING:
    from transformer.checkpoints.loading import RestoredModel
    from transformer.evaluation.comparison import Comparison
    from transformer.evaluation.datasets import EvalDataset
    from transformer.evaluation.evaluator import EvalResult
    from transformer.evaluation.systems import System

NUM_SAMPLES = 5


def main(argv: list[str]) -> None:
    """Parses the flags before JAX is imported."""
    fields, rest = command_line.decode_flags(argv)
    args = parse(rest)

    if args.watch and fields:
        raise UserError(f"--watch uses the decode settings of each checkpoint; leave out --decode.{min(fields)}")
    if args.watch:  # beside training, which may have taken most of a GPU's memory
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    else:  # as --watch may wait for the run to begin
        reject_missing_workdirs(args.workdir)
    with multihost.initialize(args):
        if args.watch and multihost.process_count() > 1:
            raise UserError("--watch runs in one process, and this is one of several; start it on one machine alone")
        log_info(f"{args.workdir}: loading JAX …")
        from transformer.distributed import consistency

        consistency.assert_same_code()
        consistency.enable_compilation_cache()
        if args.watch:
            watch(args)
        else:
            evaluate(args, fields)


def evaluate(args: argparse.Namespace, fields: dict[str, Any]) -> None:
    """Evaluates one checkpoint, with these decode fields in place of those of its config."""
    from transformer.checkpoints.loading import load_checkpoint
    from transformer.evaluation import datasets, evaluator, report, results, summary, systems

    if args.output and multihost.is_primary():
        check_writable(args.output, f"--output={args.output}")
    restored = load_checkpoint(args.workdir, args.checkpoint)
    if args.metrics:
        chosen = dataclasses.replace(restored.config.eval, metrics=args.metrics.metrics)
        restored = dataclasses.replace(restored, config=dataclasses.replace(restored.config, eval=chosen))
    saved = restored.config.decode
    changed = {
        name: value
        for name, value in fields.items()
        if name not in schema.SPEED_FIELDS and value != getattr(saved, name)
    }
    restored = restored.with_decode(fields)
    directions = mixture.find_directions(restored.config.data, args.source_language, args.target_language)
    if len(directions) > 1:
        evaluate_directions(args, restored, directions, changed)
        return
    with multihost.primary_first("evaluation set"):
        dataset = datasets.load_eval_dataset(
            restored.config.data, args.split, args.source, args.reference, args.test_set, directions[0]
        )
    restored = restored.with_direction(directions[0])
    data = restored.config.data
    evaluator.assert_same_on_hosts(restored, dataset)
    baseline = None
    if args.versus:
        checkpoint = args.versus_checkpoint or ("latest" if args.checkpoint.isdecimal() else args.checkpoint)
        languages = data.source_language, data.target_language
        baseline = systems.baseline_system(args.versus, checkpoint, dataset, languages, fields)
    name = results.result_name(args.workdir, restored, dataset, changed)
    save = functools.partial(save_translations, args.output, results.translations_path(args.workdir, name))
    result = evaluator.CheckpointEvaluator(dataset).evaluate(restored, on_translated=save)
    log_samples(dataset, result)
    log_info(summary.format_table(restored, dataset, result))
    comparison = None
    if baseline:
        ours = systems.evaluated(args.workdir, restored, result.translations)
        comparison = compare_with_baseline(systems.label_pair(baseline, args.versus, ours), dataset, restored)
    with print_last(summary.as_json(restored, result, comparison)), progress.phase("writing the report"):
        report.write(args.workdir, name, restored, dataset, result, comparison)


def compare_with_baseline(pair: Sequence["System"], dataset: "EvalDataset", restored: "RestoredModel") -> "Comparison":
    """Compares the evaluated model, the second of the pair, with a baseline; logs what differs."""
    from transformer.evaluation import bleu_tokenizer, comparison, significance

    _, sources, references = dataset
    tokenizer = bleu_tokenizer.choose_bleu_tokenizer(restored.config.data, references[0]).name
    with progress.phase("comparing the systems"):
        found = comparison.compare(pair, sources, references, tokenizer, metrics=restored.config.eval.metric_names)
    log_info(f"\n{significance.format_table(pair[1].label, pair[0].label, found.tests[0])}\n")
    log_info(comparison.format_examples(found))
    return found


def evaluate_directions(
    args: argparse.Namespace, restored: "RestoredModel", directions: list[mixture.Direction], changed: dict[str, Any]
) -> None:
    """Evaluates each direction on its own data set; one table, one report, one JSON object."""
    from transformer.evaluation import datasets, directions_report, evaluator, results, summary
    from transformer.evaluation import report as reports

    for flag in ("source", "versus", "test_set", "output"):
        if getattr(args, flag):
            names, flags = ", ".join(each.name for each in directions), "--source_language and --target_language"
            raise UserError(f"--{flag} applies to one direction, got {names}: choose one by {flags}")
    loaded = []
    for direction in directions:  # all of them before the first is translated: one may be missing
        with multihost.primary_first("evaluation set"):
            dataset = datasets.load_eval_dataset(restored.config.data, args.split, None, None, direction=direction)
        own = restored.with_direction(direction)
        evaluator.assert_same_on_hosts(own, dataset)
        loaded.append((direction, own, dataset))
    evaluated, scorer = {}, evaluator.CheckpointEvaluator(loaded[0][2])
    for direction, own, dataset in loaded:
        name = results.result_name(args.workdir, own, dataset, changed)
        save = functools.partial(save_translations, None, results.translations_path(args.workdir, name))
        result = scorer.evaluate(own, dataset, save)
        log_samples(dataset, result, 1)
        evaluated[direction.name] = summary.Evaluated(own, dataset, result)
    log_info(summary.format_directions(restored, evaluated))
    first, of_first = next(iter(evaluated.items()))
    split = of_first.dataset.name.removesuffix(f".{first}")  # validation, where --split=val
    with print_last(summary.directions_as_json(evaluated)), progress.phase("writing the report"):
        page = directions_report.build(args.workdir, restored, evaluated, split)
        reports.save(args.workdir, f"{restored.tag}.{split}{results.decode_suffix(changed)}", page)


@contextlib.contextmanager
def print_last(scores: dict[str, Any]) -> Iterator[None]:
    """Prints scores as JSON after the block, even if that fails."""
    try:
        yield
    finally:
        if multihost.is_primary():
            print(json.dumps(scores), flush=True)


@multihost.primary_only
def save_translations(output: str | None, default: epath.Path, translations: list[str]) -> None:
    """Writes translations to `output` or else to the workdir; logs a warning if the latter is not writable."""
    from transformer.evaluation import results

    try:
        results.write_translations(translations, output or default)
    except UserError as error:
        if output:
            raise
        log_info(f"warning: translations were not saved: {error}")
        return
    log_info(f"translations: {output or default}")


def watch(args: argparse.Namespace) -> None:
    """Evaluates every new checkpoint; prints a JSON object a line on stdout."""
    from transformer.evaluation import continuous, datasets

    languages = args.source_language, args.target_language
    continuous.CheckpointWatcher(
        args.workdir,
        lambda config: datasets.load_eval_dataset(
            config.data,
            args.split,
            args.source,
            args.reference,
            args.test_set,
            mixture.find_direction(config.data, *languages),
        ),
        lambda entry: print(json.dumps(entry), flush=True),
        languages,
    ).run_forever()


def parse(rest: list[str]) -> argparse.Namespace:
    """Reads the flags other than --decode.FIELD."""
    parser = command_line.model_parser("eval.py", __doc__)
    parser.set_defaults(checkpoint=None)  # to tell whether it is given
    command_line.add_test_set_flags(parser, "the config's data set")
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
    command_line.add_metrics_flag(parser, "eval.metrics of the checkpoint's config")
    parser.add_argument("--watch", action="store_true", help="score every checkpoint as it lands, until a signal")
    command_line.add_direction_flags(parser)
    command_line.add_process_flags(parser)
    args = parser.parse_args(rest)
    if bool(args.source) != bool(args.reference):
        raise UserError("--source and --reference go together")
    command_line.check_test_set_flags(args)
    command_line.reject_overwriting(args.output, (args.source, args.versus, *args.reference))
    if args.versus_checkpoint and not args.versus:
        raise UserError("--versus_checkpoint goes with --versus=DIR, got none")
    if args.versus_checkpoint and epath.Path(args.versus).is_file():
        raise UserError(f"--versus_checkpoint goes with --versus=DIR, got the file {args.versus}")
    for flag in ("checkpoint", "output", "versus", "metrics"):
        if args.watch and getattr(args, flag):
            raise UserError(f"--watch scores every checkpoint by itself; leave out --{flag}")
    args.checkpoint = args.checkpoint or "latest"
    return args


def log_samples(dataset: "EvalDataset", result: "EvalResult", count: int = NUM_SAMPLES) -> None:
    """Logs a few evenly spaced sentences."""
    _, sources, references = dataset
    for i in range(0, len(sources), -(-len(sources) // count) or 1):
        translation = result.translations[i]
        log_info(f"  source      {sources[i]}\n  translation {translation}\n  reference   {references[0][i]}\n")


if __name__ == "__main__":
    command_line.run(main)
