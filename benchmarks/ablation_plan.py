"""The plan of an ablation: named changes of a base config, checked, and what training each of them costs.

Only `num_params` imports JAX.
"""

import dataclasses
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from transformer import command_line
from transformer.config import Config, DataConfig, config_files, mixture, schema, validation
from transformer.data import input_pipeline, mixture_corpus, vocabulary
from transformer.data import tokenizer as tokenizers
from transformer.models.flops import training_flops
from transformer.runtime.errors import UserError
from transformer.training import session

BASE = "base"
NAME = re.compile(r"\w[\w.+-]*")  # also of a folder
# The same for all runs, as their scores are compared on the same sentences.
FIXED_FIELDS = (
    *("data.name", "data.source_language", "data.target_language", "data.dir", "data.tokenized"),
    *("data.valid", "data.valid_source", "data.valid_target", "data.columns", "data.bleu_tokenizer", "eval.metrics"),
)
# Those too where validation is a part of the training text.
TRAINING_FIELDS = ("data.train", "data.train_source", "data.train_target")


class Change(NamedTuple):
    """What a changes file says of a name.

    Attributes:
      fields: section.field → value; those of the base are also those of every change.
      comment: for people, such as a source.
      published: scores that somebody else reports, by their keys in eval.py's JSON.
    """

    fields: Mapping[str, Any]
    comment: str
    published: Mapping[str, float]

    def flags(self) -> list[str]:
        """The fields as flags of train.py."""
        return [f"--config.{field}={value}" for field, value in self.fields.items()]

    def __str__(self) -> str:
        return ", ".join(f"{field}={value}" for field, value in self.fields.items())


class Variant(NamedTuple):
    """The base model or a change of it, as it is trained.

    Attributes:
      flops: of an update, the mean over an epoch.
    """

    change: Change
    config: Config
    params: int
    flops: float


def shipped() -> list[str]:
    """The changes files that come with the project."""
    folder = pathlib.Path(__file__).parent / "changes"
    return [f"benchmarks/changes/{path.name}" for path in sorted(folder.glob("*.py"))]


def load_changes(path: str, base: Config, flags: Sequence[str] = ()) -> dict[str, Change]:
    """What `get_changes(base)` of a changes file returns: the base and the changes by name, the base first.

    Flags override fields of the base, which are left out.

    Raises:
      UserError: no such file, an error inside it, or something else than named fields.
    """
    flag, others = f"--changes={path}", f"those that come with the project: {', '.join(shipped())}"
    entries = config_files.call_file(flag, path, "get_changes", base, others=others, see="benchmarks/changes/demo.py")
    if not isinstance(entries, dict) or not entries.keys() - {BASE}:
        raise UserError(f"{flag}: expected name → fields of at least one change from get_changes, got {entries!r}")
    changes = {name: _change(f"{flag}: {name}", name, entry) for name, entry in {BASE: {}, **entries}.items()}
    given = {each.partition("=")[0] for each in flags}
    fields = {field: value for field, value in changes[BASE].fields.items() if f"--config.{field}" not in given}
    return {**changes, BASE: changes[BASE]._replace(fields=fields)}


def _change(where: str, name: Any, entry: Any) -> Change:
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise UserError(f"{where}: expected a name of letters, digits, '.', '+', '-' and '_', got {name!r}")
    if not isinstance(entry, dict):
        raise UserError(f"{where}: expected fields such as {{'model.norm': 'pre'}}, got {entry!r}")
    fields = dict(entry)
    comment, published = fields.pop("comment", ""), fields.pop("published", {})
    if not isinstance(comment, str):
        raise UserError(f"{where}: expected a text as comment, got {comment!r}")
    if not isinstance(published, dict) or not all(isinstance(value, (int, float)) for value in published.values()):
        raise UserError(f"{where}: expected published scores such as {{'bleu': 27.3}}, got {published!r}")
    for field, value in fields.items():
        if not isinstance(value, (bool, int, float, str)):
            raise UserError(f"{where}: {field}: expected a number, a text, True or False, got {value!r}")
    if "train.seed" in fields:
        raise UserError(f"{where}: train.seed: the flag --seeds sets it; leave it out")
    if name != BASE and not fields:
        raise UserError(f"{where}: expected fields such as {{'model.norm': 'pre'}}, got none")
    return Change(fields, comment, published)


