"""Whose the workdir is, and which config it belongs to."""

import subprocess
import sys

import pytest
from etils import epath

from tests.conftest import small_config
from transformer import workdir
from transformer.errors import UserError, WorkdirError


@pytest.fixture
def folder(tmp_path):
    return epath.Path(tmp_path) / "run"


def test_one_run_at_a_time(folder):
    with workdir.lock(folder), pytest.raises(WorkdirError, match=r"held by process \d+ on .*; wait for it"):
        workdir.lock(folder)
    workdir.lock(folder).close()


def test_a_lock_dies_with_its_process(folder):
    program = (
        "import os, sys\nfrom etils import epath\nfrom transformer import workdir\n"
        "held = workdir.lock(epath.Path(sys.argv[1]))\nprint('held', flush=True)\nsys.stdin.read()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", program, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with child:
        assert child.stdout.readline() == "held\n"
        with pytest.raises(WorkdirError, match=f"held by process {child.pid} "):
            workdir.lock(folder)
        child.kill()
        child.wait()
        workdir.lock(folder).close()


def test_the_config_is_kept_and_must_stay(folder):
    folder.mkdir()
    assert workdir.adopt_config(folder, small_config()) == []
    assert workdir.adopt_config(folder, small_config()) == []
    before = (folder / workdir.CONFIG_FILE).read_text()
    with pytest.raises(UserError, match=r"another config: model.norm: 'post' → 'pre'; train.seed: 0 → 5"):
        workdir.adopt_config(folder, small_config(model={"norm": "pre"}, train={"seed": 5}))
    assert (folder / workdir.CONFIG_FILE).read_text() == before


@pytest.mark.parametrize(
    "change",
    [
        {"train": {"num_steps": 30}},
        {"train": {"keep_last": 2, "log_every_steps": 7}},
        {"decode": {"beam_size": 7}},
        {"mesh": {"data": 8}},
        {"data": {"data_dir": "elsewhere"}},
    ],
)
def test_harmless_changes_are_taken_and_named(folder, change):
    folder.mkdir()
    workdir.adopt_config(folder, small_config())
    assert len(workdir.adopt_config(folder, small_config(**change))) == sum(map(len, change.values()))
    assert workdir.adopt_config(folder, small_config(**change)) == []


def test_more_steps_are_no_harmless_change_to_a_schedule_that_ends_with_them(folder):
    folder.mkdir()
    cosine = {"optimizer": {"schedule": "cosine"}}
    workdir.adopt_config(folder, small_config(**cosine))
    with pytest.raises(UserError, match=r"num_steps: 20 → 30"):
        workdir.adopt_config(folder, small_config(train={"num_steps": 30}, **cosine))


def test_a_damaged_config_is_named(folder):
    folder.mkdir()
    (folder / workdir.CONFIG_FILE).write_text("{")
    with pytest.raises(UserError, match=r"config\.json: not a config in JSON"):
        workdir.adopt_config(folder, small_config())
