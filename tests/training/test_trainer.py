"""What the host does: order of dispatch and reading, exact resume, signals, divergence, workdirs of others."""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import re
import shutil
import signal
import threading
import time

import jax
import numpy as np
import pytest
from etils import epath

from configs import wmt14
from tests.conftest import small_config
from tests.helpers.compilation import CompileCounter
from tests.helpers.updates import FakeUpdate
from train import train as fit
from transformer.checkpoints import best_metric, loading, manager
from transformer.checkpoints.manager import CheckpointManager
from transformer.checkpoints.state import TrainState
from transformer.config import validation
from transformer.data import tokenizer
from transformer.data.batching import PAD_EXAMPLE, Batch, eval_batches
from transformer.decoding.translator import Translator
from transformer.distributed import platform
from transformer.evaluation.evaluator import CrossEntropy, Evaluator
from transformer.models.flops import TrainingCost
from transformer.runtime import environment, signals
from transformer.runtime.errors import DivergedError, StoppedError, UserError, WorkdirError
from transformer.training import preparation, train_step, trainer
from transformer.training import workdir as workdir_lib
from transformer.training.metrics import MetricsAccumulator
from transformer.training.objective import TrainingLoss
from transformer.training.session import prepare
from transformer.training.train_step import StepMetrics


class FakeStep(FakeUpdate):
    """Records what happens; metrics are numbers that are only good once read."""

    def __init__(self, losses):
        super().__init__(self.update)
        self.losses, self.events = iter(losses), []

    def update(self, state, batch):
        self.events.append(f"run {batch.source_BS}")
        loss = jax.device_put(np.float32(next(self.losses)))
        tokens, skipped = jax.device_put((np.float32(4), np.int32(0)))
        metrics = StepMetrics(TrainingLoss(loss, loss, loss, tokens, None), loss, loss, loss, skipped)
        return state._replace(step=state.step), metrics


def make_updates(losses, monkeypatch):
    fake = FakeStep(losses)
    batches = (Batch(i, np.zeros((2, 3), np.int32)) for i in range(10))
    state = TrainState(jax.device_put(np.int32(0)), {}, ())
    updates = trainer.StepPipeline(
        fake, state, batches, lambda batch: batch, lambda placed: 10 * placed.source_BS, TrainingCost(), 1
    )
    add = updates.meter.add
    monkeypatch.setattr(updates.meter, "add", lambda m, s, **n: (fake.events.append(f"read {s}"), add(m, s, **n)))
    return updates, fake


def test_metrics_are_read_while_the_next_update_runs(monkeypatch):
    updates, fake = make_updates([1, 2, 3], monkeypatch)
    for step in (1, 2, 3):
        updates.dispatch(step)
    assert fake.events == ["run 0", "run 1", "read 1", "run 2", "read 2"]
    updates.flush()
    updates.flush()
    assert fake.events[5:] == ["read 3"]
    assert (updates.meter.updates, updates.meter.token_positions) == (3, 18)
    assert updates.meter.cost()._replace(seconds=0) == TrainingCost(flops=30, tokens=12, source_tokens=6)


def test_time_to_compile_is_left_out_of_the_speed_but_not_of_the_cost(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(trainer, "MetricsAccumulator", functools.partial(MetricsAccumulator, clock=lambda: now[0]))
    update = FakeStep.update

    def slow_compile(self):
        now[0] += 50
        return self

    def slow_update(self, *args):
        now[0] += 2
        return update(self, *args)

    monkeypatch.setattr(FakeStep, "compile", slow_compile)
    monkeypatch.setattr(FakeStep, "update", slow_update)
    updates, _ = make_updates([1, 2], monkeypatch)
    updates.dispatch(1)
    updates.dispatch(2)
    updates.flush()
    assert updates.meter.summary()["train/target_tokens_per_s"] == 8 / 4
    assert updates.meter.summary()["train/step_ms"] == 2000
    assert updates.meter.host_timing()["host_ms"] == 0
    assert updates.meter.cost().seconds == 54


def test_a_signal_is_answered_while_a_shape_is_compiled(monkeypatch, capfd):
    """The compiler is one long call outside of Python, in which the main thread handles no signal."""
    updates, _ = make_updates([1], monkeypatch)
    answered, compiled = [], []

    def compile_slowly(self):
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGTERM)).start()
        hashlib.pbkdf2_hmac("sha256", b"a", b"b", 2_000_000)
        compiled.append(time.perf_counter())
        return self

    def note(message):
        answered.append((time.perf_counter(), message))

    monkeypatch.setattr(FakeStep, "compile", compile_slowly)
    monkeypatch.setattr(signals, "log_info", note)
    with signals.catch_stop_signals() as stop_signal:
        updates.dispatch(1)
        assert stop_signal() == signal.SIGTERM
    ((when, message),) = answered
    assert when < compiled[0] - 0.1
    assert message == (
        "SIGTERM: stopping after this update, which is compiling shape 1 of 1; send it again to stop at once"
    )


