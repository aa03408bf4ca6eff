"""The optimizers and learning rate schedules, and what follows from choosing one; `training.optimizer` defines each.

Apart from it because a config is validated before JAX is imported.
"""

from typing import NamedTuple


class OptimizerTraits(NamedTuple):
    """What the rest of a config depends on.

    Attributes:
      decays_weights: whether it reads optimizer.weight_decay.
      is_schedule_free: whether params are an average of what it moves (Defazio et al. 2024), in place of a schedule
        and of train.ema_decay.
    """

    decays_weights: bool = True
    is_schedule_free: bool = False


class ScheduleTraits(NamedTuple):
    """What the rest of a config depends on.

    Attributes:
      ends_at_zero: whether the rate reaches 0 at train.num_steps, which then matters to every update.
      needs_warmup: whether optimizer.warmup_steps is at least 1.
    """

    ends_at_zero: bool = False
    needs_warmup: bool = False


OPTIMIZER_TRAITS = {
    "adam": OptimizerTraits(decays_weights=False),
    "adamw": OptimizerTraits(),
    "nadamw": OptimizerTraits(),
    "muon": OptimizerTraits(),
    "schedule_free_adamw": OptimizerTraits(is_schedule_free=True),
}

SCHEDULE_TRAITS = {
    "paper": ScheduleTraits(needs_warmup=True),
    "inverse_sqrt": ScheduleTraits(needs_warmup=True),
    "cosine": ScheduleTraits(ends_at_zero=True),
    "linear": ScheduleTraits(ends_at_zero=True),
    "constant": ScheduleTraits(),
    "wsd": ScheduleTraits(ends_at_zero=True),
}
