"""What the host does: order of dispatch and reading, exact resume, signals, divergence, workdirs of others."""

import json
import os
import pathlib
import signal

import jax
import numpy as np
import pytest

from tests.conftest import small_config
from transformer import loop
from transformer.batching import Batch
from transformer.checkpoint import Checkpoints
from transformer.errors import DivergedError, StoppedError, UserError, WorkdirError
from transformer.loss import LossSums
from transformer.step import StepMetrics, TrainState


class FakeStep:
    """Records what happens; metrics are numbers that are only good once read."""

    def __init__(self, losses):
        self.losses, self.events = iter(losses), []

    def __call__(self, state, batch):
        self.events.append(f"run {batch}")
        loss = jax.device_put(np.float32(next(self.losses)))
        metrics = StepMetrics(LossSums(loss, loss, loss, jax.device_put(np.float32(4))), loss, loss)
        return state._replace(step=state.step), metrics


def make_updates(losses, monkeypatch):
    fake = FakeStep(losses)
    batches = (Batch(i, np.zeros((2, 3), np.int32)) for i in range(10))
    updates = loop.Updates(
        fake, TrainState(jax.device_put(np.int32(0)), {}, ()), batches, lambda batch: batch.source_BS
    )
    add = updates.meter.add
    monkeypatch.setattr(updates.meter, "add", lambda m, s, n: (fake.events.append(f"read {s}"), add(m, s, n)))
    return updates, fake


def test_metrics_are_read_while_the_next_update_runs(monkeypatch):
    updates, fake = make_updates([1, 2, 3], monkeypatch)
    for _ in range(3):
        updates.dispatch()
    assert fake.events == ["run 0", "run 1", "read 1", "run 2", "read 2"]
    updates.drain()
    updates.drain()
    assert fake.events[5:] == ["read 3"]
    assert (updates.meter.updates, updates.meter.slots) == (3, 18)


def test_a_loss_that_is_no_number_stops_at_its_update(monkeypatch):
    updates, _ = make_updates([1, np.nan, 3], monkeypatch)
    updates.dispatch()
    updates.dispatch()
    with pytest.raises(DivergedError, match="at update 2 "):
        updates.dispatch()


