"""The small world in which faults happen: data, a config, runs in processes of their own, and what they left."""

import contextlib
import io
import json
import multiprocessing
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import jax
import numpy as np

from tests.conftest import ROOT, small_config
from tests.faults import child
from transformer.checkpoints import loading
from transformer.checkpoints.manager import CheckpointManager
from transformer.distributed import mesh
from transformer.models import registry
from transformer.training import train_step

STEPS, SAVE, EVALUATE = 60, 5, 25
WORDS = ["red", "green", "blue", "old", "new", "house", "tree", "cat", "dog", "sees", "big", "small"]
SECONDS = 900  # after which a child hangs


class World:
    """One folder with everything in it.

    Attributes:
      data: fields of `config.data` for sentence pairs, all different, whose target is the source backwards.
    """

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.folder.mkdir(parents=True, exist_ok=True)
        write_pairs(folder / "data")
        self.data = data_fields(folder / "data", folder / "prepared")
        self._wholes: dict[int, Whole] = {}
        self._talker: pathlib.Path | None = None
        self._runs = 0
        self._processes = multiprocessing.get_context("forkserver")
        self._processes.set_forkserver_preload(["tests.faults.child"])

    def config(self, **sections):
        """A config of this world."""
        train = {"num_steps": STEPS, "checkpoint_every_steps": SAVE, "eval_every_steps": EVALUATE, "keep_last": 100}
        fields = {"data": {**self.data, **sections.pop("data", {})}, "train": {**train, **sections.pop("train", {})}}
        model = {"num_layers": 1, "dropout_rate": 0.2, **sections.pop("model", {})}
        return small_config(model=model, **fields, **sections)

    def new_folder(self) -> pathlib.Path:
        """A name that nothing has yet."""
        self._runs += 1
        return self.folder / f"run{self._runs}"

    def copy(self, workdir: pathlib.Path) -> pathlib.Path:
        """A workdir to do harm to."""
        return pathlib.Path(shutil.copytree(workdir, self.new_folder()))

    def train(self, workdir: pathlib.Path, plant: str = "", **sections) -> "Child":
        """Starts train.py in a process of its own; `plant` names what is to happen in it."""
        workdir.parent.mkdir(parents=True, exist_ok=True)
        file = self.new_folder().with_suffix(".py")
        file.write_text(f"def get_config():\n    return {json.loads(self.config(**sections).to_json())!r}\n")
        argv = ["train.py", f"--config={file}", f"--workdir={workdir}"]
        return Child(self._processes, argv, workdir, file.with_suffix(".log"), plant)

    def trained(self, workdir: pathlib.Path, plant: str = "", **sections) -> "Child":
        """The same, ended."""
        process = self.train(workdir, plant, **sections)
        process.wait()
        return process

    def read(self, workdirs: list[pathlib.Path]) -> str:
        """Reads the newest checkpoint of each in another process; a line for each says what came of it."""
        log = self.new_folder()
        with child_environment():
            process = self._processes.Process(target=child.read_each, args=([str(path) for path in workdirs], str(log)))
            process.start()
        process.join(SECONDS)
        assert process.exitcode == 0, log.read_text()
        return log.read_text()

    def whole(self, seed: int = 0) -> "Whole":
        """A run that nothing disturbed."""
        if seed not in self._wholes:
            workdir = self.new_folder()
            done = self.trained(workdir, train={"seed": seed})
            assert done.code == 0, done.stderr()
            self._wholes[seed] = Whole(workdir, done.trace())
        return self._wholes[seed]

    def talker(self) -> pathlib.Path:
        """A workdir whose model says a lot: params as they are drawn rarely come to the end of a sentence."""
        if self._talker is None:
            run = loading.load_checkpoint(self.whole().workdir, "latest")
            state = train_step.init_state(run.model, run.config, run.mesh)
            louder = jax.tree.map(lambda leaf: 2 * leaf, state.params)
            self._talker = self.new_folder()
            CheckpointManager(self._talker).save(state._replace(params=louder), run.config, run.tokenizer, {}, {})
        return self._talker

    def three_checkpoints(self) -> pathlib.Path:
        """A copy of the undisturbed run as it was after its checkpoints of steps 5, 10 and 15."""
        run = self.copy(self.whole().workdir)
        for done in CheckpointManager(run).steps():
            if done > 15:
                shutil.rmtree(run / "checkpoints" / str(done))
        return run

    def state(self, workdir: pathlib.Path, done: int | None = None) -> list[np.ndarray]:
        """All arrays of a checkpoint, the newest at first: step, params, moments."""
        checkpoints = CheckpointManager(workdir)
        done = checkpoints.latest_valid_step() if done is None else done
        assert done is not None, "there is no checkpoint"
        config = checkpoints.config(done)
        model = registry.ModelDef(config.model, checkpoints.tokenizer(done).vocab_size)
        state = checkpoints.restore(done, train_step.abstract_state(model, config, mesh.make_mesh(config.mesh)))
        return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]

    def assert_as_whole(self, workdir: pathlib.Path, done: int = STEPS, seed: int = 0) -> None:
        """The state after `done` updates is that of the undisturbed run, to the last bit."""
        ours, whole = self.state(workdir, done), self.state(self.whole(seed).workdir, done)
        assert all(np.array_equal(a, b) for a, b in zip(ours, whole, strict=True)), f"another state at step {done}"
        if done == STEPS:
            best, wanted = (
                CheckpointManager(path).metrics(done)["best"] for path in (workdir, self.whole(seed).workdir)
            )
            assert best == wanted, f"best BLEU {best}, expected {wanted}"


