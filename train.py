"""Trains the config's model in a workdir, or resumes the run that the workdir holds.

    python train.py --config=configs/NAME.py --workdir=DIR [--config.SECTION.FIELD=VALUE …]

The same command on every host of a Slurm job, an Open MPI job or a TPU slice trains one model; elsewhere each
process is told of the others by --coordinator=HOST:PORT --num_processes=N --process_id=I. See docs/multihost.md.

A config file is Python and runs. Exit codes are listed in transformer/command_line.py.
"""

from etils import epath

from transformer import command_line
from transformer.config import schema
from transformer.distributed import multihost


def main(argv: list[str]) -> None:
    """Checks config and data before it imports JAX."""
    parser = command_line.config_parser("train.py", __doc__, "--workdir=DIR")
    parser.add_argument(
        "--workdir", required=True, type=command_line.absolute_path, help="folder of the run; made if it is missing"
    )
    command_line.add_process_flags(parser)
    settings, args = command_line.parse_with_config(parser, argv)
    settings = schema.with_absolute_paths(settings)

    with multihost.initialize(args):
        train(settings, args.workdir)


def train(settings: schema.Config, workdir: str) -> None:
    """On this host, with the others if there are any."""
    from transformer.data import corpus, tokenizer

    corpus.validate_source(settings.data)
    begins = settings.train.init_from and not epath.Path(workdir, "checkpoints").exists()
    tokenizer.load_configured(tokenizer.inherit_tokenizer(settings) if begins else settings.data)

    from transformer.training import trainer

    trainer.fit(settings, workdir)


if __name__ == "__main__":
    command_line.reexec_with_huge_pages()
    command_line.run(main)
