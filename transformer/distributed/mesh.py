"""The device mesh: axes, shape and order of devices.

Neighbours in the mesh are neighbours in the machine. Several TPU slices are joined by a slow network, so they split
the data only, and nothing but gradients crosses it.
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

MESH_AXES = ("data", "fsdp", "tensor", "sequence")


def create_device_mesh(shape: tuple[int, ...], devices: Sequence[Any]) -> np.ndarray:
    """Arranges all devices in this shape, whose first axis is the data axis.

    Raises:
      UserError: an axis other than that of the data would span several TPU slices.
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


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh over the devices of all processes; a size of -1 takes all that are left.

    Args:
      devices: other devices, such as those of a topology to compile for.

    Raises:
      UserError: JAX finds no device, the sizes need more devices than there are, or with several processes fewer, or
        an axis other than that of the data would span several TPU slices.
    """
    available = _all_devices() if devices is None else list(devices)
    shape = mesh_shape(config, len(available))
    count = math.prod(shape)
    if count < len(available) and jax.process_count() > 1:
        raise UserError(f"config.mesh asks for {count} devices: with several hosts all {len(available)} must be used")
    grid = (
        create_device_mesh(shape, available) if count == len(available) else np.array(available[:count]).reshape(shape)
    )
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _all_devices() -> list[jax.Device]:
    try:
        devices = jax.devices()
    except (RuntimeError, AssertionError) as error:  # an AssertionError without a plugin for the platform
        platforms = os.environ.get("JAX_PLATFORMS", "")
        reason = str(error).partition("\n")[0] or "no such devices, or no plugin of jax for them"
        found = f"JAX_PLATFORMS={platforms}: expected devices of that platform, found none: {reason}; install"
        if not platforms:
            found = f"JAX cannot start its devices: {reason}; install again"
        raise UserError(f"{found} their driver and plugin, or set JAX_PLATFORMS=cpu") from error
    if jax.process_count() != multihost.process_count():
        raise UserError(
            f"JAX finds the devices of {jax.process_count()} processes, and this command runs in "
            f"{multihost.process_count()}: on one host of a TPU slice set TPU_PROCESS_BOUNDS=1,1,1 and "
            "TPU_CHIPS_PER_PROCESS_BOUNDS to its own chips, such as 2,2,1"
        )
    return devices


def mesh_shape(config: MeshConfig, devices: int) -> tuple[int, ...]:
    """The sizes of the mesh axes over this number of devices.

    Raises:
      UserError: the sizes need more devices, or the axis of size -1 does not divide them.
    """
    sizes = [getattr(config, axis) for axis in MESH_AXES]
    fixed = math.prod(size for size in sizes if size != -1)
    named = ", ".join(f"mesh.{axis} = {size}" for axis, size in zip(MESH_AXES, sizes, strict=True) if size != 1)
    if fixed > devices:
        raise UserError(f"config: {named} asks for {fixed} devices: found only {devices} devices; set smaller sizes")
    if -1 in sizes and devices % fixed:
        filling = MESH_AXES[sizes.index(-1)]
        advice = f"mesh.{filling} to {devices // fixed} to use {devices // fixed * fixed} of them, or "
        raise UserError(
            f"config: {named}: the {devices} devices cannot be divided by {fixed} to fill mesh.{filling}; set "
            f"{advice if jax.process_count() == 1 else ''}other sizes"
        )
    return tuple(devices // fixed if size == -1 else size for size in sizes)


def warm_up_collectives(mesh: Mesh) -> Mesh:
    """Runs a collective along each combination of axes, at a time when all processes are here; returns the mesh.

    For CPUs only: Gloo fails if one process comes 30 s after another to the first collective of a group, and
    compiling the program with that collective may take longer on one of them.
    """
    if multihost.process_count() == 1 or not platform.is_cpu(mesh):
        return mesh
    axes = [axis for axis in MESH_AXES if mesh.shape[axis] > 1]
    for names in itertools.chain.from_iterable(itertools.combinations(axes, n) for n in range(1, len(axes) + 1)):
        psum = functools.partial(jax.lax.psum, axis_name=names)
        spec = PartitionSpec()
        summed = jax.shard_map(psum, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
        replicated = NamedSharding(mesh, spec)
        program = jax.jit(summed).lower(jax.ShapeDtypeStruct((), np.int32, sharding=replicated)).compile()
        ones = jax.make_array_from_callback((), replicated, lambda _: np.ones((), np.int32))
        multihost.barrier("connection")
        jax.block_until_ready(program(ones))
    return mesh
