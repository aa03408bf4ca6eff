"""Every row of Table 3 is a config with the paper's number of params."""

import dataclasses

import pytest

from configs.paper import ROWS
from tests.conftest import ROOT, slow
from transformer import command_line
from transformer.config import Config
from transformer.models.registry import ModelDef

VOCABULARY = 40_900


def config_of(name):
    return command_line.config_flags(["train.py", f"--config={ROOT}/configs/paper.py:{name}"])[0]


@pytest.mark.parametrize("name", [name if name in ("base", "big") else slow(name) for name in ROWS])
def test_params_are_as_many_as_the_paper_says(name):
    """To within a million, big to 3%; a blank place means as many as base."""
    model = config_of(name).model
    result, printed = ModelDef(model, VOCABULARY).num_params() / 1e6, ROWS[name].params or ROWS["base"].params
    assert abs(result - printed) < (0.03 * printed if name == "big" else 1.0)


def test_the_names_count_what_the_paper_counts():
    """h heads, and keys of width d_k each; the paper varies d_k alone in (B), and keeps h · d_k in (A)."""
    for name, heads, keys, values in (
        ("base", 8, 64, 64),
        ("a-h1", 1, 512, 512),
        ("a-h32", 32, 16, 16),
        ("b-dk16", 8, 16, 64),
        ("b-dk32", 8, 32, 64),
        ("c-d256", 8, 32, 32),
        ("c-d1024", 8, 128, 128),
        ("big", 16, 64, 64),
    ):
        model = config_of(name).model
        assert (model.num_heads, model.qkv_dim // heads, model.value_dim // heads) == (heads, keys, values), name


def test_base_is_the_default_and_every_row_differs_from_it():
    assert config_of("base").model == Config().model
    assert config_of("e-learned").model == dataclasses.replace(Config().model, positions="learned", max_positions=512)
    resolved = {name: config_of(name) for name in ROWS}
    assert len({config.to_json() for config in resolved.values()}) == len(ROWS) == 20
    assert resolved["big"].train.num_steps == 300_000


def test_an_unknown_row_is_refused_with_the_names():
    with pytest.raises(command_line.UserError, match="no row 'c-n3'; there are base, a-h1"):
        config_of("c-n3")