def test_a_loss_that_is_no_number_stops_at_its_update(monkeypatch):
    updates, _ = make_updates([1, np.nan, 3], monkeypatch)
    updates.dispatch(1)
    updates.dispatch(2)
    with pytest.raises(DivergedError, match="at update 2 "):
        updates.dispatch(3)


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
    loading = CheckpointManager(workdir)
    assert loading.steps()[-1] == done
    return restore(workdir, done)


def restore(workdir, done):
    from transformer.checkpoints.loading import load_checkpoint

    return jax.tree.map(np.asarray, load_checkpoint(workdir, str(done)).params)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A run that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    fit(config_of(data), workdir)
    return workdir


@pytest.mark.slow
def test_a_run_may_start_from_another_s_params_and_is_resumed_as_its_own(data, whole, tmp_path):
    train = {"num_steps": 1, "init_from": str(whole), "init_checkpoint": "6"}
    config = config_of(data, train=train, optimizer={"learning_rate": 0.0})  # so that an update changes nothing
    fit(config, tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, restore(tmp_path / "run", 1), restore(whole, 6))
    digests = {CheckpointManager(folder).tokenizer(done).digest for folder, done in ((tmp_path / "run", 1), (whole, 6))}
    assert len(digests) == 1
    own, base = (CheckpointManager(folder).manifest(done) for folder, done in ((tmp_path / "run", 1), (whole, 6)))
    assert own.base_run_id == base.run_id != own.run_id
    with pytest.raises(UserError, match=r"another config: train\.init_from: .* → ''; train\.init_checkpoint: '6' → 'l"):
        fit(config_of(data, train={"num_steps": 1}, optimizer={"learning_rate": 0.0}), tmp_path / "run")
    with pytest.raises(UserError, match=r"another config: train\.init_from: '' → "):
        fit(config_of(data, train={"init_from": str(whole)}), whole)


@pytest.mark.reported
def test_a_run_has_one_id_from_its_first_update_on_and_another_s_checkpoint_does_not_pass_for_its_own(whole, tmp_path):
    kept = json.loads((whole / "config.json").read_text())["run_id"]
    assert {CheckpointManager(whole).manifest(done).run_id for done in (3, 6, 9, 12)} == {kept}
    run = epath.Path(shutil.copytree(whole, tmp_path / "run"))
    checkpoints = CheckpointManager(run)
    newest, _, ids = preparation._newest_checkpoint(checkpoints, run)
    assert (newest, *ids) == (12, kept, "")
    copied_in = dataclasses.replace(checkpoints.manifest(12), run_id="b" * 32)
    (run / "checkpoints" / "12" / "manifest.json").write_text(copied_in.to_json())
    with pytest.raises(UserError, match=rf"checkpoint 12 is of another run \(id bbbbbbbb\) than .* \({kept[:8]}\)"):
        preparation._newest_checkpoint(checkpoints, run)
    shutil.rmtree(run / "checkpoints")
    assert preparation._newest_checkpoint(checkpoints, run)[2].run_id not in ("", kept)


