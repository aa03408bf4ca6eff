"""The folder of a synthetic corpus: text, and a model's translations of it, which are made shard by shard.

    FOLDER/manifest.json    all that the corpus depends on, and whether it is complete
    FOLDER/shards/00000     the translations of a shard, one a line, until all shards are there
    FOLDER/train.LANG       a file for each side, which `data.dir` reads, once all shards are there

A shard appears whole or not at all. While a command translates one it holds a lock, so several commands share the work
on a folder; where files cannot be locked, each needs a part of its own.
"""

import contextlib
import fcntl
import hashlib
import itertools
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import IO, Any, NamedTuple

from etils import epath

from transformer.data import text_files
from transformer.runtime import object_storage, progress
from transformer.runtime.errors import UserError
from transformer.runtime.files import check_writable, file_lock, open_atomic, user_error_on_oserror, write_atomic
from transformer.runtime.logging import log_info

MANIFEST, SHARDS, STEM = "manifest.json", "shards", "train"
INPUT_SIDES = ("source", "target")


class InputText(NamedTuple):
    """The lines of several files, read one after another.

    Attributes:
      sha256: of the lines, each with a line feed.
    """

    paths: Sequence[str]
    num_lines: int
    sha256: str

    def lines(self) -> Iterator[str]:
        """All lines."""
        return itertools.chain.from_iterable(map(text_files.read_lines, self.paths))


def scan(paths: Sequence[str]) -> InputText:
    """Counts the lines of text files, compressed or not, and computes their digest.

    Raises:
      UserError: as `text_files.read_lines`, or there is no line.
    """
    digest, count = hashlib.sha256(), 0
    lines = InputText(paths, 0, "").lines()
    for line in progress.track(lines, "reading the text", unit="lines"):
        digest.update(f"{line}\n".encode())
        count += 1
    if not count:
        raise UserError(f"{', '.join(paths)}: expected lines to translate, found none; name other files")
    return InputText(paths, count, digest.hexdigest())


class Shard(NamedTuple):
    """A part of the text, numbered from 0."""

    number: int
    lines: list[str]


