"""Lists the commands of the package: python -m transformer; `transformer NAME`, where it is installed, runs one."""

import difflib
import sys

import transformer
from transformer import command_line
from transformer.runtime import commands
from transformer.runtime.errors import UserError


def main(argv: list[str]) -> None:
    """Prints what there is to run, with a line on each."""
    show({f"python {typed}": what for typed, what in commands.descriptions().items()})


def show(descriptions: dict[str, str]) -> None:
    """On stdout."""
    width = max(map(len, descriptions))
    for typed, what in descriptions.items():
        print(f"{typed:<{width}}  {what}")
    print("\nEach has --help.")


def script() -> None:
    """The program `transformer`: runs the command that its first argument names, or lists them."""
    found = commands.find()
    if sys.argv[1:] and sys.argv[1] in found:
        commands.run(found[sys.argv[1]], sys.argv[2:])
    else:
        command_line.run(without_command)


def without_command(argv: list[str]) -> None:
    """What `transformer` does without the name of a command.

    Raises:
      UserError: its argument is no command.
    """
    found = commands.find()
    name = argv[1] if argv[1:] else "--help"
    if name == "--version":
        print(transformer.__version__)
    elif name in ("-h", "--help"):
        show({f"transformer {name}": commands.description(path) for name, path in found.items()})
    else:
        close = difflib.get_close_matches(name, found, 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise UserError(f"expected one of the commands {', '.join(found)}, got {name!r}{hint}")


if __name__ == "__main__":
    command_line.run(main)
