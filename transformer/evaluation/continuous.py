"""Continuous evaluation: scores each new checkpoint while training runs (`eval.py --watch`).

Results go to WORKDIR/evaluations.jsonl, one object a line: the keys of eval.py, the `name` of the data set, its digest
as `set`, and the digest of the checkpoint as `fingerprint`. Training never writes that file, and this module writes no
file of training. Checkpoints in the file are not scored again, so watching can be stopped and resumed at any time.
"""

import json
import time
from collections.abc import Callable
from typing import Any

from etils import epath

from transformer.checkpoints.loading import RestoredModel, load_checkpoint
from transformer.checkpoints.manager import CheckpointManager, CorruptCheckpointError
from transformer.config import Config, mixture
from transformer.evaluation import results, summary
from transformer.evaluation.datasets import EvalDataset
from transformer.evaluation.evaluator import CheckpointEvaluator
from transformer.runtime import files, signals
from transformer.runtime.errors import DivergedError, UserError, WorkdirError
from transformer.runtime.files import json_digest, user_error_on_oserror
from transformer.runtime.logging import log_info

EVALUATIONS_FILE = "evaluations.jsonl"
POLL_INTERVAL_S = 5.0

Entry = dict[str, Any]


def read_evaluations(workdir: epath.PathLike) -> list[Entry]:
    """The results so far, in the order of the file."""
    return [entry for entry in files.read_json_lines(epath.Path(workdir) / EVALUATIONS_FILE) if "name" in entry]


def is_of(entry: Entry, dataset: EvalDataset) -> bool:
    """Whether a result is of this data set: two files of one name may hold different sentences."""
    return (entry["name"], entry.get("set")) == (dataset.name, dataset.digest)


def checkpoint_digest(checkpoints: CheckpointManager, step: int) -> str:
    """A digest of a checkpoint's content, which differs if the run is restarted in the same folder.

    Raises:
      CorruptCheckpointError: its manifest is unreadable or missing.
    """
    digests = checkpoints.manifest(step).files
    return json_digest(digests)[:16]


class CheckpointWatcher:
    """Scores the checkpoints of a workdir on one data set.

    Args:
      workdir: of the run.
      load_dataset: loads the data set once there is a config.
      on_result: called with each result.
      languages: of source and target, which choose one of several directions; None for any.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        load_dataset: Callable[[Config], EvalDataset],
        on_result: Callable[[Entry], None] = lambda entry: None,
        languages: tuple[str | None, str | None] = (None, None),
    ):
        self._workdir, self._checkpoints = epath.Path(workdir), CheckpointManager(workdir)
        self._load_dataset, self._on_result, self._languages = load_dataset, on_result, languages
        self._evaluator: CheckpointEvaluator | None = None
        self._failed: set[str] = set()  # digests of damaged and diverged checkpoints
        self.num_scored = 0

    def run_forever(self, seconds: float = POLL_INTERVAL_S) -> None:
        """Polls for new checkpoints until a signal arrives.

        Raises:
          StoppedError: by SIGTERM, SIGINT or SIGHUP. The checkpoint in progress is scored again next time.
        """

        def stop(number: int, _: object) -> None:  # at any time: all files are written atomically
            raise signals.stopped(number, f"{self.num_scored:,} checkpoints scored")

        with signals.handling(stop):
            if not self._checkpoints.steps():
                log_info(f"{self._checkpoints.folder}: waiting for the first checkpoint")
            while True:
                if not self.poll():
                    time.sleep(seconds)

    def poll(self) -> bool:
        """Tries to score the oldest new checkpoint, which will be deleted first; returns whether there was one."""
        for step in self._checkpoints.steps():
            try:
                digest = checkpoint_digest(self._checkpoints, step)
            except (CorruptCheckpointError, OSError):  # deleted just now, or damaged, which training and eval.py report
                continue
            if digest in self._failed or (self._evaluator and digest in self._scored(self._evaluator.dataset)):
                continue
            restored = self._restore(step, digest)
            if restored is None:
                return True
            self._evaluator = self._evaluator or CheckpointEvaluator(self._load_dataset(restored.config))
            if digest not in self._scored(self._evaluator.dataset):
                self._score(self._evaluator, restored, digest)
                return True
        return False

    def _scored(self, dataset: EvalDataset) -> set[str]:
        """The digests of the checkpoints that are scored on this data set."""
        return {str(entry.get("fingerprint")) for entry in read_evaluations(self._workdir) if is_of(entry, dataset)}

    def _restore(self, step: int, digest: str) -> RestoredModel | None:
        """Restores a checkpoint; logs and returns None if it is damaged or was deleted meanwhile."""
        try:
            return load_checkpoint(self._workdir, str(step))
        except WorkdirError as error:  # damaged
            log_info(str(error))
            self._failed.add(digest)
        except UserError:
            if step in self._checkpoints.steps():
                raise
            log_info(f"checkpoint {step} was deleted while it was read; skipped")
        return None

    def _score(self, evaluator: CheckpointEvaluator, restored: RestoredModel, digest: str) -> None:
        dataset = evaluator.dataset
        restored = restored.with_direction(mixture.find_direction(restored.config.data, *self._languages))
        try:
            result = evaluator.evaluate(restored)
        except DivergedError as error:
            log_info(str(error))
            self._failed.add(digest)
            return
        name = results.result_name(self._workdir, restored, dataset)
        results.write_translations(result.translations, results.translations_path(self._workdir, name))
        entry = {
            **summary.as_json(restored, result),
            "name": dataset.name,
            "set": dataset.digest,
            "fingerprint": digest,
        }
        append_evaluation(self._workdir, entry)
        self.num_scored += 1
        self._on_result(entry)


def append_evaluation(workdir: epath.PathLike, entry: Entry) -> None:
    """Appends a line; first ends the last one if an interrupted write left it incomplete."""
    path = epath.Path(workdir) / EVALUATIONS_FILE
    with user_error_on_oserror(f"{path}"):
        content = path.read_bytes() if path.exists() else b""
        is_incomplete = content and not content.endswith(b"\n")
        files.append(path, (b"\n" if is_incomplete else b"") + json.dumps(entry, allow_nan=False).encode() + b"\n")
