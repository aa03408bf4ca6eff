"""What hosts tell each other while they train, by the devices and beside the updates: whether to stop, how each does.

Nothing here makes a host wait for another that the updates would not make it wait for.
"""

import functools
import itertools
import statistics
from collections.abc import Callable, Mapping

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from transformer.distributed import multihost, sharding

SLOWEST = "hosts/slowest"
OWN_TIME = "host_ms"  # of an update, not spent with the devices: data, mostly; the others wait for it
CONSPICUOUS = 1.5  # times what is usual among the hosts


def connect(mesh: Mesh) -> Mesh:
    """Connects the devices along each combination of axes, as collectives will use them, while hosts are together.

    Gloo, which CPUs use, gives up if one host comes 30 s after another to the first collective of a group, and
    compiling the programs that hold them may take longer on one.
    """
    if multihost.count() == 1 or mesh.devices.flat[0].platform != "cpu":
        return mesh
    axes = [axis for axis in sharding.MESH_AXES if mesh.shape[axis] > 1]
    for names in itertools.chain.from_iterable(itertools.combinations(axes, n) for n in range(1, len(axes) + 1)):
        together = functools.partial(jax.lax.psum, axis_name=names)
        whole = PartitionSpec()
        summed = jax.shard_map(together, mesh=mesh, in_specs=whole, out_specs=whole, check_vma=False)
        where = sharding.replicated(mesh)
        program = jax.jit(summed).lower(jax.ShapeDtypeStruct((), np.int32, sharding=where)).compile()
        one = jax.make_array_from_callback((), where, lambda _: np.ones((), np.int32))
        multihost.wait("connection")
        jax.block_until_ready(program(one))
    return mesh


def of_every_device(mesh: Mesh, values_K: np.ndarray) -> jax.Array:
    """What each process gives, on every device: [devices, K], in the order of the mesh. Dispatched, not waited for."""
    shape, where = (mesh.size, *values_K.shape), sharding.batch_sharding(mesh, "sentences")
    return sharding.gather(mesh)(jax.make_array_from_callback(shape, where, lambda _: values_K[None]))


class StopVote:
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
        if multihost.count() == 1:
            return self._own()
        votes, self._cast = self._cast, of_every_device(self._mesh, np.array([self._own() or 0], np.int32))
        return None if votes is None else int(jax.device_get(votes).max()) or None


def of_each_host(mesh: Mesh, values: Mapping[str, float]) -> dict[str, float]:
    """What each host measured, under hosts/INDEX/NAME, and which is slowest; nothing where there is one host."""
    if multihost.count() == 1:
        return {}
    table = jax.device_get(of_every_device(mesh, np.array(list(values.values()), np.float32)))
    of_host = {device.process_index: row for device, row in zip(mesh.devices.flat, table.tolist(), strict=True)}
    found = {
        f"hosts/{host}/{name}": value
        for host in sorted(of_host)
        for name, value in zip(values, of_host[host], strict=True)
    }
    return {**found, SLOWEST: max(of_host, key=lambda host: found[f"hosts/{host}/{OWN_TIME}"])}


class Slowest:
    """Names a host that takes conspicuously more time than the others, twice in a row."""

    def __init__(self) -> None:
        self._suspect = -1

    def look(self, found: Mapping[str, float]) -> str:
        """What there is to say of the measurements of `of_each_host`; mostly nothing."""
        if SLOWEST not in found:
            return ""
        slowest, times = int(found[SLOWEST]), [found[f"hosts/{host}/{OWN_TIME}"] for host in range(multihost.count())]
        most, usual = times.pop(slowest), statistics.median(times)
        before = self._suspect
        is_slow = most > CONSPICUOUS * usual and most > 0.1 * found[f"hosts/{slowest}/step_ms"]
        self._suspect = slowest if is_slow else -1
        if not is_slow or before != slowest:
            return ""
        waited = found[f"hosts/{slowest}/input_wait"]
        return (
            f"the others wait for {multihost.name(slowest)}: {most:,.0f} ms of its own an update, usual are "
            f"{usual:,.0f}; it waits for its data {waited:.0%} of the time"
        )
