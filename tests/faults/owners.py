"""Rows C: two trainers in one workdir, a run resumed as another, and configs that cannot be."""

import dataclasses
import itertools
import pathlib
import re
import shutil
import signal
import socket
import time

import pytest

from tests.config import test_schema
from tests.conftest import ROOT
from tests.faults.table import Tally, row
from tests.faults.world import KILLED, Command, World, data_fields
from transformer.config import Config, schema, validation
from transformer.config.validation import validate
from transformer.runtime.errors import UserError
from transformer.training import workdir as workdirs


@row("C1", "two trainers in one workdir; a lock left by SIGKILL", full=6, quick=2)
def two_trainers(world: World, tally: Tally) -> None:
    for attempt in range(1 if tally.quick else 5):
        with tally.one(f"at once, {attempt}"):
            run = world.new_folder()
            both = [world.train(run, "hold") for _ in range(2)]
            deadline = time.monotonic() + 120
            while all(process.code is None for process in both):
                assert time.monotonic() < deadline, "both go on"
                time.sleep(0.01)
            (refused,), (holder,) = (
                [process for process in both if (process.code is None) == alive] for alive in (False, True)
            )
            assert refused.code == 4, refused.stderr()
            who = rf"held by process {holder.pid} on {re.escape(socket.gethostname())} since \d{{4}}-\d\d-\d\d \d\d:"
            assert re.search(who, refused.stderr()), refused.stderr()
            assert refused.trace() == {}
            holder.at("held").signal(signal.SIGKILL)
            assert holder.code == KILLED
    with tally.one("after the SIGKILL"):
        assert (run / "lock").read_text()
        assert world.trained(run, train={"num_steps": 5}).code == 0


def other(section: str, field: dataclasses.Field) -> object:
    """Another value of a field."""
    value = getattr(getattr(Config(), section), field.name)
    others = {
        bool: lambda: not value,
        int: lambda: value + 1,
        float: lambda: value + 0.125,
        str: lambda: value + "x",
        tuple: lambda: (*value, schema.MixtureEntry()),
    }
    return others[type(value)]()


SELECTED = {bool: True, int: 1, float: 1.0, str: "1", tuple: (schema.MixtureEntry(),)}


def config_that_reads(name: str) -> Config:
    """Defaults but for the fields that select the one of this name, so that something reads it."""
    sections = dataclasses.asdict(Config())
    for reader in validation.APPLICABLE_TO.get(name, ()):
        section, selector = reader.selector.split(".")
        sections[section][selector] = reader.values[0] if reader.values else SELECTED[type(sections[section][selector])]
    return Config(**{section: kind(**sections[section]) for section, kind in schema.SECTIONS.items()})


@row("C2", "config, vocabulary or data changed under a run: each field of the config, and the data", full=70, quick=60)
def run_resumed_as_another(world: World, tally: Tally) -> None:
    harmless = 0
    documented = (ROOT / "docs" / "run_directory.md").read_text()
    for section, kind in schema.SECTIONS.items():
        for field in dataclasses.fields(kind):
            with tally.one(f"{section}.{field.name}"):
                old = config_that_reads(f"{section}.{field.name}")
                before, after = getattr(getattr(old, section), field.name), other(section, field)
                changed = dataclasses.replace(getattr(old, section), **{field.name: after})
                config = dataclasses.replace(old, **{section: changed})
                change = f"{section}.{field.name}: {before!r} → {after!r}"
                if field.name == "mixture":
                    change = f"{section}.{field.name}: {len(before)} entries → {len(after)}"
                if field.name in validation.RESUMABLE_FIELDS.get(section, ()) or field.name == "num_steps":
                    assert workdirs.check_resume_config(pathlib.Path("run"), old, config) == [change]
                    named = (f"`{section}.{field.name}`", f"`{section}.*`", field.name in schema.PATH_FIELDS)
                    assert any(name is True or (name and name in documented) for name in named), "undocumented"
                    harmless += 1
                else:
                    with pytest.raises(UserError, match=re.escape(change)):
                        workdirs.check_resume_config(pathlib.Path("run"), old, config)
    tally.note(f"{harmless} harmless fields")
    with tally.one("another config where config.json is gone"):
        run = world.three_checkpoints()
        (run / "config.json").unlink()
        refused = world.trained(run, optimizer={"warmup_steps": 11})
        assert (refused.code, refused.trace()) == (2, {})
        assert "optimizer.warmup_steps: 10 → 11" in refused.stderr()
    for name, change in {} if tally.quick else DATA_CHANGES.items():
        with tally.one(f"data: {name}"):
            run, folder = world.three_checkpoints(), world.new_folder()
            shutil.copytree(world.folder / "data", folder)
            change(folder / "train.en")
            refused = world.trained(run, data=data_fields(folder, world.folder / "prepared"))
            assert (refused.code, refused.trace()) == (2, {}), refused.stderr()
            assert re.search(r"data has changed since step 15: its digest was \w{16} and is \w{16}", refused.stderr())


