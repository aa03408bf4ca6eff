"""A checkpoint is one verified unit: what comes back is what was saved, or it is called damaged."""

import asyncio
import functools
import json
import shutil
import threading
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from orbax.checkpoint._src.serialization import serialization

from tests.conftest import slow, small_config
from tests.training.test_train_step import draw_batch
from transformer.checkpoints import manager
from transformer.checkpoints.manager import CheckpointManager
from transformer.data import tokenizer
from transformer.distributed import sharding
from transformer.distributed.mesh import make_mesh
from transformer.models import registry
from transformer.runtime import environment
from transformer.runtime.errors import UserError, WorkdirError
from transformer.training import train_step

LINES = ["the old house", "a new tree", "the cat sees a dog", "trees and houses"]


@functools.cache
def make_parts(seed=0):
    """Config, tokenizer, model, mesh and a state, whose moments are random numbers."""
    config = small_config(model={"num_layers": 1}, mesh={"data": 2}, train={"seed": seed})
    vocabulary = tokenizer.train(LINES, 280, "bpe")
    model = registry.ModelDef(config.model, vocabulary.vocab_size)
    mesh = make_mesh(config.mesh)
    state, rng = train_step.init_state(model, config, mesh), np.random.default_rng(seed)

    def drawn(leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        return jax.device_put(rng.standard_normal(leaf.shape).astype(leaf.dtype), leaf.sharding)

    return config, vocabulary, model, mesh, state._replace(opt_state=jax.tree.map(drawn, state.opt_state))


def save_three(workdir):
    """Checkpoints 9, 10 and 100 of falling BLEU."""
    for done, bleu in ((9, 30.0), (10, 20.0), (100, 10.0)):
        save(workdir, make_parts(), done)
        CheckpointManager(workdir).update_metrics(done, {manager.VALID_BLEU: bleu, "best": 30.0})
    return workdir


@pytest.fixture(scope="module")
def parts():
    return make_parts()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_three(tmp_path_factory.mktemp("saved"))


@pytest.fixture
def workdir(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run"


def save(workdir, parts, done, **ids):
    config, vocabulary, _, mesh, state = parts
    marked = jax.tree.map(lambda leaf: leaf + np.asarray(done, leaf.dtype), state.params)
    counter = jax.device_put(np.int32(done), sharding.replicated(mesh))
    CheckpointManager(workdir).save(
        state._replace(step=counter, params=marked), config, vocabulary, {"training": "digest of the data"}, {}, **ids
    )


def test_steps_are_in_order_of_number(workdir):
    assert CheckpointManager(workdir).steps() == [9, 10, 100]


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_the_state_comes_back_to_the_last_bit_on_any_mesh(parts, saved, devices):
    config, _, model, _, state = parts
    mesh = make_mesh(small_config(mesh={"data": devices}).mesh)
    restored = CheckpointManager(saved).restore(10, train_step.abstract_state(model, config, mesh))
    assert int(restored.step) == 10
    wanted = state._replace(params=jax.tree.map(lambda leaf: leaf + 10, state.params))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), restored._replace(step=wanted.step), wanted)
    assert restored.step.sharding.mesh.size == devices


@pytest.mark.slow
def test_what_fsdp_saved_comes_back_on_other_meshes(tmp_path):
    config = small_config(model={"num_layers": 1}, mesh={"fsdp": 8}, train={"ema_decay": 0.9})
    _, vocabulary, model, *_ = make_parts()
    state = train_step.init_state(model, config, make_mesh(config.mesh))
    assert not state.params["encoder"][0]["mlp"]["kernel_in"].is_fully_replicated
    CheckpointManager(tmp_path).save(state, config, vocabulary, {}, {})
    for sizes in ({"data": 8}, {"data": 2, "tensor": 2, "sequence": 2}, {"data": 1}):
        mesh = make_mesh(small_config(mesh=sizes).mesh)
        restored = CheckpointManager(tmp_path).restore(0, train_step.abstract_state(model, config, mesh))
        jax.tree.map(np.testing.assert_array_equal, restored, state)
        wanted = train_step.state_shardings(model, config, mesh)
        jax.tree.map(lambda leaf, where: np.testing.assert_equal(leaf.sharding, where), restored, wanted)


