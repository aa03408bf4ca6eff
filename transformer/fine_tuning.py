"""What a run starts from: fresh params, or with `train.init_from` those that another run has trained."""

import json
import os

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from transformer import config as configs
from transformer import hosts, step, trained
from transformer.checkpoint import Checkpoints
from transformer.command_line import say
from transformer.config import Config
from transformer.errors import UserError
from transformer.step import Model, Params, TrainState
from transformer.tokenizer import Tokenizer

# Fields of the model in which the two runs may differ, as trained params mean the same with any value of them.
FREE = {
    *("dropout_rate", "attention_dropout_rate", "mlp_dropout_rate"),
    *("attention", "qkv_init_gain", "remat", "dtype"),
}


def first_state(model: Model, tokenizer: Tokenizer, config: Config, mesh: Mesh) -> TrainState:
    """The state before the first update; the optimizer and the count of updates are new in any case.

    Raises:
      UserError: the other run has no such checkpoint, another model or another vocabulary.
      WorkdirError: it has no sound checkpoint.
    """
    state = step.init_state(model, config, mesh)
    if not config.train.init_from:
        return state
    params = trained_params(model, tokenizer, config, mesh)
    return state._replace(params=params, ema=jax.tree.map(jnp.copy, params) if config.train.ema_decay else None)


def trained_params(model: Model, tokenizer: Tokenizer, config: Config, mesh: Mesh) -> Params:
    """The params of `train.init_checkpoint` in the workdir `train.init_from`, on the devices of `mesh`."""
    folder, which = config.train.init_from, config.train.init_checkpoint
    checkpoints = Checkpoints(folder)
    steps = json.loads(hosts.from_lead("checkpoint to start from", lambda: _chosen(checkpoints, which)))
    theirs = checkpoints.config(steps[-1])
    others = [change for change in configs.differences(theirs, config) if change.section == "model"]
    if serious := [str(change) for change in others if change.field not in FREE]:
        raise UserError(
            f"config.train.init_from = {folder}: its model is another one: {'; '.join(serious)}. Set these fields as "
            "there, or train from the beginning"
        )
    if checkpoints.tokenizer(steps[-1]).digest != tokenizer.digest:
        raise UserError(
            f"config.train.init_from = {folder}: tokenizer/ is not the vocabulary that checkpoint {steps[-1]} was "
            f"trained with; copy it back from {checkpoints.folder / str(steps[-1]) / 'tokenizer'}"
        )
    say(f"starting from the params of {os.path.normpath(folder)}, {trained.title(which, steps)}")
    return trained.read_params(checkpoints, which, steps, theirs, model, mesh)


def _chosen(checkpoints: Checkpoints, which: str) -> str:
    try:
        return json.dumps(trained.select(checkpoints, which))
    except UserError as error:
        raise UserError(f"config.train.init_from with init_checkpoint = {which}: {error}") from error
