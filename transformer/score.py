"""Writes the log-probability of each given translation under a trained model, one number a line.

    python -m transformer.score --workdir=DIR --source=FILE --target=FILE > scores.txt

Natural logarithms, the end of the sentence included. With --per_token each line is a JSON object with `log_prob`, the
subword `tokens` and their `log_probs`. From Python: `transformer.load(DIR).score(sources, targets)`.
"""

import argparse
import contextlib
import itertools
import json
import math
import sys
from collections.abc import Iterator
from typing import BinaryIO

from transformer import command_line
from transformer.data import text_files
from transformer.decoding.scorer import TargetScore
from transformer.inference import load
from transformer.runtime import environment, progress, streams
from transformer.runtime.files import check_writable, open_atomic, user_error_on_oserror
from transformer.runtime.logging import log_info

GROUP = 4096  # pairs that are read and sorted into batches at once


def main(argv: list[str]) -> None:
    """Reads the pairs, writes their scores in order, and logs the mean."""
    fields, rest = command_line.decode_flags(argv)
    args = _parse(rest)
    for path in (args.source, args.target):
        text_files.check_readable(path)
    num_pairs = sum(1 for _ in text_files.read_parallel(args.source, args.target))  # invalid lines cost no time later
    environment.enable_compilation_cache()
    model = load(args.workdir, args.checkpoint, args.ensemble)
    config, tag = model.scoring_config(fields), model.source_tag(args.source_language, args.target_language)
    pairs = text_files.read_parallel(args.source, args.target)
    groups = iter(lambda: list(itertools.islice(pairs, GROUP)), [])
    done, num_tokens, log_prob = 0, 0, 0.0
    with _output(args.output) as out, progress.phase("scoring", num_pairs, "pairs") as scoring:
        for group in groups:
            sources, targets = zip(*group, strict=True)
            scores = model.scorer.score(model.params, sources, targets, config, tag)
            lines = "".join(format_line(score, args.per_token) for score in scores)
            with progress.hidden():
                out.write(streams.printable(lines, out).encode())
                out.flush()
            done += len(group)
            scoring.completed = done
            num_tokens += sum(len(score.tokens) for score in scores)
            log_prob += sum(score.log_prob for score in scores)
    model.scorer.log_warnings(config)
    if done:
        mean = -log_prob / num_tokens
        log_info(
            f"{model.primary.description}: {done:,} pairs, {num_tokens:,} target tokens, {mean:.4f} nats a token, "
            f"perplexity {math.exp(min(mean, 700)):.4g}"
        )
    else:
        log_info("the files are empty, so there is nothing to score")


def format_line(score: TargetScore, per_token: bool) -> str:
    """The line of one pair."""
    if not per_token:
        return f"{score.log_prob:.6f}\n"
    values = {
        "log_prob": round(score.log_prob, 6),
        "tokens": score.tokens,
        "log_probs": [round(log_prob, 6) for log_prob in score.token_log_probs],
    }
    return json.dumps(values, ensure_ascii=False) + "\n"


@contextlib.contextmanager
def _output(path: str | None) -> Iterator[BinaryIO]:
    """Standard output, or a file that appears at the end of the block."""
    if not path:
        yield sys.stdout.buffer
        return
    check_writable(path, f"--output={path}")
    with user_error_on_oserror(f"--output={path}"), open_atomic(path) as file:
        yield file


def _parse(rest: list[str]) -> argparse.Namespace:
    limits = "--decode.max_source_tokens and --decode.max_extra_length limit the lengths, as in translation."
    parser = command_line.model_parser("python -m transformer.score", __doc__, limits)
    path = command_line.absolute_path
    parser.add_argument("--source", required=True, type=path, help="text file, one sentence a line")
    parser.add_argument("--target", required=True, type=path, help="text file of their translations, line by line")
    parser.add_argument("--output", type=path, help="where the scores go (default: standard output)")
    parser.add_argument("--per_token", action="store_true", help="write tokens and their log-probabilities as JSON")
    command_line.add_ensemble_flag(parser)
    command_line.add_direction_flags(parser)
    args = parser.parse_args(rest)
    command_line.reject_overwriting(args.output, (args.source, args.target))
    return args


if __name__ == "__main__":
    command_line.run(main)
