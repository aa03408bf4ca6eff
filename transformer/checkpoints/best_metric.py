"""The validation metric that makes a checkpoint the best: the loss or a metric of translations, decided once for a run.

Early stopping, `train.keep_best` and the selectors `best` and `best-average:N` use it.
"""

import dataclasses
from collections.abc import Mapping

from transformer.config import Config, DecodeConfig
from transformer.config.schema import ALWAYS_VALIDATED, LOWER_IS_BETTER


def resolve(config: Config) -> str:
    """The metric of a run; BLEU for runs of versions without a choice."""
    return "bleu" if config.train.best_metric == "auto" else config.train.best_metric


def with_metric(config: Config, metric: str) -> Config:
    """The config with this metric, unless it names one itself."""
    if config.train.best_metric != "auto":
        return config
    return dataclasses.replace(config, train=dataclasses.replace(config.train, best_metric=metric))


def validation_metrics(config: Config) -> list[str]:
    """The metrics of translations that validation computes: BLEU, chrF2 and those of `eval.metrics`.

    TER is among them only if it makes a checkpoint the best: for poor translations it takes many times as long as all
    others.
    """
    best = resolve(config)
    metrics = dict.fromkeys((*ALWAYS_VALIDATED, *config.eval.metric_names, best))
    return [name for name in metrics if name != "loss" and (name != "ter" or best == "ter")]


def validation_decode(config: Config) -> DecodeConfig:
    """Decoding in validation during training."""
    beam_size = config.eval.validation_beam_size or config.decode.beam_size
    return dataclasses.replace(config.decode, beam_size=beam_size)


def score(metric: str, metrics: Mapping[str, float]) -> float | None:
    """The score of a checkpoint, higher is better; None if it was not validated."""
    value = metrics.get(f"valid/{metric}")
    return -value if LOWER_IS_BETTER[metric] and value is not None else value


def format_score(metric: str, score: float) -> str:
    """Formats a score as the metric itself."""
    value = -score if LOWER_IS_BETTER[metric] else score
    return f"{value:.3f}" if metric == "loss" else f"{value:.2f}"
