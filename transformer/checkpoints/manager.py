"""Saves, verifies, lists, prunes and restores checkpoints.

checkpoints/STEP/ holds params/, optimizer/ and, if a moving average is kept, ema/ (written by Orbax), config.json,
tokenizer/ and manifest.json: metrics, digests of the data, the environment of the run, size and SHA-256 of every
other file, and its own SHA-256. A checkpoint is written under another name and renamed when it is complete. One whose
files differ from its manifest is reported as damaged, and the newest valid one is taken instead. Nothing in a
checkpoint is ever executed.

Training continues while a checkpoint is written: `save_async` returns once its arrays are copied, and a thread does the
rest.
"""

import collections
import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore
from etils import epath
from jax.sharding import Mesh
from orbax.checkpoint import v1 as ocp

from transformer.checkpoints import best_metric
from transformer.checkpoints.manifest import MANIFEST, FileHasher, Manifest, Metrics, iter_files
from transformer.checkpoints.state import TrainState
from transformer.config import Config, DecodeConfig, validation
from transformer.data import tokenizer as tokenizers
from transformer.data.tokenizer import Tokenizer
from transformer.distributed import multihost, platform
from transformer.models.registry import ModelDef, Params, sharded_param_shapes
from transformer.runtime import environment, object_storage, progress
from transformer.runtime.background import BackgroundQueue
from transformer.runtime.errors import UserError, WorkdirError
from transformer.runtime.files import CONFIG_FILE, sha256, user_error_on_oserror, write_atomic
from transformer.runtime.logging import log_info, logged_beside

VALID_BLEU = "valid/bleu"  # recorded with every validated checkpoint
PARTS = {"params": "params", "optimizer": "opt_state", "ema": "ema"}  # folder of arrays → field of the state
TEMP_SUFFIXES = (".partial", ".removed")
QUARANTINED_MANIFEST = "manifest.damaged.json"  # in object storage: marks a damaged checkpoint
MANIFESTS = (MANIFEST, QUARANTINED_MANIFEST)


class CorruptCheckpointError(Exception):
    """A checkpoint whose files are not those that were written."""


