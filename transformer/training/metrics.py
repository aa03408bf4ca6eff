"""Training metrics: accumulated over updates, gathered from all processes, written to metrics.jsonl and TensorBoard."""

import contextlib
import json
import math
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from transformer.distributed import multihost
from transformer.distributed.sharding import allgather_to_devices
from transformer.models.flops import TrainingCost
from transformer.runtime import object_storage, progress
from transformer.runtime.errors import DivergedError
from transformer.runtime.files import METRICS_FILE, user_error_on_oserror, write_atomic
from transformer.runtime.logging import log_info, logged_beside
from transformer.training.train_step import StepMetrics

DIVERGENCE_HINT = (
    "no checkpoint of it is kept. Lower optimizer.learning_rate, raise optimizer.warmup_steps or set "
    "optimizer.clip_norm, and start in a new workdir"
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
        self.nll = self.correct = self.tokens = self.slots = self.input_wait = self.grad_norm = self.learning_rate = 0.0
        self._device_seconds, self.updates = 0.0, 0
        self.consistency: float | None = None
        self._start = self._clock()

    def add(self, metrics: StepMetrics, step: int, *, slots: int, flops: float) -> None:
        """Adds one update's metrics, already on the host.

        Raises:
          DivergedError: its loss or gradient is not finite.
        """
        if not (math.isfinite(metrics.loss.objective) and math.isfinite(metrics.grad_norm)):
            raise DivergedError(
                f"the run diverged: at update {step} the loss is {float(metrics.loss.objective)} and the gradient "
                f"norm {float(metrics.grad_norm)}; it was not made, and {DIVERGENCE_HINT}",
                step,
            )
        if int(metrics.skipped) > self.skipped:
            self.skipped = int(metrics.skipped)
            loss = float(metrics.loss.objective) / max(float(metrics.loss.tokens), 1)
            log_info(f"update {step:,} skipped: its loss of {loss:.3f} is a spike; {self.skipped:,} skipped so far")
        self.nll += float(metrics.loss.nll)
        self.correct += float(metrics.loss.correct)
        if metrics.consistency is not None:
            self.consistency = (self.consistency or 0.0) + float(metrics.consistency)
        self.tokens += float(metrics.loss.tokens)
        self.grad_norm += float(metrics.grad_norm)
        self.learning_rate = float(metrics.learning_rate)
        self.slots += slots
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
            "step_ms": self._ms_of_update(seconds),
            "host_ms": self._ms_of_update(seconds - self._device_seconds),
            "input_wait": self.input_wait / seconds,
        }

    def _seconds(self) -> float:
        return max(self._clock() - self._start, 1e-9)

    def _ms_of_update(self, seconds: float) -> float:
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
            "train/step_ms": self._ms_of_update(seconds),
            "train/fill": self.tokens / max(self.slots, 1),
            "train/input_wait": self.input_wait / seconds,
        }


def peak_memory_mb() -> float:
    """Peak memory so far in MiB: of the fullest device if the platform reports it, else of this process."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    if all(stats):
        return max(stat["peak_bytes_in_use"] for stat in stats) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


class MetricWriter:
    """Writes metrics.jsonl and TensorBoard events, and logs lines of metrics and progress; use as a context."""

    def __init__(self, workdir: epath.Path, start: int, num_steps: int):
        self._workdir, self._directory = workdir, object_storage.SyncedDirectory(workdir, METRICS_FILE)
        _truncate_after(self._directory.folder / METRICS_FILE, start, workdir)
        self._jsonl = (self._directory.folder / METRICS_FILE).open("a")
        # Not a SummaryWriter: it writes in a thread, and blocks for ever once an error has ended that.
        self._events = EventsWriter(str(self._directory.folder / "events"))
        self._write_event(start + 1, session_log=SessionLog(status=SessionLog.START))  # drops what is trained again
        self._training = progress.Phase("training", num_steps, "steps", completed=start)
        self._shown = contextlib.ExitStack()

    def __enter__(self) -> "MetricWriter":
        self._shown.enter_context(progress.shown(self._training))
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        self._shown.close()
        for file in (self._jsonl, self._events):
            with contextlib.suppress(OSError):  # what is written was flushed; a full disk has been reported
                file.close()
        with logged_beside(error), user_error_on_oserror(f"{self._workdir}"):
            self._directory.close()

    def sync(self) -> None:
        """Copies to object storage what is written so far."""
        with user_error_on_oserror(f"{self._workdir}"):
            self._directory.sync(now=True)

    def advance(self, step: int) -> None:
        """Shows how many updates have been started."""
        self._training.completed = step

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Records metrics of a step, and shows loss and speed."""
        with user_error_on_oserror(f"{self._workdir}"):
            self._jsonl.write(json.dumps({"step": step, **values}, allow_nan=False) + "\n")
            self._jsonl.flush()
            scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
            self._write_event(step, summary=Summary(value=scalars))
            self._events.flush()
            self._directory.sync()
        if "train/loss" in values:
            self._training.completed = step
            self._training.note = (
                f"loss {values['train/loss']:.3f} · {values['train/target_tokens_per_s']:,.0f} tokens/s"
            )
            if share := values.get("train/validation_share"):
                self._training.note += f" · {share:.0%} of the time validation"
            self.log_step(step, self._training.note)

    def _write_event(self, step: int, **content: Any) -> None:
        self._events.write_event(Event(wall_time=time.time(), step=step, **content))

    def log_step(self, step: int, text: str) -> None:
        """Logs a text about a step, and the time left if it is known."""
        left = self._training.seconds_left
        parts = [f"step {step:,}/{self._training.total:,}", text]
        log_info(" · ".join(parts if left is None else [*parts, f"{progress.format_seconds(left)} left"]))


