"""What runs in a process that is to be killed: train.py itself, the examples of each step noted down, and plants.

A plant makes something happen at a place in the program: a SIGKILL, or a mark and a pause so that the parent
can send a signal just there. Production code knows nothing of any of it.
"""

import functools
import os
import signal
import sys
import threading
import time
import types
import warnings
from collections.abc import Callable

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import jax
    from etils import epath

    import train
    from transformer import command_line
    from transformer.checkpoints import manager
    from transformer.checkpoints.manager import CheckpointManager
    from transformer.data import input_pipeline
    from transformer.data.batching import Batch
    from transformer.evaluation import evaluator
    from transformer.runtime import environment, files
    from transformer.training import trainer

# The server that forks children has imported JAX and never used it, so that a fork is safe.
warnings.filterwarnings("ignore", message=".*os.fork.*", category=RuntimeWarning)

AT = 10  # the step whose save a plant disturbs


def main(argv: list[str], log: str, trace: str, plant: str) -> None:
    """train.py with these arguments; stdout and stderr go to `log`, the trace to `trace`."""
    for number in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.argv = argv
    note_examples(os.open(trace, os.O_WRONLY | os.O_APPEND))
    cache_everything()
    if plant.startswith("signal"):
        signal_at(*plant.split()[1:])
    elif plant:
        PLANTS[plant]()
    command_line.run(train.main)


def read_each(workdirs: list[str], log: str) -> None:
    """What eval.py and translate do first, for each workdir; stdout and stderr go to `log`."""
    from transformer.checkpoints import loading

    for number in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    for workdir in workdirs:
        try:
            restored = loading.load_checkpoint(workdir, "latest")
            print(f"{workdir}: read step {restored.step}", flush=True)
        except Exception as error:  # whatever the libraries make of such files
            print(f"{workdir}: {type(error).__name__}", flush=True)


_trace = -1
_alarm: tuple[int, Callable[[], None]] | None = None


class Named(Batch):
    """A batch that knows its examples."""

    examples = ""


def note_examples(trace: int) -> None:
    """Notes step and example ids of each batch as the loop takes it."""
    global _trace
    _trace = trace
    make_batch, begin = input_pipeline.make_batch, trainer.StepPipeline.__init__

    def named(planned, *ids):
        batch = Named(*make_batch(planned, *ids))
        batch.examples = ",".join(map(str, planned.examples_B.ravel()))
        return batch

    def noted(done, batches):
        global _alarm
        for batch in batches:
            done += 1
            os.write(trace, f"{done} {batch.examples}\n".encode())
            if _alarm and done >= _alarm[0]:
                _alarm[1]()
                _alarm = None
            yield Batch(*batch)

    def begin_noted(self, train_step, state, batches, *rest, **options):
        begin(self, train_step, state, noted(int(jax.device_get(state.step)), batches), *rest, **options)

    input_pipeline.make_batch, trainer.StepPipeline.__init__ = named, begin_noted


def cache_everything() -> None:
    """Keeps the smallest programs too, as each restart would compile them again."""
    enable = environment.enable_compilation_cache

    def enabled():
        folder = enable()
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        return folder

    environment.enable_compilation_cache = enabled


def signal_at(number: str, step: str, seconds: str) -> None:
    """Sends itself a signal so many seconds after it took the batch of a step, wherever it is by then.

    The parent could be late: on a busy machine it sleeps through a dozen updates.
    """
    global _alarm

    def send() -> None:
        mark(f"signalled {time.monotonic()}")
        os.kill(os.getpid(), int(number))

    _alarm = int(step), threading.Timer(float(seconds), send).start


def kill() -> None:
    """A real SIGKILL."""
    os.kill(os.getpid(), signal.SIGKILL)


def stop() -> None:
    """A SIGTERM."""
    mark(f"signalled {time.monotonic()}")
    os.kill(os.getpid(), signal.SIGTERM)


def mark(name: str) -> None:
    """Tells the parent that it is here."""
    os.write(_trace, f"!{name}\n".encode())


def around(owner, name, before=None, after=None, when=lambda *args: True):
    """Calls `before` and `after` around a function, where its arguments are those."""
    function = getattr(owner, name)

    @functools.wraps(function)
    def wrapped(*args, **options):
        here = when(*args)
        if here and before:
            before()
        result = function(*args, **options)
        if here and after:
            after()
        return result

    setattr(owner, name, wrapped)


def saving(*parts):
    """Whether the path of a call, its first argument, is of the checkpoint AT and ends like this."""

    def is_it(path, *_):
        path = os.fspath(path)
        return f"/{AT}." in path + "." and path.endswith(parts)

    return is_it


def kill_during(name):
    """A SIGKILL while Orbax writes, from another thread."""
    before = lambda: threading.Timer(0.002, kill).start()  # noqa: E731
    return lambda: around(manager.ocp, "save_async", before, when=saving(name))


