"""Whether a config can be: known fields, right types, values in bounds, and fields that go together.

It runs before JAX is imported, so that a mistake costs a message and not a compilation.
"""

import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Iterable
from typing import Any

from ml_collections import config_dict

from transformer import device_limits
from transformer.config import (
    FOLLOW_EMB_DIM,
    SECTIONS,
    TEXT_PATHS,
    TINY,
    TRAINED_TOKENIZERS,
    Config,
    DataConfig,
    TrainConfig,
)
from transformer.errors import UserError

ENDING = ("cosine", "linear")  # schedules that reach 0 at train.num_steps
Readers = dict[str, tuple[str, ...]]  # field → the values of another field with which it is read


def resolve(values: Any, needs_data: bool = True, is_new: bool = True) -> Config:
    """Checks a ConfigDict or nested mapping and returns it as frozen dataclasses.

    Args:
      needs_data: it must name its text.
      is_new: what only a config that a run begins with is refused for; those that runs have kept must stay readable.

    Raises:
      UserError: an unknown section or field, a wrong type, a value out of bounds, or fields that
        cannot go together; the message names the field, what was expected and what was got.
    """
    values = sections(values)
    resolved = {}
    for name, section in SECTIONS.items():
        given = values.get(name, {})
        if name == "model" and "emb_dim" in given:
            given = {**dict.fromkeys(FOLLOW_EMB_DIM, given["emb_dim"]), **given}
        fields = {field.name: field for field in dataclasses.fields(section)}
        refuse_unknown(f"config.{name}", given, list(fields))
        resolved[name] = section(**{key: _checked(f"config.{name}.{key}", fields[key], v) for key, v in given.items()})
    config = Config(**resolved)
    _check_together(config, needs_data)
    if is_new:
        _check_new(config)
    return config


def sections(values: Any) -> dict[str, dict]:
    """A ConfigDict or nested mapping as sections of fields, which are not looked at yet."""
    if isinstance(values, config_dict.ConfigDict):
        values = values.to_dict()
    if not isinstance(values, dict):
        raise UserError(f"config: expected sections {', '.join(SECTIONS)}, got {type(values).__name__}")
    refuse_unknown("config", values, list(SECTIONS))
    for name, given in values.items():
        if not isinstance(given, dict):
            raise UserError(f"config.{name}: expected a section of fields, got {given!r}")
    return values


def from_json(text: str, path: str) -> Config:
    """Reads what `Config.to_json` wrote; `path` is named in errors."""
    try:
        values = json.loads(text)
    except ValueError as error:
        raise UserError(f"{path}: not a config in JSON: {error}") from error
    return resolve(values, is_new=False)


def refuse_unknown(where: str, given: Iterable[str], known: list[str]) -> None:
    """Raises a UserError for the first name that is not known, with the nearest that is."""
    for key in given:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
            raise UserError(f"{where}: unknown field {key!r}; {hint}")


def _checked(where: str, field: dataclasses.Field, value: Any) -> Any:
    """The value in the field's type and within its bounds, or a UserError."""
    kind = typing.cast(type, field.type)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise UserError(f"{where}: expected {kind.__name__}, got {value!r} of type {type(value).__name__}")
    limits = types.SimpleNamespace(**field.metadata)
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{where}: expected a finite number, got {value}")
    if limits.one_of and value not in limits.one_of:
        raise UserError(f"{where}: expected one of {', '.join(limits.one_of)}, got {value!r}")
    if limits.low is not None and value < limits.low:
        bound = "above 0" if limits.low == TINY else f"at least {limits.low}"
        raise UserError(f"{where}: expected {bound}, got {value}")
    if limits.high is not None and value > limits.high:
        raise UserError(f"{where}: expected at most {limits.high}, got {value}")
    return value