def lines_changed(change):
    """A change to the lines of a file, whose number stays."""

    def apply(path: pathlib.Path) -> None:
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(change(lines)))

    return apply


DATA_CHANGES = {
    "two lines swapped": lines_changed(lambda lines: [lines[1], lines[0], *lines[2:]]),
    "a letter": lines_changed(lambda lines: ["x" + lines[0], *lines[1:]]),
}


def bad_configs() -> list[tuple[str, dict]]:
    """What the message must match, and the sections: those of test_config."""
    cases = list(test_schema.IMPOSSIBLE)
    for fields, values in (
        (test_schema.FLOATS, [float("nan"), float("inf"), -1.0, "0.1", True, None]),
        (test_schema.INTS, [-2, 2**31, 1.5, "2", True, None]),
    ):
        for (section, name), value in itertools.product(fields, values):
            cases.append((rf"config\.{section}\.{name}: expected", {section: {name: value}}))
    return cases


COMMANDS = {
    "--config.model.num_layer=3": "did you mean 'num_layers'",
    "--config.model.num_heads=7": "does not divide",
    "--config.model.dropout_rate=nan": "expected a finite number",
    "--config.model.share_embeddings=2": "expected bool",
    "--config.data.vocab_size=0": "expected at least 8",
    "--config.train.num_steps=-1": "expected at least 1",
    "--config.train.batch_tokens=x": "expected int",
    "--config.optimizer.schedule=step": "expected one of",
    "--config.mesh.data=0": "expected -1",
    "--config.modle.num_layers=3": "did you mean 'model'",
}


@row("C3", "configs that cannot be: in the process < 2 s each, ten as commands <= 5 s each", full=70, quick=62)
def bad_config(world: World, tally: Tally) -> None:
    longest = 0.0
    for match, sections in bad_configs():
        with tally.one(f"{sections}"):
            values = dataclasses.asdict(Config())
            for section, fields in sections.items():
                values[section] = {**values.get(section, {}), **fields} if isinstance(fields, dict) else fields
            begun = time.monotonic()
            with pytest.raises(UserError, match=match) as refused:
                validate(values)
            longest = max(longest, time.monotonic() - begun)
            assert longest < 2
            assert refused.value.exit_code == 2
    slowest = 0.0
    for flag, words in list(COMMANDS.items())[: 2 if tally.quick else None]:
        with tally.one(flag):
            run = world.new_folder()
            done = Command("train.py", "--config=configs/demo.py", f"--workdir={run}", flag).expect(2, words)
            slowest = max(slowest, done.cpu_seconds)
            assert done.cpu_seconds <= 5, f"{done.cpu_seconds:.1f} s of CPU time"
            assert done.stderr.count("\n") == 1
            assert not run.exists()
    tally.note(f"slowest {1000 * longest:.0f} ms, as a command {slowest:.1f} s of CPU time")
