"""Commands of the package: the modules that `python -m transformer.NAME` runs, found in their source."""

import ast
import itertools
import pathlib
import sys
from collections.abc import Sequence

_PACKAGE = pathlib.Path(__file__).parent
_RUNS = '\nif __name__ == "__main__":\n'


def descriptions() -> dict[str, str]:
    """What to type after `python` → the first line of that command's docstring; imports none of them."""
    # train.py and eval.py lie beside the package, where it is not installed elsewhere.
    paths = [*(_PACKAGE.parent / f"{name}.py" for name in ("train", "eval")), *sorted(_PACKAGE.rglob("*.py"))]
    found = {}
    for path in paths:
        if path.is_file() and path != _PACKAGE / "__main__.py" and _RUNS in (text := path.read_text()):
            found[_typed(path)] = (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
    return found


def _typed(path: pathlib.Path) -> str:
    """What runs a file: its name, or -m and that of its module."""
    if path.parent == _PACKAGE.parent:
        return path.name
    module = ".".join(path.relative_to(_PACKAGE.parent).with_suffix("").parts)
    return f"-m {module.removesuffix('.__main__')}"


def refuse_others(argv: Sequence[str]) -> None:
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
