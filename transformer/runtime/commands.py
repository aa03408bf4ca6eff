"""Commands of the package, found in its source: train, eval, and what `python -m transformer.NAME` runs."""

import ast
import itertools
import pathlib
import runpy
import sys
from collections.abc import Sequence

_PACKAGE = pathlib.Path(__file__).parent.parent
_RUNS = '\nif __name__ == "__main__":\n'


def find() -> dict[str, pathlib.Path]:
    """The name of each command and its file; imports none of them.

    train.py and eval.py lie beside the package in a checkout, and in it where it is installed.
    """
    both = [folder / f"{name}.py" for name in ("train", "eval") for folder in (_PACKAGE, _PACKAGE.parent)]
    found: dict[str, pathlib.Path] = {}
    for path in [*both, *sorted(_PACKAGE.rglob("*.py"))]:
        if path.is_file() and path != _PACKAGE / "__main__.py" and _RUNS in path.read_text():
            found.setdefault(_module(path).removeprefix(f"{_PACKAGE.name}."), path)
    return found


def _module(path: pathlib.Path) -> str:
    """What -m takes to run a file; train or eval for those beside the package."""
    module = ".".join(path.relative_to(_PACKAGE.parent).with_suffix("").parts)
    return module.removesuffix(".__main__")


def descriptions() -> dict[str, str]:
    """What to type after `python` → the first line of that command's docstring."""
    return {_invocation(path): description(path) for path in find().values()}


def _invocation(path: pathlib.Path) -> str:
    """What runs a file: its name, or -m and that of its module."""
    return path.name if path.parent == _PACKAGE.parent else f"-m {_module(path)}"


def description(path: pathlib.Path) -> str:
    """The first line of a command's docstring."""
    return (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]


def run(path: pathlib.Path, arguments: Sequence[str]) -> None:
    """Runs a command as Python would, with these arguments."""
    sys.argv = [str(path), *arguments]
    if path.parent == _PACKAGE.parent:
        runpy.run_path(str(path), run_name="__main__")
    else:
        runpy.run_module(_module(path), run_name="__main__", alter_sys=True)


def reject_non_commands(argv: Sequence[str]) -> None:
    """Ends a process that was started as `python -m transformer.NAME` where that is no command, with exit code 2.

    Python would run such a module to its end, in silence and with exit code 0.

    Args:
      argv: as `sys.orig_argv`.
    """
    name = next((after for flag, after in itertools.pairwise(argv) if flag == "-m"), "")
    package, _, rest = name.partition(".")
    if package != _PACKAGE.name or not rest:
        return
    path = _PACKAGE.joinpath(*rest.split("."))
    files = [file for file in (path.with_suffix(".py"), path / "__main__.py") if file.is_file()]
    if not any(_RUNS in file.read_text() for file in files):
        what = "a module, and no command" if files else "no command"
        if sys.stderr is not None:
            print(f"python -m {name}: this is {what}; python -m {_PACKAGE.name} lists the commands", file=sys.stderr)
        sys.exit(2)
