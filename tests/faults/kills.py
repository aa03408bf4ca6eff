"""Rows A: processes that are killed, at random and at the worst places, or asked to stop."""

import os
import signal
import time

import numpy as np

from tests.faults import child
from tests.faults.table import Tally, row
from tests.faults.world import KILLED, SAVE, STEPS, Child, World
from transformer.checkpoints.manager import CheckpointManager

COMMITTED = ("after the commit", "before deleting", "in deleting", "after deleting")  # the checkpoint was one by then


def random_steps(seed: int, count: int) -> list[int]:
    """Different steps, ascending, none so late that the run may be over before the signal comes."""
    rng = np.random.default_rng(seed)
    return sorted((rng.permutation(STEPS - 12)[:count] + 2).tolist())


def signal_at(number: int, done: int, rng: np.random.Generator) -> str:
    """A plant: a signal while that step runs, or one of those just after."""
    return f"signal {int(number)} {done} {rng.uniform(0, 0.02)}"


def assert_order(process: Child, world: World, seed: int = 0) -> None:
    """Every example that it took was the undisturbed run's of that step."""
    wanted = world.whole(seed).ids
    wrong = [done for done, seen in process.trace().items() if set(seen) != {wanted[done]}]
    assert not wrong, f"other examples at step {wrong[0]}"


@row("A1", "SIGKILL at random steps, dropout and shuffle on: params, moments, order of examples", full=60, quick=3)
def killed_at_random(world: World, tally: Tally) -> None:
    kills = 3 if tally.quick else 20
    for seed in range(1 if tally.quick else 3):
        run, rng, sittings = world.new_folder(), np.random.default_rng(seed), []
        world.whole(seed)
        for done in random_steps(seed, kills):
            plant = signal_at(signal.SIGKILL, done, rng)
            sittings.append((done, world.trained(run, plant, train={"seed": seed})))
        last = world.trained(run, train={"seed": seed})
        for (done, process), (_, after) in zip(sittings, [*sittings[1:], (STEPS, last)], strict=True):
            with tally.one(f"seed {seed}, killed at step {done}"):
                assert process.code == KILLED, process.stderr()
                lost = max(process.trace()) + 1 - min(after.trace())
                # The newest save may still be written; the next one waits for it.
                assert 0 <= lost <= 2 * SAVE, f"{lost} updates were done again"
                assert_order(process, world, seed)
                assert last.code == 0, last.stderr()
                assert_order(last, world, seed)
                world.assert_as_whole(run, seed=seed)
        tally.note(f"seed {seed}: {sum(len(p.trace()) for _, p in sittings) + len(last.trace())} updates for {STEPS}")


@row("A2", "SIGKILL at named points of a save and of deleting, with one checkpoint kept", full=24, quick=4)
def killed_while_saving(world: World, tally: Tally) -> None:
    names = ["in the params", "before the manifest", "after the commit", "in deleting"] if tally.quick else child.KILLS
    for name in names:
        for attempt in range(1 if tally.quick else 2):
            with tally.one(f"{name}, {attempt}"):
                run, train = world.new_folder(), {"num_steps": 15, "keep_last": 1, "keep_best": 0}
                process = world.trained(run, f"kill {name}", train=train)
                assert process.code == KILLED, f"never came there: {process.code} {process.stderr()}"
                result, wanted = (
                    CheckpointManager(run).latest_valid_step(),
                    child.AT if name in COMMITTED else child.AT - SAVE,
                )
                assert result == wanted, f"expected checkpoint {wanted}, got {result}"
                assert world.trained(run, train=train).code == 0
                assert {path.name for path in (run / "checkpoints").iterdir()} == {"15"}
                world.assert_as_whole(run, 15)


@row("A3", "SIGKILL while restoring, three resumes in a row, resume of a finished run", full=4, quick=2)
def killed_while_restoring(world: World, tally: Tally) -> None:
    for plant in ("kill after restoring",) if tally.quick else ("kill in restoring", "kill after restoring"):
        with tally.one(f"{plant}, three times"):
            run = world.three_checkpoints()
            for _ in range(3):
                process = world.trained(run, plant)
                assert (process.code, process.trace()) == (KILLED, {}), process.stderr()
            assert CheckpointManager(run).latest_valid_step() == 15
            last = world.trained(run)
            assert list(last.trace()) == list(range(16, STEPS + 1))
            world.assert_as_whole(run)
    finished = world.copy(world.whole().workdir)
    for attempt in range(1 if tally.quick else 2):
        with tally.one(f"a finished run, {attempt}"):
            before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file() and path.name != "lock"}
            process = world.trained(finished)
            assert (process.code, process.trace()) == (0, {}), process.stderr()
            files = {path for path in finished.rglob("*") if path.is_file() and path.name != "lock"}
            assert files == set(before)
            assert all(path.read_bytes() == content for path, content in before.items())


