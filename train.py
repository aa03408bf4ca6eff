"""Trains the config's model in a workdir, or resumes the run that the workdir holds.

    python train.py --config=configs/NAME.py --workdir=DIR [--config.SECTION.FIELD=VALUE …]
    python train.py --workdir=DIR    # resumes with the config that DIR keeps

The same command on every host of a Slurm job, an Open MPI job or a TPU slice trains one model; elsewhere
--coordinator=HOST:PORT --num_processes=N --process_id=I tell each process of the others. See docs/multihost.md.

A config file is Python and runs. Exit codes are listed in transformer/command_line.py.
"""

from typing import TYPE_CHECKING

from etils import epath

from transformer import command_line
from transformer.config import Config, schema
from transformer.data import corpus, tokenizer
from transformer.distributed import multihost

if TYPE_CHECKING:
    from transformer.training.run import RunContext
    from transformer.training.train_step import TrainState


def main(argv: list[str]) -> None:
    """Reads the flags, and checks config and data before JAX is imported."""
    parser = command_line.config_parser("train.py", __doc__, "--workdir=DIR")
    parser.add_argument(
        "--workdir", required=True, type=command_line.absolute_path, help="folder of the run; made if it is missing"
    )
    command_line.add_process_flags(parser)
    config, args = command_line.parse_with_config(parser, argv)
    config = schema.with_absolute_paths(config)
    with multihost.initialize(args):
        validate_data(config, args.workdir)
        train(config, args.workdir)


def validate_data(config: Config, workdir: str) -> None:
    """Raises a UserError where the data set or the tokenizer that the config names is missing or invalid."""
    corpus.validate_source(config.data)
    is_fine_tuning = config.train.init_from and not epath.Path(workdir, "checkpoints").exists()
    tokenizer.load_configured(tokenizer.inherit_tokenizer(config) if is_fine_tuning else config.data)


def train(config: Config, workdir: epath.PathLike) -> None:
    """Trains in a workdir until `train.num_steps` updates are done, or resumes the run there.

    Raises:
      UserError: of its kinds, see `transformer.runtime.errors`.
      StoppedError: by SIGTERM, SIGINT or SIGHUP, after saving.
    """
    from transformer.training import run, trainer  # which import JAX

    with run.exclusive_workdir(config, workdir) as path:
        trainer.train(*prepare(config, path))


def prepare(config: Config, path: epath.Path) -> "tuple[RunContext, TrainState]":
    """What the training loop works with, and the state that it starts from."""
    from transformer.checkpoints import best_metric
    from transformer.evaluation.evaluator import Evaluator
    from transformer.models.registry import ModelDef
    from transformer.training import run, train_step

    # Config: compared with that of the checkpoint to resume, if there is one.
    mesh = run.make_mesh(config)
    resume = run.find_resume_point(config, path)

    # Data: sentence pairs → tokenizer → token ids → the schedule of batches.
    data = run.prepare_data(resume, path)
    config = best_metric.with_metric(resume.config, data.best_metric)

    # Model, without its params; the evaluator translates and scores with it.
    model = ModelDef(config.model, data.tokenizer.vocab_size)
    evaluator = Evaluator(model, data.tokenizer, config, mesh)

    # Optimizer and step: loss, gradients, clipping, Adam and the learning-rate schedule are one jitted function.
    update = train_step.make_train_step(model, config, mesh)
    context = run.RunContext(config, path, mesh, resume, data, update, evaluator)

    # State: params, optimizer moments and step, restored from the checkpoint or initialized on the devices.
    state = run.prepare_state(context, model)
    run.log_summary(context, model)
    return context, state


if __name__ == "__main__":
    command_line.reexec_with_huge_pages()
    command_line.run(main)
