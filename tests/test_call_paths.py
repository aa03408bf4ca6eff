"""The way from train.py to the jitted step, and from a line of text to its translation, by a trace of calls."""

import pathlib
import sys
import threading

import pytest

import train
from tests.conftest import ROOT
from tests.training.test_trainer import config_of, data  # noqa: F401 (a fixture)
from transformer import inference

TRAINING = ["train.py", *(f"transformer/training/{name}.py" for name in ("session", "trainer", "train_step"))]
TRANSLATING = [f"transformer/{name}.py" for name in ("inference", "decoding/translator", "decoding/decode")]
TRANSLATING += ["transformer/decoding/beam_search.py"]


class CallTrace:
    """The project's files on the stack, in the order of calls, whenever a function of this name is called."""

    def __init__(self, name: str):
        self.name, self.stacks = name, []

    def __call__(self, frame, event, _):
        if event == "call" and frame.f_code.co_name == self.name:
            files = []
            stacks = [frame]
            if threading.current_thread() is not threading.main_thread():  # which waits for it
                stacks.append(sys._current_frames()[threading.main_thread().ident])
            for frame in stacks:
                while frame:
                    files.append(pathlib.Path(frame.f_code.co_filename))
                    frame = frame.f_back
            own = [str(path.relative_to(ROOT)) for path in reversed(files) if path.is_relative_to(ROOT)]
            self.stacks.append(list(dict.fromkeys(path for path in own if not path.startswith((".venv", "tests/")))))

    def __enter__(self):
        threading.setprofile(self)
        sys.setprofile(self)
        return self

    def __exit__(self, *_):
        sys.setprofile(None)
        threading.setprofile(None)


@pytest.fixture(scope="module")
def workdir(data, tmp_path_factory):  # noqa: F811
    return tmp_path_factory.mktemp("runs") / "run"


@pytest.mark.slow
def test_training_step_and_translation_are_four_files_away(data, workdir, fresh_programs):  # noqa: F811
    config = config_of(data, train={"num_steps": 1, "eval_every_steps": 1, "checkpoint_every_steps": 1})
    (workdir.parent / "config.json").write_text(config.to_json())
    with CallTrace("train_step") as step:
        train.main(["train.py", f"--config={workdir.parent}/config.json", f"--workdir={workdir}"])
    assert TRAINING in step.stacks
    model = inference.load(workdir)
    with CallTrace("beam_search") as search:
        model.translate(["a b"])
    assert TRANSLATING in search.stacks
    contributing = " ".join((ROOT / "CONTRIBUTING.md").read_text().split())
    for files in (TRAINING, TRANSLATING):
        assert len(files) <= 4
        assert " → ".join(f"`{file}`" for file in files) in contributing
