"""Whether a config can be: known fields, right types, values in bounds, and fields that go together.

It runs before JAX is imported, so that a mistake costs a message and not a compilation.
"""

import dataclasses
import difflib
import json
import math
import re
import types
import typing
from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

from ml_collections import config_dict

from transformer.config import schema, warm_start
from transformer.config.schema import (
    FOLLOW_EMB_DIM,
    RUN_ID,
    SECTIONS,
    TINY,
    TRAINED_TOKENIZERS,
    WMT_NAMES,
    Config,
    DataConfig,
)
from transformer.runtime.errors import UserError

BLOCKWISE_FROM = 512  # length from which `auto` needs attention whose memory is linear in it

KERNELS = {"cudnn": "gpu", "splash": "tpu"}  # values of model.attention that run on one platform alone


def check_limits(config: Config) -> None:
    """Raises a UserError where the mesh cannot split the model, or the kernel asked for cannot do what is asked."""
    _check_mesh(config)
    _check_kernel(config)


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


ENDING = ("cosine", "linear")  # schedules that reach 0 at train.num_steps


class Reader(NamedTuple):
    """A condition under which a field is read: another field, the selector, has one of these values.

    Attributes:
      selector: such as model.family.
      values: none given: any but 0 and the empty text.
    """

    selector: str
    values: tuple = ()

    def reads(self, config: Config) -> bool:
        """Whether it holds."""
        value = value_of(config, self.selector)
        if self.selector == "data.name":
            value = re.split("[/:]", value)[0]  # without the config and version of a TFDS set
        return value in self.values if self.values else bool(value)


def _unset(*selectors: str) -> tuple[Reader, ...]:
    return tuple(Reader(selector, ("",)) for selector in selectors)


ATTENTION_ALONE = Reader("model.family", ("attention",))
OWN_TEXT = Reader("data.name", ("text",))
DECODE_SAMPLES = Reader("decode.method", ("sample", "mbr"))
READERS: dict[str, tuple[Reader, ...]] = {  # all conditions must hold; other fields are read in any case
    **{
        f"model.{name}": (ATTENTION_ALONE,)
        for name in (
            "num_heads mlp_dim norm mlp_dropout_rate attention_dropout_rate attention qkv_init_gain qkv_dim value_dim"
        ).split()
    },
    **{
        f"model.{name}": (Reader("model.family", ("attention", "convolutional")),)
        for name in ("positions", "remat", "scan_layers")
    },
    "model.max_positions": (
        Reader("model.family", ("attention", "convolutional")),
        Reader("model.positions", ("learned",)),
    ),
    "model.attention_score": (Reader("model.family", ("recurrent", "convolutional")),),
    "model.kernel_width": (Reader("model.family", ("convolutional",)),),
    "mesh.tensor": (ATTENTION_ALONE,),
    "mesh.sequence": (ATTENTION_ALONE,),
    "data.columns": (OWN_TEXT,),
    "data.dir": (OWN_TEXT, *_unset("data.train_source", "data.train")),
    "data.train": (OWN_TEXT, *_unset("data.dir", "data.train_source")),
    "data.valid": (OWN_TEXT, *_unset("data.dir", "data.valid_source")),
    **{f"data.train_{side}": (OWN_TEXT, *_unset("data.dir", "data.train")) for side in ("source", "target")},
    **{f"data.valid_{side}": (OWN_TEXT, *_unset("data.dir", "data.valid")) for side in ("source", "target")},
    "data.manual_dir": (Reader("data.name", WMT_NAMES),),
    "data.tokenizer": _unset("train.init_from"),
    "data.bleu_tokenizer": (Reader("data.tokenized", (False,)),),
    "data.num_buckets": (Reader("data.batching", ("bucket",)),),
    "optimizer.weight_decay": (Reader("optimizer.name", ("adamw",)),),
    "train.max_skipped_updates": (Reader("train.spike_factor"),),
    "train.init_checkpoint": (Reader("train.init_from"),),
    **{
        f"decode.{name}": (Reader("decode.method", ("beam",)),)
        for name in ("beam_size", "coverage_penalty", "early_stopping")
    },
    **{
        f"decode.{name}": (Reader("decode.method", ("beam", "sample")),)
        for name in ("length_penalty", "length_penalty_form")
    },
    **{f"decode.{name}": (DECODE_SAMPLES,) for name in ("temperature", "top_k", "top_p", "seed")},
    "decode.mbr_samples": (Reader("decode.method", ("mbr",)),),
}


