"""The training step: initialization and update of the state as pure functions, compiled once for each batch shape.

The state is a `checkpoints.state.TrainState`. Its params are a plain nested dict; the Flax module is split from them
once and merged inside the step.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from transformer.attention import fused
from transformer.checkpoints.state import TrainState
from transformer.config import Config
from transformer.data.batching import Batch
from transformer.data.tokenizer import PAD
from transformer.distributed import sharding
from transformer.models.registry import ModelDef, Params, with_shardings
from transformer.runtime import progress
from transformer.training.objective import TrainingLoss, make_objective
from transformer.training.optimizer import (
    gradient_params,
    make_optimizer,
    make_schedule,
    num_skipped,
    update_ema,
    where_tree,
)

Sums = TypeVar("Sums")


class StepMetrics(NamedTuple):
    """Metrics of one update over the global batch, float32 scalars.

    Attributes:
      loss: sums over target tokens.
      grad_norm: of the mean gradient, before clipping.
      source_tokens: without padding, EOS included.
      skipped: number of updates of the run skipped because of a loss spike, int32.
    """

    loss: TrainingLoss
    grad_norm: jax.Array
    learning_rate: jax.Array
    source_tokens: jax.Array
    skipped: jax.Array


def state_shardings(model: ModelDef, config: Config, mesh: Mesh) -> TrainState:
    """The sharding of each array of the state; the optimizer's moments are sharded as their params."""
    params = sharding.param_shardings(mesh, model.abstract_params)
    shapes = nnx.to_pure_dict(model.abstract_params)
    optimizer = make_optimizer(config)
    replicated = sharding.replicated(mesh)

    def is_masked(leaf: Any) -> bool:  # a param that another optimizer of the same run updates
        return isinstance(leaf, optax.MaskedNode)

    opt_state = optax.tree.map_params(
        optimizer,
        lambda leaf, param_sharding: leaf if is_masked(leaf) else param_sharding,
        jax.eval_shape(optimizer.init, shapes),
        params,
        transform_non_params=lambda _: replicated,
        is_leaf=is_masked,
    )
    return TrainState(cast(Any, replicated), params, opt_state, params if config.train.ema_decay else None)


def init_state(model: ModelDef, config: Config, mesh: Mesh, params: Params | None = None) -> TrainState:
    """Makes the state before the first update on the devices, already sharded.

    Args:
      params: to start from, donated; None: random ones.
    """

    def init(params: Params | None) -> TrainState:
        params = model.init(config.train.seed) if params is None else params
        ema = jax.tree.map(jnp.copy, params) if config.train.ema_decay else None
        return TrainState(jnp.zeros((), jnp.int32), params, make_optimizer(config).init(params), ema)

    return jax.jit(init, out_shardings=state_shardings(model, config, mesh), donate_argnums=0)(params)


