"""Rotary position encodings: queries and keys are rotated by angles that grow with their positions (Su et al. 2021).

The product of a rotated query and a rotated key depends on the distance between their positions alone. Column j of a
head is rotated together with column j + K/2. RoFormer takes neighbours; that is the same with the columns of the
projections in another order, and slower.

B batch, T length, H heads, K width per head, J half of it.
"""

import jax.numpy as jnp
import numpy as np
from jax import Array

Rotation = Array
"""float32 [B or 1, T, 1, 4, J]: for each half of a head the cosine, then the sine with the sign that it has there."""


def rotation_at(positions_BT: Array, width: int) -> Rotation:
    """The rotation of heads of an even width at these positions, int32 [B or 1, T]: by 10000^(-2j/K) a position.

    One array, made by concatenation: XLA's CPU back end would compute separate cosines again in each head and layer.
    """
    rate_J = (10000.0 ** -(np.arange(0, width, 2) / width)).astype(np.float32)
    angle_BT11J = positions_BT.astype(jnp.float32)[:, :, None, None, None] * rate_J[None, None, None, None, :]
    cos_BT11J, sin_BT11J = jnp.cos(angle_BT11J), jnp.sin(angle_BT11J)
    return jnp.concatenate([cos_BT11J, cos_BT11J, -sin_BT11J, sin_BT11J], axis=3)


def rotate(x_BTHK: Array, rotation: Rotation) -> Array:
    """Rotates the heads of each position, in float32.

    The halves are swapped by reversing an axis of two, which costs no pass over the array, as concatenation would.
    """
    B, T, H, K = x_BTHK.shape
    cos_BT12J, sin_BT12J = jnp.split(rotation, 2, axis=3)
    x_BTH2J = x_BTHK.astype(jnp.float32).reshape(B, T, H, 2, K // 2)
    rotated_BTH2J = x_BTH2J * cos_BT12J + jnp.flip(x_BTH2J, 3) * sin_BT12J
    return rotated_BTH2J.reshape(x_BTHK.shape).astype(x_BTHK.dtype)
