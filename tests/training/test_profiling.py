"""train.profile_steps: which updates are traced, and where TensorBoard and Perfetto find the trace."""

import gzip
import json

import pytest
from etils import epath

from tests.training.test_trainer import config_of, data, stop_at  # noqa: F401 (a fixture)
from transformer import command_line
from transformer.config import schema
from transformer.distributed import multihost
from transformer.runtime.errors import StoppedError, UserError
from transformer.training import profiling
from transformer.training.session import train


class Traces:
    """Stands in for jax.profiler: the calls in order, and the updates in between."""

    def __init__(self, monkeypatch):
        self.calls = []
        monkeypatch.setattr(profiling.jax.profiler, "start_trace", lambda folder, **_: self.calls.append("start"))
        monkeypatch.setattr(profiling.jax.profiler, "stop_trace", lambda: self.calls.append("stop"))

    def run(self, steps, updates):
        with profiling.StepProfiler(epath.Path("run"), schema.parse_steps(steps)) as profiler:
            for step in updates:
                profiler.start(step)
                self.calls.append(step)
                if profiler.ends_with(step):
                    profiler.stop()
        return self.calls


@pytest.mark.parametrize(
    ("steps", "updates", "calls"),
    [
        ("", range(1, 4), [1, 2, 3]),
        ("2:3", range(1, 5), [1, "start", 2, 3, "stop", 4]),
        ("1:1", range(1, 3), ["start", 1, "stop", 2]),
        ("2:9", range(1, 4), [1, "start", 2, 3, "stop"]),
        ("2:4", range(3, 6), ["start", 3, 4, "stop", 5]),  # resumed within
        ("2:4", range(5, 7), [5, 6]),  # resumed after
    ],
)
def test_the_updates_are_traced_as_far_as_the_session_does_them(monkeypatch, steps, updates, calls):
    assert Traces(monkeypatch).run(steps, updates) == calls


def test_only_the_primary_process_traces(monkeypatch):
    monkeypatch.setattr(multihost, "is_primary", lambda: False)
    assert Traces(monkeypatch).run("1:2", range(1, 3)) == [1, 2]


@pytest.mark.slow
def test_a_run_writes_what_tensorboard_and_perfetto_open_and_may_be_resumed_without(data, tmp_path, capsys):  # noqa: F811
    settings = {"num_steps": 4, "eval_every_steps": 99, "checkpoint_every_steps": 2}
    train(config_of(data, train={**settings, "num_steps": 2, "profile_steps": "2:2"}), tmp_path / "run")
    (folder,) = (tmp_path / "run" / "plugins" / "profile").iterdir()
    assert {path.name.split(".", 1)[1] for path in folder.iterdir()} >= {"xplane.pb", "trace.json.gz", "json.gz"}
    events = json.loads(gzip.decompress((folder / "perfetto_trace.json.gz").read_bytes()))["traceEvents"]
    assert any("train_step" in event.get("name", "") for event in events)
    shown = capsys.readouterr().err
    assert "profiling steps 2 to 2\n" in shown
    assert f"tensorboard --logdir={tmp_path / 'run'} shows it\n" in shown
    train(config_of(data, train=settings), tmp_path / "run")
    assert len(list(folder.parent.iterdir())) == 1
    assert "changed since the last session: train.num_steps: 2 → 4; train.profile_steps: '2:2' → ''" in (
        capsys.readouterr().err
    )


def test_a_run_that_is_stopped_writes_what_it_has(data, tmp_path, monkeypatch):  # noqa: F811
    stop_at(monkeypatch, 3)
    traces = Traces(monkeypatch)
    with pytest.raises(StoppedError):
        train(config_of(data, train={"profile_steps": "2:9"}), tmp_path / "run")
    assert traces.calls == ["start", "stop"]


@pytest.mark.parametrize("steps", ["5", "0:3", "4:3", "a:b", "1:2:3", "-1:2", " 1:2", "1:", "1.5:2"])
def test_invalid_steps_are_refused(steps):
    flags = ["train.py", "--config=configs/demo.py", f"--config.train.profile_steps={steps}"]
    with pytest.raises(UserError, match=r"profile_steps: expected two steps A:B with 1 ≤ A ≤ B, .* got "):
        command_line.config_flags(flags)


def test_steps_after_the_end_are_refused():
    flags = ["train.py", "--config=configs/demo.py", "--config.train.num_steps=500"]
    assert command_line.config_flags([*flags, "--config.train.profile_steps=500:510"])
    with pytest.raises(UserError, match=r"profile_steps = 501:510: the run ends at train\.num_steps = 500"):
        command_line.config_flags([*flags, "--config.train.profile_steps=501:510"])
