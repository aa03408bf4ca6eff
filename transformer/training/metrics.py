"""What a run tells: metrics.jsonl, TensorBoard events, and a progress bar or plain lines on stderr."""

import contextlib
import json
import math
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tensorboardX import SummaryWriter

from transformer.distributed import multihost
from transformer.distributed.sharding import allgather_to_devices
from transformer.models.flops import Spent
from transformer.runtime import object_storage
from transformer.runtime.errors import DivergedError
from transformer.runtime.files import METRICS_FILE, user_error_on_oserror, write_atomic
from transformer.runtime.logging import log_info
from transformer.training.train_step import StepMetrics

DIVERGENCE_HINT = (
    "no checkpoint was made of that. Lower optimizer.learning_rate, raise optimizer.warmup_steps or set "
    "optimizer.clip_norm, and start in a new workdir"
)


class MetricsAccumulator:
    """Adds up the metrics of updates between two lines of the log, and what the run has cost from its start.

    Time spent elsewhere is left out of both.

    Args:
      spent: before this sitting.
      skipped: updates skipped before it for their loss.
    """

    def __init__(
        self, spent: Spent | None = None, clock: Callable[[], float] = time.perf_counter, skipped: int = 0
    ) -> None:
        self._clock, self._spent = clock, spent or Spent()
        self._begun = clock() - self._spent.seconds
        self.skipped = skipped
        self.reset()

    def reset(self) -> None:
        """Starts anew, the clock too."""
        self.nll = self.correct = self.tokens = self.slots = self.input_wait = self.grad_norm = self.learning_rate = 0.0
        self._blocked, self.updates = 0.0, 0
        self._start = self._clock()

    def add(self, metrics: StepMetrics, step: int, *, slots: int, flops: float) -> None:
        """Adds one update's metrics, already on the host.

        Raises:
          DivergedError: its loss or gradient is not a finite number.
        """
        if not (math.isfinite(metrics.loss.objective) and math.isfinite(metrics.grad_norm)):
            raise DivergedError(
                f"the run diverged: at update {step} the loss is {float(metrics.loss.objective)} and the gradient norm "
                f"{float(metrics.grad_norm)}; it was not made, and {DIVERGENCE_HINT}",
                step,
            )
        if int(metrics.skipped) > self.skipped:
            self.skipped = int(metrics.skipped)
            loss = float(metrics.loss.objective) / max(float(metrics.loss.tokens), 1)
            log_info(f"update {step:,} skipped: its loss of {loss:.3f} is a spike; {self.skipped:,} skipped so far")
        self.nll += float(metrics.loss.nll)
        self.correct += float(metrics.loss.correct)
        self.tokens += float(metrics.loss.tokens)
        self.grad_norm += float(metrics.grad_norm)
        self.learning_rate = float(metrics.learning_rate)
        self.slots += slots
        self.updates += 1
        before = self._spent
        self._spent = before._replace(
            flops=before.flops + flops,
            tokens=before.tokens + float(metrics.loss.tokens),
            source_tokens=before.source_tokens + float(metrics.source_tokens),
        )

    def cost(self) -> Spent:
        """All sittings so far, this one included; never reset."""
        return self._spent._replace(seconds=self._clock() - self._begun)

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Stops the clock."""
        since = self._clock()
        yield
        away = self._clock() - since
        self._start += away
        self._begun += away

    @contextlib.contextmanager
    def device_wait(self) -> Iterator[None]:
        """Notes how long the host is with the devices: some runtimes return from an update only when it is done."""
        since = self._clock()
        yield
        self._blocked += self._clock() - since

    def host_timing(self) -> dict[str, float]:
        """Of this host since the last reset; `host_ms` is its time in an update that it was not with the devices."""
        seconds, updates = max(self._clock() - self._start, 1e-9), max(self.updates, 1)
        return {
            "step_ms": 1000 * seconds / updates,
            "host_ms": 1000 * (seconds - self._blocked) / updates,
            "input_wait": self.input_wait / seconds,
        }

    def summary(self) -> dict[str, float]:
        """Means since the last reset: loss in nats per target token, without smoothing; speed in real target tokens."""
        seconds = max(self._clock() - self._start, 1e-9)
        return {
            "train/loss": self.nll / max(self.tokens, 1),
            "train/accuracy": self.correct / max(self.tokens, 1),
            "train/grad_norm": self.grad_norm / max(self.updates, 1),
            "train/learning_rate": self.learning_rate,
            "train/skipped_updates": self.skipped,
            "train/target_tokens_per_s": self.tokens / seconds,
            "train/step_ms": 1000 * seconds / max(self.updates, 1),
            "train/fill": self.tokens / max(self.slots, 1),
            "train/input_wait": self.input_wait / seconds,
        }


def peak_memory_mb() -> float:
    """Most memory in use at once so far, in MiB: of the fullest device where they say so, else of this process."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    if all(stats):
        return max(stat["peak_bytes_in_use"] for stat in stats) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


class _Console(Console):
    """Falls silent when whoever read it is gone, where rich would end the process."""

    def on_broken_pipe(self) -> None:
        """Called by rich."""
        self.quiet = True


