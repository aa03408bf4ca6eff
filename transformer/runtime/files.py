"""Absolute paths, atomic writes, digests of files, and errors of the file system as UserErrors."""

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import os
import pathlib
import shutil
import sys
import tempfile
import uuid
from collections.abc import Iterator
from typing import Any, BinaryIO

from etils import epath

from transformer.runtime import object_storage, progress
from transformer.runtime.errors import UserError
from transformer.runtime.logging import log_info

# Of a workdir; each checkpoint has a config too.
CONFIG_FILE, METRICS_FILE = "config.json", "metrics.jsonl"


def absolute_path(path: epath.PathLike) -> str:
    """The path made absolute, ~ expanded; an address such as gs://bucket/run, and an empty path, as they are."""
    path = os.fspath(path)
    return path if not path or object_storage.is_remote(path) else os.path.abspath(os.path.expanduser(path))


def usable_path(path: epath.PathLike) -> str:
    """The path made absolute; a UserError if it is empty or an address that cannot be used."""
    if not os.fspath(path).strip():
        raise UserError("expected a path, got an empty name")
    if reason := object_storage.unsupported_reason(path):
        raise UserError(reason)
    return absolute_path(path)


def reject_missing_workdirs(*workdirs: epath.PathLike) -> None:
    """Raises a UserError for a workdir that is not there."""
    for workdir in workdirs:
        if not epath.Path(workdir).is_dir():
            if object_storage.is_remote(workdir):  # it may be there, and the storage does not show it
                with user_error_on_oserror(f"{workdir}"), contextlib.suppress(FileNotFoundError):
                    object_storage.filesystem(workdir).ls(os.fspath(workdir))
            raise UserError(f"{workdir}: expected a folder that train.py wrote, found none")


def write_atomic(path: epath.PathLike, content: bytes | str) -> None:
    """Writes a file under another name and renames it, so that it is never read half-written."""
    with open_atomic(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def open_atomic(path: epath.PathLike) -> Iterator[BinaryIO]:
    """Opens a file to write that replaces `path` at the end of the block, unless that fails.

    Links are followed. A pipe, a device or the file that standard output goes to is not replaced but written to.
    """
    path = epath.Path(path)
    _reject_directory(path)
    own = _stdio_descriptor(path)
    is_sent = own is not None or (os.path.exists(path) and not os.path.isfile(path))  # epath takes a pipe for a file
    if is_sent or object_storage.is_remote(path):  # where an object appears whole anyway, once it is sent
        with tempfile.TemporaryFile() as buffer:
            yield buffer
            buffer.seek(0)
            if own is not None:
                sys.stdout.flush()
            with path.open("wb") if own is None else open(os.dup(own), "wb") as sent:
                shutil.copyfileobj(buffer, sent)
        return
    path = epath.Path(os.path.realpath(path))  # epath's own resolve follows no links
    partial = path.parent / f"{path.name}.{uuid.uuid4().hex}.partial"  # containers share process numbers
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            with contextlib.suppress(OSError):
                os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def atomic_directory(folder: epath.PathLike) -> Iterator[pathlib.Path]:
    """Yields a new local folder that is renamed to `folder` at the end of the block; deletes it if that fails.

    Raises:
      OSError: by then the folder exists.
    """
    final = pathlib.Path(folder)
    partial = final.parent / f"{final.name}.{uuid.uuid4().hex}.partial"  # containers share process numbers
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def file_lock(folder: epath.PathLike, work: str = "", name: str = ".lock", wait: bool = True) -> Iterator[bool]:
    """Locks a local folder against other processes for the block; yields whether that was possible.

    It is not in object storage, in a folder that cannot be written, and on a file system without locks.

    Args:
      folder: holds the file that is locked.
      work: what the holder does, for the message if this process has to wait: "preparing X". Empty: no message.
      name: of the file.
      wait: whether to wait for another holder.
    """
    with contextlib.ExitStack() as stack:
        is_locked = False
        with contextlib.suppress(OSError):
            if not object_storage.is_remote(folder):
                lock = stack.enter_context(open(os.path.join(folder, name), "w"))
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    if not wait:
                        raise
                    if work:
                        log_info(f"data: another process is {work}; waiting for it")
                    with progress.phase("data: waiting for another process"):
                        fcntl.flock(lock, fcntl.LOCK_EX)
                is_locked = True
        yield is_locked


def check_writable(path: epath.PathLike, what: str) -> None:
    """Raises a UserError if a file cannot be written, before work is spent on its content; makes its folder.

    Object storage, pipes and devices are not checked. `what` names the path and its origin.
    """
    path = epath.Path(path)
    with user_error_on_oserror(what):
        _reject_directory(path)
        if not object_storage.is_remote(path) and (os.path.isfile(path) or not os.path.exists(path)):
            folder = os.path.dirname(os.path.realpath(path))
            os.makedirs(folder, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()


def _reject_directory(path: epath.Path) -> None:
    if os.path.isdir(path):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))


