"""A session of training, from config to the loop: the command train.py, and `transformer.train` from Python."""

import dataclasses
import os
from typing import TYPE_CHECKING, NamedTuple

from etils import epath
from ml_collections import config_dict

from transformer.checkpoints import best_metric
from transformer.config import Config, config_files, schema, validation
from transformer.data import mixture_corpus, subword_dropout, tokenizer
from transformer.evaluation.metrics import make_metric
from transformer.runtime import files
from transformer.runtime.errors import UserError

if TYPE_CHECKING:
    from transformer.checkpoints.state import TrainState
    from transformer.training.preparation import RunContext


class TrainingResult(NamedTuple):
    """The outcome of a training session.

    Attributes:
      workdir: of the run, which `transformer.load` takes.
      step: the last one done.
      metrics: the newest value of each, by its name in metrics.jsonl, such as valid/bleu.
    """

    workdir: str
    step: int
    metrics: dict[str, float]


def train(config: Config | config_dict.ConfigDict, workdir: str | os.PathLike) -> TrainingResult:
    """Trains in a workdir until `train.num_steps` updates are done, or resumes the run there.

    Config and data are checked before JAX is imported.

    Args:
      config: as `default_config()` or the `get_config()` of a config file returns it, or validated.
      workdir: folder or address of the run; made if it is missing.

    Raises:
      UserError: or one of its subclasses, see `transformer.runtime.errors`.
      StoppedError: by SIGTERM, SIGINT or SIGHUP, after saving; a BaseException, as KeyboardInterrupt is.
    """
    try:
        workdir = files.usable_path(workdir)
    except UserError as error:
        raise UserError(f"workdir: {error}") from error
    config = schema.with_absolute_paths(check_config(config, workdir))
    check_data(config, workdir)
    from transformer.training import preparation, trainer  # which import JAX

    with preparation.exclusive_workdir(config, workdir) as path:
        step, metrics = trainer.train(*prepare(config, path))
    return TrainingResult(workdir, step, metrics)


def check_config(config: Config | config_dict.ConfigDict, workdir: str) -> Config:
    """The config as frozen dataclasses.

    Raises:
      UserError: an unknown field, an invalid value, or fields that contradict each other.
    """
    if isinstance(config, Config):
        if not config_files.saved_path(workdir):
            validation.check_schedule(config)
        return validation.validate(dataclasses.asdict(config), strict=False)
    return validation.validate(config, workdir=workdir)


def check_data(config: Config, workdir: str) -> None:
    """Raises a UserError where the data set, tokenizer or metrics that the config names are missing or invalid."""
    mixture_corpus.validate_sources(config.data)
    for name in best_metric.validation_metrics(config):
        make_metric(name)  # which may need a package
    is_fine_tuning = config.train.init_from and not epath.Path(workdir, "checkpoints").exists()
    data = tokenizer.inherit_tokenizer(config) if is_fine_tuning else config.data
    subword_dropout.check_tokenizer(data, tokenizer.load_configured(data))


def prepare(config: Config, path: epath.Path) -> "tuple[RunContext, TrainState]":
    """What the training loop works with, and the state that it starts from."""
    from transformer.evaluation.evaluator import Evaluator
    from transformer.models.registry import ModelDef
    from transformer.training import preparation, train_step

    # Config: compared with that of the checkpoint to resume, if there is one.
    mesh = preparation.make_mesh(config)
    resume = preparation.find_resume_point(config, path)

    # Data: sentence pairs → tokenizer → token ids → the schedule of batches.
    data = preparation.prepare_data(resume, path)
    config = best_metric.with_metric(resume.config, data.best_metric)

    # Model, without its params; the evaluator translates and scores with it.
    model = ModelDef(config.model, data.tokenizer.vocab_size)
    decode = best_metric.validation_decode(config)
    evaluator = Evaluator(model, data.tokenizer, dataclasses.replace(config, decode=decode), mesh)

    # Optimizer and step: loss, gradients, clipping, Adam and the learning-rate schedule are one jitted function.
    update = train_step.make_train_step(model, config, mesh)
    context = preparation.RunContext(config, path, mesh, resume, data, update, evaluator)

    # State: params, optimizer moments and step, restored from the checkpoint or initialized on the devices.
    state = preparation.prepare_state(context, model)
    preparation.log_summary(context, model)
    return context, state
