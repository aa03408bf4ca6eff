"""The training loop: dispatches updates, logs, evaluates, saves, and stops on a signal or a non-finite loss.

The devices run update n while the host reads the metrics of update n - 1. They wait for the host where metrics
are logged, a checkpoint saved or the validation split scored.
"""

import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax

from transformer.checkpoints import best_metric
from transformer.checkpoints.manager import VALID_BLEU, Metrics
from transformer.checkpoints.state import TrainState
from transformer.config import schema, validation
from transformer.data import input_pipeline
from transformer.data.batching import Batch
from transformer.distributed import multihost, platform, sharding
from transformer.evaluation.evaluator import EvalResult
from transformer.evaluation.metrics import METRICS
from transformer.models import flops, registry
from transformer.runtime import progress, signals
from transformer.runtime.errors import DivergedError
from transformer.runtime.logging import log_info
from transformer.training import optimizer, workdir
from transformer.training.host_metrics import StragglerDetector, gather_host_metrics, summarize_hosts
from transformer.training.metric_writer import MetricWriter, open_metric_writer
from transformer.training.metrics import DIVERGENCE_HINT, MetricsAccumulator, peak_memory_mb
from transformer.training.preemption import PreemptionSync
from transformer.training.preparation import RunContext
from transformer.training.profiling import StepProfiler
from transformer.training.train_step import StepMetrics, all_finite, batch_shape, compile_shapes


def train(context: RunContext, state: TrainState) -> tuple[int, Metrics]:
    """Does the updates that are left; the arrays of `state` are donated to the first.

    Returns:
      The last step, and the newest value of each metric.

    Raises:
      DivergedError: a loss, a gradient or a param is not finite.
      StoppedError: by SIGTERM, SIGINT or SIGHUP, after saving.
    """
    workdir.save_config(context.workdir, context.config, context.resume.run_ids.run_id)
    with signals.catch_stop_signals() as stop_signal:
        loop = TrainingLoop(context, stop_signal)
        loop.run(state)
    return loop.step, loop.metrics


class StepPipeline:
    """Dispatches updates, and reads the metrics of each while the next one runs.

    Args:
      train_step: of `train_step.make_train_step`; compiled for each shape of batches.

    Attributes:
      state: after the last update dispatched.
      programs: the step compiled for each shape of batches so far.
    """

    def __init__(
        self,
        train_step: Any,
        state: TrainState,
        batches: Iterator[Batch],
        shard: Callable[[Batch], Batch],
        flops_of: Callable[[Batch], float],
        cost: flops.TrainingCost,
        num_shapes: int,
    ):
        num_skipped = int(jax.device_get(optimizer.num_skipped(state.opt_state)))
        self.state, self.meter = state, MetricsAccumulator(cost, skipped=num_skipped)
        self._train_step, self._batches, self._shard, self._flops_of = train_step, batches, shard, flops_of
        self._num_shapes, self.programs = num_shapes, dict[tuple[int, ...], Any]()
        self._unread: tuple[StepMetrics, int, dict[str, Any]] | None = None

    def compile_ahead(self, batches: Sequence[Batch], threads: int) -> None:
        """Compiles the step for batches of these shapes, several at once."""
        with self.meter.compilation():
            self.programs = compile_shapes(self._train_step, self.state, batches, threads)

    def dispatch(self, step: int) -> None:
        """Starts update `step`; nothing but the batch travels to the devices, and nothing back."""
        waiting_since = time.perf_counter()
        batch = next(self._batches)
        self.meter.input_wait += time.perf_counter() - waiting_since
        with jax.transfer_guard("disallow"):
            sharded = self._shard(batch)
            program = self.programs.get(batch_shape(sharded)) or self._compile(sharded)
            with self.meter.device_wait():
                self.state, metrics = program(self.state, sharded)
        self.flush()
        self._unread = metrics, step, {"token_positions": sharded.target_BT.size, "flops": self._flops_of(sharded)}

    def _compile(self, batch: Batch) -> Any:
        """The step for batches of a new shape; in a thread, as this one handles no signal while it compiles."""

        def compile_step() -> Any:
            with jax.transfer_guard("disallow"):  # which is of each thread
                return self._train_step.lower(self.state, batch).compile()

        self.flush()  # the update at work, whose time would be taken for that of compiling
        compiling = f"compiling shape {len(self.programs) + 1} of {self._num_shapes}"
        log_info(compiling)
        with self.meter.compilation(), progress.phase(compiling), ThreadPoolExecutor(1) as pool:
            program = self.programs[batch_shape(batch)] = pool.submit(compile_step).result()
        return program

    def flush(self) -> None:
        """Reads the metrics that are still on the devices; a DivergedError if they are not finite."""
        if self._unread:
            metrics, step, sizes = self._unread
            self._unread = None
            with self.meter.device_wait():
                metrics = jax.device_get(metrics)
            self.meter.add(metrics, step, **sizes)


