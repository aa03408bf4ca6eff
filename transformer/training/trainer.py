"""What the host does: fetch, dispatch, log, evaluate, save, resume, and stop when the loss is no number.

The devices run update n while the host reads the metrics of update n - 1. They wait for the host where a
line is logged, a checkpoint saved or the validation split scored.
"""

import contextlib
import functools
import json
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from etils import epath

from transformer.attention import fused
from transformer.checkpoints import best_metric
from transformer.checkpoints.manager import VALID_BLEU, CheckpointManager, Metrics, score_definition
from transformer.config import Config, validation
from transformer.data import corpus as corpora
from transformer.data import input_pipeline
from transformer.data import tokenizer as tokenizers
from transformer.data.batching import Batch
from transformer.data.tokenizer import Tokenizer
from transformer.distributed import consistency, mesh, multihost, sharding
from transformer.evaluation import bleu_tokenizer
from transformer.evaluation.evaluator import Evaluator
from transformer.models import flops, registry
from transformer.runtime import environment, signals
from transformer.runtime.errors import DivergedError, UserError
from transformer.runtime.logging import log_info
from transformer.training import initialization, optimizer, workdir
from transformer.training import train_step as step
from transformer.training.metrics import (
    DIVERGENCE_HINT,
    MetricsAccumulator,
    MetricWriter,
    NullMetricWriter,
    StragglerDetector,
    open_metric_writer,
    peak_memory_mb,
    per_host_metrics,
)
from transformer.training.preemption import PreemptionSync
from transformer.training.train_step import StepMetrics, TrainState


def fit(config: Config, folder: epath.PathLike) -> None:
    """Trains in a workdir until `train.num_steps` updates are done, or resumes what was begun there.

    Raises:
      UserError: of its kinds, see `errors`.
      StoppedError: by SIGTERM, SIGINT or SIGHUP, after saving.
    """
    path = epath.Path(folder)
    CheckpointManager(path)  # refuses a path that has no room for them before anything is done
    environment.enable_compilation_cache()
    consistency.assert_same_code()
    consistency.assert_same_config(config)
    with (
        workdir.acquire_lock(path) if multihost.is_primary() else contextlib.nullcontext()
    ):  # the lead holds it for all
        consistency.assert_shared_workdir(path)
        run = Run(config, path)
        workdir.save_config(path, run.config, run.run_ids.run_id)
        with signals.catch_stop_signals() as stop_signal:
            run.train(stop_signal)


class StepPipeline:
    """Dispatches updates, and reads the metrics of each while the next one runs."""

    def __init__(
        self,
        train_step: Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]],
        state: TrainState,
        batches: Iterator[Batch],
        place: Callable[[Batch], Batch],
        flops_of: Callable[[Batch], float],
        spent: flops.Spent,
    ):
        skipped = int(jax.device_get(optimizer.num_skipped(state.opt_state)))
        self.state, self.meter, self.compiles = (
            state,
            MetricsAccumulator(spent, skipped=skipped),
            environment.CompileCounter(),
        )
        self._train_step, self._batches, self._place, self._flops_of = train_step, batches, place, flops_of
        self._done = int(jax.device_get(state.step))
        self._unread: tuple[StepMetrics, int, dict[str, Any]] | None = None

    def dispatch(self) -> None:
        """Starts one update; nothing but the batch travels to the devices, and nothing back."""
        waiting_since = time.perf_counter()
        batch = next(self._batches)
        self.meter.waited += time.perf_counter() - waiting_since
        with jax.transfer_guard("disallow"), self.compiles:
            placed = self._place(batch)
            with self.meter.device_wait():
                self.state, metrics = self._train_step(self.state, placed)
        self.drain()
        self._done += 1
        self._unread = metrics, self._done, {"slots": placed.target_BT.size, "flops": self._flops_of(placed)}

    def drain(self) -> None:
        """Reads the metrics that are still on the devices; a DivergedError if they are no numbers."""
        if self._unread:
            metrics, done, size = self._unread
            self._unread = None
            with self.meter.device_wait():
                metrics = jax.device_get(metrics)
            self.meter.add(metrics, done, **size)