def plan(flags: Sequence[str], changes: Mapping[str, Change], equal_flops: bool) -> dict[str, Variant]:
    """The base and every change, checked, with its cost.

    Args:
      flags: --config=FILE and --config.SECTION.FIELD=VALUE.
      changes: of `load_changes`.
      equal_flops: whether each gets the number of updates that costs what the base's do.

    Raises:
      UserError: names every change that cannot be trained, and why; before JAX is imported.
    """
    lengths = [name for name, change in changes.items() if "train.num_steps" in change.fields and name != BASE]
    if equal_flops and lengths:
        raise UserError(f"{', '.join(lengths)}: train.num_steps follows from --equal=flops; leave out either")
    configs = resolve(flags, changes)
    costs = {name: update_cost(config) for name, config in configs.items()}
    if equal_flops:
        steps = equal_steps(configs[BASE].train.num_steps, {name: flops for name, (flops, _) in costs.items()})
        configs = resolve(flags, changes, steps)
    return {
        name: Variant(changes[name], config, num_params(config, costs[name][1]), costs[name][0])
        for name, config in configs.items()
    }


def resolve(
    flags: Sequence[str], changes: Mapping[str, Change], steps: Mapping[str, int] | None = None
) -> dict[str, Config]:
    """The config of the base and of every change, with other numbers of updates if `steps` names them.

    Raises:
      UserError: as `plan`.
    """
    configs: dict[str, Config] = {}
    errors = []
    for name, change in changes.items():
        length = [f"--config.train.num_steps={steps[name]}"] if steps else []
        try:
            config, _ = command_line.config_flags(["", *flags, *changes[BASE].flags(), *change.flags(), *length])
            configs[name] = schema.with_absolute_paths(config)
            session.check_data(configs[name], workdir="")
            _check_comparable(configs[name], configs[BASE], is_base=name == BASE)
        except UserError as error:
            errors.append(f"{name}: {error}")
            if name == BASE:
                break
    if errors:
        raise UserError("\n".join(errors))
    return configs


def scored_data(data: DataConfig) -> DataConfig:
    """The data section of the test and validation sets.

    Raises:
      UserError: a mixture has several directions.
    """
    found = mixture.directions(data)
    if len(found) > 1:
        names = ", ".join(direction.name for direction in found)
        raise UserError(f"config.data.mixture: an ablation compares models of one direction, got {names}")
    return found[0].data


def _check_comparable(config: Config, base: Config, is_base: bool) -> None:
    scored = [dataclasses.replace(each, data=scored_data(each.data)) for each in (base, config)]
    is_held_out = not (scored[0].data.valid or scored[0].data.valid_source)
    for field in (*FIXED_FIELDS, *(TRAINING_FIELDS if is_held_out else ())):
        expected, value = (validation.get_field(each, field) for each in scored)
        if value != expected:
            raise UserError(
                f"config.{field}: decides what is scored, so expected that of the base, {expected!r}, got {value!r}"
            )
    if config == base and not is_base:
        raise UserError("changes nothing: the base has these values; leave it out")


def equal_steps(base_steps: int, flops: Mapping[str, float]) -> dict[str, int]:
    """The numbers of updates that cost what `base_steps` of the base do, by the FLOPs of an update."""
    return {name: max(round(base_steps * flops[BASE] / each), 1) for name, each in flops.items()}


def update_cost(config: Config) -> tuple[float, int]:
    """FLOPs of an update, the mean over the batches of an epoch, and the size of the vocabulary; prepares the data."""
    corpus = mixture_corpus.open_sources(config.data)
    tokenizer = vocabulary.get_or_train_tokenizer(tokenizers.inherit_tokenizer(config), corpus)
    ids = input_pipeline.training_ids(config, corpus, tokenizer)
    schedule = input_pipeline.make_batch_schedule(config, ids)
    flops = sum(
        count * training_flops(config.model, tokenizer.vocab_size, config.train.passes * rows, source, target)
        for count, (source, target, rows) in zip(schedule.num_batches, schedule.buckets, strict=True)
    )
    return flops / sum(schedule.num_batches), tokenizer.vocab_size  # about, if a mixture has stages


def num_params(config: Config, vocab_size: int) -> int:
    """The number of params of the model."""
    import jax

    jax.config.update("jax_platforms", "cpu")  # not of the processes that train: an accelerator is theirs alone
    from transformer.models.registry import ModelDef

    return ModelDef(config.model, vocab_size).num_params()


def format_plan(variants: Mapping[str, Variant]) -> str:
    """The plan as Markdown."""
    heads = ("change", "fields", "params", "FLOPs an update", "updates", "FLOPs")
    rows = []
    for name, (change, config, params, flops) in variants.items():
        steps = config.train.num_steps
        rows.append((name, change, f"{params:,}", f"{flops:.2e}", f"{steps:,}", f"{steps * flops:.2e}"))
    return "\n".join(command_line.markdown_table(heads, rows))
