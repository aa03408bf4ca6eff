"""The export command: converts a trained model to CTranslate2, or to functions that JAX runs without this package.

    python -m transformer.export --workdir=DIR --format=ctranslate2 --output=DIR [--quantization=int8]
    python -m transformer.export --workdir=DIR --format=jax --output=DIR

Before the folder appears, the exported model is loaded and scores random sentences: unless its log-probabilities are
those of the original, nothing is exported. docs/export.md shows how to run both.
"""

import argparse
import json
import os

from transformer import command_line
from transformer.checkpoints.loading import load_checkpoint
from transformer.export.ctranslate2 import QUANTIZATIONS
from transformer.export.verify import NEEDS, PAIRS, check_installed, write
from transformer.runtime import object_storage
from transformer.runtime.errors import UserError
from transformer.runtime.files import atomic_directory, user_error_on_oserror
from transformer.runtime.logging import log_info


def main(argv: list[str]) -> None:
    """Converts a trained model to another format and verifies it."""
    fields, rest = command_line.decode_flags(argv)
    args = _parse(rest)
    check_installed(args.format, f"--format={args.format}")
    trained = load_checkpoint(args.workdir, args.checkpoint).with_decode(fields)
    if os.path.exists(args.output):
        raise UserError(
            f"--output={args.output}: expected a folder that does not exist yet; name another, or remove it"
        )
    with user_error_on_oserror(f"--output={args.output}"), atomic_directory(args.output) as folder:
        summary = write(trained, folder, args.format, args.quantization or "float32")
    log_info(
        f"{args.output}: {trained.description} as {args.format}, {summary['precision']}; the log-probabilities of "
        f"{PAIRS} random sentences differ by {summary['largest_difference']:.1e} nats a token at most, "
        f"{summary['mean_difference']:.1e} on average"
    )
    print(json.dumps(summary))


def _local(text: str) -> str:
    """An argparse type: a path that is not remote."""
    if object_storage.is_remote(text):
        raise argparse.ArgumentTypeError(f"expected a folder on this machine, got {text}")
    return command_line.absolute_path(text)


def _parse(rest: list[str]) -> argparse.Namespace:
    """Reads the flags other than --decode.FIELD."""
    built_in = "--decode.FIELD=VALUE sets a field of decoding, which the jax format builds in."
    parser = command_line.model_parser("python -m transformer.export", main.__doc__, built_in)
    parser.add_argument("--format", required=True, choices=tuple(NEEDS), help="whose format")
    parser.add_argument("--output", required=True, type=_local, help="folder to make")
    parser.add_argument("--quantization", choices=QUANTIZATIONS, help="ctranslate2: of the weights (default: float32)")
    args = parser.parse_args(rest)
    if args.quantization and args.format != "ctranslate2":
        raise UserError(f"--quantization goes with --format=ctranslate2, got {args.format}; leave it out")
    return args


if __name__ == "__main__":
    command_line.run(main)
