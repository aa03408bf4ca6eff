"""Preemption: all processes learn of a stop signal that any of them got, at the same update."""

from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh

from transformer.distributed import multihost
from transformer.distributed.sharding import allgather_to_devices


class PreemptionSync:
    """The signal to stop that any host has got, of which all learn at the same update.

    Each host casts a vote with every update and reads those cast with the update before, which the devices
    have counted by then. So all stop two updates after a signal at the latest, and nobody waits.

    Args:
      own: the signal that this host has got, if any.
    """

    def __init__(self, mesh: Mesh, own: Callable[[], int | None]):
        self._mesh, self._own = mesh, own
        self._cast: jax.Array | None = None

    def __call__(self) -> int | None:
        """Once after each update, on every host."""
        if multihost.process_count() == 1:
            return self._own()
        votes, self._cast = self._cast, allgather_to_devices(self._mesh, np.array([self._own() or 0], np.int32))
        return None if votes is None else int(jax.device_get(votes).max()) or None