class Whole:
    """An undisturbed run, and the example ids of each of its steps."""

    def __init__(self, workdir: pathlib.Path, trace: dict[int, list[str]]):
        self.workdir = workdir
        self.ids = {done: seen[0] for done, seen in trace.items()}
        assert list(self.ids) == list(range(1, STEPS + 1))
        assert len(set(self.ids.values())) > STEPS // 2, "the order is not shuffled"


class Child:
    """A train.py under way."""

    def __init__(self, processes, argv: list[str], workdir: pathlib.Path, log: pathlib.Path, plant: str):
        self._log, self._trace = log, log.with_suffix(".trace")
        self._trace.touch()
        places = str(self._log), str(self._trace)
        self._process = processes.Process(target=child.main, args=(argv, *places, plant), daemon=True)
        with child_environment():
            self._process.start()
        self.pid, self.workdir = self._process.pid, workdir

    @property
    def code(self) -> int | None:
        """The exit code; minus a signal's number where that ended it, None while it runs."""
        return self._process.exitcode

    def wait(self, seconds: float = SECONDS) -> int:
        """Until it has ended; its exit code."""
        self._process.join(seconds)
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join()
            raise AssertionError(f"still running after {seconds} s: {self.stderr()}")
        return self._process.exitcode

    def wait_for(self, sign: Callable[[str], bool]) -> str:
        """Until its trace shows the sign; a line a step, and a line with an exclamation mark for what was planted."""
        end = time.monotonic() + SECONDS
        while not sign(trace := self._trace.read_text()):
            assert self._process.is_alive(), f"ended with {self.code} before: {self.stderr()}"
            assert time.monotonic() < end, f"hangs: {self.stderr()}"
            time.sleep(0.002)
        return trace

    def at(self, mark: str) -> "Child":
        """Until it is where the plant puts this mark."""
        self.wait_for(lambda trace: f"!{mark}\n" in trace)
        return self

    def seconds_to_end(self) -> float:
        """Waits for the end of one that sends itself a signal; the seconds from that on."""
        self.wait()
        ended = time.monotonic()
        marks = [line for line in self._trace.read_text().splitlines() if line.startswith("!signalled")]
        assert len(marks) == 1, f"it sent {len(marks)} signals: {self.stderr()}"
        return ended - float(marks[0].split()[1])

    def signal(self, number: int) -> float:
        """Sends a signal and waits for the end; the seconds it took."""
        begun = time.monotonic()
        os.kill(self.pid, number)
        self.wait()
        return time.monotonic() - begun

    def trace(self) -> dict[int, list[str]]:
        """Step → the example ids that it took, once for each time."""
        steps: dict[int, list[str]] = {}
        for line in self._trace.read_text().splitlines():
            if not line.startswith("!"):
                done, _, ids = line.partition(" ")
                steps.setdefault(int(done), []).append(ids)
        return steps

    def stderr(self) -> str:
        """Its stderr."""
        return self._log.read_text() if self._log.exists() else ""


@contextlib.contextmanager
def child_environment():
    """One device, as most people have; the rest as in the tests."""
    before = os.environ.pop("XLA_FLAGS", None)
    path = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(ROOT)
    os.environ["PYTHONWARNINGS"] = "ignore::UserWarning:multiprocessing.resource_tracker"  # what SIGKILL leaves
    try:
        yield
    finally:
        del os.environ["PYTHONPATH"], os.environ["PYTHONWARNINGS"]
        os.environ.update({k: v for k, v in (("XLA_FLAGS", before), ("PYTHONPATH", path)) if v is not None})


class Command:
    """A command as people type it, ended."""

    def __init__(self, *command, stdin: bytes = b""):
        begun, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
        with child_environment():
            done = subprocess.run(
                [sys.executable, *map(str, command)], input=stdin, capture_output=True, cwd=ROOT, timeout=SECONDS
            )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        self.code, self.stdout, self.stderr = done.returncode, done.stdout, done.stderr.decode()
        self.seconds = time.monotonic() - begun
        self.cpu_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    def expect(self, code: int, *words: str) -> "Command":
        """Asserts the exit code and what was said, without a traceback."""
        assert self.code == code, f"exit code {self.code}, expected {code}: {self.stderr[-500:]}"
        missing = [word for word in words if word not in self.stderr]
        assert not missing, f"expected {missing[0]!r} in: {self.stderr[-500:]}"
        assert "Traceback" not in self.stderr, self.stderr[-500:]
        return self


class Heard(io.StringIO):
    """What is said on stderr meanwhile."""

    def __enter__(self):
        self._redirect = contextlib.redirect_stderr(self)
        self._redirect.__enter__()
        return self

    def __exit__(self, *details):
        self._redirect.__exit__(*details)


def write_pairs(folder: pathlib.Path, train: int = 150) -> None:
    """Different sentences as train, val and test.

    Those of val are about as long as each other: a validation compiles a program for each width.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    lines: dict[str, None] = {}
    while len(lines) < train + 16:
        fewest, most = (4, 5) if len(lines) < 8 else (2, 6)
        lines[" ".join(rng.choice(WORDS, rng.integers(fewest, most + 1)))] = None
    everything = list(lines)
    for split, part in (("train", everything[16:]), ("val", everything[:8]), ("test", everything[8:16])):
        (folder / f"{split}.en").write_text("".join(f"{line}\n" for line in part))
        (folder / f"{split}.de").write_text("".join(f"{line[::-1]}\n" for line in part))


def data_fields(folder: pathlib.Path, prepared: pathlib.Path) -> dict:
    """The fields of config.data for such a folder."""
    return {"name": "text", "dir": str(folder), "data_dir": str(prepared), "vocab_size": 285, "num_buckets": 1}


def files_of(folder: pathlib.Path) -> list[pathlib.Path]:
    """All files below a folder, in order."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


KILLED = -signal.SIGKILL