def files_of(workdir):
    """Content and time of every file but the lock, which every run writes."""
    files = (path for path in sorted(workdir.rglob("*")) if path.is_file() and path.name != "lock")
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def lines_of(workdir):
    return [json.loads(line) for line in (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()]


def programs_logged(workdir):
    return [line["train/compiles"] for line in lines_of(workdir) if "train/compiles" in line]


def test_a_run_leaves_what_is_documented(whole):
    assert {path.name for path in whole.iterdir() if "tfevents" not in path.name} == {
        "checkpoints",
        "config.json",
        "lock",
        "metrics.jsonl",
        "tokenizer",
    }
    assert CheckpointManager(whole).steps() == [3, 6, 9, 12]
    train = [line for line in lines_of(whole) if "train/loss" in line]
    valid = [line for line in lines_of(whole) if "valid/bleu" in line]
    assert [line["step"] for line in train] == [5, 10, 12]
    assert [line["step"] for line in valid] == [6, 12]
    assert {"train/target_tokens_per_s", "train/fill", "train/learning_rate", "train/input_wait"} <= set(train[0])
    assert {"valid/loss", "valid/bleu"} <= set(valid[0])
    assert {"train/flops", "train/tokens", "train/hours"} <= set(train[0]) & set(valid[0])
    assert train[0]["train/peak_memory_mb"] > 0
    assert CheckpointManager(whole).metrics(12)["valid/bleu"] == valid[1]["valid/bleu"]


@pytest.mark.slow
def test_shapes_compiled_ahead_give_the_same_run(data, tmp_path, fresh_programs, monkeypatch, capsys):
    """As on accelerators: all shapes are known, so that no update compiles."""
    config = config_of(data, mesh={"data": 2}, train={"accumulation_steps": 2})
    fit(config, tmp_path / "lazily")
    monkeypatch.setattr(platform, "compile_threads", lambda mesh: 4)
    capsys.readouterr()
    fit(config, tmp_path / "ahead")
    stderr = capsys.readouterr().err
    assert "of batches, up to 4 at once\n" in stderr
    assert "compiling shape" not in stderr
    assert {*programs_logged(tmp_path / "ahead")} == {programs_logged(tmp_path / "lazily")[-1]}
    jax.tree.map(np.testing.assert_array_equal, final_params(tmp_path / "ahead"), final_params(tmp_path / "lazily"))


def test_nothing_recompiles_once_each_bucket_was_seen(data, tmp_path, monkeypatch):
    monkeypatch.setattr(train_step, "make_train_step", train_step.make_train_step.__wrapped__)  # shares no program
    counter = CompileCounter()

    def counted(pipeline, step):
        with counter:
            DISPATCH(pipeline, step)

    monkeypatch.setattr(trainer.StepPipeline, "dispatch", counted)
    fit(config_of(data), tmp_path)
    assert counter.count == programs_logged(tmp_path)[-1] == 2


@pytest.mark.reported
def test_the_log_is_copied_before_a_checkpoint_is_saved(data, tmp_path, monkeypatch):
    """A process that is killed in between loses no metrics of updates that a checkpoint holds."""
    events = []
    for owner, name in ((trainer.MetricWriter, "sync"), (CheckpointManager, "save_async")):
        called = getattr(owner, name)

        def noted(*args, _name=name, _called=called, **kwargs):
            events.append(_name)
            return _called(*args, **kwargs)

        monkeypatch.setattr(owner, name, noted)
    fit(config_of(data, train={"num_steps": 2, "checkpoint_every_steps": 1}), tmp_path / "run")
    assert events == ["sync", "save_async"] * 2


EMA = {"ema_decay": 0.9}


def fit_and_see_validated(config, workdir):
    """Trains; returns the params that its validations were of."""
    seen, evaluate = [], Evaluator.evaluate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Evaluator,
            "evaluate",
            lambda self, *a, **k: (seen.append(jax.device_get(a[0])), evaluate(self, *a, **k))[1],
        )
        fit(config, workdir)
    return seen


@pytest.fixture(scope="module")
def averaged(data, tmp_path_factory):
    """A run that keeps a moving average, and the params that its validations were of."""
    workdir = tmp_path_factory.mktemp("averaged") / "run"
    return workdir, fit_and_see_validated(config_of(data, train=EMA), workdir)


@pytest.mark.slow
def test_a_moving_average_is_what_is_validated_and_translated_with(whole, averaged):
    workdir, seen = averaged
    assert len(seen) == 2
    jax.tree.map(np.testing.assert_array_equal, seen[1], restore(workdir, 12))
    equal = functools.partial(np.testing.assert_allclose, atol=1e-5)  # two programs may round in different ways
    jax.tree.map(equal, restore(workdir, "average:1"), restore(whole, 12))
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), restore(workdir, 12), restore(whole, 12))
    assert max(jax.tree.leaves(moved)) > 1e-3


@pytest.mark.slow
def test_a_moving_average_resumes_exactly(data, averaged, tmp_path):
    fit(config_of(data, train={**EMA, "num_steps": 9}), tmp_path / "run")
    fit(config_of(data, train=EMA), tmp_path / "run")
    for which in (12, "average:1"):
        jax.tree.map(np.testing.assert_array_equal, restore(tmp_path / "run", which), restore(averaged[0], which))


