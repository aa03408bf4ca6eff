"""The search for the largest batch."""

import pytest

from transformer.planning import aot


@pytest.mark.parametrize("first", [1, 8, 50, 3000])
@pytest.mark.parametrize("most", [1, 2, 7, 40, 100, 1000])
def test_it_finds_what_fits_within_4_percent_and_in_few_trials(most, first):
    tried = []

    def needed(units):
        tried.append(units)
        return 500 + 10 * units + (units % 7)

    result = aot.max_batch(needed, 500 + 10 * most + 6, first)
    assert result <= most <= result * 1.04 + 1
    assert result in tried
    assert len(tried) == len(set(tried)) <= 9


def test_nothing_fits():
    assert aot.max_batch(lambda units: 100 + units, 100, 16) == 0


def test_memory_in_jumps_is_searched_too():
    def needed(units):
        return 1000 * (units // 10) + (5000 if units > 64 else 0)

    assert 61 <= aot.max_batch(needed, 9000, 3) <= 64


def test_what_never_grows_ends():
    assert aot.max_batch(lambda units: 5, 10, 1) >= 2**19
