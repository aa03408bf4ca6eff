"""Object storage, gs:// and s3://: what it lacks of a file system, made up for.

An object appears whole, and only whole, when it is written. But nothing there can be appended to, renamed at
once or locked. So a log is written beside and copied as it grows, what has several files is complete when its
last one is there, and a lock is an object that its holder touches again and again.
"""

import contextlib
import glob
import hashlib
import importlib.util
import json
import os
import pathlib
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from etils import epath

PACKAGES = {"gs": "gcsfs", "s3": "s3fs"}
LOCK_REFRESH_S = 5.0  # seconds between two touches of a lock
LOCK_TIMEOUT_S = 25.0  # seconds without one after which its holder is taken for dead
LOCK_SETTLE_S = 1.0  # seconds in which two that take a lock at once find out, where the storage does not say it at once
SYNC_INTERVAL_S = 20.0  # seconds between two copies of a log


def is_remote(path: epath.PathLike) -> bool:
    """Whether a path is an address in object storage."""
    return "://" in os.fspath(path)


def unsupported_reason(path: epath.PathLike) -> str | None:
    """Why an address cannot be used, if so; None for addresses that can, and for all other paths."""
    kind, _, rest = os.fspath(path).partition("://")
    if not rest:
        return None
    if kind not in PACKAGES:
        return f"expected a local path, gs://BUCKET/… or s3://BUCKET/…, got {path}"
    if glob.has_magic(rest):
        return f"expected an address without the wildcards * ? [, which storage would expand, got {path}"
    if importlib.util.find_spec(PACKAGES[kind]) is None:
        return f"{kind}:// needs the package {PACKAGES[kind]}: pip install {PACKAGES[kind]}"
    return None


def filesystem(path: epath.PathLike) -> Any:
    """The fsspec file system of an address, which asks the storage again for every listing: others write there too."""
    import fsspec

    for kind in ("gs", "gcs", "s3"):
        fsspec.config.conf.setdefault(kind, {})["use_listings_cache"] = False
    return epath.Path(path)._backend.fs(os.fspath(path)) if is_remote(path) else fsspec.filesystem("file")


def is_storage_error(error: BaseException) -> bool:
    """Whether an error is what storage says of a path, as OSError is of a file: of access, buckets or the network."""
    return type(error).__module__.split(".")[0] in ("gcsfs", "s3fs", "botocore", "aiobotocore", "aiohttp", "google")


def upload(local: epath.PathLike, folder: epath.PathLike) -> None:
    """Copies all files below a local folder; the storage has them all when it returns."""
    root = pathlib.Path(local)
    names = [path.relative_to(root).as_posix() for path in sorted(root.rglob("*")) if path.is_file()]
    filesystem(folder).put([str(root / name) for name in names], [f"{folder}/{name}" for name in names])


def download(folder: epath.PathLike, local: epath.PathLike) -> None:
    """Copies all objects below an address into a local folder."""
    files = filesystem(folder)
    root = files._strip_protocol(os.fspath(folder))
    found = [path for path in files.find(root) if not path.endswith("/")]
    places = [os.path.join(local, os.path.relpath(path, root)) for path in found]
    for place in places:
        os.makedirs(os.path.dirname(place), exist_ok=True)
    files.get(found, places)


def needs_staging(folder: epath.PathLike) -> bool:
    """Whether Orbax cannot write and read there itself: TensorStore could on S3, but Orbax 0.12 does not ask it."""
    return os.fspath(folder).startswith("s3://")


@contextlib.contextmanager
def staged_write(folder: epath.Path) -> Iterator[epath.Path]:
    """Where to write what is to be in a folder: that folder, or a local one that is uploaded at the end."""
    if not needs_staging(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="upload-") as local:
        yield epath.Path(local)
        upload(local, folder)


@contextlib.contextmanager
def staged_read(folder: epath.Path) -> Iterator[epath.Path]:
    """Where to read what is in a folder: that folder, or a local copy."""
    if not needs_staging(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="download-") as local:
        download(folder, local)
        yield epath.Path(local)


class SyncedDirectory:
    """A local folder of files that grow, copied to an address every now and then; a local address is that folder.

    Attributes:
      folder: to write in.
    """

    def __init__(self, address: epath.Path, *names: str):
        self._address = address if is_remote(address) else None
        self.folder = epath.Path(tempfile.mkdtemp(prefix="log-")) if self._address else address
        self._copied = time.monotonic()
        for name in names:
            if self._address and (self._address / name).exists():
                (self.folder / name).write_bytes((self._address / name).read_bytes())

    def sync(self, now: bool = False) -> None:
        """Copies what there is, if it is time or asked for."""
        if self._address and (now or time.monotonic() - self._copied > SYNC_INTERVAL_S):
            upload(self.folder, self._address)
            self._copied = time.monotonic()

    def close(self) -> None:
        """Copies for the last time."""
        self.sync(now=True)
        if self._address:
            shutil.rmtree(self.folder, ignore_errors=True)


