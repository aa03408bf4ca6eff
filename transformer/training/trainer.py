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
from transformer.checkpoints.manager import SCORE, Checkpoints, Metrics, score_kind
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
from transformer.runtime.logging import say
from transformer.training import initialization, optimizer, workdir
from transformer.training import train_step as step
from transformer.training.metrics import (
    WHAT_HELPS,
    Meter,
    NoLog,
    RunLog,
    Slowest,
    of_each_host,
    open_log,
    peak_memory_mb,
)
from transformer.training.preemption import StopVote
from transformer.training.train_step import StepMetrics, TrainState


def fit(config: Config, folder: epath.PathLike) -> None:
    """Trains in a workdir until `train.num_steps` updates are done, or resumes what was begun there.

    Raises:
      UserError: of its kinds, see `errors`.
      StoppedError: by SIGTERM, SIGINT or SIGHUP, after saving.
    """
    path = epath.Path(folder)
    Checkpoints(path)  # refuses a path that has no room for them before anything is done
    environment.enable_cache()
    consistency.same_code()
    consistency.same_config(config)
    with workdir.lock(path) if multihost.is_lead() else contextlib.nullcontext():  # the lead holds it for all
        consistency.same_folder(path)
        run = Run(config, path)
        workdir.keep_config(path, run.config, run.run_ids.run_id)
        with signals.noted() as stop_signal:
            run.train(stop_signal)


class Updates:
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
        skipped = int(jax.device_get(optimizer.skipped(state.opt_state)))
        self.state, self.meter, self.compiles = state, Meter(spent, skipped=skipped), environment.CompileCounter()
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
            with self.meter.blocked():
                self.state, metrics = self._train_step(self.state, placed)
        self.drain()
        self._done += 1
        self._unread = metrics, self._done, {"slots": placed.target_BT.size, "flops": self._flops_of(placed)}

    def drain(self) -> None:
        """Reads the metrics that are still on the devices; a DivergedError if they are no numbers."""
        if self._unread:
            metrics, done, size = self._unread
            self._unread = None
            with self.meter.blocked():
                metrics = jax.device_get(metrics)
            self.meter.add(metrics, done, **size)


class Progress(NamedTuple):
    """How validation goes: the best merit so far, see `best_metric`, and how many in a row were no better."""

    best: float = -math.inf
    stale: int = 0

    def after(self, merit: float) -> "Progress":
        """After one more validation."""
        return Progress(merit, 0) if merit > self.best else Progress(self.best, self.stale + 1)

    def metrics(self) -> Metrics:
        """As it is saved with a checkpoint, in JSON, which has no infinity."""
        return {"stale": float(self.stale), **({"best": self.best} if math.isfinite(self.best) else {})}

    @classmethod
    def of(cls, metrics: Metrics) -> "Progress":
        """As it was saved with a checkpoint."""
        return cls(metrics.get("best", -math.inf), int(metrics["stale"]))