@pytest.mark.slow
def test_schedule_free_validates_averages_and_translates_its_x_and_resumes_exactly(data, tmp_path):
    optimizer = {"name": "schedule_free_adamw", "schedule": "constant", "learning_rate": 0.01}
    seen = fit_and_see_validated(config_of(data, optimizer=optimizer), tmp_path / "whole")
    assert len(seen) == 2
    fit(config_of(data, optimizer=optimizer, train={"num_steps": 9}), tmp_path / "run")
    fit(config_of(data, optimizer=optimizer), tmp_path / "run")
    for folder, which in ((tmp_path / "whole", 12), (tmp_path / "run", 12), (tmp_path / "run", "average:1")):
        jax.tree.map(np.testing.assert_array_equal, restore(folder, which), seen[1])


@pytest.mark.slow
def test_a_moving_average_cannot_begin_or_end_halfway(data, whole, averaged):
    with pytest.raises(UserError, match=r"another config: train\.ema_decay: 0\.0 → 0\.9"):
        fit(config_of(data, train=EMA), whole)
    with pytest.raises(UserError, match=r"another config: train\.ema_decay: 0\.9 → 0\.0"):
        fit(config_of(data), averaged[0])


def test_resume_is_exact_and_the_cost_of_a_run_is_summed(data, whole, tmp_path):
    """Data order, dropout, optimizer and learning rate go on as if nothing had happened, to the last bit.

    The cost is held against the plan of the batches; a run of two sittings counts to the same, to the last digit.
    """
    from transformer.checkpoints.loading import load_checkpoint
    from transformer.data import corpus as corpora
    from transformer.data import input_pipeline
    from transformer.models import flops

    config = config_of(data)
    vocabulary = load_checkpoint(whole, "12").tokenizer
    ids = input_pipeline.token_ids(config.data, corpora.open_corpus(config.data), "train", vocabulary)
    batches = list(
        input_pipeline.train_iterator(input_pipeline.make_batch_schedule(config, ids), ids, start=0, num_steps=12)
    )
    spent = TrainingCost.from_metrics(CheckpointManager(whole).metrics(12))
    assert spent.tokens == sum(np.count_nonzero(batch.target_BT) for batch in batches)
    assert spent.source_tokens == sum(np.count_nonzero(batch.source_BS) for batch in batches)
    assert spent.flops == sum(flops.batch_flops(config.model, vocabulary.vocab_size, batch) for batch in batches)
    fit(config_of(data, train={"num_steps": 9}), tmp_path / "run")
    before = TrainingCost.from_metrics(CheckpointManager(tmp_path / "run").metrics(9))
    fit(config, tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, final_params(tmp_path / "run"), final_params(whole))
    after = TrainingCost.from_metrics(CheckpointManager(tmp_path / "run").metrics(12))
    assert after._replace(seconds=0) == spent._replace(seconds=0)
    assert after.seconds > before.seconds > 0
    assert [line["train/flops"] for line in lines_of(tmp_path / "run")][-1] == spent.flops


def fit_with_subword_dropout(data, workdir, steps, rate=0.3):
    """A run whose params do not change, so that losses depend on batches and dropout alone."""
    data = {**data, "subword_dropout": rate, "num_buckets": 1}
    train = {"num_steps": steps, "log_every_steps": 1, "eval_every_steps": 4}
    fit(config_of(data, optimizer={"learning_rate": 0.0}, train=train), workdir)
    return [[line[name] for line in lines_of(workdir) if name in line] for name in ("train/loss", "valid/loss")]


def test_a_run_with_subword_dropout_resumes_exactly_and_keeps_its_rate(data, tmp_path):
    losses, _ = fit_with_subword_dropout(data, tmp_path / "whole", 4)
    fit_with_subword_dropout(data, tmp_path / "run", 3)
    assert fit_with_subword_dropout(data, tmp_path / "run", 4)[0] == losses
    assert len(losses) == 4
    with pytest.raises(UserError, match=r"another config: data\.subword_dropout: 0\.3 → 0\.1"):
        fit_with_subword_dropout(data, tmp_path / "run", 6, rate=0.1)


@pytest.mark.slow
def test_training_sees_subword_dropout_and_validation_does_not(data, tmp_path):
    on, off = (fit_with_subword_dropout(data, tmp_path / f"{rate}", 4, rate) for rate in (0.3, 0.0))
    assert on[1] == off[1]
    assert not set(on[0]) & set(off[0])


def test_a_finished_run_is_left_alone(data, whole, capsys):
    before = files_of(whole)
    fit(config_of(data), whole)
    assert files_of(whole) == before
    assert "trained for 12 steps; raise train.num_steps" in capsys.readouterr().err