class CheckpointManager(contextlib.AbstractContextManager):
    """The checkpoints of one workdir. As a context it waits at its end for the save that is under way."""

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
            name = str(path)
            if "\\" in name or name.encode(errors="ignore").decode() != name:  # TensorStore cannot open it
                raise UserError(f"{name!r}: checkpoints need a path in UTF-8 without backslashes; rename the folder")
        self.folder = path / "checkpoints"
        self._queue = BackgroundQueue("checkpoints")

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        with logged_beside(error):
            self.wait()

    def check(self) -> None:
        """Raises a UserError if the save that was under way has failed."""
        self._queue.check()

    def wait(self) -> None:
        """Waits for the save that is under way; raises a UserError if it fails."""
        if not self._queue.is_idle:
            with progress.phase("saving"):
                self._queue.wait()
        self.check()

    def _after_save(self, function: Callable[[], None]) -> None:
        """Calls a function that changes checkpoints once the save under way is done; now if there is none.

        Raises:
          UserError: the save has failed.
        """
        if self._queue.is_idle:
            self.check()
            function()
        else:
            self._queue.submit(function)

    def steps(self) -> list[int]:
        """Steps of all checkpoints, oldest first, valid or not."""
        if not self.folder.exists():
            return []
        if not self.folder.is_dir():
            raise UserError(f"{self.folder}: expected a folder of checkpoints, found a file")
        paths = [path for path in self.folder.iterdir() if path.name.isdecimal()]
        return sorted(int(path.name) for path in paths if not self._is_remote or (path / MANIFEST).exists())

    def save(self, *args: Any, **options: Any) -> None:
        """Writes a checkpoint; see `save_async`."""
        self.save_async(*args, **options)
        self.wait()

    def save_async(
        self,
        state: TrainState,
        config: Config,
        tokenizer: Tokenizer,
        data: dict[str, str],
        metrics: Metrics,
        *,
        run_id: str = "",
        base_run_id: str = "",
    ) -> None:
        """Begins to write the checkpoint of `state.step`, whose arrays may be donated when it returns.

        The checkpoint counts once it is complete, at the end of `wait` at the latest.

        Args:
          data: digests of the training and validation data.

        Raises:
          UserError: it cannot be written, or not be read again; `check`, `wait` and the next save raise it too.
        """
        self.wait()
        final = self.folder / str(int(jax.device_get(state.step)))
        # Object storage renames no folder atomically; there the manifest, written last, makes a checkpoint complete.
        folder = final if self._is_remote else final.parent / f"{final.name}.partial"
        manifest = Manifest(metrics, data, environment.fingerprint(), {}, run_id, base_run_id)
        with user_error_on_oserror(f"{final}"), contextlib.ExitStack() as stack:
            if multihost.is_primary():
                if folder.exists():
                    _delete_checkpoint(folder)
                folder.mkdir(parents=True)
            multihost.barrier("checkpoint begun")
            target = stack.enter_context(object_storage.staged(folder, write=True))
            writes: dict[str, ocp.AsyncResponse[None]] = {}
            stack.callback(_end_writes, writes)
            # Each process writes its shards, from copies on the host.
            to_save = jax.tree.map(jnp.copy, state) if platform.copies_state_to_save() else state
            for name, tree in _trees(to_save).items():
                writes[name] = ocp.save_async(target / name, tree)
            staged = stack.pop_all()
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)

        def finish() -> None:
            with user_error_on_oserror(f"{final}"):
                with staged, _unreadable_reported(final):
                    files = _finish_files(target, writes, config, tokenizer, shapes)
                if multihost.is_primary():
                    self._commit(folder, final, dataclasses.replace(manifest, files=files))
                multihost.barrier("checkpoint saved")

        self._queue.submit(finish)

    def _commit(self, folder: epath.Path, final: epath.Path, manifest: Manifest) -> None:
        """Makes a checkpoint whose other files are written count."""
        write_atomic(folder / MANIFEST, manifest.to_json())
        with _unreadable_reported(final):
            if _read_manifest(folder) != manifest:
                raise CorruptCheckpointError(f"{MANIFEST} reads otherwise than it was written")
        if folder != final:
            if final.exists():
                self.remove(int(final.name))
            folder.rename(final)

    @multihost.primary_only
    def update_metrics(self, step: int, metrics: Metrics, config: Config | None = None) -> None:
        """Adds metrics to a checkpoint.

        Args:
          config: that its validation used, if that may not be the checkpoint's own.
        """

        def update() -> None:
            manifest = self.manifest(step)
            manifest = dataclasses.replace(manifest, metrics={**manifest.metrics, **metrics})
            if config and score_definition(config) != self.score_definition(step):
                manifest = dataclasses.replace(manifest, scored_config=config.to_json())
            with user_error_on_oserror(f"{self.folder / str(step)}"):
                write_atomic(self.folder / str(step) / MANIFEST, manifest.to_json())

        self._after_save(update)

    def manifest(self, step: int) -> Manifest:
        """The manifest of a checkpoint, not yet compared with its files.

        Raises:
          CorruptCheckpointError: it cannot be read.
        """
        return _read_manifest(self.folder / str(step))

    def verify(self, step: int, *, content: bool = True) -> None:
        """Compares every file with the manifest; without `content` only names and sizes.

        Raises:
          CorruptCheckpointError: a file is missing, added or changed.
        """
        folder, expected = self.folder / str(step), self.manifest(step).files
        try:
            paths = {str(path.relative_to(folder)): path for path in iter_files(folder)}
            if unmatched := sorted(paths.keys() ^ expected.keys()):
                name = unmatched[0]
                raise CorruptCheckpointError(f"{name} is {'missing' if name in expected else 'not part of it'}")
            changed = sorted(name for name, path in paths.items() if path.stat().length != expected[name][0])
            if content and not changed:
                with FileHasher() as hasher:
                    hasher.add(folder)
                    changed = sorted(dict(hasher.digests(folder).items() ^ expected.items()))
        except OSError as error:
            raise CorruptCheckpointError(f"a file cannot be read: {error}") from error
        if changed:
            raise CorruptCheckpointError(f"{changed[0]} has changed since it was written")

    def is_valid(self, step: int, *, content: bool = True) -> bool:
        """Whether a checkpoint verifies; logs what is wrong with it if not."""
        try:
            self.verify(step, content=content)
        except CorruptCheckpointError as damage:
            what = f"is damaged and skipped: {damage}" if step in self.steps() else "was deleted just now"
            log_info(f"checkpoint {step} {what}")
            return False
        return True

    def _has_its_files(self, step: int) -> bool:
        """Whether the files of a checkpoint are there in their sizes."""
        with contextlib.suppress(CorruptCheckpointError):
            self.verify(step, content=False)
            return True
        return False

    def latest_valid_step(self) -> int | None:
        """The newest step that verifies; None without any checkpoint.

        Raises:
          WorkdirError: none of the checkpoints is valid.
        """
        available = self.steps()
        newest = next(filter(self.is_valid, reversed(available)), None)
        if available and newest is None:
            raise no_valid_checkpoint(self.folder, available)
        return newest

    def steps_by_metric(self, steps: list[int]) -> list[int]:
        """Sorts the steps that have a validation score, the best last; of equals the newest is the best.

        Leaves out scores that cannot be compared with the newest, because of another metric or search.
        """
        metrics = {step: self.metrics(step) for step in sorted(steps, reverse=True)}
        definitions = {step: self.score_definition(step) for step in metrics if VALID_BLEU in metrics[step]}
        newest = next((definition for definition in definitions.values() if definition is not None), None)
        metric = newest.metric if newest else "bleu"
        scores = {
            step: score
            for step, definition in definitions.items()
            if definition in (newest, None) and (score := best_metric.score(metric, metrics[step])) is not None
        }
        return sorted(scores, key=lambda step: (scores[step], step))

    def score_definition(self, step: int) -> "ScoreDefinition | None":
        """How a checkpoint was scored; None if its config has changed since it was written."""
        with contextlib.suppress(OSError, KeyError, CorruptCheckpointError, UserError):
            manifest = self.manifest(step)
            if manifest.scored_config:
                return score_definition(validation.from_json(manifest.scored_config, MANIFEST))
            if sha256(self.folder / str(step) / CONFIG_FILE) == manifest.files[CONFIG_FILE][1]:
                return score_definition(self.config(step))
        return None

    def metrics(self, step: int) -> Metrics:
        """The metrics recorded with a checkpoint; empty if its manifest is damaged."""
        try:
            return self.manifest(step).metrics
        except CorruptCheckpointError:
            return {}

    @multihost.primary_only
    def clean_up(self, newest: int | None) -> None:
        """Deletes unfinished checkpoints, and quarantines those after `newest`, which are damaged."""
        for path in self.folder.iterdir() if self.folder.exists() else ():
            is_step = path.name.isdecimal()
            if path.name.endswith(TEMP_SUFFIXES):
                _delete_folder(path)
            elif is_step and self._is_remote and not any((path / name).exists() for name in MANIFESTS):
                path.rmtree()
            elif is_step and newest is not None and int(path.name) > newest:
                self._quarantine(path)

    def _quarantine(self, path: epath.Path) -> None:
        """Makes a damaged checkpoint not count, and keeps its files."""
        if not self._is_remote:
            quarantine = path.parent / f"{path.name}.damaged"
            if quarantine.exists():
                quarantine.rmtree()
            path.rename(quarantine)
        elif (path / MANIFEST).exists():
            (path / QUARANTINED_MANIFEST).write_bytes((path / MANIFEST).read_bytes())
            (path / MANIFEST).unlink()

    @multihost.primary_only
    def prune(self, keep_last: int, keep_best: int) -> None:
        """Deletes all but the newest and the best checkpoints; none unless the newest is complete."""
        self._after_save(functools.partial(self._prune, keep_last, keep_best))

    def _prune(self, keep_last: int, keep_best: int) -> None:
        available = self.steps()
        ranked = self.steps_by_metric(available)[::-1]
        damaged = set() if not keep_best else {step for step in ranked if not self._has_its_files(step)}
        best = [step for step in ranked if step not in damaged][:keep_best]
        keep = {*available[-keep_last:], *best, *damaged}
        surplus = [step for step in available if step not in keep]
        if surplus and self.is_valid(available[-1], content=False):  # its files were just hashed
            for step in surplus:
                self.remove(step)

    @multihost.primary_only
    def remove(self, step: int) -> None:
        """Deletes a checkpoint; `steps` leaves it out before its first file is gone."""
        if self._is_remote:
            _delete_checkpoint(self.folder / str(step))
            return
        removed = self.folder / f"{step}.removed"
        with user_error_on_oserror(f"{self.folder.parent}"):
            if removed.exists():
                removed.rmtree()
            (self.folder / str(step)).rename(removed)
        _delete_folder(removed)

    def restore_params(self, step: int, model: ModelDef, mesh: Mesh, kind: str = "params") -> Params:
        """Restores the params alone onto the devices of `mesh`; with kind `ema` their moving average."""
        return _load_arrays(self.folder / str(step) / kind, sharded_param_shapes(model, mesh))

    def restore(self, step: int, abstract_state: TrainState) -> TrainState:
        """Restores the whole state with the shapes, dtypes and shardings of `abstract_state`, on any mesh."""
        folder = self.folder / str(step)
        arrays = {PARTS[name]: _load_arrays(folder / name, tree) for name, tree in _trees(abstract_state).items()}
        counter = jax.device_put(np.asarray(step, np.int32), abstract_state.step.sharding)
        return abstract_state._replace(step=counter, **arrays)

    def config(self, step: int) -> Config:
        """The config that a checkpoint was trained with."""
        return validation.load(self.folder / str(step) / CONFIG_FILE)

    def tokenizer(self, step: int) -> Tokenizer:
        """The vocabulary that a checkpoint was trained with."""
        return tokenizers.load(self.folder / str(step) / "tokenizer")


