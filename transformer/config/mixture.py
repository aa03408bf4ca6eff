"""What `data.mixture` means: the data of each entry, directions of translation, tags, shares and stages; without JAX.

Without a mixture there is one direction, that of the config, and its sources have no tag.
"""

import contextlib
import dataclasses
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from transformer.config.schema import PATH_FIELDS, TEXT_PATH_FIELDS, DataConfig, FieldDiff, MixtureEntry
from transformer.runtime.errors import UserError

DATA_FIELDS = ("name", "source_language", "target_language", "columns", *TEXT_PATH_FIELDS)  # also of DataConfig

MIN_TEMPERATURE = 0.1  # but for 0; a lower one would leave small sources nothing

_TAG = re.compile(r"<[^<>\s,]+>")
_RESERVED = re.compile(r"<pad>|<s>|</s>|<unk>|<0x[0-9A-Fa-f]{2}>")


class Direction(NamedTuple):
    """A direction of translation of a model.

    Attributes:
      data: the data section of its test and validation sets, without a mixture.
      tag: the token before each source; empty for none.
      entry: the index of the entry that the data is of.
    """

    data: DataConfig
    tag: str = ""
    entry: int = 0

    @property
    def name(self) -> str:
        """SRC-TGT."""
        return f"{self.data.source_language}-{self.data.target_language}"


class Stage(NamedTuple):
    """Updates that are drawn from the same entries.

    Attributes:
      start: updates done before it.
      entries: the indices of its entries.
    """

    start: int
    entries: list[int]


@contextlib.contextmanager
def entry_errors(number: int, entry: MixtureEntry) -> Iterator[None]:
    """Makes a UserError of the block name the entry, counted from 1."""
    try:
        yield
    except UserError as error:
        languages = f"{entry.source_language or '?'} to {entry.target_language or '?'}"
        raise UserError(f"config.data.mixture, entry {number}, {languages}: {error}") from error


def entry_data(data: DataConfig, entry: MixtureEntry) -> DataConfig:
    """The data section of one entry, without a mixture."""
    fields: dict[str, Any] = {name: getattr(entry, name) for name in DATA_FIELDS}
    return dataclasses.replace(data, mixture=(), mixture_temperature=0.0, **fields)


