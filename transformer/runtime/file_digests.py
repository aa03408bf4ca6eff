"""SHA-256 of many files: computed in threads, and only for files that have changed since they were last read whole.

A JSON file has for each path its size, times, inode and digest, and when it was read. A file is read again if any of
them is different now, or if it was written so shortly before that a change could have left its times the same.
"""

import concurrent.futures
import contextlib
import hashlib
import json
import os
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from transformer.runtime import environment, progress
from transformer.runtime.files import file_lock, write_atomic

MAX_THREADS = 16
TIME_GRANULARITY_NS = 20_000_000  # two writes this close may leave equal times
_BLOCK = 1 << 20

Stamp = list[int]  # size, mtime, ctime, inode


class _Entry(NamedTuple):
    """What is known of a file; `read_at` in nanoseconds since 1970."""

    stamp: Stamp
    sha256: str
    read_at: int


class FileDigests:
    """The digests of files, by a cache that processes share.

    Args:
      cache: the JSON file; beside the user's other caches if its folder cannot be written.
    """

    def __init__(self, cache: os.PathLike | str):
        path = pathlib.Path(os.path.abspath(cache))
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(path.parent, os.W_OK):
            name = f"{hashlib.sha256(os.fsencode(path)).hexdigest()[:24]}.json"
            path = environment.cache_folder() / "digests" / name
            with contextlib.suppress(OSError):
                path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path

    @classmethod
    def beside(cls, folder: os.PathLike | str) -> "FileDigests":
        """The digests of the files of a folder, cached beside it."""
        path = pathlib.Path(folder)
        return cls(path.parent / f".digests-{path.name}.json")

    def compute(self, paths: Sequence[os.PathLike | str], what: str) -> dict[str, str]:
        """Path → digest in hexadecimal; processes that need the same files wait for the first.

        Args:
          paths: of local files.
          what: names the phase that is shown while files are read.

        Raises:
          OSError: a file is missing or cannot be read.
        """
        names = [os.path.abspath(path) for path in paths]
        entries = self._load()
        if self._changed(names, entries):
            with file_lock(self._path.parent, name=f"{self._path.name}.lock"):
                entries = self._load()
                if changed := self._changed(names, entries):
                    entries = self._save(entries, _hash_all(changed, what))
        return {os.fspath(path): entries[name].sha256 for path, name in zip(paths, names, strict=True)}

    def record(self, digests: Mapping[str, str]) -> None:
        """Records the digests of files that this process has just written."""
        with file_lock(self._path.parent, name=f"{self._path.name}.lock"):
            new = {os.path.abspath(path): (stamp(path), digest) for path, digest in digests.items()}
            self._save(self._load(), new)

    def _changed(self, names: Sequence[str], entries: Mapping[str, _Entry]) -> list[str]:
        """The files that have to be read."""
        changed = []
        for name in dict.fromkeys(names):
            now, entry = stamp(name), entries.get(name)
            if entry is None or now != entry.stamp or _last_write(now) + TIME_GRANULARITY_NS > entry.read_at:
                changed.append(name)
        return changed

    def _save(self, entries: dict[str, _Entry], new: Mapping[str, tuple[Stamp, str]]) -> dict[str, _Entry]:
        """Adds entries and writes them all, but those of files that are gone; returns them."""
        # A file that was written a moment ago would be read again next time.
        wait = max((_last_write(times) for times, _ in new.values()), default=0) + TIME_GRANULARITY_NS - time.time_ns()
        time.sleep(min(max(wait + 1, 0), 2 * TIME_GRANULARITY_NS) / 1e9)
        now = time.time_ns()
        entries = {name: entry for name, entry in entries.items() if os.path.exists(name)}
        entries |= {name: _Entry(times, digest, now) for name, (times, digest) in new.items()}
        with contextlib.suppress(OSError):  # then they are read again next time
            write_atomic(self._path, json.dumps(entries, indent=0))
        return entries

    def _load(self) -> dict[str, _Entry]:
        try:
            entries = json.loads(self._path.read_bytes())
            return {name: _Entry(list(times), str(digest), int(at)) for name, (times, digest, at) in entries.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            return {}


def stamp(path: os.PathLike | str) -> Stamp:
    """What changes when a file is written: size, times and inode."""
    status = os.stat(path)
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _last_write(times: Stamp) -> int:
    return max(times[1:3])


def _hash_all(names: Sequence[str], what: str) -> dict[str, tuple[Stamp, str]]:
    """Stamp and digest of each file; the stamp is that of before it was read."""
    stamps = {name: stamp(name) for name in names}
    workers = max(min(MAX_THREADS, len(names), environment.available_cpus()), 1)
    total = sum(times[0] for times in stamps.values()) // _BLOCK
    with (
        progress.phase(what, total, "MB") as phase,
        concurrent.futures.ThreadPoolExecutor(workers, "digests") as pool,
    ):
        digests = pool.map(lambda name: hash_file(name, phase), names)
        return {name: (stamps[name], digest) for name, digest in zip(names, digests, strict=True)}


def hash_file(path: str, phase: progress.Phase) -> str:
    """SHA-256 of a file, in hexadecimal; advances the phase by a unit a MiB."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(_BLOCK))
    with open(path, "rb", buffering=0) as file:
        while size := file.readinto(buffer):
            digest.update(buffer[:size])
            phase.advance(int(size == _BLOCK))
    return digest.hexdigest()
