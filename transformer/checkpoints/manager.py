"""Checkpoints: state, config, tokenizer and metrics as one verified unit.

checkpoints/STEP/ holds params/, optimizer/ and, where a moving average is kept, ema/ (Orbax), config.json,
tokenizer/ and manifest.json: the metrics, the digest of the training data, the host it was computed on, size
and SHA-256 of every other file, and the SHA-256 of all that. It is written under another name and moved into
place when it is whole. One whose files are not those of its manifest is reported as damaged, and the newest
sound one is taken instead. Nothing found in it is ever executed.
"""

import collections
import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol, TypeVar

import jax
import numpy as np
import tensorstore
from etils import epath
from jax.sharding import Mesh
from orbax.checkpoint import v1 as ocp

from transformer.checkpoints import best_metric
from transformer.checkpoints.manifest import MANIFEST, FileHasher, Manifest, Metrics, iter_files
from transformer.config import Config, DecodeConfig, validation
from transformer.data import tokenizer as tokenizers
from transformer.data.tokenizer import Tokenizer
from transformer.distributed import multihost
from transformer.models.registry import ModelDef, Params, abstract_params
from transformer.runtime import environment, object_storage
from transformer.runtime.errors import UserError, WorkdirError
from transformer.runtime.files import sha256, user_error_on_oserror, write_atomic
from transformer.runtime.logging import log_info

VALID_BLEU = "valid/bleu"  # recorded with every checkpoint that was validated
PARTS = {"params": "params", "optimizer": "opt_state", "ema": "ema"}  # folder of arrays → part of the state
TEMP_SUFFIXES = (".partial", ".removed")
QUARANTINED_MANIFEST = "manifest.damaged.json"  # in object storage: the manifest of one that was put aside


class State(Protocol):
    """What is kept of training: `training.train_step.TrainState`, a named tuple."""

    @property
    def step(self) -> Any:
        """The number of updates done."""

    @property
    def params(self) -> Params: ...

    @property
    def opt_state(self) -> Any: ...

    @property
    def ema(self) -> Params | None: ...

    def _replace(self, *, step: Any = ..., params: Any = ..., opt_state: Any = ..., ema: Any = ...) -> Any: ...


S = TypeVar("S", bound=State)


class CorruptCheckpointError(Exception):
    """A checkpoint whose files are not those that were written."""


