"""The one door to data: a DataConfig becomes splits of sentence pairs.

Training leaves out pairs with a blank side; every other split keeps all. Where there is no
`validation`, a part of training is held out by a hash of the source sentence.
"""

import array
import contextlib
import dataclasses
import difflib
import functools
import hashlib
import importlib
import importlib.util
import json
import operator
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from tensorflow_datasets.proto import tf_example_pb2

from transformer.config.schema import PATHS, TRAINED_TOKENIZERS, WMT_NAMES, DataConfig
from transformer.data import local_text, prepared, text_files, wmt
from transformer.data.prepared import RecordReader
from transformer.runtime import object_storage
from transformer.runtime.errors import UserError
from transformer.runtime.logging import log_info, log_progress

Pair = tuple[str, str]

_BLOCK = 4096


class Split:
    """Sentence pairs by number; can be pickled, and is read by several threads at once.

    A sentence is one line: a line break within one, which data sets of TFDS may have, is read as a space.

    Attributes:
      name: as the data set calls it.
      digest: changes when any pair or the order changes; in hexadecimal.
    """

    def __init__(
        self,
        name: str,
        digest: str,
        languages: tuple[str, str],
        records: RecordReader,
        rows: np.ndarray | None,
        keeps_cr: bool = False,
    ):
        """Reads serialized examples.

        Args:
          records: the examples.
          rows: which of them, [N] int64 ascending, or None for all.
          keeps_cr: the records are lines of text split at b"\\n" alone, so a CR that ends one is its line end's.
        """
        self.name, self.digest = name, digest
        self._languages, self._records, self._rows, self._keeps_cr = languages, records, rows, keeps_cr

    def __len__(self) -> int:
        return len(self._records) if self._rows is None else len(self._rows)

    def __getitem__(self, index: int) -> Pair:
        """The pair (source, target) of number `index`, 0 ≤ index < len."""
        index = operator.index(index)
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name}: expected 0 ≤ index < {len(self)}, got {index}")
        row = index if self._rows is None else int(self._rows[index])
        (pair,) = self._parsed(row, row + 1)
        return self.lines(pair)

    def __iter__(self) -> Iterator[Pair]:
        return map(self.lines, self.stored())

    def lines(self, stored: Pair) -> Pair:
        """The two lines of text that a stored pair is read as."""
        source, target = stored
        if self._keeps_cr:
            source, target = source.removesuffix("\r"), target.removesuffix("\r")
        return text_files.one_line(source), text_files.one_line(target)

    def stored(self) -> Iterator[Pair]:
        """All pairs as they stand in the data, with any line breaks."""
        for start in range(0, len(self), _BLOCK):
            end = min(start + _BLOCK, len(self))
            chosen = list(range(start, end)) if self._rows is None else self._rows[start:end].tolist()
            first, last = chosen[0], chosen[-1] + 1
            if last - first > 2 * len(chosen) + 1:  # far apart: one by one costs less than all between
                for row in chosen:
                    yield from self._parsed(row, row + 1)
            else:
                pairs = self._parsed(first, last)
                yield from (pairs[row - first] for row in chosen)

    def _parsed(self, first: int, last: int) -> list[Pair]:
        with self._reported():
            return [_parse(record, self._languages) for record in self._records.read(first, last)]

    def sources(self) -> list[str]:
        """All source sentences in order."""
        return [source for source, _ in self]

    def targets(self) -> list[str]:
        """All target sentences in order."""
        return [target for _, target in self]

    @contextlib.contextmanager
    def _reported(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # ArrayRecord and protobuf raise kinds of their own
            raise UserError(f"the prepared data of split {self.name!r} cannot be read: {error}") from error


def _parse(record: bytes, languages: tuple[str, str]) -> Pair:
    """The pair of a serialized example; TFDS's own way goes through NumPy and takes three times as long."""
    features = tf_example_pb2.Example.FromString(record).features.feature
    source, target = (features[code].bytes_list.value[0].decode() for code in languages)
    return source, target


VALIDATION_RATIO = 100  # where there is no validation split, one pair in so many is held out of training

MAX_VALIDATION_PAIRS = 2000  # pairs held out

METADATA_VERSION = 1  # goes up whenever `find` comes to find something else in the same data


@dataclasses.dataclass(frozen=True)
class SplitMetadata:
    """Per prepared split: digest, number of pairs, pairs with a line break; of training: rows, ascending."""

    digests: dict[str, str]
    pairs: dict[str, int]
    line_breaks: dict[str, int]
    blank: list[int]
    held_out: list[int]


def load_or_compute_metadata(
    data: prepared.PreparedDataset, languages: tuple[str, str], keeps_cr: bool = False
) -> SplitMetadata:
    """Reads a data set in one direction of translation, or what was found in it before and kept beside it.

    `keeps_cr` is as `Split` has it.

    Raises:
      UserError: there is nothing to train on.
    """
    if "train" not in data.names:
        raise UserError(f"{data.folder}: expected a split 'train', got {', '.join(data.names) or 'none'}")
    path = data.folder / f"contents.{'-'.join(languages)}.json"
    if facts := _load_metadata(path, data.digest()):
        return facts
    splits = {name: Split(name, "", languages, data.records(name), None, keeps_cr) for name in data.names}
    keys: dict[str, np.ndarray] = {}
    blank: dict[str, np.ndarray] = {}
    digests, line_breaks = {}, {}
    for name, split in splits.items():
        digests[name], keys[name], blank[name], line_breaks[name] = _scan_pairs(split)
    rows = np.flatnonzero(~blank["train"])
    if not len(rows):
        raise UserError(f"all {len(splits['train']):,} training pairs have a blank side: nothing is left to train on")
    held_out = [] if "validation" in splits else rows[_select_validation(keys["train"][rows])].tolist()
    pairs = {name: len(split) for name, split in splits.items()}
    facts = SplitMetadata(digests, pairs, line_breaks, np.flatnonzero(blank["train"]).tolist(), held_out)
    _save_metadata(path, data.digest(), facts)
    return facts


def _scan_pairs(split: Split) -> tuple[str, np.ndarray, np.ndarray, int]:
    """Reads all pairs of a split once.

    Returns:
      The digest of the pairs; a hash of each source sentence, [N] uint64; which pairs are blank, [N] bool: a side has
      nothing but whitespace; and how many are stored with a line break.
    """
    digest, keys, blank, line_breaks = hashlib.sha256(), array.array("Q"), array.array("b"), 0
    for stored in log_progress(split.stored(), lambda count: f"data: looked at {count:,} pairs"):
        line_breaks += any("\n" in text for text in stored)
        source, target = split.lines(stored)
        texts = (source.encode(), target.encode())
        digest.update(b"%d %d " % (len(texts[0]), len(texts[1])) + texts[0] + texts[1])
        keys.append(hash64(texts[0]))
        blank.append(not (source.strip() and target.strip()))
    return digest.hexdigest(), np.array(keys, np.uint64), np.array(blank, bool), line_breaks


def hash64(text: bytes) -> int:
    """A hash of 64 bits, the same everywhere; two of 40 million sentences share one by a chance of 1 in 20,000."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def _select_validation(keys: np.ndarray) -> np.ndarray:
    """Which of the sentences with these hashes, [N] uint64, to hold out: [N] bool.

    Takes hashes from the lowest up, all rows of one together so that equal sentences fall on the same
    side, while they fit in 1 / SHARE of all rows and in MOST; the rarest sentence if none fits.
    """
    hashes, counts = np.unique(keys, return_counts=True)
    if len(hashes) == 1:
        raise UserError("training has one distinct source sentence: none can be held out; bring validation files")
    room = min(max(len(keys) // VALIDATION_RATIO, 1), MAX_VALIDATION_PAIRS)
    taken = []
    for key, count in zip(hashes, counts, strict=True):
        if count <= room:
            taken.append(key)
            room -= count
        if not room:
            break
    return np.isin(keys, taken or hashes[np.argmin(counts)])


def _save_metadata(path: epath.Path, files: str, facts: SplitMetadata) -> None:
    text = json.dumps([METADATA_VERSION, files, dataclasses.asdict(facts)])
    prepared.write_cache(path, f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}\n".encode())


def _load_metadata(path: epath.Path, files: str) -> SplitMetadata | None:
    """What `_keep` wrote for the same files by the same recipe, or None."""
    if not path.exists():
        return None
    digest, _, text = path.read_bytes().rstrip(b"\n").partition(b"\n")
    if hashlib.sha256(text).hexdigest().encode() != digest:
        return None
    *made_of, facts = json.loads(text)
    return SplitMetadata(**facts) if made_of == [METADATA_VERSION, files] else None


class Corpus:
    """The splits of a data set in one direction of translation.

    Attributes:
      source_language, target_language: their codes.
      names: the splits there are.
      dropped: how many training pairs are left out because a side is blank.
      digest: changes when any split does; in hexadecimal.
    """

    def __init__(self, data: prepared.PreparedDataset, languages: tuple[str, str], keeps_cr: bool = False):
        """`keeps_cr` is as `Split` has it."""
        self.source_language, self.target_language = self._languages = languages
        self._data, self._keeps_cr = data, keeps_cr
        facts = load_or_compute_metadata(data, languages, keeps_cr)
        self.dropped = len(facts.blank)
        # Split → the prepared split that it is read from, and which rows of that.
        self._views: dict[str, tuple[str, np.ndarray | None]] = {name: (name, None) for name in data.names}
        if facts.blank or facts.held_out:
            kept = np.setdiff1d(np.arange(facts.pairs["train"]), facts.blank + facts.held_out, assume_unique=True)
            self._views["train"] = ("train", kept)
        if facts.held_out:
            self._views["validation"] = ("train", np.array(facts.held_out))
        self.names = list(self._views)
        self._digests = {name: self._digest(facts, *view) for name, view in self._views.items()}
        self.digest = hashlib.sha256(json.dumps(self._digests, sort_keys=True).encode()).hexdigest()
        self._report(facts)

    def _digest(self, facts: SplitMetadata, part: str, rows: np.ndarray | None) -> str:
        chosen = b"all" if rows is None else rows.astype("<i8").tobytes()
        return hashlib.sha256(facts.digests[part].encode() + chosen).hexdigest()

    def _report(self, facts: SplitMetadata) -> None:
        count = facts.pairs["train"]
        if facts.blank:
            log_info(f"data: {self.dropped:,} of {count:,} training pairs have a blank side: left out")
        for name, breaks in facts.line_breaks.items():
            if breaks:
                log_info(
                    f"data: {breaks:,} of {facts.pairs[name]:,} pairs of {name} hold a line break: read as a space"
                )
        if facts.held_out:
            held_out = f"{len(facts.held_out):,} of {count:,} training pairs"
            log_info(f"data: no validation split: {held_out} are held out as one")

    def split(self, name: str) -> Split:
        """The split of that name; "test" is also the only one whose name starts with it.

        Raises:
          UserError: there is no such split or more than one, or its files are not as they were prepared.
        """
        near = [other for other in self.names if name == "test" and other.startswith(name)]
        if name not in self.names and len(near) == 1:
            name = near[0]
        if name not in self.names:
            found = f"several, {', '.join(near)}; name one" if near else f"only {', '.join(self.names)}"
            raise UserError(f"{self._data.folder}: expected a split {name!r}, found {found}")
        part, rows = self._views[name]
        return Split(name, self._digests[name], self._languages, self._data.records(part), rows, self._keeps_cr)


def validate_source(data: DataConfig) -> None:
    """Raises a UserError if the config names files, a data set or languages that are not there.

    Imports no JAX and reads no sentence; `open_corpus` may still find fault with the content.
    """
    named = () if data.tokenizer in TRAINED_TOKENIZERS else ("tokenizer",)
    for field in (*PATHS, *named):
        if reason := object_storage.unsupported_reason(getattr(data, field)):
            raise UserError(f"config.data.{field}: {reason}")
    if reason := object_storage.unsupported_reason(os.environ.get("TFDS_DATA_DIR", "")):
        raise UserError(f"TFDS_DATA_DIR: {reason}")
    if data.name == "text":
        local_text.find_splits(data)
        return
    with prepared.silence_tfds():
        builder = _tfds_builder(data)
    features = builder.info.features
    languages = {code for code in features or {} if isinstance(features[code], tfds.features.Text)}
    if not {data.source_language, data.target_language} <= languages:
        configs = f"; its configs: {', '.join(builder.builder_configs)}" if builder.builder_configs else ""
        raise UserError(
            f"config.data: {builder.info.full_name} has {', '.join(sorted(languages)) or 'no text by language'}; "
            f"expected source_language = {data.source_language!r} and target_language = {data.target_language!r} in it"
            f"{configs}"
        )
    built_in = type(builder).__module__.startswith("tensorflow_datasets.") and builder.name not in WMT_NAMES
    if built_in and not prepared.is_prepared(builder) and not importlib.util.find_spec("tensorflow"):
        raise UserError(
            f"{builder.info.full_name} is not prepared in {builder.data_path}, and TFDS prepares it with TensorFlow, "
            f"which is not installed here; {prepared.preparation_instructions(builder)}"
        )


def open_corpus(data: DataConfig) -> Corpus:
    """Opens the data set of a config, prepared first if it is not yet; says on stderr what it does.

    Raises:
      UserError: as `check`, or the data cannot be prepared, or is damaged, or leaves nothing to train on.
    """
    validate_source(data)
    name, folder = _dataset_name(data), data_dir(data)
    make: Callable[[], Any] = functools.partial(_tfds_builder, data)
    if data.name == "text":
        make = functools.partial(local_text.ParallelText, local_text.find_splits(data), folder)
    elif name in WMT_NAMES:
        make = functools.partial(wmt.WmtBuilder, _tfds_builder(data), folder, data.manual_dir)
    own = name in ("text", "cldr", *WMT_NAMES)
    # TFDS splits the archives of WMT at LF alone, and its records are left as it makes them.
    keeps_cr = name in WMT_NAMES
    return Corpus(prepared.prepare(make, own=own), (data.source_language, data.target_language), keeps_cr)


def data_dir(data: DataConfig) -> str:
    """The folder of prepared data and token ids; of an address in object storage its local copy."""
    folder = data.data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    if object_storage.is_remote(folder):
        return object_storage.local_cache_dir(folder)
    return os.fspath(epath.Path(folder).expanduser())


def _dataset_name(data: DataConfig) -> str:
    """The name of the data set without config and version."""
    return re.split("[/:]", data.name)[0]


def _tfds_builder(data: DataConfig) -> Any:
    """The builder of `data.name`, with the config of the two languages where the name gives none."""
    name, languages = data.name, (data.source_language, data.target_language)
    options = {"data_dir": data_dir(data), "file_format": "array_record"}
    if name.split("/")[0] == "cldr":
        return _cldr_builder(name, languages, options)
    importlib.import_module("tensorflow_datasets.translate")  # for the names that it registers
    try:
        if re.fullmatch(r"\w+", name):
            name = "/".join(filter(None, (name, _match_config(_config_names(name, options["data_dir"]), languages))))
        return tfds.builder(name, **options)
    except tfds.core.DatasetNotFoundError as error:
        raise UserError(_unknown_dataset_message(name, str(error), options["data_dir"])) from error
    except Exception as error:  # TFDS and what it reads from the folder raise nearly anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if "File format" in reason:
            reason = (
                f"it lies in {options['data_dir']} in another format than array_record, which TensorFlow alone reads; "
                "move that folder away, or choose another config.data.data_dir"
            )
        raise UserError(f"config.data.name: TFDS cannot open {name!r}: {reason}") from error


def _cldr_builder(name: str, languages: tuple[str, str], options: dict[str, Any]) -> Any:
    from transformer.data.cldr.generator import Cldr

    configs = list(Cldr.builder_configs)
    config = name.partition("/")[2] or _match_config(configs, languages)
    if config not in configs:
        raise UserError(
            f"config.data: {name} is offered in {', '.join(configs)}, both directions each; got source_language = "
            f"{languages[0]!r}, target_language = {languages[1]!r}"
        )
    return Cldr(config=config, **options)


def _config_names(name: str, data_dir: str) -> list[str]:
    """The configs of a data set, as its code has them or else as they lie prepared in the data folder."""
    try:
        return list(tfds.builder_cls(name).builder_configs)
    except tfds.core.DatasetNotFoundError:
        return sorted({path.parent.parent.name for path in epath.Path(data_dir).glob(f"{name}/*/*/features.json")})


def _match_config(configs: list[str], languages: tuple[str, str]) -> str:
    """The config named after two languages in either order, as TFDS names them: de-en, pt_to_en, ende; or ""."""
    for one, other in (languages, languages[::-1]):
        for between in ("-", "_to_", "_", ""):
            if f"{one}{between}{other}" in configs:
                return f"{one}{between}{other}"
    return ""


def _unknown_dataset_message(name: str, error: str, data_dir: str) -> str:
    """The message for a data set that TFDS does not know; its error lists those it does."""
    known = {"text", "cldr", *re.findall(r"^\s*- (\w+)$", error, re.MULTILINE)}
    close = difflib.get_close_matches(name.split("/")[0], known, 3, 0.7)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    return (
        f"config.data.name: no data set {name!r} in TFDS nor prepared in {data_dir}; {hint}"
        "Expected text for your own files, cldr, or a translation set of TFDS such as wmt14_translate/de-en"
    )