@row("A4", "SIGTERM and SIGINT: at random steps, while evaluating, saving, compiling; twice", full=28, quick=5)
def asked_to_stop(world: World, tally: Tally) -> None:
    longest, rng = 0.0, np.random.default_rng(7)
    for number in range(1 if tally.quick else 2):
        run, taken = world.new_folder(), []
        for done in random_steps(number, 2 if tally.quick else 10):
            asked = signal.SIGTERM if done % 3 else signal.SIGINT
            with tally.one(f"{asked.name} at step {done}"):
                process = world.trained(run, signal_at(asked, done, rng))
                seconds = process.seconds_to_end()
                longest = max(longest, seconds)
                taken += process.trace()
                assert_stopped(process, 128 + asked, seconds)
        last = world.trained(run)
        with tally.one("nothing was done twice, nothing left out"):
            assert taken + list(last.trace()) == list(range(1, STEPS + 1))
            assert_order(last, world)
            world.assert_as_whole(run)
    for place in ("evaluating",) if tally.quick else ("evaluating", "saving", "compiling"):
        for asked in (signal.SIGTERM,) if tally.quick else (signal.SIGTERM, signal.SIGINT):
            with tally.one(f"{asked.name} while {place}"):
                workdir = world.new_folder()
                process = world.train(workdir, f"pause in {place}").at(place)
                seconds = process.signal(asked)
                longest = max(longest, seconds)
                assert_stopped(process, 128 + asked, seconds)
                assert world.trained(workdir).code == 0
                world.assert_as_whole(workdir)
    with tally.one("a second signal"):
        assert_second_signal_ends_it(world)
    tally.note(f"longest exit {longest:.1f} s")


@row("A6", "SIGKILL and SIGTERM while a save is under way and updates go on", full=8, quick=3)
def stopped_during_a_save(world: World, tally: Tally) -> None:
    places = list(child.SAVING)
    for place in places[1:3] if tally.quick else places:
        with tally.one(f"killed, {place}"):
            run, train = world.new_folder(), {"num_steps": 15, "keep_last": 1, "keep_best": 0}
            process = world.trained(run, f"kill during a save, {place}", train=train)
            assert process.code == KILLED, f"never came there: {process.code} {process.stderr()}"
            result = CheckpointManager(run).latest_valid_step()
            assert result == (child.AT if place == "before deleting" else child.AT - SAVE), result
            assert max(process.trace()) > child.AT
            assert world.trained(run, train=train).code == 0
            world.assert_as_whole(run, 15)
    for place in places[:1] if tally.quick else places:
        with tally.one(f"SIGTERM, {place}"):
            run = world.new_folder()
            process = world.trained(run, f"stop during a save, {place}", train={"keep_last": 1, "keep_best": 0})
            assert_stopped(process, 128 + signal.SIGTERM, process.seconds_to_end())
            assert world.trained(run).code == 0
            world.assert_as_whole(run)


def assert_stopped(process: Child, code: int, seconds: float) -> None:
    """With the documented code, in time, and with its last update saved."""
    assert process.code == code, f"exit code {process.code}: {process.stderr()}"
    assert seconds < 30
    last = max(process.trace())
    assert CheckpointManager(process.workdir).latest_valid_step() == last, f"step {last} was done and not saved"
    assert f"saved step {last:,}" in process.stderr()


def assert_second_signal_ends_it(world: World) -> None:
    """At once, though it is in the midst of a save; what was saved before is whole."""
    run = world.new_folder()
    world.trained(run, train={"num_steps": 5})
    process = world.train(run, "long save").at("saving")
    os.kill(process.pid, signal.SIGTERM)
    time.sleep(0.3)
    seconds = process.signal(signal.SIGINT)
    assert seconds < 5, f"{seconds:.1f} s"
    assert process.code == -signal.SIGINT
    assert CheckpointManager(run).latest_valid_step() == 5
