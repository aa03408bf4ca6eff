"""`python -m transformer` and its modules: commands are listed, others refused."""

import contextlib
import re
import signal
import subprocess
import sys

import pytest

import transformer
from transformer import __main__ as program


def run(root, *arguments):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=60, cwd=root)


@pytest.mark.reported
@pytest.mark.parametrize(
    ("module", "what"),
    [
        ("training.train_step", "a module, not a command"),
        ("data.corpus", "a module, not a command"),
        ("trnslate", "not a command"),
    ],
)
def test_a_module_that_is_no_command_says_so(root, module, what):
    done = run(root, "-m", f"transformer.{module}")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"python -m transformer.{module}: this is {what}; python -m transformer lists the commands\n"
    )


@pytest.mark.reported
def test_the_package_lists_its_commands(root):
    done = run(root, "-m", "transformer")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].startswith("python train.py ")
    names = {line.split("  ")[0].strip() for line in lines[:-2]}
    others = {"translate", "translate_corpus", "score", "compare", "prepare", "benchmark", "plan", "export"}
    assert {f"python -m transformer.{name}" for name in others} | {"python eval.py"} < names
    assert "python -m transformer" not in names
    (line,) = (line for line in lines if "transformer.prepare " in line)
    assert line.endswith("Prepares the data of a config ahead of training: sentence pairs, vocabulary and token ids.")


@pytest.mark.parametrize(
    ("argument", "code", "out", "err"),
    [
        ("--version", 0, f"{transformer.__version__}\n", ""),
        ("--help", 0, "transformer train             Trains the config's model", ""),
        (
            "trian",
            2,
            "",
            "transformer: expected one of the commands train, eval, .*, got 'trian'; did you mean 'train'?",
        ),
        ("step", 2, "", "transformer: expected one of the commands train, eval, .*, got 'step'\n"),
        ("eval", 2, "", "eval.py: error: the following arguments are required: --workdir"),
        ("prepare", 2, "", "prepare.py: expected one --config=FILE"),
    ],
)
def test_the_program_runs_the_command_that_is_named(argument, code, out, err, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bin/transformer", argument])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.delitem(sys.modules, "transformer.prepare", raising=False)  # as in a process that has just begun
    with pytest.raises(SystemExit, match=str(code)) if code else contextlib.nullcontext():
        program.script()
    captured = capsys.readouterr()
    assert captured.out.startswith(out)
    assert bool(captured.out) == bool(out)
    assert re.search(err, captured.err)


def test_the_package_runs_the_command_that_is_named(root):
    done = run(root, "-m", "transformer", "eval", "--workdir=there/is/none")
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"eval\.py: /.*/there/is/none: expected a folder that train\.py wrote.*\n", done.stderr)


def test_every_command_that_is_listed_may_run():
    from transformer.runtime import commands

    for name in commands.descriptions():
        commands.reject_non_commands(["python", *name.split(), "--workdir=x"])


def test_other_packages_may_import_this_one_while_they_are_run():
    from transformer.runtime import commands

    for argv in (
        ["python", "-m", "other.module", "transformer.training.train_step"],
        ["python", "-m", "transformer"],
        ["python"],
    ):
        commands.reject_non_commands(argv)
    with pytest.raises(SystemExit, match="2"):
        commands.reject_non_commands(["python", "-X", "utf8", "-m", "transformer.training.train_step"])


def test_train_and_eval_are_named_as_they_are_started(monkeypatch, tmp_path):
    from transformer.runtime import commands

    assert commands.spelled("eval") == "python eval.py"
    (tmp_path / "transformer").mkdir()
    monkeypatch.setattr(commands, "_PACKAGE", tmp_path / "transformer")  # as where the package is installed
    assert commands.spelled("train") == "transformer train"
