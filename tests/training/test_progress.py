"""What a person sees during training: a sign of life every ten seconds, the first loss, and a translation."""

import itertools
import re

import pytest

from tests.helpers.clock import FakeClock
from tests.helpers.updates import FakeUpdate
from tests.training.test_trainer import config_of, data  # noqa: F401 (a fixture)
from transformer.checkpoints.manager import CheckpointManager
from transformer.data import input_pipeline, local_text, shards
from transformer.data import tokenizer as tokenizers
from transformer.decoding.translator import Translator
from transformer.distributed import mesh
from transformer.evaluation import evaluator
from transformer.runtime.background import BackgroundQueue
from transformer.training import initialization, train_step
from transformer.training.session import train

CALL_S = 25.0  # that each long call takes


def slow(monkeypatch, clock, owner, *names, seconds=CALL_S):
    """Lets time pass before each call."""
    for name in names:
        called = getattr(owner, name)

        def late(*args, _called=called, **kwargs):
            clock.sleep(seconds)
            return _called(*args, **kwargs)

        monkeypatch.setattr(owner, name, late)


def slow_result(monkeypatch, clock, owner, name):
    """Lets time pass before each call of the function that a call returns."""
    make = getattr(owner, name)

    def make_late(*args):
        made = make(*args)

        def late(*arguments):
            clock.sleep(CALL_S)
            return made(*arguments)

        return FakeUpdate(late, on_compile=lambda: clock.sleep(CALL_S))

    monkeypatch.setattr(owner, name, make_late)


@pytest.fixture
def clock(monkeypatch):
    """A clock by which all that may be slow is."""
    clock = FakeClock(monkeypatch)
    for owner, name in (
        (local_text.SplitFiles, "digest"),
        (tokenizers, "build"),
        (input_pipeline, "BucketedSchedule"),
        (mesh, "make_mesh"),
        (initialization, "initial_state"),
        (CheckpointManager, "verify"),
        (BackgroundQueue, "wait"),
        (CheckpointManager, "restore"),
        (Translator, "_submit"),
        (evaluator, "score"),
    ):
        slow(monkeypatch, clock, owner, name)
    monkeypatch.setattr(BackgroundQueue, "is_idle", False)
    slow(monkeypatch, clock, shards, "hash64", seconds=0.3)
    slow_result(monkeypatch, clock, train_step, "make_train_step")
    slow_result(monkeypatch, clock, evaluator, "make_eval_step")
    return clock


@pytest.mark.reported
def test_no_phase_passes_without_a_sign_of_life(data, clock, tmp_path, capsys):  # noqa: F811
    own = {**data, "data_dir": str(tmp_path / "prepared")}
    settings = {"eval_every_steps": 4, "checkpoint_every_steps": 4, "log_every_steps": 4}
    begin = clock.now
    train(config_of(own, train={"num_steps": 4, **settings}), tmp_path / "run")
    train(config_of(own, train={"num_steps": 8, **settings}), tmp_path / "run")
    shown = capsys.readouterr().err
    messages = [(begin, ""), *clock.messages, (clock.now, "")]
    silences = [(later[0] - earlier[0], earlier[1], later[1]) for earlier, later in itertools.pairwise(messages)]
    assert max(silences)[0] <= 10, max(silences)
    assert clock.now - begin > 40 * CALL_S
    for phase in (
        "data: hashing the text files",
        "data: preparing",
        "training a bpe vocabulary of 285 subword tokens",
        "scheduling batches",
        "starting the devices",
        "initializing the params",
        "verifying the newest checkpoint",
        "restoring step 4",
        "compiling shape 1 of 2",
        "training",
        "saving",
        "loss of references",
        "translating",
        "computing scores",
    ):
        assert re.search(rf"^{phase}: .*0:0[0-9]:[0-9]{{2}} elapsed", shown, re.MULTILINE), (phase, shown)


@pytest.mark.reported
def test_the_first_loss_compilation_and_a_translation_are_logged(data, tmp_path, capsys):  # noqa: F811
    train(config_of(data, train={"num_steps": 6, "log_every_steps": 3, "eval_every_steps": 6}), tmp_path / "run")
    shown = capsys.readouterr().err
    assert re.search(r"^compiling shape 1 of 2\nstep 1/6 · loss [0-9.]+( · 0:0[0-9]:[0-9]{2} left)?$", shown, re.M)
    assert re.search(r"^compiling shape 2 of 2$", shown, re.M)
    assert re.search(r"^step 3/6 · loss [0-9.]+ · [0-9,]+ tokens/s · ", shown, re.M)
    middle = [(tmp_path / data["dir"] / f"val.{language}").read_text().splitlines()[4] for language in ("en", "de")]
    source, reference = map(re.escape, middle)
    assert re.search(rf"BLEU .*\n  source      {source}\n  reference   {reference}\n  translation .*\n", shown)
