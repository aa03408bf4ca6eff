"""Runs the matrix of faults: python -m tests.faults [--quick] [--only=A1,B1] [--output=DIR].

Prints a line for each row as it ends and the table at the end, and writes both to the folder as faults.json and
faults.md. Exit code 1 if anything was lost.
"""

import argparse
import os
import pathlib
import sys
import tempfile

os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1" if "--quick" in sys.argv else "0")

import tests.conftest
from tests.faults import table
from tests.faults.matrix import ALL
from tests.faults.world import World


def main() -> int:
    """Reads the flags, runs the rows."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer tries of each, about two minutes")
    parser.add_argument("--only", default="", help="ids of rows, with commas between")
    parser.add_argument("--output", type=pathlib.Path, default=tests.conftest.ROOT / "runs" / "faults")
    args = parser.parse_args()
    names = [name.strip() for name in args.only.split(",") if name.strip()] or list(ALL)
    unknown = [name for name in names if name not in ALL]
    if unknown:
        parser.error(f"--only: no row {unknown[0]!r}; there are {', '.join(ALL)}")
    result = []
    with tempfile.TemporaryDirectory(prefix="faults") as folder:
        world = World(pathlib.Path(folder))
        for name in names:
            result.append(table.run_row(name, world, args.quick))
            one = result[-1]
            print(f"{name}: {one['survived']} of {one['tries']} survived, {one['seconds']} s", file=sys.stderr)
            print("".join(f"  LOST {why}\n" for why in one["lost"]), end="", file=sys.stderr, flush=True)
            table.write(args.output, result)
    print(table.as_markdown(result))
    print(f"{args.output}/faults.md, {args.output}/faults.json")
    return int(any(one["lost"] for one in result))


if __name__ == "__main__":
    sys.exit(main())
