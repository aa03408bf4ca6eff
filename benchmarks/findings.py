"""Results of a measurement, saved after each figure, so that an interruption loses only the current one."""

import contextlib
import json
import pathlib
from typing import Any

from benchmarks import kernel_times
from benchmarks.kernel_times import KernelTime
from transformer.runtime import files

Row = dict[str, Any]


class Findings:
    """Results of one phase of `benchmarks.accelerator`.

    Attributes:
      options: its flags.
      ceiling: FLOPs a second of a large matrix product on this machine; 0 if not measured.
      row: the figures by name.
    """

    def __init__(self, name: str, path: pathlib.Path, options: Any, ceiling: float):
        self.options, self.smoke, self.ceiling = options, bool(options.smoke), ceiling
        self.name, self._path = name, path
        self.row: Row = {}

    def put(self, **more: Any) -> None:
        self.row.update(more)
        files.write_atomic(self._path, json.dumps(self.row, default=str))

    def add(self, group: str, key: str, value: Any) -> None:
        """Adds one of a group of figures."""
        self.put(**{group: {**self.row.get(group, {}), key: value}})

    def put_kernels(self, times: list[KernelTime]) -> None:
        """Adds a summary; writes all times to kernels.json."""
        self.put(profile=kernel_times.summary(times))
        path = pathlib.Path(self.options.output, "kernels.json")
        files.write_atomic(path, json.dumps({**read_json(path), self.name: times[:1500]}))


def read_json(path: pathlib.Path) -> Row:
    """A JSON object from a file; {} if it is missing."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads(path.read_text())
    return {}