class CheckpointManager:
    """The checkpoints of one workdir."""

    def __init__(self, workdir: epath.PathLike):
        path = epath.Path(workdir)
        if multihost.process_count() > 1 and object_storage.needs_staging(path):
            raise UserError(
                f"{path}: several hosts cannot keep checkpoints on s3://, where each would have to write its part and "
                "Orbax does not; take a folder that all hosts share, or gs://"
            )
        self._is_remote = object_storage.is_remote(path)
        if not self._is_remote:
            path = path.expanduser().resolve()  # Orbax takes no relative path
            _check_name(path)
        self.folder = path / "checkpoints"

    def steps(self) -> list[int]:
        """Steps of all checkpoints, oldest first; whether they are sound is not looked at."""
        if not self.folder.exists():
            return []
        if not self.folder.is_dir():
            raise UserError(f"{self.folder}: expected a folder of checkpoints, found a file")
        found = [path for path in self.folder.iterdir() if path.name.isdecimal()]
        return sorted(int(path.name) for path in found if not self._is_remote or (path / MANIFEST).exists())

    def save(
        self,
        state: State,
        config: Config,
        tokenizer: Tokenizer,
        data: dict[str, str],
        metrics: Metrics,
        *,
        run_id: str = "",
        base_run_id: str = "",
    ) -> None:
        """Writes the checkpoint of `state.step`; `data` are the digests of what it is trained and validated on.

        Raises:
          UserError: it cannot be written, or not be read again.
        """
        place = self.folder / str(int(jax.device_get(state.step)))
        # Object storage renames nothing at once; there a checkpoint is one when its manifest is there.
        folder = place if self._is_remote else place.parent / f"{place.name}.partial"
        with user_error_on_oserror(f"{place}"):
            if multihost.is_primary():
                if folder.exists():
                    _delete_checkpoint(folder)
                folder.mkdir(parents=True)
            multihost.barrier("checkpoint begun")
            with object_storage.staged_write(folder) as target, FileHasher() as digests:
                # On one host those of the params are taken while the optimizer's state is written.
                _save_arrays(target, state, then=digests.add if multihost.process_count() == 1 else lambda folder: None)
                multihost.barrier("arrays written")
                if multihost.is_primary():
                    tokenizer.save(target / "tokenizer")
                    write_atomic(target / "config.json", config.to_json())
                    digests.add(target)
                    with _acknowledged(place):
                        check_arrays(target, state)  # while the digests are taken
                    files = digests.below(target)
            if multihost.is_primary():
                manifest = Manifest(metrics, data, environment.fingerprint(), files, run_id, base_run_id)
                write_atomic(folder / MANIFEST, manifest.to_json())
                with _acknowledged(place):
                    if _read_manifest(folder) != manifest:
                        raise CorruptCheckpointError(f"{MANIFEST} reads otherwise than it was written")
                if folder != place:
                    if place.exists():
                        self.remove(int(place.name))
                    folder.rename(place)
            multihost.barrier("checkpoint saved")

    @multihost.primary_only
    def update_metrics(self, step: int, metrics: Metrics) -> None:
        """Adds metrics to a checkpoint."""
        manifest = self.manifest(step)
        manifest = dataclasses.replace(manifest, metrics={**manifest.metrics, **metrics})
        with user_error_on_oserror(f"{self.folder / str(step)}"):
            write_atomic(self.folder / str(step) / MANIFEST, manifest.to_json())

    def manifest(self, step: int) -> Manifest:
        """What a checkpoint says of itself, not yet held against its files.

        Raises:
          Damaged: it cannot be read.
        """
        return _read_manifest(self.folder / str(step))

    def verify(self, step: int, *, content: bool = True) -> None:
        """Compares every file with the manifest; without `content` only which there are, and their sizes.

        Raises:
          Damaged: a file is missing, is new, or has other content.
        """
        folder, written = self.folder / str(step), self.manifest(step).files
        try:
            found = {str(path.relative_to(folder)): path for path in iter_files(folder)}
            odd = sorted(found.keys() ^ written.keys())
            if odd:
                raise CorruptCheckpointError(f"{odd[0]} is {'missing' if odd[0] in written else 'not part of it'}")
            sizes = {name: path.stat().length for name, path in found.items()}
            odd = sorted(name for name in found if sizes[name] != written[name][0])
            if content and not odd:
                with FileHasher() as digests:
                    digests.add(folder)
                    odd = sorted(dict(digests.below(folder).items() ^ written.items()))
        except OSError as error:
            raise CorruptCheckpointError(f"a file cannot be read: {error}") from error
        if odd:
            raise CorruptCheckpointError(f"{odd[0]} has changed since it was written")

    def is_valid(self, step: int, *, content: bool = True) -> bool:
        """Whether a checkpoint verifies; says what is wrong with it if not."""
        try:
            self.verify(step, content=content)
        except CorruptCheckpointError as damage:
            gone = step not in self.steps()
            log_info(f"checkpoint {step} " + ("was deleted just now" if gone else f"is damaged and skipped: {damage}"))
            return False
        return True

    def latest_valid_step(self) -> int | None:
        """The newest step that verifies; None if nothing was ever saved.

        Raises:
          WorkdirError: there are checkpoints, and none of them is sound.
        """
        available = self.steps()
        for step in reversed(available):
            if self.is_valid(step):
                return step
        if available:
            raise WorkdirError(
                f"{self.folder}: none of the checkpoints {available} is sound. Restore one from a copy, or start in "
                "another workdir"
            )
        return None

    def steps_by_metric(self, steps: list[int]) -> list[int]:
        """Those of the steps that have a score, best last; of equals the newest is the best.

        Scores of different searches are different figures: those with another `decode` than the newest are left out.
        """
        metrics = {step: self.metrics(step) for step in sorted(steps, reverse=True)}
        kinds = {step: self._kind(step) for step in metrics if VALID_BLEU in metrics[step]}
        newest = next((kind for kind in kinds.values() if kind is not None), None)
        metric = newest.metric if newest else "bleu"
        merits = {
            step: merit
            for step, kind in kinds.items()
            if kind in (newest, None) and (merit := best_metric.score(metric, metrics[step])) is not None
        }
        return sorted(merits, key=lambda step: (merits[step], step))

    def _kind(self, step: int) -> "ScoreDefinition | None":
        """What a checkpoint's score is; None if its config is not as written."""
        with contextlib.suppress(OSError, KeyError, CorruptCheckpointError, UserError):
            written = self.manifest(step).files["config.json"][1]
            if sha256(self.folder / str(step) / "config.json") == written:
                return score_definition(self.config(step))
        return None

    def metrics(self, step: int) -> Metrics:
        """The metrics recorded with a checkpoint; none if it is damaged."""
        try:
            return self.manifest(step).metrics
        except CorruptCheckpointError:
            return {}

    @multihost.primary_only
    def clean_up(self, newest: int | None) -> None:
        """Before training goes on from `newest`: clears what was cut short, and puts later, damaged ones aside."""
        if not self.folder.exists():
            return
        for path in self.folder.iterdir():
            if path.name.endswith(TEMP_SUFFIXES):
                _delete_folder(path)
            elif self._is_remote and path.name.isdecimal():
                if not (path / MANIFEST).exists() and not (path / QUARANTINED_MANIFEST).exists():
                    path.rmtree()
                elif newest is not None and int(path.name) > newest and (path / MANIFEST).exists():
                    (path / QUARANTINED_MANIFEST).write_bytes((path / MANIFEST).read_bytes())
                    (path / MANIFEST).unlink()
            elif path.name.isdecimal() and newest is not None and int(path.name) > newest:
                aside = path.parent / f"{path.name}.damaged"
                if aside.exists():
                    aside.rmtree()
                path.rename(aside)

    @multihost.primary_only
    def prune(self, keep_last: int, keep_best: int) -> None:
        """Deletes all but the newest and the best ones; none unless the newest is whole."""
        available = self.steps()
        best = self.steps_by_metric(available)
        keep = {*available[-keep_last:], *(best[-keep_best:] if keep_best else [])}
        surplus = [step for step in available if step not in keep]
        if surplus and self.is_valid(available[-1], content=False):  # its digests were just taken
            for step in surplus:
                self.remove(step)

    @multihost.primary_only
    def remove(self, step: int) -> None:
        """Deletes a checkpoint; it is gone from `steps` before its first file is."""
        if self._is_remote:
            _delete_checkpoint(self.folder / str(step))
            return
        gone = self.folder / f"{step}.removed"
        with user_error_on_oserror(f"--workdir={self.folder.parent}"):
            if gone.exists():
                gone.rmtree()
            (self.folder / str(step)).rename(gone)
        _delete_folder(gone)

    def restore_params(self, step: int, model: ModelDef, mesh: Mesh, kind: str = "params") -> Params:
        """The params alone, on the devices of `mesh`; with kind `ema` their moving average."""
        return _load_arrays(self.folder / str(step) / kind, abstract_params(model, mesh))

    def restore(self, step: int, abstract_state: S) -> S:
        """The whole state, as `abstract_state` has its shapes, dtypes and shardings: on any mesh."""
        folder = self.folder / str(step)
        arrays = {PARTS[name]: _load_arrays(folder / name, tree) for name, tree in _trees(abstract_state).items()}
        counter = jax.device_put(np.asarray(step, np.int32), abstract_state.step.sharding)
        return abstract_state._replace(step=counter, **arrays)

    def config(self, step: int) -> Config:
        """The config that a checkpoint was trained with."""
        path = self.folder / str(step) / "config.json"
        return validation.from_json(path.read_text(), str(path))

    def tokenizer(self, step: int) -> Tokenizer:
        """The vocabulary that a checkpoint was trained with."""
        return tokenizers.load(self.folder / str(step) / "tokenizer")