@pytest.mark.parametrize("devices", [1, 8])
def test_a_moving_average_comes_back_too(parts, saved, tmp_path, devices):
    config, vocabulary, model, _, state = parts
    config = small_config(model={"num_layers": 1}, mesh={"data": devices}, train={"ema_decay": 0.9})
    state = state._replace(ema=jax.tree.map(lambda leaf: leaf + np.float32(3), state.params))
    CheckpointManager(tmp_path).save(state, config, vocabulary, {}, {})
    abstract = train_step.abstract_state(model, config, make_mesh(config.mesh))
    restored = CheckpointManager(tmp_path).restore(0, abstract)
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    assert any(name.startswith("ema/") for name in CheckpointManager(tmp_path).manifest(0).files)
    assert not (saved / "checkpoints" / "100" / "ema").exists()


def test_checkpoints_that_are_a_file_are_refused(tmp_path):
    (tmp_path / "checkpoints").write_text("x")
    with pytest.raises(UserError, match="expected a folder of checkpoints, found a file"):
        CheckpointManager(tmp_path).latest_valid_step()


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def flip(path):
    content = bytearray(path.read_bytes() or b"x")
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "flipped": flip,
    "deleted": lambda path: path.unlink(),
    "emptied": lambda path: path.write_bytes(b"") if path.stat().st_size else path.write_bytes(b"x"),
    "halved": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] or b"x"),
    "joined": lambda path: path.with_name(path.name + ".extra").write_bytes(b"x"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_no_damage_to_any_file_goes_unnoticed(workdir, damage, capsys):
    folder = workdir / "checkpoints" / "100"
    for path in files(folder):
        shutil.copytree(folder, workdir / "whole")
        DAMAGE[damage](path)
        assert CheckpointManager(workdir).latest_valid_step() == 10, path
        assert "checkpoint 100 is damaged and skipped" in capsys.readouterr().err, path
        shutil.rmtree(folder)
        (workdir / "whole").rename(folder)
    assert CheckpointManager(workdir).latest_valid_step() == 100


@pytest.mark.parametrize("name", [".DS_Store", ".nfs0001", "params/.DS_Store"])
def test_what_a_file_manager_leaves_is_no_damage(workdir, name):
    (workdir / "checkpoints" / "100" / name).write_text("x")
    assert CheckpointManager(workdir).latest_valid_step() == 100


def test_without_a_valid_checkpoint_no_run_restarts(workdir):
    for name in ("9", "10", "100"):
        flip(workdir / "checkpoints" / name / "config.json")
    with pytest.raises(WorkdirError, match=r"none of the checkpoints .* is valid"):
        CheckpointManager(workdir).latest_valid_step()


def test_what_was_cut_short_does_not_count_and_is_cleared(workdir):
    for name in ("200.partial", "9.removed"):
        (workdir / "checkpoints" / name / "params").mkdir(parents=True)
    (workdir / "checkpoints" / "notes").mkdir()
    assert CheckpointManager(workdir).latest_valid_step() == 100
    CheckpointManager(workdir).clean_up(100)
    assert {path.name for path in (workdir / "checkpoints").iterdir()} == {"9", "10", "100", "notes"}


def test_a_lost_manifest_is_damage_and_never_a_fresh_start(workdir, capsys):
    for name in ("9", "10", "100"):
        (workdir / "checkpoints" / name / manager.MANIFEST).unlink()
    with pytest.raises(WorkdirError, match=r"none of the checkpoints .* is valid"):
        CheckpointManager(workdir).latest_valid_step()
    assert capsys.readouterr().err.count("damaged") == 3


def test_a_damaged_latest_checkpoint_is_quarantined_and_never_outlives_a_valid_one(workdir, parts):
    flip(workdir / "checkpoints" / "100" / "config.json")
    checkpoints = CheckpointManager(workdir)
    checkpoints.clean_up(checkpoints.latest_valid_step())
    assert (workdir / "checkpoints" / "100.damaged").exists()
    save(workdir, parts, 50)
    checkpoints.prune(keep_last=1, keep_best=0)
    assert checkpoints.steps() == [50]
    assert checkpoints.latest_valid_step() == 50


def test_a_save_replaces_one_of_the_same_step(workdir, parts):
    flip(workdir / "checkpoints" / "100" / "config.json")
    save(workdir, parts, 100)
    assert CheckpointManager(workdir).latest_valid_step() == 100
    assert CheckpointManager(workdir).metrics(100) == {}


def fail(*_):
    raise OSError(28, "No space left")


@pytest.mark.parametrize("begin", [fail, lambda *_: SimpleNamespace(result=fail)], ids=["at once", "in the background"])
def test_a_save_that_fails_leaves_the_others_as_they_were(workdir, parts, monkeypatch, begin):
    monkeypatch.setattr(manager.ocp, "save_async", begin)
    with pytest.raises(UserError, match="No space left"):
        save(workdir, parts, 200)
    assert CheckpointManager(workdir).latest_valid_step() == 100


def slow_writes(monkeypatch, seconds):
    """Lets Orbax read the first array that it writes, and so the others, so much later."""
    write, delayed = serialization.async_serialize_from_host, set()

    async def late(slices, spec, **kwargs):
        if (folder := spec["kvstore"]["base"]["path"].split("/checkpoints/")[1].split("/")[0]) not in delayed:
            delayed.add(folder)
            await asyncio.sleep(seconds)
        return await write(slices, spec, **kwargs)

    monkeypatch.setattr(serialization, "async_serialize_from_host", late)


@pytest.mark.parametrize(("devices", "count", "seconds"), [(1, 2, 0.3), slow(2, 2, 0.3), slow(1, 20, 1.0)])
def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch, devices, count, seconds):
    """What is written are the arrays as they were, though updates take their memory."""
    slow_writes(monkeypatch, seconds)
    config, vocabulary, model, *_ = make_parts()
    mesh = make_mesh(small_config(mesh={"data": devices}).mesh)
    update = train_step.make_train_step(model, config, mesh)
    batch = sharding.shard_batch(mesh, draw_batch())
    state, _ = update(train_step.init_state(model, config, mesh), batch)  # which compiles
    states = []
    with CheckpointManager(tmp_path) as checkpoints:
        for _ in range(count):
            states.append(jax.device_get(jax.tree.map(jnp.copy, state)))
            checkpoints.save_async(state, config, vocabulary, {}, {})
            for _ in range(2):
                before, (state, _) = state, update(state, batch)
            jax.block_until_ready(state)
            assert jax.tree.leaves(before.params)[0].is_deleted()
            assert not (tmp_path / "checkpoints" / str(states[-1].step)).exists()
    assert [int(saved.step) for saved in states] == CheckpointManager(tmp_path).steps()
    abstract = train_step.abstract_state(model, config, mesh)
    for saved in states:
        assert CheckpointManager(tmp_path).is_valid(int(saved.step))
        restored = CheckpointManager(tmp_path).restore(int(saved.step), abstract)
        jax.tree.map(np.testing.assert_array_equal, restored, saved)


