"""Log-probabilities of given translations under a model, teacher-forced; EOS included.

The device sees a few fixed shapes only, as in decoding: the score of a pair depends on no other pair.

B rows, S source length, T target length, V vocabulary.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from transformer.config import DecodeConfig
from transformer.data import text_inputs
from transformer.data.batching import Batch
from transformer.data.tokenizer import Tokenizer
from transformer.decoding.decode import batch_rows, ensemble_log_probs
from transformer.decoding.teacher_forcing import map_pairs
from transformer.decoding.warning_counts import WarningCounts
from transformer.distributed import sharding
from transformer.models.loss import target_log_probs
from transformer.models.registry import ModelDef, Params

MAX_BATCH_TOKENS = 1 << 14  # of a batch on a device, whose logits are MAX_BATCH_TOKENS * V floats


class TargetScore(NamedTuple):
    """The natural logarithm of a target's probability given its source, and that of each of its tokens.

    log_prob: the sum of the tokens'.
    tokens: subword tokens, EOS last.
    token_log_probs: of each token, given the source and the tokens before it.
    """

    log_prob: float
    tokens: list[str]
    token_log_probs: list[float]


class Scorer:
    """Scores with one model or an ensemble, and any params of their shape; each shape is compiled once.

    Safe to share between threads. It counts what callers should be warned of; `log_warnings` reports it.
    """

    def __init__(self, models: Sequence[ModelDef], tokenizer: Tokenizer, mesh: jax.sharding.Mesh):
        self._tokenizer, self._mesh, self._warnings = tokenizer, mesh, WarningCounts()

        def program(params: Sequence[Params], batch: Batch) -> jax.Array:
            logits = [
                model.bind(leaves)(batch.source_BS, batch.target_BT)
                for model, leaves in zip(models, params, strict=True)
            ]
            return target_log_probs(ensemble_log_probs(logits), batch.target_BT)

        self._log_probs = sharding.data_parallel_jit(mesh, program)

    def score(
        self,
        params: Sequence[Params],
        sources: Iterable[str],
        targets: Iterable[str],
        config: DecodeConfig,
        tag: str = "",
    ) -> list[TargetScore]:
        """Scores each target given its source, in order; counts pairs that are truncated or blank.

        Args:
          params: of each model.
          sources, targets: any iterables of lines of text; one line end at the end of a text is stripped.
          config: its `max_source_tokens` and `max_extra_length` limit the lengths, as in decoding.
          tag: of the target language, put before each source; empty for none.

        Raises:
          UserError: an item is not text, or the numbers of sources and targets differ.
        """
        source_lines, target_lines = text_inputs.pairs(sources, targets)
        source = self._encode(source_lines, config.max_source_tokens, "sources", tag)
        target = self._encode(target_lines, config.max_target_tokens, "targets")
        lines = zip(source_lines, target_lines, strict=True)
        self._warnings.add("blank", sum(not (a.strip() and b.strip()) for a, b in lines))
        scores = []
        for ids, log_probs in zip(target, self.log_probs(params, source, target, config), strict=True):
            scores.append(
                TargetScore(float(log_probs.sum(dtype=np.float64)), self._tokenizer.pieces(ids), log_probs.tolist())
            )
        return scores

    def log_probs(
        self, params: Sequence[Params], source: Sequence[np.ndarray], target: Sequence[np.ndarray], config: DecodeConfig
    ) -> list[np.ndarray]:
        """Log-probability of each target token, float32, in the order of the pairs; all are ids."""

        def rows_of(width: int) -> int:
            return batch_rows(config, self._mesh, MAX_BATCH_TOKENS * self._mesh.size // width)

        log_probs: list[np.ndarray] = [np.zeros(0, np.float32)] * len(target)
        for i, log_probs_T in map_pairs(self._log_probs, self._mesh, tuple(params), source, target, rows_of):
            log_probs[i] = log_probs_T[: len(target[i])]
        return log_probs

    def log_warnings(self, config: DecodeConfig) -> None:
        """Logs, once, how many pairs were truncated or have a blank side."""
        limits = f"decode.max_source_tokens = {config.max_source_tokens}", f"{config.max_extra_length} more"
        messages = {
            "sources": f"sources are longer than {limits[0]}; scored as if they were cut to it",
            "targets": f"targets are longer than {limits[0]} and {limits[1]}; scored as if they were cut to it",
            "blank": "pairs have a blank side; the score of a blank target is that of its end alone",
        }
        self._warnings.log(messages)

    def _encode(self, lines: Sequence[str], max_length: int, side: str, tag: str = "") -> list[np.ndarray]:
        encoded, is_truncated = self._tokenizer.encode_truncated(lines, max_length, tag)
        self._warnings.add(side, sum(is_truncated))
        return encoded
