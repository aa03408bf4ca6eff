"""Names of topologies."""

import pytest

from transformer.planning.hardware import CHIPS, GPU_TARGETS, parse_topology
from transformer.runtime.errors import UserError


@pytest.mark.parametrize(
    ("name", "chips"),
    [
        ("v5e:4x4", 16),
        ("v5e:16x16", 256),
        ("v5p:4x4x8", 128),
        ("v6e:4x4", 16),
        ("h100:8", 8),
        ("h200:8", 8),
        ("b200:1", 1),
        ("cpu:8", 8),
    ],
)
def test_names(name, chips):
    topology = parse_topology(name)
    assert (topology.chips, topology.chip.name) == (chips, name.split(":")[0])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v9:4x4", "unknown kind of chip 'v9'; known: v5e:NxN, v5p:NxNxN, v6e:NxN, h100:N, h200:N, b200:N, cpu:N"),
        ("", "unknown kind"),
        ("v5e", "expected 2 numbers, as in v5e:4x4, got ''"),
        ("v5e:4x4x4", "expected 2 numbers"),
        ("v5p:4x4", "expected 3 numbers, as in v5p:4x4x8, got '4x4'"),
        ("v5e:0x4", "expected 2 numbers"),
        ("cpu:two", "expected 1 number, as in cpu:8"),
        ("v5e:32x32", "links of v5e join at most 256 chips, got 1024"),
        ("h100:16", "links of h100 join at most 8 chips, got 16"),
    ],
)
def test_an_unknown_name_is_refused_with_the_known_ones(name, message):
    with pytest.raises(UserError, match=message):
        parse_topology(name)


def test_every_gpu_can_be_described_to_the_compiler():
    assert {name for name, chip in CHIPS.items() if chip.platform == "gpu"} == GPU_TARGETS.keys()
    assert 'device_description_str: "NVIDIA H200"' in GPU_TARGETS["h200"]
    assert f"device_memory_size: {CHIPS['h200'].memory} " in GPU_TARGETS["h200"]


def test_every_figure_has_a_source():
    assert all(chip.source and chip.flops and chip.memory and chip.link_bandwidth for chip in CHIPS.values())
