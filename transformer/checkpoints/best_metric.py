"""Which validation figure makes a checkpoint the best: BLEU, chrF or the loss, decided once for a run.

Early stopping, `train.keep_best` and the checkpoints `best` and `best-average:N` go by it.
"""

import dataclasses
from collections.abc import Mapping

from transformer.config import Config

METRIC_KEYS = {"bleu": "valid/bleu", "chrf": "valid/chrf", "loss": "valid/loss"}
TITLES = {"bleu": "BLEU", "chrf": "chrF2", "loss": "validation loss"}


def resolve(config: Config) -> str:
    """The metric of a run; runs that were begun before there was a choice go by BLEU."""
    return "bleu" if config.train.best_metric == "auto" else config.train.best_metric


def with_metric(config: Config, metric: str) -> Config:
    """The config with its metric decided; one that it names itself stays."""
    if config.train.best_metric != "auto":
        return config
    return dataclasses.replace(config, train=dataclasses.replace(config.train, best_metric=metric))


def score(metric: str, metrics: Mapping[str, float]) -> float | None:
    """How good a checkpoint is: higher is better; None where it was not validated."""
    value = metrics.get(METRIC_KEYS[metric])
    return -value if metric == "loss" and value is not None else value


def format_score(metric: str, merit: float) -> str:
    """The figure itself, for people."""
    return f"{-merit:.3f}" if metric == "loss" else f"{merit:.2f}"
