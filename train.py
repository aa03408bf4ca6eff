"""Trains the config's model in a workdir, or resumes the run that the workdir holds.

    python train.py --config=configs/NAME.py --workdir=DIR [--config.SECTION.FIELD=VALUE …]

A config file is Python and runs. Exit codes are listed in transformer/command_line.py.
"""

import argparse

from transformer import command_line
from transformer.datasets import corpus


def main(argv: list[str]) -> None:
    """Checks config and data before it imports JAX."""
    config, rest = command_line.config_flags(argv)
    parser = argparse.ArgumentParser(prog="train.py", allow_abbrev=False)
    parser.add_argument("--workdir", required=True, help="folder of the run; made if it is missing")
    args = parser.parse_args(rest)
    corpus.check(config.data)

    from transformer import loop

    loop.fit(config, args.workdir)


if __name__ == "__main__":
    command_line.run(main)
