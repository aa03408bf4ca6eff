"""Object storage, gs:// and s3://: emulates appending, atomic folders and locks.

Storage writes whole objects and can neither append, rename a folder atomically nor lock. So a log is written locally
and copied as it grows, a folder is complete once its last object exists, and a lock is an object that its holder
rewrites every few seconds.
"""

import contextlib
import functools
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

import fsspec
from etils import epath

from transformer.runtime import environment, progress
from transformer.runtime.background import BackgroundQueue

PACKAGES = {"gs": "gcsfs", "s3": "s3fs"}
LOCK_REFRESH_S = 5.0  # seconds between two writes of a lock by its holder
LOCK_TIMEOUT_S = 25.0  # seconds without one after which the lock is taken over
# Seconds in which two processes that take a lock at once find out, on storage without conditional writes.
LOCK_SETTLE_S = 1.0
SYNC_INTERVAL_S = 20.0  # seconds between two copies of a log
CLIENTS = ("gcsfs", "s3fs", "botocore", "aiobotocore", "aiohttp", "google")  # packages of the storage client


# Before the first address is opened, whose file system etils keeps: it is fsspec's, even where TensorFlow is installed,
# and without a cache of listings, as others write there too.
os.environ.setdefault("EPATH_USE_TF", "false")
for _kind in ("gs", "gcs", "s3"):
    fsspec.config.conf.setdefault(_kind, {})["use_listings_cache"] = False


def is_remote(path: epath.PathLike) -> bool:
    """Whether a path is an address in object storage."""
    return "://" in os.fspath(path)


def unsupported_reason(path: epath.PathLike) -> str | None:
    """Why an address cannot be used; None if it can, and for local paths."""
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
    """The fsspec file system of an address."""
    return epath.Path(path)._backend.fs(os.fspath(path)) if is_remote(path) else fsspec.filesystem("file")


def is_storage_error(error: BaseException) -> bool:
    """Whether an error comes from the storage client: of access, buckets or the network."""
    module = type(error).__module__
    return module.split(".")[0] in CLIENTS and not module.startswith("google.protobuf")


def upload(local: epath.PathLike, folder: epath.PathLike) -> None:
    """Uploads all files below a local folder."""
    root = pathlib.Path(local)
    names = [path.relative_to(root).as_posix() for path in sorted(root.rglob("*")) if path.is_file()]
    filesystem(folder).put([str(root / name) for name in names], [f"{folder}/{name}" for name in names])


def download(folder: epath.PathLike, local: epath.PathLike) -> None:
    """Downloads all objects below an address into a local folder."""
    files = filesystem(folder)
    root = files._strip_protocol(os.fspath(folder))
    objects = [path for path in files.find(root) if not path.endswith("/")]
    targets = [os.path.join(local, os.path.relpath(path, root)) for path in objects]
    for target in targets:
        os.makedirs(os.path.dirname(target), exist_ok=True)
    files.get(objects, targets)


def needs_staging(folder: epath.PathLike) -> bool:
    """Whether Orbax cannot read and write there itself: S3, which TensorStore supports but Orbax 0.12 does not use."""
    return os.fspath(folder).startswith("s3://")


@contextlib.contextmanager
def staged(folder: epath.Path, *, write: bool = False) -> Iterator[epath.Path]:
    """The folder to read or to write: the given one, or a local copy, which is uploaded at the end if it is written."""
    if not needs_staging(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="staged-") as local:
        if not write:
            download(folder, local)
        yield epath.Path(local)
        if write:
            upload(local, folder)


class SyncedDirectory:
    """A local folder of growing files, copied to an address every few seconds; a local path is used itself.

    Attributes:
      folder: to write to.
    """

    def __init__(self, address: epath.Path, *names: str):
        self._address = address if is_remote(address) else None
        self.folder = epath.Path(tempfile.mkdtemp(prefix="log-")) if self._address else address
        self._copied, self._uploads = time.monotonic(), BackgroundQueue("log")
        for name in names:
            if self._address and (self._address / name).exists():
                (self.folder / name).write_bytes((self._address / name).read_bytes())

    def sync(self, now: bool = False) -> None:
        """Copies the files in the background if it is time; `now` waits for it. Raises what an earlier copy did."""
        if not self._address:
            return
        if now or (self._uploads.is_idle and time.monotonic() - self._copied > SYNC_INTERVAL_S):
            self._copied = time.monotonic()
            self._uploads.submit(functools.partial(upload, self.folder, self._address))
        if now:
            self._uploads.wait()

    def close(self) -> None:
        """Copies the files a last time, and deletes the local folder."""
        self.sync(now=True)
        if self._address:
            shutil.rmtree(self.folder, ignore_errors=True)


