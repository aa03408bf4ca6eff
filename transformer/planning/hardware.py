"""Published figures of accelerators, and the parser of topologies such as v5e:4x4.

Peaks are of dense bfloat16 matrix products. Bandwidths are in bytes a second; those of links and network are what one
chip can send over all of its ports, half of the "bidirectional" figure.
"""

import math
import re
from typing import NamedTuple

from transformer.runtime.errors import UserError

GIB = 2**30


class Chip(NamedTuple):
    """A kind of chip.

    Attributes:
      name: as in a topology's name.
      platform: tpu, gpu or cpu.
      flops: peak FLOPs a second, bfloat16.
      memory: bytes available to a program, a little less than what is sold.
      memory_bandwidth: of that memory.
      link_bandwidth: to other chips of the same slice or machine.
      network_bandwidth: to other slices, a chip's share of its host's network.
      slice_chips: the largest number of chips joined by links.
      dims: of a topology: 2 in v5e:4x4.
      source: where the figures are published.
    """

    name: str
    platform: str
    flops: float
    memory: int
    memory_bandwidth: float
    link_bandwidth: float
    network_bandwidth: float
    slice_chips: int
    dims: int
    source: str


# Memory of TPUs is the limit in the out-of-memory error of libtpu 0.0.42.1. The figures of the simulated device are
# made up, to try the command out.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", "tpu", 197e12, int(15.75 * GIB), 819e9, 200e9, 3.125e9, 256, 2, "cloud.google.com/tpu/docs/v5e"),
        Chip("v5p", "tpu", 459e12, int(95.74 * GIB), 2765e9, 600e9, 6.25e9, 6144, 3, "cloud.google.com/tpu/docs/v5p"),
        Chip("v6e", "tpu", 918e12, int(31.25 * GIB), 1600e9, 400e9, 12.5e9, 256, 2, "cloud.google.com/tpu/docs/v6e"),
        # 400 Gb/s of network for each GPU of a DGX; the source of the rest is the data sheet of the SXM module. Memory
        # is what the driver reports.
        Chip("h100", "gpu", 989e12, 84_929_347_584, 3.35e12, 450e9, 50e9, 8, 1, "nvidia.com/data-center/h100"),
        Chip("h200", "gpu", 989e12, 151_397_597_184, 4.8e12, 450e9, 50e9, 8, 1, "nvidia.com/data-center/h200"),
        Chip("b200", "gpu", 2250e12, 191_514_411_008, 8e12, 900e9, 50e9, 8, 1, "nvidia.com/data-center/dgx-b200"),
        Chip("cpu", "cpu", 1e11, 4 * GIB, 2e10, 1e10, 1e9, 4096, 1, "made up"),
    )
}


def chip_of(device_kind: str) -> Chip | None:
    """The chip that JAX calls by this `device_kind`, such as "NVIDIA H200" or "TPU v5 lite"; None if it is unknown."""
    kind = device_kind.lower().replace(" lite", "e")
    kind = "tpu v5p" if kind == "tpu v5" else kind
    return next((chip for chip in CHIPS.values() if chip.name in kind and chip.platform != "cpu"), None)


def _gpu_target(name: str, kind: str, capability: int, cores: int, l2_cache: int, clock_ghz: float) -> str:
    """XLA's description of a GPU for ahead-of-time compilation, with the figures of XLA's own list of GPUs.

    Args:
      name: of the chip.
      kind: JAX's `device_kind`.
      capability: major compute capability.
      cores: streaming multiprocessors.
      l2_cache: bytes.
      clock_ghz: of the cores.
    """
    chip = CHIPS[name]
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: {cores} fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {chip.memory_bandwidth:.0f} l2_cache_size: {l2_cache} clock_rate_ghz: {clock_ghz}
  device_memory_size: {chip.memory} shared_memory_per_block_optin: 232448
  cuda_compute_capability {{ major: {capability} }} registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 12 }} runtime_version {{ major: 13 }}
device_description_str: "{kind}"
"""


GPU_TARGETS = {
    "h100": _gpu_target("h100", "NVIDIA H100 80GB HBM3", 9, 132, 52_428_800, 1.98),
    "h200": _gpu_target("h200", "NVIDIA H200", 9, 132, 52_428_800, 1.98),
    "b200": _gpu_target("b200", "NVIDIA B200", 10, 148, 132_644_864, 1.965),
}


class Topology(NamedTuple):
    """An arrangement of chips of one kind."""

    name: str
    chip: Chip
    chips: int


def parse_topology(name: str) -> Topology:
    """Parses v5e:AxB, v6e:AxB, v5p:AxBxC, h100:N, h200:N, b200:N, and cpu:N for simulated devices.

    Raises:
      UserError: an unknown kind of chip, or an invalid arrangement.
    """
    kind, _, shape = name.partition(":")
    if kind not in CHIPS:
        raise UserError(
            f"--topology={name}: unknown kind of chip {kind!r}; known: "
            + ", ".join(f"{chip.name}:{'x'.join('N' * chip.dims)}" for chip in CHIPS.values())
        )
    chip = CHIPS[kind]
    if not re.fullmatch("x".join([r"[1-9]\d{0,4}"] * chip.dims), shape):
        expected = "x".join(["4", "4", "8"][: chip.dims]) if chip.dims > 1 else "8"
        raise UserError(
            f"--topology={name}: expected {chip.dims} number{'s'[: chip.dims - 1]}, as in {kind}:{expected}, "
            f"got {shape!r}"
        )
    count = math.prod(map(int, shape.split("x")))
    if count > chip.slice_chips:
        raise UserError(f"--topology={name}: the links of {kind} join at most {chip.slice_chips} chips, got {count}")
    return Topology(name, chip, count)
