"""The batch of an update that diverged is written down, and the error goes on."""

import json

import numpy as np
import pytest
from etils import epath

from transformer.data.batching import PAD_EXAMPLE, BatchSpec, Bucket
from transformer.runtime.errors import DivergedError, StoppedError
from transformer.training import workdir


class Plan:
    """Update n has the examples n, n + 1 and a row of padding."""

    def batch(self, step):
        return BatchSpec(Bucket(8, 8, 3), np.array([step + 1, step + 2, PAD_EXAMPLE]))


PAIRS = [(f"source {i}", f"Ziel {i} ß") for i in range(20)]


def test_the_pairs_of_the_batch_are_in_a_file(tmp_path):
    with (
        pytest.raises(
            DivergedError, match=r"it diverged\. The sentence pairs of its batch are in .*diverged\.json"
        ) as error,
        workdir.dump_batch_on_divergence(epath.Path(tmp_path), Plan(), PAIRS),
    ):
        raise DivergedError("it diverged", 7)
    assert (error.value.step, error.value.exit_code) == (7, 3)
    result = json.loads((tmp_path / workdir.DIVERGED_FILE).read_text())
    assert (result["update"], result["why"]) == (7, "it diverged")
    assert [pair["number"] for pair in result["pairs"]] == [7, 8]
    assert result["pairs"][0] == {"number": 7, "source": "source 7", "target": "Ziel 7 ß"}
    assert "Ziel 7 ß" in (tmp_path / workdir.DIVERGED_FILE).read_text()


@pytest.mark.parametrize("error", [DivergedError("in validation"), StoppedError(15, "stopped"), OSError("disk")])
def test_other_errors_leave_no_file(tmp_path, error):
    with pytest.raises(type(error)), workdir.dump_batch_on_divergence(epath.Path(tmp_path), Plan(), PAIRS):
        raise error
    assert not list(tmp_path.iterdir())
