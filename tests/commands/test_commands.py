"""`python -m transformer` and its modules: commands are listed, others refused."""

import subprocess
import sys

import pytest


def run(root, *arguments):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=60, cwd=root)


@pytest.mark.reported
@pytest.mark.parametrize(
    ("module", "what"),
    [
        ("training.train_step", "a module, and no command"),
        ("data.corpus", "a module, and no command"),
        ("trnslate", "no command"),
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
    others = {"translate", "prepare", "benchmark", "plan", "export"}
    assert {f"python -m transformer.{name}" for name in others} | {"python eval.py"} < names
    assert "python -m transformer" not in names
    (line,) = (line for line in lines if "transformer.prepare " in line)
    assert line.endswith("Makes the data of a config ahead of training: sentence pairs, vocabulary and token ids.")


def test_every_command_that_is_listed_may_run():
    from transformer import command_line

    for name in command_line.descriptions():
        command_line.refuse_others(["python", *name.split(), "--workdir=x"])


def test_other_packages_may_import_this_one_while_they_are_run():
    from transformer import command_line

    for argv in (
        ["python", "-m", "other.module", "transformer.training.train_step"],
        ["python", "-m", "transformer"],
        ["python"],
    ):
        command_line.refuse_others(argv)
    with pytest.raises(SystemExit, match="2"):
        command_line.refuse_others(["python", "-X", "utf8", "-m", "transformer.training.train_step"])
