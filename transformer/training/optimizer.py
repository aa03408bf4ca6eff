"""The optimizer: schedule, Adam (paper, section 5.3) or another, skipped loss spikes, moving average of params."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from transformer.config import Config, ModelConfig, OptimizerConfig, TrainConfig
from transformer.config.optimizers import OPTIMIZER_TRAITS
from transformer.models.registry import Params

LOSS_EMA_DECAY = 0.98  # of the mean loss with which a loss is compared: about the last 50 updates
MUON_RMS = 0.2  # root mean square of Muon's update before the learning rate: about that of Adam (Liu et al. 2025)

# Axes of a param that Muon takes for rows and columns of a matrix, from the last, as stacked layers have one more.
_MATRIX = contrib.MuonDimensionNumbers(-2, -1)
_INTO_HEADS = contrib.MuonDimensionNumbers(-3, (-2, -1))
_FROM_HEADS = _CONVOLUTION = contrib.MuonDimensionNumbers((-3, -2), -1)
MUON_PARAMS: dict[str, dict[str, contrib.MuonDimensionNumbers]] = {  # by model.family, and the last part of its name
    "attention": {
        **dict.fromkeys(("query", "key", "value"), _INTO_HEADS),
        "out": _FROM_HEADS,
        **dict.fromkeys(("kernel_in", "kernel_gate", "kernel_out"), _MATRIX),
    },
    "recurrent": dict.fromkeys(("kernel_in", "kernel_state", "query", "key", "out"), _MATRIX),
    "convolutional": {"kernel": _CONVOLUTION, **dict.fromkeys(("query", "key", "out"), _MATRIX)},
}


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


def _warmup(step: jax.Array, config: Config) -> jax.Array:
    """Rises linearly to learning_rate over the warm-up, then stays."""
    return config.optimizer.learning_rate * _rise(step, config)


def _rise(step: jax.Array, config: Config) -> jax.Array:
    """The share of the warm-up that is done, at most 1."""
    return jnp.minimum(step / max(config.optimizer.warmup_steps, 1), 1.0)


def _paper(step: jax.Array, config: Config) -> jax.Array:
    """Equation 3: rate · D^-0.5 · min(step^-0.5, step · warmup^-1.5), with warmup^-0.5 taken out of the minimum."""
    rate, D, warmup = config.optimizer.learning_rate, config.model.emb_dim, config.optimizer.warmup_steps
    return rate * (D * warmup) ** -0.5 * jnp.minimum((warmup / step) ** 0.5, step / warmup)


def _inverse_sqrt(step: jax.Array, config: Config) -> jax.Array:
    """Falls as step^-0.5 after the warm-up."""
    warmup = config.optimizer.warmup_steps
    return config.optimizer.learning_rate * jnp.minimum(_rise(step, config), (warmup / step) ** 0.5)


def _cosine(step: jax.Array, config: Config) -> jax.Array:
    """Falls as half a cosine from the end of the warm-up to 0 at num_steps."""
    return _warmup(step, config) * (0.5 * (1.0 + jnp.cos(jnp.pi * _share_after_warmup(step, config))))


def _linear(step: jax.Array, config: Config) -> jax.Array:
    """Falls linearly from the end of the warm-up to 0 at num_steps."""
    return _warmup(step, config) * (1.0 - _share_after_warmup(step, config))


def _share_after_warmup(step: jax.Array, config: Config) -> jax.Array:
    """From 0 at the end of the warm-up to 1 after the last update."""
    warmup = config.optimizer.warmup_steps
    return jnp.clip((step - 1.0 - warmup) / max(config.train.num_steps - warmup, 1), 0.0, 1.0)


def _wsd(step: jax.Array, config: Config) -> jax.Array:
    """Stays after the warm-up, then falls linearly over the last `decay_fraction` of the steps (Hu et al. 2024)."""
    steps, fraction = config.train.num_steps, config.optimizer.decay_fraction
    return _warmup(step, config) * jnp.clip((steps + 1.0 - step) / (fraction * steps), 0.0, 1.0)


# Learning rates, float32, of a step counted from 1, float32.
SCHEDULES: dict[str, Callable[[jax.Array, Config], jax.Array]] = {
    "paper": _paper,
    "inverse_sqrt": _inverse_sqrt,
    "cosine": _cosine,
    "linear": _linear,
    "constant": _warmup,
    "wsd": _wsd,
}


def make_schedule(config: Config) -> optax.Schedule:
    """Returns count → the learning rate of that update, counted from 0: int32 → float32."""
    schedule = SCHEDULES[config.optimizer.schedule]
    return lambda count: schedule(jnp.asarray(count, jnp.float32) + 1.0, config)


def peak_learning_rate(config: Config) -> float:
    """The highest rate of the schedule, that of the end of the warm-up."""
    step = min(max(config.optimizer.warmup_steps, 1), config.train.num_steps)
    return float(jax.device_get(make_schedule(config)(step - 1)))


def make_optimizer(config: Config) -> optax.GradientTransformationExtraArgs:
    """Clipping by global norm, the optimizer of `optimizer.name` with its schedule, skipped in a loss spike.

    Weight decay is decoupled, and of matrices alone. `update` takes the loss of the batch as `value`.
    """
    optimizer, schedule = config.optimizer, make_schedule(config)
    traits = OPTIMIZER_TRAITS[optimizer.name]
    chain = [OPTIMIZERS[optimizer.name](config)]
    if traits.decays_weights:
        mask = functools.partial(weight_decay_mask, config.model.scan_layers)
        chain.append(optax.add_decayed_weights(optimizer.weight_decay, mask=mask))
    chain.append(optax.scale_by_learning_rate(schedule))
    if traits.is_schedule_free:
        chain = [schedule_free(optax.chain(*chain), schedule, optimizer)]
    clip = [optax.clip_by_global_norm(optimizer.clip_norm)] if optimizer.clip_norm else []
    return skip_spikes(optax.chain(*clip, *chain), config.train)


def _adam(config: Config, nesterov: bool = False) -> optax.GradientTransformation:
    """Adam (Kingma & Ba 2015), or with Nesterov momentum (Dozat 2016)."""
    optimizer = config.optimizer
    return optax.scale_by_adam(optimizer.beta1, optimizer.beta2, optimizer.epsilon, nesterov=nesterov)


def _adam_without_momentum(config: Config) -> optax.GradientTransformation:
    """Adam for Schedule-Free, whose average takes the place of momentum."""
    return optax.scale_by_rms(config.optimizer.beta2, config.optimizer.epsilon, eps_in_sqrt=False, bias_correction=True)


def _muon_with_adam(config: Config) -> optax.GradientTransformation:
    """Muon (Jordan et al. 2024) for matrices of attention and feed-forward blocks; Adam for all other params.

    Muon's update is an orthogonal matrix, scaled to a root mean square of `MUON_RMS` whatever its shape, so that one
    learning rate serves both.
    """
    dimensions = functools.partial(muon_dimension_numbers, config.model)

    def scale(updates: optax.Updates, _: optax.Params | None) -> optax.Updates:
        return jax.tree.map(
            lambda update, axes: MUON_RMS * _max_fan(update, axes) ** 0.5 * update, updates, dimensions(updates)
        )

    muon = optax.chain(contrib.scale_by_muon(weight_dimension_numbers=dimensions), optax.stateless(scale))
    return optax.partition({"muon": muon, "adam": _adam(config)}, functools.partial(muon_labels, config.model))


def _max_fan(param: jax.Array, dimensions: contrib.MuonDimensionNumbers) -> int:
    """The rows or columns of a matrix, whichever are more."""
    return max(
        math.prod(param.shape[axis] for axis in ((axes,) if isinstance(axes, int) else axes)) for axes in dimensions
    )


def muon_dimension_numbers(model: ModelConfig, params: optax.Params) -> optax.Params:
    """Which axes of each param are rows and columns for Muon; None if Adam updates it."""
    return jax.tree_util.tree_map_with_path(lambda path, _: MUON_PARAMS[model.family].get(path[-1].key), params)


def muon_labels(model: ModelConfig, params: optax.Params) -> optax.Params:
    """The optimizer of each param: muon or adam."""
    names = MUON_PARAMS[model.family]
    return jax.tree_util.tree_map_with_path(lambda path, _: "muon" if path[-1].key in names else "adam", params)


# The update before weight decay and learning rate.
OPTIMIZERS: dict[str, Callable[[Config], optax.GradientTransformation]] = {
    "adam": _adam,
    "adamw": _adam,
    "nadamw": functools.partial(_adam, nesterov=True),
    "muon": _muon_with_adam,
    "schedule_free_adamw": _adam_without_momentum,
}


def schedule_free(
    inner: optax.GradientTransformation, schedule: optax.Schedule, optimizer: OptimizerConfig
) -> optax.GradientTransformationExtraArgs:
    """Schedule-Free learning (Defazio et al. 2024), whose params are the average x of the iterates z.

    Gradients are those at y, see `gradient_params`. `optax.contrib.schedule_free` keeps y as the params and computes x
    of it; kept the other way round, what is validated, saved, averaged and exported is x as it is.

    Args:
      inner: the optimizer that moves z, without momentum.
    """
    # It counts updates from 1, and `schedule` from 0.
    free = contrib.schedule_free(inner, lambda count: schedule(count - 1), optimizer.beta1)

    def update(
        updates: optax.Updates, state: contrib.ScheduleFreeState, params: optax.Params | None = None, **_: Any
    ) -> tuple[optax.Updates, contrib.ScheduleFreeState]:
        y = _interpolate(optimizer.beta1, params, state.z)
        y_updates, state = free.update(updates, state, y)
        x = contrib.schedule_free_eval_params(state, optax.apply_updates(y, y_updates))
        return jax.tree.map(jnp.subtract, x, params), state

    return optax.GradientTransformationExtraArgs(free.init, update)


def gradient_params(optimizer: OptimizerConfig, params: Params, opt_state: optax.OptState) -> Params:
    """The params at which the gradient is taken: y = beta1 x + (1 - beta1) z of Schedule-Free, else the params."""
    if not OPTIMIZER_TRAITS[optimizer.name].is_schedule_free:
        return params
    return _interpolate(optimizer.beta1, params, optax.tree.get(opt_state, "z"))


def _interpolate(weight: float, x: Any, z: Any) -> Any:
    return jax.tree.map(lambda x_leaf, z_leaf: weight * x_leaf + (1.0 - weight) * z_leaf, x, z)


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
