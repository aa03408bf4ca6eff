"""Roofline model: the time of a step is at least the longest of compute, memory traffic and communication.

Assumes the published peaks of a chip, all three at once, so these are bounds; `predicted_seconds` is a forecast.
"""

from collections.abc import Iterable
from typing import NamedTuple

from transformer.planning.hardware import Chip
from transformer.planning.hlo_cost import Collective, KernelCost

CHIP_COUNTS = (8, 16, 32, 64, 128, 256, 512, 1024)
# Assumed: what large bfloat16 products and copies reach of the published peaks, and the time to start a GPU's kernel.
SUSTAINED_FLOPS, SUSTAINED_BANDWIDTH, LAUNCH_SECONDS = 0.63, 0.81, 1.6e-6
OPTIMIZER_BYTES_PER_PARAM = 24  # Adam reads and writes the parameter and two moments in float32


class StepTimes(NamedTuple):
    """Seconds of compute, HBM traffic and communication of a step."""

    compute: float
    memory: float
    communication: float

    @property
    def bound(self) -> float:
        """The time of a step if all three overlap."""
        return max(self)

    @property
    def bound_by(self) -> str:
        """The one that takes longest."""
        return max(self._fields, key=lambda name: getattr(self, name))

    @property
    def serial(self) -> float:
        """The time of a step if communication does not overlap with the rest."""
        return max(self.compute, self.memory) + self.communication


def step_times(chip: Chip, flops: int, memory_bytes: int, collectives: Iterable[Collective]) -> StepTimes:
    """The times of a program, from the FLOPs, HBM bytes and collectives of one chip."""
    sent = sum(sent_bytes(collective) for collective in collectives)
    return StepTimes(flops / chip.flops, memory_bytes / chip.memory_bandwidth, sent / chip.link_bandwidth)


def predicted_seconds(chip: Chip, kernels: Iterable[KernelCost]) -> float:
    """The time of a step by a roofline for each kernel: the sum of what each takes for its FLOPs or for its bytes.

    It leaves out communication, which may overlap. A prediction: nothing of it is measured.
    """
    flops, bandwidth = SUSTAINED_FLOPS * chip.flops, SUSTAINED_BANDWIDTH * chip.memory_bandwidth
    launch = LAUNCH_SECONDS if chip.platform == "gpu" else 0.0
    return sum(
        kernel.num_runs * (launch + max(kernel.flops / flops, kernel.hbm_bytes / bandwidth)) for kernel in kernels
    )


def sent_bytes(collective: Collective) -> float:
    """The least bytes that a chip sends, for n chips and b bytes: all-reduce 2(n-1)/n · b, permutation and broadcast b,
    others (n-1)/n · b.
    """
    if collective.kind in ("collective-permute", "collective-broadcast"):
        return collective.bytes
    share = (collective.chips - 1) / collective.chips * collective.bytes
    return 2 * share if collective.kind == "all-reduce" else share


class ScalingPoint(NamedTuple):
    """Weak scaling: a step on a number of chips with the same number of tokens each.

    Attributes:
      overlapped, serial: efficiency, tokens a second and chip relative to a chip without communication, if
        communication overlaps with the rest, and if not.
    """

    chips: int
    step_times: StepTimes
    overlapped: float
    serial: float


def data_parallel(chip: Chip, flops: int, memory_bytes: int, gradient_bytes: int) -> list[ScalingPoint]:
    """Scaling if every chip holds all parameters and gradients are all-reduced over all chips."""
    return [
        _scaling_point(
            chips,
            flops / chip.flops,
            memory_bytes / chip.memory_bandwidth,
            _communication_seconds(chip, chips, 2, gradient_bytes),
        )
        for chips in CHIP_COUNTS
    ]


def fully_sharded(chip: Chip, flops: int, memory_bytes: int, params: int, bytes_each: int) -> list[ScalingPoint]:
    """Scaling if parameters, gradients and moments are sharded over a slice; `memory_bytes` of the data-parallel step.

    Parameters are all-gathered for the forward and again for the backward pass, gradients are reduce-scattered, with
    `bytes_each` bytes a number.
    """
    scaled = []
    for chips in CHIP_COUNTS:
        chips_per_slice = min(chips, chip.slice_chips)
        moved = memory_bytes - OPTIMIZER_BYTES_PER_PARAM * params * (1 - 1 / chips_per_slice)
        communication = _communication_seconds(chip, chips, 3, bytes_each * params)
        scaled.append(_scaling_point(chips, flops / chip.flops, moved / chip.memory_bandwidth, communication))
    return scaled


def _communication_seconds(chip: Chip, chips: int, passes: int, size: float) -> float:
    """Seconds to pass an array `passes` times around a slice, and each chip's shard twice around the slices."""
    chips_per_slice = min(chips, chip.slice_chips)
    slices = -(-chips // chips_per_slice)
    links = passes * (chips_per_slice - 1) / chips_per_slice * size / chip.link_bandwidth
    return links + 2 * (slices - 1) / slices * size / chips_per_slice / chip.network_bandwidth


def _scaling_point(chips: int, compute: float, memory: float, communication: float) -> ScalingPoint:
    step = StepTimes(compute, memory, communication)
    without_communication = max(compute, memory)
    return ScalingPoint(chips, step, without_communication / step.bound, without_communication / step.serial)