WORDS = ["red", "green", "blue", "old", "new", "house", "tree", "cat", "dog", "sees"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Pairs whose target is the source spelled backwards, in a folder of text files."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for split, count in (("train", 120), ("val", 8), ("test", 8)):
        lines = [" ".join(rng.choice(WORDS, rng.integers(2, 7))) for _ in range(count)]
        (folder / f"{split}.en").write_text("".join(f"{line}\n" for line in lines))
        (folder / f"{split}.de").write_text("".join(f"{line[::-1]}\n" for line in lines))
    return {
        "name": "text",
        "dir": str(folder),
        "data_dir": str(folder / "prepared"),
        "vocab_size": 285,
        "num_buckets": 2,
    }


def config_of(data, **sections):
    train = {"num_steps": 12, "eval_every_steps": 6, "checkpoint_every_steps": 3, "keep_last": 20}
    sections["train"] = {**train, **sections.get("train", {})}
    return small_config(data=data, model={"num_layers": 1, **sections.pop("model", {})}, **sections)


def final_params(workdir, done=12):
    trained = loop.Checkpoints(workdir)
    assert trained.steps()[-1] == done
    return restore(workdir, done)


def restore(workdir, done):
    from transformer.checkpoint import load_trained

    return jax.tree.map(np.asarray, load_trained(workdir, str(done)).params)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A run that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    loop.fit(config_of(data), workdir)
    return workdir


def files_of(workdir):
    """Content and time of every file but the lock, which every run writes."""
    files = (path for path in sorted(workdir.rglob("*")) if path.is_file() and path.name != "lock")
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def lines_of(workdir):
    return [json.loads(line) for line in (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_what_is_documented(whole):
    assert {path.name for path in whole.iterdir() if "tfevents" not in path.name} == {
        "checkpoints",
        "config.json",
        "lock",
        "metrics.jsonl",
        "tokenizer",
    }
    assert Checkpoints(whole).steps() == [3, 6, 9, 12]
    train = [line for line in lines_of(whole) if "train/loss" in line]
    valid = [line for line in lines_of(whole) if "valid/bleu" in line]
    assert [line["step"] for line in train] == [5, 10, 12]
    assert [line["step"] for line in valid] == [6, 12]
    assert {"train/target_tokens_per_s", "train/fill", "train/learning_rate", "train/input_wait"} <= set(train[0])
    assert {"valid/loss", "valid/bleu"} <= set(valid[0])
    assert Checkpoints(whole).metrics(12)["valid/bleu"] == valid[1]["valid/bleu"]


def test_nothing_recompiles_once_each_bucket_was_seen(whole):
    assert [line["train/compiles"] for line in lines_of(whole) if "train/compiles" in line][-1] == 2


@pytest.mark.parametrize("stop", [3, 9])
def test_resume_is_exact(data, whole, tmp_path, stop):
    """Data order, dropout, optimizer and learning rate go on as if nothing had happened, to the last bit."""
    loop.fit(config_of(data, train={"num_steps": stop}), tmp_path / "run")
    loop.fit(config_of(data), tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, final_params(tmp_path / "run"), final_params(whole))


def test_a_finished_run_is_left_alone(data, whole, capsys):
    before = files_of(whole)
    loop.fit(config_of(data), whole)
    assert files_of(whole) == before
    assert "already trained for 12 steps" in capsys.readouterr().err


def test_a_stop_signal_saves_the_step_it_is_at(data, whole, tmp_path, monkeypatch):
    dispatch = loop.Updates.dispatch
    calls = []

    def interrupted(self):
        dispatch(self)
        calls.append(1)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(loop.Updates, "dispatch", interrupted)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(StoppedError, match="saved step 4") as stopped:
        loop.fit(config_of(data), tmp_path / "run")
    assert stopped.value.exit_code == 143
    assert signal.getsignal(signal.SIGTERM) is before
    assert Checkpoints(tmp_path / "run").steps() == [3, 4]
    monkeypatch.setattr(loop.Updates, "dispatch", dispatch)
    loop.fit(config_of(data), tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, final_params(tmp_path / "run"), final_params(whole))


def test_a_run_that_diverges_keeps_its_last_good_checkpoint(data, tmp_path):
    config = config_of(data, optimizer={"schedule": "constant", "learning_rate": 1e30, "warmup_steps": 0})
    with pytest.raises(DivergedError, match="the run diverged: at update"):
        loop.fit(config, tmp_path / "run")
    assert all(
        np.isfinite(leaf).all()
        for done in Checkpoints(tmp_path / "run").steps()
        for leaf in jax.tree.leaves(restore(tmp_path / "run", done))
    )


def test_a_workdir_of_another_config_is_refused_and_unharmed(data, whole):
    before = files_of(whole)
    with pytest.raises(UserError, match=r"another config: model\.norm: 'post' → 'pre'"):
        loop.fit(config_of(data, model={"norm": "pre"}), whole)
    assert files_of(whole) == before


def test_a_lost_vocabulary_is_not_trained_again(data, tmp_path):
    loop.fit(config_of(data, train={"num_steps": 3}), tmp_path / "run")
    (tmp_path / "run" / "tokenizer" / "sentencepiece.model").unlink()
    with pytest.raises(UserError, match="the vocabulary of this workdir is missing"):
        loop.fit(config_of(data), tmp_path / "run")


def test_a_damaged_checkpoint_gives_way_to_the_one_before(data, whole, tmp_path, capsys):
    loop.fit(config_of(data, train={"num_steps": 6}), tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "6" / "params" / "_CHECKPOINT_METADATA"
    path.write_bytes(path.read_bytes() + b" ")
    loop.fit(config_of(data), tmp_path / "run")
    assert "checkpoint 6 is damaged" in capsys.readouterr().err
    jax.tree.map(np.testing.assert_array_equal, final_params(tmp_path / "run"), final_params(whole))


def test_if_no_checkpoint_is_sound_training_refuses_to_start_over(data, tmp_path):
    loop.fit(config_of(data, train={"num_steps": 3}), tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "3" / "config.json").write_text("{}")
    with pytest.raises(WorkdirError, match="is sound"):
        loop.fit(config_of(data), tmp_path / "run")


@pytest.mark.parametrize("field", ["seed", "batch_tokens"])
def test_train_fields_change_the_run(data, whole, tmp_path, field):
    loop.fit(config_of(data, train={"num_steps": 3, field: {"seed": 1, "batch_tokens": 128}[field]}), tmp_path / "run")
    changed = jax.tree.leaves(restore(tmp_path / "run", 3))
    assert not all(np.array_equal(a, b) for a, b in zip(changed, jax.tree.leaves(restore(whole, 3)), strict=True))


def test_eight_devices_train_the_same_model(data, whole, tmp_path):
    """From the same seed, the loss after 12 updates on 8 devices is that on one."""
    loop.fit(config_of(data, mesh={"data": 8}), tmp_path / "run")
    ours, theirs = (
        [line["train/loss"] for line in lines_of(w) if "train/loss" in line] for w in (tmp_path / "run", whole)
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)


def test_a_second_trainer_is_told_who_holds_the_workdir(data, tmp_path):
    from etils import epath

    with loop.workdir.lock(epath.Path(tmp_path / "run")), pytest.raises(WorkdirError, match="held by process"):
        loop.fit(config_of(data), tmp_path / "run")
