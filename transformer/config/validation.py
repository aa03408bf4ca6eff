"""Validates a config: known fields, types, bounds, combinations of fields, and fields that do not apply.

Runs before JAX is imported, so that a mistake is reported at once and not after compilation.
"""

import dataclasses
import difflib
import json
import math
import operator
import re
import types
import typing
from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

from etils import epath
from ml_collections import config_dict

from transformer.config import mixture, schema, warm_start
from transformer.config.attention_kernels import FUSED_ATTENTION_PLATFORMS, AttentionSpec, unsupported_reason
from transformer.config.optimizers import OPTIMIZER_TRAITS, SCHEDULE_TRAITS
from transformer.config.schema import (
    POSITIVE,
    RUN_ID,
    SECTIONS,
    TOKENIZER_ALGORITHMS,
    WMT_NAMES,
    Config,
    DataConfig,
    MixtureEntry,
)
from transformer.runtime.errors import UserError
from transformer.runtime.files import user_error_on_oserror
from transformer.runtime.rounding import round_up


def _check_mesh(config: Config) -> None:
    """Checks the mesh as far as the number of devices is not needed; `mesh` checks the rest."""
    sizes = dataclasses.asdict(config.mesh)
    for name, size in sizes.items():
        if size == 0:
            raise UserError(f"config.mesh.{name}: expected -1 for all remaining devices, or at least 1, got 0")
    inferred = [name for name, size in sizes.items() if size == -1]
    if len(inferred) > 1:
        raise UserError(
            f"config.mesh: expected -1 in at most one field, got it in {' and '.join(inferred)}; set "
            f"mesh.{inferred[0]} to a number"
        )
    model, mesh = config.model, config.mesh
    for name, shards, field, size in (
        ("mesh.fsdp", mesh.fsdp, "model.emb_dim", model.emb_dim),
        ("mesh.tensor", mesh.tensor, "model.num_heads", model.num_heads),
        ("mesh.tensor", mesh.tensor, "model.mlp_dim", model.mlp_dim),
        ("mesh.tensor", mesh.tensor, "data.vocab_size", config.data.vocab_size),
    ):
        if shards > 0 and size % shards:
            raise UserError(divisibility_error(name, shards, field, size))


def divisibility_error(mesh_field: str, shards: int, field: str, size: int) -> str:
    """The message for a mesh that cannot split a dimension of the model."""
    error = f"config.{mesh_field} = {shards} does not divide {field} = {size}; set {mesh_field} to "
    error += str(math.gcd(shards, size))
    if field in ("model.mlp_dim", "data.vocab_size"):  # on which no other size depends
        what = "train a vocabulary of" if field == "data.vocab_size" else f"set {field} to"
        error += f", or in a new run {what} {round_up(size, shards)}"
    return error


class Condition(NamedTuple):
    """A condition for a field to apply: another field, the selector, has one of some values.

    Attributes:
      selector: such as model.family.
      values: empty for any value but 0 and "".
    """

    selector: str
    values: tuple = ()

    def holds(self, config: Config) -> bool:
        """Whether the selector has one of the values."""
        value = get_field(config, self.selector)
        if self.selector == "data.name":
            value = re.split("[/:]", value)[0]  # without the config and version of a TFDS set
        return value in self.values if self.values else bool(value)


def _unset(*selectors: str) -> tuple[Condition, ...]:
    return tuple(Condition(selector, UNSET) for selector in selectors)