class ScoreDefinition(NamedTuple):
    """What must be equal for scores to be compared: the metric, the settings of the search, and the sentences."""

    metric: str
    search: DecodeConfig
    num_sentences: int


def score_definition(config: Config) -> ScoreDefinition:
    """The score definition of a config; fields that do not change a score are at their defaults."""
    metric = best_metric.resolve(config)
    if metric == "loss":
        limits = {name: getattr(config.decode, name) for name in ("max_source_tokens", "max_extra_length")}
        return ScoreDefinition(metric, DecodeConfig(**limits), config.eval.validation_sentences)
    search = dataclasses.replace(best_metric.validation_decode(config), batch_rows=DecodeConfig.batch_rows)
    return ScoreDefinition(metric, search, config.eval.validation_sentences)


def no_valid_checkpoint(folder: epath.Path, available: list[int]) -> WorkdirError:
    """The error for checkpoints all of which are damaged."""
    return WorkdirError(
        f"{folder}: none of the checkpoints {available} is valid. Restore one from a copy, or start in another workdir"
    )


def _trees(state: TrainState) -> dict[str, Any]:
    """The parts of a state that have arrays, by the names of their folders."""
    trees = {name: getattr(state, part) for name, part in PARTS.items()}
    return {name: tree for name, tree in trees.items() if tree is not None}


