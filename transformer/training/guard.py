"""Updates that are not made: those of a loss that is no number, and a few of one that has shot up.

Both are decided on the devices, within the update, so the host need not wait for a loss before it goes on.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from transformer.config import TrainConfig

MEMORY = 0.98  # of the mean loss that a spike is measured by: about the last 50 updates


class SpikeState(NamedTuple):
    """All scalars; inner is the state of the optimizer.

    Attributes:
      mean: of the loss of the updates made lately, float32; infinite before the first.
      length: of the spike at hand in updates, int32; 0 where the loss is no spike.
      skipped: updates skipped in the whole run, int32.
    """

    mean: jax.Array
    length: jax.Array
    skipped: jax.Array
    inner: optax.OptState


def skip_spikes(inner: optax.GradientTransformation, train: TrainConfig) -> optax.GradientTransformationExtraArgs:
    """Skips updates whose loss is over `spike_factor` times the mean: the first `max_skipped_updates` of a spike.

    If the loss stays high beyond them, the updates are made again and the mean follows it. A skipped update
    changes neither params nor the optimizer's moments and count. Without a factor it is `inner` itself.
    """
    if not train.spike_factor:
        return optax.with_extra_args_support(inner)

    def init(params: optax.Params) -> SpikeState:
        zero = jnp.zeros((), jnp.int32)
        return SpikeState(jnp.full((), jnp.inf), zero, zero, inner.init(params))

    def update(
        updates: optax.Updates, state: SpikeState, params: optax.Params | None = None, *, value: jax.Array, **_: Any
    ) -> tuple[optax.Updates, SpikeState]:
        length = jnp.where(value > train.spike_factor * state.mean, state.length + 1, 0)
        skip = (length > 0) & (length <= train.max_skipped_updates)
        updates, inner_state = inner.update(updates, state.inner, params)
        updates = jax.tree.map(lambda leaf: jnp.where(skip, jnp.zeros_like(leaf), leaf), updates)
        followed = jnp.where(jnp.isinf(state.mean), value, MEMORY * state.mean + (1 - MEMORY) * value)
        mean = jnp.where(skip, state.mean, followed)
        return updates, SpikeState(
            mean, length, state.skipped + skip.astype(jnp.int32), keep(state.inner, inner_state, skip)
        )

    return optax.GradientTransformationExtraArgs(init, update)


def skipped(opt_state: optax.OptState) -> jax.Array:
    """How many updates of the run were skipped, int32."""
    return opt_state.skipped if isinstance(opt_state, SpikeState) else jnp.zeros((), jnp.int32)


def keep(old: Any, new: Any, when: jax.Array) -> Any:
    """A tree of arrays as it was where `when`, bool [], is true; else as it has become."""
    return jax.tree.map(lambda before, after: jnp.where(when, before, after), old, new)