class SyntheticCorpus:
    """A corpus that is being made, or complete.

    Args:
      folder: where it is; made if it is missing.
      text: what is translated.
      languages: of the text and of its translations.
      input_side: the side of the pairs that the text is: target for back-translation, source for distillation.
      shard_lines: lines of a shard.
      settings: all that the translations depend on besides, by name.
      about: what the manifest records besides.

    Attributes:
      folder: as given.
      paths: the files of source and target.
    """

    def __init__(
        self,
        folder: epath.PathLike,
        text: InputText,
        languages: tuple[str, str],
        input_side: str,
        shard_lines: int,
        settings: Mapping[str, Any],
        about: Mapping[str, Any],
    ):
        self.folder, self._text, self._shard_lines, self._about = epath.Path(folder), text, shard_lines, about
        self.num_shards = -(-text.num_lines // shard_lines)
        self._shards = self.folder / SHARDS
        self._input, self._translation = (self.folder / f"{STEM}.{language}" for language in languages)
        is_source = input_side == "source"
        self.paths = (self._input, self._translation) if is_source else (self._translation, self._input)
        own = {"languages": list(languages), "input_side": input_side, "shard_lines": shard_lines}
        given = {"input_lines": text.num_lines, "input_sha256": text.sha256}
        self._settings = json.loads(json.dumps({**settings, **own, **given}))
        self._warned = False

    def open(self) -> None:
        """Makes the folder, or checks that what is there was made with the same settings.

        Raises:
          UserError: it was not, or the folder holds other files of the same names, or cannot be written.
        """
        with user_error_on_oserror(f"{self.folder}"):
            self.folder.mkdir(parents=True, exist_ok=True)
            check_writable(self.folder / MANIFEST, f"{self.folder}")
            with file_lock(self.folder):
                if (saved := self._read_manifest()) is None:
                    self._reject_other_files()
                    self._write_manifest(is_complete=False)
                elif changes := _diff(saved.get("settings"), self._settings):
                    raise UserError(
                        f"{self.folder}: holds a corpus made with other settings: {'; '.join(changes)}. Give the same "
                        "ones to resume it, or choose another folder"
                    )
            if not self.is_complete():
                self._shards.mkdir(exist_ok=True)

    def is_complete(self) -> bool:
        """Whether both files are there, whole."""
        saved = self._read_manifest() or {}
        return bool(saved.get("complete")) and all(path.exists() for path in self.paths)

    def missing(self) -> list[int]:
        """The shards that are not there, ascending; none if the corpus is complete."""
        names: set[str] = set()
        with contextlib.suppress(FileNotFoundError):  # another command may have completed the corpus just now
            names = {path.name for path in self._shards.iterdir()}
        missing = [index for index in range(self.num_shards) if self._name(index) not in names]
        return [] if missing and self.is_complete() else missing

    def num_lines(self, shards: Iterable[int]) -> int:
        """How many lines these shards have."""
        return sum(min(self._shard_lines, self._text.num_lines - index * self._shard_lines) for index in shards)

    def read(self, shards: Iterable[int]) -> Iterator[Shard]:
        """Yields these shards of the text, in order; holds one in memory."""
        wanted, lines = set(shards), self._text.lines()
        for index in range(max(wanted, default=-1) + 1):
            part = itertools.islice(lines, self._shard_lines)
            if index in wanted:
                yield Shard(index, list(part))
            else:
                for _ in part:
                    pass

    @contextlib.contextmanager
    def claim(self, index: int) -> Iterator[bool]:
        """Yields whether this command shall translate a shard: no other holds it, and it is not there yet.

        It is locked for the block. In object storage there are no locks.
        """
        is_remote = object_storage.is_remote(self.folder)
        lock = None if is_remote else self._lock(index)
        with lock or contextlib.nullcontext():
            is_free = is_remote or lock is not None
            yield is_free and not (self._shards / self._name(index)).exists() and not self.is_complete()

    def _lock(self, index: int) -> IO[str] | None:
        """The locked file of a shard; None if another command holds it, or has completed the corpus."""
        file: IO[str] | None = None
        with user_error_on_oserror(f"{self._shards}"), contextlib.suppress(FileNotFoundError):
            file = (self._shards / f"{self._name(index)}.lock").open("w")
        if file is None:
            return None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        except OSError as error:
            if not self._warned:
                log_info(
                    f"warning: {self.folder} cannot be locked ({error}): if several commands work on it, give each a "
                    "part of its own"
                )
            self._warned = True
        return file

    def write(self, index: int, translations: Sequence[str]) -> None:
        """Writes the translations of a shard, whole or not at all."""
        with user_error_on_oserror(f"{self._shards}"):
            write_atomic(self._shards / self._name(index), "".join(f"{line}\n" for line in translations))

    def join(self, check_stop: Callable[[], None] = lambda: None) -> None:
        """Makes the files of both sides of all shards, and deletes the shards; does nothing if that is done.

        Args:
          check_stop: called after each shard; may raise.

        Raises:
          UserError: a shard does not have its number of lines, or the text has changed.
        """
        with user_error_on_oserror(f"{self.folder}"), file_lock(self.folder, f"joining the shards of {self.folder}"):
            if not self.is_complete():
                with progress.phase("joining the shards", self.num_shards, "shards") as joining:
                    digest = hashlib.sha256()
                    with open_atomic(self._translation) as translation, open_atomic(self._input) as text:
                        for shard in self.read(range(self.num_shards)):
                            content = "".join(f"{line}\n" for line in shard.lines).encode()
                            digest.update(content)
                            text.write(content)
                            translation.write(self._translations(shard))
                            joining.advance()
                            check_stop()
                        if digest.hexdigest() != self._text.sha256:
                            raise UserError(
                                f"{', '.join(self._text.paths)}: changed while they were translated; choose another "
                                "folder, and start when they are complete"
                            )
                self._write_manifest(is_complete=True)
            if not object_storage.is_remote(self.folder):
                shutil.rmtree(self._shards, ignore_errors=True)
            elif self._shards.exists():
                self._shards.rmtree()

    def _translations(self, shard: Shard) -> bytes:
        path = self._shards / self._name(shard.number)
        content = path.read_bytes()
        if (count := content.count(b"\n")) != len(shard.lines):
            raise UserError(
                f"{path}: expected {len(shard.lines):,} lines, got {count:,}: it is damaged; delete it and run again"
            )
        return content

    def _name(self, index: int) -> str:
        return f"{index:05}"

    def _read_manifest(self) -> dict[str, Any] | None:
        path = self.folder / MANIFEST
        try:
            saved = json.loads(path.read_bytes())
        except FileNotFoundError:
            return None
        except ValueError:
            saved = None
        if not isinstance(saved, dict):
            raise UserError(f"{path}: expected the manifest of a corpus, got something else; choose another folder")
        return saved

    def _write_manifest(self, is_complete: bool) -> None:
        source, target = (path.name for path in self.paths)
        values = {
            "complete": is_complete,
            "source": source,
            "target": target,
            "shards": self.num_shards,
            "settings": self._settings,
            **self._about,
        }
        write_atomic(self.folder / MANIFEST, json.dumps(values, indent=1, ensure_ascii=False) + "\n")

    def _reject_other_files(self) -> None:
        names = [f"{path.name}{end}" for path in self.paths for end in ("", *text_files.COMPRESSIONS)]
        if others := [name for name in (*names, SHARDS) if (self.folder / name).exists()]:
            raise UserError(
                f"{self.folder}: holds {' and '.join(others)}, but no {MANIFEST}, so this command did not write them; "
                "choose another folder"
            )


def _diff(old: Any, new: Mapping[str, Any]) -> list[str]:
    """The settings that differ, as 'name: old → new'; those of decoding by field."""
    before, after = (_flatten(values) for values in (old if isinstance(old, dict) else {}, new))
    names = [*after, *(name for name in before if name not in after)]
    return [
        f"{name}: {_short(before.get(name))} → {_short(after.get(name))}"
        for name in names
        if before.get(name) != after.get(name)
    ]


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def _short(value: Any) -> str:
    """A value for a message; digests are cut."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) < 40 else f"{text[:16]}…"
