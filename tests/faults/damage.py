"""Rows B: checkpoints whose files are not those that were written, disks that fail, and what is deleted when."""

import contextlib
import errno
import itertools
import os
import pathlib
import shutil
import subprocess
import tempfile
from collections.abc import Iterator

import jax
import numpy as np
import pytest
from etils import epath

from tests.checkpoints.test_manager import make_parts, save, save_three
from tests.faults.child import around_write
from tests.faults.table import Tally, row
from tests.faults.world import Command, Heard, World, files_of
from transformer.checkpoints import loading, manager, manifest
from transformer.checkpoints.manager import CheckpointManager
from transformer.checkpoints.manifest import MANIFEST
from transformer.runtime import files, logging, object_storage
from transformer.runtime.errors import UserError, WorkdirError

NEWEST = 15


def assert_noticed(run: pathlib.Path, name: str) -> None:
    """The newest checkpoint gives way to the one before, and that is said, for training and for each way to name one.

    These are the very calls of train.py, eval.py and translate. Damage that changes nothing (a capital E in a
    number) may pass, if what is read is the same.
    """
    checkpoints = CheckpointManager(run)
    for ask in (checkpoints.latest_valid_step, lambda: loading.resolve_steps(checkpoints, "latest")[0]):
        with Heard() as heard:
            result = ask()
        assert result == 10, f"{name}: took {result}"
        assert f"checkpoint {NEWEST} is damaged" in heard.getvalue(), f"{name}: not said"
    with Heard() as heard:
        assert loading.resolve_steps(checkpoints, "average:2") == [5, 10], name
        assert NEWEST not in loading.resolve_steps(checkpoints, "best"), name
        with pytest.raises(WorkdirError):
            loading.resolve_steps(checkpoints, str(NEWEST))
    assert heard.getvalue().count(f"checkpoint {NEWEST} is damaged") == 3, f"{name}: not said"


@contextlib.contextmanager
def restored_after(run: pathlib.Path) -> Iterator[pathlib.Path]:
    """The folder of the newest checkpoint, as it was again afterwards."""
    folder, whole = run / "checkpoints" / str(NEWEST), run / "whole"
    shutil.copytree(folder, whole)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)
        whole.rename(folder)


def flip(path: pathlib.Path, rng: np.random.Generator) -> int:
    """One random bit of a file; its place. A file of no bytes gets one."""
    content = bytearray(path.read_bytes() or b"\0")
    place = int(rng.integers(8 * len(content)))
    content[place // 8] ^= 1 << place % 8
    path.write_bytes(content)
    return place


def assert_reads_the_one_before(run: pathlib.Path, world: World) -> None:
    """What eval.py and translate would compute with are the params of step 10."""
    with Heard():
        params = loading.load_checkpoint(run, "latest").params
    wanted = loading.load_checkpoint(world.whole().workdir, "10").params
    leaves = [[np.asarray(leaf) for leaf in jax.tree.leaves(tree)] for tree in (params, wanted)]
    assert all(np.array_equal(a, b) for a, b in zip(*leaves, strict=True))


@row("B1", "bit flips spread over all files of the newest checkpoint, manifest included", full=203, quick=45)
def bits_flipped(world: World, tally: Tally) -> None:
    run, rng = world.three_checkpoints(), np.random.default_rng(0)
    files = itertools.cycle(files_of(run / "checkpoints" / str(NEWEST)))
    for attempt in range(45 if tally.quick else 200):
        path = next(files)
        with tally.one(f"{path.name}, {attempt}"):
            whole = path.read_bytes()
            place = flip(path, rng)
            try:
                if not changes_nothing(path, whole):
                    assert_noticed(run, f"{path.name}, bit {place}")
                if attempt % 40 == 0:
                    assert_reads_the_one_before(run, world)
            finally:
                path.write_bytes(whole)
    assert CheckpointManager(run).latest_valid_step() == NEWEST
    for attempt in range(0 if tally.quick else 3):
        with tally.one(f"training goes on, {attempt}"):
            flipped = world.copy(run)
            flip(files_of(flipped / "checkpoints" / str(NEWEST))[3 * attempt + 1], rng)
            process = world.trained(flipped)
            assert process.code == 0, process.stderr()
            assert f"checkpoint {NEWEST} is damaged" in process.stderr()
            world.assert_as_whole(flipped)


def changes_nothing(path: pathlib.Path, whole: bytes) -> bool:
    """Whether a manifest still says the very same, such as 1E5 for 1e5."""
    if path.name != MANIFEST or len(list(path.parent.glob("*.extra"))):
        return False
    try:
        return manifest.Manifest.from_json(path.read_text()) == manifest.Manifest.from_json(whole.decode())
    except Exception:
        return False


def one_byte_short(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes()[:-1] if path.stat().st_size else b"x")


DAMAGE = {
    "deleted": lambda path: path.unlink(),
    "emptied": lambda path: path.write_bytes(b"" if path.stat().st_size else b"x"),
    "halved": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] or b"x"),
    "one byte short": one_byte_short,
    "with another beside it": lambda path: path.with_name(path.name + ".extra").write_bytes(b"x"),
}


