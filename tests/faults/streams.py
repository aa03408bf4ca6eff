"""Row E4: standard streams that are closed, full, or read by nobody any more."""

import itertools
import json
import subprocess
import sys
from collections.abc import Callable

from tests.conftest import ROOT
from tests.faults.table import Tally, row
from tests.faults.world import SECONDS, World, child_environment

BROKEN = {
    "closed": {1: ">&-", 2: "2>&-"},
    "full": {1: ">/dev/full", 2: "2>/dev/full"},
    "unread": {1: "> >(exec <&-)", 2: "2> >(exec <&-)"},
}
QUICK = {
    *(("prepare", kind, number) for kind in BROKEN for number in (1, 2)),
    ("translate", "closed", 2),
    ("translate", "full", 1),
}
TEXT = b"red house\nold tree\n"


class Sent:
    """A command, ended, whose streams bash has redirected.

    Attributes:
      stdout, stderr: what came of each stream that was left alone.
    """

    def __init__(self, redirection: str, command: list[str]):
        # A process substitution may close its end a little later than the command begins: JAX takes longer.
        line = ["bash", "-c", f'exec "$@" {redirection}', "bash", sys.executable, *command]
        with child_environment():
            done = subprocess.run(line, input=TEXT, capture_output=True, cwd=ROOT, timeout=SECONDS)
        self.code, self.stdout, self.stderr = done.returncode, done.stdout, done.stderr.decode()


def commands(world: World) -> dict[str, Callable[[], list[str]]]:
    """Each command at its smallest; training and export into a new folder each time."""
    config = world.new_folder().with_suffix(".py")
    fields = json.loads(world.config(train={"num_steps": 5}).to_json())
    config.write_text(f"def get_config():\n    return {fields!r}\n")
    given, workdir = f"--config={config}", f"--workdir={world.talker()}"
    test = [f"--source={world.data['dir']}/test.en", f"--reference={world.data['dir']}/test.de"]
    new = lambda flag: f"--{flag}={world.new_folder()}"  # noqa: E731
    return {
        "prepare": lambda: ["-m", "transformer.prepare", given, "--report"],
        "translate": lambda: ["-m", "transformer.translate", workdir],
        "list": lambda: ["-m", "transformer"],
        "train": lambda: ["train.py", given, new("workdir")],
        "eval": lambda: ["eval.py", workdir, *test, "--decode.max_extra_length=3"],
        "benchmark": lambda: ["-m", "transformer.benchmark", given, "--num_steps=1"],
        "export": lambda: ["-m", "transformer.export", workdir, "--format=jax", new("output")],
    }


@row("E4", "stdout or stderr closed, full, or a pipe whose reader has gone, in every command", full=42, quick=8)
def streams_broken(world: World, tally: Tally) -> None:
    for (name, make), kind, number in itertools.product(commands(world).items(), BROKEN, (1, 2)):
        if tally.quick and (name, kind, number) not in QUICK:
            continue
        with tally.one(f"{name}, {'stdout' if number == 1 else 'stderr'} {kind}"):
            done = Sent(BROKEN[kind][number], make())
            assert "Traceback" not in done.stderr, done.stderr[-500:]
            assert "Exception ignored" not in done.stderr, done.stderr[-500:]
            if number == 2:
                assert done.code == 0
                assert done.stderr == ""
                assert_a_result(name, done.stdout)
            elif name == "train":  # which has none: its result is the workdir
                assert done.code == 0, done.stderr[-500:]
            elif kind == "unread":
                assert done.code == 141, done.stderr[-500:]
                assert "stdout" not in done.stderr
            else:
                assert done.code == 2, done.stderr[-500:]
                assert "the result could not be written to stdout: " in done.stderr
                assert done.stdout == b""


def assert_a_result(name: str, stdout: bytes) -> None:
    """It is what the command promises to print, and nothing besides."""
    lines = stdout.decode().splitlines()
    if name == "translate":
        assert len(lines) == TEXT.count(b"\n")
    elif name in ("eval", "benchmark", "export"):
        assert len(lines) == 1
        assert json.loads(lines[0])
    elif name == "train":
        assert lines == []
    else:
        assert not any("warning" in line or "ready in" in line for line in lines)
        assert len(lines) > 5
