"""Every field a run can be given: its default, its bounds, and what it means.

A config file is Python and runs; what it returns is checked here, before JAX is imported, so that a
mistake costs a message and not a compilation. The rooms receive the frozen dataclasses below.
"""

import dataclasses
import difflib
import json
import math
import os
import types
import typing
from collections.abc import Iterable
from typing import Any

from ml_collections import config_dict

from transformer.errors import UserError


def _field(default: Any, doc: str, *, low: float | None = None, high: float | None = None, one_of: tuple = ()) -> Any:
    """A dataclass field with closed bounds [low, high] or a set of choices, and its documentation."""
    return dataclasses.field(default=default, metadata={"doc": doc, "low": low, "high": high, "one_of": one_of})


_TINY = 1e-30  # stands for "above zero" in a closed bound


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The model: sizes of the paper's base model unless said otherwise (Table 3)."""

    num_layers: int = _field(6, "layers of the encoder and of the decoder each", low=1)
    emb_dim: int = _field(512, "model width D (paper: d_model)", low=1)
    num_heads: int = _field(8, "attention heads H", low=1)
    qkv_dim: int = _field(512, "width per head times heads, H * K, of queries and keys; free of emb_dim", low=1)
    value_dim: int = _field(512, "the same of values: Table 3 (B) varies the key width alone", low=1)
    mlp_dim: int = _field(2048, "feed-forward width F (paper: d_ff)", low=1)
    norm: str = _field(
        "post", "LayerNorm after the residual sum (paper) or before the sublayer", one_of=("post", "pre")
    )
    positions: str = _field("sinusoidal", "position encodings", one_of=("sinusoidal", "learned"))
    max_positions: int = _field(1024, "rows of the table of learned positions; unused by sinusoidal ones", low=1)
    share_embeddings: bool = _field(True, "one matrix for source, target and output embeddings (paper, 3.4)")
    dropout_rate: float = _field(
        0.1, "on each sublayer's output and on the embedded input (paper, 5.4)", low=0, high=0.99
    )
    attention_dropout_rate: float = _field(0.0, "on the attention weights", low=0, high=0.99)
    mlp_dropout_rate: float = _field(0.0, "inside the feed-forward block, after its activation", low=0, high=0.99)
    dtype: str = _field(
        "float32", "of activations; params, softmax and loss stay float32", one_of=("float32", "bfloat16")
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where sentences come from and how they become batches."""

    name: str = _field("cldr", "a TFDS translation set (`cldr` is embedded), or `text` for your own files")
    source_language: str = _field("en", "language code translated from")
    target_language: str = _field("de", "language code translated to")
    dir: str = _field(
        "", "text: a folder of train.LANG, val.LANG and test files TEST.LANG; names may end in .gz .xz .zst"
    )
    train_source: str = _field("", "text: training sentences of the source language, one a line")
    train_target: str = _field("", "text: their translations, line by line")
    valid_source: str = _field("", "text: validation sentences; empty holds out a part of training")
    valid_target: str = _field("", "text: their translations")
    train: str = _field("", "text: both sides of training in one file: .tsv .jsonl .tmx .po")
    valid: str = _field("", "text: both sides of validation in one file")
    columns: str = _field("", "tsv: which two columns are source and target, counted from 1, as in '1,2'")
    data_dir: str = _field(
        "", "where prepared data and token ids are kept; empty: TFDS_DATA_DIR or ~/tensorflow_datasets"
    )
    vocab_size: int = _field(37000, "pieces of the shared vocabulary, specials included", low=8, high=1_000_000)
    tokenizer: str = _field("bpe", "SentencePiece model type, bpe or unigram, or the path of a trained .model file")
    max_length: int = _field(256, "training drops pairs with a side above this many tokens, end included", low=2)
    num_buckets: int = _field(8, "batch shapes by length: more waste less padding and compile longer", low=1, high=64)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Adam and the learning rate schedule (paper, section 5.3)."""

    name: str = _field("adam", "adam as in the paper, or adamw with decoupled weight decay", one_of=("adam", "adamw"))
    learning_rate: float = _field(
        1.0, "paper: a factor on D^-0.5 min(step^-0.5, step warmup^-1.5); else the peak", low=0
    )
    warmup_steps: int = _field(4000, "steps of linear warm-up", low=0)
    schedule: str = _field(
        "paper",
        "what follows warm-up; cosine and linear reach zero at train.num_steps",
        one_of=("paper", "inverse_sqrt", "cosine", "linear", "constant"),
    )
    beta1: float = _field(0.9, "decay of the first moment", low=0, high=0.999999)
    beta2: float = _field(0.98, "decay of the second moment", low=0, high=0.9999999)
    epsilon: float = _field(1e-9, "added to the root of the second moment", low=_TINY)
    weight_decay: float = _field(0.0, "adamw: decoupled decay of matrices, not of biases and LayerNorm", low=0)
    clip_norm: float = _field(0.0, "largest global norm of the gradient; 0 does not clip", low=0)
    label_smoothing: float = _field(
        0.1, "weight of the uniform distribution in the target (paper, 5.4)", low=0, high=0.99
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The loop: how long, how much at once, how often it looks and saves."""

    num_steps: int = _field(100_000, "updates of the whole run", low=1)
    batch_tokens: int = _field(25_000, "target tokens of the global batch, padding counted", low=1)
    log_every_steps: int = _field(50, "steps between lines of metrics", low=1)
    eval_every_steps: int = _field(2_000, "steps between validations: loss and BLEU", low=1)
    checkpoint_every_steps: int = _field(1_000, "steps between checkpoints", low=1)
    keep_last: int = _field(5, "newest checkpoints to keep", low=1)
    keep_best: int = _field(1, "checkpoints of the best validation BLEU to keep besides", low=0)
    seed: int = _field(0, "of initialisation, data order and dropout", low=0, high=2**31 - 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """Beam search, the same in validation, evaluation and translation."""

    beam_size: int = _field(4, "hypotheses kept; 1 is greedy", low=1, high=1000)
    length_penalty: float = _field(0.6, "alpha of the GNMT length penalty ((5 + length) / 6)^alpha", low=0, high=10)
    max_extra_length: int = _field(50, "a translation has at most source length + this many tokens", low=1)
    batch_rows: int = _field(
        32, "sentences the device decodes at once: a fixed shape, whatever --batch_size groups", low=1
    )
    max_source_tokens: int = _field(512, "a longer source is translated from its first that many tokens", low=2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How devices are arranged."""

    data: int = _field(-1, "devices over which the rows of a batch are split; -1: all", low=-1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A run."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    decode: DecodeConfig = DecodeConfig()
    mesh: MeshConfig = MeshConfig()

    def to_json(self) -> str:
        """The resolved config, one field a line, as the workdir and every checkpoint keep it."""
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"


SECTIONS: dict[str, type] = {field.name: typing.cast(type, field.type) for field in dataclasses.fields(Config)}


def default_config() -> config_dict.ConfigDict:
    """All sections with their defaults, for a config file to change; unknown fields are refused.

    `model.qkv_dim` follows `model.emb_dim` until it is set itself, and `model.value_dim` follows `model.qkv_dim`.
    """
    config = config_dict.ConfigDict(dataclasses.asdict(Config()))
    config.model.qkv_dim = config.model.get_oneway_ref("emb_dim")
    config.model.value_dim = config.model.get_oneway_ref("qkv_dim")
    return config.lock()


def resolve(values: Any) -> Config:
    """Checks a ConfigDict or nested mapping and returns it as frozen dataclasses.

    Raises:
      UserError: an unknown section or field, a wrong type, a value out of bounds, or fields that
        cannot go together; the message names the field, what was expected and what was got.
    """
    if isinstance(values, config_dict.ConfigDict):
        values = values.to_dict()
    if not isinstance(values, dict):
        raise UserError(f"config: expected sections {', '.join(SECTIONS)}, got {type(values).__name__}")
    refuse_unknown("config", values, list(SECTIONS))
    sections = {}
    for name, section in SECTIONS.items():
        given = values.get(name, {})
        if not isinstance(given, dict):
            raise UserError(f"config.{name}: expected a section of fields, got {given!r}")
        fields = {field.name: field for field in dataclasses.fields(section)}
        refuse_unknown(f"config.{name}", given, list(fields))
        sections[name] = section(**{key: _checked(f"config.{name}.{key}", fields[key], v) for key, v in given.items()})
    config = Config(**sections)
    _check_together(config)
    return config


def from_json(text: str, path: str) -> Config:
    """Reads what `Config.to_json` wrote; `path` is named in errors."""
    try:
        values = json.loads(text)
    except ValueError as error:
        raise UserError(f"{path}: not a config in JSON: {error}") from error
    return resolve(values)


def differences(old: Config, new: Config) -> list[str]:
    """The fields in which two configs differ, as 'section.field: old → new'."""
    rows = []
    for name, section in SECTIONS.items():
        for field in dataclasses.fields(section):
            before, after = (getattr(getattr(config, name), field.name) for config in (old, new))
            if before != after:
                rows.append(f"{name}.{field.name}: {before!r} → {after!r}")
    return rows


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
        bound = "above 0" if limits.low == _TINY else f"at least {limits.low}"
        raise UserError(f"{where}: expected {bound}, got {value}")
    if limits.high is not None and value > limits.high:
        raise UserError(f"{where}: expected at most {limits.high}, got {value}")
    return value


def _check_together(config: Config) -> None:
    model, data, optimizer, train, decode = config.model, config.data, config.optimizer, config.train, config.decode
    for name, width in (("qkv_dim", model.qkv_dim), ("value_dim", model.value_dim)):
        if width % model.num_heads:
            raise UserError(f"config.model: num_heads = {model.num_heads} does not divide {name} = {width}")
    if model.positions == "sinusoidal" and model.emb_dim % 2:
        raise UserError(f"config.model.emb_dim: sinusoidal positions need an even width, got {model.emb_dim}")
    longest = max(data.max_length, decode.max_source_tokens + decode.max_extra_length)
    if model.positions == "learned" and longest > model.max_positions:
        raise UserError(
            f"config.model.max_positions: learned positions must cover the longest sequence, {longest} = max(data."
            f"max_length, decode.max_source_tokens + decode.max_extra_length), got {model.max_positions}"
        )
    if train.batch_tokens < data.max_length:
        raise UserError(
            f"config.train.batch_tokens: expected room for one sentence of data.max_length = {data.max_length} tokens, "
            f"got {train.batch_tokens}"
        )
    if optimizer.name == "adam" and optimizer.weight_decay:
        raise UserError(
            "config.optimizer.weight_decay: adam has none; set optimizer.name to adamw, or weight_decay to 0"
        )
    if optimizer.schedule in ("paper", "inverse_sqrt") and not optimizer.warmup_steps:
        raise UserError(f"config.optimizer.warmup_steps: the {optimizer.schedule} schedule needs at least 1, got 0")
    if config.mesh.data == 0:
        raise UserError("config.mesh.data: expected -1 for all devices, or at least 1, got 0")
    _check_data(data)


def _check_data(data: DataConfig) -> None:
    for side in ("source_language", "target_language"):
        code = getattr(data, side)
        if not code or not code.replace("-", "").replace("_", "").isalnum():
            raise UserError(f"config.data.{side}: expected a language code such as 'en', got {code!r}")
    if data.source_language == data.target_language:
        raise UserError(f"config.data: source_language and target_language are both {data.source_language!r}")
    if data.tokenizer not in ("bpe", "unigram") and not os.fspath(data.tokenizer).endswith(".model"):
        raise UserError(
            f"config.data.tokenizer: expected bpe, unigram or the path of a .model file, got {data.tokenizer!r}"
        )
    text_fields = ("dir", "train_source", "train_target", "valid_source", "valid_target", "train", "valid", "columns")
    given = [name for name in text_fields if getattr(data, name)]
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