DISPATCH = trainer.StepPipeline.dispatch


def stop_at(monkeypatch, update):
    """Sends this process a SIGTERM while that update is dispatched."""
    dispatch = DISPATCH

    def interrupted(self, step):
        dispatch(self, step)
        if step == update:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(trainer.StepPipeline, "dispatch", interrupted)


def test_a_stop_signal_does_not_wait_for_validation(data, whole, tmp_path, monkeypatch, capsys):
    """Its checkpoint is saved already; the next session makes up for the scores. Nothing is translated any more."""
    held_out = Evaluator.teacher_forced_loss

    def signalled(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return held_out(*args)

    monkeypatch.setattr(Evaluator, "teacher_forced_loss", signalled)
    monkeypatch.setattr(Translator, "translate", None)
    with pytest.raises(StoppedError, match="saved step 6"):
        fit(config_of(data), tmp_path / "run")
    assert CheckpointManager(tmp_path / "run").steps() == [3, 6]
    assert "valid/bleu" not in CheckpointManager(tmp_path / "run").metrics(6)
    assert (
        "SIGTERM: stopping after this batch of the validation, which is repeated on resume" in capsys.readouterr().err
    )


def test_after_the_first_signal_any_other_ends_the_process_at_once():
    with signals.catch_stop_signals() as stop_signal:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop_signal() == signal.SIGTERM
        assert {signal.getsignal(number) for number in signals.handled_signals()} == {signal.SIG_DFL}


@pytest.mark.reported
def test_a_terminal_that_closes_is_a_stop_signal_unless_started_by_nohup():
    before = signal.signal(signal.SIGHUP, lambda *_: None)
    try:
        with signals.catch_stop_signals() as stop_signal:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop_signal() == signal.SIGHUP
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with signals.catch_stop_signals() as stop_signal:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop_signal() is None
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert signals.preempted(signal.SIGHUP, 7).exit_code == 129


@pytest.mark.reported
def test_another_host_is_logged_and_other_code_is_not_called_one(data, whole, tmp_path, monkeypatch, capsys):
    run, here = shutil.copytree(whole, tmp_path / "run"), environment.fingerprint()

    def resumed(**fingerprint):
        with monkeypatch.context() as patch:
            patch.setattr(manager.environment, "fingerprint", lambda: {**here, **fingerprint})
            fit(config_of(data, train={"num_steps": 13}), run)
        return capsys.readouterr().err

    said = resumed(jax="9.9", cores="77")
    assert "warning: other packages and another machine or other settings than before, so the last bits may " in said
    assert f"jax: {here['jax']} → 9.9; cores: {here['cores']} → 77\n" in said
    assert "than before" not in resumed(jax="9.9", cores="77")
    said = resumed(jax="9.9", cores="77", code="abc")
    assert f"warning: other code than before, so the last bits may differ: code: {here['code']} → abc\n" in said
    assert "machine" not in said


@pytest.mark.slow
def test_another_decode_config_resets_the_best_score(data, tmp_path, capsys):
    run = epath.Path(tmp_path / "run")
    fit(config_of(data, train={"num_steps": 6}), run)

    def resumed(**decode):
        context, _ = prepare(config_of(data, decode=decode), run)
        return trainer.TrainingLoop(context, lambda: None)

    assert resumed().early_stopping.best >= 0
    assert resumed(batch_rows=4).early_stopping.best >= 0  # no translation depends on it
    assert resumed(beam_size=1).early_stopping == trainer.EarlyStopping()
    assert "decode.beam_size: 2 → 1" in capsys.readouterr().err


def test_a_validation_made_up_for_with_another_config_is_recorded_as_of_that(data, tmp_path, monkeypatch):
    """As by somebody for whom it took too long; it is not repeated, nor compared with scores of the other config."""
    run, train = epath.Path(tmp_path / "run"), {"num_steps": 4, "eval_every_steps": 2}
    script_bleu(monkeypatch, 30.0, 20.0)  # a third validation would be an error
    stop_at(monkeypatch, 4)
    with pytest.raises(StoppedError, match="saved step 4"):
        fit(config_of(data, train=train), run)
    stop_at(monkeypatch, 0)
    faster = config_of(data, train=train, eval={"validation_sentences": 2})
    for _ in range(2):
        fit(faster, run)
    checkpoints = CheckpointManager(run)
    assert checkpoints.metrics(4)["valid/bleu"] == checkpoints.metrics(4)["best"] == 20
    assert loading.resolve_steps(checkpoints, "best") == [4]
    comparable = [preparation.find_resume_point(config, run).scores_comparable for config in (faster, config_of(data))]
    assert comparable == [True, False]


def test_devices_that_a_mesh_leaves_idle_are_logged(data, tmp_path, capsys):
    prepare(config_of(data, mesh={"data": 2}, train={"accumulation_steps": 40}), epath.Path(tmp_path / "run"))
    stderr = capsys.readouterr().err
    assert f"config.mesh uses 2 of {jax.device_count()} devices" in stderr
    assert "warning: mesh.data x mesh.fsdp = 2 times train.accumulation_steps = 40 must divide the rows" in stderr


def test_validation_without_pairs_is_refused(data, tmp_path):
    for path in pathlib.Path(data["dir"]).glob("train.*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
        (tmp_path / f"val{path.suffix}").write_bytes(b"")
    with pytest.raises(UserError, match="the validation split has no pairs: fill it, or leave it out"):
        fit(config_of({**data, "dir": str(tmp_path)}), tmp_path / "run")


def test_a_stop_signal_saves_the_step_it_is_at(data, whole, tmp_path, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    stop_at(monkeypatch, 4)
    with pytest.raises(StoppedError, match="saved step 4") as stopped:
        fit(config_of(data), tmp_path / "run")
    assert stopped.value.exit_code == 143
    assert signal.getsignal(signal.SIGTERM) is before
    assert CheckpointManager(tmp_path / "run").steps() == [3, 4]
    monkeypatch.undo()
    fit(config_of(data), tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, final_params(tmp_path / "run"), final_params(whole))


@pytest.mark.parametrize(
    ("what", "keep_last"),
    [
        ("loss", 1),
        *(pytest.param(*other, marks=pytest.mark.slow) for other in (("loss", 20), ("params", 1))),
        ("params", 20),
    ],
)
def test_a_run_that_diverges_keeps_its_last_good_checkpoint(data, whole, tmp_path, monkeypatch, what, keep_last):
    """From update 8 on the loss, or the params that a good loss left behind, are no numbers."""
    make = train_step.make_train_step

    def failing(*args):
        update = make(*args)

        def run(state, batch):
            state, metrics = update(state, batch)
            if int(jax.device_get(state.step)) < 8:
                return state, metrics
            if what == "loss":
                bad = jax.device_put(np.float32(np.nan))
                return state, metrics._replace(loss=metrics.loss._replace(objective=bad))
            return state._replace(params=jax.tree.map(jax.jit(lambda leaf: leaf / 0.0), state.params)), metrics

        return FakeUpdate(run)

    monkeypatch.setattr(train_step, "make_train_step", failing)
    with pytest.raises(DivergedError, match="the run diverged") as diverged:
        fit(config_of(data, train={"keep_last": keep_last}), tmp_path / "run")
    assert diverged.value.exit_code == 3
    assert CheckpointManager(tmp_path / "run").latest_valid_step() == 6
    monkeypatch.setattr(train_step, "make_train_step", make)
    fit(config_of(data), tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, final_params(tmp_path / "run"), final_params(whole))


def test_a_validation_loss_that_is_no_number_makes_no_checkpoint(data, tmp_path, monkeypatch):
    held_out = Evaluator.teacher_forced_loss
    losses = iter([None, CrossEntropy(np.nan, 1, 1)])
    monkeypatch.setattr(Evaluator, "teacher_forced_loss", lambda *args: next(losses) or held_out(*args))
    with pytest.raises(DivergedError, match="the validation loss is nan"):
        fit(config_of(data), tmp_path / "run")
    assert CheckpointManager(tmp_path / "run").latest_valid_step() == 9


def test_a_validation_that_a_stop_prevented_is_made_up_for(data, whole, tmp_path, monkeypatch):
    """Else an interrupted run could choose another best checkpoint than an undisturbed one."""
    for at in (6, 12):
        stop_at(monkeypatch, at)
        with pytest.raises(StoppedError, match=f"saved step {at}"):
            fit(config_of(data), tmp_path / "run")
        monkeypatch.undo()
        assert "valid/bleu" not in CheckpointManager(tmp_path / "run").metrics(at)
    fit(config_of(data), tmp_path / "run")
    for at in (6, 12):
        resumed, undisturbed = (CheckpointManager(workdir).metrics(at) for workdir in (tmp_path / "run", whole))
        assert undisturbed.pop("train/hours") > 0 < resumed.pop("train/hours")
        assert resumed == undisturbed


def test_a_workdir_of_another_config_is_refused_and_unharmed(data, whole):
    before = files_of(whole)
    with pytest.raises(UserError, match=r"another config: model\.norm: 'post' → 'pre'"):
        fit(config_of(data, model={"norm": "pre"}), whole)
    assert files_of(whole) == before


def test_a_lost_or_another_vocabulary_is_refused(data, whole, tmp_path):
    run = shutil.copytree(whole, tmp_path / "run")
    (run / "tokenizer" / "sentencepiece.model").unlink()
    with pytest.raises(UserError, match=r"missing or not the one .* got missing"):
        fit(config_of(data), run)
    tokenizer.train(["a b c"] * 9, 264, "unigram").save(run / "tokenizer")
    with pytest.raises(UserError, match="missing or not the one"):
        fit(config_of(data), run)


def test_a_damaged_checkpoint_falls_back_to_the_previous_one(data, whole, tmp_path, capsys):
    run = shutil.copytree(whole, tmp_path / "run")
    path = run / "checkpoints" / "12" / "params" / "_CHECKPOINT_METADATA"
    path.write_bytes(path.read_bytes() + b" ")
    fit(config_of(data), run)
    assert "checkpoint 12 is damaged" in (said := capsys.readouterr().err)
    assert "resuming after step 9" in said
    jax.tree.map(np.testing.assert_array_equal, final_params(run), final_params(whole))


def script_bleu(monkeypatch, *scores):
    """Validations have these scores, one after another; only the first translates."""
    left, evaluate, reports = iter(scores), Evaluator.evaluate, []

    def scored(*args, **options):
        if not reports:
            reports.append(evaluate(*args, **options))
        return dataclasses.replace(reports[0], scores={**reports[0].scores, "bleu": next(left)})

    monkeypatch.setattr(Evaluator, "evaluate", scored)


def test_a_run_ends_early_when_validation_gets_no_better(data, tmp_path, monkeypatch, capsys):
    """BLEU by validation: 10, 30, 20, 30, …; the third without a better one than 30 is the fifth of all."""
    script_bleu(monkeypatch, 10.0, 30.0, 20.0, 30.0, 25.0, 99.0)
    train = {"num_steps": 12, "eval_every_steps": 2, "early_stopping_patience": 3}
    stop_at(monkeypatch, 7)  # the count survives an interruption
    with pytest.raises(StoppedError):
        fit(config_of(data, train=train), tmp_path / "run")
    stop_at(monkeypatch, 0)
    fit(config_of(data, train=train), tmp_path / "run")
    assert CheckpointManager(tmp_path / "run").steps()[-1] == 10
    assert loading.resolve_steps(CheckpointManager(tmp_path / "run"), "best") == [8]
    fit(config_of(data, train=train), tmp_path / "run")
    assert CheckpointManager(tmp_path / "run").steps()[-1] == 10
    assert capsys.readouterr().err.count("3 validations without a better BLEU than 30.00") == 2


def test_a_run_that_ends_early_at_a_validation_made_up_for_makes_no_update(data, tmp_path, monkeypatch):
    script_bleu(monkeypatch, 30.0, 20.0)
    train = {"num_steps": 12, "eval_every_steps": 2, "checkpoint_every_steps": 1, "early_stopping_patience": 1}
    stop_at(monkeypatch, 4)  # before it validates
    with pytest.raises(StoppedError):
        fit(config_of(data, train=train), tmp_path / "run")
    stop_at(monkeypatch, 0)
    fit(config_of(data, train=train), tmp_path / "run")
    assert CheckpointManager(tmp_path / "run").steps()[-1] == 4


def test_a_failed_start_does_not_bind_the_workdir(data, tmp_path):
    with pytest.raises(UserError, match="vocab_size = 30000: cannot train"):
        fit(config_of({**data, "vocab_size": 30000}), tmp_path / "run")
    fit(config_of({**data, "vocab_size": 285}, train={"num_steps": 3}), tmp_path / "run")
    with pytest.raises(UserError, match="vocab_size: 285 → 290"):
        fit(config_of({**data, "vocab_size": 290}), tmp_path / "run")


def test_other_training_data_is_refused_and_the_same_data_elsewhere_is_not(data, whole, tmp_path):
    run, moved = shutil.copytree(whole, tmp_path / "run"), tmp_path / "moved"
    shutil.copytree(data["dir"], moved, ignore=shutil.ignore_patterns("prepared"))
    elsewhere = {**data, "dir": str(moved)}
    fit(config_of(elsewhere, train={"num_steps": 13}), run)
    for name, kind in (("val", "validation"), ("train", "training")):  # another best BLEU, another order
        before = (moved / f"{name}.en").read_text()
        (moved / f"{name}.en").write_text("\n".join(before.splitlines()[::-1]) + "\n")
        with pytest.raises(UserError, match=f"the {kind} data has changed since step 13: its digest was"):
            fit(config_of(elsewhere), run)
        (moved / f"{name}.en").write_text(before)


def test_without_a_valid_checkpoint_training_refuses_to_restart(data, whole, tmp_path):
    run = shutil.copytree(whole, tmp_path / "run")
    for path in run.glob("checkpoints/*/config.json"):
        path.write_text("{}")
    with pytest.raises(WorkdirError, match="is valid"):
        fit(config_of(data), run)


@pytest.mark.slow
def test_the_size_of_a_batch_changes_the_run(data, whole, tmp_path):
    fit(config_of(data, train={"num_steps": 3, "batch_tokens": 128}), tmp_path / "run")
    changed = jax.tree.leaves(restore(tmp_path / "run", 3))
    assert not all(np.array_equal(a, b) for a, b in zip(changed, jax.tree.leaves(restore(whole, 3)), strict=True))


@pytest.mark.slow
def test_eight_devices_train_the_same_model(data, whole, tmp_path):
    """From the same seed, the loss after 12 updates on 8 devices is that on one; validation runs on them too."""
    fit(config_of(data, mesh={"fsdp": 4, "sequence": 2}), tmp_path / "run")
    ours, theirs = (
        [line["train/loss"] for line in lines_of(w) if "train/loss" in line] for w in (tmp_path / "run", whole)
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)


def test_a_second_trainer_gets_an_error_that_names_the_holder_of_the_workdir(data, tmp_path):
    from etils import epath

    with (
        workdir_lib.acquire_lock(epath.Path(tmp_path / "run")),
        pytest.raises(WorkdirError, match="held by process"),
    ):
        fit(config_of(data), tmp_path / "run")


def test_a_fixed_sample_is_spread_over_all_lines():
    lines = [str(i) for i in range(10)]
    assert trainer.fixed_sample(lines, 4) == ["0", "2", "5", "7"]
    assert trainer.fixed_sample(lines, 0) == trainer.fixed_sample(lines, 10) == trainer.fixed_sample(lines, 99) == lines


def test_validation_is_of_the_sample_and_its_search(data, tmp_path, monkeypatch, capsys):
    """And its share of the time is in the log."""
    evaluated, evaluate = [], Evaluator.evaluate

    def noted(self, params, sources, *args, **kwargs):
        evaluated.append(sources)
        assert self._config.decode.beam_size == 1
        return evaluate(self, params, sources, *args, **kwargs)

    monkeypatch.setattr(Evaluator, "evaluate", noted)
    config = config_of(
        data,
        train={"num_steps": 6, "log_every_steps": 3, "eval_every_steps": 3},
        eval={"validation_sentences": 2, "validation_beam_size": 1},
        decode={"beam_size": 3},
    )
    fit(config, tmp_path)
    *_, first, last = (line for line in lines_of(tmp_path) if "train/validation_share" in line)
    assert first["train/validation_share"] == 0 < last["train/validation_share"] < 1
    shown = capsys.readouterr().err
    assert re.search(r"^step 6/6 · loss .* · [0-9]+% of the time validation", shown, re.MULTILINE)
    definition = manager.score_definition(CheckpointManager(tmp_path).config(6))
    assert (definition.search.beam_size, definition.num_sentences) == (1, 2)
    assert definition != manager.score_definition(config_of(data))
    assert len(evaluated) == 2 == len(evaluated[0])


def test_validation_of_wmt_takes_few_decode_steps():
    """By the lengths of 3,000 sentences of news, if no translation ended before its limit."""
    config = validation.validate(wmt14.get_config("en_de_base"))
    lengths = np.clip(np.random.default_rng(0).lognormal(3.2, 0.55, 3000), 2, 150).astype(int)
    sampled = np.array(trainer.fixed_sample(lengths.tolist(), config.eval.validation_sentences))
    batches = eval_batches(sampled, np.zeros_like(sampled), lambda width: platform.DECODE_ROWS)
    longest = [sampled[batch.examples_B[batch.examples_B != PAD_EXAMPLE]].max() for batch in batches]
    assert sum(longest) + len(longest) * config.decode.max_extra_length <= 1000
    assert best_metric.validation_decode(config).beam_size == 1
