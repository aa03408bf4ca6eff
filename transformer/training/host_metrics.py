"""Metrics of each process: gathered, summarized, and searched for one that is much slower than the others."""

import statistics
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from transformer.distributed import multihost
from transformer.distributed.sharding import allgather_to_devices

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
        waiting = hosts[slowest]["input_wait"]
        return (
            f"the others wait for {multihost.process_name(slowest)}: it takes {longest:,.0f} ms of host time per "
            f"update, the others {usual:,.0f} (median), and waits for data {waiting:.0%} of the time"
        )
