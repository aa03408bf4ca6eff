"""Writes the metrics of a run to metrics.jsonl and TensorBoard, and shows progress."""

import contextlib
import json
import time
from collections.abc import Mapping
from typing import Any

from etils import epath
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from transformer.distributed import multihost
from transformer.runtime import object_storage, progress
from transformer.runtime.files import METRICS_FILE, user_error_on_oserror, write_atomic
from transformer.runtime.logging import log_info, logged_beside


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


class NullMetricWriter(MetricWriter):
    """Writes nothing, on all processes but the primary."""

    def __init__(self) -> None:
        pass

    def __enter__(self) -> "NullMetricWriter":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def _do_nothing(self, *_: Any, **__: Any) -> None:
        """In place of each method of `MetricWriter`."""

    sync = advance = write = log_step = _do_nothing


def open_metric_writer(workdir: epath.Path, start: int, num_steps: int) -> MetricWriter:
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
