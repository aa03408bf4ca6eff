"""Padding of arrays, for kernels and caches of whole blocks."""

import jax.numpy as jnp
from jax import Array


def pad_end(array: Array, axis: int, length: int) -> Array:
    """Pads `axis` to `length` with zeros at its end; as segment ids they are padding."""
    if array.shape[axis] == length:
        return array
    return jnp.pad(array, [(0, length - size if i == axis else 0) for i, size in enumerate(array.shape)])