def _end_writes(writes: Mapping[str, ocp.AsyncResponse[None]]) -> None:
    """Waits until nothing is written any more, also after an error, which has been raised."""
    for write in writes.values():
        with contextlib.suppress(Exception):
            write.result()


def _finish_files(
    target: epath.Path,
    writes: Mapping[str, ocp.AsyncResponse[None]],
    config: Config,
    tokenizer: Tokenizer,
    shapes: TrainState,
) -> dict[str, tuple[int, str]]:
    """Waits for the arrays, writes the other files but the manifest, and checks; the primary process gets digests."""
    with FileHasher() as hasher:
        for name, write in writes.items():
            write.result()
            if multihost.process_count() == 1:
                hasher.add(target / name)  # while the next part is written
        multihost.barrier("arrays written")
        if not multihost.is_primary():
            return {}
        tokenizer.save(target / "tokenizer")
        write_atomic(target / CONFIG_FILE, config.to_json())
        hasher.add(target)
        check_arrays(target, shapes)  # while the files are hashed
        return hasher.digests(target)


def check_arrays(folder: epath.Path, state: TrainState) -> None:
    """Checks shape and dtype of all arrays of a checkpoint, read from the same store as when it is restored.

    On local disks it asks TensorStore itself: Orbax's own `metadata` takes 100 times as long.

    Raises:
      CorruptCheckpointError: an array is missing, or has another shape or dtype than in the state.
    """
    for name, tree in _trees(state).items():
        try:
            written = collections.Counter(_stored_arrays(folder / name))
        except Exception as error:  # TensorStore raises ValueError for most of what may be wrong
            raise CorruptCheckpointError(f"{name}/ cannot be opened: {error}") from error
        expected = collections.Counter((tuple(leaf.shape), str(leaf.dtype)) for leaf in jax.tree.leaves(tree))
        if written != expected:
            raise CorruptCheckpointError(
                f"{name}/: expected {expected.total():,} arrays, found {(written & expected).total():,} of them"
            )


def _stored_arrays(folder: epath.Path) -> Iterator[tuple[tuple[int, ...], str]]:
    """Yields shape and dtype of each array of a folder, merged by Orbax from what the processes wrote."""
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
def _unreadable_reported(path: epath.Path) -> Iterator[None]:
    """Turns a CorruptCheckpointError right after a save into a UserError."""
    try:
        yield
    except CorruptCheckpointError as damage:
        raise UserError(
            f"{path}: the checkpoint was written but cannot be read again, so it does not count: {damage}. Check the "
            "path and the disk, then resume"
        ) from damage


def _read_manifest(folder: epath.Path) -> Manifest:
    try:
        return Manifest.from_json((folder / MANIFEST).read_text())
    except (OSError, ValueError, AttributeError, TypeError, KeyError, RecursionError) as error:
        raise CorruptCheckpointError(f"{MANIFEST} cannot be read: {error!r}") from error


def _load_arrays(folder: epath.Path, abstract: Any) -> Any:
    """Reads arrays with the shapes, dtypes and shardings of `abstract`."""
    with object_storage.staged(folder) as local:
        return ocp.load(local, abstract)


def _delete_folder(folder: epath.Path) -> None:
    """Deletes a removed checkpoint; on NFS that fails while someone reads it, and `clean_up` tries again."""
    try:
        folder.rmtree()
    except OSError as error:
        log_info(f"{folder}: not deleted yet: {error}")


def _delete_checkpoint(folder: epath.Path) -> None:
    """Deletes a checkpoint, complete or not; in object storage its manifest first."""
    if object_storage.is_remote(folder):
        (folder / MANIFEST).unlink(missing_ok=True)
    folder.rmtree()
