"""Loads a trained model by checkpoint selector: one checkpoint, or the mean of several.

The paper's base model is the mean of its last 5 checkpoints (section 6.1): `average:5`.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh

from transformer.checkpoints.manager import CheckpointManager, Metrics, no_valid_checkpoint
from transformer.config import Config, MeshConfig, schema, validation
from transformer.config.mixture import Direction
from transformer.config.validation import RESUMABLE_FIELDS
from transformer.data.tokenizer import Tokenizer
from transformer.distributed import sharding
from transformer.distributed.mesh import make_mesh, warm_up_collectives
from transformer.models.registry import ModelDef, Params
from transformer.runtime import object_storage, progress
from transformer.runtime.errors import UserError, WorkdirError
from transformer.runtime.files import reject_missing_workdirs
from transformer.runtime.rounding import round_up

PARAM_FOLDERS = ("params/", "ema/")  # of a checkpoint
AVERAGE = re.compile(r"(best-)?average:([1-9][0-9]{0,5})")


class CheckpointDeletedError(UserError):
    """Training deleted a checkpoint while it was read."""


@dataclasses.dataclass(frozen=True)
class RestoredModel:
    """A model read from a workdir.

    Attributes:
      selector: by which it was chosen.
      steps: of the checkpoints whose params these are, oldest first; several if it is their mean.
      metrics: recorded with the newest.
      source_tag: the tag of the target language before each source; empty for none. See `with_direction`.
    """

    selector: str
    steps: list[int]
    metrics: Metrics
    config: Config
    tokenizer: Tokenizer
    model: ModelDef
    params: Params
    mesh: Mesh
    source_tag: str = ""

    @property
    def step(self) -> int:
        """The newest of the steps."""
        return self.steps[-1]

    @property
    def description(self) -> str:
        """Selector and steps, for messages."""
        return describe(self.selector, self.steps)

    def with_decode(self, fields: Mapping[str, Any]) -> "RestoredModel":
        """The model with these fields of decoding in place of its own.

        Raises:
          UserError: as `validation.override_decode`.
        """
        return dataclasses.replace(self, config=validation.override_decode(self.config, dict(fields)))

    def on_local_devices(self) -> "RestoredModel":
        """The model on the devices of this process alone, which then computes without the others."""
        mesh = make_mesh(MeshConfig(), jax.local_devices())
        local = jax.tree.map(lambda leaf: leaf.addressable_data(0), sharding.replicate(self.mesh, self.params))
        return dataclasses.replace(self, params=jax.device_put(local, sharding.replicated(mesh)), mesh=mesh)

    def with_direction(self, direction: Direction) -> "RestoredModel":
        """The model with the data and the tag of one of its directions, and without the others."""
        config = dataclasses.replace(self.config, data=direction.data)
        return dataclasses.replace(self, config=config, source_tag=direction.tag)

    @property
    def tag(self) -> str:
        """The step, and what was averaged, for the name of a file."""
        return f"{self.step}-{self.selector.replace(':', '-')}" if AVERAGE.fullmatch(self.selector) else str(self.step)


def describe(selector: str, steps: list[int]) -> str:
    """A selector and the steps that it selects, for messages."""
    if not AVERAGE.fullmatch(selector):
        return f"checkpoint {steps[-1]:,}"
    best = "best " if selector.startswith("best") else ""
    return f"average of {best}{len(steps)}: {', '.join(map(str, steps))}"


def load_checkpoint(workdir: epath.PathLike, selector: str | int) -> RestoredModel:
    """Reads config, tokenizer and params onto all devices; the workdir needs nothing but checkpoints.

    Args:
      workdir: what train.py wrote.
      selector: latest, best or a step, of which the moving average is taken if the run keeps one; or
        average:N or best-average:N, the mean of params without their moving average.
    """
    if reason := object_storage.unsupported_reason(workdir):
        raise UserError(f"{workdir}: {reason}")
    workdir, selector = epath.Path(workdir).expanduser(), str(selector)
    reject_missing_workdirs(workdir)
    manager = CheckpointManager(workdir)
    available = manager.steps()
    candidates = [step for step in available if str(step) == selector] or available
    with progress.phase(f"verifying checkpoints of {workdir}"), _deletion_reported(manager, candidates):
        steps = resolve_steps(manager, selector)
    with progress.phase(f"loading {describe(selector, steps)} of {workdir}"), _deletion_reported(manager, steps):
        config, tokenizer = manager.config(steps[-1]), manager.tokenizer(steps[-1])
        mesh = warm_up_collectives(make_mesh(MeshConfig()))
        model = ModelDef(config.model, tokenizer.vocab_size)
        params = read_params(manager, selector, steps, config, model, mesh)
        metrics = manager.metrics(steps[-1])
        return RestoredModel(selector, steps, metrics, config, tokenizer, model, params, mesh)


@contextlib.contextmanager
def _deletion_reported(manager: CheckpointManager, steps: list[int]) -> Iterator[None]:
    """Raises a CheckpointDeletedError in place of any error, if one of these checkpoints is gone by then."""
    try:
        yield
    except Exception as error:  # which one depends on the file that was deleted first
        if deleted := sorted(set(steps) - set(manager.steps())):
            raise CheckpointDeletedError(
                f"{manager.folder}: checkpoint {deleted[0]} was deleted while it was read; run again"
            ) from error
        raise


def read_params(
    manager: CheckpointManager, selector: str, steps: list[int], config: Config, model: ModelDef, mesh: Mesh
) -> Params:
    """The params that a selector means: the mean of several, or the moving average of one if its run keeps one.

    Args:
      steps: as `resolve_steps` returns them.
      config: of the run that trained them.
    """
    if AVERAGE.fullmatch(selector):
        return average_params(manager, steps, model, mesh)
    return manager.restore_params(steps[0], model, mesh, "ema" if config.train.ema_decay else "params")


def average_params(manager: CheckpointManager, steps: list[int], model: ModelDef, mesh: Mesh) -> Params:
    """The mean of the params of several checkpoints, on the devices of `mesh`.

    They are read one after the other and summed in float32, so at most two copies are in memory.
    """
    total = manager.restore_params(steps[0], model, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, total)
    in_place = functools.partial(jax.jit, donate_argnums=0, out_shardings=shardings)
    add = in_place(lambda total, params: jax.tree.map(jnp.add, total, params))
    for step in steps[1:]:
        total = add(total, manager.restore_params(step, model, mesh))
    if len(steps) == 1:
        return total
    return in_place(lambda total: jax.tree.map(lambda leaf: leaf / len(steps), total))(total)


def params_digest(workdir: epath.PathLike, steps: Sequence[int]) -> str:
    """SHA-256 of the params, and their moving averages, in the checkpoints of these steps, by their manifests.

    Raises:
      CheckpointDeletedError: one of them is no longer there.
    """
    manager, digest = CheckpointManager(epath.Path(workdir).expanduser()), hashlib.sha256()
    with _deletion_reported(manager, list(steps)):
        for step in steps:
            for name, (_, sha256) in sorted(manager.manifest(step).files.items()):
                if name.startswith(PARAM_FOLDERS):
                    digest.update(f"{name} {sha256}\n".encode())
    return digest.hexdigest()


def resolve_steps(manager: CheckpointManager, selector: str) -> list[int]:
    """The steps that a selector means, oldest first: latest, best, a step, average:N or best-average:N.

    A damaged checkpoint is reported, and the next newest or next best valid one is taken instead; a step selected
    by its number is never replaced. `best` falls back to checkpoints that may have lost their score.

    Raises:
      UserError: there is no such checkpoint, or there are fewer than N.
      WorkdirError: none of them is valid.
    """
    available = manager.steps()
    if not available:
        raise UserError(f"{manager.folder}: found no checkpoint; train first, or name another workdir")
    if selector.isdecimal() and int(selector) in available:
        if not manager.is_valid(int(selector)):
            raise WorkdirError(f"checkpoint {selector} is damaged; ask for another")
        return [int(selector)]
    average = AVERAGE.fullmatch(selector)
    if not average and selector not in ("latest", "best"):
        raise UserError(
            "checkpoint: expected latest, best, average:N, best-average:N with N at least 1, or one of "
            f"{available}, got {selector!r}"
        )
    is_best, count = selector.startswith("best"), int(average[2]) if average else 1
    ranked, unscored = _rank_by_score(manager, available) if is_best else (available[::-1], [])
    candidates = ranked if average else ranked + unscored
    steps = sorted(itertools.islice(filter(manager.is_valid, candidates), count))  # reads no more than that
    if not steps and not (average and any(map(manager.is_valid, unscored))):
        raise no_valid_checkpoint(manager.folder, available)
    if len(steps) < count:
        what, field = ("with a validation score", "train.keep_best") if is_best else ("to average", "train.keep_last")
        raise UserError(
            f"{manager.folder}: expected {count:,} valid checkpoints {what}, found {len(steps):,} of "
            f"{len(available):,}; ask for fewer, or train on with {field} at least {count}"
        )
    # Where a damaged checkpoint was reported, that may have been the one with the score.
    nothing_reported = unscored == available[::-1] and steps == available[-1:]
    if selector == "best" and not ranked and nothing_reported:
        train, step = manager.config(steps[0]).train, steps[0]
        due = min(round_up(max(step, 1), train.eval_every_steps), train.num_steps)
        hint = f"the next validation is at step {due:,}, as train.eval_every_steps = {train.eval_every_steps:,}"
        if due <= step:
            hint = f"the validation of step {step:,} is not done; unless it is under way, run train.py again"
        raise UserError(f"{manager.folder}: no checkpoint has a validation score yet; {hint}; use the latest, or wait")
    check_one_run(manager, steps)
    return steps


def _rank_by_score(manager: CheckpointManager, available: list[int]) -> tuple[list[int], list[int]]:
    """The checkpoints with a validation score, the best first, and the others, the newest first.

    Only file sizes are compared, which is quick: checkpoints with a wrong one are reported and left out.
    """
    complete = [step for step in available if manager.is_valid(step, content=False)]
    ranked = manager.steps_by_metric(complete)[::-1]
    return ranked, [step for step in reversed(complete) if step not in ranked]


def check_one_run(manager: CheckpointManager, steps: list[int]) -> None:
    """Checks that checkpoints are of one run, as the mean of several runs is not a model.

    Runs are compared by their ids, or by vocabulary and model where an earlier version saved no id.

    Raises:
      UserError: some are of another run than the newest; it names them.
    """
    newest = steps[-1]
    others = {step: why for step in steps[:-1] if (why := _run_difference(manager, step, newest))}
    if others:
        listed = "; ".join(f"{step} ({why})" for step, why in others.items())
        raise UserError(
            f"{manager.folder}: checkpoints {steps} are not of one run, so their mean is no model. Of another run "
            f"than {newest}: {listed}. Move those of the other run elsewhere, or ask for fewer"
        )


def _run_difference(manager: CheckpointManager, step: int, newest: int) -> str:
    """In what a checkpoint shows to be of another run than the newest; empty if it may be of the same."""
    run_id, newest_run_id = manager.manifest(step).run_id, manager.manifest(newest).run_id
    if run_id and newest_run_id:
        return "" if run_id == newest_run_id else f"run id {run_id[:8]}, expected {newest_run_id[:8]}"
    digest, newest_digest = manager.tokenizer(step).digest, manager.tokenizer(newest).digest
    if digest != newest_digest:
        return f"vocabulary {digest[:8]}, expected {newest_digest[:8]}"
    changes = schema.diff(manager.config(newest), manager.config(step))
    changes = [
        change for change in changes if change.section == "model" and change.field not in RESUMABLE_FIELDS["model"]
    ]
    return ", ".join(f"model.{change.field} = {change.new!r}, expected {change.old!r}" for change in changes)
