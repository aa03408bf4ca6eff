"""The validation metric that makes a checkpoint the best: BLEU, chrF or the loss, decided once for a run.

Early stopping, `train.keep_best` and the selectors `best` and `best-average:N` use it.
"""

import dataclasses
from collections.abc import Mapping

from transformer.config import Config

METRIC_KEYS = {"bleu": "valid/bleu", "chrf": "valid/chrf", "loss": "valid/loss"}
TITLES = {"bleu": "BLEU", "chrf": "chrF2", "loss": "validation loss"}


def resolve(config: Config) -> str:
    """The metric of a run; BLEU for runs of versions without a choice."""
    return "bleu" if config.train.best_metric == "auto" else config.train.best_metric


def with_metric(config: Config, metric: str) -> Config:
    """The config with this metric, unless it names one itself."""
    if config.train.best_metric != "auto":
        return config
    return dataclasses.replace(config, train=dataclasses.replace(config.train, best_metric=metric))


def score(metric: str, metrics: Mapping[str, float]) -> float | None:
    """The score of a checkpoint, higher is better; None if it was not validated."""
    value = metrics.get(METRIC_KEYS[metric])
    return -value if metric == "loss" and value is not None else value


def format_score(metric: str, score: float) -> str:
    """Formats a score as the metric itself."""
    return f"{-score:.3f}" if metric == "loss" else f"{score:.2f}"