UNSET = ("", ())
_ONE_SOURCE = _unset("data.mixture")
_ATTENTION = Condition("model.family", ("attention",))
_NOT_RECURRENT = Condition("model.family", ("attention", "convolutional"))
_TEXT_FILES = Condition("data.name", ("text",))
_ONE_TEXT = (*_ONE_SOURCE, _TEXT_FILES)
_DECAYS_WEIGHTS = tuple(name for name, traits in OPTIMIZER_TRAITS.items() if traits.decays_weights)
_HAS_NO_AVERAGE = tuple(name for name, traits in OPTIMIZER_TRAITS.items() if not traits.is_schedule_free)
_CONDITIONS: tuple[tuple[str, tuple[Condition, ...]], ...] = (  # fields, and the conditions that must all hold
    ("model.num_heads model.mlp_dim model.norm model.mlp_dropout_rate model.attention_dropout_rate", (_ATTENTION,)),
    ("model.attention model.qkv_init_gain model.qkv_dim model.value_dim", (_ATTENTION,)),
    ("model.activation model.use_bias model.norm_type model.norm_epsilon model.qk_norm", (_ATTENTION,)),
    ("model.positions model.remat model.scan_layers", (_NOT_RECURRENT,)),
    ("model.max_positions", (_NOT_RECURRENT, Condition("model.positions", ("learned",)))),
    ("model.attention_score", (Condition("model.family", ("recurrent", "convolutional")),)),
    ("model.kernel_width", (Condition("model.family", ("convolutional",)),)),
    ("mesh.tensor mesh.sequence", (_ATTENTION,)),
    ("data.name data.source_language data.target_language", _ONE_SOURCE),
    ("data.mixture_temperature", (Condition("data.mixture"),)),
    ("data.columns", _ONE_TEXT),
    ("data.dir", (*_ONE_TEXT, *_unset("data.train_source", "data.train"))),
    ("data.train", (*_ONE_TEXT, *_unset("data.dir", "data.train_source"))),
    ("data.valid", (*_ONE_TEXT, *_unset("data.dir", "data.valid_source"))),
    ("data.train_source data.train_target", (*_ONE_TEXT, *_unset("data.dir", "data.train"))),
    ("data.valid_source data.valid_target", (*_ONE_TEXT, *_unset("data.dir", "data.valid"))),
    ("data.manual_dir", (*_ONE_SOURCE, Condition("data.name", WMT_NAMES))),
    ("data.tokenizer", _unset("train.init_from")),
    ("data.bleu_tokenizer", (Condition("data.tokenized", (False,)),)),
    ("data.num_buckets", (Condition("data.batching", ("bucket",)),)),
    ("optimizer.weight_decay", (Condition("optimizer.name", _DECAYS_WEIGHTS),)),
    ("optimizer.decay_fraction", (Condition("optimizer.schedule", ("wsd",)),)),
    ("train.ema_decay", (Condition("optimizer.name", _HAS_NO_AVERAGE),)),
    ("train.consistency_weight", (Condition("train.consistency", ("rdrop", "simcut")),)),
    ("train.cutoff_rate", (Condition("train.consistency", ("simcut",)),)),
    ("train.max_skipped_updates", (Condition("train.spike_factor"),)),
    ("train.init_checkpoint", (Condition("train.init_from"),)),
    ("decode.beam_size decode.coverage_penalty decode.early_stopping", (Condition("decode.method", ("beam",)),)),
    ("eval.validation_beam_size", (Condition("decode.method", ("beam",)),)),
    ("decode.length_penalty decode.length_penalty_form", (Condition("decode.method", ("beam", "sample")),)),
    (
        "decode.temperature decode.top_k decode.top_p decode.seed",
        (Condition("decode.method", ("sample", "mbr")),),
    ),
    ("decode.mbr_samples", (Condition("decode.method", ("mbr",)),)),
)
# Fields that are not listed always apply.
APPLICABLE_TO = {name: conditions for names, conditions in _CONDITIONS for name in names.split()}


def validate(values: Any, strict: bool = True, workdir: str = "") -> Config:
    """Validates a ConfigDict or nested mapping and returns it as frozen dataclasses.

    With `train.init_from`, sizes of model and vocabulary at their defaults become those of that run.

    Args:
      values: sections of fields.
      strict: also rejects fields that do not apply, and schedules longer than the run. Not for saved configs, which
        must stay readable.
      workdir: as in `warm_start.inherit_sizes`.

    Raises:
      UserError: as `to_dataclasses` and `check_consistency`.
    """
    config = to_dataclasses(warm_start.inherit_sizes(to_sections(values), workdir=workdir) if strict else values)
    check_consistency(config, strict=strict)
    return config


