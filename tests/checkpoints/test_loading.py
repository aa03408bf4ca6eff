"""What --checkpoint names: one checkpoint, or the mean of several."""

import dataclasses
import gc
import json
import shutil

import jax
import numpy as np
import pytest

from tests.checkpoints.test_manager import files, flip, make_parts, save, save_three
from tests.conftest import slow
from transformer.checkpoints import loading, manager
from transformer.checkpoints.manager import CheckpointManager
from transformer.data import tokenizer
from transformer.runtime.errors import UserError, WorkdirError
from transformer.runtime.files import json_digest


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_three(tmp_path_factory.mktemp("saved"))


@pytest.fixture
def workdir(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(scope="module")
def parts():
    return make_parts()


def table_of(params):
    return np.asarray(params["embeddings"]["shared"]["table"])


def select(workdir, which):
    return loading.resolve_steps(CheckpointManager(workdir), which)


BAD_AVERAGES = [
    "average:0",
    "average:x",
    "average:",
    "average",
    "average:-1",
    "average:1.5",
    "best-average:0",
    "average:²",
]


def test_the_model_comes_back_from_the_workdir_alone(parts, saved):
    got = loading.load_checkpoint(saved, "latest")
    assert (got.step, got.config, got.tokenizer.digest) == (100, parts[0], parts[1].digest)
    assert (got.description, got.tag) == ("checkpoint 100", "100")
    np.testing.assert_array_equal(table_of(got.params), table_of(parts[4].params) + 100)


@pytest.mark.parametrize(
    ("which", "wanted"),
    [
        ("latest", [100]),
        ("best", [9]),
        ("10", [10]),
        ("average:1", [100]),
        ("average:2", [10, 100]),
        ("average:3", [9, 10, 100]),
        ("best-average:1", [9]),
        ("best-average:2", [9, 10]),
    ],
)
def test_selection(workdir, which, wanted):
    assert select(workdir, which) == wanted


@pytest.mark.parametrize("which", ["newest", "11", "-1", "", "1e2", *BAD_AVERAGES])
def test_a_checkpoint_that_is_not_there_is_an_error(workdir, which):
    with pytest.raises(UserError, match=r"expected latest, best, average:N, .* or one of \[9, 10, 100\], got"):
        select(workdir, which)


def test_a_workdir_without_checkpoints_is_an_error(tmp_path):
    with pytest.raises(UserError, match="found no checkpoint; train first"):
        select(tmp_path, "latest")
    with pytest.raises(UserError, match="expected a folder that train"):
        loading.load_checkpoint(tmp_path / "none", "latest")
    assert CheckpointManager(tmp_path).latest_valid_step() is None


def test_if_the_best_checkpoint_is_damaged_the_latest_valid_one_is_selected(parts, tmp_path, capsys):
    for done in (3, 5):
        save(tmp_path, parts, done)
    CheckpointManager(tmp_path).update_metrics(3, {manager.VALID_BLEU: 30.0})
    flip(tmp_path / "checkpoints" / "3" / "config.json")
    assert select(tmp_path, "best") == [5]
    assert "checkpoint 3 is damaged" in capsys.readouterr().err


def test_best_needs_a_score(parts, tmp_path):
    for step in (0, 5):
        save(tmp_path, parts, step)
        message = "no checkpoint has a validation score yet; the next validation is at step 10"
        with pytest.raises(UserError, match=message):
            select(tmp_path, "best")
    save(tmp_path, parts, 10)  # whose own validation was interrupted
    with pytest.raises(UserError, match="validation of step 10 is not done; unless it is under way, run train"):
        select(tmp_path, "best")


def test_a_damaged_checkpoint_falls_back_unless_it_was_selected_by_number(workdir, capsys):
    flip(files(workdir / "checkpoints" / "9" / "params")[-1])
    assert select(workdir, "best") == [10]
    assert "checkpoint 9 is damaged" in capsys.readouterr().err
    with pytest.raises(WorkdirError, match="checkpoint 9 is damaged"):
        select(workdir, "9")


def test_a_relative_workdir_will_do(parts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save("runs/here", parts, 3)
    assert loading.load_checkpoint("runs/here", "latest").step == 3


def test_of_equal_scores_the_newest_is_the_best(workdir):
    for done in (9, 10):
        CheckpointManager(workdir).update_metrics(done, {manager.VALID_BLEU: 30.0})
    assert select(workdir, "best") == [10]


def test_scores_of_another_search_are_not_compared(parts, tmp_path):
    """Neither for the best nor for what is kept; of those alike to the newest that has one."""
    config, *others = parts
    checkpoints = CheckpointManager(tmp_path)
    for done, beam, bleu, best in ((1, 5, 30.0, 1), (2, 1, 29.0, 2), (3, 1, 29.5, 3), (4, 1, 29.2, 3)):
        decode = dataclasses.replace(config.decode, beam_size=beam)
        save(tmp_path, (dataclasses.replace(config, decode=decode), *others), done)
        if done == 2:  # not validated yet
            checkpoints.prune(1, 1)
            assert select(tmp_path, "best") == [1]
        checkpoints.update_metrics(done, {manager.VALID_BLEU: bleu})
        assert select(tmp_path, "best") == [best]
    with pytest.raises(UserError, match="with a validation score, found 3 of 4"):
        select(tmp_path, "best-average:4")
    checkpoints.prune(1, 1)
    assert checkpoints.steps() == [3, 4]


def test_scores_of_other_batches_of_the_same_search_are_compared(parts, tmp_path):
    config, *others = parts
    for done, rows, bleu in ((1, 16, 30.0), (2, 128, 29.0)):
        decode = dataclasses.replace(config.decode, batch_rows=rows)
        save(tmp_path, (dataclasses.replace(config, decode=decode), *others), done)
        CheckpointManager(tmp_path).update_metrics(done, {manager.VALID_BLEU: bleu})
    assert select(tmp_path, "best") == [1]


def test_of_a_config_that_is_not_as_written_no_search_is_taken(parts, tmp_path, capsys):
    for done, bleu in ((3, 30.0), (5, 20.0)):
        save(tmp_path, parts, done)
        CheckpointManager(tmp_path).update_metrics(done, {manager.VALID_BLEU: bleu})
    path = tmp_path / "checkpoints" / "5" / "config.json"
    before = path.read_text()
    path.write_text(before.replace('"beam_size": 2', '"beam_size": 3'))
    assert path.read_text() != before
    assert select(tmp_path, "best") == [3]
    path.write_text(before)
    flip(tmp_path / "checkpoints" / "3" / "config.json")
    assert select(tmp_path, "best") == [5]
    assert "checkpoint 3 is damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("which", "damaged", "read"),
    [
        ("best", (), [9]),
        ("best-average:2", (), [9, 10]),
        ("best", (9,), [9, 10]),
        ("best", (9, 10), [9, 10, 100]),
        ("best-average:1", (9, 100), [9, 10]),
    ],
)
def test_no_more_are_digested_than_are_asked_for(workdir, monkeypatch, capsys, which, damaged, read):
    verify, digested = CheckpointManager.verify, []

    def counted(self, step, *, content=True):
        digested.extend([step] if content else [])
        verify(self, step, content=content)

    monkeypatch.setattr(CheckpointManager, "verify", counted)
    for done in damaged:
        flip(files(workdir / "checkpoints" / str(done) / "params")[-1])
    select(workdir, which)
    assert digested == read
    stderr = capsys.readouterr().err
    assert {step for step in (9, 10, 100) if f"checkpoint {step} is damaged" in stderr} == {*damaged} & {*read}


def test_of_those_that_are_not_asked_for_a_lost_file_is_reported(workdir, capsys):
    (workdir / "checkpoints" / "100" / "config.json").unlink()
    assert select(workdir, "best") == [9]
    assert "checkpoint 100 is damaged" in capsys.readouterr().err


def test_a_model_is_used_on_whatever_devices_there_are(parts, tmp_path, monkeypatch):
    """Trained on two devices of a mesh that the config fixed, opened on all eight, or on one."""
    save(tmp_path, parts, 3)
    assert loading.load_checkpoint(tmp_path, "latest").mesh.size == 8
    monkeypatch.setattr(jax, "devices", lambda: [jax.local_devices()[0]])
    assert loading.load_checkpoint(tmp_path, "latest").mesh.size == 1


@pytest.mark.parametrize(("which", "mean"), [("average:2", 55), ("average:3", 119 / 3), ("best-average:2", 9.5)])
def test_an_average_is_the_mean_of_the_params(parts, saved, which, mean):
    got = loading.load_checkpoint(saved, which)
    wanted = jax.tree.map(lambda leaf: np.asarray(leaf) + np.float32(mean), parts[4].params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got.params, wanted)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(got.params))


