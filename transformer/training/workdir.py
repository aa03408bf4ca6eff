"""The folder of a run: whose it is, and which config it was made with."""

import contextlib
import datetime
import fcntl
import json
import os
import uuid
from collections.abc import Iterator
from typing import IO, Any

from etils import epath

from transformer.config import schema
from transformer.config.schema import RUN_ID, Config
from transformer.config.validation import HARMLESS, ends_with_its_steps, unread
from transformer.data.batching import PAD_EXAMPLE, BatchSchedule
from transformer.data.corpus import Split
from transformer.distributed import multihost
from transformer.runtime import object_storage
from transformer.runtime.errors import DivergedError, UserError, WorkdirError
from transformer.runtime.files import user_error_on_oserror, write_atomic
from transformer.runtime.logging import log_error, log_info

CONFIG_FILE = "config.json"
LOCK_FILE = "lock"


def acquire_lock(workdir: epath.Path) -> IO[str] | object_storage.Lock:
    """Takes the workdir for this process until what it returns is closed or the process ends, however it ends.

    Raises:
      WorkdirError: another run has it.
      UserError: it is no folder or cannot be written.
    """
    if object_storage.is_remote(workdir):
        return _lock_object(workdir)
    with user_error_on_oserror(f"--workdir={workdir}"):
        workdir.mkdir(parents=True, exist_ok=True)
        file = (workdir / LOCK_FILE).open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        holder = (workdir / LOCK_FILE).read_text().strip() or "another process"
        raise WorkdirError(f"{workdir}: held by {holder}; wait for it, stop it, or choose another --workdir") from error
    except OSError as error:
        log_info(f"warning: {workdir} cannot be locked ({error}); see to it that no other run uses it")
    file.truncate(0)
    since = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    file.write(f"{multihost.process_description()} since {since}\n")
    file.flush()
    return file


def _lock_object(workdir: epath.Path) -> object_storage.Lock:
    def lost(holder: str) -> None:
        log_error(
            f"{workdir}: taken over by {holder}, as its lock had not been touched for "
            f"{object_storage.LOCK_TIMEOUT_S:.0f} s"
        )
        os._exit(WorkdirError.exit_code)

    try:
        with user_error_on_oserror(f"--workdir={workdir}"):
            return object_storage.Lock(workdir / LOCK_FILE, multihost.process_description(), lost)
    except object_storage.LockHeldError as held:
        raise WorkdirError(f"{workdir}: held by {held}; wait for it, stop it, or choose another --workdir") from held


def check_resume_config(workdir: epath.Path, old: Config, config: Config) -> list[str]:
    """How a config differs, harmlessly, from the one that the workdir's run was made with.

    Args:
      old: of the checkpoint that the run goes on from, whose digest was right.

    Returns:
      The differences, as 'section.field: old → new'.

    Raises:
      UserError: others than harmless ones; every field of them is named.
    """
    changes = schema.differences(old, config)
    never_read = unread(old).keys() & unread(config).keys()
    serious = [
        change
        for change in changes
        if not _harmless(change, config) and f"{change.section}.{change.field}" not in never_read
    ]
    if serious:
        raise UserError(
            f"{workdir}: holds a run with another config: {'; '.join(map(str, serious))}. Resume it with its own "
            "config, or choose another --workdir"
        )
    return [str(change) for change in changes]


def run_id(workdir: epath.Path, checkpoint: str, id_of_checkpoint: str | None) -> str:
    """The id of the run in a workdir: that of its checkpoint and config.json, or a new one for a run that begins.

    Args:
      checkpoint: that the run goes on from, for messages.
      id_of_checkpoint: None where there is none; empty where an earlier version saved it.

    Raises:
      UserError: the checkpoint is of another run than config.json.
    """
    kept = _saved_run_id(workdir) if id_of_checkpoint is not None else ""
    if kept and id_of_checkpoint and kept != id_of_checkpoint:
        raise UserError(
            f"{checkpoint} is of another run (id {id_of_checkpoint[:8]}) than {workdir / CONFIG_FILE} ({kept[:8]}). "
            "Move it elsewhere to go on with this run; to start from it, name its workdir as train.init_from in a new "
            "--workdir"
        )
    return id_of_checkpoint or kept or uuid.uuid4().hex


def _saved_run_id(workdir: epath.Path) -> str:
    """What `keep_config` wrote; empty where there is nothing, as of an earlier version."""
    try:
        return str(json.loads((workdir / CONFIG_FILE).read_text())[RUN_ID])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


@multihost.primary_only
def save_config(workdir: epath.Path, config: Config, run_id: str = "") -> None:
    """Makes a config the workdir's own, and the id of its run."""
    path, text = workdir / CONFIG_FILE, config.to_json(**({RUN_ID: run_id} if run_id else {}))
    with user_error_on_oserror(f"--workdir={workdir}"):
        if not path.exists() or path.read_bytes() != text.encode():
            write_atomic(path, text)


def _harmless(change: schema.Change, config: Config) -> bool:
    if (change.section, change.field) == ("train", "num_steps"):
        return not ends_with_its_steps(config)
    if (change.section, change.field) == ("data", "tokenizer"):
        return not {change.old, change.new} & set(schema.TRAINED_TOKENIZERS)
    if (change.section, change.field) == ("train", "init_from"):
        return bool(change.old and change.new)  # whether it is the same run is seen by its id
    return change.field in HARMLESS.get(change.section, ())


DIVERGED_FILE = "diverged.json"


@contextlib.contextmanager
def dump_batch_on_divergence(workdir: epath.Path, plan: BatchSchedule, split: Split) -> Iterator[None]:
    """Writes the batch of the update that a DivergedError names to WORKDIR/diverged.json, and passes the error on."""
    try:
        yield
    except DivergedError as error:
        if error.step is None:
            raise
        path = workdir / DIVERGED_FILE
        _write_dump(path, _describe_batch(plan, split, error))
        raise DivergedError(f"{error}. The sentence pairs of its batch are in {path}", error.step) from error


@multihost.primary_only
def _write_dump(path: epath.Path, values: dict[str, Any]) -> None:
    with user_error_on_oserror(f"{path}"):
        write_atomic(path, json.dumps(values, ensure_ascii=False, indent=1) + "\n")


def _describe_batch(plan: BatchSchedule, split: Split, error: DivergedError) -> dict[str, Any]:
    """The update, why, and the number in the training split and the text of each sentence pair of its batch."""
    examples = plan.batch((error.step or 1) - 1).examples_B
    numbers = examples[examples != PAD_EXAMPLE].tolist()
    pairs = [{"number": number, "source": split[number][0], "target": split[number][1]} for number in numbers]
    return {"update": error.step, "why": str(error), "pairs": pairs}
