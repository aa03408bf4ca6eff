"""Stacks of layers: unrolled or scanned, with rematerialization.

B batch, T length, D model width, L layers.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from transformer.distributed import sharding
from transformer.models.params import Key

REMAT_POLICIES: dict[str, Callable] = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def stack_layers(layers: Sequence[nnx.Module], scan: bool) -> nnx.Module:
    """Returns a list of layers, or with `scan` one layer whose params are stacked along a first axis `layers`."""
    if not scan:
        return nnx.List(layers)
    states = [nnx.state(layer) for layer in layers]
    stacked = nnx.merge(nnx.graphdef(layers[0]), jax.tree.map(lambda *leaves: jnp.stack(leaves), *states))
    for _, param in nnx.to_flat_state(nnx.state(stacked, nnx.Param)):
        param.set_metadata(axes=("layers", *param.get_metadata()["axes"]))
    return stacked


def unstack_layers(stack: nnx.Module) -> list[Any]:
    """The list of layers, stacked or not."""
    if isinstance(stack, nnx.List):
        return list(stack)
    graphdef, params = nnx.split(stack)
    count = jax.tree.leaves(params)[0].shape[0]
    return [nnx.merge(graphdef, jax.tree.map(lambda leaf, i=i: leaf[i], params)) for i in range(count)]


def apply_layers(
    stack: nnx.Module, x_BTD: Array, keys_L: Key, remat: str, call: Callable[[Any, Array, Key], Array]
) -> Array:
    """Applies `call(layer, x_BTD, key)` layer by layer, unrolled or by `lax.scan`.

    Args:
      keys_L: dropout keys, one per layer; None: no dropout.
      remat: what the backward pass recomputes, `none` or one of REMAT_POLICIES (Chen et al. 2016). All-gathered
        params are gathered again in any case, else each device would keep those of all layers.
    """

    def maybe_remat(function: Callable) -> Callable:
        if remat == "none":
            gathers = sharding.num_shards("embed") > 1
            return jax.checkpoint(function, policy=sharding.save_all_but_gathered) if gathers else function
        return jax.checkpoint(function, policy=REMAT_POLICIES[remat])

    if isinstance(stack, nnx.List):
        for i, layer in enumerate(stack):
            key = None if keys_L is None else keys_L[i]
            x_BTD = maybe_remat(lambda x, key, layer=layer: call(layer, x, key))(x_BTD, key)
        return x_BTD
    graphdef, params = nnx.split(stack)

    def body(x_BTD: Array, layer: tuple[Any, Key]) -> tuple[Array, None]:
        layer_params, key = layer
        return call(nnx.merge(graphdef, layer_params), x_BTD, key), None

    return jax.lax.scan(maybe_remat(body), x_BTD, (params, keys_L))[0]
