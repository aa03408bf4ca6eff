"""Times calls and training steps, for the other measurements."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from transformer.config import Config
from transformer.data.batching import Batch
from transformer.distributed import sharding
from transformer.distributed.mesh import make_mesh
from transformer.models.registry import ModelDef
from transformer.training import train_step


def seconds_of(call: Callable[..., Any], *arguments: Any, count: int = 1) -> float:
    """Seconds of a call, the mean of `count` in a row; waits for the arrays that the last one returns."""
    since = time.perf_counter()
    for _ in range(count):
        result = call(*arguments)
    jax.block_until_ready(result)
    return (time.perf_counter() - since) / count


class CompiledUpdate(NamedTuple):
    """A training step for one batch, warm.

    Attributes:
      program: as compiled.
      run: makes one more update; returns its metrics.
      compile_s: seconds to compile.
    """

    program: Any
    run: Callable[[], Any]
    compile_s: float


def compile_update(config: Config, vocab_size: int, batch: Batch) -> CompiledUpdate:
    """Compiles the training step for a batch, and runs it once."""
    mesh = make_mesh(config.mesh)
    model = ModelDef(config.model, vocab_size)
    state: Any = train_step.init_state(model, config, mesh)
    placed = sharding.shard_batch(mesh, batch, config.train.accumulation_steps)
    update: Any = train_step.make_train_step(model, config, mesh)
    since = time.perf_counter()
    program = update.lower(state, placed).compile()
    compile_s = time.perf_counter() - since

    def run() -> Any:
        nonlocal state
        state, metrics = program(state, placed)
        return metrics

    jax.block_until_ready(run())
    return CompiledUpdate(program, run, compile_s)
