"""Lists the commands of the package: python -m transformer."""

from transformer import command_line


def main(argv: list[str]) -> None:
    """Prints what there is to run, with a line on each."""
    found = command_line.descriptions()
    width = max(map(len, found))
    for name, what in found.items():
        print(f"python {name:<{width}}  {what}")
    print("\nEach has --help.")


if __name__ == "__main__":
    command_line.run(main)
