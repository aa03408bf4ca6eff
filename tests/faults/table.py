"""The matrix of faults: its rows, what became of each try, and the table that people read."""

import contextlib
import json
import pathlib
import time
import traceback
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import pytest

if TYPE_CHECKING:
    from tests.faults.world import World

NOT_HERE = {
    "A5": "several hosts: tests/distributed/test_multihost.py, test_many_hosts.py",
    "G3": "limits of a server: there is none",
}


class Row(NamedTuple):
    """A fault.

    full, quick: how many tries there are at least, so that a row which tries nothing is no success.
    """

    id: str
    what: str
    run: Callable[["World", "Tally"], None]
    full: int
    quick: int


ROWS: dict[str, Row] = {}


def row(id: str, what: str, *, full: int, quick: int) -> Callable:
    """Enters a function of (world, tally) into the matrix."""

    def enter(run: Callable) -> Callable:
        ROWS[id] = Row(id, what, run, full, quick)
        return run

    return enter


class Tally:
    """Counts the tries of one row, and keeps why some were lost."""

    def __init__(self, quick: bool):
        self.quick, self.tries, self.impossible, self.lost, self.notes = quick, 0, 0, [], []

    @contextlib.contextmanager
    def one(self, name: str) -> Iterator[None]:
        """One try: lost if anything is raised in it that it does not expect."""
        self.tries += 1
        try:
            yield
        except (Exception, pytest.fail.Exception) as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            self.lost.append(
                f"{name}: {type(error).__name__}: {error} ({pathlib.Path(place.filename).name}:{place.lineno})"
            )

    def skip(self, tries: int, why: str) -> None:
        """So many that cannot be made on this machine."""
        self.impossible += tries
        self.note(f"{tries} not tried: {why}")

    def note(self, text: str) -> None:
        """A figure for the table."""
        self.notes.append(text)


def run_row(name: str, world: "World", quick: bool) -> dict:
    """Tries a row; what the table says of it."""
    row, tally, begun = ROWS[name], Tally(quick), time.perf_counter()
    try:
        row.run(world, tally)
    except Exception:
        tally.tries += 1
        tally.lost.append(f"between two tries: {traceback.format_exc()}")
    least = (row.quick if quick else row.full) - tally.impossible
    if tally.tries < least:
        tally.lost.append(f"only {tally.tries} tries, expected at least {least}")
    return {
        "id": row.id,
        "fault": row.what,
        "tries": tally.tries,
        "survived": tally.tries - len(tally.lost),
        "lost": tally.lost,
        "notes": tally.notes,
        "seconds": round(time.perf_counter() - begun, 1),
    }


def as_markdown(result: list[dict]) -> str:
    """The table."""
    lines = ["| id | fault | tries | survived | lost | seconds | notes |", "|---|---|---|---|---|---|---|"]
    for one in result:
        cells = (one["tries"], one["survived"], len(one["lost"]), one["seconds"], "; ".join(one["notes"]))
        lines.append(f"| {one['id']} | {one['fault']} | " + " | ".join(map(str, cells)) + " |")
    lines += [f"| {name} | {why} | – | – | – | – | |" for name, why in NOT_HERE.items()]
    return "\n".join(lines) + "\n"


def write(folder: pathlib.Path, result: list[dict]) -> None:
    """faults.json and faults.md."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "faults.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    (folder / "faults.md").write_text(as_markdown(result))