def _check_together(config: Config, needs_data: bool) -> None:
    model, data, optimizer, train, decode = config.model, config.data, config.optimizer, config.train, config.decode
    for name, width in (("qkv_dim", model.qkv_dim), ("value_dim", model.value_dim)):
        if model.family == "attention" and width % model.num_heads:
            raise UserError(f"config.model: num_heads = {model.num_heads} does not divide {name} = {width}")
    if model.positions == "sinusoidal" and model.emb_dim % 2:
        why = "two directions share it" if model.family == "recurrent" else "sinusoidal positions need it"
        raise UserError(f"config.model.emb_dim: expected an even width, {why}; got {model.emb_dim}")
    longest = max(data.max_length, decode.max_source_tokens + decode.max_extra_length)
    if model.positions == "learned" and longest > model.max_positions:
        raise UserError(
            f"config.model.max_positions: learned positions must cover the longest sequence, {longest} = max(data."
            f"max_length, decode.max_source_tokens + decode.max_extra_length), got {model.max_positions}"
        )
    _check_family(config)
    if train.batch_tokens < data.max_length:
        raise UserError(
            f"config.train.batch_tokens: expected room for one sentence of data.max_length = {data.max_length} tokens, "
            f"got {train.batch_tokens}"
        )
    if 0 < train.spike_factor <= 1:
        raise UserError(
            f"config.train.spike_factor: expected 0 for none, or above 1, such as 2, got {train.spike_factor}"
        )
    if not train.spike_factor and train.max_skipped_updates != TrainConfig.max_skipped_updates:
        raise UserError(
            f"config.train.max_skipped_updates = {train.max_skipped_updates}: read only with spike_factor; set that "
            f"too, or leave it at {TrainConfig.max_skipped_updates}"
        )
    if not train.init_from and train.init_checkpoint != TrainConfig.init_checkpoint:
        raise UserError("config.train.init_checkpoint: read only with init_from; set that too, or leave it at latest")
    if train.init_from and data.tokenizer not in TRAINED_TOKENIZERS:
        raise UserError(
            f"config.data.tokenizer = {data.tokenizer}: with train.init_from the vocabulary is that of the other run; "
            "leave it at bpe"
        )
    if optimizer.name == "adam" and optimizer.weight_decay:
        raise UserError(
            "config.optimizer.weight_decay: adam has none; set optimizer.name to adamw, or weight_decay to 0"
        )
    if optimizer.schedule in ("paper", "inverse_sqrt") and not optimizer.warmup_steps:
        raise UserError(f"config.optimizer.warmup_steps: the {optimizer.schedule} schedule needs at least 1, got 0")
    device_limits.check(config)
    _check_data(data, needs_data)


def _check_new(config: Config) -> None:
    """What would train, and not as it was meant."""
    optimizer, steps = config.optimizer, config.train.num_steps
    if optimizer.schedule in ENDING and optimizer.warmup_steps >= steps:
        raise UserError(
            f"config.optimizer.warmup_steps: the {optimizer.schedule} schedule falls from its peak to 0 at "
            f"train.num_steps = {steps}: expected fewer steps, got {optimizer.warmup_steps}; change either"
        )
    _refuse_unread("data", config.data, "batching", {"num_buckets": ("bucket",)})
    _refuse_unread("decode", config.decode, "method", DECODE_READERS)


def _check_family(config: Config) -> None:
    """Fields that the family does not read must be left alone, as must meshes that it cannot be split over."""
    model = config.model
    others, recurrent = ("attention", "convolutional"), ("recurrent", "convolutional")
    only_attention = "num_heads mlp_dim norm attention_dropout_rate mlp_dropout_rate attention qkv_init_gain".split()
    readers: Readers = {
        **dict.fromkeys((*only_attention, *FOLLOW_EMB_DIM), ("attention",)),
        **dict.fromkeys(("positions", "max_positions", "remat", "scan_layers"), others),
        "attention_score": recurrent,
        "kernel_width": ("convolutional",),
    }
    _refuse_unread("model", model, "family", readers, dict.fromkeys(FOLLOW_EMB_DIM, model.emb_dim))
    if model.family == "convolutional" and model.kernel_width % 2 == 0:
        raise UserError(f"config.model.kernel_width: expected an odd number, got {model.kernel_width}")
    for name, parts in (("mesh.tensor", config.mesh.tensor), ("mesh.sequence", config.mesh.sequence)):
        if model.family != "attention" and parts != 1:
            raise UserError(
                f"config.{name} = {parts}: splits the attention family alone, got family = {model.family}; set it to 1 "
                "and use mesh.data or mesh.fsdp"
            )