class MetricWriter:
    """The run's files and its bar; use as a context."""

    def __init__(self, workdir: epath.Path, start: int, num_steps: int):
        self._workdir, self._directory = workdir, object_storage.SyncedDirectory(workdir, METRICS_FILE)
        _truncate_after(self._directory.folder / METRICS_FILE, start)
        self._jsonl = (self._directory.folder / METRICS_FILE).open("a")
        self._events = SummaryWriter(str(self._directory.folder), purge_step=start + 1)
        self._console = _Console(stderr=True, highlight=False, soft_wrap=True)
        columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
        columns += [TextColumn("{task.fields[note]}"), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()]
        # A file or a pipe gets one line for each line of metrics instead of a bar.
        self._bar = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._task = self._bar.add_task("training", total=num_steps, completed=start, note="")
        self._num_steps, self._begun, self._start = num_steps, time.perf_counter(), start

    def __enter__(self) -> "MetricWriter":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
        with contextlib.suppress(OSError):  # what is written was flushed; a full disk has been reported
            self._jsonl.close()
            self._events.close()
        self._directory.close()

    def sync(self) -> None:
        """What is written so far will be there whatever happens to this machine."""
        self._directory.sync(now=True)

    def advance(self, step: int) -> None:
        """Moves the bar."""
        self._bar.update(self._task, completed=step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Records metrics of a step, and shows the ones people follow."""
        with user_error_on_oserror(f"--workdir={self._workdir}"):
            self._jsonl.write(json.dumps({"step": step, **values}, allow_nan=False) + "\n")
            self._jsonl.flush()
            for name, value in values.items():
                self._events.add_scalar(name, np.float64(value), step)
            self._events.flush()
            self._directory.sync()
        if "train/loss" in values:
            note = f"loss {values['train/loss']:.3f} · {values['train/target_tokens_per_s']:,.0f} tokens/s"
            self._bar.update(self._task, completed=step, note=note)
            if not self._console.is_terminal:
                self.log(f"step {step:,}/{self._num_steps:,} · {note} · {self._left(step)} left")

    def log(self, message: str) -> None:
        """A line above the bar."""
        self._console.print(message, markup=False)

    def _left(self, step: int) -> str:
        each = (time.perf_counter() - self._begun) / max(step - self._start, 1)
        minutes, seconds = divmod(round(each * (self._num_steps - step)), 60)
        return f"{minutes}:{seconds:02}"


class NullMetricWriter:
    """In place of a RunLog, on hosts that leave it to the lead."""

    def __enter__(self) -> "NullMetricWriter":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def sync(self) -> None:
        """Nothing."""

    def advance(self, step: int) -> None:
        """Nothing."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Nothing."""

    def log(self, message: str) -> None:
        """Nothing."""


def open_metric_writer(workdir: epath.Path, start: int, num_steps: int) -> MetricWriter | NullMetricWriter:
    """The log of the run, which the lead keeps."""
    return MetricWriter(workdir, start, num_steps) if multihost.is_primary() else NullMetricWriter()


def _truncate_after(path: epath.Path, step: int) -> None:
    """Drops lines of steps that are about to be done again, and one that a kill cut short."""
    if not path.exists():
        return
    if step == 0 and path.stat().length:
        old = path.parent / f"{path.name}.old"
        path.replace(old)
        log_info(
            f"{path.parent}: holds no checkpoint, so training starts anew; the metrics of before are in {old.name}"
        )
        return
    kept = []
    for line in path.read_bytes().split(b"\n"):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            if json.loads(line)["step"] <= step:
                kept.append(line + b"\n")
    if b"".join(kept) != path.read_bytes():
        write_atomic(path, b"".join(kept))


SLOWEST = "hosts/slowest"

HOST_TIME = "host_ms"  # of an update, not spent with the devices: data, mostly; the others wait for it

STRAGGLER_RATIO = 1.5  # times what is usual among the hosts


def per_host_metrics(mesh: Mesh, values: Mapping[str, float]) -> dict[str, float]:
    """What each host measured, under hosts/INDEX/NAME, and which is slowest; nothing where there is one host."""
    if multihost.process_count() == 1:
        return {}
    table = jax.device_get(allgather_to_devices(mesh, np.array(list(values.values()), np.float32)))
    of_host = {device.process_index: row for device, row in zip(mesh.devices.flat, table.tolist(), strict=True)}
    found = {
        f"hosts/{host}/{name}": value
        for host in sorted(of_host)
        for name, value in zip(values, of_host[host], strict=True)
    }
    return {**found, SLOWEST: max(of_host, key=lambda host: found[f"hosts/{host}/{HOST_TIME}"])}


class StragglerDetector:
    """Names a host that takes conspicuously more time than the others, twice in a row."""

    def __init__(self) -> None:
        self._suspect = -1

    def update(self, found: Mapping[str, float]) -> str:
        """What there is to say of the measurements of `of_each_host`; mostly nothing."""
        if SLOWEST not in found:
            return ""
        slowest, times = (
            int(found[SLOWEST]),
            [found[f"hosts/{host}/{HOST_TIME}"] for host in range(multihost.process_count())],
        )
        most, usual = times.pop(slowest), statistics.median(times)
        before = self._suspect
        is_slow = most > STRAGGLER_RATIO * usual and most > 0.1 * found[f"hosts/{slowest}/step_ms"]
        self._suspect = slowest if is_slow else -1
        if not is_slow or before != slowest:
            return ""
        waited = found[f"hosts/{slowest}/input_wait"]
        return (
            f"the others wait for {multihost.process_name(slowest)}: {most:,.0f} ms of its own an update, usual are "
            f"{usual:,.0f}; it waits for its data {waited:.0%} of the time"
        )