def to_dataclasses(values: Any) -> Config:
    """Converts a ConfigDict or nested mapping to frozen dataclasses; checks each field but not their combinations.

    Raises:
      UserError: an unknown section or field, a wrong type, or a value out of bounds.
    """
    values = to_sections(values)
    resolved = {}
    for name, section in SECTIONS.items():
        given = values.get(name, {})
        fields = {field.name: field for field in dataclasses.fields(section)}
        reject_unknown_fields(f"config.{name}", given, list(fields))
        resolved[name] = section(
            **{key: _check_value(f"config.{name}.{key}", fields[key], v) for key, v in given.items()}
        )
    return Config(**resolved)


def check_consistency(
    config: Config, needs_data: bool = True, strict: bool = True, given: Collection[str] = ()
) -> None:
    """Raises a UserError if fields contradict each other or do not apply.

    Args:
      config: with valid fields.
      needs_data: whether text files must be named.
      strict: as in `validate`.
      given: fields set on the command line or in a call, such as model.family, which must apply whatever their value.
    """
    if config.data.mixture:
        _check_mixture(config, needs_data, strict)
    else:
        _check_data(config.data, needs_data)
    for name, condition in inapplicable_fields(config).items():
        if name in given or (strict and get_field(config, name) != default_value(config, name)):
            raise UserError(_inapplicable_message(config, name, condition))
    _check_combinations(config)
    _check_mesh(config)
    kernel = config.model.attention
    reason = unsupported_reason(kernel, AttentionSpec.from_config(config))
    if kernel in FUSED_ATTENTION_PLATFORMS and reason:  # `fused` checks the platform
        raise UserError(f"config.model.attention = {kernel}: {reason}; auto chooses a supported one")
    if strict or {"train.best_metric", "eval.metrics"} & set(given):
        _check_best_metric(config)
    profiled, steps = schema.parse_steps(config.train.profile_steps), config.train.num_steps
    if (strict or {"train.profile_steps", "train.num_steps"} & set(given)) and profiled and profiled[0] > steps:
        raise UserError(
            f"config.train.profile_steps = {config.train.profile_steps}: the run ends at train.num_steps = {steps}; "
            "name earlier steps"
        )
    if strict or any(name == "train.num_steps" or name.startswith("optimizer.") for name in given):
        check_schedule(config)


def check_schedule(config: Config) -> None:
    """Raises a UserError if the schedule is longer than the run, in which it would not fall to 0."""
    optimizer, steps = config.optimizer, config.train.num_steps
    if schedule_depends_on_num_steps(config) and optimizer.warmup_steps >= steps:
        raise UserError(
            f"config.optimizer.warmup_steps: the {optimizer.schedule} schedule falls from its peak to 0 at "
            f"train.num_steps = {steps}: expected fewer steps, got {optimizer.warmup_steps}; change either. A quick "
            f"trial needs both lowered, such as optimizer.warmup_steps = {steps // 10}"
        )
    decay = optimizer.decay_fraction * steps
    if optimizer.schedule == "wsd" and optimizer.warmup_steps + decay > steps:
        raise UserError(
            f"config.optimizer.decay_fraction = {optimizer.decay_fraction}: the last {decay:g} of train.num_steps = "
            f"{steps} overlap with optimizer.warmup_steps = {optimizer.warmup_steps}; lower either"
        )


def inapplicable_fields(config: Config) -> dict[str, Condition]:
    """The fields that do not apply in this config, each with the first condition that does not hold."""
    failed = {name: [c for c in conditions if not c.holds(config)] for name, conditions in APPLICABLE_TO.items()}
    return {name: conditions[0] for name, conditions in failed.items() if conditions}