@row("B2", "every file deleted, emptied, halved, one byte short, with an extra file beside it", full=65, quick=20)
def files_damaged(world: World, tally: Tally) -> None:
    run = world.three_checkpoints()
    names = [
        path.relative_to(run / "checkpoints" / str(NEWEST)) for path in files_of(run / "checkpoints" / str(NEWEST))
    ]
    cases = list(itertools.product(names, DAMAGE))
    for name, damage in cases[::4] if tally.quick else cases:
        with tally.one(f"{name} {damage}"), restored_after(run) as folder:
            whole = (folder / name).read_bytes()
            DAMAGE[damage](folder / name)
            if not changes_nothing(folder / name, whole):  # a manifest without the end of its last line
                assert_noticed(run, f"{name} {damage}")
    with tally.one("nothing was left damaged"):
        assert CheckpointManager(run).latest_valid_step() == NEWEST
    if not tally.quick:
        (run / "checkpoints" / str(NEWEST) / "config.json").write_text("{}")
        for command in (["eval.py", "--split=test"], ["-m", "transformer.translate"]):
            with tally.one(f"{command} takes the one before"):
                done = Command(*command, f"--workdir={run}", stdin=b"red\n").expect(0, "checkpoint 15 is damaged")
                assert done.stdout.count(b"\n") == 1
                assert b'"step": 10' in done.stdout or command[0] == "-m"


@row("B3", "all checkpoints bad: train, eval and translate refuse, nothing starts again", full=9, quick=3)
def none_is_sound(world: World, tally: Tally) -> None:
    rng = np.random.default_rng(0)
    ways = {
        "flipped": lambda folder: flip(folder / "config.json", rng),
        "without manifest": lambda folder: (folder / MANIFEST).unlink(),
        "emptied": lambda folder: [path.unlink() for path in files_of(folder)],
    }
    for name, harm in list(ways.items())[: 1 if tally.quick else 3]:
        run = world.three_checkpoints()
        for folder in (run / "checkpoints").iterdir():
            harm(folder)
        before = {path: path.read_bytes() for path in files_of(run) if path.name != "lock"}
        with tally.one(f"train.py, {name}"):
            process = world.trained(run)
            assert process.code == 4, process.stderr()
            assert "none of the checkpoints [5, 10, 15] is valid" in process.stderr()
            assert process.trace() == {}
        for which in ("latest", "best"):
            if tally.quick:
                with tally.one(f"{which}, {name}"), Heard() as heard, pytest.raises(WorkdirError) as refused:
                    loading.load_checkpoint(run, which)
                assert (refused.value.exit_code, heard.getvalue().count("damaged")) == (4, 3)
        for command in () if tally.quick else (["eval.py"], ["-m", "transformer.translate"]):
            with tally.one(f"{command}, {name}"):
                Command(*command, f"--workdir={run}", stdin=b"red\n").expect(4, "damaged", "is valid")
        with tally.one(f"nothing was touched, {name}"):
            assert {path: path.read_bytes() for path in files_of(run) if path.name != "lock"} == before


@contextlib.contextmanager
def disk(folder: pathlib.Path, options: str) -> Iterator[pathlib.Path]:
    """A small file system of its own."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True, capture_output=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def can_mount(world: World) -> bool:
    """Whether this process may make file systems."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError), disk(world.new_folder(), "size=1m"):
        return True
    return False


def fill(folder: pathlib.Path) -> pathlib.Path:
    """A file that takes all the room there is."""
    ballast = folder / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(b"\0" * 4096)
    return ballast