class EarlyStopping(NamedTuple):
    """The best validation score so far (higher is better, see `best_metric`), and how many since were no better."""

    best: float = -math.inf
    stale: int = 0

    def update(self, score: float) -> "EarlyStopping":
        """Counts one more validation."""
        return EarlyStopping(score, 0) if score > self.best else EarlyStopping(self.best, self.stale + 1)

    def to_metrics(self) -> Metrics:
        """As saved with a checkpoint, in JSON, which has no infinity."""
        return {"stale": float(self.stale), **({"best": self.best} if math.isfinite(self.best) else {})}

    @classmethod
    def from_metrics(cls, metrics: Metrics) -> "EarlyStopping":
        """Reads what was saved with a checkpoint; a new one where nothing was."""
        return cls(metrics.get("best", -math.inf), int(metrics.get("stale", 0)))


class TrainingLoop:
    """The loop of one session, and what it counts from update to update.

    Args:
      stop_signal: the signal that this process has received, if any.

    Attributes:
      step: the last one done.
      metrics: the newest value of each, as in the log; those of the checkpoint that was resumed too.
    """

    def __init__(self, context: RunContext, stop_signal: Callable[[], int | None]):
        self.context, self._config, self._stop_signal = context, context.config, stop_signal
        saved = context.resume.metrics
        self.step, self.metrics = context.start, {name: value for name, value in saved.items() if "/" in name}
        # A score of another search or metric cannot be compared.
        self.early_stopping = EarlyStopping.from_metrics(saved if context.resume.scores_comparable else {})
        self._cost = flops.TrainingCost.from_metrics(saved) or flops.TrainingCost()
        self._stragglers = StragglerDetector()
        self._validation_seconds, self._clock_start = 0.0, time.perf_counter()

    def run(self, state: TrainState) -> None:
        """Trains until `train.num_steps` or early stopping."""
        context = self.context
        # The last session may have been stopped before it could validate.
        is_due = self._is_due(context.start, self._config.train.eval_every_steps)
        pending_eval = is_due and VALID_BLEU not in context.resume.metrics
        if pending_eval or not self._is_finished(context.start):
            self._run(state, pending_eval)
        self._log_why_finished(self.step)

    def _run(self, state: TrainState, pending_eval: bool) -> None:
        context, train = self.context, self._config.train
        dump = workdir.dump_batch_on_divergence(context.workdir, context.data.schedule, context.data.train)
        writer_opened = open_metric_writer(context.workdir, context.start, train.num_steps)
        with dump, writer_opened as writer, context.checkpoints:
            if pending_eval:
                self.evaluate(state.eval_params, context.start, writer)
                if self._is_finished(context.start):
                    return
            pipeline = self._start_pipeline(state)
            del state  # its buffers are donated to the first update
            preemption = PreemptionSync(context.mesh, self._stop_signal)
            with StepProfiler(context.workdir, schema.parse_steps(train.profile_steps)) as profiler:
                for step in range(context.start + 1, train.num_steps + 1):
                    profiler.start(step)
                    pipeline.dispatch(step)
                    if profiler.ends_with(step):
                        pipeline.flush()
                        with pipeline.meter.pause():
                            profiler.stop()
                    writer.advance(step)
                    with pipeline.meter.device_wait():
                        signal_number = preemption()
                    self.step = step
                    self._after_update(pipeline, step, writer, signal_number)
                    if self._is_finished(step):
                        return

    def _start_pipeline(self, state: TrainState) -> StepPipeline:
        context, data, train = self.context, self.context.data, self._config.train
        schedule = data.schedule
        sizes: dict[str, Any] = {"num_micro_batches": train.accumulation_steps}
        batches = input_pipeline.train_iterator(
            schedule,
            data.ids,
            start=context.start,
            num_steps=train.num_steps,
            rows=functools.partial(sharding.local_row_indices, context.mesh, **sizes),
        )
        shard = functools.partial(sharding.shard_batch, context.mesh, **sizes)
        flops_of = functools.partial(
            flops.batch_flops, self._config.model, data.tokenizer.vocab_size, passes=train.passes
        )
        buckets = [bucket for bucket, count in zip(schedule.buckets, schedule.num_batches, strict=True) if count]
        pipeline = StepPipeline(context.train_step, state, batches, shard, flops_of, self._cost, len(buckets))
        if (threads := platform.compile_threads(context.mesh)) > 1:
            log_info(f"compiling {len(buckets)} shapes of batches, up to {threads} at once")
            shapes = [sharding.abstract_batch(context.mesh, bucket, **sizes) for bucket in buckets]
            pipeline.compile_ahead(shapes, threads)
        return pipeline

    def _after_update(self, pipeline: StepPipeline, step: int, writer: MetricWriter, signal_number: int | None) -> None:
        """Logs, saves and evaluates, each when it is due, and stops on a signal."""
        train, checkpoints = self._config.train, self.context.checkpoints
        checkpoints.check()
        logs, evaluates = self._is_due(step, train.log_every_steps), self._is_due(step, train.eval_every_steps)
        saves = evaluates or signal_number or self._is_due(step, train.checkpoint_every_steps)
        is_first = step == self.context.start + 1
        if logs or saves or is_first:
            pipeline.flush()
            self._cost = pipeline.meter.cost()
        if logs:
            self._log(pipeline, step, writer)
        elif is_first:
            writer.log_step(step, f"loss {pipeline.meter.summary()['train/loss']:.3f}")
        if saves:
            with pipeline.meter.pause():
                writer.sync()  # first: a kill in between must not leave a checkpoint that is ahead of the log
                self._save(pipeline.state, step)
                if evaluates and not signal_number:
                    self.evaluate(pipeline.state.eval_params, step, writer)
                checkpoints.prune(train.keep_last, train.keep_best)
        if signal_number:
            checkpoints.wait()
            raise signals.preempted(signal_number, step)

    def _log(self, pipeline: StepPipeline, step: int, writer: MetricWriter) -> None:
        meter = pipeline.meter
        validation_share = self._validation_seconds / (time.perf_counter() - self._clock_start)
        machine = {
            "train/compiles": len(pipeline.programs),
            "train/peak_memory_mb": peak_memory_mb(),
            "train/validation_share": validation_share,
        }
        timing = {**meter.host_timing(), "memory_mb": machine["train/peak_memory_mb"]}
        hosts = gather_host_metrics(self.context.mesh, timing)
        self._write(writer, step, {**meter.summary(), **self._cost.metrics(), **machine, **summarize_hosts(hosts)})
        if warning := self._stragglers.update(hosts):
            log_info(warning)
        meter.reset()

    def _write(self, writer: MetricWriter, step: int, metrics: Metrics) -> None:
        self.metrics |= metrics
        writer.write(step, metrics)

    def _stops_early(self) -> bool:
        patience = self._config.train.early_stopping_patience
        return 0 < patience <= self.early_stopping.stale

    def _is_finished(self, step: int) -> bool:
        return self._stops_early() or step >= self._config.train.num_steps

    def _log_why_finished(self, step: int) -> None:
        """Logs why there is no further update, unless this session has done the last of `train.num_steps`."""
        train = self._config.train
        if self._stops_early():
            best = best_metric.format_score(train.best_metric, self.early_stopping.best)
            title = "validation loss" if train.best_metric == "loss" else METRICS[train.best_metric].label
            stale = self.early_stopping.stale
            log_info(f"step {step:,}: {stale:,} validations without a better {title} than {best}, so the run ends here")
        elif step == self.context.start:
            fixed = validation.schedule_depends_on_num_steps(self._config)
            advice = "its schedule ends here; start a longer run in a new workdir" if fixed else "raise train.num_steps"
            log_info(f"{self.context.workdir}: trained for {step:,} steps; {advice}")

    def _is_due(self, step: int, every: int) -> bool:
        return step > 0 and (step % every == 0 or step == self._config.train.num_steps)

    def _save(self, state: TrainState, step: int) -> None:
        """Starts saving, unless a param is non-finite: the last loss that was read precedes these params."""
        if not all_finite(state.params):
            raise DivergedError(f"the run diverged: update {step} made non-finite params; {DIVERGENCE_HINT}", step)
        data, run_ids = self.context.data, self.context.resume.run_ids
        metrics = {**self.early_stopping.to_metrics(), **self._cost.metrics()}
        self.context.checkpoints.save_async(
            state, self._config, data.tokenizer, data.digests, metrics, **run_ids._asdict()
        )

    def evaluate(self, params: registry.Params, step: int, writer: MetricWriter) -> None:
        """Scores the validation split of each direction, and records the scores with the checkpoint of this step.

        A stop signal interrupts it, as it may take longer than the time that is left; the next session repeats it.
        """
        context = self.context

        def stop_if_signalled(_: int) -> None:
            signal_number = self._stop_signal()
            if signal_number and multihost.process_count() == 1:  # one of several would leave the others waiting
                context.checkpoints.wait()
                raise signals.preempted(signal_number, step)

        count = self._config.eval.validation_sentences
        metrics = best_metric.validation_metrics(self._config)
        results, samples = {}, {}
        with progress.phase(f"validation at step {step:,}"):
            for direction, split in context.data.validation:
                sources, references = (fixed_sample(lines, count) for lines in (split.sources(), split.targets()))
                result = context.evaluator.evaluate(
                    params, sources, [references], metrics=metrics, progress=stop_if_signalled, direction=direction
                )
                results[direction.name] = result
                samples[direction.name] = sources, references, result.translations
        scores = validation_scores(results, metrics)
        loss, seconds = scores["valid/loss"], sum(result.seconds for result in results.values())
        if not math.isfinite(loss):
            context.checkpoints.wait()
            context.checkpoints.remove(step)
            raise DivergedError(
                f"the run diverged: after update {step} the validation loss is {loss}; {DIVERGENCE_HINT}"
            )
        score = best_metric.score(self._config.train.best_metric, scores) or 0.0
        self.early_stopping = self.early_stopping.update(score)
        # A checkpoint that was resumed may have been saved with another search.
        context.checkpoints.update_metrics(step, {**scores, **self.early_stopping.to_metrics()}, self._config)
        self._validation_seconds += seconds
        self._write(writer, step, {**scores, "valid/seconds": seconds, **self._cost.metrics()})
        self._log_scores(step, scores, seconds, metrics)
        if len(results) > 1:
            by_direction = " · ".join(f"{name} {result.scores['bleu']:.2f}" for name, result in results.items())
            log_info(f"  BLEU {by_direction}")
        for name, sample in samples.items():
            log_sample(*sample, name if len(samples) > 1 else "")

    def _log_scores(self, step: int, scores: Mapping[str, float], seconds: float, metrics: Sequence[str]) -> None:
        """Logs the validation loss and the scores that the config names, with the best so far."""
        best = self._config.train.best_metric
        shown = {"loss": f"validation loss {scores['valid/loss']:.3f}"}
        for name in metrics:
            if name == best or name in self._config.eval.metric_names:
                shown[name] = f"{METRICS[name].label} {scores[f'valid/{name}']:.2f}"
        shown[best] += f", best {best_metric.format_score(best, self.early_stopping.best)}"
        log_info(f"step {step:,} · {' · '.join(shown.values())} · {seconds:.0f} s · after {self._cost}")


