"""What a training session works with: the checkpoint to resume, the prepared data, and the compiled step.

A session is the part of a run from its start or resume to the end of the process.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
from etils import epath
from jax.sharding import Mesh

from transformer.attention import fused
from transformer.checkpoints import best_metric
from transformer.checkpoints.manager import CheckpointManager, Metrics, score_definition
from transformer.checkpoints.state import TrainState
from transformer.config import Config, schema
from transformer.data import input_pipeline, mixture_corpus, vocabulary
from transformer.data import tokenizer as tokenizers
from transformer.data.batching import Batch, BatchSchedule
from transformer.data.corpus import Split
from transformer.data.mixture_corpus import MixtureSplit, ValidationSplit
from transformer.data.tokenizer import Tokenizer
from transformer.distributed import consistency, multihost, sharding
from transformer.distributed import mesh as mesh_lib
from transformer.evaluation import bleu_tokenizer
from transformer.evaluation.evaluator import Evaluator
from transformer.evaluation.metrics import METRICS
from transformer.models.registry import ModelDef
from transformer.runtime import environment, progress
from transformer.runtime.errors import UserError
from transformer.runtime.logging import log_info
from transformer.training import initialization, optimizer, train_step, workdir
from transformer.training.initialization import WarmStart
from transformer.training.train_step import StepMetrics


class RunIds(NamedTuple):
    """The ids of a run and of the one that `train.init_from` names, as checkpoints keep them."""

    run_id: str
    base_run_id: str


@dataclasses.dataclass(frozen=True)
class ResumePoint:
    """Where a session starts: at the newest valid checkpoint, or at step 0.

    Attributes:
      step: of the checkpoint; None for a new run.
      metrics: recorded with the checkpoint.
      config: of this session, with the checkpoint's choice of `train.best_metric`; of a new run it may be auto still,
        which `RunContext.config` is not.
      changes: fields of the config that changed since the checkpoint, as 'section.field: old → new'.
      scores_comparable: whether validation scores mean the same as those recorded before.
      warm_start: the params of another run that a new run starts from.
    """

    checkpoints: CheckpointManager
    step: int | None
    metrics: Metrics
    run_ids: RunIds
    config: Config
    changes: list[str]
    scores_comparable: bool
    warm_start: WarmStart | None


@dataclasses.dataclass(frozen=True)
class TrainingData:
    """Both splits, and the training split tokenized and scheduled.

    Attributes:
      validation: one split per direction of translation.
      digests: those of both splits, as checkpoints keep them.
      best_metric: as decided for a new run, from eval.metrics and the validation references.
      ids: token ids of the training split.
    """

    train: Split | MixtureSplit
    validation: list[ValidationSplit]
    digests: dict[str, str]
    best_metric: str
    tokenizer: Tokenizer
    ids: input_pipeline.TokenIds
    schedule: BatchSchedule


@dataclasses.dataclass(frozen=True)
class RunContext:
    """All that the training loop needs besides the state, which changes with every update."""

    config: Config
    workdir: epath.Path
    mesh: Mesh
    resume: ResumePoint
    data: TrainingData
    train_step: Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]
    evaluator: Evaluator

    @property
    def checkpoints(self) -> CheckpointManager:
        """The checkpoints of this run's workdir."""
        return self.resume.checkpoints

    @property
    def start(self) -> int:
        """The number of updates done before this session."""
        return self.resume.step or 0


@contextlib.contextmanager
def exclusive_workdir(config: Config, folder: epath.PathLike) -> Iterator[epath.Path]:
    """Locks the workdir for the block; checks that all processes run the same code and config and see that folder."""
    path = epath.Path(folder)
    CheckpointManager(path)  # rejects a path that cannot hold checkpoints before anything is done
    consistency.assert_same_code()
    consistency.enable_compilation_cache()
    consistency.assert_same_config(config)
    with workdir.acquire_lock(path) if multihost.is_primary() else contextlib.nullcontext():
        consistency.assert_shared_workdir(path)
        yield path


