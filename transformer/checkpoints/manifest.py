"""What a checkpoint says of itself, in a file that vouches for all others and for itself."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from etils import epath

from transformer.runtime.files import sha256

MANIFEST = "manifest.json"
NUM_THREADS = 4  # that read and digest files

Metrics = dict[str, float]


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself: its metrics, digests of its data by kind, its host, and its files.

    Attributes:
      run_id: of the run that saved it, the same from its first update on; empty where an earlier version saved it.
      base_run_id: of the run that `train.init_from` names; empty if there is none, or it has none.
    """

    metrics: Metrics
    data: dict[str, str]
    host: dict[str, str]
    files: dict[str, tuple[int, str]]
    run_id: str = ""
    base_run_id: str = ""

    def to_json(self) -> str:
        """As it is written, with a digest of itself."""
        values = dataclasses.asdict(self)
        return json.dumps({**values, "sha256": _digest_of_values(values)}, indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Manifest":
        """Reads it again; a ValueError, TypeError, AttributeError or KeyError if it is not what was written."""
        values = json.loads(text)
        if values.pop("sha256") != _digest_of_values(values):
            raise ValueError("it has changed since it was written")
        metrics = {str(name): float(value) for name, value in values["metrics"].items()}
        host = {str(name): str(value) for name, value in values["host"].items()}
        files = {str(name): (int(size), str(digest)) for name, (size, digest) in values["files"].items()}
        data = {str(name): str(digest) for name, digest in values["data"].items()}
        return cls(metrics, data, host, files, str(values.get("run_id", "")), str(values.get("base_run_id", "")))


class FileHasher:
    """Takes the digests of files, several at once and in the background; use as a context."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(NUM_THREADS)
        self._found: dict[epath.Path, Future[tuple[int, str]]] = {}

    def __enter__(self) -> "FileHasher":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def add(self, folder: epath.Path) -> None:
        """Begins with the files below a folder that are not known yet."""
        for path in iter_files(folder):
            if path not in self._found:
                self._found[path] = self._pool.submit(lambda path: (path.stat().length, sha256(path)), path)

    def below(self, folder: epath.Path) -> dict[str, tuple[int, str]]:
        """Size and SHA-256 of each file, by its path below `folder`; waits for them."""
        return {str(path.relative_to(folder)): future.result() for path, future in self._found.items()}


def iter_files(folder: epath.Path) -> Iterator[epath.Path]:
    """All files below a checkpoint but its manifest, and those that a file manager or NFS may leave."""
    for path in folder.iterdir():
        if path.name.startswith(".") or path.name == MANIFEST or path.name.endswith(".partial"):
            continue
        if path.is_dir():
            yield from iter_files(path)
        else:
            yield path


def _digest_of_values(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