def without_paths(entries: Sequence[MixtureEntry] | Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The fields of each entry but for the paths of its files, which may move."""
    values = [dataclasses.asdict(entry) if isinstance(entry, MixtureEntry) else dict(entry) for entry in entries]
    return [{name: value for name, value in each.items() if name not in TEXT_PATH_FIELDS} for each in values]


def moves_data_only(change: FieldDiff) -> bool:
    """Whether a field that differs names other paths of the data, and nothing else."""
    if (change.section, change.field) == ("data", "mixture"):
        return without_paths(change.old) == without_paths(change.new)
    return change.section == "data" and change.field in PATH_FIELDS


def directions(data: DataConfig) -> list[Direction]:
    """The directions, in the order of the entries; each has the data of its first entry without an `origin_tag`."""
    if not data.mixture:
        return [Direction(data)]
    found: dict[tuple[str, str], Direction] = {}
    ordered = sorted(enumerate(data.mixture), key=lambda item: bool(item[1].origin_tag))
    for index, entry in ordered:
        languages = entry.source_language, entry.target_language
        found.setdefault(languages, Direction(entry_data(data, entry), entry.tag, index))
    return sorted(found.values(), key=lambda direction: direction.entry)


def find_directions(data: DataConfig, source_language: str | None, target_language: str | None) -> list[Direction]:
    """The directions with these languages, each None for any.

    Raises:
      UserError: there is none.
    """
    known = directions(data)
    found = [
        direction
        for direction in known
        if source_language in (None, direction.data.source_language)
        and target_language in (None, direction.data.target_language)
    ]
    if not found:
        wanted = f"{source_language or 'any'} to {target_language or 'any'}"
        raise UserError(f"no direction {wanted}: this model translates {', '.join(each.name for each in known)}")
    return found


def find_tag(data: DataConfig, source_language: str | None, target_language: str | None) -> str:
    """The tag of the sources of a translation.

    Raises:
      UserError: there is no such direction, or the tags of several differ.
    """
    found = find_directions(data, source_language, target_language)
    if len({direction.tag for direction in found}) > 1:
        names = ", ".join(direction.name for direction in found)
        missing = "target_language" if target_language is None else "source_language"
        raise UserError(f"this model translates {names}: expected {missing} to choose one, got none")
    return found[0].tag


def find_direction(data: DataConfig, source_language: str | None, target_language: str | None) -> Direction:
    """The one direction with these languages.

    Raises:
      UserError: there is none, or there are several.
    """
    found = find_directions(data, source_language, target_language)
    if len(found) > 1:
        names = ", ".join(direction.name for direction in found)
        raise UserError(f"expected one direction, got {names}; choose it by source_language and target_language")
    return found[0]


def tags_of(entry: MixtureEntry) -> list[str]:
    """The tokens before each source in training."""
    return [tag for tag in (entry.tag, entry.origin_tag) if tag]


def tags(data: DataConfig) -> list[str]:
    """All tags, each once, in the order of the entries: tokens of the vocabulary."""
    return list(dict.fromkeys(itertools.chain.from_iterable(map(tags_of, data.mixture))))


def check_tags(data: DataConfig) -> None:
    """Raises a UserError unless the tags are tokens that tell the target language."""
    where, language_of, tag_of = "config.data.mixture", dict[str, tuple[int, str]](), dict[tuple[str, str], Any]()
    without: dict[str, tuple[int, str]] = {}
    for number, entry in enumerate(data.mixture, 1):
        source, target = entry.source_language, entry.target_language
        for tag in tags_of(entry):
            if not _TAG.fullmatch(tag) or _RESERVED.fullmatch(tag):
                raise UserError(f"{where}, entry {number}: expected a tag such as <2{target}>, got {tag!r}")
        first, tag = tag_of.setdefault((source, target), (number, entry.tag))
        if entry.tag != tag:
            raise UserError(
                f"{where}: entries {first} and {number} both translate {source} to {target}: expected one tag, got "
                f"{tag!r} and {entry.tag!r}; a mark of where text is from is an origin_tag"
            )
        seen = language_of if entry.tag else without
        first, language = seen.setdefault(entry.tag or source, (number, target))
        if language != target:
            got = f"one tag for two languages, {entry.tag}" if entry.tag else f"no tag with the same source, {source}"
            raise UserError(
                f"{where}: entries {first} and {number} translate to {language} and {target}, with {got}; set a tag "
                f"for each, such as <2{language}> and <2{target}>"
            )
    for number, entry in enumerate(data.mixture, 1):
        if entry.origin_tag in language_of:
            raise UserError(
                f"{where}, entry {number}: origin_tag = {entry.origin_tag} is the tag of a language; name another"
            )


def stages(data: DataConfig) -> list[Stage]:
    """The stages, the first from step 0 on; one may have no entries."""
    starts = {0, *(entry.from_step for entry in data.mixture), *(entry.until_step for entry in data.mixture)}
    return [
        Stage(start, [index for index, entry in enumerate(data.mixture) if _is_active(entry, start)])
        for start in sorted(starts)
    ]


def _is_active(entry: MixtureEntry, step: int) -> bool:
    return entry.from_step <= step and (not entry.until_step or step < entry.until_step)


def check_stages(data: DataConfig, num_steps: int) -> None:
    """Raises a UserError if an entry ends before it begins or begins after the run, or an update has no entry."""
    for number, entry in enumerate(data.mixture, 1):
        if 0 < entry.until_step <= entry.from_step:
            raise UserError(
                f"config.data.mixture, entry {number}: expected until_step above from_step = {entry.from_step}, or 0 "
                f"for no end, got {entry.until_step}"
            )
        if entry.from_step >= num_steps:
            raise UserError(
                f"config.data.mixture, entry {number}: expected from_step below train.num_steps = {num_steps}, or the "
                f"entry is never drawn from, got {entry.from_step}"
            )
    found = stages(data)
    ends = [stage.start for stage in found[1:]] + [num_steps]
    for stage, end in zip(found, ends, strict=True):
        if not stage.entries and stage.start < num_steps:
            raise UserError(
                f"config.data.mixture: expected a source for each of train.num_steps = {num_steps} updates, got none "
                f"for updates {stage.start + 1} to {min(end, num_steps)}; change from_step or until_step of an entry"
            )


def shares(data: DataConfig, pairs: Sequence[int], entries: Sequence[int] | None = None) -> list[float]:
    """The share of examples of each entry, 0 for those that are not among `entries`; None for all.

    Args:
      data: with a mixture.
      pairs: the number of training pairs of each entry.
    """
    exponent = 1 / data.mixture_temperature if data.mixture_temperature else 0.0
    active = range(len(pairs)) if entries is None else entries
    most = max(pairs[index] for index in active)
    parts = [
        entry.weight * (count / most) ** exponent if index in active else 0.0
        for index, (entry, count) in enumerate(zip(data.mixture, pairs, strict=True))
    ]
    return [part / sum(parts) for part in parts]