def test_an_average_lies_where_the_params_of_one_do(parts, saved):
    got, one = (loading.load_checkpoint(saved, which) for which in ("average:3", "latest"))
    jax.tree.map(lambda a, b: np.testing.assert_equal(a.sharding, b.sharding), got.params, one.params)


def test_an_average_says_of_which(saved):
    got = loading.load_checkpoint(saved, "average:2")
    assert (got.step, got.description, got.tag) == (100, "average of 2: 10, 100", "100-average-2")
    got = loading.load_checkpoint(saved, "best-average:2")
    assert (got.step, got.description, got.tag) == (10, "average of best 2: 9, 10", "10-best-average-2")


@pytest.mark.parametrize(("which", "left"), [("average:2", [9, 100]), ("best-average:2", [9, 100])])
def test_a_damaged_one_is_left_out_for_the_next(workdir, capsys, which, left):
    flip(files(workdir / "checkpoints" / "10" / "params")[-1])
    assert select(workdir, which) == left
    assert "checkpoint 10 is damaged" in capsys.readouterr().err


def test_too_few_to_average_are_counted(workdir):
    with pytest.raises(UserError, match=r"expected 99 valid checkpoints to average, found 3 of 3; .*train\.keep_last"):
        select(workdir, "average:99")
    CheckpointManager(workdir).remove(100)
    flip(workdir / "checkpoints" / "9" / "config.json")
    with pytest.raises(UserError, match=r"expected 2 valid checkpoints to average, found 1 of 2"):
        select(workdir, "average:2")
    with pytest.raises(UserError, match=r"with a validation score, found 1 of 2; .*train\.keep_best"):
        select(workdir, "best-average:2")