class EarlyStopping(NamedTuple):
    """How validation goes: the best merit so far, see `best_metric`, and how many in a row were no better."""

    best: float = -math.inf
    stale: int = 0

    def after(self, merit: float) -> "EarlyStopping":
        """After one more validation."""
        return EarlyStopping(merit, 0) if merit > self.best else EarlyStopping(self.best, self.stale + 1)

    def metrics(self) -> Metrics:
        """As it is saved with a checkpoint, in JSON, which has no infinity."""
        return {"stale": float(self.stale), **({"best": self.best} if math.isfinite(self.best) else {})}

    @classmethod
    def of(cls, metrics: Metrics) -> "EarlyStopping":
        """As it was saved with a checkpoint."""
        return cls(metrics.get("best", -math.inf), int(metrics["stale"]))


class Run:
    """One sitting of a run: everything it needs, opened once."""

    def __init__(self, config: Config, path: epath.Path):
        self.config, self.path = config, path
        self.mesh = mesh.warm_up_collectives(mesh.make_mesh(config.mesh))
        fused.require(config, self.mesh)
        self.checkpoints = CheckpointManager(path)
        newest, before, self.run_ids = _resume_point(self.checkpoints, path)
        # Until there is a checkpoint, nothing is lost with another config.
        old = config
        if newest is not None:
            old = self.checkpoints.config(newest)
            old = best_metric.with_metric(old, best_metric.resolve(old))
            self.config = config = best_metric.with_metric(config, best_metric.resolve(old))
        changes = workdir.check_resume_config(path, old, config)
        self.searches_anew = score_definition(old) != score_definition(config)
        origin = None
        if newest is not None:
            initialization.check_base_unchanged(
                old, config, self.run_ids.base_run_id, self.checkpoints.tokenizer(newest)
            )
        elif origin := initialization.resolve_warm_start(config):
            self.run_ids = self.run_ids._replace(base_run_id=origin.run_id)
        with multihost.primary_first("data"):
            corpus = corpora.open_corpus(config.data)
            self.pairs, self.valid = corpus.split("train"), corpus.split("validation")
            self.data = {"training": self.pairs.digest, "validation": self.valid.digest}
            self._check_data(newest)
            self.config = config = self._with_best_metric()
            self.tokenizer = self._tokenizer(corpus, newest)
            self.ids = input_pipeline.token_ids(config.data, corpus, "train", self.tokenizer)
        consistency.assert_same_data(corpus.digest, self.tokenizer.digest)
        self.plan = input_pipeline.make_batch_schedule(config, self.ids)
        model = registry.Model(config.model, self.tokenizer.vocab_size)
        self.evaluator = Evaluator(model, self.tokenizer, config, self.mesh)
        self.train_step = step.make_train_step(model, config, self.mesh)
        self.checkpoints.clean_up(newest)
        self.start, self.progress, self.spent, self.is_scored = (
            newest or 0,
            EarlyStopping(),
            flops.Spent(),
            VALID_BLEU in before,
        )
        if newest is None:
            self.state = initialization.initial_state(origin, model, config, self.mesh)
        else:
            self.state = self.checkpoints.restore(newest, step.abstract_state(model, config, self.mesh))
            self.progress, self.spent = EarlyStopping.of(before), flops.Spent.of(before) or self.spent
            if self.searches_anew:
                self.progress = EarlyStopping()  # a score of another search is another figure
        self.slowest = StragglerDetector()
        self._describe(model)
        if changes:
            log_info(f"changed since the last sitting: {'; '.join(changes)}")

    def train(self, stop_signal: Callable[[], int | None]) -> None:
        """Does the updates that are left."""
        train, self.stop_signal = self.config.train, stop_signal
        # The last sitting may have been stopped before it could validate.
        owes = self._is_due(self.start, train.eval_every_steps) and not self.is_scored
        if not owes and self._is_over(self.start):
            return
        dumped = workdir.dump_batch_on_divergence(self.path, self.plan, self.pairs)
        with dumped, open_metric_writer(self.path, self.start, train.num_steps) as log:
            if owes:
                self._evaluate(self.state.eval_params, self.start, log)
                if self._is_over(self.start):
                    return
            batches = input_pipeline.train_iterator(
                self.plan,
                self.ids,
                start=self.start,
                num_steps=train.num_steps,
                rows=functools.partial(sharding.local_row_indices, self.mesh, parts=train.accumulation_steps),
            )
            place = functools.partial(sharding.shard_batch, self.mesh, parts=train.accumulation_steps)
            flops_of = functools.partial(flops.batch_flops, self.config.model, self.tokenizer.vocab_size)
            vote = PreemptionSync(self.mesh, stop_signal)
            updates = StepPipeline(self.train_step, self.state, batches, place, flops_of, self.spent)
            for done in range(self.start + 1, train.num_steps + 1):
                updates.dispatch()
                log.advance(done)
                with updates.meter.device_wait():
                    stopped = vote()
                self._after_update(updates, done, log, stopped)
                if self._is_over(done):
                    return

    def _after_update(
        self, updates: StepPipeline, done: int, log: MetricWriter | NullMetricWriter, stopped: int | None
    ) -> None:
        """Logs, saves and evaluates, each when it is due, and stops when it is told to."""
        train = self.config.train
        logs, evaluates = self._is_due(done, train.log_every_steps), self._is_due(done, train.eval_every_steps)
        saves = evaluates or stopped or self._is_due(done, train.checkpoint_every_steps)
        if logs or saves:
            updates.drain()
            self.spent = updates.meter.cost()
        if logs:
            machine = {"train/compiles": updates.compiles.count, "train/peak_memory_mb": peak_memory_mb()}
            each = per_host_metrics(
                self.mesh, {**updates.meter.host_timing(), "memory_mb": machine["train/peak_memory_mb"]}
            )
            log.write(done, {**updates.meter.summary(), **self.spent.metrics(), **machine, **each})
            if slowest := self.slowest.update(each):
                log.say(slowest)
            updates.meter.reset()
        if saves:
            with updates.meter.pause():
                self._save(updates.state, done)
                log.sync()
                if evaluates and not stopped:
                    self._evaluate(updates.state.eval_params, done, log)
                self.checkpoints.prune(train.keep_last, train.keep_best)
        if stopped:
            raise signals.preempted(stopped, done)

    def _is_over(self, done: int) -> bool:
        """Whether nothing is left to do; says why, unless the bar does."""
        train, stale = self.config.train, self.progress.stale
        if train.early_stopping_patience and stale >= train.early_stopping_patience:
            best = best_metric.format_score(train.best_metric, self.progress.best)
            what = f"{best_metric.TITLES[train.best_metric]} than {best}"
            log_info(f"step {done:,}: {stale:,} validations without a better {what}, so the run ends here")
            return True
        if done == self.start >= train.num_steps:
            ends = validation.ends_with_its_steps(self.config)
            advice = "longer runs of its schedule need another workdir" if ends else "raise train.num_steps to go on"
            log_info(f"{self.path}: trained for {done:,} steps; {advice}")
        return done >= train.num_steps

    def _is_due(self, done: int, every: int) -> bool:
        return done > 0 and (done % every == 0 or done == self.config.train.num_steps)

    def _tokenizer(self, corpus: corpora.Corpus, newest: int | None) -> Tokenizer:
        stored = self.path / "tokenizer"
        if newest is None:
            return input_pipeline.get_tokenizer(tokenizers.inherit_tokenizer(self.config), corpus, stored)
        return input_pipeline.check_same_tokenizer(self.config.data, corpus, stored, self.checkpoints.tokenizer(newest))

    def _check_data(self, newest: int | None) -> None:
        """Refuses to go on with other data: its order, or what is the best BLEU, could not be the same."""
        if not len(self.valid):
            raise UserError("the validation split has no pairs: fill it, or leave it out to hold out training pairs")
        for kind, before in self.checkpoints.manifest(newest).data.items() if newest is not None else ():
            if before != self.data[kind]:
                raise UserError(
                    f"{self.path}: the {kind} data has changed since step {newest:,}: its digest was {before[:16]} and "
                    f"is {self.data[kind][:16]}. Restore it, or choose another --workdir"
                )

    def _with_best_metric(self) -> Config:
        """The config with `train.best_metric` decided; says so, and how BLEU is computed."""
        references = self.valid.targets()
        tokenizer = bleu_tokenizer.choose(self.config.data, references)
        log_info(str(tokenizer))
        if self.config.train.best_metric != "auto":
            return self.config
        metric, line = bleu_tokenizer.decide(references, tokenizer.name)
        if line:
            log_info(line)
        return best_metric.with_metric(self.config, metric)

    def _describe(self, model: registry.Model) -> None:
        plan, data = self.plan, self.config.data
        log_info(
            f"{model.num_params():,} params · {self.tokenizer.vocab_size:,} pieces · {plan.kept:,} pairs, dropped "
            f"{plan.dropped:,} longer than data.max_length = {data.max_length} · {plan.steps_per_epoch:,} steps an "
            f"epoch, fill {plan.token_utilization:.2f} · {self.mesh.size} x {self.mesh.devices.flat[0].device_kind}"
        )
        shapes = " ".join(f"{b.rows}x({b.source}, {b.target})" for b in plan.buckets)
        log_info(f"batch shapes, rows x (source, target): {shapes}")
        if waste := sharding.padding_warning(self.mesh, plan, self.config.train.accumulation_steps):
            log_info(f"warning: {waste}")
        if self.mesh.size < jax.device_count():
            log_info(
                f"warning: config.mesh uses {self.mesh.size} of {jax.device_count()} devices; mesh.data=-1 takes all"
            )
        if self.start:
            log_info(f"resuming after step {self.start:,}")
            others = environment.diff(self.checkpoints.manifest(self.start).host, environment.fingerprint())
            if others:
                log_info(f"warning: another host than before, so the last bits may differ: {'; '.join(others)}")

    def _save(self, state: TrainState, done: int) -> None:
        """Saves a checkpoint, if its params are numbers: the loss just read was that of the params before them."""
        if not step.all_finite(state.params):
            raise DivergedError(
                f"the run diverged: update {done} made params that are no numbers; {DIVERGENCE_HINT}", done
            )
        metrics = {**self.progress.metrics(), **self.spent.metrics()}
        self.checkpoints.save(state, self.config, self.tokenizer, self.data, metrics, **self.run_ids._asdict())

    def _evaluate(self, params: registry.Params, done: int, log: MetricWriter | NullMetricWriter) -> None:
        """Scores the validation split, and records the scores with the checkpoint of this step.

        It may take longer than the time a stop signal leaves; what it leaves undone the next sitting makes up for.
        """

        def leave(_: int) -> None:
            stopped = self.stop_signal()
            if stopped and multihost.process_count() == 1:  # one of several would leave the others waiting
                raise signals.preempted(stopped, done)

        sources, references = self.valid.sources(), [self.valid.targets()]
        report = self.evaluator.evaluate(params, sources, references, metrics=("bleu", "chrf"), progress=leave)
        if not math.isfinite(report.loss):
            self.checkpoints.remove(done)
            raise DivergedError(
                f"the run diverged: after update {done} the validation loss is {report.loss}; {DIVERGENCE_HINT}"
            )
        bleu, chrf = float(report.scores["bleu"]), float(report.scores["chrf"])
        scores = {"valid/loss": report.loss, VALID_BLEU: bleu, "valid/chrf": chrf}
        metric = self.config.train.best_metric
        self.progress = self.progress.after(best_metric.score(metric, scores) or 0.0)
        if done > self.start or not self.searches_anew:  # else it would pass for the score of that checkpoint's search
            self.checkpoints.update_metrics(done, {**scores, **self.progress.metrics()})
        log.write(done, {**scores, "valid/seconds": report.seconds, **self.spent.metrics()})
        shown = {"loss": f"validation loss {report.loss:.3f}", "bleu": f"BLEU {bleu:.2f}", "chrf": f"chrF2 {chrf:.2f}"}
        shown[metric] += f", best {best_metric.format_score(metric, self.progress.best)}"
        log.say(f"step {done:,} · {' · '.join(shown.values())} · {report.seconds:.0f} s · after {self.spent}")


class RunIds(NamedTuple):
    """The ids of a run and of the one that `train.init_from` names, as checkpoints keep them."""

    run_id: str
    base_run_id: str


def _resume_point(checkpoints: CheckpointManager, path: epath.Path) -> tuple[int | None, Metrics, RunIds]:
    """The newest sound checkpoint, if there is any, its metrics and its run, as the lead finds them for all hosts."""

    def find() -> str:
        newest = checkpoints.latest_valid_step()
        if newest is None:
            return json.dumps([None, {}, RunIds(workdir.run_id(path, "", None), "")])
        manifest = checkpoints.manifest(newest)
        own = workdir.run_id(path, f"{checkpoints.folder}: checkpoint {newest}", manifest.run_id)
        return json.dumps([newest, manifest.metrics, RunIds(own, manifest.base_run_id)])

    newest, metrics, ids = json.loads(multihost.broadcast_from_primary("newest checkpoint", find))
    return newest, metrics, RunIds(*ids)