class LockHeldError(Exception):
    """A lock that another process holds; the message says who."""


class Lock:
    """An object that says who holds a folder, and is written again every few seconds as long as that is so.

    Args:
      who: this process, for people.
      lost: called, in a thread, if another process took the lock meanwhile: it was taken for dead.

    Raises:
      Held: another process is alive and has it.
    """

    def __init__(self, path: epath.Path, who: str, lost: Callable[[str], None]):
        self._path, self._who, self._lost = path, who, lost
        self._files, self._mine, self._beats = filesystem(path), uuid.uuid4().hex, 0
        self._over = threading.Event()
        self._take()
        threading.Thread(target=self._keep, name="lock", daemon=True).start()

    def close(self) -> None:
        """Gives the folder free."""
        self._over.set()
        with contextlib.suppress(Exception):
            if self._holder()[0] == self._mine:
                self._path.unlink()

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _take(self) -> None:
        before, since = self._holder(), time.monotonic()
        while before[0]:
            if time.monotonic() - since > LOCK_TIMEOUT_S:
                self._path.unlink(missing_ok=True)  # of a process that died
                break
            time.sleep(LOCK_REFRESH_S / 5)
            now = self._holder()
            if now[0] and now != before:
                raise LockHeldError(now[1])
            before = now
        try:
            self._files.pipe_file(os.fspath(self._path), self._content(), mode="create")
        except FileExistsError as error:
            raise LockHeldError(self._holder()[1]) from error
        time.sleep(LOCK_SETTLE_S)
        if self._holder()[0] != self._mine:
            raise LockHeldError(self._holder()[1])

    def _keep(self) -> None:
        while not self._over.wait(LOCK_REFRESH_S):
            with contextlib.suppress(Exception):  # the storage may be out of reach for a while
                holder = self._holder()
                if holder[0] not in (self._mine, ""):
                    self._lost(holder[1])
                    return
                self._beats += 1
                self._files.pipe_file(os.fspath(self._path), self._content())

    def _content(self) -> bytes:
        return json.dumps([self._mine, self._who, self._beats]).encode()

    def _holder(self) -> tuple[str, str, int]:
        """Mark, name and beats of the holder; empty where there is none."""
        try:
            mark, who, beats = json.loads(self._files.cat_file(os.fspath(self._path)))
        except FileNotFoundError:
            return "", "", 0
        except (ValueError, TypeError):
            return "unreadable", "another process", 0
        return str(mark), str(who), int(beats)


_remote_urls: dict[str, str] = {}


def local_cache_dir(address: str) -> str:
    """The local folder that stands for an address of prepared data, to be filled by `fetch` and `publish`."""
    mark = hashlib.sha256(address.rstrip("/").encode()).hexdigest()[:16]
    caches = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    local = str(caches / "transformer-jax" / "data" / mark)
    _remote_urls[local] = address.rstrip("/")
    return local


def _remote_url(folder: epath.PathLike) -> str | None:
    """The address that a local folder stands for."""
    text = os.fspath(folder)
    found = [local for local in _remote_urls if text.startswith(local + os.sep)]
    return _remote_urls[found[0]] + text[len(found[0]) :].replace(os.sep, "/") if found else None


COMPLETE = ".complete"  # the object that is written last


def pull(folder: epath.PathLike) -> bool:
    """Fills a folder that is not there yet from the address it stands for; False if there is nothing."""
    address = _remote_url(folder)
    if address is None or os.path.exists(folder) or not epath.Path(f"{address}/{COMPLETE}").exists():
        return False
    parent = os.path.dirname(os.fspath(folder))
    os.makedirs(parent, exist_ok=True)
    partial = tempfile.mkdtemp(prefix="fetch-", dir=parent)
    try:
        filesystem(address)
        download(address, partial)
        os.remove(os.path.join(partial, COMPLETE))
        os.rename(partial, folder)
    except OSError:
        if not os.path.exists(folder):  # else another process was faster
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return True


def push(folder: epath.PathLike) -> None:
    """Copies a folder, once it is complete, to the address it stands for, if that has none yet."""
    address = _remote_url(folder)
    if address is None or epath.Path(f"{address}/{COMPLETE}").exists():
        return
    upload(folder, address)
    epath.Path(f"{address}/{COMPLETE}").write_bytes(b"")