@row("B4", "disk full, also at the last save; read-only; an I/O error once, in writing and in reading", full=5, quick=3)
def disk_fails(world: World, tally: Tally) -> None:
    if can_mount(world):
        for steps in (10,) if tally.quick else (10, 20):  # the save that fails is the last one, or not
            with tally.one(f"full at step 10 of {steps}"), disk(world.new_folder(), "size=64m") as place:
                assert_survives_a_full_disk(world, place / "run", steps)
        if not tally.quick:
            with tally.one("read-only"), disk(world.new_folder(), "size=64m") as place:
                shutil.copytree(world.three_checkpoints(), place / "run")
                subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
                process = world.trained(place / "run")
                assert process.code == 2, process.stderr()
                assert "Read-only file system" in process.stderr()
                assert CheckpointManager(place / "run").latest_valid_step() == NEWEST
    else:
        tally.skip(1 if tally.quick else 3, "no right to mount a full or a read-only disk")
    with tally.one("an error in writing"):
        run = world.new_folder()
        process = world.trained(run, "disk error", train={"num_steps": 10})
        assert process.code == 2, process.stderr()
        assert "Input/output error" in process.stderr()
        assert CheckpointManager(run).latest_valid_step() == 5
        assert world.trained(run, train={"num_steps": 10}).code == 0
        world.assert_as_whole(run, 10)
    with tally.one("an error in reading"), pytest.MonkeyPatch.context() as patch:
        run = world.three_checkpoints()
        patch.setattr(manifest, "sha256", raising_once(manifest.sha256))
        with Heard() as heard:
            assert CheckpointManager(run).latest_valid_step() == 10
        assert "checkpoint 15 is damaged and skipped: a file cannot be read" in heard.getvalue()
        assert CheckpointManager(run).latest_valid_step() == NEWEST


def raising_once(function):
    """The same, but for an EIO at the first call."""
    failures = [OSError(errno.EIO, os.strerror(errno.EIO))]

    def failing(path):
        if failures:
            raise failures.pop()
        return function(path)

    return failing


def assert_survives_a_full_disk(world: World, run: pathlib.Path, steps: int) -> None:
    """The save of step 10 finds no room; with room again the run goes on as if nothing had happened."""
    train = {"num_steps": 5}
    assert world.trained(run, train=train).code == 0
    ballast, train = fill(run.parent), {"num_steps": steps}
    process = world.trained(run, train=train)
    assert process.code not in (0, None), "a save that failed was no failure"
    assert "space" in process.stderr(), process.stderr()
    assert CheckpointManager(run).latest_valid_step() == 5
    ballast.unlink()
    assert world.trained(run, train=train).code == 0
    world.assert_as_whole(run, steps)


@row("B5", "retention of 1, 2, 5 checkpoints of steps 9, 10, 100, where the new save fails", full=18, quick=9)
def retention(world: World, tally: Tally) -> None:
    base = save_three(world.new_folder())
    for keep, (place, fail) in itertools.product((1, 2, 5), FAILURES.items()):
        with tally.one(f"keep {keep}, {place}"), pytest.MonkeyPatch.context() as patch:
            run = world.copy(base)
            fail(patch)
            with pytest.raises(UserError, match="No space left"):
                save(run, make_parts(), 200)
            patch.undo()
            CheckpointManager(run).clean_up(100)
            assert CheckpointManager(run).steps() == [9, 10, 100]
            assert CheckpointManager(run).latest_valid_step() == 100
            save(run, make_parts(), 200)
            CheckpointManager(run).prune(keep, 0)
            assert CheckpointManager(run).steps() == [9, 10, 100, 200][-keep:]
    for keep in (1, 2, 5):
        with tally.one(f"keep {keep}, the new one is not whole"), Heard() as heard:
            run = world.copy(base)
            save(run, make_parts(), 200)
            files_of(run / "checkpoints" / "200")[0].unlink()
            CheckpointManager(run).prune(keep, 0)
            assert CheckpointManager(run).steps() == [9, 10, 100, 200]
            assert keep == 5 or "checkpoint 200 is damaged" in heard.getvalue()