class LockHeldError(Exception):
    """Another process holds the lock; the message names it."""


class Lock(contextlib.AbstractContextManager):
    """A lock on a folder: an object with its holder, who rewrites it every few seconds.

    Args:
      owner: description of this process, for messages.
      on_lost: called in a thread, with the new holder, if another process has taken the lock over.

    Raises:
      LockHeldError: another process holds the lock.
    """

    def __init__(self, path: epath.Path, owner: str, on_lost: Callable[[str], None]):
        self._path, self._owner, self._on_lost = path, owner, on_lost
        self._files, self._id, self._beats = filesystem(path), uuid.uuid4().hex, 0
        self._closed = threading.Event()
        self._acquire()
        threading.Thread(target=self._refresh, name="lock", daemon=True).start()

    def close(self) -> None:
        """Releases the lock."""
        self._closed.set()
        with contextlib.suppress(Exception):
            if self._holder()[0] == self._id:
                self._path.unlink()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _acquire(self) -> None:
        last, since = self._holder(), time.monotonic()
        while last[0]:
            if time.monotonic() - since > LOCK_TIMEOUT_S:
                self._path.unlink(missing_ok=True)  # of a process that died
                break
            time.sleep(LOCK_REFRESH_S / 5)
            now = self._holder()
            if now[0] and now != last:
                raise LockHeldError(now[1])
            last = now
        try:
            self._files.pipe_file(os.fspath(self._path), self._content(), mode="create")
        except FileExistsError as error:
            raise LockHeldError(self._holder()[1]) from error
        time.sleep(LOCK_SETTLE_S)
        if self._holder()[0] != self._id:
            raise LockHeldError(self._holder()[1])

    def _refresh(self) -> None:
        while not self._closed.wait(LOCK_REFRESH_S):
            with contextlib.suppress(Exception):  # the storage may be out of reach for a while
                holder = self._holder()
                if holder[0] not in (self._id, ""):
                    self._on_lost(holder[1])
                    return
                self._beats += 1
                self._files.pipe_file(os.fspath(self._path), self._content())

    def _content(self) -> bytes:
        return json.dumps([self._id, self._owner, self._beats]).encode()

    def _holder(self) -> tuple[str, str, int]:
        """Id, description and number of writes of the holder; empty without one."""
        try:
            holder_id, owner, beats = json.loads(self._files.cat_file(os.fspath(self._path)))
        except FileNotFoundError:
            return "", "", 0
        except (ValueError, TypeError):
            return "unreadable", "another process", 0
        return str(holder_id), str(owner), int(beats)


_remote_urls: dict[str, str] = {}


def local_cache_dir(address: str) -> str:
    """The local cache of an address of prepared data; `pull` and `push` copy its folders."""
    digest = hashlib.sha256(address.rstrip("/").encode()).hexdigest()[:16]
    local = str(environment.cache_folder() / "data" / digest)
    _remote_urls[local] = address.rstrip("/")
    return local


def _remote_url(folder: epath.PathLike) -> str | None:
    """The address of a folder in a local cache; None for other folders."""
    text = os.fspath(folder)
    caches = [local for local in _remote_urls if text.startswith(local + os.sep)]
    return _remote_urls[caches[0]] + text[len(caches[0]) :].replace(os.sep, "/") if caches else None


def has_address(folder: epath.PathLike) -> bool:
    """Whether a folder is in a local cache of an address."""
    return _remote_url(folder) is not None


COMPLETE = ".complete"  # the object that is written last


def pull(folder: epath.PathLike) -> bool:
    """Downloads a folder of a local cache unless it exists; returns whether it did."""
    address = _remote_url(folder)
    if address is None or os.path.exists(folder) or not epath.Path(f"{address}/{COMPLETE}").exists():
        return False
    parent = os.path.dirname(os.fspath(folder))
    os.makedirs(parent, exist_ok=True)
    partial = tempfile.mkdtemp(prefix="fetch-", dir=parent)
    try:
        with progress.phase(f"downloading {address}"):
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
    """Uploads a complete folder of a local cache, unless its address has one."""
    address = _remote_url(folder)
    if address is None or epath.Path(f"{address}/{COMPLETE}").exists():
        return
    with progress.phase(f"uploading {address}"):
        upload(folder, address)
    epath.Path(f"{address}/{COMPLETE}").write_bytes(b"")