def make_mesh(config: Config) -> Mesh:
    """The mesh of the run's devices.

    Raises:
      UserError: the mesh does not fit the devices, or the config forces an attention kernel that they cannot run.
    """
    with progress.phase("starting the devices"):
        mesh = mesh_lib.warm_up_collectives(mesh_lib.make_mesh(config.mesh))
    fused.check_supported(config, mesh)
    return mesh


def find_resume_point(config: Config, path: epath.Path) -> ResumePoint:
    """Finds the checkpoint to resume, or the other run to start from, and checks the config against it.

    Raises:
      UserError: the config is not the one that the run was started with, or `train.init_from` cannot be used.
      WorkdirError: the workdir has checkpoints, none of which is valid.
    """
    checkpoints = CheckpointManager(path)
    step, metrics, run_ids = _newest_checkpoint(checkpoints, path)
    old = config  # until there is a checkpoint, nothing is lost by another config
    if step is not None:
        old = checkpoints.config(step)
        old = best_metric.with_metric(old, best_metric.resolve(old))
        config = best_metric.with_metric(config, best_metric.resolve(old))
    changes = workdir.check_resume_config(path, old, config)
    scores_comparable = step is None or checkpoints.score_definition(step) == score_definition(config)
    warm_start = None
    if step is not None:
        initialization.check_base_unchanged(old, config, run_ids.base_run_id, checkpoints.tokenizer(step))
    elif warm_start := initialization.resolve_warm_start(config):
        run_ids = run_ids._replace(base_run_id=warm_start.run_id)
    return ResumePoint(checkpoints, step, metrics, run_ids, config, changes, scores_comparable, warm_start)


def _newest_checkpoint(checkpoints: CheckpointManager, path: epath.Path) -> tuple[int | None, Metrics, RunIds]:
    """The newest valid checkpoint, its metrics and run ids, as the primary process finds them for all."""

    def find() -> tuple[int | None, Metrics, tuple[str, str]]:
        with progress.phase("verifying the newest checkpoint"):
            newest = checkpoints.latest_valid_step()
        if newest is None:
            return None, {}, RunIds(workdir.run_id(path, "", None), "")
        manifest = checkpoints.manifest(newest)
        own = workdir.run_id(path, f"{checkpoints.folder}: checkpoint {newest}", manifest.run_id)
        return newest, manifest.metrics, RunIds(own, manifest.base_run_id)

    newest, metrics, ids = multihost.broadcast_from_primary("newest checkpoint", find)
    return newest, metrics, RunIds(*ids)


def prepare_data(resume: ResumePoint, path: epath.Path) -> TrainingData:
    """Opens the corpus, gets its tokenizer, tokenizes it and schedules its batches; the primary process goes first.

    Raises:
      UserError: the data cannot be used, or has changed since the checkpoint.
    """
    config = resume.config
    with multihost.primary_first("data"):
        corpus = mixture_corpus.open_sources(config.data, tokenize=True)
        train = corpus.train
        validation = mixture_corpus.validation_splits(config.data, corpus)
        digests = {"training": train.digest, "validation": mixture_corpus.validation_digest(validation)}
        _check_data(resume, path, digests)
        metric = _decide_best_metric(config, validation)
        stored = path / "tokenizer"
        if resume.step is None:
            tokenizer = vocabulary.get_tokenizer(tokenizers.inherit_tokenizer(config), corpus, stored)
        else:
            trained = resume.checkpoints.tokenizer(resume.step)
            tokenizer = vocabulary.check_same_tokenizer(config.data, corpus, stored, trained)
        ids = input_pipeline.training_ids(config, corpus, tokenizer)
    consistency.assert_same_data(corpus.digest, tokenizer.digest)
    schedule = input_pipeline.make_batch_schedule(config, ids)
    return TrainingData(train, validation, digests, metric, tokenizer, ids, schedule)


def _check_data(resume: ResumePoint, path: epath.Path, digests: dict[str, str]) -> None:
    """Raises a UserError for other data than the run has used: batches and validation scores would differ."""
    if resume.step is None:
        return
    for kind, old in resume.checkpoints.manifest(resume.step).data.items():
        if old != digests[kind]:
            raise UserError(
                f"{path}: the {kind} data has changed since step {resume.step:,}: its digest was {old[:16]} and "
                f"is {digests[kind][:16]}. Restore it, or choose another workdir"
            )


