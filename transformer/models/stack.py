"""A stack of equal layers: written out, or one program over stacked params; and what its backward pass keeps.

L layers, B batch, T length, D model width.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from transformer.distributed import sharding

Array = jax.Array
Key = Array | None

POLICIES: dict[str, Callable] = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def make_stack(layers: Sequence[nnx.Module], scan: bool) -> nnx.Module:
    """The layers as a list, or with `scan` as one whose params have a first axis `layers`, of the same values."""
    if not scan:
        return nnx.List(layers)
    states = [nnx.state(layer) for layer in layers]
    stacked = nnx.merge(nnx.graphdef(layers[0]), jax.tree.map(lambda *leaves: jnp.stack(leaves), *states))
    for _, param in nnx.to_flat_state(nnx.state(stacked, nnx.Param)):
        param.set_metadata(axes=("layers", *param.get_metadata()["axes"]))
    return stacked


def layers_of(stack: nnx.Module, count: int) -> list[Any]:
    """The layers, one by one, however they are kept."""
    if isinstance(stack, nnx.List):
        return list(stack)
    graphdef, params = nnx.split(stack)
    return [nnx.merge(graphdef, jax.tree.map(lambda leaf, i=i: leaf[i], params)) for i in range(count)]


def run_stack(
    stack: nnx.Module, x_BTD: Array, keys_L: Key, remat: str, call: Callable[[Any, Array, Key], Array]
) -> Array:
    """`call(layer, x_BTD, key)` of one layer after the other.

    Args:
      keys_L: of dropout, one a layer; None: nothing is dropped.
      remat: what the backward pass computes again, `none` or one of POLICIES (Chen et al. 2016). Params that were
        gathered to be used are gathered again in any case, else each device would keep those of all layers.
    """

    def kept(function: Callable) -> Callable:
        if remat == "none":
            gathers = sharding.shards("embed") > 1
            return jax.checkpoint(function, policy=sharding.all_but_gathered) if gathers else function
        return jax.checkpoint(function, policy=POLICIES[remat])

    if isinstance(stack, nnx.List):
        for i, layer in enumerate(stack):
            key = None if keys_L is None else keys_L[i]
            x_BTD = kept(lambda x, key, layer=layer: call(layer, x, key))(x_BTD, key)
        return x_BTD
    graphdef, params = nnx.split(stack)
    body = kept(lambda x, layer: (call(nnx.merge(graphdef, layer[0]), x, layer[1]), None))
    return jax.lax.scan(body, x_BTD, (params, keys_L))[0]
