"""What the host does: fetch, dispatch, log, evaluate, save, resume, and stop when the loss is no number.

The device runs update n while the host reads the metrics of update n - 1; nothing else makes it wait.
"""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import jax
from etils import epath

from transformer import compilation, pipeline, sharding, step, workdir
from transformer.batching import Batch
from transformer.checkpoint import SCORE, Checkpoints, Metrics
from transformer.command_line import say
from transformer.config import Config
from transformer.datasets import corpus as corpora
from transformer.errors import StoppedError
from transformer.evaluate import Evaluator
from transformer.run_log import Meter, RunLog
from transformer.step import StepMetrics, TrainState


def fit(config: Config, folder: epath.PathLike) -> None:
    """Trains in a workdir until `train.num_steps` updates are done, or resumes what was begun there.

    Raises:
      UserError: of its kinds, see `errors`.
      StoppedError: by SIGTERM or SIGINT, after saving.
    """
    path = epath.Path(folder)
    compilation.enable_cache()
    with ExitStack() as stack:
        stack.enter_context(workdir.lock(path))
        changes = workdir.adopt_config(path, config)
        if changes:
            say(f"{path}: goes on with changes: {'; '.join(changes)}")
        stop_signal = stack.enter_context(_stop_signals())
        Run(config, path).train(stop_signal)


class Updates:
    """Dispatches updates, and reads the metrics of each while the next one runs."""

    def __init__(
        self,
        train_step: Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]],
        state: TrainState,
        batches: Iterator[Batch],
        place: Callable[[Batch], Batch],
    ):
        self.state, self.meter, self.compiles = state, Meter(), compilation.CompileCounter()
        self._train_step, self._batches, self._place = train_step, batches, place
        self._done = int(jax.device_get(state.step))
        self._unread: tuple[StepMetrics, int, int] | None = None

    def dispatch(self) -> None:
        """Starts one update; nothing but the batch travels to the devices, and nothing back."""
        waiting_since = time.perf_counter()
        batch = next(self._batches)
        self.meter.waited += time.perf_counter() - waiting_since
        with jax.transfer_guard("disallow"), self.compiles:
            self.state, metrics = self._train_step(self.state, self._place(batch))
        self.drain()
        self._done += 1
        self._unread = metrics, self._done, batch.target_BT.size

    def drain(self) -> None:
        """Reads the metrics that are still on the devices; a DivergedError if they are no numbers."""
        if self._unread:
            metrics, done, slots = self._unread
            self._unread = None
            self.meter.add(jax.device_get(metrics), done, slots)


class Run:
    """One sitting of a run: everything it needs, opened once."""

    def __init__(self, config: Config, path: epath.Path):
        self.config, self.path = config, path
        self.checkpoints = Checkpoints(path)
        newest = self.checkpoints.newest_sound()
        corpus = corpora.open_corpus(config.data)
        self.tokenizer = pipeline.get_tokenizer(config.data, corpus, path / "tokenizer", newest is None)
        self.ids = pipeline.token_ids(config.data, corpus, "train", self.tokenizer)
        self.plan = pipeline.make_plan(config, self.ids)
        self.valid = corpus.split("validation")
        self.mesh = sharding.make_mesh(config.mesh)
        model = step.Model(config.model, self.tokenizer.vocab_size)
        self.evaluator = Evaluator(model, self.tokenizer, config, self.mesh)
        self.train_step = step.make_train_step(model, config, self.mesh)
        self.start, self.best = newest or 0, 0.0
        if newest is None:
            self.state = step.init_state(model, config, self.mesh)
        else:
            self.state = self.checkpoints.restore(newest, model, config, self.mesh)
            self.best = self.checkpoints.metrics(newest).get("best", 0.0)
        self._describe(model)

    def train(self, stop_signal: Callable[[], int | None]) -> None:
        """Does the updates that are left."""
        train = self.config.train
        if self.start >= train.num_steps:
            say(f"{self.path}: already trained for {self.start:,} steps; raise train.num_steps to go on")
            return
        batches = pipeline.train_iterator(self.plan, self.ids, start=self.start, num_steps=train.num_steps)
        updates = Updates(self.train_step, self.state, batches, lambda batch: sharding.place_batch(self.mesh, batch))
        with RunLog(self.path, self.start, train.num_steps) as log:
            for done in range(self.start + 1, train.num_steps + 1):
                updates.dispatch()
                log.advance(done)
                last, stopped = done == train.num_steps, stop_signal()
                if done % train.log_every_steps == 0 or last:
                    updates.drain()
                    log.write(done, {**updates.meter.summary(), "train/compiles": updates.compiles.count})
                    updates.meter.reset()
                evaluates = done % train.eval_every_steps == 0 or last
                if evaluates or done % train.checkpoint_every_steps == 0 or stopped:
                    updates.drain()
                    with updates.meter.paused():
                        self._keep(updates.state, done, log, evaluates and not stopped)
                if stopped:
                    raise StoppedError(stopped, f"stopped by signal {stopped}; saved step {done:,}; run again to go on")

    def _keep(self, state: TrainState, done: int, log: RunLog, evaluates: bool) -> None:
        """Saves a checkpoint, with its score where it is time for one."""
        scores = self._evaluate(state, done, log) if evaluates else {}
        self.best = max(scores.get(SCORE, 0.0), self.best)
        self.checkpoints.save(state, self.config, self.tokenizer, {**scores, "best": self.best})
        self.checkpoints.prune(self.config.train.keep_last, self.config.train.keep_best)

    def _describe(self, model: step.Model) -> None:
        plan, data = self.plan, self.config.data
        say(
            f"{model.num_params():,} params · {self.tokenizer.vocab_size:,} pieces · {plan.kept:,} pairs, dropped "
            f"{plan.dropped:,} longer than data.max_length = {data.max_length} · {plan.steps_per_epoch:,} steps an "
            f"epoch, fill {plan.fill:.2f} · {self.mesh.size} x {self.mesh.devices.flat[0].device_kind}"
        )
        shapes = " ".join(f"{b.rows}x({b.source}, {b.target})" for b in plan.buckets)
        say(f"batch shapes, rows x (source, target): {shapes}")
        if self.start:
            say(f"resuming from step {self.start:,}")

    def _evaluate(self, state: TrainState, done: int, log: RunLog) -> Metrics:
        """Loss and scores of the validation split."""
        sources, references = self.valid.sources(), [self.valid.targets()]
        report = self.evaluator.evaluate(state.params, sources, references, metrics=("bleu", "chrf"))
        bleu, chrf = float(report.scores["bleu"]), float(report.scores["chrf"])
        scores = {"valid/loss": report.loss, SCORE: bleu, "valid/chrf": chrf}
        log.write(done, {**scores, "valid/seconds": report.seconds})
        log.say(f"step {done:,} · validation loss {report.loss:.3f} · BLEU {bleu:.2f} · {report.seconds:.0f} s")
        return scores


@contextmanager
def _stop_signals() -> Iterator[Callable[[], int | None]]:
    """Notes SIGTERM and SIGINT for the loop to see between updates; a second one ends the process at once."""
    seen: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return

    def note(number: int, _: object) -> None:
        seen.append(number)
        signal.signal(number, signal.SIG_DFL)
        say(f"signal {number}: stopping after this update; send it again to stop at once")

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: seen[0] if seen else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