@pytest.mark.parametrize("which", ["average:2", "best-average:2"])
def test_without_a_valid_checkpoint_averaging_fails(workdir, which):
    for name in ("9", "10", "100"):
        flip(workdir / "checkpoints" / name / "config.json")
    with pytest.raises(WorkdirError, match="none of the checkpoints"):
        select(workdir, which)


@pytest.mark.parametrize("call", ["restore_params", "verify", "manifest"])
@pytest.mark.parametrize("which", ["9", "best"])
def test_one_that_training_deletes_meanwhile_is_a_message(workdir, monkeypatch, capsys, call, which):
    original = getattr(CheckpointManager, call)

    def prune_first(self, step, *args, **options):
        if step == 9:
            shutil.rmtree(self.folder / "9", ignore_errors=True)
        return original(self, step, *args, **options)

    monkeypatch.setattr(CheckpointManager, call, prune_first)
    if which == "best" and call != "restore_params":
        assert loading.load_checkpoint(workdir, which).step == 10
    else:
        with pytest.raises(UserError, match="checkpoint 9 was deleted while it was read; run again"):
            loading.load_checkpoint(workdir, which)
    assert "damaged" not in capsys.readouterr().err


def test_a_checkpoint_that_was_pruned_meanwhile_is_an_error_message(parts, tmp_path, monkeypatch):
    """As with keep_last = 1."""
    verify = CheckpointManager.verify

    def prune_first(self, step, **options):
        if step == 3:
            save(tmp_path, parts, 4)
            self.remove(3)
        verify(self, step, **options)

    save(tmp_path, parts, 3)
    monkeypatch.setattr(CheckpointManager, "verify", prune_first)
    with pytest.raises(UserError, match="checkpoint 3 was deleted while it was read; run again"):
        loading.load_checkpoint(tmp_path, "latest")


