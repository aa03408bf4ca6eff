"""How fast a program could run at best: the longest of its arithmetic, its memory traffic and its communication.

A chip can do no better than its published peaks, all three at once. So these are bounds, not forecasts.
"""

from collections.abc import Iterable
from typing import NamedTuple

from transformer.planning.hardware import Chip
from transformer.planning.hlo_cost import Collective

SCALES = (8, 16, 32, 64, 128, 256, 512, 1024)
STATE_TRAFFIC = 24  # bytes a parameter: Adam reads and writes the parameter and two moments, float32


class Times(NamedTuple):
    """Seconds of one step that arithmetic, main memory and communication each need."""

    compute: float
    memory: float
    communication: float

    @property
    def bound(self) -> float:
        """With all three at once."""
        return max(self)

    @property
    def bound_by(self) -> str:
        """The one that takes longest."""
        return max(self._fields, key=lambda name: getattr(self, name))

    @property
    def apart(self) -> float:
        """With communication before or after the rest."""
        return max(self.compute, self.memory) + self.communication


def times(chip: Chip, flops: int, memory_bytes: int, collectives: Iterable[Collective]) -> Times:
    """Of a program, from what one chip computes, moves and sends."""
    sent = sum(sent_bytes(one) for one in collectives)
    return Times(flops / chip.flops, memory_bytes / chip.memory_bandwidth, sent / chip.link_bandwidth)


def sent_bytes(collective: Collective) -> float:
    """Bytes that a chip must send whatever the algorithm, n chips and b bytes: all-reduce 2(n-1)/n · b, a permutation
    or a broadcast b, others (n-1)/n · b.
    """
    if collective.kind in ("collective-permute", "collective-broadcast"):
        return collective.bytes
    share = (collective.chips - 1) / collective.chips * collective.bytes
    return 2 * share if collective.kind == "all-reduce" else share


class Scaled(NamedTuple):
    """A step on so many chips, each with the same number of tokens.

    Attributes:
      overlapped, apart: tokens a second and chip, over those of a chip that sends nothing; with
        communication at the same time as the rest, and not.
    """

    chips: int
    times: Times
    overlapped: float
    apart: float


def data_parallel(chip: Chip, flops: int, memory_bytes: int, gradient_bytes: int) -> list[Scaled]:
    """Every chip holds all parameters; gradients are summed over all chips."""
    return [
        _scaled(chips, flops / chip.flops, memory_bytes / chip.memory_bandwidth, _send(chip, chips, 2, gradient_bytes))
        for chips in SCALES
    ]


def fully_sharded(chip: Chip, flops: int, memory_bytes: int, params: int, bytes_each: int) -> list[Scaled]:
    """Parameters, gradients and moments split over the chips of a slice; `memory_bytes` are the data-parallel step's.

    Parameters are gathered for the forward pass and again for the backward pass, gradients are reduced
    and scattered, each in `bytes_each` bytes a number.
    """
    scaled = []
    for chips in SCALES:
        within = min(chips, chip.slice_chips)
        moved = memory_bytes - STATE_TRAFFIC * params * (1 - 1 / within)
        sending = _send(chip, chips, 3, bytes_each * params)
        scaled.append(_scaled(chips, flops / chip.flops, moved / chip.memory_bandwidth, sending))
    return scaled


def _send(chip: Chip, chips: int, passes: int, size: float) -> float:
    """Seconds to pass an array `passes` times around the chips of a slice, and its parts twice around the slices."""
    within = min(chips, chip.slice_chips)
    slices = -(-chips // within)
    links = passes * (within - 1) / within * size / chip.link_bandwidth
    return links + 2 * (slices - 1) / slices * size / within / chip.network_bandwidth


def _scaled(chips: int, compute: float, memory: float, communication: float) -> Scaled:
    each = Times(compute, memory, communication)
    alone = max(compute, memory)
    return Scaled(chips, each, alone / each.bound, alone / each.apart)
