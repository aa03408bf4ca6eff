"""Closed, full and unread streams: a result that is lost is an error, a message that is lost is not."""

import io
import os
import re
import subprocess
import sys

import pytest

from transformer import translate
from transformer.runtime import logging

PROGRAM = """
import sys
from transformer import command_line
from transformer.runtime import logging

def command(argv):
    logging.log_info("a message")
    print("a result", flush="early" in argv)

command_line.run(command)
"""


def shell(command, root, **environment):
    """Runs a line of bash; its exit code is that of the first command of a pipe."""
    return subprocess.run(
        ["bash", "-c", f"{command}; exit ${{PIPESTATUS[0]}}"],
        capture_output=True,
        text=True,
        cwd=root,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(root), "PYTHONUNBUFFERED": "", **environment},
    )


@pytest.fixture
def sent(root, tmp_path):
    """Runs PROGRAM with redirections; gives the exit code, stdout and stderr."""

    def run(redirections, *arguments):
        (tmp_path / "program.py").write_text(PROGRAM)
        done = shell(" ".join([sys.executable, f"{tmp_path}/program.py", *arguments, redirections]), root)
        assert "Traceback" not in done.stderr
        assert "Exception ignored" not in done.stderr
        return done.returncode, done.stdout, done.stderr

    return run


@pytest.mark.reported
@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/full", "<&- 2>&-", "2> >(exec <&-)"])
def test_messages_that_cannot_be_written_are_lost_and_cost_nothing(sent, redirection):
    assert sent(redirection) == (0, "a result\n", "")


@pytest.mark.reported
@pytest.mark.parametrize("when", ["late", "early"])
@pytest.mark.parametrize(
    ("redirection", "reason"), [(">&-", "it is closed"), (">/dev/full", "No space left on device")]
)
def test_a_result_that_cannot_be_written_is_exit_code_2_with_a_message(sent, redirection, reason, when):
    code, printed, stderr = sent(redirection, when)
    assert (code, printed) == (2, "")
    assert stderr == f"a message\nprogram.py: the result could not be written to stdout: {reason}; send it elsewhere\n"


@pytest.mark.reported
def test_a_result_that_is_lost_is_exit_code_2_even_where_no_message_can_be(sent):
    assert sent(">&- 2>&-") == (2, "", "")


@pytest.mark.reported
@pytest.mark.parametrize("when", ["late", "early"])
def test_a_reader_that_has_gone_ends_a_command_as_sigpipe_does(sent, when):
    """Quietly, as of any command before `| head`."""
    assert sent("| (exec <&-)", when)[::2] == (141, "a message\n")


@pytest.mark.reported
def test_a_command_that_prints_no_result_needs_no_stdout(root):
    program = (
        "from transformer import command_line\nfrom transformer.runtime.logging import log_info\n"
        "command_line.run(lambda argv: log_info('trained'))"
    )
    done = shell(f'{sys.executable} -c "{program}" >&-', root)
    assert (done.returncode, done.stderr) == (0, "trained\n")


@pytest.mark.reported
def test_closed_numbers_are_not_given_to_files(root, tmp_path):
    """Else whatever a library prints to number 2 would go into that file."""
    program = f"""
import os
from transformer import command_line
def command(argv):
    with open('{tmp_path}/data', 'w') as file:
        assert file.fileno() > 2
        os.write(2, b'from a library')
command_line.run(command)
"""
    (tmp_path / "program.py").write_text(program)
    done = shell(f"{sys.executable} {tmp_path}/program.py <&- 2>&-", root)
    assert done.returncode == 0
    assert (tmp_path / "data").read_bytes() == b""


@pytest.mark.reported
def test_a_library_without_stderr_is_silent(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", None)
    logging.log_info("a warning")
    assert capsys.readouterr().out == ""


def test_every_command_keeps_these_promises(root):
    """Each runs by `command_line.run`, in which they are kept."""
    paths = [*root.glob("*.py"), *root.glob("transformer/**/*.py"), *root.glob("benchmarks/*.py")]
    blocks = {path.name: re.split('\nif __name__ == "__main__":\n', path.read_text())[1:] for path in paths}
    del blocks["torch_transformer.py"]  # imports nothing of this project
    commands = {name: block[0] for name, block in blocks.items() if block}
    assert {"train.py", "eval.py", "translate.py", "ablation.py"} <= commands.keys()
    for name, block in commands.items():
        assert re.search(r"^    (command_line\.)?run\(main\)$", block, re.MULTILINE), name


@pytest.mark.slow
@pytest.mark.reported
@pytest.mark.parametrize("command", ["train.py", "-m transformer.translate"])
def test_help_is_printed_on_a_terminal_that_knows_ascii_alone(root, command):
    done = shell(f"{sys.executable} {command} --help", root, LC_ALL="C", PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: ")
    assert done.stdout.isascii()
    assert "\\u" not in done.stdout


@pytest.mark.reported
def test_help_that_cannot_be_written_is_exit_code_2(root):
    done = shell(f"{sys.executable} train.py --help >/dev/full", root)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


class Terminal(io.BytesIO):
    """Takes bytes, and says that it is a terminal."""

    def isatty(self):
        return True


@pytest.mark.reported
def test_control_characters_of_data_are_escaped_on_a_terminal(monkeypatch):
    data, escaped = "a\x1b[2Jb\rc\x9bd\te\u2028f", "a\\x1b[2Jb\\x0dc\\x9bd\te\u2028f"
    for out, expected in ((Terminal(), escaped), (io.BytesIO(), data)):
        translate.translate_stream(list, [data, "g"], out, 2)
        assert out.getvalue().decode() == f"{expected}\ng\n"
    for out, expected in ((Terminal(), escaped), (io.BytesIO(), data)):
        monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(out, encoding="utf-8", newline="\n"))
        logging.log_info(data)
        assert out.getvalue().decode() == f"{expected}\n"


def test_the_streams_of_a_caller_are_left_to_it(capsys):
    from transformer.runtime import streams

    streams.prepare()
    print("a result")
    assert capsys.readouterr().out == "a result\n"
