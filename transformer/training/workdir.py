"""The folder of a run: its lock, config and id, and the batch at which a run diverged."""

import contextlib
import datetime
import fcntl
import json
import os
import uuid
from collections.abc import Iterator
from typing import IO, Any

from etils import epath

from transformer.config import mixture, schema
from transformer.config.schema import RUN_ID, Config
from transformer.config.validation import RESUMABLE_FIELDS, inapplicable_fields, schedule_depends_on_num_steps
from transformer.data.batching import PAD_EXAMPLE, BatchSchedule
from transformer.data.corpus import Split
from transformer.data.mixture_corpus import MixtureSplit
from transformer.distributed import multihost
from transformer.runtime import object_storage
from transformer.runtime.errors import DivergedError, UserError, WorkdirError
from transformer.runtime.files import CONFIG_FILE, user_error_on_oserror, write_atomic
from transformer.runtime.logging import log_error, log_info

LOCK_FILE = "lock"
DIVERGED_FILE = "diverged.json"


def acquire_lock(workdir: epath.Path) -> IO[str] | object_storage.Lock:
    """Locks the workdir until the returned lock is closed or the process ends.

    Raises:
      WorkdirError: another run holds it.
      UserError: it is not a folder, or cannot be written.
    """
    if object_storage.is_remote(workdir):
        return _lock_object(workdir)
    with user_error_on_oserror(f"{workdir}"):
        workdir.mkdir(parents=True, exist_ok=True)
        file = (workdir / LOCK_FILE).open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        holder = (workdir / LOCK_FILE).read_text().strip() or "another process"
        raise WorkdirError(f"{workdir}: held by {holder}; wait for it, stop it, or choose another workdir") from error
    except OSError as error:
        log_info(f"warning: {workdir} cannot be locked ({error}); make sure that no other run uses it")
    file.truncate(0)
    since = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    file.write(f"{multihost.process_description()} since {since}\n")
    file.flush()
    return file


def _lock_object(workdir: epath.Path) -> object_storage.Lock:
    def on_lost(holder: str) -> None:
        log_error(
            f"{workdir}: taken over by {holder}, as its lock had not been touched for "
            f"{object_storage.LOCK_TIMEOUT_S:.0f} s"
        )
        os._exit(WorkdirError.exit_code)

    try:
        with user_error_on_oserror(f"{workdir}"):
            return object_storage.Lock(workdir / LOCK_FILE, multihost.process_description(), on_lost)
    except object_storage.LockHeldError as held:
        raise WorkdirError(f"{workdir}: held by {held}; wait for it, stop it, or choose another workdir") from held


def check_resume_config(workdir: epath.Path, old: Config, config: Config) -> list[str]:
    """Checks that a run may be resumed with a config, and returns the changed fields as 'section.field: old → new'.

    Args:
      old: config of the checkpoint to resume.

    Raises:
      UserError: a field has changed that future updates depend on; the message names all of them.
    """
    changes = schema.diff(old, config)
    unused = inapplicable_fields(old).keys() & inapplicable_fields(config).keys()
    conflicts = [
        change
        for change in changes
        if not _may_change(change, config) and f"{change.section}.{change.field}" not in unused
    ]
    if conflicts:
        raise UserError(
            f"{workdir}: holds a run with another config: {'; '.join(map(str, conflicts))}."
            f"{_reason(conflicts, config)} With the workdir alone, train.py resumes it with its own config; for "
            f"another run choose a new workdir, with train.init_from={workdir} to start from its params"
        )
    return [str(change) for change in changes]


def _reason(conflicts: list[schema.FieldDiff], config: Config) -> str:
    if ("train", "num_steps") not in {(change.section, change.field) for change in conflicts}:
        return ""
    return f" The {config.optimizer.schedule} schedule ends at train.num_steps, so another number is another run."


def run_id(workdir: epath.Path, checkpoint: str, id_of_checkpoint: str | None) -> str:
    """The id of the run in a workdir: that of its checkpoint and config.json, or a new one for a new run.

    Args:
      checkpoint: the one to resume, for messages.
      id_of_checkpoint: None without a checkpoint; empty if an earlier version saved it.

    Raises:
      UserError: the checkpoint is of another run than config.json.
    """
    saved = _saved_run_id(workdir) if id_of_checkpoint is not None else ""
    if saved and id_of_checkpoint and saved != id_of_checkpoint:
        raise UserError(
            f"{checkpoint} is of another run (id {id_of_checkpoint[:8]}) than {workdir / CONFIG_FILE} ({saved[:8]}). "
            "Move it elsewhere to continue this run; to start from it, name its workdir as train.init_from in a new "
            "workdir"
        )
    return id_of_checkpoint or saved or uuid.uuid4().hex


def _saved_run_id(workdir: epath.Path) -> str:
    """The id that `save_config` wrote; empty without one, as earlier versions left it."""
    try:
        return str(json.loads((workdir / CONFIG_FILE).read_text())[RUN_ID])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


@multihost.primary_only
def save_config(workdir: epath.Path, config: Config, run_id: str = "") -> None:
    """Writes the config, and the id of the run, to the workdir."""
    path, text = workdir / CONFIG_FILE, config.to_json(**({RUN_ID: run_id} if run_id else {}))
    with user_error_on_oserror(f"{workdir}"):
        if not path.exists() or path.read_bytes() != text.encode():
            write_atomic(path, text)


def _may_change(change: schema.FieldDiff, config: Config) -> bool:
    if (change.section, change.field) == ("train", "num_steps"):
        return not schedule_depends_on_num_steps(config)
    if (change.section, change.field) == ("data", "tokenizer"):
        return not {change.old, change.new} & set(schema.TOKENIZER_ALGORITHMS)
    if mixture.moves_data_only(change):
        return True
    if (change.section, change.field) == ("train", "init_from"):
        return bool(change.old and change.new)  # `initialization.check_base_unchanged` compares the runs
    return change.field in RESUMABLE_FIELDS.get(change.section, ())


@contextlib.contextmanager
def dump_batch_on_divergence(
    workdir: epath.Path, schedule: BatchSchedule, split: Split | MixtureSplit
) -> Iterator[None]:
    """Writes the batch of the update that a DivergedError names to WORKDIR/diverged.json, and passes the error on."""
    try:
        yield
    except DivergedError as error:
        if error.step is None:
            raise
        path = workdir / DIVERGED_FILE
        if multihost.is_primary():
            text = json.dumps(_describe_batch(schedule, split, error), ensure_ascii=False, indent=1)
            with user_error_on_oserror(f"{path}"):
                write_atomic(path, text + "\n")
        raise DivergedError(f"{error}. The sentence pairs of its batch are in {path}", error.step) from error


def _describe_batch(schedule: BatchSchedule, split: Split | MixtureSplit, error: DivergedError) -> dict[str, Any]:
    """The update, the reason, and number and text of each sentence pair of its batch."""
    examples = schedule.batch((error.step or 1) - 1).examples_B
    numbers = examples[examples != PAD_EXAMPLE].tolist()
    pairs = [{"number": number, "source": split[number][0], "target": split[number][1]} for number in numbers]
    return {"update": error.step, "why": str(error), "pairs": pairs}
