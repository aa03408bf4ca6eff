"""What every command shares: flags into a checked config, errors into a message and an exit code.

Exit codes: 0 done, 1 a failure inside, 2 bad usage, config or input, 3 the run diverged,
4 the workdir is held by another run or no checkpoint in it is sound, 143 / 130 saved and stopped
on SIGTERM / SIGINT.
"""

import argparse
import os
import sys
import traceback
from collections.abc import Callable

from transformer import config as configs
from transformer import validation
from transformer.errors import StoppedError, UserError


def run(command: Callable[[list[str]], object]) -> None:
    """Runs a command on sys.argv; errors a person can mend become one message and an exit code."""
    try:
        command(sys.argv)
        sys.stdout.flush()
    except (UserError, StoppedError) as error:
        print(f"{os.path.basename(sys.argv[0])}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        # The reader of our output went away. Python would complain once more while it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def use_huge_pages() -> None:
    """The first thing a training command does: starts anew with huge pages for memory from malloc.

    glibc reads that setting at the start of a process alone. XLA's CPU back end takes its buffers from
    malloc at every step and gives them back; with small pages a third of a training step's CPU time
    went into page faults (docs/log.md, 2026-11-20).
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def config_flags(argv: list[str]) -> tuple[configs.Config, list[str]]:
    """Reads --config=FILE and its --config.SECTION.FIELD=VALUE overrides; returns the rest of the arguments too.

    The order of the flags does not matter. JAX is not imported, unless the config file does.

    Raises:
      UserError: no such file, an error inside it, an unknown field, or a value that cannot be.
    """
    from absl import flags
    from ml_collections import config_flags as ml_flags

    mine, rest = _split(argv[1:])
    paths = [argument.partition("=")[2] for argument in mine if argument.startswith("--config=")]
    if len(paths) != 1 or not paths[0]:
        raise UserError(f"expected one --config=FILE, such as --config=configs/demo.py, got {len(paths)}")
    path = paths[0]
    if not os.path.isfile(path.partition(":")[0]):
        raise UserError(f"--config={path}: no such file; the configs that come with the project are in configs/")
    values = flags.FlagValues()
    overrides = [argument for argument in mine if not argument.startswith("--config=")]
    for argument in overrides:
        _check_name(argument)
    line = [argv[0], f"--config={path}", *overrides]
    ml_flags.DEFINE_config_file("config", lock_config=True, flag_values=values, sys_argv=line)
    try:
        values(line)
        loaded = values.config
    except flags.Error as error:
        raise UserError(str(error)) from error
    except Exception as error:  # whatever the config file, which is Python, may raise
        raise UserError(f"--config={path}: {_where(error, path)}{type(error).__name__}: {error}") from error
    return validation.resolve(loaded), rest


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """The --config flags, each as one --name=value, and all others."""
    mine, rest = [], []
    queue = list(arguments)
    while queue:
        argument = queue.pop(0)
        name = argument.partition("=")[0].lstrip("-")
        if not argument.startswith("-") or (name != "config" and not name.startswith("config.")):
            rest.append(argument)
            continue
        if "=" not in argument:
            if not queue or queue[0].startswith("--"):
                raise UserError(f"{argument}: expected a value, as in {argument}=VALUE")
            argument = f"{argument}={queue.pop(0)}"
        mine.append("--" + argument.lstrip("-"))
    return mine, rest


def _check_name(argument: str) -> None:
    """Refuses a field that does not exist, with the nearest that does."""
    parts = argument.partition("=")[0].removeprefix("--config.").split(".")
    validation.refuse_unknown("config", parts[:1], list(configs.SECTIONS))
    if len(parts) != 2:
        raise UserError(f"{argument}: expected --config.SECTION.FIELD=VALUE")
    validation.refuse_unknown(f"config.{parts[0]}", parts[1:], configs.field_names(parts[0]))


def _where(error: Exception, path: str) -> str:
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename.endswith(path)]
    return f"line {lines[-1]}: " if lines else ""


def positive_int(text: str) -> int:
    """An argparse type."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value


def say(message: str) -> None:
    """Tells the person at the terminal, on stderr; stdout is for results."""
    print(message, file=sys.stderr, flush=True)
