"""Bounds on time, by hand."""

import itertools

import pytest

from transformer.planning import roofline
from transformer.planning.hardware import CHIPS, chip_of
from transformer.planning.hlo_cost import Collective, KernelCost
from transformer.planning.roofline import StepTimes

CHIP = CHIPS["v5e"]._replace(
    flops=100.0, memory_bandwidth=10.0, link_bandwidth=4.0, network_bandwidth=0.5, slice_chips=256
)


@pytest.mark.parametrize(
    ("kind", "sent"),
    [
        *(("all-reduce", 150.0), ("all-gather", 75.0), ("reduce-scatter", 75.0), ("all-to-all", 75.0)),
        *(("collective-permute", 100.0), ("collective-broadcast", 100.0)),
    ],
)
def test_what_a_chip_must_send(kind, sent):
    assert roofline.sent_bytes(Collective(kind, ("data",), 4, 1, 100)) == sent


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *(("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H200", "h200"), ("NVIDIA B200", "b200"), ("TPU v5 lite", "v5e")),
        *(("TPU v5e", "v5e"), ("TPU v5", "v5p"), ("TPU v5p", "v5p"), ("TPU v6 lite", "v6e"), ("TPU v6e", "v6e")),
    ],
)
def test_a_chip_is_known_by_the_name_that_jax_gives_it(kind, name):
    assert chip_of(kind) == CHIPS[name]
    assert chip_of("cpu") is chip_of("TPU v4") is None


def test_the_longest_of_three_is_the_bound():
    times = roofline.step_times(CHIP, 200, 50, [Collective("all-reduce", ("data",), 2, 1, 12)])
    assert times == StepTimes(2.0, 5.0, 3.0)
    assert (times.bound, times.bound_by, times.serial) == (5.0, "memory", 8.0)


def test_a_prediction_adds_what_each_kernel_takes():
    kernels = [KernelCost(2, 63, 0), KernelCost(1, 126, 81), KernelCost(1, 0, 81)]  # 2 x 1 s, 2 s, 10 s
    assert roofline.predicted_seconds(CHIP, kernels) == pytest.approx(2 + 10 + 10)
    on_gpu = roofline.predicted_seconds(CHIP._replace(platform="gpu"), kernels)
    assert on_gpu == pytest.approx(22 + 4 * 1.6e-6, abs=1e-7)


def test_data_parallel_chips_send_almost_the_same_however_many_there_are():
    scaled = roofline.data_parallel(CHIP, flops=1000, memory_bytes=20, gradient_bytes=8)
    assert [one.chips for one in scaled] == [8, 16, 32, 64, 128, 256, 512, 1024]
    assert scaled[0].step_times == StepTimes(10.0, 2.0, 2 * 7 / 8 * 8 / 4)
    assert scaled[0].overlapped == 1.0
    assert scaled[0].serial == pytest.approx(10 / 13.5)
    # Two slices: once around each, and a 256th of the gradients over the network.
    assert scaled[6].step_times.communication == pytest.approx(2 * 255 / 256 * 8 / 4 + 2 / 2 * 8 / 256 / 0.5)
    assert all(one.serial >= after.serial for one, after in itertools.pairwise(scaled))


def test_sharded_chips_hold_less_and_send_more():
    whole = roofline.data_parallel(CHIP, flops=100, memory_bytes=1000, gradient_bytes=2 * 20)
    split = roofline.fully_sharded(CHIP, flops=100, memory_bytes=1000, params=20, bytes_each=2)
    assert split[0].step_times.memory == pytest.approx((1000 - 24 * 20 * 7 / 8) / 10)
    assert split[0].step_times.communication == pytest.approx(whole[0].step_times.communication * 3 / 2)
