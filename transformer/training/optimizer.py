"""The learning rate schedule and the chain of gradient transformations (paper, section 5.3)."""

import functools

import jax
import jax.numpy as jnp
import optax

from transformer.config import Config
from transformer.training.guard import skip_spikes


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
        matrices = functools.partial(_matrices, config.model.scan_layers)
        chain.append(optax.add_decayed_weights(optimizer.weight_decay, mask=matrices))
    chain.append(optax.scale_by_learning_rate(make_schedule(config)))
    return skip_spikes(optax.chain(*chain), config.train)


def _matrices(stacked: bool, params: optax.Params) -> optax.Params:
    """Which params are matrices; those of stacked layers have one axis more."""

    def is_matrix(path: tuple, param: jax.Array) -> bool:
        return param.ndim > (2 if stacked and path[0].key in ("encoder", "decoder") else 1)

    return jax.tree_util.tree_map_with_path(is_matrix, params)
