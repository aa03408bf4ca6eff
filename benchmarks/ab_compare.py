"""Compares the speed of two commands that run alternately, so that other load affects both: the median of the ratios.

    python -m benchmarks.ab_compare --key=target_tokens_per_s --pairs=3 \
        --ours="python -m transformer.benchmark --config=configs/multi30k.py --config.data.dir=FOLDER" \
        --other="python PEER.py"

The last line of what each prints is a JSON object with the key. The last line of stdout is one too.
"""

import json
import math
import shlex
import statistics
import subprocess

from transformer.command_line import command_parser, positive_int, run
from transformer.runtime.errors import UserError
from transformer.runtime.logging import log_info


def main(argv: list[str]) -> None:
    """Parses the flags, runs the pairs and prints."""
    parser = command_parser("python -m benchmarks.ab_compare", __doc__)
    parser.add_argument("--ours", required=True, help="command of this project")
    parser.add_argument("--other", required=True, help="command to compare with")
    parser.add_argument("--key", required=True, help="of the figure in the JSON object on the last line of both")
    parser.add_argument("--pairs", type=positive_int, default=3, help="number of pairs (default: 3)")
    args = parser.parse_args(argv[1:])
    ours, other = [], []
    for number in range(1, args.pairs + 1):
        ours.append(figure(args.ours, args.key))
        other.append(figure(args.other, args.key))
        log_info(f"pair {number} of {args.pairs}: {ours[-1]:,.0f} against {other[-1]:,.0f}: {ours[-1] / other[-1]:.2f}")
    ratios = [own / peer for own, peer in zip(ours, other, strict=True)]
    print(
        json.dumps({"key": args.key, "ours": ours, "other": other, "median_ratio": round(statistics.median(ratios), 2)})
    )


def figure(command: str, key: str) -> float:
    """Runs a command and returns the number above 0 that it reports."""
    try:
        process = subprocess.run(shlex.split(command), stdout=subprocess.PIPE, text=True)
    except (OSError, ValueError, IndexError) as error:  # missing program, unbalanced quote, empty command
        raise UserError(f"{command}: cannot be run: {error}") from error
    lines = process.stdout.strip().splitlines()
    if process.returncode or not lines:
        raise UserError(f"{command}: expected a JSON object on its last line, got exit code {process.returncode}")
    try:
        value = float(json.loads(lines[-1])[key])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{command}: expected a JSON object with {key!r} on its last line, got {lines[-1]!r}"
        ) from error
    if not 0 < value < math.inf:
        raise UserError(f"{command}: expected {key} above 0, got {value}")
    return value


if __name__ == "__main__":
    run(main)
