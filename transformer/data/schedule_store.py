"""Keeps the arrays of a batch schedule: in memory, or in files that the processes of a node map and share.

A file is made by the first process that needs it, in the smallest integers, and ends in a SHA-256 of the rest. It can
be deleted at any time.
"""

import contextlib
import hashlib
import os
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from transformer.runtime import files
from transformer.runtime.logging import log_info

Facts = dict[str, Any]  # JSON

FACTS_FILE = "schedule.json"
KEPT_EPOCHS = 2  # the newest and the one before it, to which the batches being prefetched may belong


class Store:
    """Keeps nothing: each schedule computes for itself."""

    def facts(self, make: Callable[[], Facts]) -> Facts:
        """What `make` returned, perhaps the first time it was called."""
        return make()

    def array(self, name: str, make: Callable[[], np.ndarray], size: int) -> np.ndarray:
        """The array of `size` integers that `make` returned, perhaps the first time it was called for this name."""
        return make()


class FileStore(Store):
    """Keeps arrays as files of a folder; where it cannot be written, each process computes for itself."""

    def __init__(self, folder: os.PathLike | str):
        self._folder = pathlib.Path(folder)

    def facts(self, make: Callable[[], Facts]) -> Facts:
        """As in `Store`; floats and integers come back exactly."""
        path = self._folder / FACTS_FILE
        if (facts := _read_facts(path)) is not None:
            return facts
        with self._locked():
            if (facts := _read_facts(path)) is None:
                facts = make()
                self._write(path, files.checksummed_json(facts))
        return facts

    def array(self, name: str, make: Callable[[], np.ndarray], size: int) -> np.ndarray:
        """As in `Store`; deletes the files of old epochs when one of a new epoch is made."""
        path = self._folder / f"{name}.npy"
        if (mapped := _map(path, size)) is not None:
            return mapped
        with self._locked():
            if (mapped := _map(path, size)) is not None:
                return mapped
            made = make()
            if self._write(path, made) and (mapped := _map(path, size)) is not None:
                self._delete_old_epochs()
                return mapped
            return made

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
        with files.file_lock(self._folder):
            yield

    def _write(self, path: pathlib.Path, content: bytes | np.ndarray) -> bool:
        """Writes a file atomically, with the digest of an array after it; returns whether that was possible."""
        try:
            for partial in self._folder.glob(f"{path.name}.*.partial"):  # of a process that was killed
                partial.unlink(missing_ok=True)
            with files.open_atomic(path) as file:
                if isinstance(content, bytes):
                    file.write(content)
                else:
                    np.lib.format.write_array(file, content, allow_pickle=False)
                    file.write(hashlib.sha256(content.data).digest())
            return True
        except OSError as error:
            log_info(f"{path}: cannot be written ({error}): every process of this node keeps its own in memory")
            return False

    def _delete_old_epochs(self) -> None:
        epochs = {}
        for path in self._folder.glob("epoch-*.npy"):
            if match := re.fullmatch(r"epoch-(\d+)\.npy", path.name):
                with contextlib.suppress(FileNotFoundError):  # another run has deleted it
                    epochs[path] = (path.stat().st_mtime_ns, int(match[1]))
        for path in sorted(epochs, key=epochs.__getitem__)[:-KEPT_EPOCHS]:
            path.unlink(missing_ok=True)  # processes that map it keep it


def _read_facts(path: pathlib.Path) -> Facts | None:
    """None if they are missing or damaged."""
    try:
        return files.parse_checksummed_json(path.read_bytes())
    except OSError:
        return None


def _map(path: pathlib.Path, size: int) -> np.ndarray | None:
    """Maps an array into memory; None if it is missing, damaged or of another size."""
    try:
        mapped = np.load(path, mmap_mode="r", allow_pickle=False)
        with path.open("rb") as file:  # which another run may have deleted
            file.seek(-hashlib.sha256().digest_size, os.SEEK_END)
            digest = file.read()
    except (OSError, ValueError, EOFError):
        return None
    is_same = mapped.ndim == 1 and len(mapped) == size and hashlib.sha256(mapped).digest() == digest
    return mapped if is_same else None