def reject_pipe(path: epath.PathLike) -> None:
    """Raises a UserError for a pipe, a socket or a device, which cannot be read more than once."""
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):  # epath takes a pipe for a file
        raise UserError(
            f"{path}: expected a file, which can be read more than once, got a pipe or device; write it to a file first"
        )


def _stdio_descriptor(path: epath.Path) -> int | None:
    """The descriptor of standard output or error if the path names where it goes, as /dev/stdout does."""
    with contextlib.suppress(OSError):
        named = os.stat(path)
        return next((number for number in (1, 2) if os.path.samestat(named, os.fstat(number))), None)
    return None


@contextlib.contextmanager
def user_error_on_oserror(what: str) -> Iterator[None]:
    """Turns errors of file system and object storage into a UserError; `what` names the path and its origin."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, OSError) and not object_storage.is_storage_error(error):
            raise
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{what}: {reason}; check the path, its mode and the space left") from error


def append(path: epath.PathLike, content: bytes) -> None:
    """Appends to a file; an object in storage is written again."""
    path = epath.Path(path)
    if object_storage.is_remote(path):
        write_atomic(path, (path.read_bytes() if path.exists() else b"") + content)
        return
    with path.open("ab") as file:
        file.write(content)


def read_json_lines(path: epath.Path) -> list[dict[str, Any]]:
    """The objects with a number `step` of a file, one a line; skips invalid lines and one that is being written."""
    objects = []
    with contextlib.suppress(FileNotFoundError):
        for line in path.read_bytes().split(b"\n"):
            with contextlib.suppress(ValueError, KeyError, TypeError):
                values = json.loads(line)
                objects.append({**values, "step": int(values["step"])})
    return objects


def checksummed_json(value: Any) -> bytes:
    """A line with the SHA-256 of the next one, which is JSON."""
    text = json.dumps(value)
    return f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}\n".encode()


def parse_checksummed_json(content: bytes) -> Any | None:
    """What `checksummed_json` was given; None if the content is damaged."""
    digest, _, text = content.rstrip(b"\n").partition(b"\n")
    return json.loads(text) if hashlib.sha256(text).hexdigest().encode() == digest else None


def json_digest(value: Any) -> str:
    """SHA-256 of a value's JSON with sorted keys, in hexadecimal."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def sha256(path: epath.PathLike) -> str:
    """SHA-256 of the bytes of a file, in hexadecimal."""
    with epath.Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _glob_literally(folder: epath.Path, pattern: str) -> Iterator[epath.Path]:
    """Finds the paths below a folder that match a pattern, whatever characters the folder's own name has.

    epath joins the two unescaped, so that Orbax and TFDS, which search with it, find nothing below `runs/[a]`.
    """
    if object_storage.is_remote(folder):
        return _glob_unescaped(folder, pattern)
    return (folder / name for name in glob.glob(pattern, root_dir=folder))


_LocalPath = type(epath.Path())
_glob_unescaped = _LocalPath.glob
_LocalPath.glob = _glob_literally
