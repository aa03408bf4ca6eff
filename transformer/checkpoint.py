"""Checkpoints: state, config, tokenizer and metrics as one verified unit.

checkpoints/STEP/ holds params/ and optimizer/ (Orbax), config.json, tokenizer/, metrics.json and, written
last, manifest.json with the size and sha256 of every other file. Without a manifest that agrees a
checkpoint does not count: it is reported as damaged and the newest sound one is taken instead. Nothing
found in a checkpoint is ever executed.
"""

import dataclasses
import hashlib
import json
import sys
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from orbax.checkpoint import v1 as ocp

from transformer import config as configs
from transformer import sharding
from transformer import tokenizer as tokenizers
from transformer.config import Config
from transformer.errors import UserError, WorkdirError
from transformer.step import Model, Params, TrainState, abstract_params, abstract_state
from transformer.tokenizer import Tokenizer

MANIFEST = "manifest.json"
SCORE = "valid/bleu"  # the metric that makes a checkpoint the best

Metrics = dict[str, float]


class Damaged(Exception):
    """A checkpoint whose files are not those that were written."""


class Checkpoints:
    """The checkpoints of one workdir."""

    def __init__(self, workdir: epath.PathLike):
        self.folder = epath.Path(workdir) / "checkpoints"

    def steps(self) -> list[int]:
        """Steps of the finished checkpoints, oldest first; whether they are sound is not looked at."""
        if not self.folder.exists():
            return []
        names = [path.name for path in self.folder.iterdir() if (path / MANIFEST).exists()]
        return sorted(int(name) for name in names if name.isdecimal())

    def save(self, state: TrainState, config: Config, tokenizer: Tokenizer, metrics: Metrics) -> None:
        """Writes the checkpoint of `state.step`; it counts once its manifest stands, never before."""
        folder = self.folder / str(int(jax.device_get(state.step)))
        if folder.exists():
            _remove(folder)
        folder.mkdir(parents=True)
        ocp.save(folder / "params", state.params)
        ocp.save(folder / "optimizer", state.opt_state)
        tokenizer.save(folder / "tokenizer")
        (folder / "config.json").write_text(config.to_json())
        (folder / "metrics.json").write_text(json.dumps(metrics) + "\n")
        manifest = {str(path.relative_to(folder)): _fingerprint(path) for path in _files(folder)}
        partial = folder / (MANIFEST + ".partial")
        partial.write_text(json.dumps(manifest, indent=1) + "\n")
        partial.replace(folder / MANIFEST)

    def verify(self, step: int) -> None:
        """Compares every file with the manifest.

        Raises:
          Damaged: a file is missing, is new, or has other content.
        """
        folder = self.folder / str(step)
        try:
            manifest = json.loads((folder / MANIFEST).read_text())
            written = {name: (int(size), str(digest)) for name, (size, digest) in manifest.items()}
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise Damaged(f"{MANIFEST} cannot be read: {error}") from error
        found = {str(path.relative_to(folder)): path for path in _files(folder)}
        odd = sorted(found.keys() ^ written.keys())
        if odd:
            raise Damaged(f"{odd[0]} is {'missing' if odd[0] in written else 'not part of it'}")
        for name, path in sorted(found.items()):
            if tuple(_fingerprint(path)) != written[name]:
                raise Damaged(f"{name} has changed since it was written")

    def newest_sound(self) -> int | None:
        """The newest step that verifies; None if nothing was ever saved.

        Raises:
          WorkdirError: there are checkpoints, and none of them is sound.
        """
        available = self.steps()
        for step in reversed(available):
            if self._sound(step):
                return step
        if available:
            raise WorkdirError(
                f"{self.folder}: none of the checkpoints {available} is sound. Restore one from a copy, or start in "
                "another workdir"
            )
        return None

    def select(self, which: str) -> int:
        """The step that `latest`, `best` or a number names.

        A damaged one gives way to the newest sound (`latest`) or to the best sound one (`best`), and is
        reported; a step asked for by number is never replaced.
        """
        available = self.steps()
        if not available:
            raise UserError(f"{self.folder}: found no checkpoint; train first, or name another --workdir")
        if which == "latest":
            return self.newest_sound() or 0
        if which == "best":
            scored = sorted((s for s in available if SCORE in self.metrics(s)), key=lambda s: self.metrics(s)[SCORE])
            if not scored:
                raise UserError(f"{self.folder}: no checkpoint has a validation BLEU yet; use --checkpoint=latest")
            for step in reversed(scored):
                if self._sound(step):
                    return step
            return self.newest_sound() or 0
        if not which.isdecimal() or int(which) not in available:
            raise UserError(f"--checkpoint: expected latest, best or one of {available}, got {which!r}")
        if not self._sound(int(which)):
            raise WorkdirError(f"checkpoint {which} is damaged; ask for another")
        return int(which)

    def metrics(self, step: int) -> Metrics:
        """The metrics saved with a checkpoint; none if their file is damaged."""
        try:
            values = json.loads((self.folder / str(step) / "metrics.json").read_text())
            return {str(name): float(value) for name, value in values.items()}
        except (OSError, ValueError, AttributeError, TypeError):
            return {}

    def prune(self, keep_last: int, keep_best: int) -> None:
        """Deletes all but the newest and the best ones."""
        available = self.steps()
        scored = [step for step in available if SCORE in self.metrics(step)]
        best = sorted(scored, key=lambda step: self.metrics(step)[SCORE])
        keep = {*available[-keep_last:], *(best[-keep_best:] if keep_best else [])}
        for step in available:
            if step not in keep:
                _remove(self.folder / str(step))

    def restore_params(self, step: int, model: Model, mesh: Mesh) -> Params:
        """The params alone, on the devices of `mesh`."""
        return ocp.load(self.folder / str(step) / "params", abstract_params(model, mesh))

    def restore(self, step: int, model: Model, config: Config, mesh: Mesh) -> TrainState:
        """The whole state, on the devices of `mesh`, whatever mesh it was saved from."""
        abstract = abstract_state(model, config, mesh)
        opt_state = ocp.load(self.folder / str(step) / "optimizer", abstract.opt_state)
        counter = jax.device_put(np.asarray(step, np.int32), abstract.step.sharding)
        return TrainState(counter, self.restore_params(step, model, mesh), opt_state)

    def _sound(self, step: int) -> bool:
        try:
            self.verify(step)
        except Damaged as damage:
            print(f"checkpoint {step} is damaged and skipped: {damage}", file=sys.stderr, flush=True)
            return False
        return True


