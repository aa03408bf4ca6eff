"""Trains the config's model in a workdir, or resumes the run that the workdir holds.

    python train.py --config=configs/NAME.py --workdir=DIR [--config.SECTION.FIELD=VALUE …]
    python train.py --workdir=DIR    # resumes with the config that DIR keeps

The same command on every host of a Slurm job, an Open MPI job or a TPU slice trains one model; elsewhere
--coordinator=HOST:PORT --num_processes=N --process_id=I tell each process of the others. See docs/multihost.md.

A config file is Python and runs. Exit codes are listed in transformer/command_line.py.
"""

import shlex

from transformer import command_line
from transformer.distributed import multihost
from transformer.runtime import commands
from transformer.runtime.logging import log_info
from transformer.training.session import train


def main(argv: list[str]) -> None:
    """Reads the flags; config and data are checked before JAX is imported."""
    parser = command_line.config_parser("train.py", __doc__, "--workdir=DIR", resumes=True)
    parser.add_argument(
        "--workdir", required=True, type=command_line.absolute_path, help="folder of the run; made if it is missing"
    )
    command_line.add_process_flags(parser)
    config, args = command_line.parse_with_config(parser, argv)
    with multihost.initialize(args):
        train(config, args.workdir)
        workdir = shlex.quote(args.workdir)
        log_info(f"evaluate it: {commands.spelled('eval')} --workdir={workdir} --checkpoint=best")


if __name__ == "__main__":
    command_line.reexec_with_malloc_settings()
    command_line.run(main)