def failing_at(count: int, owner, name: str):
    """The call of that number, from 0, finds no space."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        function, calls = getattr(owner, name), itertools.count()

        def failing(*args, **options):
            if next(calls) == count:
                raise OSError(errno.ENOSPC, "No space left on device")
            return function(*args, **options)

        patch.setattr(owner, name, failing)

    return plant


FAILURES = {
    "the params fail": failing_at(0, manager.ocp, "save_async"),
    "the optimizer fails": failing_at(1, manager.ocp, "save_async"),
    "the params fail while they are written": lambda patch: around_write(
        lambda: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")),
        lambda path: path.name == "params",
        patch.setattr,
    ),
    "the config fails": failing_at(0, manager, "write_atomic"),
    "the digests fail": failing_at(0, manifest, "sha256"),
    "the manifest fails": failing_at(1, manager, "write_atomic"),
}


@row(
    "B6",
    "saves that their own reader could not open: special characters in paths, a full temp folder",
    full=12,
    quick=11,
)
def saves_that_cannot_be_read(world: World, tally: Tally) -> None:
    for name in ("[a]", "[!a]", "a*", "**", "a?"):
        with tally.one(f"{name} works"):
            run = world.new_folder() / name
            save(run, make_parts(), 5)
            assert loading.load_checkpoint(run, "latest").step == 5
    with tally.one("a backslash"), pytest.raises(UserError, match="without backslashes"):
        save(world.new_folder() / "a\\b", make_parts(), 5)
    base = save_three(world.new_folder())
    for part, harm in UNREADABLE.items():
        with tally.one(f"{part} cannot be read"), pytest.MonkeyPatch.context() as patch:
            run = pathlib.Path(shutil.copytree(base, world.new_folder() / "[a]"))
            harm(patch)
            with pytest.raises(UserError, match="cannot be read again, so it does not count"):
                save(run, make_parts(), 200)
            patch.undo()
            assert CheckpointManager(run).steps() == [9, 10, 100]
            assert CheckpointManager(run).latest_valid_step() == 100
    if can_mount(world):
        for staged in (False, True):  # as on s3://, where a save goes through the temp folder
            with tally.one(f"a full temp folder, staged {staged}"), pytest.MonkeyPatch.context() as patch:
                assert_survives_a_full_temp_folder(world, world.copy(base), staged, patch)
    else:
        tally.skip(2, "no right to mount a full disk")
    if not tally.quick:
        with tally.one("train.py says so at once"):
            run = world.new_folder() / "[a]"
            process = world.trained(run, "glob unescaped", train={"num_steps": 10})
            assert process.code == 2, process.stderr()
            assert "5: the checkpoint was written but cannot be read again" in process.stderr()
            assert CheckpointManager(run).steps() == []
            assert world.trained(run, train={"num_steps": 10}).code == 0
            world.assert_as_whole(run, 10)


def assert_survives_a_full_temp_folder(
    world: World, run: pathlib.Path, staged: bool, patch: pytest.MonkeyPatch
) -> None:
    """A save that needs the temp folder fails with a message and the exit code of a full disk; another works."""
    with disk(world.new_folder(), "size=64k") as temp:
        patch.setattr(tempfile, "tempdir", str(temp))
        patch.setattr(object_storage, "needs_staging", lambda folder: staged)
        if staged:
            with pytest.raises(Exception, match="space") as failed:
                save(run, make_parts(), 200)
            with Heard() as heard:
                assert logging.report_error(failed.value) == 2
            assert "space" in heard.getvalue(), heard.getvalue()
        else:
            save(run, make_parts(), 200)
    assert CheckpointManager(run).latest_valid_step() == (100 if staged else 200)


def manifest_emptied(patch: pytest.MonkeyPatch) -> None:
    write_atomic = manager.write_atomic
    patch.setattr(manager, "write_atomic", lambda path, text: write_atomic(path, "" if path.name == MANIFEST else text))


def one_moment_lost(patch: pytest.MonkeyPatch) -> None:
    write = manager.ocp.save_async
    lost = lambda path, tree: write(path, jax.tree.leaves(tree)[1:] if path.name == "optimizer" else tree)  # noqa: E731
    patch.setattr(manager.ocp, "save_async", lost)


UNREADABLE = {
    "the arrays": lambda patch: patch.setattr(type(epath.Path()), "glob", files._glob_unescaped),
    "the optimizer": one_moment_lost,
    "the manifest": manifest_emptied,
}
