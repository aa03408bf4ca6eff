"""Lists the commands, or runs the one that is named: python -m transformer, or `transformer` where installed."""

import difflib
import os

import transformer
from transformer import command_line
from transformer.runtime import commands
from transformer.runtime.errors import UserError


def main(argv: list[str]) -> None:
    """Runs the command that the first argument names, with the others; without it prints what there is to run.

    Raises:
      UserError: its first argument is no command.
    """
    found = commands.find()
    name = argv[1] if argv[1:] else "--help"
    if name in found:
        commands.run(found[name], argv[2:])
    elif name == "--version":
        print(transformer.__version__)
    elif name in ("-h", "--help"):
        by_module = {f"python {typed}": what for typed, what in commands.descriptions().items()}
        by_name = {f"transformer {name}": commands.description(path) for name, path in found.items()}
        show(by_module if os.path.basename(argv[0]) == "__main__.py" else by_name)
    else:
        close = difflib.get_close_matches(name, found, 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise UserError(f"expected one of the commands {', '.join(found)}, got {name!r}{hint}")


def show(descriptions: dict[str, str]) -> None:
    """What to type, and what it does."""
    width = max(map(len, descriptions))
    for typed, what in descriptions.items():
        print(f"{typed:<{width}}  {what}")
    print("\nEach has --help.")


def script() -> None:
    """The program `transformer`."""
    command_line.run(main)


if __name__ == "__main__":
    command_line.run(main)