def test_nothing_is_written_any_more_after_a_save_that_failed_at_once(workdir, parts, monkeypatch):
    """What was begun before it may still be on its way."""
    slow_writes(monkeypatch, 0.3)
    begin = manager.ocp.save_async
    monkeypatch.setattr(
        manager.ocp, "save_async", lambda path, tree: fail() if path.name == "optimizer" else begin(path, tree)
    )
    with pytest.raises(UserError, match="No space left"):
        save(workdir, parts, 200)
    monkeypatch.setattr(manager.ocp, "save_async", begin)
    save(workdir, parts, 200)
    assert CheckpointManager(workdir).latest_valid_step() == 200


def test_what_changes_checkpoints_waits_for_the_save_under_way(workdir, monkeypatch):
    slow_writes(monkeypatch, 0.2)
    config, vocabulary, _, mesh, state = make_parts()
    state = state._replace(step=jax.device_put(np.int32(200), sharding.replicated(mesh)))
    with CheckpointManager(workdir) as checkpoints:
        checkpoints.save_async(state, config, vocabulary, {}, {})
        checkpoints.update_metrics(200, {manager.VALID_BLEU: 5.0})
        checkpoints.prune(1, 1)
        assert checkpoints.steps() == [9, 10, 100]
    assert CheckpointManager(workdir).steps() == [9, 200]
    assert CheckpointManager(workdir).metrics(200) == {manager.VALID_BLEU: 5.0}


def test_a_failure_in_the_background_is_raised_once_and_drops_what_waits(workdir, monkeypatch):
    begun = threading.Event()
    monkeypatch.setattr(manager.ocp, "save_async", lambda *_: SimpleNamespace(result=lambda: begun.wait(30) and fail()))
    config, vocabulary, _, mesh, state = make_parts()
    state = state._replace(step=jax.device_put(np.int32(200), sharding.replicated(mesh)))
    checkpoints = CheckpointManager(workdir)
    checkpoints.save_async(state, config, vocabulary, {}, {})
    checkpoints.prune(1, 0)
    checkpoints.check()
    begun.set()
    while not checkpoints._queue.is_idle:
        time.sleep(0.01)
    with pytest.raises(UserError, match="No space left"):
        checkpoints.update_metrics(200, {})
    checkpoints.wait()
    assert checkpoints.steps() == [9, 10, 100]
    checkpoints.prune(2, 0)
    assert checkpoints.steps() == [10, 100]