def validation_scores(results: Mapping[str, EvalResult], metrics: Sequence[str]) -> dict[str, float]:
    """The scores of a validation by the keys of the log: of several directions the mean, and those of each."""

    def values(result: EvalResult) -> dict[str, float]:
        return {"loss": result.loss, **{name: float(result.scores[name]) for name in metrics}}

    by_direction = {direction: values(result) for direction, result in results.items()}
    scores = {
        f"valid/{name}": sum(each[name] for each in by_direction.values()) / len(by_direction)
        for name in ("loss", *metrics)
    }
    if len(by_direction) > 1:
        for direction, each in by_direction.items():
            scores |= {f"valid/{direction}/{name}": value for name, value in each.items()}
    return scores


def fixed_sample(lines: list[str], count: int) -> list[str]:
    """Lines evenly spread over all, the same for lists of the same length; all if `count` is 0 or they are fewer."""
    return [lines[i * len(lines) // count] for i in range(count)] if 0 < count < len(lines) else lines


def log_sample(
    sources: Sequence[str], references: Sequence[str], translations: Sequence[str], direction: str = ""
) -> None:
    """Logs one translation, of the same sentence at every validation: that in the middle of the split."""
    i, heading = len(sources) // 2, f"  {direction}\n" if direction else ""
    log_info(f"{heading}  source      {sources[i]}\n  reference   {references[i]}\n  translation {translations[i]}")
