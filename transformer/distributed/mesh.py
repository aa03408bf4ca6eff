"""The mesh of devices: its axes, its shape, and which device stands where.

Neighbours in the mesh are neighbours in the machine. Several slices of TPUs are joined by a slow network, over which
only gradients go: each has its part of the data.
"""

import functools
import itertools
import math
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from transformer.config import MeshConfig
from transformer.distributed import multihost, platform
from transformer.runtime.errors import UserError


def create_device_mesh(shape: tuple[int, ...], devices: Sequence[Any]) -> np.ndarray:
    """All devices in this shape, whose first axis is that of the data.

    Raises:
      UserError: several slices of TPUs would share anything but the data.
    """
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if devices[0].platform == "tpu" else 1
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    if shape[0] % slices:
        raise UserError(
            f"config: mesh.data = {shape[0]}: the {len(devices)} TPUs are {slices} slices, each of which must have the "
            f"whole model; set mesh.data to a multiple of {slices}, or to -1 and the product of the other sizes to a "
            f"divisor of {len(devices) // slices}"
        )
    within, across = (shape[0] // slices, *shape[1:]), (slices, *(1 for _ in shape[1:]))
    return mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)


MESH_AXES = ("data", "fsdp", "tensor", "sequence")


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The devices of all hosts, arranged by the config; its -1 takes all that are left.

    Args:
      devices: others instead, such as those of a topology that is not here.

    Raises:
      UserError: JAX finds no device, or the sizes ask for more devices than there are, or with several hosts for
        fewer, or would share anything but the data among slices of TPUs.
    """
    available = _all_devices() if devices is None else list(devices)
    shape = mesh_shape(config, len(available))
    count = math.prod(shape)
    if count < len(available) and jax.process_count() > 1:
        raise UserError(f"config.mesh asks for {count} devices: with several hosts all {len(available)} must be used")
    # Neighbours in the mesh are neighbours in the machine, where that is known.
    grid = (
        create_device_mesh(shape, available) if count == len(available) else np.array(available[:count]).reshape(shape)
    )
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _all_devices() -> list[jax.Device]:
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter where no plugin for such devices is installed
        platforms = os.environ.get("JAX_PLATFORMS", "")
        reason = str(error).partition("\n")[0] or "no such devices, or no plugin of jax for them"
        raise UserError(
            f"JAX_PLATFORMS={platforms}: expected devices of that platform, found none: {reason}; install its driver "
            "and plugin, or set JAX_PLATFORMS=cpu"
        ) from error


def mesh_shape(config: MeshConfig, devices: int) -> tuple[int, ...]:
    """Sizes of the mesh's axes over so many devices.

    Raises:
      UserError: more devices are asked for than there are, or -1 cannot be filled.
    """
    sizes = [getattr(config, axis) for axis in MESH_AXES]
    asked = math.prod(size for size in sizes if size != -1)
    named = ", ".join(f"mesh.{axis} = {size}" for axis, size in zip(MESH_AXES, sizes, strict=True) if size != 1)
    if asked > devices:
        raise UserError(f"config: {named} asks for {asked} devices: found only {devices} devices; set smaller sizes")
    if -1 in sizes and devices % asked:
        filling = MESH_AXES[sizes.index(-1)]
        raise UserError(
            f"config: {named}: the {devices} devices cannot be divided by {asked} to fill mesh.{filling}; set "
            f"mesh.{filling} to {devices // asked} to use {devices // asked * asked} of them, or other sizes"
        )
    return tuple(devices // asked if size == -1 else size for size in sizes)


def warm_up_collectives(mesh: Mesh) -> Mesh:
    """Connects the devices along each combination of axes, as collectives will use them, while hosts are together.

    Gloo, which CPUs use, gives up if one host comes 30 s after another to the first collective of a group, and
    compiling the programs that hold them may take longer on one.
    """
    if multihost.process_count() == 1 or not platform.is_cpu(mesh):
        return mesh
    axes = [axis for axis in MESH_AXES if mesh.shape[axis] > 1]
    for names in itertools.chain.from_iterable(itertools.combinations(axes, n) for n in range(1, len(axes) + 1)):
        together = functools.partial(jax.lax.psum, axis_name=names)
        whole = PartitionSpec()
        summed = jax.shard_map(together, mesh=mesh, in_specs=whole, out_specs=whole, check_vma=False)
        where = NamedSharding(mesh, whole)
        program = jax.jit(summed).lower(jax.ShapeDtypeStruct((), np.int32, sharding=where)).compile()
        one = jax.make_array_from_callback((), where, lambda _: np.ones((), np.int32))
        multihost.barrier("connection")
        jax.block_until_ready(program(one))
    return mesh