@pytest.mark.parametrize(
    ("keep_last", "keep_best", "left"),
    [(1, 0, [100]), (1, 1, [9, 100]), (2, 0, [10, 100]), (1, 2, [9, 10, 100]), (5, 5, [9, 10, 100])],
)
def test_pruning_keeps_the_newest_and_the_best(workdir, keep_last, keep_best, left):
    CheckpointManager(workdir).prune(keep_last, keep_best)
    assert CheckpointManager(workdir).steps() == left
    assert sorted(int(path.name) for path in (workdir / "checkpoints").iterdir()) == left


def test_a_damaged_checkpoint_takes_no_place_of_the_best(workdir):
    (workdir / "checkpoints" / "9" / "config.json").write_text("{")
    CheckpointManager(workdir).prune(1, 1)
    assert CheckpointManager(workdir).steps() == [9, 10, 100]  # it is not deleted either


def test_nothing_in_a_checkpoint_is_executed(workdir):
    """A manifest that is code is no manifest."""
    (workdir / "checkpoints" / "100" / manager.MANIFEST).write_text("__import__('os').system('touch hacked')")
    assert CheckpointManager(workdir).metrics(100) == {}
    assert CheckpointManager(workdir).latest_valid_step() == 10


def test_a_manifest_that_says_something_else_is_damaged(workdir):
    """Its own digest covers what no file's does: metrics, the digest of the data, the host."""
    path = workdir / "checkpoints" / "100" / manager.MANIFEST
    whole = path.read_text()
    for old, new in (("10.0", "90.0"), ("digest of the data", "digest of other data"), ('"cores"', '"corps"')):
        assert whole.count(old) == 1
        path.write_text(whole.replace(old, new))
        assert CheckpointManager(workdir).latest_valid_step() == 10
        assert CheckpointManager(workdir).metrics(100) == {}
    path.write_text(whole)
    assert CheckpointManager(workdir).latest_valid_step() == 100


def test_a_manifest_without_its_digest_is_not_trusted(workdir):
    path = workdir / "checkpoints" / "100" / manager.MANIFEST
    values = json.loads(path.read_text())
    del values["sha256"]
    path.write_text(json.dumps(values))
    assert CheckpointManager(workdir).latest_valid_step() == 10


def test_what_cannot_be_deleted_yet_is_deleted_next_time(workdir, monkeypatch, capsys):
    kind, busy = type(epath.Path(workdir)), [OSError(39, "Directory not empty")]
    rmtree = kind.rmtree

    def refused_once(path):
        if busy:
            raise busy.pop()
        rmtree(path)

    monkeypatch.setattr(kind, "rmtree", refused_once)
    CheckpointManager(workdir).prune(1, 0)
    assert CheckpointManager(workdir).steps() == [100]
    assert "9.removed: not deleted yet" in capsys.readouterr().err
    CheckpointManager(workdir).clean_up(100)
    assert [path.name for path in (workdir / "checkpoints").iterdir()] == ["100"]


def test_the_host_is_noted(workdir):
    assert CheckpointManager(workdir).manifest(9).host == environment.fingerprint()


def test_nothing_is_deleted_for_a_newest_that_is_not_whole(workdir, capsys):
    next(path for path in (workdir / "checkpoints" / "100" / "params").rglob("*") if path.is_file()).unlink()
    CheckpointManager(workdir).prune(1, 0)
    assert CheckpointManager(workdir).steps() == [9, 10, 100]
    assert "checkpoint 100 is damaged" in capsys.readouterr().err


def test_the_manifest_lists_every_file_with_its_digest(workdir):
    folder = workdir / "checkpoints" / "100"
    manifest = json.loads((folder / manager.MANIFEST).read_text())
    assert set(manifest["files"]) == {str(p.relative_to(folder)) for p in files(folder)} - {manager.MANIFEST}
    assert {"config.json", f"tokenizer/{tokenizer.FILE_NAME}"} <= set(manifest["files"])
    assert (manifest["data"], manifest["metrics"]["best"]) == ({"training": "digest of the data"}, 30.0)
