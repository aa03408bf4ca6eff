"""Whose the workdir is, and which config it belongs to."""

import subprocess
import sys

import pytest
from etils import epath

from tests.conftest import small_config
from transformer.config import validation
from transformer.config.optimizers import SCHEDULE_TRAITS
from transformer.runtime.errors import UserError, WorkdirError
from transformer.training import workdir


@pytest.fixture
def folder(tmp_path):
    return epath.Path(tmp_path) / "run"


def test_one_run_at_a_time(folder):
    with (
        workdir.acquire_lock(folder),
        pytest.raises(WorkdirError, match=r"held by process \d+ on \S+ since 20.* UTC; wait for it"),
    ):
        workdir.acquire_lock(folder)
    workdir.acquire_lock(folder).close()


def test_a_lock_dies_with_its_process(folder):
    program = (
        "import os, sys\nfrom etils import epath\nfrom transformer.training import workdir\n"
        "held = workdir.acquire_lock(epath.Path(sys.argv[1]))\nprint('held', flush=True)\nsys.stdin.read()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", program, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with child:
        assert child.stdout.readline() == "held\n"
        with pytest.raises(WorkdirError, match=f"held by process {child.pid} "):
            workdir.acquire_lock(folder)
        child.kill()
        child.wait()
        workdir.acquire_lock(folder).close()


def test_the_config_is_kept_and_must_stay(folder):
    folder.mkdir()
    workdir.save_config(folder, small_config())
    assert validation.from_json((folder / workdir.CONFIG_FILE).read_text(), "") == small_config()
    (folder / workdir.CONFIG_FILE).write_bytes(b"\xff")
    workdir.save_config(folder, small_config())
    assert validation.from_json((folder / workdir.CONFIG_FILE).read_text(), "") == small_config()
    assert workdir.check_resume_config(folder, small_config(), small_config()) == []
    with pytest.raises(UserError, match=r"another config: model.norm: 'post' → 'pre'; train.seed: 0 → 5"):
        workdir.check_resume_config(folder, small_config(), small_config(model={"norm": "pre"}, train={"seed": 5}))


def test_a_longer_run_of_a_schedule_with_an_end_is_refused_with_the_reason_and_what_helps(folder):
    cosine = {"optimizer": {"schedule": "cosine"}}
    with pytest.raises(UserError) as refusal:
        workdir.check_resume_config(
            folder, small_config(**cosine, train={"num_steps": 20}), small_config(**cosine, train={"num_steps": 30})
        )
    assert "train.num_steps: 20 → 30" in str(refusal.value)
    assert "The cosine schedule ends at train.num_steps" in str(refusal.value)
    assert f"choose a new workdir, with train.init_from={folder} to start from its params" in str(refusal.value)


@pytest.mark.parametrize(
    "change",
    [
        {"train": {"num_steps": 30}},
        {"train": {"keep_last": 2, "log_every_steps": 7}},
        {"decode": {"beam_size": 7}},
        {"mesh": {"data": 8}},
        {"data": {"data_dir": "elsewhere"}},
        {"data": {"tokenizer": "moved.model"}},
    ],
)
def test_harmless_changes_are_named(folder, change):
    old = small_config(data={"tokenizer": "kept.model"} if "tokenizer" in str(change) else {})
    changes = workdir.check_resume_config(folder, old, small_config(**change))
    assert len(changes) == sum(map(len, change.values()))
    assert all(" → " in line for line in changes)


@pytest.mark.parametrize(("old", "new"), [("bpe", "unigram"), ("bpe", "mine.model"), ("mine.codes", "bpe")])
def test_another_tokenizer_is_no_harmless_change(folder, old, new):
    with pytest.raises(UserError, match=f"data.tokenizer: '{old}' → '{new}'"):
        workdir.check_resume_config(
            folder, small_config(data={"tokenizer": old}), small_config(data={"tokenizer": new})
        )


@pytest.mark.parametrize("schedule", [name for name, traits in SCHEDULE_TRAITS.items() if traits.ends_at_zero])
def test_more_steps_are_no_harmless_change_to_a_schedule_that_ends_with_them(folder, schedule):
    fields = {"optimizer": {"schedule": schedule}}
    with pytest.raises(UserError, match=r"num_steps: 20 → 30"):
        workdir.check_resume_config(folder, small_config(**fields), small_config(train={"num_steps": 30}, **fields))


def test_a_workdir_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"^/.*file: File exists"):
        workdir.acquire_lock(epath.Path(tmp_path / "file"))


def test_a_file_system_without_locks_is_a_warning(folder, monkeypatch, capsys):
    monkeypatch.setattr(workdir.fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError("no locks")))
    workdir.acquire_lock(folder).close()
    assert "cannot be locked (no locks)" in capsys.readouterr().err
