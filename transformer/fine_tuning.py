"""What a run starts from: fresh params, or with `train.init_from` those that another run has trained."""

import json
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from transformer import config as configs
from transformer import hosts, step, trained
from transformer import tokenizer as tokenizers
from transformer.checkpoint import Checkpoints
from transformer.command_line import say
from transformer.config import Config
from transformer.errors import UserError
from transformer.step import Model, TrainState

# Fields of the model in which the two runs may differ, as trained params mean the same with any value of them.
FREE = {
    *("dropout_rate", "attention_dropout_rate", "mlp_dropout_rate"),
    *("attention", "qkv_init_gain", "remat", "dtype"),
}


class Origin(NamedTuple):
    """Where the params of another run lie.

    Attributes:
      which: as `train.init_checkpoint` has it.
      steps: the checkpoints that it names, oldest first.
      config: of that run.
    """

    checkpoints: Checkpoints
    which: str
    steps: list[int]
    config: Config


def find(config: Config) -> Origin | None:
    """The checkpoint of another run that this one starts from, held against the config; None if it starts fresh.

    Raises:
      UserError: the other run has no such checkpoint, another model, or a vocabulary of another size.
      WorkdirError: it has no sound checkpoint.
    """
    folder, which = config.train.init_from, config.train.init_checkpoint
    if not folder:
        return None
    vocabulary = tokenizers.named_by(tokenizers.with_origin(config))
    checkpoints = Checkpoints(folder)
    steps = json.loads(hosts.from_lead("checkpoint to start from", lambda: _chosen(checkpoints, which)))
    theirs = checkpoints.config(steps[-1])
    others = [change for change in configs.differences(theirs, config) if change.section == "model"]
    free = FREE if config.model.positions == "learned" else FREE | {"max_positions"}
    if serious := [str(change) for change in others if change.field not in free]:
        raise UserError(
            f"config.train.init_from = {folder}: its model is another one: {'; '.join(serious)}. Set these fields as "
            "there, or train from the beginning"
        )
    if vocabulary and checkpoints.tokenizer(steps[-1]).digest != vocabulary.digest:
        raise UserError(
            f"config.train.init_from = {folder}: tokenizer/ is not the vocabulary that checkpoint {steps[-1]} was "
            f"trained with; copy it back from {checkpoints.folder / str(steps[-1]) / 'tokenizer'}"
        )
    say(f"starting from the params of {folder}, {trained.title(which, steps)}")
    return Origin(checkpoints, which, steps, theirs)


def _chosen(checkpoints: Checkpoints, which: str) -> str:
    try:
        return json.dumps(trained.select(checkpoints, which))
    except UserError as error:
        raise type(error)(f"config.train.init_from with init_checkpoint = {which}: {error}") from error


def first_state(origin: Origin | None, model: Model, config: Config, mesh: Mesh) -> TrainState:
    """The state before the first update; the optimizer and the count of updates are new in any case."""
    state = step.init_state(model, config, mesh)
    if origin is None:
        return state
    params = trained.read_params(origin.checkpoints, origin.which, origin.steps, origin.config, model, mesh)
    return state._replace(params=params, ema=jax.tree.map(jnp.copy, params) if config.train.ema_decay else None)
