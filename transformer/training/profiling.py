"""Profiles updates by jax.profiler, for the profile plugin of TensorBoard and for Perfetto."""

import contextlib
import tempfile
from collections.abc import Iterator

import jax
from etils import epath

from transformer.distributed import multihost
from transformer.runtime import object_storage, progress
from transformer.runtime.files import user_error_on_oserror
from transformer.runtime.logging import log_info

FOLDER = "plugins/profile"  # in the workdir, where TensorBoard finds it


class StepProfiler:
    """Traces some updates of a session on the primary process; use as a context, which ends a trace.

    Args:
      steps: the updates, counted from 1.
    """

    def __init__(self, workdir: epath.Path, steps: range):
        self._workdir = workdir
        self._steps = steps if multihost.is_primary() else range(0)
        self._trace: contextlib.ExitStack | None = None

    def __enter__(self) -> "StepProfiler":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self, step: int) -> None:
        """Begins the trace if this update, which comes next, is to be traced."""
        if step in self._steps and not self._trace:
            log_info(f"profiling steps {step:,} to {self._steps[-1]:,}")
            self._trace = contextlib.ExitStack()
            self._trace.enter_context(_trace(self._workdir))

    def ends_with(self, step: int) -> bool:
        """Whether this update is the last to be traced; call `stop` when it is done."""
        return self._trace is not None and step >= self._steps[-1]

    def stop(self) -> None:
        """Writes the trace, if there is one."""
        if self._trace:
            trace, self._trace = self._trace, None
            with progress.phase("writing the profile"):
                trace.close()
            log_info(f"profile: {self._workdir / FOLDER}; tensorboard --logdir={self._workdir} shows it")


@contextlib.contextmanager
def _trace(workdir: epath.Path) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        is_remote = object_storage.is_remote(workdir)
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="profile-")) if is_remote else workdir
        with user_error_on_oserror(f"{workdir / FOLDER}"):
            jax.profiler.start_trace(folder, create_perfetto_trace=True)
            try:
                yield
            finally:
                jax.profiler.stop_trace()
                if is_remote:
                    object_storage.upload(folder, workdir)
