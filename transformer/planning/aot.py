"""Ahead-of-time compilation of the training step for devices that are not attached, and the largest batch that fits."""

import importlib.metadata
import importlib.util
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from transformer.config import Config
from transformer.data.batching import Bucket, rows_per_batch
from transformer.distributed import sharding
from transformer.models import registry
from transformer.planning.hardware import GPU_TARGETS, Topology
from transformer.runtime.errors import UserError
from transformer.training import train_step


class Compiled(NamedTuple):
    """A compiled program and its HBM in bytes per chip.

    Attributes:
      arguments: state and batch.
      temporaries: at the peak.
      outputs: results without those aliased to arguments.
      aliased: results aliased to arguments.
      code: of the program.
      needed: in all; if the program is too large, from the compiler's error.
      text: as XLA prints it; "" if the program is too large.
    """

    arguments: int
    temporaries: int
    outputs: int
    aliased: int
    code: int
    needed: int
    text: str


def topology_devices(topology: Topology) -> list[Any]:
    """The devices of a topology: descriptions for ahead-of-time compilation, or simulated devices.

    Raises:
      UserError: the topology is invalid, or its compiler is not installed.
    """
    if topology.chip.platform == "cpu":
        simulated = jax.devices("cpu")
        if len(simulated) < topology.chips:
            raise UserError(
                f"--topology={topology.name}: expected {topology.chips} simulated devices, JAX has {len(simulated)}; "
                "raise --xla_force_host_platform_device_count in XLA_FLAGS, or leave it out"
            )
        return simulated[: topology.chips]
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
    """Rows of a batch of this width, padded to a multiple of mesh and accumulation steps."""
    rows = rows_per_batch(config.train.batch_tokens, length)
    return sharding.padded_batch_size(mesh, rows, config.train.accumulation_steps)


def compile_step(config: Config, mesh: Mesh, rows: int, length: int, effort: float = 0.0) -> Compiled:
    """Compiles the update for batches of this shape.

    Args:
      config: of the run.
      mesh: of the devices to compile for.
      rows, length: of the batch, which is padded as in training.
      effort: of XLA to optimize the program, from -1 to 0, its default.
    """
    model = registry.ModelDef(config.model, config.data.vocab_size)
    batch = sharding.abstract_batch(mesh, Bucket(length, length, rows), config.train.accumulation_steps)
    update: Any = train_step.make_train_step(model, config, mesh)
    platform = {"gpu": "cuda"}.get(mesh.devices.flat[0].platform, mesh.devices.flat[0].platform)
    state = train_step.abstract_state(model, config, mesh)
    lowered = update.trace(state, batch).lower(lowering_platforms=(platform,))
    try:
        compiled = lowered.compile(compiler_options=compiler_options(platform, effort))
    except jax.errors.JaxRuntimeError as error:
        return Compiled(0, 0, 0, 0, 0, required_bytes(str(error)), "")
    memory = compiled.memory_analysis()
    arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    aliased, code = memory.alias_size_in_bytes, memory.generated_code_size_in_bytes
    outputs = memory.output_size_in_bytes - aliased
    needed = arguments + temporaries + outputs + code
    return Compiled(arguments, temporaries, outputs, aliased, code, needed, compiled.as_text())


def compiler_options(platform: str, effort: float) -> dict[str, Any]:
    """Compiler options of this version of JAX; `effort` as in `compile_step`."""
    # Without a GPU for autotuning, XLA would use Triton for all matrix products, and finds no tiles for some.
    options: dict[str, Any] = {"xla_gpu_enable_triton_gemm": False} if platform == "cuda" else {}
    if hasattr(jax.config, "jax_exec_time_optimization_effort"):  # until JAX 0.10
        return {**options, "exec_time_optimization_effort": effort}
    level = "UNKNOWN" if effort == 0 else "O1" if effort > -0.5 else "O0"
    return {**options, "optimization_level": level}


# The TPU compiler's error, by libtpu 0.0.42.1 ("required for HLO temporaries (20.5G)") and older ("Used 20.5G").
_OUT_OF_MEMORY = re.compile(r"(?:required for HLO temporaries \(|Used )([\d.]+)([KMGT])")


def required_bytes(message: str) -> int:
    """The bytes that a program needs, from the compiler's out-of-memory error; raises other errors."""
    used = _OUT_OF_MEMORY.search(message)
    if "RESOURCE_EXHAUSTED" not in message or not used:
        raise RuntimeError(message)
    return int(float(used[1]) * 1024 ** (1 + "KMGT".index(used[2])))


TOLERANCE = 0.04  # of the result of `max_batch`
MAX_UNITS = 2**20


def max_batch(needed: Callable[[int], int], available: int, first: int = 1) -> int:
    """The largest number of units, such as rows a chip, that fits into memory, within 4%; 0 if one does not fit.

    Memory grows about linearly with the batch, so the next trial is where the line through the last two meets the
    limit. The result is always a trial that fits.

    Args:
      needed: bytes for a number of units.
      available: bytes.
      first: units of the first trial.
    """
    trials: dict[int, int] = {}
    units, fits, fails = first, 0, MAX_UNITS
    while units:
        trials[units] = needed(units)
        if trials[units] <= available:
            fits = units
        else:
            fails = units
        smallest_step = fits + max(1, int(fits * TOLERANCE))
        if smallest_step >= fails:
            break
        units = min(max(_extrapolate(trials, available), smallest_step), fails - 1, 8 * max(fits, 1))
    return fits


def _extrapolate(trials: dict[int, int], available: int) -> int:
    """Where the line through the last two trials, or through the only one and zero, meets the limit."""
    (low, low_bytes), (high, high_bytes) = [(0, 0), *trials.items()][-2:]
    if low_bytes == high_bytes:
        return high
    return int(low + (available - low_bytes) * (high - low) / (high_bytes - low_bytes))
