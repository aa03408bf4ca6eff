"""Each checkpoint is scored once, whatever training does to it meanwhile, and a signal ends it."""

import contextlib
import json
import math
import os
import shutil
import signal
import threading

import pytest

from tests.checkpoints.test_manager import flip, make_parts, save
from transformer.checkpoints import loading, manager, manifest
from transformer.checkpoints.manager import CheckpointManager
from transformer.evaluation import continuous
from transformer.evaluation.datasets import EvalDataset
from transformer.evaluation.evaluator import EvalResult
from transformer.evaluation.metrics import extended_scores, score
from transformer.runtime.errors import DivergedError, StoppedError

DATASET = EvalDataset("mine", ["the old house"], [["das alte Haus"]])


class QuickEvaluator:
    """Stands in for a CheckpointEvaluator: its results are known without decoding."""

    def __init__(self, dataset):
        self.dataset = dataset

    def evaluate(self, model):
        if model.step == 13:
            raise DivergedError("checkpoint 13: its loss is nan")
        lines = [f"das Haus {model.step}"]
        scores = score(lines, DATASET.references, ["bleu", "chrf", "ter"])
        scores |= extended_scores(DATASET.sources, lines, DATASET.references, "de")
        return EvalResult(1, 1.5, math.exp(1.5), math.exp(1.5 * 10 / 4), scores, lines, 0.1)


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    monkeypatch.setattr(continuous, "CheckpointEvaluator", QuickEvaluator)
    for step in (2, 10):
        save(tmp_path, make_parts(), step)
    return tmp_path


def look(workdir):
    """All that there is to do; the steps it scored."""
    result = []
    watching = continuous.CheckpointWatcher(workdir, lambda config: DATASET, lambda entry: result.append(entry["step"]))
    while watching.poll():
        pass
    return result


def test_every_checkpoint_is_scored_once_the_oldest_first(workdir):
    before = sorted(path for path in workdir.rglob("*"))
    assert look(workdir) == [2, 10]
    assert look(workdir) == []
    save(workdir, make_parts(), 12)
    assert look(workdir) == [12]
    entries = continuous.read_evaluations(workdir)
    assert [(entry["step"], entry["name"], entry["loss"]) for entry in entries] == [
        (step, "mine", 1.5) for step in (2, 10, 12)
    ]
    assert {"bleu", "bleu_signature", "chrfpp", "perplexity", "fingerprint"} < entries[0].keys()
    assert (workdir / "translations" / "10.mine.txt").read_text() == "das Haus 10\n"
    assert {path.name for path in workdir.iterdir()} - {path.name for path in before} == {
        "evaluations.jsonl",
        "translations",
    }


@pytest.mark.parametrize("change", [{"name": "other"}, {"references": [["das sehr alte Haus"]]}])
def test_another_set_is_scored_too(workdir, change):
    look(workdir)
    other = DATASET._replace(**change)
    result = []
    watching = continuous.CheckpointWatcher(workdir, lambda config: other, lambda entry: result.append(entry["step"]))
    assert watching.poll()
    assert result == [2]


@pytest.mark.slow
def test_a_run_begun_anew_is_not_taken_for_the_old_one(workdir):
    look(workdir)
    CheckpointManager(workdir).update_metrics(
        2, {"valid/bleu": 3.0}
    )  # the same checkpoint: training recorded its score
    assert look(workdir) == []
    shutil.rmtree(workdir / "checkpoints" / "2")
    shutil.copytree(workdir / "checkpoints" / "10", workdir / "checkpoints" / "2")
    assert look(workdir) == []  # its content is scored already
    shutil.rmtree(workdir / "checkpoints")
    save(workdir, make_parts(seed=1), 2)
    assert look(workdir) == [2]


def test_a_line_that_a_kill_cut_short_is_scored_again(workdir):
    look(workdir)
    path = workdir / "evaluations.jsonl"
    path.write_bytes(path.read_bytes()[:-40])
    assert look(workdir) == [10]
    assert [entry["step"] for entry in continuous.read_evaluations(workdir)] == [2, 10]
    assert json.loads(path.read_bytes().splitlines()[-1])["step"] == 10


def test_a_checkpoint_that_goes_while_it_is_read_is_left_out(workdir, monkeypatch, capsys):
    load = loading.load_checkpoint

    def prune_first(folder, which):
        if which == "2":
            CheckpointManager(workdir).remove(2)
        return load(folder, which)

    monkeypatch.setattr(continuous, "load_checkpoint", prune_first)
    assert look(workdir) == [10]
    assert "checkpoint 2 was deleted while it was read" in capsys.readouterr().err