class ScoreDefinition(NamedTuple):
    """What must be alike for scores to be compared: the metric, and how the translations are searched for."""

    metric: str
    search: DecodeConfig


def score_definition(config: Config) -> ScoreDefinition:
    """Of a config; what no score depends on is left at its default."""
    metric = best_metric.resolve(config)
    if metric == "loss":
        cuts = {name: getattr(config.decode, name) for name in ("max_source_tokens", "max_extra_length")}
        return ScoreDefinition(metric, DecodeConfig(**cuts))
    return ScoreDefinition(metric, dataclasses.replace(config.decode, batch_rows=DecodeConfig.batch_rows))


def _check_name(path: epath.Path) -> None:
    """Refuses the local paths that TensorStore, which writes and reads the arrays, cannot open."""
    name = str(path)
    if "\\" in name or name.encode(errors="ignore").decode() != name:
        raise UserError(f"{name!r}: checkpoints need a path in UTF-8 without backslashes; rename the folder")


def _trees(state: State) -> dict[str, Any]:
    """The parts of a state that have arrays, by the name of their folder."""
    trees = {name: getattr(state, part) for name, part in PARTS.items()}
    return {name: tree for name, tree in trees.items() if tree is not None}


def _save_arrays(folder: epath.Path, state: State, then: Callable[[epath.Path], None]) -> None:
    """Writes the arrays of a state, each host its shards.

    Args:
      then: called with each folder that is written.
    """
    for name, tree in _trees(state).items():
        ocp.save(folder / name, tree)
        then(folder / name)