@pytest.mark.slow
def test_averaging_holds_two_copies_at_most(parts, saved, monkeypatch):
    """No more are alive when one more is read, and the sum takes the place of what it was before."""
    _, _, model, mesh, _ = parts
    restore, held, first = CheckpointManager.restore_params, [], []

    def counted(*args):
        params = restore(*args)
        gc.collect()
        held.append(sum(array.nbytes for array in jax.live_arrays()) - before)
        first.extend(jax.tree.leaves(params) if not first else [])
        return params

    monkeypatch.setattr(CheckpointManager, "restore_params", counted)
    before = sum(array.nbytes for array in jax.live_arrays())
    loading.average_params(CheckpointManager(saved), [9, 10, 100], model, mesh)
    assert max(held) <= 2 * 4 * model.num_params()
    assert all(leaf.is_deleted() for leaf in first)


def copied_in(workdir, other_parts, ids, tmp_path):
    """Checkpoint 100 of the workdir is that of another run; `ids` are of the two runs, empty where they have none."""
    shutil.rmtree(workdir)
    for folder, parts, run_id in ((workdir, make_parts(), ids[0]), (tmp_path / "other", other_parts, ids[1])):
        for done in (9, 10, 100):
            save(folder, parts, done, **({"run_id": run_id} if run_id else {}))
            CheckpointManager(folder).update_metrics(done, {manager.VALID_BLEU: 30.0})
    shutil.rmtree(workdir / "checkpoints" / "100")
    shutil.copytree(tmp_path / "other" / "checkpoints" / "100", workdir / "checkpoints" / "100")


def other_vocabulary():
    config, _, *rest = make_parts()
    return config, tokenizer.train(["quite another text of no such trees"], 280, "bpe"), *rest


def other_model():
    config, *rest = make_parts()
    return dataclasses.replace(config, model=dataclasses.replace(config.model, norm="pre")), *rest


@pytest.mark.reported
@pytest.mark.parametrize("which", [slow("average:2"), "average:3", slow("best-average:3")])
def test_checkpoints_of_another_run_are_not_averaged(workdir, tmp_path, which):
    copied_in(workdir, make_parts(), ("a" * 32, "b" * 32), tmp_path)
    steps = r"\[10, 100\]" if which == "average:2" else r"\[9, 10, 100\]"
    with pytest.raises(UserError, match=rf"checkpoints {steps} are not of one run.*10 \(run id aaaaaaaa, expected bb"):
        loading.load_checkpoint(workdir, which)
    assert loading.load_checkpoint(workdir, "100").step == 100


@pytest.mark.reported
@pytest.mark.parametrize(
    ("other", "ids", "why"),
    [
        slow(other_vocabulary, ("", ""), "vocabulary [0-9a-f]{8}, expected"),
        (other_model, ("", ""), "model.norm = 'post', expected 'pre'"),
        slow(other_model, ("a" * 32, ""), "model.norm = 'post', expected 'pre'"),
    ],
)
def test_without_ids_of_both_vocabulary_and_model_must_be_the_same(workdir, tmp_path, other, ids, why):
    copied_in(workdir, other(), ids, tmp_path)
    with pytest.raises(UserError, match=rf"run than 100: 9 \({why}.*; 10 \({why}"):
        loading.resolve_steps(CheckpointManager(workdir), "average:3")
    assert loading.resolve_steps(CheckpointManager(workdir), "average:1") == [100]


def test_checkpoints_that_an_earlier_version_saved_are_averaged_with_those_of_this_one(workdir, parts):
    """Their manifests have no id."""
    for done in (9, 10, 100):
        path = workdir / "checkpoints" / str(done) / manager.MANIFEST
        values = json.loads(path.read_text())
        del values["run_id"], values["base_run_id"]
        values["sha256"] = json_digest({key: values[key] for key in values if key != "sha256"})
        path.write_text(json.dumps(values))
    save(workdir, parts, 200, run_id="a" * 32)
    assert select(workdir, "average:4") == [9, 10, 100, 200]
