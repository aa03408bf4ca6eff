"""Lists the commands or runs one: `python -m transformer [NAME]`, or `transformer [NAME]` if installed."""

import difflib
import os

import transformer
from transformer import command_line
from transformer.runtime import commands
from transformer.runtime.errors import UserError


def main(argv: list[str]) -> None:
    """Runs the command named by the first argument with the other arguments; without arguments lists the commands.

    Raises:
      UserError: the first argument is not a command.
    """
    files = commands.find()
    name = argv[1] if argv[1:] else "--help"
    if name in files:
        commands.run(files[name], argv[2:])
    elif name == "--version":
        print(transformer.__version__)
    elif name in ("-h", "--help"):
        by_module = {f"python {arguments}": text for arguments, text in commands.descriptions().items()}
        by_name = {f"transformer {name}": commands.description(path) for name, path in files.items()}
        show(by_module if os.path.basename(argv[0]) == "__main__.py" else by_name)
    else:
        close = difflib.get_close_matches(name, files, 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise UserError(f"expected one of the commands {', '.join(files)}, got {name!r}{hint}")


def show(descriptions: dict[str, str]) -> None:
    """Prints command lines with their descriptions."""
    width = max(map(len, descriptions))
    for command, text in descriptions.items():
        print(f"{command:<{width}}  {text}")
    print("\nEach has --help.")


def script() -> None:
    """The entry point of the program `transformer`."""
    command_line.run(main)


if __name__ == "__main__":
    command_line.run(main)