def reset_inapplicable(config: Config, given: Collection[str]) -> tuple[Config, list[str]]:
    """Resets fields to their defaults if they no longer apply because their selectors are given.

    A field that is itself given, or whose selectors are not, keeps its value: `check_consistency` rejects both.

    Args:
      config: to change.
      given: as in `check_consistency`.

    Returns:
      The config, and 'section.field = value' of each field that was reset from another value than its default.
    """
    original, reset = config, []
    for name in inapplicable_fields(original):
        selectors = {condition.selector for condition in APPLICABLE_TO[name] if not condition.holds(original)}
        value, default = get_field(original, name), default_value(original, name)
        if name not in given and selectors & set(given) and value != default:
            reset.append(f"{name} = {value}")
            config = replace_field(config, name, default)
    return config, reset


def get_field(config: Config, name: str) -> Any:
    """The value of section.field."""
    return operator.attrgetter(name)(config)


def replace_field(config: Config, name: str, value: Any) -> Config:
    """The config with another value of section.field; widths that equal emb_dim follow it."""
    section, field = name.split(".")
    widths = config.model.widths_of_emb_dim() if name == "model.emb_dim" else {}
    replaced = dataclasses.replace(getattr(config, section), **widths, **{field: value})
    return dataclasses.replace(config, **{section: replaced})


def default_value(config: Config, name: str) -> Any:
    """The default of section.field, which may depend on another field."""
    return get_field(replace_field(config, name, schema.field_default(*name.split("."))), name)


def _inapplicable_message(config: Config, name: str, condition: Condition) -> str:
    section, field = name.split(".")
    selector = condition.selector.removeprefix(f"{section}.")
    values = " or ".join(map(str, condition.values))
    requirement = f"with {selector} = {values}" if condition.values else f"with {selector}"
    if condition.values == UNSET:
        requirement = f"without {selector}"
    value, default = get_field(config, name), default_value(config, name)
    selected = get_field(config, condition.selector)
    if isinstance(selected, tuple):
        selected = f"{len(selected)} entries"
    return (
        f"config.{name} = {value}: read only {requirement}, got {selector} = {selected}; "
        f"leave {field} out (default: {default}), or change the {selector}"
    )


def to_sections(values: Any) -> dict[str, dict]:
    """Converts a ConfigDict or nested mapping to sections of fields, which are not checked."""
    if isinstance(values, config_dict.ConfigDict):
        values = values.to_dict()
    if not isinstance(values, dict):
        raise UserError(f"config: expected sections {', '.join(SECTIONS)}, got {type(values).__name__}")
    reject_unknown_fields("config", values, list(SECTIONS))
    for name, given in values.items():
        if not isinstance(given, dict):
            raise UserError(f"config.{name}: expected a section of fields, got {given!r}")
    return values


def load(path: epath.PathLike) -> Config:
    """Reads a file that `Config.to_json` wrote.

    Raises:
      UserError: it cannot be read, or is no valid config.
    """
    with user_error_on_oserror(f"{path}"):
        text = epath.Path(path).expanduser().read_bytes()
    return from_json(text, f"{path}")


def from_json(text: str | bytes, path: str) -> Config:
    """Reads what `Config.to_json` wrote; errors name `path`."""
    try:
        values = json.loads(text)
    except ValueError as error:
        raise UserError(f"{path}: not a config in JSON: {error}") from error
    if isinstance(values, dict):
        values.pop(RUN_ID, None)
    return validate(values, strict=False)


def reject_unknown_fields(where: str, given: Iterable[str], known: list[str], kind: str = "field") -> None:
    """Raises a UserError for the first unknown name, with the most similar known one."""
    for key in given:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
            raise UserError(f"{where}: unknown {kind} {key!r}; {hint}")


def _check_value(where: str, field: dataclasses.Field, value: Any) -> Any:
    """Returns the value in the type of the field, or raises a UserError if type or bounds are violated."""
    expected = typing.cast(type, field.type)
    if expected is tuple:
        return _to_mixture(where, value)
    if expected is float and type(value) is int:
        value = float(value)
    if type(value) is not expected:
        raise UserError(f"{where}: expected {expected.__name__}, got {value!r} of type {type(value).__name__}")
    limits = types.SimpleNamespace(**field.metadata)
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{where}: expected a finite number, got {value}")
    if limits.one_of and value not in limits.one_of:
        raise UserError(f"{where}: expected one of {', '.join(limits.one_of)}, got {value!r}")
    if limits.list_of:
        reject_unknown_fields(where, str(value).split(","), list(limits.list_of), "name")
    if limits.low is not None and value < limits.low:
        bound = "above 0" if limits.low == POSITIVE else f"at least {limits.low}"
        raise UserError(f"{where}: expected {bound}, got {value}")
    if limits.high is not None and value > limits.high:
        raise UserError(f"{where}: expected at most {limits.high}, got {value}")
    return value


