"""Updates of changes, timed in turn."""

import json

import pytest

from benchmarks import step_times, timing
from tests.conftest import small_config
from transformer.runtime.errors import UserError

CHANGES = """
def get_changes(base):
    return {
        "rms": {"model.norm_type": "rms"},
        "rdrop": {"train.consistency": "rdrop", "train.consistency_weight": 5.0},
        "wide": {"model.mlp_dim": 2 * base.model.mlp_dim},
    }
"""
DEMO = ["step_times", "--config=configs/demo.py", "--rows=2", "--length=4", "--rounds=3"]


@pytest.fixture
def updates(monkeypatch):
    """The configs and batches that were compiled; an update takes as many seconds as its batch has rows."""
    compiled = []

    def compile_update(config, vocab_size, batch):
        compiled.append((config, batch))
        return timing.CompiledUpdate(None, lambda: len(batch.source_BS) * (1 + (config.model.norm_type == "rms")), 0.0)

    monkeypatch.setattr(timing, "compile_update", compile_update)
    monkeypatch.setattr(timing, "seconds_of", lambda run: run())
    return compiled


def test_changes_are_compared_with_the_base_on_as_many_rows(updates, tmp_path, root, monkeypatch, capsys):
    monkeypatch.chdir(root)
    (tmp_path / "changes.py").write_text(CHANGES)
    step_times.main([*DEMO, f"--changes={tmp_path}/changes.py", "--only=rms,rdrop"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {name: row["relative_speed"] for name, row in result.items()} == {
        "base on 2 rows": 1.0,
        "base on 4 rows": 1.0,
        "again": 1.0,
        "rms": 0.5,
        "rdrop": 2.0,  # as timed here: its two rows against the four of the base
    }
    assert [batch.source_BS.shape for _, batch in updates] == [(2, 4), (4, 4), (2, 4), (2, 4), (2, 4)]


def test_a_base_of_two_passes_is_its_own_reference(updates, tmp_path, root, monkeypatch, capsys):
    monkeypatch.chdir(root)
    (tmp_path / "changes.py").write_text(CHANGES.replace('"rdrop": {', '"nll": {"train.consistency": "none"}, "x": {'))
    flags = ["--config.train.consistency=simcut", "--only=nll"]
    step_times.main([*DEMO, f"--changes={tmp_path}/changes.py", *flags])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {name: row["relative_speed"] for name, row in result.items()} == {
        "base on 1 rows": 1.0,
        "base on 2 rows": 1.0,
        "again": 1.0,
        "nll": 0.5,  # as timed here: its two rows against one of the base
    }


def test_unknown_names_and_fields_are_one_message(tmp_path, root, monkeypatch):
    monkeypatch.chdir(root)
    (tmp_path / "changes.py").write_text(CHANGES.replace("norm_type", "norm_typ"))
    with pytest.raises(UserError, match=r"unknown field .*norm_typ"):
        step_times.main([*DEMO, f"--changes={tmp_path}/changes.py"])
    (tmp_path / "changes.py").write_text(CHANGES)
    with pytest.raises(UserError, match="--only"):
        step_times.main([*DEMO, f"--changes={tmp_path}/changes.py", "--only=rm"])


@pytest.mark.slow
def test_updates_are_timed():
    base = small_config(model={"num_layers": 1})
    medians = step_times.measure(base, {"rms": small_config(model={"num_layers": 1, "norm_type": "rms"})}, 2, 5, 2)
    assert list(medians) == ["base on 2 rows", "again", "rms"]
    assert all(ms > 0 and speed > 0 for ms, speed in medians.values())
