"""The matrix of faults with few tries of each; `make faults` has them all."""

import pytest

from tests.faults import table
from tests.faults.matrix import ALL
from tests.faults.world import World


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("faults"))


# What TensorStore still writes when a save fails may end after Orbax's event loop, and has nobody to tell.
@pytest.mark.filterwarnings("ignore:(?s)Exception ignored in.*Event loop is closed")
@pytest.mark.faults
@pytest.mark.parametrize("name", ALL)
def test_nothing_is_lost(name, world, fresh_programs):
    result = table.run_row(name, world, quick=True)
    assert not result["lost"]
    assert result["survived"] == result["tries"] > 0


def test_a_row_that_tries_too_little_or_fails_is_no_success(monkeypatch):
    def failing(world, tally):
        with tally.one("first"):
            pass
        with tally.one("second"):
            raise AssertionError("gone")
        raise OSError("in between")

    monkeypatch.setitem(table.ROWS, "Z1", table.Row("Z1", "a test", failing, full=9, quick=4))
    result = table.run_row("Z1", None, quick=True)
    assert (result["tries"], result["survived"]) == (3, 0)
    assert [why.split(":")[0] for why in result["lost"]] == [
        "second",
        "between two tries",
        "only 3 tries, expected at least 4",
    ]
    assert "| Z1 | a test | 3 | 0 | 3 |" in table.as_markdown([result])
