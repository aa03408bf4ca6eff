"""Products of activations with a kernel; activations have any number of leading axes.

N all leading axes in one.
"""

import math
from collections.abc import Callable

import jax.numpy as jnp
from jax import Array

from transformer.distributed import platform as platforms
from transformer.distributed import sharding


def linear(
    subscripts: str, x: Array, kernel: Array, einsum: Callable[[str, Array, Array], Array] = jnp.einsum
) -> Array:
    """The einsum of activations and a kernel, such as "...d,df->...f": [..., D], [D, F] → [..., F]."""
    operands, _, result = subscripts.partition("->")
    summed, kept = len(operands.partition(",")[0].removeprefix("...")), len(result.removeprefix("..."))
    product = einsum(subscripts, merge_leading(x, summed), kernel)
    return product.reshape(*x.shape[: x.ndim - summed], *product.shape[product.ndim - kept :])


def merge_leading(x: Array, trailing: int = 1) -> Array:
    """Merges all axes but the last ones, where that makes products faster: [..., D] → [N, D].

    It stays as it is where one of them is sharded: XLA loses the sharding of an axis that is merged into another, and
    gathers it.
    """
    if not platforms.merges_leading_axes() or sharding.num_shards("batch") * sharding.num_shards("length") > 1:
        return x
    split = x.ndim - trailing
    return x.reshape(math.prod(x.shape[:split]), *x.shape[split:])
