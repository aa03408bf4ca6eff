"""The learning rate schedule and the chain of gradient transformations (paper, section 5.3)."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from transformer.config import Config, TrainConfig

LOSS_EMA_DECAY = 0.98  # of the mean loss that a spike is measured by: about the last 50 updates


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
        followed = jnp.where(jnp.isinf(state.mean), value, LOSS_EMA_DECAY * state.mean + (1 - LOSS_EMA_DECAY) * value)
        mean = jnp.where(skip, state.mean, followed)
        return updates, SpikeState(
            mean, length, state.skipped + skip.astype(jnp.int32), where_tree(state.inner, inner_state, skip)
        )

    return optax.GradientTransformationExtraArgs(init, update)


def num_skipped(opt_state: optax.OptState) -> jax.Array:
    """How many updates of the run were skipped, int32."""
    return opt_state.skipped if isinstance(opt_state, SpikeState) else jnp.zeros((), jnp.int32)


def where_tree(old: Any, new: Any, when: jax.Array) -> Any:
    """A tree of arrays as it was where `when`, bool [], is true; else as it has become."""
    return jax.tree.map(lambda before, after: jnp.where(when, before, after), old, new)


def make_schedule(config: Config) -> optax.Schedule:
    """Learning rate of update `count`, counted from 0: int32 → float32.

    `paper`: learning_rate · D^-0.5 · min(step^-0.5, step · warmup^-1.5) with step = count + 1
    (equation 3). All others rise linearly to learning_rate over the warm-up, then stay (`constant`),
    fall as step^-0.5 (`inverse_sqrt`), or reach 0 at num_steps (`cosine`, `linear`).
    """
    optimizer, steps = config.optimizer, config.train.num_steps
    peak, warmup = optimizer.learning_rate, optimizer.warmup_steps
    if optimizer.schedule == "paper":
        peak *= (config.model.emb_dim * warmup) ** -0.5

    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        step = jnp.asarray(count, jnp.float32) + 1.0
        rise = jnp.minimum(step / max(warmup, 1), 1.0)
        if optimizer.schedule == "constant":
            return peak * rise
        if optimizer.schedule in ("paper", "inverse_sqrt"):
            return peak * jnp.minimum(rise, (warmup / step) ** 0.5)
        # From 0 at the end of warm-up to 1 after the last update.
        done = jnp.clip((step - 1.0 - warmup) / max(steps - warmup, 1), 0.0, 1.0)
        fall = 0.5 * (1.0 + jnp.cos(jnp.pi * done)) if optimizer.schedule == "cosine" else 1.0 - done
        return peak * rise * fall

    return schedule


def make_optimizer(config: Config) -> optax.GradientTransformationExtraArgs:
    """Clipping by global norm, Adam, decoupled weight decay of matrices, and the schedule; none of it in a spike.

    Its update takes the loss of the batch as `value`.
    """
    optimizer = config.optimizer
    chain = []
    if optimizer.clip_norm:
        chain.append(optax.clip_by_global_norm(optimizer.clip_norm))
    chain.append(optax.scale_by_adam(b1=optimizer.beta1, b2=optimizer.beta2, eps=optimizer.epsilon))
    if optimizer.name == "adamw":
        matrices = functools.partial(weight_decay_mask, config.model.scan_layers)
        chain.append(optax.add_decayed_weights(optimizer.weight_decay, mask=matrices))
    chain.append(optax.scale_by_learning_rate(make_schedule(config)))
    return skip_spikes(optax.chain(*chain), config.train)


def weight_decay_mask(stacked: bool, params: optax.Params) -> optax.Params:
    """Which params are matrices; those of stacked layers have one axis more."""

    def is_matrix(path: tuple, param: jax.Array) -> bool:
        return param.ndim > (2 if stacked and path[0].key in ("encoder", "decoder") else 1)

    return jax.tree_util.tree_map_with_path(is_matrix, params)
