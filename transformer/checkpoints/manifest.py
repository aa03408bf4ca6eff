"""The manifest of a checkpoint: its metrics, and size and SHA-256 of its files and of itself."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from etils import epath

from transformer.runtime.files import json_digest, sha256

MANIFEST = "manifest.json"
NUM_THREADS = 4  # that hash files

Metrics = dict[str, float]


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The manifest of a checkpoint.

    Attributes:
      data: digests of the training and validation data.
      host: the environment that it was computed in, see `runtime.environment.fingerprint`.
      files: path below the checkpoint → size and SHA-256.
      run_id: of the run that saved it; empty if an earlier version did.
      base_run_id: of the run that `train.init_from` names; empty without one, or if that has no id.
      scored_config: the config that validation used, as JSON; empty if the checkpoint's own scores alike.
    """

    metrics: Metrics
    data: dict[str, str]
    host: dict[str, str]
    files: dict[str, tuple[int, str]]
    run_id: str = ""
    base_run_id: str = ""
    scored_config: str = ""

    def to_json(self) -> str:
        """Serializes the manifest, with a digest of itself."""
        values = dataclasses.asdict(self)
        return json.dumps({**values, "sha256": json_digest(values)}, indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Manifest":
        """Parses a manifest; raises a ValueError, TypeError, AttributeError or KeyError unless it is as written."""
        values = json.loads(text)
        if values.pop("sha256") != json_digest(values):
            raise ValueError("it has changed since it was written")
        metrics = {str(name): float(value) for name, value in values["metrics"].items()}
        host = {str(name): str(value) for name, value in values["host"].items()}
        files = {str(name): (int(size), str(digest)) for name, (size, digest) in values["files"].items()}
        data = {str(name): str(digest) for name, digest in values["data"].items()}
        optional = (str(values.get(name, "")) for name in ("run_id", "base_run_id", "scored_config"))
        return cls(metrics, data, host, files, *optional)


class FileHasher(contextlib.AbstractContextManager):
    """Hashes files in background threads; use as a context."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(NUM_THREADS)
        self._results: dict[epath.Path, Future[tuple[int, str]]] = {}

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def add(self, folder: epath.Path) -> None:
        """Starts to hash the files below a folder, except those added before."""
        for path in iter_files(folder):
            if path not in self._results:
                self._results[path] = self._pool.submit(lambda path: (path.stat().length, sha256(path)), path)

    def digests(self, folder: epath.Path) -> dict[str, tuple[int, str]]:
        """Waits for size and SHA-256 of each file, by its path below `folder`."""
        return {str(path.relative_to(folder)): future.result() for path, future in self._results.items()}


def iter_files(folder: epath.Path) -> Iterator[epath.Path]:
    """Yields all files below a checkpoint but its manifest and those that a file manager or NFS may leave."""
    for path in folder.iterdir():
        if path.name.startswith(".") or path.name == MANIFEST or path.name.endswith(".partial"):
            continue
        if path.is_dir():
            yield from iter_files(path)
        else:
            yield path
