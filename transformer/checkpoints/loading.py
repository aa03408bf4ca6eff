"""A trained model as a person names it, ready to translate: one checkpoint, or the mean of several.

The paper's base model is the mean of its last 5 checkpoints (section 6.1): `average:5`.
"""

import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh

from transformer.checkpoints.manager import CheckpointManager, Metrics
from transformer.config import Config, MeshConfig, schema
from transformer.config.validation import RESUMABLE_FIELDS
from transformer.data.tokenizer import Tokenizer
from transformer.distributed.mesh import make_mesh, warm_up_collectives
from transformer.models.registry import ModelDef, Params
from transformer.runtime import object_storage
from transformer.runtime.errors import UserError, WorkdirError

AVERAGE = re.compile(r"(best-)?average:([1-9][0-9]{0,5})")


@dataclasses.dataclass(frozen=True)
class RestoredModel:
    """A model read from a workdir.

    Attributes:
      which: as it was asked for.
      steps: of the checkpoints whose params these are, oldest first; several where it is their mean.
      metrics: recorded with the newest.
    """

    which: str
    steps: list[int]
    metrics: Metrics
    config: Config
    tokenizer: Tokenizer
    model: ModelDef
    params: Params
    mesh: Mesh

    @property
    def step(self) -> int:
        """The newest of the steps."""
        return self.steps[-1]

    @property
    def description(self) -> str:
        """For people."""
        return describe(self.which, self.steps)

    @property
    def tag(self) -> str:
        """For the name of a file: the step, and what was averaged."""
        return f"{self.step}-{self.which.replace(':', '-')}" if AVERAGE.fullmatch(self.which) else str(self.step)


def describe(which: str, steps: list[int]) -> str:
    """What was asked for and found, for people."""
    if not AVERAGE.fullmatch(which):
        return f"checkpoint {steps[-1]:,}"
    best = "best " if which.startswith("best") else ""
    return f"average of {best}{len(steps)}: {', '.join(map(str, steps))}"


def load_checkpoint(workdir: epath.PathLike, which: str | int) -> RestoredModel:
    """Reads config, tokenizer and params onto all devices there are; needs nothing but checkpoints.

    Args:
      workdir: what train.py wrote.
      which: latest, best or a step, of which the moving average is taken if the run keeps one; or
        average:N or best-average:N, the mean of params as they were trained.
    """
    if reason := object_storage.unsupported_reason(workdir):
        raise UserError(f"{workdir}: {reason}")
    workdir, which = epath.Path(workdir).expanduser(), str(which)
    if not workdir.is_dir():
        raise UserError(f"--workdir={workdir}: expected a folder that train.py wrote, found none")
    checkpoints = CheckpointManager(workdir)
    available = checkpoints.steps()
    wanted = [step for step in available if which.isdecimal() and int(which) == step] or available
    try:
        wanted = resolve_steps(checkpoints, which)
        return _read(checkpoints, which, wanted)
    except Exception as error:
        # What this raises while training deletes a checkpoint depends on which of its files went first.
        if gone := sorted(set(wanted) - set(checkpoints.steps())):
            raise UserError(
                f"{checkpoints.folder}: checkpoint {gone[0]} was deleted while it was read; run again"
            ) from error
        raise


def _read(checkpoints: CheckpointManager, which: str, steps: list[int]) -> RestoredModel:
    config = checkpoints.config(steps[-1])
    tokenizer = checkpoints.tokenizer(steps[-1])
    mesh = warm_up_collectives(make_mesh(MeshConfig()))
    model = ModelDef(config.model, tokenizer.vocab_size)
    params = read_params(checkpoints, which, steps, config, model, mesh)
    metrics = checkpoints.metrics(steps[-1])
    return RestoredModel(which, steps, metrics, config, tokenizer, model, params, mesh)


def read_params(
    checkpoints: CheckpointManager, which: str, steps: list[int], config: Config, model: ModelDef, mesh: Mesh
) -> Params:
    """The params that `which` names: the mean of several, or of one the moving average if its run keeps one.

    Args:
      steps: as `select` found them.
      config: of the run that trained them.
    """
    if AVERAGE.fullmatch(which):
        return average_params(checkpoints, steps, model, mesh)
    return checkpoints.restore_params(steps[0], model, mesh, "ema" if config.train.ema_decay else "params")


def average_params(checkpoints: CheckpointManager, steps: list[int], model: ModelDef, mesh: Mesh) -> Params:
    """The mean of the params of several checkpoints, on the devices of `mesh`.

    They are read one after the other and summed in float32, so two copies are in memory and never more.
    """
    total = checkpoints.restore_params(steps[0], model, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, total)
    in_place = functools.partial(jax.jit, donate_argnums=0, out_shardings=shardings)
    add = in_place(lambda total, params: jax.tree.map(jnp.add, total, params))
    for step in steps[1:]:
        total = add(total, checkpoints.restore_params(step, model, mesh))
    if len(steps) == 1:
        return total
    return in_place(lambda total: jax.tree.map(lambda leaf: leaf / len(steps), total))(total)


