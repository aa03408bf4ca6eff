"""Preemption: all processes learn of a stop signal that any of them got, at the same update."""

from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh

from transformer.distributed import multihost
from transformer.distributed.sharding import allgather_to_devices


class PreemptionSync:
    """Returns the stop signal that any process has received, to all of them after the same update.

    With each update every process sends its signal to the others by way of the devices, and reads what was sent with
    the update before, which has arrived by then. So all stop at most two updates after a signal, and none waits.

    Args:
      stop_signal: the signal that this process has received, if any.
    """

    def __init__(self, mesh: Mesh, stop_signal: Callable[[], int | None]):
        self._mesh, self._stop_signal = mesh, stop_signal
        self._sent: jax.Array | None = None

    def __call__(self) -> int | None:
        """Called once after each update, by every process."""
        if multihost.process_count() == 1:
            return self._stop_signal()
        signal_number = np.array([self._stop_signal() or 0], np.int32)
        signals, self._sent = self._sent, allgather_to_devices(self._mesh, signal_number)
        return None if signals is None else int(jax.device_get(signals).max()) or None
