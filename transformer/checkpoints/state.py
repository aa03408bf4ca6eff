"""The state of training: what an update takes and returns, and what a checkpoint keeps."""

from typing import Any, NamedTuple

import jax

from transformer.models.registry import Params


class TrainState(NamedTuple):
    """Params, optimizer state and step; `training.train_step` makes the first and each following one.

    Attributes:
      step: number of updates done, int32.
      ema: exponential moving average of the params, float32; None where `train.ema_decay` is 0.
    """

    step: jax.Array
    params: Params
    opt_state: Any
    ema: Params | None = None

    @property
    def eval_params(self) -> Params:
        """The moving average if there is one, else the params."""
        return self.params if self.ema is None else self.ema