class NullMetricWriter:
    """Writes nothing, on all processes but the primary."""

    def __enter__(self) -> "NullMetricWriter":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def _do_nothing(self, *_: object) -> None:
        """In place of each method of `MetricWriter`."""

    sync = advance = write = log_step = _do_nothing


def open_metric_writer(workdir: epath.Path, start: int, num_steps: int) -> MetricWriter | NullMetricWriter:
    """The writer of the primary process; one that writes nothing on others."""
    return MetricWriter(workdir, start, num_steps) if multihost.is_primary() else NullMetricWriter()


def _truncate_after(path: epath.Path, step: int, workdir: epath.Path) -> None:
    """Drops the lines of later steps, which will be trained again, and one that a kill cut short.

    Args:
      path: of the metrics, or of their local copy.
      step: the last that is kept.
      workdir: for messages.
    """
    if not path.exists():
        return
    if step == 0 and path.stat().length:
        old = path.parent / f"{path.name}.old"
        path.replace(old)
        log_info(f"{workdir}: holds no checkpoint, so training starts again; its old metrics are in {old.name}")
        return
    kept_lines = []
    for line in path.read_bytes().split(b"\n"):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            if json.loads(line)["step"] <= step:
                kept_lines.append(line + b"\n")
    if b"".join(kept_lines) != path.read_bytes():
        write_atomic(path, b"".join(kept_lines))


SLOWEST = "hosts/slowest"

HOST_TIME = "host_ms"  # per update, not waiting for devices: mostly reading data, while the others wait

STRAGGLER_RATIO = 1.5  # times the median of the others


def gather_host_metrics(mesh: Mesh, values: Mapping[str, float]) -> list[dict[str, float]]:
    """The values of each process, by index; empty for a single process."""
    if multihost.process_count() == 1:
        return []
    table = jax.device_get(allgather_to_devices(mesh, np.array(list(values.values()), np.float32)))
    rows = {device.process_index: row for device, row in zip(mesh.devices.flat, table.tolist(), strict=True)}
    return [dict(zip(values, rows[process], strict=True)) for process in sorted(rows)]


def summarize_hosts(hosts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Median and maximum of each value, under hosts/NAME/, and which process is slowest; empty without processes."""
    if not hosts:
        return {}
    metrics: dict[str, float] = {}
    for name in hosts[0]:
        values = [host[name] for host in hosts]
        metrics |= {f"hosts/{name}/median": statistics.median(values), f"hosts/{name}/max": max(values)}
    return {**metrics, SLOWEST: _slowest(hosts)}


def _slowest(hosts: Sequence[Mapping[str, float]]) -> int:
    return max(range(len(hosts)), key=lambda process: hosts[process][HOST_TIME])


class StragglerDetector:
    """Reports a process that is much slower than the others, twice in a row."""

    def __init__(self) -> None:
        self._suspect = -1

    def update(self, hosts: Sequence[Mapping[str, float]]) -> str:
        """The warning to log after the values of all processes, see `gather_host_metrics`; mostly empty."""
        if not hosts:
            return ""
        slowest = _slowest(hosts)
        times = [host[HOST_TIME] for host in hosts]
        longest, usual = times.pop(slowest), statistics.median(times)
        last_suspect = self._suspect
        is_slow = longest > STRAGGLER_RATIO * usual and longest > 0.1 * hosts[slowest]["step_ms"]
        self._suspect = slowest if is_slow else -1
        if not is_slow or last_suspect != slowest:
            return ""
        return (
            f"the others wait for {multihost.process_name(slowest)}: {longest:,.0f} ms of its own an update, usual are "
            f"{usual:,.0f}; it waits for its data {hosts[slowest]['input_wait']:.0%} of the time"
        )
