"""The training step compiled ahead of time, for devices that need not be here."""

import importlib.metadata
import importlib.util
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from transformer.config import Config
from transformer.data.batching import Batch, rows_per_batch
from transformer.distributed import sharding
from transformer.models import registry
from transformer.planning.hardware import GPU_TARGETS, Topology
from transformer.runtime.errors import UserError
from transformer.training import train_step


class Compiled(NamedTuple):
    """A program and the bytes of main memory that a chip needs for it.

    Attributes:
      arguments: state and batch.
      temporaries: what is alive at the worst moment besides.
      outputs: results that do not take the place of an argument.
      code: the program itself.
      text: the program as XLA prints it; empty where it is too large to compile.
      needed: all of it, as the compiler says where it refuses.
    """

    arguments: int
    temporaries: int
    outputs: int
    aliased: int
    code: int
    needed: int
    text: str


def devices(topology: Topology) -> list[Any]:
    """The devices of a topology, described and not there, or simulated ones.

    Raises:
      UserError: an arrangement that cannot be, or the compiler for it is not installed.
    """
    if topology.chip.platform == "cpu":
        found = jax.devices("cpu")
        if len(found) < topology.chips:
            raise UserError(f"--topology={topology.name}: JAX has already started with {len(found)} simulated devices")
        return found[: topology.chips]
    tpu = topology.chip.platform == "tpu"
    compilers = ["libtpu"] if tpu else ["jax_cuda13_plugin", "jax_cuda12_plugin"]
    if not any(map(importlib.util.find_spec, compilers)):
        package = f"'jax[{'tpu' if tpu else 'cuda13'}]=={importlib.metadata.version('jax')}'"
        raise UserError(
            f"--topology={topology.name}: needs the {'TPU' if tpu else 'GPU'} compiler: "
            f"{'run `make plan`, or ' if tpu else ''}pip install {package}"
        )
    try:
        if tpu:
            return list(topologies.get_topology_desc(platform="tpu", topology_name=topology.name).devices)
        shape, target = f"1x1x{topology.chips}", GPU_TARGETS[topology.chip.name]
        described = topologies.get_topology_desc(
            platform="cuda", topology_name=topology.chip.name, topology=shape, target_config=target
        )
        return list(described.devices)
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        raise UserError(f"--topology={topology.name}: the compiler refuses it: {error}") from error


def batch_rows(config: Config, mesh: Mesh, length: int) -> int:
    """Rows of a batch of this width, filled up so that they divide over the mesh and the parts of a step."""
    rows = rows_per_batch(config.train.batch_tokens, length)
    return sharding.padded_batch_size(mesh, rows, config.train.accumulation_steps)


def compile_step(config: Config, mesh: Mesh, rows: int, length: int, effort: float = 0.0) -> Compiled:
    """Compiles the update for batches of this shape.

    Args:
      effort: how hard XLA tries for speed of the program, from -1 to 0, which is its default.
    """
    model = registry.ModelDef(config.model, config.data.vocab_size)
    ids = jax.ShapeDtypeStruct((rows, length), np.int32, sharding=sharding.batch_sharding(mesh))
    update: Any = train_step.make_train_step(model, config, mesh)
    platform = {"gpu": "cuda"}.get(mesh.devices.flat[0].platform, mesh.devices.flat[0].platform)
    state = train_step.abstract_state(model, config, mesh)
    lowered = update.trace(state, Batch(ids, ids)).lower(lowering_platforms=(platform,))
    try:
        compiled = lowered.compile(compiler_options=compiler_options(platform, effort))
    except jax.errors.JaxRuntimeError as error:
        return Compiled(0, 0, 0, 0, 0, needed_bytes(str(error)), "")
    memory = compiled.memory_analysis()
    arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    aliased, code = memory.alias_size_in_bytes, memory.generated_code_size_in_bytes
    outputs = memory.output_size_in_bytes - aliased
    needed = arguments + temporaries + outputs + code
    return Compiled(arguments, temporaries, outputs, aliased, code, needed, compiled.as_text())


def compiler_options(platform: str, effort: float) -> dict[str, Any]:
    """Options of this version of JAX for a platform and an effort, see `compile_step`."""
    # Without a GPU to try them on, XLA would have Triton multiply all matrices, and finds no tiles for some.
    options: dict[str, Any] = {"xla_gpu_enable_triton_gemm": False} if platform == "cuda" else {}
    if hasattr(jax.config, "jax_exec_time_optimization_effort"):  # until JAX 0.10
        return {**options, "exec_time_optimization_effort": effort}
    level = "UNKNOWN" if effort == 0 else "O1" if effort > -0.5 else "O0"
    return {**options, "optimization_level": level}


# The TPU compiler's words, as libtpu 0.0.42.1 says them, and as older ones did.
_TOO_MUCH = re.compile(r"(?:required for HLO temporaries \(|Used )([\d.]+)([KMGT])")


def needed_bytes(message: str) -> int:
    """What a program would need, from the compiler's message that there is not so much; other errors stay errors."""
    used = _TOO_MUCH.search(message)
    if "RESOURCE_EXHAUSTED" not in message or not used:
        raise RuntimeError(message)
    return int(float(used[1]) * 1024 ** (1 + "KMGT".index(used[2])))


CLOSE = 0.04  # of what fits: how near the search comes to what does not

MOST = 2**20


def largest(needed: Callable[[int], int], available: int, first: int = 1) -> int:
    """The most units of batch, such as rows a chip, that need no more than is available; 0 where one does not fit.

    Memory grows about evenly with the batch, so a line through two trials says what to try next; but what
    counts is what was tried. The result is within 4% of the most.

    Args:
      needed: bytes for so many units.
      first: units to try first.
    """
    tried: dict[int, int] = {}
    units, fits, fails = first, 0, MOST
    while units:
        tried[units] = needed(units)
        if tried[units] <= available:
            fits = units
        else:
            fails = units
        nearest = fits + max(1, int(fits * CLOSE))
        if nearest >= fails:
            break
        units = min(max(_on_line(tried, available), nearest), fails - 1, 8 * max(fits, 1))
    return fits


def _on_line(tried: dict[int, int], available: int) -> int:
    """Where a line through the last two trials, or through one and zero, meets the limit."""
    (low, low_bytes), (high, high_bytes) = [(0, 0), *tried.items()][-2:]
    if low_bytes == high_bytes:
        return high
    return int(low + (available - low_bytes) * (high - low) / (high_bytes - low_bytes))
