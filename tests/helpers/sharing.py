"""What equal configs share within a test process: programs are traced and compiled once, first states drawn once.

Most tests train or translate for the sake of files, signals or scores, with one tiny config and another workdir each.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import pytest
from flax import nnx

from transformer.config import validation
from transformer.decoding import decode
from transformer.distributed import sharding
from transformer.evaluation import evaluator
from transformer.models import registry
from transformer.training import train_step

# Fields that the compiled programs do not see.
HOST_FIELDS = (
    "log_every_steps",
    "eval_every_steps",
    "checkpoint_every_steps",
    "keep_last",
    "keep_best",
    "early_stopping_patience",
    "profile_steps",
    "init_from",
    "init_checkpoint",
)


SHARED = (
    (train_step, "make_train_step"),
    (train_step, "init_state"),
    (evaluator, "make_eval_step"),
    (sharding, "data_parallel_jit"),
)
ORIGINALS = [getattr(owner, name) for owner, name in SHARED]


def unshare_programs(patch: pytest.MonkeyPatch) -> None:
    """Until the patch is undone, everything is made anew."""
    for (owner, name), original in zip(SHARED, ORIGINALS, strict=True):
        patch.setattr(owner, name, original)


def share_programs(patch: pytest.MonkeyPatch) -> None:
    """Until the patch is undone, equal configs get one training step, evaluation step and search."""
    make_train_step = train_step.make_train_step
    patch.setattr(
        train_step, "make_train_step", _once(lambda *args: SharedUpdate(make_train_step(*args)), _training_key)
    )
    patch.setattr(evaluator, "make_eval_step", _once(evaluator.make_eval_step, lambda model, mesh: (_key(model), mesh)))
    patch.setattr(sharding, "data_parallel_jit", _once(sharding.data_parallel_jit, _search_key))
    params_of = _once(_params, lambda model, seed: (_key(model), seed))
    drawn = _once(_drawn, _training_key)
    init_state = train_step.init_state

    def draw(model: registry.ModelDef, config: Any, mesh: jax.sharding.Mesh, params: Any = None) -> Any:
        if params is not None:
            return init_state(model, config, mesh, params)
        state, shardings = drawn(init_state, params_of, model, config, mesh)
        return jax.device_put(state, shardings)

    patch.setattr(train_step, "init_state", draw)


class SharedUpdate:
    """A jitted update that is lowered and compiled once for equal shapes and shardings."""

    def __init__(self, update: Any):
        self._update, self._programs = update, dict[Any, Any]()

    def __call__(self, *args: Any) -> Any:
        return self._update(*args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._update, name)

    def lower(self, *args: Any) -> Any:
        leaves = jax.tree.leaves(args)
        key = tuple((leaf.shape, str(leaf.dtype), getattr(leaf, "sharding", None)) for leaf in leaves)
        if key not in self._programs:
            self._programs[key] = SharedLowering(self._update.lower(*args))
        return self._programs[key]


class SharedLowering:
    """What lowering returned, compiled once."""

    def __init__(self, lowered: Any):
        self._lowered = lowered
        self.compile = functools.cache(lowered.compile)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lowered, name)


def _once(make: Callable, key_of: Callable[..., Any]) -> Callable:
    """`make`, called once for equal keys; always called where the key is None."""
    made: dict[Any, Any] = {}

    @functools.wraps(make)
    def remembered(*args: Any) -> Any:
        key = key_of(*args)
        if key is None:
            return make(*args)
        if key not in made:
            made[key] = make(*args)
        return made[key]

    return remembered


def _params(model: registry.ModelDef, seed: int) -> Any:
    # Not compiled: equal layers share the small programs of each operation.
    return jax.device_get(model.init(seed))


def _drawn(init_state: Callable, params_of: Callable, *args: Any) -> tuple[Any, Any]:
    model, config, mesh = args
    params = params_of(model, config.train.seed)
    placed = jax.device_put(params, sharding.param_shardings(mesh, model.abstract_params))
    state = init_state(*args, placed)
    return jax.device_get(state), jax.tree.map(lambda leaf: leaf.sharding, state)


def _key(model: registry.ModelDef) -> Any:
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), nnx.to_pure_dict(model.abstract_params))
    return model._graphdef, str(shapes)


def _training_key(*args: Any) -> Any:
    model, config, mesh = args[-3:]
    train = {name: value for name, value in dataclasses.asdict(config.train).items() if name not in HOST_FIELDS}
    if not validation.schedule_depends_on_num_steps(config):
        del train["num_steps"]
    return _key(model), str(train), config.optimizer, config.model, config.data.batching, mesh


def _search_key(mesh: jax.sharding.Mesh, function: Callable) -> Any:
    if not isinstance(function, functools.partial) or function.func is not decode.decode:
        return None
    models, config, count = function.args
    return mesh, tuple(map(_key, models)), config, count
