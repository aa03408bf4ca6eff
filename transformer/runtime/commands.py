"""Discovers the commands in the source of the package: train, eval, and those of `python -m transformer.NAME`."""

import ast
import itertools
import pathlib
import runpy
import sys
from collections.abc import Sequence

_PACKAGE = pathlib.Path(__file__).parent.parent
_MAIN_GUARD = '\nif __name__ == "__main__":\n'


def find() -> dict[str, pathlib.Path]:
    """The name and file of each command; imports none of them.

    train.py and eval.py are beside the package in a checkout, and inside it if it is installed.
    """
    train_and_eval = [folder / f"{name}.py" for name in ("train", "eval") for folder in (_PACKAGE, _PACKAGE.parent)]
    files: dict[str, pathlib.Path] = {}
    for path in [*train_and_eval, *sorted(_PACKAGE.rglob("*.py"))]:
        if path.is_file() and path != _PACKAGE / "__main__.py" and _MAIN_GUARD in path.read_text():
            files.setdefault(_module(path).removeprefix(f"{_PACKAGE.name}."), path)
    return files


def spelled(name: str) -> str:
    """How train or eval is started: by its file in a checkout, by the program where the package is installed."""
    return f"python {name}.py" if (_PACKAGE.parent / f"{name}.py").is_file() else f"transformer {name}"


def _module(path: pathlib.Path) -> str:
    """The module name of a file for -m; train or eval for those beside the package."""
    module = ".".join(path.relative_to(_PACKAGE.parent).with_suffix("").parts)
    return module.removesuffix(".__main__")


def descriptions() -> dict[str, str]:
    """Arguments of `python` → first line of the docstring, for each command."""
    return {
        path.name if path.parent == _PACKAGE.parent else f"-m {_module(path)}": description(path)
        for path in find().values()
    }


def description(path: pathlib.Path) -> str:
    """The first line of a command's docstring."""
    return (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]


def run(path: pathlib.Path, arguments: Sequence[str]) -> None:
    """Runs a command with these arguments, as Python would."""
    sys.argv = [str(path), *arguments]
    if path.parent == _PACKAGE.parent:
        runpy.run_path(str(path), run_name="__main__")
    else:
        runpy.run_module(_module(path), run_name="__main__", alter_sys=True)


def reject_non_commands(argv: Sequence[str]) -> None:
    """Exits with code 2 if the process was started as `python -m transformer.NAME` and NAME is not a command.

    Python would run such a module silently and exit with code 0.

    Args:
      argv: `sys.orig_argv`.
    """
    name = next((value for flag, value in itertools.pairwise(argv) if flag == "-m"), "")
    package, _, rest = name.partition(".")
    if package != _PACKAGE.name or not rest:
        return
    path = _PACKAGE.joinpath(*rest.split("."))
    files = [file for file in (path.with_suffix(".py"), path / "__main__.py") if file.is_file()]
    if not any(_MAIN_GUARD in file.read_text() for file in files):
        reason = "a module, not a command" if files else "not a command"
        if sys.stderr is not None:
            print(f"python -m {name}: this is {reason}; python -m {_PACKAGE.name} lists the commands", file=sys.stderr)
        sys.exit(2)