def _to_mixture(where: str, value: Any) -> tuple[MixtureEntry, ...]:
    """The entries of a list of dicts; a UserError names the entry and the field that is invalid."""
    if not isinstance(value, (list, tuple)):
        raise UserError(f"{where}: expected a list of entries, got {value!r} of type {type(value).__name__}")
    fields = {field.name: field for field in dataclasses.fields(MixtureEntry)}
    entries = []
    for number, given in enumerate(value, 1):
        name = f"{where}, entry {number}"
        if isinstance(given, MixtureEntry):
            given = dataclasses.asdict(given)
        elif isinstance(given, config_dict.ConfigDict):
            given = given.to_dict()
        if not isinstance(given, dict):
            raise UserError(f"{name}: expected a dict of fields such as weight, got {given!r}")
        reject_unknown_fields(name, given, list(fields))
        checked = {key: _check_value(f"{name}, {key}", fields[key], item) for key, item in given.items()}
        entries.append(MixtureEntry(**checked))
    return tuple(entries)


def _check_combinations(config: Config) -> None:
    model, data, optimizer, train, decode = config.model, config.data, config.optimizer, config.train, config.decode
    for name, width in (("qkv_dim", model.qkv_dim), ("value_dim", model.value_dim)):
        if model.family == "attention" and width % model.num_heads:
            raise UserError(f"config.model: num_heads = {model.num_heads} does not divide {name} = {width}")
    if model.positions == "sinusoidal" and model.emb_dim % 2:
        reason = "split by two directions" if model.family == "recurrent" else "required by sinusoidal positions"
        raise UserError(f"config.model.emb_dim: expected an even width, {reason}; got {model.emb_dim}")
    if model.positions == "rotary":
        _check_rotary(model)
    row = "data.max_length" if data.length_multiple == 1 else "data.max_length rounded up to data.length_multiple"
    longest = max(data.max_row_length, decode.max_target_tokens)
    if model.positions == "learned" and longest > model.max_positions:
        raise UserError(
            f"config.model.max_positions: learned positions must cover the longest sequence, {longest} = max({row}, "
            f"decode.max_source_tokens + decode.max_extra_length), got {model.max_positions}; lower these, or raise "
            "max_positions in a new run"
        )
    if model.family == "convolutional" and model.kernel_width % 2 == 0:
        raise UserError(f"config.model.kernel_width: expected an odd number, got {model.kernel_width}")
    if train.batch_tokens < data.max_row_length:
        raise UserError(
            f"config.train.batch_tokens: expected at least one sentence of {row} = {data.max_row_length} tokens, "
            f"got {train.batch_tokens}"
        )
    if 0 < train.spike_factor <= 1:
        raise UserError(f"config.train.spike_factor: expected 0 (off), or above 1, such as 2, got {train.spike_factor}")
    _check_dropout_of_rdrop(config)
    _check_subword_dropout(config)
    _check_profile_steps(train)
    if OPTIMIZER_TRAITS[optimizer.name].is_schedule_free:
        _check_schedule_free(optimizer)
    if SCHEDULE_TRAITS[optimizer.schedule].needs_warmup and not optimizer.warmup_steps:
        raise UserError(f"config.optimizer.warmup_steps: the {optimizer.schedule} schedule needs at least 1, got 0")


