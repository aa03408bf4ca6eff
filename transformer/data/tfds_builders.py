"""Finds the builder of a data set: those of TFDS, those that a prepared folder describes, and `cldr`."""

import difflib
import importlib
import importlib.util
import os
import re
from typing import Any

import tensorflow_datasets as tfds
from etils import epath

from transformer.config.schema import WMT_NAMES, DataConfig
from transformer.data import prepared
from transformer.runtime import object_storage
from transformer.runtime.errors import UserError


def data_dir(data: DataConfig) -> str:
    """The folder of prepared data and token ids; for an address in object storage, its local copy."""
    folder = data.data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    if object_storage.is_remote(folder):
        return object_storage.local_cache_dir(folder)
    return os.fspath(epath.Path(folder).expanduser())


def make_builder(data: DataConfig) -> Any:
    """The TFDS builder of `data.name`; if that names no config, with the config of the two languages."""
    name, languages = data.name, (data.source_language, data.target_language)
    options = {"data_dir": data_dir(data), "file_format": "array_record"}
    if name.split("/")[0] == "cldr":
        return _cldr_builder(name, languages, options)
    importlib.import_module("tensorflow_datasets.translate")  # registers its data sets
    try:
        if re.fullmatch(r"\w+", name):
            name = "/".join(filter(None, (name, _match_config(_config_names(name, options["data_dir"]), languages))))
        return tfds.builder(name, **options)
    except tfds.core.DatasetNotFoundError as error:
        raise UserError(_unknown_dataset_message(name, str(error), options["data_dir"])) from error
    except Exception as error:  # TFDS and the files that it reads raise exceptions of many types
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if "File format" in reason:
            reason = (
                f"{options['data_dir']} has it in another format than array_record, which only TensorFlow reads; "
                "move that folder away, or choose another config.data.data_dir"
            )
        raise UserError(f"config.data.name: TFDS cannot open {name!r}: {reason}") from error


def validate(data: DataConfig) -> None:
    """Raises a UserError unless TFDS has the data set in both languages, and it is or can be prepared."""
    with prepared.silence_tfds():
        builder = make_builder(data)
    features = builder.info.features
    languages = {code for code in features or {} if isinstance(features[code], tfds.features.Text)}
    if not {data.source_language, data.target_language} <= languages:
        configs = f"; its configs: {', '.join(builder.builder_configs)}" if builder.builder_configs else ""
        raise UserError(
            f"config.data: {builder.info.full_name} has {', '.join(sorted(languages)) or 'no text by language'}; "
            f"expected source_language = {data.source_language!r} and target_language = {data.target_language!r} in it"
            f"{configs}"
        )
    needs_tensorflow = prepared.is_of_tfds(builder) and builder.name not in WMT_NAMES
    if needs_tensorflow and not prepared.is_prepared(builder) and not importlib.util.find_spec("tensorflow"):
        raise UserError(
            f"{builder.info.full_name} is not prepared in {builder.data_path}, and TFDS prepares it with TensorFlow, "
            f"which is not installed here; {prepared.preparation_instructions(builder)}"
        )


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
    """The configs of a data set in TFDS, or else those prepared in the data folder."""
    try:
        return list(tfds.builder_cls(name).builder_configs)
    except tfds.core.DatasetNotFoundError:
        return sorted({path.parent.parent.name for path in epath.Path(data_dir).glob(f"{name}/*/*/features.json")})


def _match_config(configs: list[str], languages: tuple[str, str]) -> str:
    """The config for two languages in either order, named as in TFDS: de-en, pt_to_en, ende; or ""."""
    candidates = [separator.join(pair) for pair in (languages, languages[::-1]) for separator in ("-", "_to_", "_", "")]
    return next((name for name in candidates if name in configs), "")


def _unknown_dataset_message(name: str, error: str, data_dir: str) -> str:
    """The message for an unknown data set; `error` of TFDS lists the known ones."""
    known = {"text", "cldr", *re.findall(r"^\s*- (\w+)$", error, re.MULTILINE)}
    close = difflib.get_close_matches(name.split("/")[0], known, 3, 0.7)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    return (
        f"config.data.name: no data set {name!r} in TFDS nor prepared in {data_dir}; {hint}"
        "Expected text for your own files, cldr, or a translation set of TFDS such as wmt14_translate/de-en; for a "
        "builder of your own, import its module in the config file"
    )
