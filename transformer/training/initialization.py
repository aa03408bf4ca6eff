"""The state that a run starts from: fresh params, or with `train.init_from` those of another run (fine-tuning)."""

from typing import NamedTuple

from jax.sharding import Mesh

from transformer.checkpoints import loading
from transformer.checkpoints.manager import CheckpointManager
from transformer.checkpoints.state import TrainState
from transformer.config import Config, DataConfig, mixture, schema
from transformer.config.warm_start import ALLOWED_MODEL_DIFFS
from transformer.data import tokenizer as tokenizers
from transformer.data.tokenizer import Tokenizer
from transformer.distributed import multihost
from transformer.models.registry import ModelDef
from transformer.runtime import object_storage
from transformer.runtime.errors import UserError
from transformer.runtime.logging import log_info
from transformer.training import train_step


class WarmStart(NamedTuple):
    """The params of another run.

    Attributes:
      selector: `train.init_checkpoint`.
      steps: the steps of the selected checkpoints, oldest first.
      config: of that run.
      run_id: of that run; empty if an earlier version trained it.
    """

    checkpoints: CheckpointManager
    selector: str
    steps: list[int]
    config: Config
    run_id: str


def resolve_warm_start(config: Config) -> WarmStart | None:
    """Finds the checkpoints that `train.init_from` names and compares them with the config; None if it is not set.

    Raises:
      UserError: the other run has no such checkpoint, another model or another vocabulary.
      WorkdirError: none of its checkpoints is valid.
    """
    folder, selector = config.train.init_from, config.train.init_checkpoint
    if not folder:
        return None
    vocabulary = tokenizers.load_configured(tokenizers.inherit_tokenizer(config))
    checkpoints = CheckpointManager(folder)
    steps = multihost.broadcast_from_primary("checkpoint to start from", lambda: _resolve_steps(checkpoints, selector))
    base_config = checkpoints.config(steps[-1])
    if differences := _model_differences(base_config, config):
        raise UserError(
            f"config.train.init_from = {folder}: its model differs: {'; '.join(differences)}. Set these fields "
            "as there or leave them out, or train from the beginning"
        )
    if vocabulary and checkpoints.tokenizer(steps[-1]).digest != vocabulary.digest:
        raise UserError(
            f"config.train.init_from = {folder}: tokenizer/ is not the vocabulary that checkpoint {steps[-1]} was "
            f"trained with; copy it back from {checkpoints.folder / str(steps[-1]) / 'tokenizer'}"
        )
    log_info(f"starting from the params of {folder}, {loading.describe(selector, steps)}")
    if warning := tag_warning(base_config.data, config.data):
        log_info(f"warning: config.train.init_from = {folder}: {warning}")
    return WarmStart(checkpoints, selector, steps, base_config, checkpoints.manifest(steps[-1]).run_id)


def tag_warning(base: DataConfig, data: DataConfig) -> str:
    """What to change if a direction of both runs has another tag than in the base run; empty if none has."""
    tags = {direction.name: direction.tag for direction in mixture.directions(base)}
    for direction in mixture.directions(data):
        name, tag = direction.name, direction.tag
        if tags.get(name, tag) != tag:
            return (
                f"sources of {name} have {tags[name] or 'no tag'} before them there, {tag or 'no tag'} here; set the "
                "tag in data.mixture"
            )
    return ""


def check_base_unchanged(old: Config, config: Config, base_run_id: str, tokenizer: Tokenizer) -> None:
    """Checks that a changed `train.init_from` still names the run that this one has started from, moved elsewhere.

    Runs are compared by their ids, or by vocabulary and model if an earlier version trained one of them.

    Args:
      old: config of the checkpoint to resume.
      base_run_id: recorded with that checkpoint.
      tokenizer: of that checkpoint.

    Raises:
      UserError: it names another run, or none.
    """
    old_folder, folder = old.train.init_from, config.train.init_from
    if not old_folder or not folder or old_folder == folder:
        return
    where = f"config.train.init_from: {old_folder} → {folder}"
    if reason := object_storage.unsupported_reason(folder):
        raise UserError(f"{where}: {reason}")
    base = CheckpointManager(folder)
    newest = base.latest_valid_step()
    if newest is None:
        raise UserError(f"{where}: found no checkpoint there; leave it at the old path, which need not exist any more")
    run_id = base.manifest(newest).run_id
    if run_id and base_run_id:
        is_same = run_id == base_run_id
    else:
        is_same = base.tokenizer(newest).digest == tokenizer.digest
        is_same = is_same and not _model_differences(base.config(newest), config)
    if not is_same:
        raise UserError(
            f"{where}: is not the run that this one has started from; name the folder where that is now, leave it at "
            "the old path, or choose another workdir"
        )


def _model_differences(base: Config, config: Config) -> list[str]:
    """Fields of the model in which params of `base` do not fit `config`, as 'model.field: old → new'."""
    changes = [change for change in schema.diff(base, config) if change.section == "model"]
    free = ALLOWED_MODEL_DIFFS if config.model.positions == "learned" else ALLOWED_MODEL_DIFFS | {"max_positions"}
    return [str(change) for change in changes if change.field not in free]


def _resolve_steps(checkpoints: CheckpointManager, selector: str) -> list[int]:
    try:
        return loading.resolve_steps(checkpoints, selector)
    except UserError as error:
        raise type(error)(f"config.train.init_from with init_checkpoint = {selector}: {error}") from error


def initial_state(warm_start: WarmStart | None, model: ModelDef, config: Config, mesh: Mesh) -> TrainState:
    """The state before the first update; step and optimizer state are new in any case."""
    if warm_start is None:
        return train_step.init_state(model, config, mesh)
    params = loading.read_params(
        warm_start.checkpoints, warm_start.selector, warm_start.steps, warm_start.config, model, mesh
    )
    return train_step.init_state(model, config, mesh, params)
