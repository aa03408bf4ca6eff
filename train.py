"""Trains the config's model in a workdir, or resumes the run that the workdir holds.

    python train.py --config=configs/NAME.py --workdir=DIR [--config.SECTION.FIELD=VALUE …]

The same command on every host of a Slurm job, an Open MPI job or a TPU slice trains one model; elsewhere each
process is told of the others by --coordinator=HOST:PORT --num_processes=N --process_id=I. See docs/pods.md.

A config file is Python and runs. Exit codes are listed in transformer/command_line.py.
"""

import argparse

from transformer import command_line, config, hosts


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
    hosts.add_flags(parser)
    if {"-h", "--help"} & set(argv):
        parser.print_help()
        return
    settings, rest = command_line.config_flags(argv)
    args = parser.parse_args(rest)
    settings = config.with_absolute_paths(settings)

    with hosts.joined(args):
        train(settings, args.workdir)


def train(settings: config.Config, workdir: str) -> None:
    """On this host, with the others if there are any."""
    from transformer import tokenizer
    from transformer.datasets import corpus

    corpus.check(settings.data)
    tokenizer.named_by(settings.data)

    from transformer import loop

    loop.fit(settings, workdir)


if __name__ == "__main__":
    command_line.use_huge_pages()
    command_line.run(main)
