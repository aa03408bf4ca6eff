"""The devices of a machine in the shape of a mesh: neighbours in the mesh are neighbours in the machine.

Several slices of TPUs are joined by a slow network, over which only gradients go: each has its part of the data.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.experimental import mesh_utils

from transformer.runtime.errors import UserError


def neighbours(shape: tuple[int, ...], devices: Sequence[Any]) -> np.ndarray:
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