def test_a_signal_while_it_scores_ends_it_though_the_checkpoint_went_meanwhile(workdir, monkeypatch):
    def stopped_while_pruned(self, model):
        CheckpointManager(workdir).remove(model.step)
        raise StoppedError(signal.SIGTERM, "stopped by SIGTERM")

    monkeypatch.setattr(QuickEvaluator, "evaluate", stopped_while_pruned)
    with pytest.raises(StoppedError):
        look(workdir)


def test_a_failure_inside_scoring_is_not_taken_for_a_deleted_checkpoint(workdir, monkeypatch):
    def fail_while_pruned(self, model):
        CheckpointManager(workdir).remove(model.step)
        raise RuntimeError("inside")

    monkeypatch.setattr(QuickEvaluator, "evaluate", fail_while_pruned)
    with pytest.raises(RuntimeError, match="inside"):
        look(workdir)


def test_a_damaged_config_does_not_stop_it(workdir, capsys):
    flip(workdir / "checkpoints" / "2" / "config.json")
    assert look(workdir) == [10]
    assert "checkpoint 2 is damaged" in capsys.readouterr().err


def test_one_that_goes_between_its_files_is_left_out_too(workdir, monkeypatch, capsys):
    restore = CheckpointManager.restore_params

    def prune_first(self, step, *args):
        if step == 2:
            CheckpointManager(workdir).remove(2)
        return restore(self, step, *args)

    monkeypatch.setattr(CheckpointManager, "restore_params", prune_first)
    assert look(workdir) == [10]
    assert "was deleted while it was read" in capsys.readouterr().err


@pytest.mark.parametrize(("module", "name"), [(manager, "iter_files"), (manifest, "sha256")])
def test_one_that_goes_while_it_is_verified_is_left_out_and_not_called_damaged(
    workdir, monkeypatch, capsys, module, name
):
    read, prune = getattr(module, name), [lambda: CheckpointManager(workdir).remove(2)]

    def prune_first(path):
        with contextlib.suppress(IndexError):
            prune.pop()()
        return read(path)

    monkeypatch.setattr(module, name, prune_first)
    assert look(workdir) == [10]
    stderr = capsys.readouterr().err
    assert "checkpoint 2 was deleted while it was read" in stderr
    assert "damaged" not in stderr


def test_unfinished_and_damaged_ones_do_not_stop_it(workdir, capsys):
    (workdir / "checkpoints" / "11.partial").mkdir()
    (workdir / "checkpoints" / "5").mkdir()  # no manifest yet
    flip(next(path for path in (workdir / "checkpoints" / "2" / "params").rglob("*") if path.is_file()))
    save(workdir, make_parts(), 13)
    assert look(workdir) == [10]
    stderr = capsys.readouterr().err
    assert "checkpoint 2 is damaged" in stderr
    assert "checkpoint 13: its loss is nan" in stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGINT, pytest.param(signal.SIGHUP, marks=pytest.mark.reported)]
)
def test_it_waits_for_more_until_a_signal(workdir, number):
    def one_more_then_stop(entry):
        if entry["step"] == 10:
            save(workdir, make_parts(), 20)
        if entry["step"] == 20:
            threading.Timer(0.2, os.kill, (os.getpid(), number)).start()

    def not_heeded(*_):
        raise AssertionError("nobody stopped for the signal")

    original = signal.signal(number, not_heeded)
    watching = continuous.CheckpointWatcher(workdir, lambda config: DATASET, one_more_then_stop)
    with pytest.raises(StoppedError, match="3 checkpoints scored; run again to resume") as stopped:
        watching.run_forever(seconds=0.05)
    assert stopped.value.exit_code == 128 + number
    assert signal.signal(number, original) == not_heeded
    assert look(workdir) == []


def test_it_may_begin_before_training_does(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(continuous, "CheckpointEvaluator", QuickEvaluator)

    def first_look(seconds):
        if not (tmp_path / "checkpoints").exists():
            save(tmp_path, make_parts(), 4)
        elif continuous.read_evaluations(tmp_path):
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(continuous.time, "sleep", first_look)
    with pytest.raises(StoppedError, match="1 checkpoints scored"):
        continuous.CheckpointWatcher(tmp_path, lambda config: DATASET).run_forever()
    assert "waiting for the first checkpoint" in capsys.readouterr().err
