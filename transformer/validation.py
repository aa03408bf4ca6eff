"""Whether a config can be: known fields, right types, values in bounds, and fields that go together.

It runs before JAX is imported, so that a mistake costs a message and not a compilation.
"""

import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from ml_collections import config_dict

from transformer.config import (
    FOLLOW_EMB_DIM,
    SECTIONS,
    TEXT_PATHS,
    TINY,
    TRAINED_TOKENIZERS,
    Config,
    DataConfig,
    DecodeConfig,
    TrainConfig,
)
from transformer.errors import UserError

KERNELS = {"cudnn": "gpu", "splash": "tpu"}  # values of model.attention that run on one platform alone
ENDING = ("cosine", "linear")  # schedules that reach 0 at train.num_steps


def resolve(values: Any) -> Config:
    """Checks a ConfigDict or nested mapping and returns it as frozen dataclasses.

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
    _check_together(config)
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
    return resolve(values)


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


def _check_together(config: Config) -> None:
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
    if optimizer.name == "adam" and optimizer.weight_decay:
        raise UserError(
            "config.optimizer.weight_decay: adam has none; set optimizer.name to adamw, or weight_decay to 0"
        )
    if optimizer.schedule in ("paper", "inverse_sqrt") and not optimizer.warmup_steps:
        raise UserError(f"config.optimizer.warmup_steps: the {optimizer.schedule} schedule needs at least 1, got 0")
    if optimizer.schedule in ENDING and optimizer.warmup_steps >= train.num_steps:
        raise UserError(
            f"config.optimizer.warmup_steps: the {optimizer.schedule} schedule falls from its peak to 0 at "
            f"train.num_steps = {train.num_steps}: expected fewer steps, got {optimizer.warmup_steps}; change either"
        )
    _check_mesh(config)
    _check_kernel(config)
    _check_data(data)
    _check_decode(decode)


def _check_family(config: Config) -> None:
    """Fields that the family does not read must be left alone, as must meshes that it cannot be split over."""
    model = config.model
    others, recurrent = ("attention", "convolutional"), ("recurrent", "convolutional")
    only_attention = "num_heads mlp_dim norm attention_dropout_rate mlp_dropout_rate attention qkv_init_gain".split()
    readers = {
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


def with_decode(config: Config, fields: dict[str, Any]) -> Config:
    """The config with other fields of its decode section, checked as a whole.

    Raises:
      UserError: as `resolve`.
    """
    values = dataclasses.asdict(config)
    return resolve({**values, "decode": {**values["decode"], **fields}})


def _check_decode(decode: DecodeConfig) -> None:
    """Fields that the method does not read must be left alone."""
    drawing = ("sample", "mbr")
    readers: dict[str, tuple] = dict.fromkeys(("temperature", "top_k", "top_p", "seed"), drawing)
    readers |= {"mbr_samples": ("mbr",), "coverage_penalty": ("beam",), "early_stopping": ("beam",)}
    _refuse_unread("decode", decode, "method", readers)


def _refuse_unread(section: str, fields: Any, by: str, readers: Mapping[str, tuple], unset: Mapping = {}) -> None:
    """Fields that the value of `by` does not read must have their defaults: those in `unset`, or of their class."""
    chosen = getattr(fields, by)
    for name, wanted in readers.items():
        value, default = getattr(fields, name), unset.get(name, getattr(type(fields), name))
        if chosen not in wanted and value != default:
            raise UserError(
                f"config.{section}.{name} = {value}: read only with {by} = {' or '.join(wanted)}, got {by} = {chosen}; "
                f"leave {name} at {default}, or change the {by}"
            )


def _check_mesh(config: Config) -> None:
    """What the devices' number is not needed for; `sharding` checks the rest."""
    sizes = dataclasses.asdict(config.mesh)
    for name, size in sizes.items():
        if size == 0:
            raise UserError(f"config.mesh.{name}: expected -1 for all devices that are left, or at least 1, got 0")
    filling = [name for name, size in sizes.items() if size == -1]
    if len(filling) > 1:
        raise UserError(
            f"config.mesh: expected -1 in one field at most, got it in {' and '.join(filling)}; set mesh.{filling[0]} "
            "to a number"
        )
    model, mesh = config.model, config.mesh
    for name, parts, field, size in (
        ("mesh.fsdp", mesh.fsdp, "model.emb_dim", model.emb_dim),
        ("mesh.tensor", mesh.tensor, "model.num_heads", model.num_heads),
        ("mesh.tensor", mesh.tensor, "model.mlp_dim", model.mlp_dim),
        ("mesh.tensor", mesh.tensor, "data.vocab_size", config.data.vocab_size),
    ):
        if parts > 0 and size % parts:
            raise UserError(does_not_divide(name, parts, field, size))


@dataclasses.dataclass(frozen=True)
class AttentionUse:
    """What a kernel is asked for.

    Attributes:
      key_width, value_width: of each head.
      dropout_rate: of attention weights.
      packed: rows hold several sentences.
      parts: devices that share the length of a row.
    """

    dtype: str
    key_width: int
    value_width: int
    dropout_rate: float
    packed: bool
    parts: int

    @classmethod
    def of(cls, config: Config) -> "AttentionUse":
        """By a config; a length that a mesh fills up is taken as whole."""
        model, heads = config.model, config.model.num_heads
        widths = model.qkv_dim // heads, model.value_dim // heads
        packed, parts = config.data.batching == "pack", max(config.mesh.sequence, 1)
        return cls(model.dtype, *widths, model.attention_dropout_rate, packed, parts)


def kernel_misfit(path: str, use: AttentionUse) -> str:
    """Why a kernel cannot do this on any device, for people; empty where it can."""
    if use.dropout_rate:
        return f"it drops no attention weights: expected model.attention_dropout_rate = 0, got {use.dropout_rate}"
    if use.parts > 1:
        return f"it needs whole sentences: expected mesh.sequence = 1, got {use.parts}, for which there is ring"
    if path == "splash":
        return ""
    if use.dtype != "bfloat16":
        return f"it computes in half precision: expected model.dtype = bfloat16, got {use.dtype}"
    if use.key_width != use.value_width:
        return f"expected keys and values of one width, got {use.key_width} and {use.value_width} a head"
    if use.key_width % 8 or use.key_width > 128:
        return f"expected a head's width that 8 divides, at most 128, got model.qkv_dim / num_heads = {use.key_width}"
    return "it takes rows of one sentence: expected data.batching = bucket, got pack" if use.packed else ""


def _check_kernel(config: Config) -> None:
    """What the platform is not needed for; `kernels` checks that."""
    path = config.model.attention
    misfit = kernel_misfit(path, AttentionUse.of(config)) if path in KERNELS else ""
    if misfit:
        raise UserError(f"config.model.attention = {path}: {misfit}; auto takes what fits")


def does_not_divide(mesh_field: str, parts: int, field: str, size: int) -> str:
    """A mesh that cannot split a model's dimension, for people."""
    return (
        f"config.{mesh_field} = {parts} does not divide {field} = {size}; set {mesh_field} to "
        f"{math.gcd(parts, size)}, or {field} to {-(-size // parts) * parts}"
    )


def _check_data(data: DataConfig) -> None:
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
    _refuse_unread("data", data, "batching", {"num_buckets": ("bucket",)})
    given = [name for name in (*TEXT_PATHS, "columns") if getattr(data, name)]
    if data.name != "text":
        if given:
            raise UserError(f"config.data.{given[0]}: read only with data.name = 'text', got data.name = {data.name!r}")
        return
    ways = [name for name in ("dir", "train_source", "train") if getattr(data, name)]
    if len(ways) != 1:
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