def resolve(values: Any, needs_data: bool = True, is_new: bool = True) -> Config:
    """Checks a ConfigDict or nested mapping and returns it as frozen dataclasses.

    With `train.init_from`, sizes of model and vocabulary that a new config leaves open are those of that run.

    Args:
      needs_data: it must name its text.
      is_new: also refuses what only a config that a run begins with is refused for; those that runs have kept must
        stay readable.

    Raises:
      UserError: as `typed` and `check`.
    """
    config = typed(warm_start.with_sizes(sections(values)) if is_new else values)
    check(config, needs_data, is_new)
    return config


def typed(values: Any) -> Config:
    """A ConfigDict or nested mapping as frozen dataclasses; whether its fields go together is not checked.

    Raises:
      UserError: an unknown section or field, a wrong type, or a value out of bounds; the message names the field,
        what was expected and what was got.
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
    return Config(**resolved)


def check(config: Config, needs_data: bool = True, is_new: bool = True, given: Collection[str] = ()) -> None:
    """Raises a UserError of fields that cannot go together, or that nothing reads.

    Args:
      needs_data, is_new: as `resolve`.
      given: fields set on a command line or in a call, such as model.family; they must be read, whatever their value.
    """
    _check_data(config.data, needs_data)
    for name, reader in unread(config).items():
        if name in given or (is_new and value_of(config, name) != default_of(config, name)):
            raise UserError(_why_unread(config, name, reader))
    _check_together(config)
    if is_new:
        _check_schedule(config)


def unread(config: Config) -> dict[str, Reader]:
    """The fields that nothing reads in such a config, each with the condition that does not hold."""
    found = {}
    for name, readers in READERS.items():
        failed = [reader for reader in readers if not reader.reads(config)]
        if failed:
            found[name] = failed[0]
    return found


def without_unread(config: Config, given: Collection[str]) -> tuple[Config, list[str]]:
    """The config with its defaults for fields that are no longer read, now that their selectors were given.

    A field that is itself given stays, and so does one whose selectors were not given: `check` refuses both.

    Args:
      given: as `check`.

    Returns:
      the config, and 'section.field = value' of each field that had another value than its default.
    """
    left_out, before = [], config
    for name in unread(before):
        selectors = {reader.selector for reader in READERS[name] if not reader.reads(before)}
        value, default = value_of(before, name), default_of(before, name)
        if name not in given and selectors & set(given) and value != default:
            left_out.append(f"{name} = {value}")
            config = with_value(config, name, default)
    return config, left_out


def value_of(config: Config, name: str) -> Any:
    """The value of section.field."""
    section, field = name.split(".")
    return getattr(getattr(config, section), field)


def with_value(config: Config, name: str, value: Any) -> Config:
    """The config with another value of section.field."""
    section, field = name.split(".")
    changed = dataclasses.replace(getattr(config, section), **{field: value})
    return dataclasses.replace(config, **{section: changed})


def default_of(config: Config, name: str) -> Any:
    """The default of section.field, which may follow another field."""
    section, field = name.split(".")
    return config.model.emb_dim if field in FOLLOW_EMB_DIM else getattr(SECTIONS[section], field)


def _why_unread(config: Config, name: str, reader: Reader) -> str:
    section, field = name.split(".")
    selector = reader.selector.removeprefix(f"{section}.")
    wanted = f"with {selector} = {' or '.join(map(str, reader.values))}" if reader.values else f"with {selector}"
    if reader.values == ("",):
        wanted = f"without {selector}"
    return (
        f"config.{name} = {value_of(config, name)}: read only {wanted}, got {selector} = "
        f"{value_of(config, reader.selector)}; leave {field} out (default: {default_of(config, name)}), or change the "
        f"{selector}"
    )


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
    if isinstance(values, dict):
        values.pop(RUN_ID, None)
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


def _check_together(config: Config) -> None:
    model, data, optimizer, train, decode = config.model, config.data, config.optimizer, config.train, config.decode
    for name, width in (("qkv_dim", model.qkv_dim), ("value_dim", model.value_dim)):
        if model.family == "attention" and width % model.num_heads:
            raise UserError(f"config.model: num_heads = {model.num_heads} does not divide {name} = {width}")
    if model.positions == "sinusoidal" and model.emb_dim % 2:
        why = "two directions share it" if model.family == "recurrent" else "sinusoidal positions need it"
        raise UserError(f"config.model.emb_dim: expected an even width, {why}; got {model.emb_dim}")
    row = "data.max_length" if data.length_multiple == 1 else "data.max_length rounded up to data.length_multiple"
    longest = max(data.longest_row, decode.max_source_tokens + decode.max_extra_length)
    if model.positions == "learned" and longest > model.max_positions:
        raise UserError(
            f"config.model.max_positions: learned positions must cover the longest sequence, {longest} = max({row}, "
            f"decode.max_source_tokens + decode.max_extra_length), got {model.max_positions}"
        )
    if model.family == "convolutional" and model.kernel_width % 2 == 0:
        raise UserError(f"config.model.kernel_width: expected an odd number, got {model.kernel_width}")
    if train.batch_tokens < data.longest_row:
        raise UserError(
            f"config.train.batch_tokens: expected room for one sentence of {row} = {data.longest_row} tokens, got "
            f"{train.batch_tokens}"
        )
    if 0 < train.spike_factor <= 1:
        raise UserError(
            f"config.train.spike_factor: expected 0 for none, or above 1, such as 2, got {train.spike_factor}"
        )
    if optimizer.schedule in ("paper", "inverse_sqrt") and not optimizer.warmup_steps:
        raise UserError(f"config.optimizer.warmup_steps: the {optimizer.schedule} schedule needs at least 1, got 0")
    check_limits(config)


def _check_schedule(config: Config) -> None:
    """What would train, and not as it was meant."""
    optimizer, steps = config.optimizer, config.train.num_steps
    if optimizer.schedule in ENDING and optimizer.warmup_steps >= steps:
        raise UserError(
            f"config.optimizer.warmup_steps: the {optimizer.schedule} schedule falls from its peak to 0 at "
            f"train.num_steps = {steps}: expected fewer steps, got {optimizer.warmup_steps}; change either"
        )


def with_decode(config: Config, fields: dict[str, Any]) -> Config:
    """The config with other fields of its decode section; if with another method, without what only the old one reads.

    Raises:
      UserError: as `resolve`, and of a field that the method does not read, whatever its value.
    """
    values = dataclasses.asdict(config)
    given = {f"decode.{name}" for name in fields}
    changed, _ = without_unread(typed({**values, "decode": {**values["decode"], **fields}}), given | {"decode.method"})
    check(changed, is_new=False, given=given)
    return changed


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
    if data.name != "text":
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


# What may change between two sittings of one run, as it changes no update that is still to come. Files of data
# and vocabulary may have moved: whether they are the same is seen by their digests.
HARMLESS = {
    "train": {
        "log_every_steps",
        "eval_every_steps",
        "checkpoint_every_steps",
        "early_stopping_patience",
        "keep_last",
        "keep_best",
    },
    "data": {*schema.PATHS},
    "decode": {*schema.field_names("decode")},
    "model": {"attention", "remat"},  # to rounding
    "mesh": {*schema.field_names("mesh")},
}


def ends_with_its_steps(config: Config) -> bool:
    """Whether the learning rate reaches 0 at train.num_steps, so that a run of more steps is another run."""
    return config.optimizer.schedule in ENDING