def check_arrays(folder: epath.Path, state: State) -> None:
    """Reads the metadata of all arrays of a checkpoint from the store that restoring opens, and none of their data.

    On local disks it asks TensorStore itself: Orbax's own `metadata` takes 100 times as long.

    Raises:
      Damaged: an array is missing, or has another shape or type than in the state.
    """
    for name, tree in _trees(state).items():
        try:
            written = collections.Counter(_stored_arrays(folder / name))
        except Exception as error:  # TensorStore raises ValueError for most of what may be wrong
            raise CorruptCheckpointError(f"{name}/ cannot be opened: {error}") from error
        wanted = collections.Counter((tuple(leaf.shape), str(leaf.dtype)) for leaf in jax.tree.leaves(tree))
        if written != wanted:
            raise CorruptCheckpointError(
                f"{name}/: expected {wanted.total():,} arrays, found {(written & wanted).total():,} of them"
            )


def _stored_arrays(folder: epath.Path) -> Iterator[tuple[tuple[int, ...], str]]:
    """Yields shape and dtype of each array that Orbax merged from what the hosts wrote into a folder."""
    if object_storage.is_remote(folder):  # where Orbax knows how to open the store; the save takes far longer
        for leaf in jax.tree.leaves(ocp.metadata(folder).metadata):
            yield tuple(leaf.shape), str(leaf.dtype)
        return
    for store in folder.iterdir():
        if (store / "manifest.ocdbt").exists():
            base = {"driver": "file", "path": f"{store}/"}
            entries = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()
            reads = [entries.read(key) for key in entries.list().result() if key.endswith(b"zarr.json")]
            for read in reads:
                array = json.loads(read.result().value)
                yield tuple(array["shape"]), array["data_type"]


@contextlib.contextmanager
def _acknowledged(place: epath.Path) -> Iterator[None]:
    """Turns damage seen right after a save into a UserError."""
    try:
        yield
    except CorruptCheckpointError as damage:
        raise UserError(
            f"{place}: the checkpoint was written but cannot be read again, so it does not count: {damage}. Check the "
            "path and the disk, then resume"
        ) from damage


def _read_manifest(folder: epath.Path) -> Manifest:
    try:
        return Manifest.from_json((folder / MANIFEST).read_text())
    except (OSError, ValueError, AttributeError, TypeError, KeyError, RecursionError) as error:
        raise CorruptCheckpointError(f"{MANIFEST} cannot be read: {error!r}") from error


def _load_arrays(folder: epath.Path, abstract: Any) -> Any:
    """Arrays as `abstract` has them, on its devices."""
    with object_storage.staged_read(folder) as place:
        return ocp.load(place, abstract)


def _delete_folder(folder: epath.Path) -> None:
    """Deletes what is no checkpoint any more; on NFS not while someone reads it, and then `prepare` comes again."""
    try:
        folder.rmtree()
    except OSError as error:
        log_info(f"{folder}: not deleted yet: {error}")


def _delete_checkpoint(folder: epath.Path) -> None:
    """Deletes a checkpoint in object storage, or what is left of one; what makes it one goes first."""
    if object_storage.is_remote(folder):
        (folder / MANIFEST).unlink(missing_ok=True)
    folder.rmtree()