def abstract_state(model: ModelDef, config: Config, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state, for restoring one."""
    shapes = nnx.to_pure_dict(model.abstract_params)
    step: Any = jax.ShapeDtypeStruct((), jnp.int32)
    opt_state = jax.eval_shape(make_optimizer(config).init, shapes)
    state = TrainState(step, shapes, opt_state, shapes if config.train.ema_decay else None)
    return with_shardings(state, state_shardings(model, config, mesh))


def make_train_step(
    model: ModelDef, config: Config, mesh: Mesh
) -> Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]:
    """Returns the jitted step. It donates its state argument: continue with the state that it returns.

    It returns the state unchanged if the loss or the gradient is not finite.

    Raises:
      UserError: the config forces an attention kernel that the mesh's devices cannot run.
    """
    fused.check_supported(config, mesh)  # again, for those who call this without `preparation`
    optimizer, schedule = make_optimizer(config), make_schedule(config)
    objective = make_objective(model, config, mesh)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        # Made here: a key made outside would be a constant, read back from an accelerator while the step is lowered.
        run_key = jax.random.fold_in(jax.random.key(config.train.seed), 1)  # 1: not the key of initialization
        key = jax.random.fold_in(run_key, state.step)
        params_of_gradient = gradient_params(config.optimizer, state.params, state.opt_state)
        num_micro_batches = config.train.accumulation_steps
        grad_sums, loss = accumulate_gradients(objective, params_of_gradient, batch, key, num_micro_batches)
        # The sums run over all rows of all devices, so these are gradients of the mean over the global batch's tokens.
        tokens = jnp.maximum(loss.tokens, 1.0)
        grads = jax.tree.map(lambda grad: grad / tokens, grad_sums)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes its integer step with floats
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params, value=loss.objective / tokens)
        params = optax.apply_updates(state.params, updates)
        metrics = StepMetrics(
            loss=loss,
            grad_norm=optax.tree.norm(grads),
            learning_rate=schedule(state.step - num_skipped(state.opt_state)),
            source_tokens=(batch.source_BS != PAD).sum(dtype=jnp.float32),
            skipped=num_skipped(opt_state),
        )
        ema = None if state.ema is None else update_ema(state.ema, params, state.step, config.train.ema_decay)
        is_bad = ~(jnp.isfinite(loss.objective) & jnp.isfinite(metrics.grad_norm))
        return where_tree(is_bad, state, TrainState(state.step + 1, params, opt_state, ema)), metrics

    shardings = state_shardings(model, config, mesh)
    return jax.jit(
        train_step,
        in_shardings=(shardings, sharding.batch_sharding(mesh)),
        out_shardings=(shardings, sharding.replicated(mesh)),
        donate_argnums=0,
    )


def compile_shapes(
    jitted_step: Any, state: TrainState, batches: Sequence[Batch], threads: int
) -> dict[tuple[int, ...], Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]]:
    """Compiles the step ahead for batches of these shapes, several at once; returns batch_shape → program.

    Args:
      jitted_step: of `make_train_step`.
      state: or its shapes and shardings.
      batches: shapes and shardings.
      threads: programs compiled at once.
    """
    with ThreadPoolExecutor(threads) as pool, progress.phase("compiling", len(batches), "shapes") as compiling:

        def compile_for(batch: Batch) -> Any:
            program = jitted_step.lower(state, batch).compile()
            compiling.advance()
            return program

        programs = list(pool.map(compile_for, batches))
    return {batch_shape(batch): program for batch, program in zip(batches, programs, strict=True)}


def batch_shape(batch: Batch) -> tuple[int, ...]:
    """Rows, source and target width: what a compiled step depends on."""
    return (*np.shape(batch.source_BS), np.shape(batch.target_BT)[-1])


def accumulate_gradients(
    objective: Callable[[Params, Batch, jax.Array], tuple[jax.Array, Sums]],
    params: Params,
    batch: Batch,
    key: jax.Array,
    num_micro_batches: int,
) -> tuple[Params, Sums]:
    """Gradient of a sum over the batch, and its sums, computed one micro-batch after the other.

    Only one micro-batch's activations are in memory at a time. As sums are added, and divided once by all tokens,
    micro-batches may have different numbers of tokens.
    """
    gradient = jax.grad(objective, has_aux=True)
    if num_micro_batches == 1:
        return gradient(params, batch, key)

    def split(array: jax.Array) -> jax.Array:
        # Micro-batch i of n has rows i, i + n, i + 2n …: of 4 rows, [0, 2] and [1, 3]. Each device, which holds
        # consecutive rows, then has its share of every micro-batch.
        rows = array.reshape(array.shape[0] // num_micro_batches, num_micro_batches, *array.shape[1:])
        return jnp.moveaxis(rows, 1, 0)

    def add(total: tuple[Params, Sums], micro_batch: tuple[Batch, jax.Array]) -> tuple[tuple[Params, Sums], None]:
        return jax.tree.map(jnp.add, total, gradient(params, *micro_batch)), None

    def sums_of_first(batch: Batch) -> Sums:
        return objective(params, jax.tree.map(lambda array: split(array)[0], batch), key)[1]

    zeros = jax.tree.map(jnp.zeros_like, (params, jax.eval_shape(sums_of_first, batch)))
    return jax.lax.scan(add, zeros, (jax.tree.map(split, batch), jax.random.split(key, num_micro_batches)))[0]


@jax.jit
def all_finite(params: Params) -> jax.Array:
    """Whether every param is finite; bool []."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(params)]).all()