def around_write(after, when, setattr=setattr):
    """Calls `after` once Orbax has written arrays to a path of these."""
    begin = manager.ocp.save_async

    def begun(path, tree):
        write = begin(path, tree)
        return types.SimpleNamespace(result=lambda: (write.result(), after())) if when(path) else write

    setattr(manager.ocp, "save_async", begun)


def manifest_cut_short():
    """Half of a manifest under its own name, as a file system without rename would leave it."""
    write_atomic = manager.write_atomic

    def cut(path, content):
        if saving(manager.MANIFEST)(path):
            epath.Path(path).write_text(content[: len(content) // 2])
            kill()
        write_atomic(path, content)

    manager.write_atomic = cut


def rmtree_cut_short():
    """A SIGKILL once some files of a checkpoint that is being deleted are gone."""
    kind = type(epath.Path("/"))
    rmtree = kind.rmtree

    def cut(self, *args, **options):
        if self.name.endswith(".removed"):
            for path in list(self.iterdir())[:2]:
                path.unlink() if path.is_file() else rmtree(path)
            kill()
        rmtree(self, *args, **options)

    kind.rmtree = cut


def pause_in_saving(seconds):
    """Marks the place where checkpoint AT lacks its manifest alone, and waits there."""
    before = lambda: (mark("saving"), time.sleep(seconds))  # noqa: E731
    return lambda: around(manager, "write_atomic", before, when=saving(manager.MANIFEST))


def commit(when):
    """Around the rename that makes a checkpoint one."""
    return lambda: around(type(epath.Path("/")), "rename", **{when: kill}, when=saving(".partial"))


def disk_error(name):
    """An EIO once, while checkpoint AT is saved."""

    def fail():
        raise OSError(5, "Input/output error")

    return lambda: around(manager, name, fail, when=saving(manager.MANIFEST, "config.json"))


def hold():
    """Stops at step 3, for ever."""
    around(trainer.StepPipeline, "dispatch", lambda: (mark("held"), time.sleep(600)), when=lambda _, step: step == 3)


def step_is(at):
    """Whether a method's first argument is this step."""
    return lambda self, step, *_: step == at


SAVING = {
    "after the params": lambda act: around_write(act, saving("params")),
    "before the manifest": lambda act: around(manager, "write_atomic", act, when=saving(manager.MANIFEST)),
    "before the commit": lambda act: around(type(epath.Path("/")), "rename", act, when=saving(".partial")),
    "before deleting": lambda act: around(CheckpointManager, "remove", act, when=step_is(AT - 5)),
}


def hold_save(place, seconds, act):
    """Holds the save of checkpoint AT at this place, and acts once the update after the next one has begun."""

    def plant():
        global _alarm
        _alarm = AT + 2, act
        SAVING[place](lambda: time.sleep(seconds))

    return plant


KILLS = {
    "before the folder": lambda: around(type(epath.Path("/")), "mkdir", kill, when=saving(".partial")),
    "after the folder": lambda: around(type(epath.Path("/")), "mkdir", None, kill, when=saving(".partial")),
    "in the params": kill_during("params"),
    "after the params": lambda: around_write(kill, saving("params")),
    "in the optimizer": kill_during("optimizer"),
    "before the manifest": lambda: around(manager, "write_atomic", kill, when=saving(manager.MANIFEST)),
    "in the manifest": manifest_cut_short,
    "before the commit": commit("before"),
    "after the commit": commit("after"),
    "before deleting": lambda: around(CheckpointManager, "remove", kill, when=step_is(AT - 5)),
    "in deleting": rmtree_cut_short,
    "after deleting": lambda: around(CheckpointManager, "remove", None, kill, when=step_is(AT - 5)),
}
PLANTS = {
    **{f"kill during a save, {place}": hold_save(place, 600, kill) for place in SAVING},
    **{f"stop during a save, {place}": hold_save(place, 2, stop) for place in SAVING},
    **{f"kill {name}": plant for name, plant in KILLS.items()},
    "kill in restoring": lambda: around(manager, "_load_arrays", None, kill),
    "kill after restoring": lambda: around(CheckpointManager, "restore", None, kill),
    "pause in evaluating": lambda: around(
        evaluator.Evaluator, "teacher_forced_loss", lambda: (mark("evaluating"), time.sleep(1))
    ),
    "pause in saving": pause_in_saving(1.0),
    "pause in compiling": lambda: around(
        trainer.StepPipeline, "dispatch", lambda: mark("compiling"), when=lambda self, _: self._unread is None
    ),
    "long save": pause_in_saving(60.0),
    "disk error": disk_error("write_atomic"),
    "glob unescaped": lambda: setattr(type(epath.Path("/")), "glob", files._glob_unescaped),
    "hold": hold,
}