@dataclasses.dataclass(frozen=True)
class Trained:
    """A model read from a workdir, ready to translate."""

    step: int
    config: Config
    tokenizer: Tokenizer
    model: Model
    params: Params
    mesh: Mesh


def load_trained(workdir: epath.PathLike, which: str) -> Trained:
    """Reads config, tokenizer and params of one checkpoint; nothing but the workdir is needed."""
    workdir = epath.Path(workdir)
    if not workdir.is_dir():
        raise UserError(f"--workdir={workdir}: expected a folder that train.py wrote, found none")
    checkpoints = Checkpoints(workdir)
    step = checkpoints.select(which)
    folder = checkpoints.folder / str(step)
    config = configs.from_json((folder / "config.json").read_text(), str(folder / "config.json"))
    tokenizer = tokenizers.load(folder / "tokenizer")
    mesh = sharding.make_mesh(config.mesh)
    model = Model(config.model, tokenizer.vocab_size)
    return Trained(step, config, tokenizer, model, checkpoints.restore_params(step, model, mesh), mesh)


def _files(folder: epath.Path) -> Iterator[epath.Path]:
    """All files below a checkpoint but its manifest."""
    for path in folder.iterdir():
        if path.is_dir():
            yield from _files(path)
        elif path.name not in (MANIFEST, MANIFEST + ".partial"):
            yield path


def _fingerprint(path: epath.Path) -> list[Any]:
    """Size in bytes and sha256 of a file."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            size += len(block)
    return [size, digest.hexdigest()]


def _remove(folder: epath.Path) -> None:
    """Deletes a checkpoint, its manifest first: half deleted it counts no more."""
    (folder / MANIFEST).unlink(missing_ok=True)
    folder.rmtree()
