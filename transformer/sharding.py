"""The mesh, and the one table from logical axes to mesh axes; no other room names a mesh axis.

The model calls the axes of its params `vocab`, `embed`, `heads` and so on; this table says which of
them a mesh splits. An axis that the table lacks is an error, never silently replicated.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from transformer.config import MeshConfig
from transformer.errors import UserError

MESH_AXES = ("data", "fsdp", "tensor", "sequence")

LOGICAL_AXES: Mapping[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv": None,
    "mlp": "tensor",
    "norm": None,
    "positions": None,
}


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The devices of all hosts, arranged by the config; axes that it does not set have size 1.

    Args:
      devices: others instead, such as those of a topology that is not here.

    Raises:
      UserError: there are not that many devices.
    """
    devices = jax.devices() if devices is None else devices
    data = len(devices) if config.data == -1 else config.data
    if data > len(devices):
        raise UserError(f"config.mesh.data = {data}: found only {len(devices)} devices")
    if data < len(devices) and jax.process_count() > 1:
        raise UserError(f"config.mesh.data = {data}: with several hosts all {len(devices)} devices must be used")
    grid = np.array(devices[:data]).reshape(data, 1, 1, 1)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def spec(axes: tuple[str, ...]) -> PartitionSpec:
    """Mesh axes of an array whose axes have these logical names."""
    unknown = [axis for axis in axes if axis not in LOGICAL_AXES]
    if unknown:
        raise ValueError(f"no rule for the logical axis {unknown[0]!r}; add it to sharding.LOGICAL_AXES")
    return PartitionSpec(*(LOGICAL_AXES[axis] for axis in axes))


def param_shardings(mesh: Mesh, abstract_params: nnx.State) -> dict:
    """A sharding for each param, as a nested dict like `nnx.to_pure_dict(abstract_params)`.

    Raises:
      ValueError: a param whose axes have no names, or fewer names than axes.
    """

    def of(path: tuple, param: nnx.Variable) -> NamedSharding:
        axes = param.get_metadata().get("axes")
        if axes is None or len(axes) != len(param.get_value().shape):
            raise ValueError(f"param {'/'.join(map(str, path))}: expected a name for each axis, got {axes}")
        return NamedSharding(mesh, spec(axes))

    flat = {path: of(path, param) for path, param in nnx.to_flat_state(abstract_params)}
    return nnx.to_pure_dict(nnx.from_flat_state(flat))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same value on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch split over the data axes."""
    return NamedSharding(mesh, spec(("batch",)))


def over_rows(mesh: Mesh, function: Callable[[Any, jax.Array], Any]) -> Callable[[Any, jax.Array], Any]:
    """function(params, rows) → rows, run by each device on its own rows, with nothing sent between them."""
    rows = spec(("batch",))
    return jax.shard_map(function, mesh=mesh, in_specs=(PartitionSpec(), rows), out_specs=rows, check_vma=False)


def row_multiple(mesh: Mesh) -> int:
    """Rows of a batch must divide by this."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def place_batch(mesh: Mesh, batch: Any, parts: int = 1) -> Any:
    """This host's rows of a batch → global arrays; rows are filled up with zeros, which are padding, to divide.

    Args:
      parts: into how many each device's rows must divide further.
    """
    shards = max(row_multiple(mesh) // jax.process_count(), 1) * parts

    def place(array: np.ndarray) -> jax.Array:
        missing = -len(array) % shards
        filled = np.pad(array, ((0, missing), *((0, 0),) * (array.ndim - 1))) if missing else array
        if jax.process_count() == 1:
            return jax.device_put(filled, batch_sharding(mesh))
        return jax.make_array_from_process_local_data(batch_sharding(mesh), filled)

    return jax.tree.map(place, batch)
