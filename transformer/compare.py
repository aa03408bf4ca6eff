"""Compares systems on a test set: a page of scores, significance, breakdowns and sentences.

    python -m transformer.compare runs/a runs/b [runs/c …]
    python -m transformer.compare a.txt b.txt --reference=FILE[,FILE…] [--source=FILE]
    python -m transformer.compare a.txt b.txt --test_set=wmt14/full --language_pair=en-de

Each system is a workdir, of which the newest translations by eval.py are taken, or a file of translations, one sentence
a line, of any program. The first one is the baseline. A table goes to stderr, one JSON object last to stdout.
"""

import argparse
import dataclasses
import json
import os
from collections.abc import Iterable

from etils import epath

from transformer import command_line
from transformer.config import Config, DataConfig, mixture
from transformer.data import corpus, text_files
from transformer.evaluation import (
    bleu_tokenizer,
    comparison,
    comparison_html,
    public_test_sets,
    significance,
    systems,
)
from transformer.evaluation.datasets import EvalDataset, load_eval_dataset
from transformer.evaluation.report_html import render_page
from transformer.evaluation.systems import System
from transformer.runtime import progress
from transformer.runtime.errors import UserError
from transformer.runtime.files import check_writable, user_error_on_oserror, write_atomic
from transformer.runtime.logging import log_info


def main(argv: list[str]) -> None:
    """Reads the translations, compares them, writes the page."""
    args = _parse(argv[1:])
    check_writable(args.output, f"--output={args.output}")
    dataset, config, training = load_test_set(args)
    compared = load_systems(args.systems, dataset)
    tokenizer = bleu_tokenizer.choose_bleu_tokenizer(config.data, dataset.references[0])
    log_info(str(tokenizer))
    metrics = (args.metrics or config.eval).metric_names
    with progress.phase("comparing the systems"):
        result = comparison.compare(
            compared,
            dataset.sources,
            dataset.references,
            tokenizer.name,
            training,
            os.path.basename(args.frequency_corpus or "training text"),
            metrics=metrics,
        )
    for system, tests in zip(compared[1:], result.tests, strict=True):
        log_info(f"\n{significance.format_table(system.label, compared[0].label, tests)}\n")
    subtitle = f"{dataset.name}, {len(dataset.references[0]):,} sentences · " + " · ".join(
        f"{system.label}: {system.name}" for system in compared
    )
    *first, last = (system.label for system in compared)
    title = f"{', '.join(first)} and {last}"
    with user_error_on_oserror(f"--output={args.output}"):
        write_atomic(args.output, render_page(f"{title} compared", subtitle, comparison_html.sections(result)))
    log_info(f"page: {args.output}")
    print(json.dumps({**comparison.as_json(result), "page": args.output}))


def load_test_set(args: argparse.Namespace) -> tuple[EvalDataset, Config, Iterable[str] | None]:
    """The files of the flags, a public test set, or the split of the first workdir.

    Returns:
      The data set, whose sources are empty if they are unknown; the config of the metrics and of BLEU's tokenizer; and
      the text in which words are counted, None for the references.

    Raises:
      UserError: there is neither, or a file is missing.
    """
    workdirs = [path for path in args.systems if epath.Path(path).is_dir()]
    config = systems.read_config(workdirs[0]) if workdirs else Config(data=DataConfig(target_language=""))
    data = config.data
    training: Iterable[str] | None = None
    if args.frequency_corpus:
        with text_files.open_bytes(args.frequency_corpus):  # a missing file is an error now, not after all tests
            training = text_files.read_lines(args.frequency_corpus)
    if not workdirs:
        if args.source_language or args.target_language:
            raise UserError("--source_language and --target_language choose a direction of a workdir, got none")
        if not args.reference and not args.test_set:
            raise UserError(
                "files of translations need --reference=FILE or --test_set=NAME, got none; --source=FILE is optional"
            )
        if args.test_set:
            source, target = public_test_sets.languages(args.test_set, args.language_pair)
            data = DataConfig(source_language=source, target_language=target)
    if args.reference and not args.source:
        if workdirs:
            raise UserError(f"{workdirs[0]}: its translations are found by their sources; add --source=FILE")
        references = [list(text_files.read_lines(path)) for path in args.reference]
        return EvalDataset(epath.Path(args.reference[0]).name, [], references), config, training
    direction = mixture.find_direction(data, args.source_language, args.target_language)
    if args.language_pair and workdirs:
        raise UserError(
            f"--language_pair is for files of translations: {workdirs[0]} translates "
            f"{direction.data.source_language} to {direction.data.target_language}; leave it out"
        )
    files = args.source, args.reference or None
    dataset = load_eval_dataset(data, args.split, *files, args.test_set, direction)
    if training is None and not args.source and not args.test_set:
        splits = (corpus.open_corpus(each).split("train") for each in _sources(data, direction))
        training = (target for split in splits for _, target in split)
    return dataset, dataclasses.replace(config, data=direction.data), training


def _sources(data: DataConfig, direction: mixture.Direction) -> list[DataConfig]:
    """The data sections of all training text of a direction."""
    languages = direction.data.source_language, direction.data.target_language
    entries = [each for each in data.mixture if (each.source_language, each.target_language) == languages]
    return [mixture.entry_data(data, each) for each in entries] or [direction.data]


def load_systems(paths: list[str], dataset: EvalDataset) -> list[System]:
    """The translations of each workdir or file."""
    files = [
        os.fspath(systems.newest_translations(path, dataset)) if epath.Path(path).is_dir() else path for path in paths
    ]
    return [
        System(label, file, systems.read_translations(file, dataset, file))
        for label, file in zip(systems.labels(paths), files, strict=True)
    ]


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = command_line.command_parser("python -m transformer.compare", __doc__)
    path = command_line.absolute_path
    parser.add_argument("systems", nargs="+", type=path, help="workdirs or files of translations, the baseline first")
    command_line.add_test_set_flags(parser, "the first workdir's data set")
    parser.add_argument("--language_pair", help="of --test_set, such as en-de, where there is no workdir to tell")
    command_line.add_metrics_flag(parser, "those of the first workdir")
    command_line.add_direction_flags(parser)
    parser.add_argument(
        "--frequency_corpus",
        type=path,
        help="text in which words are counted (default: for a split of the first workdir its training text, else the "
        "references)",
    )
    parser.add_argument(
        "--output", type=path, default=path("comparison.html"), help="the page (default: comparison.html)"
    )
    args = parser.parse_args(arguments)
    if len(args.systems) < 2:
        raise UserError(f"expected two systems or more, got {len(args.systems)}; name the baseline first")
    if args.source and not args.reference:
        raise UserError("--source goes with --reference, got none")
    command_line.check_test_set_flags(args)
    if args.language_pair and args.test_set is None:
        raise UserError("--language_pair goes with --test_set, got none")
    read = *args.systems, args.source, args.frequency_corpus, *args.reference
    command_line.reject_overwriting(args.output, read)
    return args


if __name__ == "__main__":
    command_line.run(main)
