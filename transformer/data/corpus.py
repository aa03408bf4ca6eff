"""The one door to data: a DataConfig becomes splits of sentence pairs.

Training leaves out pairs with a blank side; every other split keeps all. Where there is no
`validation`, a part of training is held out by a hash of the source sentence.
"""

import difflib
import functools
import hashlib
import importlib
import importlib.util
import json
import os
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from transformer.config.schema import PATHS, TRAINED_TOKENIZERS, WMT_NAMES, DataConfig
from transformer.data import contents, local_text, prepared, wmt
from transformer.data.split import Split
from transformer.runtime import object_storage
from transformer.runtime.errors import UserError
from transformer.runtime.logging import say


class Corpus:
    """The splits of a data set in one direction of translation.

    Attributes:
      source_language, target_language: their codes.
      names: the splits there are.
      dropped: how many training pairs are left out because a side is blank.
      digest: changes when any split does; in hexadecimal.
    """

    def __init__(self, data: prepared.Prepared, languages: tuple[str, str], keeps_cr: bool = False):
        """`keeps_cr` is as `Split` has it."""
        self.source_language, self.target_language = self._languages = languages
        self._data, self._keeps_cr = data, keeps_cr
        facts = contents.find(data, languages, keeps_cr)
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

    def _digest(self, facts: contents.Facts, part: str, rows: np.ndarray | None) -> str:
        chosen = b"all" if rows is None else rows.astype("<i8").tobytes()
        return hashlib.sha256(facts.digests[part].encode() + chosen).hexdigest()

    def _report(self, facts: contents.Facts) -> None:
        count = facts.pairs["train"]
        if facts.blank:
            say(f"data: {self.dropped:,} of {count:,} training pairs have a blank side: left out")
        for name, breaks in facts.line_breaks.items():
            if breaks:
                say(f"data: {breaks:,} of {facts.pairs[name]:,} pairs of {name} hold a line break: read as a space")
        if facts.held_out:
            held_out = f"{len(facts.held_out):,} of {count:,} training pairs"
            say(f"data: no validation split: {held_out} are held out as one")

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


def check(data: DataConfig) -> None:
    """Raises a UserError if the config names files, a data set or languages that are not there.

    Imports no JAX and reads no sentence; `open_corpus` may still find fault with the content.
    """
    named = () if data.tokenizer in TRAINED_TOKENIZERS else ("tokenizer",)
    for field in (*PATHS, *named):
        if reason := object_storage.missing(getattr(data, field)):
            raise UserError(f"config.data.{field}: {reason}")
    if reason := object_storage.missing(os.environ.get("TFDS_DATA_DIR", "")):
        raise UserError(f"TFDS_DATA_DIR: {reason}")
    if data.name == "text":
        local_text.find_splits(data)
        return
    with prepared.quiet():
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
            f"which is not installed here; {prepared.how_to_prepare(builder)}"
        )


def open_corpus(data: DataConfig) -> Corpus:
    """Opens the data set of a config, prepared first if it is not yet; says on stderr what it does.

    Raises:
      UserError: as `check`, or the data cannot be prepared, or is damaged, or leaves nothing to train on.
    """
    check(data)
    name, folder = _base(data), data_dir(data)
    make: Callable[[], Any] = functools.partial(_tfds_builder, data)
    if data.name == "text":
        make = functools.partial(local_text.ParallelText, local_text.find_splits(data), folder)
    elif name in WMT_NAMES:
        make = functools.partial(wmt.Wmt, _tfds_builder(data), folder, data.manual_dir)
    own = name in ("text", "cldr", *WMT_NAMES)
    # TFDS splits the archives of WMT at LF alone, and its records are left as it makes them.
    keeps_cr = name in WMT_NAMES
    return Corpus(prepared.prepare(make, own=own), (data.source_language, data.target_language), keeps_cr)


def data_dir(data: DataConfig) -> str:
    """The folder of prepared data and token ids; of an address in object storage its local copy."""
    folder = data.data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    if object_storage.is_remote(folder):
        return object_storage.local_copy(folder)
    return os.fspath(epath.Path(folder).expanduser())


def _base(data: DataConfig) -> str:
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
            name = "/".join(filter(None, (name, _config_of(_configs(name, options["data_dir"]), languages))))
        return tfds.builder(name, **options)
    except tfds.core.DatasetNotFoundError as error:
        raise UserError(_unknown(name, str(error), options["data_dir"])) from error
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
    config = name.partition("/")[2] or _config_of(configs, languages)
    if config not in configs:
        raise UserError(
            f"config.data: {name} is offered in {', '.join(configs)}, both directions each; got source_language = "
            f"{languages[0]!r}, target_language = {languages[1]!r}"
        )
    return Cldr(config=config, **options)


def _configs(name: str, data_dir: str) -> list[str]:
    """The configs of a data set, as its code has them or else as they lie prepared in the data folder."""
    try:
        return list(tfds.builder_cls(name).builder_configs)
    except tfds.core.DatasetNotFoundError:
        return sorted({path.parent.parent.name for path in epath.Path(data_dir).glob(f"{name}/*/*/features.json")})


def _config_of(configs: list[str], languages: tuple[str, str]) -> str:
    """The config named after two languages in either order, as TFDS names them: de-en, pt_to_en, ende; or ""."""
    for one, other in (languages, languages[::-1]):
        for between in ("-", "_to_", "_", ""):
            if f"{one}{between}{other}" in configs:
                return f"{one}{between}{other}"
    return ""


def _unknown(name: str, error: str, data_dir: str) -> str:
    """The message for a data set that TFDS does not know; its error lists those it does."""
    known = {"text", "cldr", *re.findall(r"^\s*- (\w+)$", error, re.MULTILINE)}
    close = difflib.get_close_matches(name.split("/")[0], known, 3, 0.7)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    return (
        f"config.data.name: no data set {name!r} in TFDS nor prepared in {data_dir}; {hint}"
        "Expected text for your own files, cldr, or a translation set of TFDS such as wmt14_translate/de-en"
    )
