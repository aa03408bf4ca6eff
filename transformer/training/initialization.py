"""What a run starts from: fresh params, or with `train.init_from` those that another run has trained."""

import json
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from transformer.checkpoints import loading
from transformer.checkpoints.manager import CheckpointManager
from transformer.config import Config, schema
from transformer.config.warm_start import FREE
from transformer.data import tokenizer as tokenizers
from transformer.data.tokenizer import Tokenizer
from transformer.distributed import multihost
from transformer.models.registry import Model
from transformer.runtime import object_storage
from transformer.runtime.errors import UserError
from transformer.runtime.logging import log_info
from transformer.training import train_step
from transformer.training.train_step import TrainState


class WarmStart(NamedTuple):
    """Where the params of another run lie.

    Attributes:
      which: as `train.init_checkpoint` has it.
      steps: the checkpoints that it names, oldest first.
      config: of that run.
      run_id: of that run; empty where an earlier version trained it.
    """

    checkpoints: CheckpointManager
    which: str
    steps: list[int]
    config: Config
    run_id: str


def resolve_warm_start(config: Config) -> WarmStart | None:
    """The checkpoint of another run that this one starts from, held against the config; None if it starts fresh.

    Raises:
      UserError: the other run has no such checkpoint, another model, or a vocabulary of another size.
      WorkdirError: it has no sound checkpoint.
    """
    folder, which = config.train.init_from, config.train.init_checkpoint
    if not folder:
        return None
    vocabulary = tokenizers.load_configured(tokenizers.inherit_tokenizer(config))
    checkpoints = CheckpointManager(folder)
    steps = json.loads(
        multihost.broadcast_from_primary("checkpoint to start from", lambda: _chosen(checkpoints, which))
    )
    theirs = checkpoints.config(steps[-1])
    if others := _other_fields(theirs, config):
        raise UserError(
            f"config.train.init_from = {folder}: its model is another one: {'; '.join(others)}. Set these fields as "
            "there or leave them out, or train from the beginning"
        )
    if vocabulary and checkpoints.tokenizer(steps[-1]).digest != vocabulary.digest:
        raise UserError(
            f"config.train.init_from = {folder}: tokenizer/ is not the vocabulary that checkpoint {steps[-1]} was "
            f"trained with; copy it back from {checkpoints.folder / str(steps[-1]) / 'tokenizer'}"
        )
    log_info(f"starting from the params of {folder}, {loading.describe(which, steps)}")
    return WarmStart(checkpoints, which, steps, theirs, checkpoints.manifest(steps[-1]).run_id)


def check_base_unchanged(old: Config, config: Config, base_run_id: str, tokenizer: Tokenizer) -> None:
    """Refuses to go on with another base than the run has started from; the same one may lie elsewhere by now.

    It is known by its run id, or where it has none by vocabulary and model. Where the path is the old one, or there is
    none, nothing is read.

    Args:
      old: config of the checkpoint that the run goes on from.
      base_run_id: as that checkpoint has it.
      tokenizer: of that checkpoint.

    Raises:
      UserError: it is another run, or none.
    """
    before, folder = old.train.init_from, config.train.init_from
    if not before or not folder or before == folder:
        return
    where = f"config.train.init_from: {before} → {folder}"
    if reason := object_storage.unsupported_reason(folder):
        raise UserError(f"{where}: {reason}")
    base = CheckpointManager(folder)
    newest = base.latest_valid_step()
    if newest is None:
        raise UserError(f"{where}: found no checkpoint there; leave it at the old path, which need not exist any more")
    theirs = base.manifest(newest).run_id
    same = base.tokenizer(newest).digest == tokenizer.digest and not _other_fields(base.config(newest), config)
    if theirs != base_run_id if theirs and base_run_id else not same:
        raise UserError(
            f"{where}: is not the run that this one has started from; name the folder where that is now, leave it at "
            "the old path, or choose another --workdir"
        )


def _other_fields(base: Config, config: Config) -> list[str]:
    """The fields of the model that keep params of `base` from being those of `config`, as 'model.field: old → new'."""
    others = [change for change in schema.differences(base, config) if change.section == "model"]
    free = FREE if config.model.positions == "learned" else FREE | {"max_positions"}
    return [str(change) for change in others if change.field not in free]


def _chosen(checkpoints: CheckpointManager, which: str) -> str:
    try:
        return json.dumps(loading.resolve_steps(checkpoints, which))
    except UserError as error:
        raise type(error)(f"config.train.init_from with init_checkpoint = {which}: {error}") from error


def initial_state(origin: WarmStart | None, model: Model, config: Config, mesh: Mesh) -> TrainState:
    """The state before the first update; the optimizer and the count of updates are new in any case."""
    state = train_step.init_state(model, config, mesh)
    if origin is None:
        return state
    params = loading.read_params(origin.checkpoints, origin.which, origin.steps, origin.config, model, mesh)
    return state._replace(params=params, ema=jax.tree.map(jnp.copy, params) if config.train.ema_decay else None)
