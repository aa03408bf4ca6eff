"""Trains the config's model in a workdir, or resumes the run that the workdir holds.

    python train.py --config=configs/NAME.py --workdir=DIR [--config.SECTION.FIELD=VALUE …]

A config file is Python and runs. Exit codes are listed in transformer/command_line.py.
"""

import argparse

from transformer import command_line, config


def main(argv: list[str]) -> None:
    """Checks config and data before it imports JAX."""
    parser = argparse.ArgumentParser(
        prog="train.py",
        description=(__doc__ or "").split("\n")[0],
        epilog="Fields of the config are documented in transformer/config.py.",
        usage="train.py --config=FILE --workdir=DIR [--config.SECTION.FIELD=VALUE …]",
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="config file; it is Python and runs")
    parser.add_argument(
        "--workdir", required=True, type=command_line.workdir_path, help="folder of the run; made if it is missing"
    )
    if {"-h", "--help"} & set(argv):
        parser.print_help()
        return
    settings, rest = command_line.config_flags(argv)
    args = parser.parse_args(rest)
    settings = config.with_absolute_paths(settings)

    from transformer import tokenizer
    from transformer.datasets import corpus

    corpus.check(settings.data)
    tokenizer.named_by(settings.data)

    from transformer import loop

    loop.fit(settings, args.workdir)


if __name__ == "__main__":
    command_line.use_huge_pages()
    command_line.run(main)