class Run:
    """One sitting of a run: everything it needs, opened once."""

    def __init__(self, config: Config, path: epath.Path):
        self.config, self.path = config, path
        self.mesh = mesh.connect(mesh.make_mesh(config.mesh))
        fused.require(config, self.mesh)
        self.checkpoints = Checkpoints(path)
        newest, before, self.run_ids = _resume_point(self.checkpoints, path)
        # Until there is a checkpoint, nothing is lost with another config.
        old = config
        if newest is not None:
            old = self.checkpoints.config(newest)
            old = best_metric.settled(old, best_metric.of(old))
            self.config = config = best_metric.settled(config, best_metric.of(old))
        changes = workdir.config_changes(path, old, config)
        self.searches_anew = score_kind(old) != score_kind(config)
        origin = None
        if newest is not None:
            initialization.check_moved(old, config, self.run_ids.base_run_id, self.checkpoints.tokenizer(newest))
        elif origin := initialization.find(config):
            self.run_ids = self.run_ids._replace(base_run_id=origin.run_id)
        with multihost.lead_first("data"):
            corpus = corpora.open_corpus(config.data)
            self.pairs, self.valid = corpus.split("train"), corpus.split("validation")
            self.data = {"training": self.pairs.digest, "validation": self.valid.digest}
            self._check_data(newest)
            self.config = config = self._with_best_metric()
            self.tokenizer = self._tokenizer(corpus, newest)
            self.ids = input_pipeline.token_ids(config.data, corpus, "train", self.tokenizer)
        consistency.same_data(corpus.digest, self.tokenizer.digest)
        self.plan = input_pipeline.make_batch_schedule(config, self.ids)
        model = registry.Model(config.model, self.tokenizer.vocab_size)
        self.evaluator = Evaluator(model, self.tokenizer, config, self.mesh)
        self.train_step = step.make_train_step(model, config, self.mesh)
        self.checkpoints.prepare(newest)
        self.start, self.progress, self.spent, self.is_scored = newest or 0, Progress(), flops.Spent(), SCORE in before
        if newest is None:
            self.state = initialization.first_state(origin, model, config, self.mesh)
        else:
            self.state = self.checkpoints.restore(newest, step.abstract_state(model, config, self.mesh))
            self.progress, self.spent = Progress.of(before), flops.Spent.of(before) or self.spent
            if self.searches_anew:
                self.progress = Progress()  # a score of another search is another figure
        self.slowest = Slowest()
        self._describe(model)
        if changes:
            say(f"changed since the last sitting: {'; '.join(changes)}")

    def train(self, stop_signal: Callable[[], int | None]) -> None:
        """Does the updates that are left."""
        train, self.stop_signal = self.config.train, stop_signal
        # The last sitting may have been stopped before it could validate.
        owes = self._is_due(self.start, train.eval_every_steps) and not self.is_scored
        if not owes and self._is_over(self.start):
            return
        dumped = workdir.dumped(self.path, self.plan, self.pairs)
        with dumped, open_log(self.path, self.start, train.num_steps) as log:
            if owes:
                self._evaluate(self.state.eval_params, self.start, log)
                if self._is_over(self.start):
                    return
            batches = input_pipeline.train_iterator(
                self.plan,
                self.ids,
                start=self.start,
                num_steps=train.num_steps,
                rows=functools.partial(sharding.rows_here, self.mesh, parts=train.accumulation_steps),
            )
            place = functools.partial(sharding.place_batch, self.mesh, parts=train.accumulation_steps)
            flops_of = functools.partial(flops.batch_flops, self.config.model, self.tokenizer.vocab_size)
            vote = StopVote(self.mesh, stop_signal)
            updates = Updates(self.train_step, self.state, batches, place, flops_of, self.spent)
            for done in range(self.start + 1, train.num_steps + 1):
                updates.dispatch()
                log.advance(done)
                with updates.meter.blocked():
                    stopped = vote()
                self._after_update(updates, done, log, stopped)
                if self._is_over(done):
                    return

    def _after_update(self, updates: Updates, done: int, log: RunLog | NoLog, stopped: int | None) -> None:
        """Logs, saves and evaluates, each when it is due, and stops when it is told to."""
        train = self.config.train
        logs, evaluates = self._is_due(done, train.log_every_steps), self._is_due(done, train.eval_every_steps)
        saves = evaluates or stopped or self._is_due(done, train.checkpoint_every_steps)
        if logs or saves:
            updates.drain()
            self.spent = updates.meter.spent()
        if logs:
            machine = {"train/compiles": updates.compiles.count, "train/peak_memory_mb": peak_memory_mb()}
            each = of_each_host(self.mesh, {**updates.meter.health(), "memory_mb": machine["train/peak_memory_mb"]})
            log.write(done, {**updates.meter.summary(), **self.spent.metrics(), **machine, **each})
            if slowest := self.slowest.look(each):
                log.say(slowest)
            updates.meter.reset()
        if saves:
            with updates.meter.paused():
                self._save(updates.state, done)
                log.keep()
                if evaluates and not stopped:
                    self._evaluate(updates.state.eval_params, done, log)
                self.checkpoints.prune(train.keep_last, train.keep_best)
        if stopped:
            raise signals.stopped_by(stopped, done)

    def _is_over(self, done: int) -> bool:
        """Whether nothing is left to do; says why, unless the bar does."""
        train, stale = self.config.train, self.progress.stale
        if train.early_stopping_patience and stale >= train.early_stopping_patience:
            best = best_metric.shown(train.best_metric, self.progress.best)
            what = f"{best_metric.TITLES[train.best_metric]} than {best}"
            say(f"step {done:,}: {stale:,} validations without a better {what}, so the run ends here")
            return True
        if done == self.start >= train.num_steps:
            ends = validation.ends_with_its_steps(self.config)
            advice = "longer runs of its schedule need another workdir" if ends else "raise train.num_steps to go on"
            say(f"{self.path}: trained for {done:,} steps; {advice}")
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
        say(str(tokenizer))
        if self.config.train.best_metric != "auto":
            return self.config
        metric, line = bleu_tokenizer.decide(references, tokenizer.name)
        if line:
            say(line)
        return best_metric.settled(self.config, metric)

    def _describe(self, model: registry.Model) -> None:
        plan, data = self.plan, self.config.data
        say(
            f"{model.num_params():,} params · {self.tokenizer.vocab_size:,} pieces · {plan.kept:,} pairs, dropped "
            f"{plan.dropped:,} longer than data.max_length = {data.max_length} · {plan.steps_per_epoch:,} steps an "
            f"epoch, fill {plan.token_utilization:.2f} · {self.mesh.size} x {self.mesh.devices.flat[0].device_kind}"
        )
        shapes = " ".join(f"{b.rows}x({b.source}, {b.target})" for b in plan.buckets)
        say(f"batch shapes, rows x (source, target): {shapes}")
        if waste := sharding.waste(self.mesh, plan, self.config.train.accumulation_steps):
            say(f"warning: {waste}")
        if self.mesh.size < jax.device_count():
            say(f"warning: config.mesh uses {self.mesh.size} of {jax.device_count()} devices; mesh.data=-1 takes all")
        if self.start:
            say(f"resuming after step {self.start:,}")
            others = environment.differences(self.checkpoints.manifest(self.start).host, environment.of_host())
            if others:
                say(f"warning: another host than before, so the last bits may differ: {'; '.join(others)}")

    def _save(self, state: TrainState, done: int) -> None:
        """Saves a checkpoint, if its params are numbers: the loss just read was that of the params before them."""
        if not step.all_finite(state.params):
            raise DivergedError(f"the run diverged: update {done} made params that are no numbers; {WHAT_HELPS}", done)
        metrics = {**self.progress.metrics(), **self.spent.metrics()}
        self.checkpoints.save(state, self.config, self.tokenizer, self.data, metrics, **self.run_ids._asdict())

    def _evaluate(self, params: registry.Params, done: int, log: RunLog | NoLog) -> None:
        """Scores the validation split, and records the scores with the checkpoint of this step.

        It may take longer than the time a stop signal leaves; what it leaves undone the next sitting makes up for.
        """

        def leave(_: int) -> None:
            stopped = self.stop_signal()
            if stopped and multihost.count() == 1:  # one of several would leave the others waiting
                raise signals.stopped_by(stopped, done)

        sources, references = self.valid.sources(), [self.valid.targets()]
        report = self.evaluator.evaluate(params, sources, references, metrics=("bleu", "chrf"), progress=leave)
        if not math.isfinite(report.loss):
            self.checkpoints.remove(done)
            raise DivergedError(
                f"the run diverged: after update {done} the validation loss is {report.loss}; {WHAT_HELPS}"
            )
        bleu, chrf = float(report.scores["bleu"]), float(report.scores["chrf"])
        scores = {"valid/loss": report.loss, SCORE: bleu, "valid/chrf": chrf}
        metric = self.config.train.best_metric
        self.progress = self.progress.after(best_metric.merit(metric, scores) or 0.0)
        if done > self.start or not self.searches_anew:  # else it would pass for the score of that checkpoint's search
            self.checkpoints.record(done, {**scores, **self.progress.metrics()})
        log.write(done, {**scores, "valid/seconds": report.seconds, **self.spent.metrics()})
        shown = {"loss": f"validation loss {report.loss:.3f}", "bleu": f"BLEU {bleu:.2f}", "chrf": f"chrF2 {chrf:.2f}"}
        shown[metric] += f", best {best_metric.shown(metric, self.progress.best)}"
        log.say(f"step {done:,} · {' · '.join(shown.values())} · {report.seconds:.0f} s · after {self.spent}")


class RunIds(NamedTuple):
    """The ids of a run and of the one that `train.init_from` names, as checkpoints keep them."""

    run_id: str
    base_run_id: str


def _resume_point(checkpoints: Checkpoints, path: epath.Path) -> tuple[int | None, Metrics, RunIds]:
    """The newest sound checkpoint, if there is any, its metrics and its run, as the lead finds them for all hosts."""

    def find() -> str:
        newest = checkpoints.newest_sound()
        if newest is None:
            return json.dumps([None, {}, RunIds(workdir.run_id(path, "", None), "")])
        manifest = checkpoints.manifest(newest)
        own = workdir.run_id(path, f"{checkpoints.folder}: checkpoint {newest}", manifest.run_id)
        return json.dumps([newest, manifest.metrics, RunIds(own, manifest.base_run_id)])

    newest, metrics, ids = json.loads(multihost.from_lead("newest checkpoint", find))
    return newest, metrics, RunIds(*ids)