def _check_schedule_free(optimizer: schema.OptimizerConfig) -> None:
    if optimizer.schedule != "constant":
        raise UserError(
            f"config.optimizer.schedule: {optimizer.name} averages its iterates instead of lowering the learning "
            f"rate: expected constant, which has a warm-up too, got {optimizer.schedule}; set schedule to constant and "
            "learning_rate to its peak"
        )
    if not optimizer.beta1:
        raise UserError(
            f"config.optimizer.beta1: the weight of the average of {optimizer.name}: expected above 0, such as 0.9, "
            "got 0"
        )


def _check_rotary(model: schema.ModelConfig) -> None:
    if model.family != "attention":
        raise UserError(
            "config.model.positions = rotary: rotates queries and keys of self-attention, which family = "
            f"{model.family} does not have; set positions to sinusoidal or learned"
        )
    if (model.qkv_dim // model.num_heads) % 2:
        raise UserError(
            "config.model.positions = rotary: expected an even width per head, got model.qkv_dim / num_heads = "
            f"{model.qkv_dim // model.num_heads}; change qkv_dim or num_heads"
        )


def _check_dropout_of_rdrop(config: Config) -> None:
    rates = [f"model.{name}" for name in ("dropout_rate", "attention_dropout_rate", "mlp_dropout_rate")]
    rates = [name for name in rates if name not in inapplicable_fields(config)]
    if config.train.consistency == "rdrop" and not any(get_field(config, name) for name in rates):
        raise UserError(
            "config.train.consistency = rdrop: compares two passes with different dropout, so expected "
            f"{' or '.join(rates)} above 0, got 0; set it, or consistency to simcut or none"
        )


def _check_subword_dropout(config: Config) -> None:
    tokenizer = config.data.tokenizer
    is_other = tokenizer == "unigram" or tokenizer.endswith((".codes", ".json"))
    if config.data.subword_dropout and is_other and not config.train.init_from:  # its tokenizer is checked when read
        raise UserError(subword_dropout_error(config.data.subword_dropout, tokenizer))


def subword_dropout_error(rate: float, tokenizer: str) -> str:
    """The message for a vocabulary that subword dropout does not support."""
    return (
        f"config.data.subword_dropout = {rate:g}: leaves out merges of a SentencePiece BPE vocabulary, which holds the "
        f"result of each: expected data.tokenizer = bpe, or the .model of one, got {tokenizer}; change it, or set "
        "subword_dropout to 0"
    )


def _check_profile_steps(train: schema.TrainConfig) -> None:
    try:
        schema.parse_steps(train.profile_steps)
    except ValueError as error:
        raise UserError(
            "config.train.profile_steps: expected two steps A:B with 1 ≤ A ≤ B, such as 100:110, or nothing, got "
            f"{train.profile_steps!r}"
        ) from error


def _check_best_metric(config: Config) -> None:
    known = ("auto", "loss", *schema.ALWAYS_VALIDATED)
    if config.train.best_metric not in (*known, *config.eval.metric_names):
        raise UserError(
            f"config.train.best_metric: expected {', '.join(known)} or one of eval.metrics = {config.eval.metrics}, "
            f"got {config.train.best_metric}; add it to eval.metrics"
        )


def override_decode(config: Config, fields: dict[str, Any]) -> Config:
    """Overrides fields of the decode section; resets those that do not apply to a new method.

    Raises:
      UserError: as `validate`, or a given field does not apply to the method.
    """
    values = dataclasses.asdict(config)
    given = {f"decode.{name}" for name in fields}
    overridden, _ = reset_inapplicable(
        to_dataclasses({**values, "decode": {**values["decode"], **fields}}), given | {"decode.method"}
    )
    check_consistency(overridden, strict=False, given=given)
    return overridden


def _check_data(data: DataConfig, needs_data: bool) -> None:
    for side in ("source_language", "target_language"):
        code = getattr(data, side)
        if not code or not code.replace("-", "").replace("_", "").isalnum():
            raise UserError(f"config.data.{side}: expected a language code such as 'en', got {code!r}")
    if data.source_language == data.target_language:
        raise UserError(f"config.data: source_language and target_language are both {data.source_language!r}")
    if data.tokenizer not in TOKENIZER_ALGORITHMS and not data.tokenizer.endswith((".model", ".codes", ".json")):
        raise UserError(
            "config.data.tokenizer: expected bpe, unigram or the path of a .model, .codes or .json file, got "
            f"{data.tokenizer!r}"
        )
    _check_filters(data)
    if data.name != "text":
        return
    sources = [name for name in ("dir", "train_source", "train") if getattr(data, name)]
    if len(sources) > 1 or (needs_data and not sources):
        raise UserError(
            "config.data: with data.name = 'text' set exactly one of dir (a folder of train.LANG files), "
            f"train_source with train_target, or train (one file); got {', '.join(sources) or 'none'}"
        )
    for side in ("train", "valid"):
        source, target = getattr(data, f"{side}_source"), getattr(data, f"{side}_target")
        if bool(source) != bool(target):
            raise UserError(f"config.data: {side}_source and {side}_target go together, got {source!r} and {target!r}")
    if data.valid and data.valid_source:
        raise UserError("config.data: set valid or valid_source with valid_target, not both")
    if data.dir and (data.valid or data.valid_source):
        raise UserError("config.data: data.dir has its own val files; leave the valid fields empty")


def _check_mixture(config: Config, needs_data: bool, strict: bool) -> None:
    data = config.data
    if data.batching == "pack":
        raise UserError(
            "config.data.batching = pack: a mixture makes rows of one sentence: expected bucket; leave batching out"
        )
    if data.subword_dropout:
        raise UserError(
            f"config.data.subword_dropout = {data.subword_dropout:g}: not supported with a mixture: expected 0; leave "
            "one of them out"
        )
    if 0 < data.mixture_temperature < mixture.MIN_TEMPERATURE:
        raise UserError(
            "config.data.mixture_temperature: expected 0 (by weight alone), or at least "
            f"{mixture.MIN_TEMPERATURE}, got {data.mixture_temperature}"
        )
    for number, entry in enumerate(data.mixture, 1):
        with mixture.entry_errors(number, entry):
            of_text = [name for name in ("columns", *schema.TEXT_PATH_FIELDS) if getattr(entry, name)]
            if strict and of_text and entry.name != "text":
                raise UserError(f"config.data.{of_text[0]}: read only with name = 'text', got name = {entry.name!r}")
            _check_data(mixture.entry_data(data, entry), needs_data)
    mixture.check_tags(data)
    mixture.check_stages(data, config.train.num_steps)


def _check_filters(data: DataConfig) -> None:
    low, high, unit = data.filter_min_length, data.filter_max_length, data.filter_unit
    if low > high > 0:
        raise UserError(
            f"config.data.filter_max_length: expected at least filter_min_length = {low}, or 0 for no limit, got {high}"
        )
    if 0 < data.filter_max_ratio < 1:
        raise UserError(
            "config.data.filter_max_ratio: expected 0 (off), or at least 1, such as 3: how many times as long the "
            f"longer side may be; got {data.filter_max_ratio:g}"
        )
    if unit != "words" and not (low or high or data.filter_max_ratio):
        raise UserError(
            f"config.data.filter_unit = {unit}: read only with filter_min_length, filter_max_length or "
            "filter_max_ratio, all of which are off; set one, or leave it out"
        )


# Fields that may change on resume because they do not affect future updates. Files of data and vocabulary may have
# moved: they are compared by digest.
RESUMABLE_FIELDS = {
    "train": {
        "log_every_steps",
        "eval_every_steps",
        "checkpoint_every_steps",
        "early_stopping_patience",
        "keep_last",
        "keep_best",
        "profile_steps",
    },
    "data": {*schema.PATH_FIELDS},
    "decode": {*schema.field_names("decode")},
    "eval": {*schema.field_names("eval")},
    "model": {"attention", "remat"},  # same up to rounding
    "mesh": {*schema.field_names("mesh")},
}


def schedule_depends_on_num_steps(config: Config) -> bool:
    """Whether the learning rate reaches 0 at train.num_steps, so that another number of steps changes the run."""
    return SCHEDULE_TRAITS[config.optimizer.schedule].ends_at_zero
