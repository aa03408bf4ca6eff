"""The optimizer (paper, section 5.3): learning-rate schedule, Adam, skipped loss spikes, moving average of params."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from transformer.config import Config, TrainConfig
from transformer.models.registry import Params

LOSS_EMA_DECAY = 0.98  # of the mean loss with which a loss is compared: about the last 50 updates


class SpikeState(NamedTuple):
    """State of `skip_spikes`, scalars. Checkpoints keep the names of these fields.

    Attributes:
      mean: moving average of the loss, float32; infinite before the first update.
      length: number of updates of the current spike, int32; 0 outside a spike.
      skipped: number of updates skipped in the run, int32.
      inner: state of the optimizer.
    """

    mean: jax.Array
    length: jax.Array
    skipped: jax.Array
    inner: optax.OptState


def skip_spikes(inner: optax.GradientTransformation, train: TrainConfig) -> optax.GradientTransformationExtraArgs:
    """Skips updates whose loss is over `spike_factor` times the mean, at most `max_skipped_updates` in a row.

    A skipped update changes neither params nor the optimizer's moments and count. If the loss stays high, updates
    are made again and the mean follows. Without a `spike_factor` nothing is skipped.
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
        new_mean = jnp.where(jnp.isinf(state.mean), value, LOSS_EMA_DECAY * state.mean + (1 - LOSS_EMA_DECAY) * value)
        mean = jnp.where(skip, state.mean, new_mean)
        return updates, SpikeState(
            mean, length, state.skipped + skip.astype(jnp.int32), where_tree(skip, state.inner, inner_state)
        )

    return optax.GradientTransformationExtraArgs(init, update)


def num_skipped(opt_state: optax.OptState) -> jax.Array:
    """Number of updates skipped in the run, int32."""
    return opt_state.skipped if isinstance(opt_state, SpikeState) else jnp.zeros((), jnp.int32)


def where_tree(condition: jax.Array, x: Any, y: Any) -> Any:
    """`jnp.where(condition, x, y)` of the leaves of two trees; the condition is a bool []."""
    return jax.tree.map(lambda x_leaf, y_leaf: jnp.where(condition, x_leaf, y_leaf), x, y)


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
        decayed = jnp.clip((step - 1.0 - warmup) / max(steps - warmup, 1), 0.0, 1.0)
        fall = 0.5 * (1.0 + jnp.cos(jnp.pi * decayed)) if optimizer.schedule == "cosine" else 1.0 - decayed
        return peak * rise * fall

    return schedule


def make_optimizer(config: Config) -> optax.GradientTransformationExtraArgs:
    """Clipping by global norm, Adam, decoupled weight decay of matrices, and the schedule, skipped in a loss spike.

    Its `update` takes the loss of the batch as `value`.
    """
    optimizer = config.optimizer
    chain = []
    if optimizer.clip_norm:
        chain.append(optax.clip_by_global_norm(optimizer.clip_norm))
    chain.append(optax.scale_by_adam(b1=optimizer.beta1, b2=optimizer.beta2, eps=optimizer.epsilon))
    if optimizer.name == "adamw":
        mask = functools.partial(weight_decay_mask, config.model.scan_layers)
        chain.append(optax.add_decayed_weights(optimizer.weight_decay, mask=mask))
    chain.append(optax.scale_by_learning_rate(make_schedule(config)))
    return skip_spikes(optax.chain(*chain), config.train)


def weight_decay_mask(stacked: bool, params: optax.Params) -> optax.Params:
    """Marks the params that are matrices; those of stacked layers have one more axis."""

    def is_matrix(path: tuple, param: jax.Array) -> bool:
        return param.ndim > (2 if stacked and path[0].key in ("encoder", "decoder") else 1)

    return jax.tree_util.tree_map_with_path(is_matrix, params)


def update_ema(ema: Params, params: Params, step: jax.Array, decay: float) -> Params:
    """decay · ema + (1 - decay) · params; a smaller decay of (1 + step) / (10 + step) forgets the first params soon."""
    num_updates = step.astype(jnp.float32)
    weight = 1.0 - jnp.minimum(decay, (1.0 + num_updates) / (10.0 + num_updates))
    # Unlike `optax.incremental_update`, this leaves an average that equals the params as it is, to the last bit.
    return jax.tree.map(lambda old, new: old + weight * (new - old), ema, params)
