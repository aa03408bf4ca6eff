"""Archives of published data: found where a person put them, or fetched, and in any case verified.

An archive is taken from the manual folder first. What was fetched is kept under its address, so that
it is never fetched again; a download that was cut goes on where it stopped, in a file whose name ends
in .partial until its digest is right.
"""

import dataclasses
import http.client
import pathlib
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from transformer.data.prepared import file_lock
from transformer.runtime.errors import UserError
from transformer.runtime.files import sha256, user_error_on_oserror
from transformer.runtime.logging import log_info, log_progress

CHUNK_BYTES = 1 << 20
TIMEOUT_S = 60  # without a byte, after which a server is given up


@dataclasses.dataclass(frozen=True)
class Download:
    """A published file.

    Attributes:
      name: of the file as it is published.
      url: where it is fetched from; of a manual one, the page where a person gets it.
      sha256, size: as recorded; "" and 0 where nothing is recorded.
      manual: it cannot be fetched by a program.
    """

    name: str
    url: str
    sha256: str = ""
    size: int = 0
    manual: bool = False


class VerifiedFile(NamedTuple):
    """Where an archive is, and what it is."""

    path: pathlib.Path
    sha256: str


class DownloadError(Exception):
    """An archive that is neither there nor to be had; says why."""


class DownloadManager:
    """Where archives are: `manual` is the person's folder, `downloads` ours."""

    def __init__(self, manual: str, downloads: str):
        self._manual, self._downloads = pathlib.Path(manual), pathlib.Path(downloads)

    def get(self, archives: Iterable[Download]) -> dict[Download, VerifiedFile]:
        """The verified file of each archive, fetched if it is not there; what is there comes first.

        So a wrong file in the manual folder is found before gigabytes of others are fetched.

        Raises:
          UserError: some cannot be had, all of which are named, or one is not what it should be.
        """
        found, missing = {}, {}
        for archive in sorted(dict.fromkeys(archives), key=lambda one: not self._there(one)):
            try:
                found[archive] = self._get(archive)
            except DownloadError as error:
                missing[archive] = str(error)
        if missing:
            files = "\n".join(f"  {archive.name}  from {archive.url}  ({why})" for archive, why in missing.items())
            raise UserError(
                f"{len(missing)} of {len(found) + len(missing)} archives are missing. Run again to go on with what "
                f"can be fetched, or put these files, unchanged and by these names, into {self._manual} "
                f"(config.data.manual_dir):\n{files}"
            )
        return found

    def _fetched(self, archive: Download) -> pathlib.Path:
        address = urllib.parse.urlparse(archive.url)
        return self._downloads / address.netloc.replace(":", "_") / address.path.lstrip("/")

    def _there(self, archive: Download) -> list[pathlib.Path]:
        """Where an archive lies already."""
        places = [self._manual / archive.name] + [self._fetched(archive)] * (not archive.manual)
        return [path for path in places if path.exists()]

    def _get(self, archive: Download) -> VerifiedFile:
        if there := self._there(archive):
            return _verify(there[0], archive)
        fetched = self._fetched(archive)
        if archive.manual:
            raise DownloadError("has to be fetched by hand")
        if ".." in fetched.parts:
            raise ValueError(f"{archive.url}: leads out of the folder of downloads")
        with user_error_on_oserror(f"{fetched}, under config.data.data_dir"):
            fetched.parent.mkdir(parents=True, exist_ok=True)
            with file_lock(fetched.parent):
                return _verify(fetched, archive) if fetched.exists() else _download(archive, fetched)


def _verify(path: pathlib.Path, archive: Download) -> VerifiedFile:
    """The file, if it is whole and as recorded."""
    with user_error_on_oserror(str(path)):
        size, digest = path.stat().st_size, sha256(path)
    if not archive.sha256:
        log_info(f"data: {path}: no checksum of it is recorded, so it is taken as it is; sha256 {digest}")
    elif digest != archive.sha256:
        raise UserError(
            f"{path}: not the archive {archive.url}, or cut short: expected {_describe(archive.size, archive.sha256)}, "
            f"got {_describe(size, digest)}; delete it and run again, or put the right one in its place"
        )
    return VerifiedFile(path, digest)


def _describe(size: int, digest: str) -> str:
    return f"{size:,} bytes with sha256 {digest}"


def _download(archive: Download, path: pathlib.Path) -> VerifiedFile:
    """Downloads to `path`, which appears once the digest is right; tries again for as long as bytes come."""
    partial = path.with_name(path.name + ".partial")
    log_info(f"data: fetching {archive.url}{f', {_mb(archive.size)} MB' if archive.size else ''}")
    while True:
        before = partial.stat().st_size if partial.exists() else 0
        try:
            complete = _resume(archive, partial, before)
        except urllib.error.HTTPError as error:
            if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE and before:
                break  # nothing is left to fetch: the digest says whether it is right
            raise DownloadError(f"the server says {error.code} {error.reason}") from error
        except (OSError, http.client.HTTPException) as error:
            if partial.exists() and partial.stat().st_size > before:
                continue
            raise DownloadError(f"{error or type(error).__name__}") from error
        if complete:
            break
        if partial.stat().st_size <= before:
            raise DownloadError(f"the connection ended after {partial.stat().st_size:,} bytes")
    return _finish(archive, partial, path)


def _resume(archive: Download, partial: pathlib.Path, start: int) -> bool:
    """Adds what the server sends from byte `start` on; returns whether that was all that it promised."""
    request = urllib.request.Request(archive.url, headers={"Range": f"bytes={start}-"} if start else {})
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
        if response.status != http.client.PARTIAL_CONTENT:
            start = 0  # the server begins anew
        promised = int(response.headers.get("Content-Length") or 0)
        name, total = archive.name, archive.size or promised + start
        done = 0
        with partial.open("ab" if start else "wb") as file:
            blocks = log_progress(_blocks(response), lambda _: f"data: {name}: {_mb(start + done)} of {_mb(total)} MB")
            for block in blocks:
                file.write(block)
                done += len(block)
    return done >= promised


def _blocks(response: http.client.HTTPResponse) -> Iterator[bytes]:
    while block := response.read1(CHUNK_BYTES):
        yield block


def _finish(archive: Download, partial: pathlib.Path, path: pathlib.Path) -> VerifiedFile:
    """Gives a download its name if its digest is right, and removes it if not."""
    size, digest = partial.stat().st_size, sha256(partial)
    if archive.sha256 and digest != archive.sha256:
        partial.unlink()
        raise UserError(
            f"{archive.url}: not the archive that it was: expected {_describe(archive.size, archive.sha256)}, got "
            f"{_describe(size, digest)}, which is deleted again; fetch {archive.name} elsewhere and put it into "
            "config.data.manual_dir"
        )
    partial.replace(path)
    if not archive.sha256:
        log_info(f"data: {path}: no checksum of it is recorded; sha256 {digest}")
    return VerifiedFile(path, digest)


def _mb(size: int) -> str:
    return f"{size / 1e6:,.0f}"
