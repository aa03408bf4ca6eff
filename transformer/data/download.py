"""Downloads published archives, or takes those that the user fetched by hand; verifies all by SHA-256.

The manual folder comes first. A downloaded file is kept under its address and not downloaded again. An interrupted
download resumes where it stopped: its name ends in .partial until its digest is verified.
"""

import dataclasses
import http.client
import pathlib
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable
from typing import NamedTuple

from transformer.runtime import progress
from transformer.runtime.errors import UserError
from transformer.runtime.files import file_lock, sha256, user_error_on_oserror
from transformer.runtime.logging import log_info

CHUNK_BYTES = 1 << 20
TIMEOUT_S = 60  # without a byte


@dataclasses.dataclass(frozen=True)
class Download:
    """A published file.

    Attributes:
      name: of the published file.
      url: of the file, or of the page to get it from by hand.
      sha256, size: as recorded; "" and 0 if unknown.
      manual: it can only be fetched by hand.
    """

    name: str
    url: str
    sha256: str = ""
    size: int = 0
    manual: bool = False


class VerifiedFile(NamedTuple):
    """The path of a downloaded file, and its digest."""

    path: pathlib.Path
    sha256: str


class DownloadError(Exception):
    """A file can be neither found nor downloaded; says why."""


class DownloadManager:
    """Finds or downloads files: `manual` is the folder of those fetched by hand, `downloads` of all others."""

    def __init__(self, manual: str, downloads: str):
        self._manual, self._downloads = pathlib.Path(manual), pathlib.Path(downloads)

    def download(self, archives: Iterable[Download]) -> dict[Download, VerifiedFile]:
        """The verified file of each archive.

        Verifies existing files first, so that a wrong file in the manual folder is found before gigabytes of others
        are downloaded.

        Raises:
          UserError: files are missing and cannot be downloaded, all of which are named, or a file is wrong.
        """
        files, missing = {}, {}
        for archive in sorted(dict.fromkeys(archives), key=lambda archive: not self._existing(archive)):
            try:
                files[archive] = self._find_or_download(archive)
            except DownloadError as error:
                missing[archive] = str(error)
        if missing:
            names = "\n".join(f"  {each.name}  from {each.url}  ({reason})" for each, reason in missing.items())
            raise UserError(
                f"{len(missing)} of {len(files) + len(missing)} archives are missing. Run again to resume what can be "
                f"downloaded, or put these files, unchanged and under these names, into {self._manual} "
                f"(config.data.manual_dir):\n{names}"
            )
        return files

    def _download_path(self, archive: Download) -> pathlib.Path:
        address = urllib.parse.urlparse(archive.url)
        return self._downloads / address.netloc.replace(":", "_") / address.path.lstrip("/")

    def _existing(self, archive: Download) -> list[pathlib.Path]:
        """The paths under which the file exists."""
        paths = [self._manual / archive.name] + [self._download_path(archive)] * (not archive.manual)
        return [path for path in paths if path.exists()]

    def _find_or_download(self, archive: Download) -> VerifiedFile:
        if existing := self._existing(archive):
            return _verify(existing[0], archive)
        path = self._download_path(archive)
        if archive.manual:
            raise DownloadError("has to be fetched by hand")
        if ".." in path.parts:
            raise ValueError(f"{archive.url}: leads out of the folder of downloads")
        with user_error_on_oserror(f"{path}, under config.data.data_dir"):
            path.parent.mkdir(parents=True, exist_ok=True)
            with file_lock(path.parent, f"downloading into {path.parent}"):
                return _verify(path, archive) if path.exists() else _download(archive, path)


def _verify(path: pathlib.Path, archive: Download) -> VerifiedFile:
    """Verifies the file by the recorded digest."""
    with user_error_on_oserror(str(path)):
        size, digest = path.stat().st_size, sha256(path)
    if not archive.sha256:
        log_info(f"data: {path}: its checksum is unknown, so it is not verified; sha256 {digest}")
    elif digest != archive.sha256:
        raise UserError(
            f"{path}: not the archive {archive.url}, or truncated: expected {_describe(archive.size, archive.sha256)}, "
            f"got {_describe(size, digest)}; delete it and run again, or replace it by the right one"
        )
    return VerifiedFile(path, digest)


def _describe(size: int, digest: str) -> str:
    return f"{size:,} bytes with sha256 {digest}"


def _download(archive: Download, path: pathlib.Path) -> VerifiedFile:
    """Downloads to `path`, which exists once the digest is verified; retries as long as each try receives bytes."""
    partial = path.with_name(path.name + ".partial")
    log_info(f"data: downloading {archive.url}{f', {_mb(archive.size)} MB' if archive.size else ''}")
    while True:
        start = partial.stat().st_size if partial.exists() else 0
        try:
            complete = _resume(archive, partial, start)
        except urllib.error.HTTPError as error:
            if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE and start:
                break  # the file is complete
            raise DownloadError(f"the server says {error.code} {error.reason}") from error
        except (OSError, http.client.HTTPException) as error:
            if partial.exists() and partial.stat().st_size > start:
                continue
            raise DownloadError(f"{error or type(error).__name__}") from error
        if complete:
            break
        if partial.stat().st_size <= start:
            raise DownloadError(f"the connection ended after {partial.stat().st_size:,} bytes")
    size, digest = partial.stat().st_size, sha256(partial)
    if archive.sha256 and digest != archive.sha256:
        partial.unlink()
        raise UserError(
            f"{archive.url}: the published file has changed: expected {_describe(archive.size, archive.sha256)}, got "
            f"{_describe(size, digest)}, now deleted; fetch {archive.name} elsewhere and put it into "
            "config.data.manual_dir"
        )
    partial.replace(path)
    if not archive.sha256:
        log_info(f"data: {path}: its checksum is unknown; sha256 {digest}")
    return VerifiedFile(path, digest)


def _resume(archive: Download, partial: pathlib.Path, start: int) -> bool:
    """Appends what the server sends from byte `start` on; returns whether all announced bytes were received."""
    request = urllib.request.Request(archive.url, headers={"Range": f"bytes={start}-"} if start else {})
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
        if response.status != http.client.PARTIAL_CONTENT:
            start = 0  # the server sends the whole file
        announced = int(response.headers.get("Content-Length") or 0)
        name, total = archive.name, archive.size or announced + start
        received = 0
        with partial.open("ab" if start else "wb") as file:
            blocks = iter(lambda: response.read1(CHUNK_BYTES), b"")
            with progress.phase(f"data: downloading {name}") as downloading:
                for block in blocks:
                    file.write(block)
                    received += len(block)
                    downloading.note = f"{_mb(start + received)} of {_mb(total)} MB"
    return received >= announced


def _mb(size: int) -> str:
    return f"{size / 1e6:,.0f}"