def _decide_best_metric(config: Config, validation: list[ValidationSplit]) -> str:
    """The metric that makes a checkpoint the best; logs why, and how BLEU is computed."""
    names = config.eval.metric_names
    references = [split.targets() for _, split in validation]
    tokenizers_by_direction = [
        bleu_tokenizer.choose_bleu_tokenizer(direction.data, lines)
        for (direction, _), lines in zip(validation, references, strict=True)
    ]
    if "bleu" in names:
        for line in dict.fromkeys(map(str, tokenizers_by_direction)):
            log_info(line)
    if config.train.best_metric != "auto":
        return config.train.best_metric
    if "bleu" not in names:
        log_info(
            f"the best checkpoint is that of the best {METRICS[names[0]].label}, the first of eval.metrics; "
            "train.best_metric sets another"
        )
        return names[0]
    choices = [
        bleu_tokenizer.choose_best_metric(lines, tokenizer.name)
        for lines, tokenizer in zip(references, tokenizers_by_direction, strict=True)
    ]
    metric, reason = next((choice for choice in choices if choice[1]), choices[0])
    if reason:
        log_info(reason)
    return metric


def prepare_state(context: RunContext, model: ModelDef) -> TrainState:
    """The state of the checkpoint, or that of a new run: fresh params or those of `train.init_from`."""
    config, resume = context.config, context.resume
    context.checkpoints.clean_up(resume.step)
    if resume.step is None:
        with progress.phase("initializing the params"):
            return initialization.initial_state(resume.warm_start, model, config, context.mesh)
    with progress.phase(f"restoring step {resume.step:,}"):
        return context.checkpoints.restore(resume.step, train_step.abstract_state(model, config, context.mesh))


def log_summary(context: RunContext, model: ModelDef) -> None:
    """Logs the sizes of model, data and batches, and what this session does differently from the last."""
    config, data, resume = context.config, context.data, context.resume
    schedule, mesh = data.schedule, context.mesh
    log_info(
        f"{model.num_params():,} params · {data.tokenizer.vocab_size:,} pieces · {schedule.kept:,} pairs, dropped "
        f"{schedule.dropped:,} longer than data.max_length = {config.data.max_length} · "
        f"{schedule.steps_per_epoch:,} steps {schedule.period}, fill {schedule.fill:.2f} · "
        f"{mesh.size} x {mesh.devices.flat[0].device_kind}"
    )
    shapes = " ".join(f"{b.rows}x({b.source}, {b.target})" for b in schedule.buckets)
    log_info(f"batch shapes, rows x (source, target): {shapes}")
    for line in schedule.summary():
        log_info(line)
    peak, warmup = optimizer.peak_learning_rate(config), min(config.optimizer.warmup_steps, config.train.num_steps)
    log_info(f"learning rate up to {peak:.2g}, after {warmup:,} updates")
    if warning := sharding.padding_warning(mesh, schedule, config.train.accumulation_steps):
        log_info(f"warning: {warning}")
    if mesh.size < jax.device_count():
        fits = jax.device_count() % (mesh.size // mesh.shape["data"]) == 0
        log_info(
            f"warning: config.mesh uses {mesh.size} of {jax.device_count()} devices"
            f"{'; mesh.data=-1 takes all' if fits else ''}"
        )
    profiled = schema.parse_steps(config.train.profile_steps)
    if profiled and profiled[0] <= (resume.step or 0) and not (context.workdir / "plugins" / "profile").exists():
        log_info(f"warning: train.profile_steps = {config.train.profile_steps} are done already; name later steps")
    if resume.step:
        log_info(f"resuming after step {resume.step:,}")
        saved_on = context.checkpoints.manifest(resume.step).host
        here = environment.fingerprint()
        if parts := environment.changed_parts(saved_on, here):
            changes = "; ".join(environment.diff(saved_on, here))
            log_info(f"warning: {parts} than before, so the last bits may differ: {changes}")
    if resume.changes:
        log_info(f"changed since the last session: {'; '.join(resume.changes)}")
