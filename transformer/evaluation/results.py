"""The names of results in a workdir, and its files of translations."""

import contextlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from transformer.checkpoints.loading import RestoredModel
from transformer.distributed import multihost
from transformer.evaluation.datasets import EvalDataset
from transformer.runtime.errors import UserError
from transformer.runtime.files import user_error_on_oserror, write_atomic

DATASETS_FILE = "sets.json"  # name → digest of the first data set of that name


def result_name(
    workdir: epath.PathLike, restored: RestoredModel, dataset: EvalDataset, fields: Mapping[str, Any] | None = None
) -> str:
    """STEP.SET[.FIELD=VALUE…], the name of the files of an evaluation.

    SET is the name of the split or file. If the workdir has results of another data set of that name, a digest of the
    sentences is appended.

    Args:
      workdir: of the model.
      restored: the model.
      dataset: on which it is evaluated.
      fields: of decoding, other than the checkpoint's own.
    """
    _register(workdir, dataset)
    return f"{restored.tag}.{set_name(workdir, dataset)}{decode_suffix(fields or {})}"


def decode_suffix(fields: Mapping[str, Any]) -> str:
    """Decode fields as the end of a name, so that results of decoding by the config are not mistaken for others."""
    return "".join(f".{name}={value}" for name, value in sorted(fields.items()))


def set_name(workdir: epath.PathLike, dataset: EvalDataset) -> str:
    """SET, as in `result_name`."""
    first = _registered_digests(workdir).get(dataset.name, dataset.digest)
    return dataset.name if first == dataset.digest else f"{dataset.name}-{dataset.digest[:8]}"


def set_names(workdir: epath.PathLike, dataset: EvalDataset) -> list[str]:
    """SET, and the names under which the workdir has other data sets of the same sentences."""
    same = (name for name, digest in _registered_digests(workdir).items() if digest == dataset.digest)
    return list(dict.fromkeys([set_name(workdir, dataset), *same]))


def _registered_digests(workdir: epath.PathLike) -> dict[str, str]:
    """The digest of the first data set of each name in the workdir."""
    try:
        return {**json.loads((epath.Path(workdir) / "translations" / DATASETS_FILE).read_text())}
    except (OSError, ValueError, TypeError):
        return {}


def _register(workdir: epath.PathLike, dataset: EvalDataset) -> None:
    """Makes a data set the first of its name, if there is none."""
    path, digests = epath.Path(workdir) / "translations" / DATASETS_FILE, _registered_digests(workdir)
    if dataset.name not in digests and multihost.is_primary():
        # In a read-only workdir the name is not registered, but then no files are written either.
        with contextlib.suppress(UserError), user_error_on_oserror(f"{path}"):
            path.parent.mkdir(exist_ok=True)
            write_atomic(path, json.dumps({**digests, dataset.name: dataset.digest}, indent=1) + "\n")


def translations_path(workdir: epath.PathLike, name: str) -> epath.Path:
    """WORKDIR/translations/NAME.txt; the name is that of `result_name`."""
    return epath.Path(workdir) / "translations" / f"{name}.txt"


@multihost.primary_only
def write_translations(translations: Sequence[str], path: epath.PathLike) -> None:
    """Writes one translation a line, atomically."""
    path = epath.Path(path)
    with user_error_on_oserror(f"{path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, "".join(f"{line}\n" for line in translations))