def resolve_steps(checkpoints: CheckpointManager, which: str) -> list[int]:
    """The steps that `which` names, oldest first.

    A damaged one is reported and gives way to the next newest or next best sound one; a step asked for
    by number is never replaced.

    Raises:
      UserError: there is no such checkpoint, or there are not as many as it asks for.
      WorkdirError: none of them is sound.
    """
    available = checkpoints.steps()
    if not available:
        raise UserError(f"{checkpoints.folder}: found no checkpoint; train first, or name another --workdir")
    average = AVERAGE.fullmatch(which)
    if average:
        return _several(checkpoints, available, int(average[2]), best=bool(average[1]))
    if which in ("latest", "best"):
        return [_best(checkpoints, available) if which == "best" else checkpoints.latest_valid_step() or 0]
    if not which.isdecimal() or int(which) not in available:
        raise UserError(
            "--checkpoint: expected latest, best, average:N, best-average:N with N at least 1, or one of "
            f"{available}, got {which!r}"
        )
    if not checkpoints.is_valid(int(which)):
        raise WorkdirError(f"checkpoint {which} is damaged; ask for another")
    return [int(which)]


def _several(checkpoints: CheckpointManager, available: list[int], count: int, *, best: bool) -> list[int]:
    """The `count` newest sound ones, or of those with a validation score the best; no more are read than that."""
    asked, others = _by_worth(checkpoints, available) if best else (available[::-1], [])
    found = list(itertools.islice(filter(checkpoints.is_valid, asked), count))
    if not found and not any(map(checkpoints.is_valid, others)):
        raise _none_is_sound(checkpoints, available)
    if len(found) < count:
        what, field = ("with a validation score", "train.keep_best") if best else ("to average", "train.keep_last")
        raise UserError(
            f"{checkpoints.folder}: expected {count:,} sound checkpoints {what}, found {len(found):,} of "
            f"{len(available):,}; ask for fewer, or raise {field} before training on"
        )
    check_one_run(checkpoints, sorted(found))
    return sorted(found)


def check_one_run(checkpoints: CheckpointManager, steps: list[int]) -> None:
    """Refuses checkpoints of different runs, whose mean would be no model.

    Runs are told apart by their ids; where one has none, as earlier versions wrote them, by vocabulary and model.

    Raises:
      UserError: some are of another run than the newest; it names them.
    """
    newest = steps[-1]
    others = {step: why for step in steps[:-1] if (why := _other_run(checkpoints, step, newest))}
    if others:
        found = "; ".join(f"{step} ({why})" for step, why in others.items())
        raise UserError(
            f"{checkpoints.folder}: checkpoints {steps} are not of one run, so their mean is no model. Of another run "
            f"than {newest}: {found}. Move those of the other run elsewhere, or ask for fewer"
        )


def _other_run(checkpoints: CheckpointManager, step: int, newest: int) -> str:
    """Why a checkpoint is not of the run that saved the newest; empty where it may be."""
    id, id_of_newest = (checkpoints.manifest(one).run_id for one in (step, newest))
    if id and id_of_newest:
        return "" if id == id_of_newest else f"run id {id[:8]}, expected {id_of_newest[:8]}"
    digest, digest_of_newest = (checkpoints.tokenizer(one).digest for one in (step, newest))
    if digest != digest_of_newest:
        return f"vocabulary {digest[:8]}, expected {digest_of_newest[:8]}"
    changes = schema.diff(checkpoints.config(newest), checkpoints.config(step))
    changes = [one for one in changes if one.section == "model" and one.field not in RESUMABLE_FIELDS["model"]]
    return ", ".join(f"model.{one.field} = {one.new!r}, expected {one.old!r}" for one in changes)


def _best(checkpoints: CheckpointManager, available: list[int]) -> int:
    """The best sound one; the newest sound one, where the one with the score may be among the damaged."""
    scored, others = _by_worth(checkpoints, available)
    found = next(filter(checkpoints.is_valid, scored + others), None)
    if found is None:
        raise _none_is_sound(checkpoints, available)
    if not scored and others == available[::-1] and found == available[-1]:  # and nothing was reported
        raise UserError(f"{checkpoints.folder}: no checkpoint has a validation score yet; use --checkpoint=latest")
    return found


def _by_worth(checkpoints: CheckpointManager, available: list[int]) -> tuple[list[int], list[int]]:
    """Those with a validation score, the best first, and the others, the newest first.

    Only sizes are looked at, which is quick: those of a wrong one are reported and left out.
    """
    whole = [step for step in available if checkpoints.is_valid(step, content=False)]
    scored = checkpoints.steps_by_metric(whole)[::-1]
    return scored, [step for step in reversed(whole) if step not in scored]


def _none_is_sound(checkpoints: CheckpointManager, available: list[int]) -> WorkdirError:
    return WorkdirError(f"{checkpoints.folder}: none of the checkpoints {available} is sound")
