"""Training metrics, accumulated over the updates between two log lines."""

import contextlib
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator

import jax

from transformer.models.flops import TrainingCost
from transformer.runtime.errors import DivergedError
from transformer.runtime.logging import log_info
from transformer.training.train_step import StepMetrics

DIVERGENCE_HINT = (
    "no checkpoint of it is kept. In a new workdir lower optimizer.learning_rate, raise optimizer.warmup_steps or set "
    "optimizer.clip_norm; with earlier checkpoints, train.init_from=OLD_WORKDIR starts from the last of them"
)


class MetricsAccumulator:
    """Adds up the metrics of updates between two log lines, and the cost of the run since its first update.

    Time spent on evaluation and checkpoints is left out of both, and time to compile out of the metrics.

    Args:
      cost: of the sessions before.
      skipped: number of updates skipped by them.
    """

    def __init__(
        self, cost: TrainingCost | None = None, clock: Callable[[], float] = time.perf_counter, skipped: int = 0
    ) -> None:
        self._clock, self._cost = clock, cost or TrainingCost()
        self._cost_start = clock() - self._cost.seconds
        self.skipped = skipped
        self.reset()

    def reset(self) -> None:
        """Starts the next log line."""
        self.nll = self.correct = self.tokens = self.grad_norm = self.learning_rate = 0.0
        self.updates = self.token_positions = 0
        self.input_wait = self._device_seconds = 0.0
        self.consistency: float | None = None
        self._start = self._clock()

    def add(self, metrics: StepMetrics, step: int, *, token_positions: int, flops: float) -> None:
        """Adds one update's metrics, already on the host.

        Raises:
          DivergedError: its loss or gradient is not finite.
        """
        loss = float(metrics.loss.objective) / max(float(metrics.loss.tokens), 1)
        if not (math.isfinite(metrics.loss.objective) and math.isfinite(metrics.grad_norm)):
            raise DivergedError(
                f"the run diverged: at update {step} the loss is {loss} and the gradient norm "
                f"{float(metrics.grad_norm)}; it was not applied; {DIVERGENCE_HINT}",
                step,
            )
        if int(metrics.skipped) > self.skipped:
            self.skipped = int(metrics.skipped)
            log_info(f"update {step:,} skipped: its loss of {loss:.3f} is a spike; {self.skipped:,} skipped so far")
        self.nll += float(metrics.loss.nll)
        self.correct += float(metrics.loss.correct)
        if metrics.loss.consistency is not None:
            self.consistency = (self.consistency or 0.0) + float(metrics.loss.consistency)
        self.tokens += float(metrics.loss.tokens)
        self.grad_norm += float(metrics.grad_norm)
        self.learning_rate = float(metrics.learning_rate)
        self.token_positions += token_positions
        self.updates += 1
        self._cost = self._cost._replace(
            flops=self._cost.flops + flops,
            tokens=self._cost.tokens + float(metrics.loss.tokens),
            source_tokens=self._cost.source_tokens + float(metrics.source_tokens),
        )

    def cost(self) -> TrainingCost:
        """The cost of all sessions, this one included."""
        return self._cost._replace(seconds=self._clock() - self._cost_start)

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Stops the clock for the block."""
        since = self._clock()
        yield
        paused = self._clock() - since
        self._start += paused
        self._cost_start += paused

    @contextlib.contextmanager
    def compilation(self) -> Iterator[None]:
        """Takes the block out of the speed, as it does not recur; the cost of the run has it."""
        since = self._clock()
        yield
        self._start += self._clock() - since

    @contextlib.contextmanager
    def device_wait(self) -> Iterator[None]:
        """Measures the wait for the devices: some runtimes return from an update only when it is done."""
        since = self._clock()
        yield
        self._device_seconds += self._clock() - since

    def host_timing(self) -> dict[str, float]:
        """Times of this process since the last reset; `host_ms` leaves out the wait for the devices."""
        seconds = self._seconds()
        return {
            "step_ms": self._ms_per_update(seconds),
            "host_ms": self._ms_per_update(seconds - self._device_seconds),
            "input_wait": self.input_wait / seconds,
        }

    def _seconds(self) -> float:
        return max(self._clock() - self._start, 1e-9)

    def _ms_per_update(self, seconds: float) -> float:
        return 1000 * seconds / max(self.updates, 1)

    def summary(self) -> dict[str, float]:
        """Means since the last reset: loss in nats per target token without label smoothing, tokens without padding."""
        seconds = self._seconds()
        consistency = {} if self.consistency is None else {"train/consistency": self.consistency / max(self.tokens, 1)}
        return {
            "train/loss": self.nll / max(self.tokens, 1),
            **consistency,
            "train/accuracy": self.correct / max(self.tokens, 1),
            "train/grad_norm": self.grad_norm / max(self.updates, 1),
            "train/learning_rate": self.learning_rate,
            "train/skipped_updates": self.skipped,
            "train/target_tokens_per_s": self.tokens / seconds,
            "train/step_ms": self._ms_per_update(seconds),
            "train/fill": self.tokens / max(self.token_positions, 1),
            "train/input_wait": self.input_wait / seconds,
        }


def peak_memory_mb() -> float:
    """Peak memory so far in MiB: of the fullest device if the platform reports it, else of this process."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    if all(stats):
        return max(stat["peak_bytes_in_use"] for stat in stats) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
