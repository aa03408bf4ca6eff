"""The systems that are compared: a workdir, whose model translates now or has done so, or a file of translations."""

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from transformer.checkpoints.loading import RestoredModel, load_checkpoint
from transformer.config import Config, mixture, validation
from transformer.data import text_files
from transformer.decoding.translator import Translator
from transformer.evaluation.datasets import EvalDataset
from transformer.evaluation.results import set_names
from transformer.models.flops import TrainingCost
from transformer.runtime import commands
from transformer.runtime.errors import UserError
from transformer.runtime.files import CONFIG_FILE


class TrainingRun(NamedTuple):
    """What is known of a checkpoint's training."""

    workdir: epath.Path
    description: str
    num_params: int
    cost: TrainingCost | None


class System(NamedTuple):
    """Translations of a test set.

    Attributes:
      label: short, for tables and charts.
      name: in full.
      translations: one for each sentence.
      run: of the model; None if unknown.
    """

    label: str
    name: str
    translations: Sequence[str]
    run: TrainingRun | None = None


def labels(paths: Sequence[epath.PathLike]) -> list[str]:
    """For each path its shortest end that no other path has, without what all of them end in.

    runs/a and runs/b → a, b; a/translations/800.test.txt and b/translations/800.test.txt → a, b. Equal paths get
    numbers.
    """
    parts = [os.fspath(path).rstrip("/").split("/") for path in paths]

    def end_of(path: list[str]) -> list[str]:
        others = [other for other in parts if other != path]
        lengths = range(1, len(path) + 1)
        distinct = (k for k in lengths if all(other[-k:] != path[-k:] for other in others))
        return path[-next(distinct, len(path)) :]

    ends = [end_of(path) for path in parts]
    while all(len(end) > 1 for end in ends) and len({end[-1] for end in ends}) == 1:
        ends = [end[:-1] for end in ends]
    names = ["/".join(end) for end in ends]
    return [f"{name} ({names[: i + 1].count(name)})" if names.count(name) > 1 else name for i, name in enumerate(names)]


def baseline_system(
    path: epath.PathLike,
    checkpoint: str,
    dataset: EvalDataset,
    languages: tuple[str, str],
    fields: Mapping[str, Any] | None = None,
) -> System:
    """A baseline for `eval.py --versus`, and its translations of the same sources.

    Args:
      path: a workdir, whose model translates them now, or a file of translations.
      checkpoint: of the workdir.
      dataset: whose sources are translated.
      languages: codes of source and target.
      fields: of decoding, instead of the workdir's own.

    Raises:
      UserError: the path is neither, the number of lines is wrong, or the model does not translate these languages.
    """
    path = epath.Path(path)
    if not path.is_dir():
        return System(path.name, path.name, read_translations(path, dataset, f"--versus={path}"))
    if not (path / "checkpoints").is_dir():
        raise UserError(f"--versus={path}: expected a workdir of train.py or a file of translations, found neither")
    restored = load_checkpoint(path, checkpoint).with_decode(fields or {})
    try:
        restored = restored.with_direction(mixture.find_direction(restored.config.data, *languages))
    except UserError as error:
        raise UserError(f"--versus={path}: {error}; name a model of the same direction") from error
    translator = Translator([restored.model], restored.tokenizer, restored.config.decode, restored.mesh)
    translations = translator.translate([restored.params], dataset.sources, tag=restored.source_tag)
    system = evaluated(path, restored, translations)
    translator.log_warnings(system.name)
    return system


def evaluated(workdir: epath.PathLike, restored: RestoredModel, translations: Sequence[str]) -> System:
    """The system of a restored model."""
    path, cost = epath.Path(workdir), TrainingCost.from_metrics(restored.metrics)
    run = TrainingRun(path, restored.description, restored.model.num_params(), cost)
    return System(path.name, f"{path.name}, {restored.description}", translations, run)


def label_pair(baseline: System, path: epath.PathLike, system: System) -> list[System]:
    """A baseline read from `path` and the system of a workdir, with labels that differ."""
    assert system.run
    names = labels([path, system.run.workdir])
    if os.fspath(path) == os.fspath(system.run.workdir) and baseline.run:
        names = [baseline.run.description, system.run.description]
    return [each._replace(label=name) for each, name in zip((baseline, system), names, strict=True)]


def read_translations(path: epath.PathLike, dataset: EvalDataset, name: str) -> list[str]:
    """The lines of a file, one for each sentence; errors name `name`.

    Raises:
      UserError: the file is missing, or the number of lines is wrong.
    """
    lines, expected = list(text_files.read_lines(path)), len(dataset.references[0])
    if len(lines) != expected:
        raise UserError(
            f"{name}: expected a translation of each of the {expected:,} sentences of {dataset.name}, got "
            f"{len(lines):,} lines; name translations of the same set"
        )
    return lines


def read_config(workdir: epath.PathLike) -> Config:
    """The config of a workdir.

    Raises:
      UserError: it is no workdir.
    """
    path = epath.Path(workdir) / CONFIG_FILE
    if not path.exists():
        raise UserError(f"{workdir}: expected a workdir of train.py or a file of translations, found neither")
    return validation.load(path)


def newest_translations(workdir: epath.PathLike, dataset: EvalDataset) -> epath.Path:
    """The file of translations that eval.py wrote for the newest step evaluated on a data set, decoded by the config.

    A data set of the same sentences is the same under any name: models of one direction and of several name it
    otherwise.

    Raises:
      UserError: there is none.
    """
    workdir = epath.Path(workdir)
    names = "|".join(map(re.escape, set_names(workdir, dataset)))
    pattern = re.compile(rf"(\d+)(-(best-)?average-\d+)?\.({names})\.txt")
    folder, found = workdir / "translations", []
    for path in folder.iterdir() if folder.is_dir() else ():
        if match := pattern.fullmatch(path.name):
            found.append((int(match[1]), path.stat().mtime, path))
    if not found:
        raise UserError(
            f"{workdir}: expected translations of {dataset.name} in translations/, found none of these sentences; run "
            f"{commands.spelled('eval')} --workdir={workdir} on the same set first"
        )
    return max(found)[2]
