"""What a checkpoint says of itself, in a file that vouches for all others and for itself."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from etils import epath

from transformer.files import sha256

MANIFEST = "manifest.json"
THREADS = 4  # that read and digest files

Metrics = dict[str, float]


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself: its metrics, the digest of the training data, its host, and its files."""

    metrics: Metrics
    data: str
    host: dict[str, str]
    files: dict[str, tuple[int, str]]

    def to_json(self) -> str:
        """As it is written, with a digest of itself."""
        values = dataclasses.asdict(self)
        return json.dumps({**values, "sha256": _digest_of_values(values)}, indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Manifest":
        """Reads it again; a ValueError, TypeError, AttributeError or KeyError if it is not what was written."""
        values = json.loads(text)
        digest = values.pop("sha256", None)
        if digest is None and values.keys() == {"metrics", "data", "files"}:  # of a version that wrote no digest
            values["host"] = {}
        elif digest != _digest_of_values(values):
            raise ValueError("it has changed since it was written")
        metrics = {str(name): float(value) for name, value in values["metrics"].items()}
        host = {str(name): str(value) for name, value in values["host"].items()}
        files = {str(name): (int(size), str(digest)) for name, (size, digest) in values["files"].items()}
        return cls(metrics, str(values["data"]), host, files)


def digests(paths: Iterable[epath.Path]) -> list[tuple[int, str]]:
    """Size and SHA-256 of files, several at once."""
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(lambda path: (path.stat().length, sha256(path)), paths))


def _digest_of_values(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
