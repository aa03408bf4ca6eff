"""Translates a test set with a checkpoint and scores it: a table on stderr, one JSON object last on stdout.

    python eval.py --workdir=DIR [--checkpoint=WHICH] [--split=test]
    python eval.py --workdir=DIR --source=FILE --reference=FILE[,FILE…]

WHICH is latest, best, a step, or the mean of several: average:N of the newest N, best-average:N of the N with
the best validation BLEU. Model, vocabulary and decoding settings are those saved with the checkpoint;
--decode.FIELD=VALUE sets another.
"""

import argparse
import json
import math
from typing import TYPE_CHECKING

from etils import epath

from transformer import command_line
from transformer.command_line import say
from transformer.errors import DivergedError, UserError
from transformer.files import reported, write_whole

if TYPE_CHECKING:
    from transformer.cost import Spent
    from transformer.evaluate import Report
    from transformer.trained import Trained

SAMPLES = 5


def main(argv: list[str]) -> None:
    """Checks its flags before it imports JAX."""
    fields, rest = command_line.decode_flags(argv)
    args = parse(rest)

    from rich.console import Console
    from rich.progress import Progress

    from transformer import compilation, validation
    from transformer.cost import Spent
    from transformer.evaluate import Evaluator
    from transformer.trained import load_trained

    compilation.enable_cache()
    trained = load_trained(args.workdir, args.checkpoint)
    name, sources, references = read_pairs(args, trained)
    output = epath.Path(args.output or epath.Path(args.workdir) / "translations" / f"{trained.file_stem}.{name}.txt")
    with reported(f"{output}"):
        output.parent.mkdir(parents=True, exist_ok=True)
    config = validation.with_decode(trained.config, fields)
    evaluator = Evaluator(trained.model, trained.tokenizer, config, trained.mesh)
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(f"translating {name}", total=len(sources))
        report = evaluator.evaluate(
            trained.params, sources, references, progress=lambda done: bar.advance(task, advance=done)
        )
    if not math.isfinite(report.loss):
        raise DivergedError(f"{trained.title}: its loss is {report.loss}; evaluate another")
    with reported(f"{output}"):
        write_whole(output, "".join(f"{line}\n" for line in report.translations))
    show_samples(sources, references[0], report.translations)
    spent = Spent.of(trained.metrics)
    say(table(name, trained.title, report, spent))
    say(f"translations: {output}")
    print(
        json.dumps(
            {
                "step": trained.step,
                "steps": trained.steps,  # several where their mean was scored
                "sentences": report.sentences,
                "loss": report.loss,
                **report.scores,
                "seconds": round(report.seconds, 3),
                "train_flops": spent and spent.flops,
                "train_tokens": spent and spent.tokens,
                "train_hours": spent and spent.seconds / 3600,
            }
        )
    )


def parse(rest: list[str]) -> argparse.Namespace:
    """Reads the flags other than --decode.FIELD."""
    parser = argparse.ArgumentParser(prog="eval.py", description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("--workdir", required=True, type=command_line.workdir_path, help="folder that train.py wrote")
    parser.add_argument(
        "--checkpoint", default="latest", help="latest (default), best, a step, average:N or best-average:N"
    )
    parser.add_argument("--split", help="split of the config's data set (default: test)")
    parser.add_argument("--source", help="text file to translate instead, one sentence a line")
    parser.add_argument("--reference", help="its references; several files with commas between")
    parser.add_argument("--output", help="where translations go (default: WORKDIR/translations/STEP.NAME.txt)")
    args = parser.parse_args(rest)
    if bool(args.source) != bool(args.reference):
        raise UserError("--source and --reference go together")
    if args.output and args.output in (args.source, *(args.reference or "").split(",")):
        raise UserError(f"--output={args.output} would overwrite what is read; name another file")
    if args.source and args.split:
        raise UserError("expected --split, or --source with --reference, got both")
    return args


def read_pairs(args: argparse.Namespace, trained: "Trained") -> tuple[str, list[str], list[list[str]]]:
    """The name of the set, its source sentences, and one or more lists of references."""
    from transformer.datasets import corpus, text_files

    if args.source:
        sources = list(text_files.read_lines(args.source))
        return (
            epath.Path(args.source).name,
            sources,
            [list(text_files.read_lines(path)) for path in args.reference.split(",")],
        )
    try:
        split = corpus.open_corpus(trained.config.data).split(args.split or "test")
    except UserError as error:
        raise UserError(f"{error}. Or name another --split, or score files with --source and --reference") from error
    return split.name, split.sources(), [split.targets()]


def show_samples(sources: list[str], references: list[str], translations: list[str]) -> None:
    """A few sentences, spread over the set."""
    for i in range(0, len(sources), -(-len(sources) // SAMPLES) or 1):
        say(f"  source      {sources[i]}\n  translation {translations[i]}\n  reference   {references[i]}\n")


def table(name: str, title: str, report: "Report", spent: "Spent | None") -> str:
    """Scores for people."""
    rows = [f"{name}: {report.sentences:,} sentences, {title}, {report.seconds:.1f} s"]
    if not report.sentences:
        rows.append("  no sentences, so there is nothing to score")
    for metric in ("bleu", "chrf", "ter"):
        rows.append(f"  {metric.upper():<13}{report.scores[metric]:6.2f}   {report.scores[f'{metric}_signature']}")
    rows.append(f"  {'loss':<13}{report.loss:6.3f}   nats per target token")
    rows.append(f"  {'length ratio':<13}{report.scores['length_ratio']:6.3f}   hypothesis words / reference words")
    if spent:
        rows.append(f"  trained on {spent}")
    return "\n".join(rows)


if __name__ == "__main__":
    command_line.run(main)