DECODE_READERS: Readers = {  # by decode.method; all other fields are read with any
    **dict.fromkeys(("beam_size", "coverage_penalty", "early_stopping"), ("beam",)),
    **dict.fromkeys(("length_penalty", "length_penalty_form"), ("beam", "sample")),
    **dict.fromkeys(("temperature", "top_k", "top_p", "seed"), ("sample", "mbr")),
    "mbr_samples": ("mbr",),
}


def with_decode(config: Config, fields: dict[str, Any]) -> Config:
    """The config with other fields of its decode section; if with another method, without what only the old one reads.

    Raises:
      UserError: as `resolve`, and of a field that the method does not read, whatever its value.
    """
    values = dataclasses.asdict(config)
    method = fields.get("method", config.decode.method)
    own = {name: value for name, value in values["decode"].items() if method in DECODE_READERS.get(name, (method,))}
    changed = resolve({**values, "decode": {**own, **fields}}, is_new=False)
    _refuse_unread("decode", changed.decode, "method", DECODE_READERS, given=fields)
    return changed


def _refuse_unread(
    where: str, section: Any, switch: str, readers: Readers, defaults: Any = None, given: Iterable[str] = ()
) -> None:
    """Fields that are read with other values of `switch` alone must be at their defaults, and not given at all."""
    chosen = getattr(section, switch)
    for name, values in readers.items():
        value, default = getattr(section, name), (defaults or {}).get(name, getattr(type(section), name))
        if chosen not in values and (name in given or value != default):
            raise UserError(
                f"config.{where}.{name} = {value}: read only with {switch} = {' or '.join(values)}, got {switch} = "
                f"{chosen}; leave {name} out (default: {default}), or change the {switch}"
            )


def _check_data(data: DataConfig, needs_data: bool) -> None:
    for side in ("source_language", "target_language"):
        code = getattr(data, side)
        if not code or not code.replace("-", "").replace("_", "").isalnum():
            raise UserError(f"config.data.{side}: expected a language code such as 'en', got {code!r}")
    if data.source_language == data.target_language:
        raise UserError(f"config.data: source_language and target_language are both {data.source_language!r}")
    if data.tokenizer not in TRAINED_TOKENIZERS and not data.tokenizer.endswith((".model", ".codes", ".json")):
        raise UserError(
            "config.data.tokenizer: expected bpe, unigram or the path of a .model, .codes or .json file, got "
            f"{data.tokenizer!r}"
        )
    given = [name for name in (*TEXT_PATHS, "columns") if getattr(data, name)]
    if data.name != "text":
        if given:
            raise UserError(f"config.data.{given[0]}: read only with data.name = 'text', got data.name = {data.name!r}")
        return
    ways = [name for name in ("dir", "train_source", "train") if getattr(data, name)]
    if len(ways) > 1 or (needs_data and not ways):
        raise UserError(
            "config.data: with data.name = 'text' set exactly one of dir (a folder of train.LANG files), "
            f"train_source with train_target, or train (one file); got {', '.join(ways) or 'none'}"
        )
    for side in ("train", "valid"):
        one, other = getattr(data, f"{side}_source"), getattr(data, f"{side}_target")
        if bool(one) != bool(other):
            raise UserError(f"config.data: {side}_source and {side}_target go together, got {one!r} and {other!r}")
    if data.valid and data.valid_source:
        raise UserError("config.data: set valid or valid_source with valid_target, not both")
    if data.dir and (data.valid or data.valid_source):
        raise UserError("config.data: data.dir brings its own val files; leave the valid fields empty")
