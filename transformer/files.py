"""Files that appear whole or not at all, their digests, and what the file system refuses."""

import contextlib
import hashlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from typing import BinaryIO

from etils import epath

from transformer import remote
from transformer.errors import UserError


def write_whole(path: epath.PathLike, content: bytes | str) -> None:
    """Writes a file beside its place and moves it there, so that nobody ever reads half of it."""
    with growing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def growing(path: epath.PathLike) -> Iterator[BinaryIO]:
    """The same piece by piece: the file takes its place at the end of the block, and never if that fails."""
    path = epath.Path(path)
    if remote.is_remote(path):  # where an object appears whole anyway, once it is sent
        with tempfile.TemporaryFile() as buffer:
            yield buffer
            buffer.seek(0)
            with path.open("wb") as sent:
                shutil.copyfileobj(buffer, sent)
        return
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
def reported(what: str) -> Iterator[None]:
    """Turns what the file system refuses into a UserError; `what` names the path and where it comes from."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, OSError) and not remote.is_refusal(error):
            raise
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{what}: {reason}; check the path, its mode and the space left") from error


def append(path: epath.PathLike, content: bytes) -> None:
    """Adds to the end of a file; an object in storage is written anew."""
    path = epath.Path(path)
    if remote.is_remote(path):
        write_whole(path, (path.read_bytes() if path.exists() else b"") + content)
        return
    with path.open("ab") as file:
        file.write(content)


def sha256(path: epath.PathLike) -> str:
    """SHA-256 of the bytes of a file, in hexadecimal."""
    with epath.Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
