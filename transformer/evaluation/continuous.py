"""Scores each checkpoint as it lands, beside training: `eval.py --watch`.

Results go to WORKDIR/evaluations.jsonl, one object a line: the keys of eval.py, the `name` of the set, a digest of
it as `set`, and the `fingerprint` of the checkpoint. Training never writes that file, and no file of training's is
written here. What is in it is not scored again, so watching can be stopped and taken up at any time.
"""

import contextlib
import hashlib
import json
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

from etils import epath

from transformer.checkpoints.loading import RestoredModel, load_checkpoint
from transformer.checkpoints.manager import CheckpointManager, CorruptCheckpointError
from transformer.config import Config
from transformer.evaluation import summary
from transformer.evaluation.evaluator import EvaluationSet, Scorer, translations_path, write_translations
from transformer.runtime import files, signals
from transformer.runtime.errors import DivergedError, StoppedError, UserError, WorkdirError
from transformer.runtime.files import user_error_on_oserror
from transformer.runtime.logging import log_info

EVALUATIONS_FILE = "evaluations.jsonl"
SECONDS = 5.0  # between two looks

Entry = dict[str, Any]


def read_evaluations(workdir: epath.PathLike) -> list[Entry]:
    """What is scored so far, in the order of the file; what is no such line is left out."""
    found = []
    with contextlib.suppress(FileNotFoundError):
        for line in (epath.Path(workdir) / EVALUATIONS_FILE).read_bytes().split(b"\n"):
            with contextlib.suppress(ValueError, KeyError, TypeError):
                entry = json.loads(line)
                found.append({**entry, "step": int(entry["step"]), "name": str(entry["name"])})
    return found


def fingerprint(checkpoints: CheckpointManager, step: int) -> str:
    """Of a checkpoint's content, so that a run begun anew in the same folder is not taken for the old one.

    Raises:
      Damaged: its manifest cannot be read, or it is gone.
    """
    written = checkpoints.manifest(step).files
    return hashlib.sha256(json.dumps(written, sort_keys=True).encode()).hexdigest()[:16]


class Watch:
    """Scores the checkpoints of one workdir on one set.

    Args:
      open_set: the set, once there is a config.
      found: called with each result.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        open_set: Callable[[Config], EvaluationSet],
        found: Callable[[Entry], None] = lambda entry: None,
    ):
        self._workdir, self._checkpoints = epath.Path(workdir), CheckpointManager(workdir)
        self._open_set, self._found = open_set, found
        self._scorer: Scorer | None = None
        self._hopeless: set[str] = set()
        self.scored = 0

    def until_stopped(self, seconds: float = SECONDS) -> None:
        """Looks for new checkpoints again and again.

        Raises:
          StoppedError: by SIGTERM, SIGINT or SIGHUP. A checkpoint under way is scored anew next time.
        """
        with _stop_signals(lambda: f"{self.scored:,} checkpoints scored; run again to go on"):
            if not self._checkpoints.steps():
                log_info(f"{self._checkpoints.folder}: waiting for the first checkpoint")
            while True:
                if not self.look():
                    time.sleep(seconds)

    def look(self) -> bool:
        """Scores the oldest checkpoint that is not scored yet, as the next to be deleted; False: there is none."""
        for step in self._checkpoints.steps():
            try:
                mark = fingerprint(self._checkpoints, step)
            except (CorruptCheckpointError, OSError):  # deleted just now, or damaged, which training and eval.py report
                continue
            if mark in self._hopeless or (self._scorer and mark in self._done(self._scorer.chosen)):
                continue
            trained = self._read(step, mark)
            if trained is None:
                return True
            self._scorer = self._scorer or Scorer(self._open_set(trained.config))
            if mark not in self._done(self._scorer.chosen):
                self._score(self._scorer, trained, mark)
                return True
        return False

    def _done(self, chosen: EvaluationSet) -> set[str]:
        """The checkpoints that are scored on this very set."""
        of = chosen.name, chosen.digest
        entries = read_evaluations(self._workdir)
        return {str(entry.get("fingerprint")) for entry in entries if (entry["name"], entry.get("set")) == of}

    def _read(self, step: int, mark: str) -> RestoredModel | None:
        """The checkpoint, or None, said on stderr, if it is damaged or deleted meanwhile."""
        try:
            return load_checkpoint(self._workdir, str(step))
        except WorkdirError as error:  # damaged
            log_info(str(error))
            self._hopeless.add(mark)
        except UserError:
            if step in self._checkpoints.steps():
                raise
            log_info(f"checkpoint {step} was deleted while it was read; left out")
        return None

    def _score(self, scorer: Scorer, trained: RestoredModel, mark: str) -> None:
        try:
            evaluation = scorer.evaluate(trained)
        except DivergedError as error:  # its loss is no number
            log_info(str(error))
            self._hopeless.add(mark)
            return
        write_translations(evaluation, translations_path(self._workdir, evaluation.trained, scorer.chosen))
        entry = {
            **summary.as_json(evaluation),
            "name": scorer.chosen.name,
            "set": scorer.chosen.digest,
            "fingerprint": mark,
        }
        append(self._workdir, entry)
        self.scored += 1
        self._found(entry)


def append(workdir: epath.PathLike, entry: Entry) -> None:
    """Adds one line; on a new line, where a kill cut the last one short."""
    path = epath.Path(workdir) / EVALUATIONS_FILE
    with user_error_on_oserror(f"{path}"):
        before = path.read_bytes() if path.exists() else b""
        cut_short = before and not before.endswith(b"\n")
        files.append(path, (b"\n" if cut_short else b"") + json.dumps(entry, allow_nan=False).encode() + b"\n")


@contextlib.contextmanager
def _stop_signals(after: Callable[[], str]) -> Iterator[None]:
    """A stop signal ends the block at once with a StoppedError; nothing is written by halves."""

    def stop(number: int, _: object) -> None:
        raise StoppedError(number, f"stopped by {signal.Signals(number).name}; {after()}")

    before = {number: signal.signal(number, stop) for number in signals.handled_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
