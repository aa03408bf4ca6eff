"""The folder of a run: whose it is, and which config it was made with."""

import fcntl
import os
import socket
from typing import IO

from etils import epath

from transformer import config as configs
from transformer.config import Config
from transformer.errors import UserError, WorkdirError

CONFIG_FILE = "config.json"
LOCK_FILE = "lock"

# What may change between two sittings of one run, as it changes no update that is still to come.
HARMLESS = (
    "train.num_steps",
    "train.log_every_steps",
    "train.eval_every_steps",
    "train.checkpoint_every_steps",
    "train.keep_last",
    "train.keep_best",
    "data.data_dir",
    "decode.",
    "mesh.",
)


def lock(workdir: epath.Path) -> IO[str]:
    """Takes the workdir for this process until the returned file is closed or the process ends, however it ends.

    Raises:
      WorkdirError: another run has it.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    file = (workdir / LOCK_FILE).open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        holder = (workdir / LOCK_FILE).read_text().strip() or "another process"
        raise WorkdirError(f"{workdir}: held by {holder}; wait for it, stop it, or choose another --workdir") from error
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


def adopt_config(workdir: epath.Path, config: Config) -> list[str]:
    """Makes `config` the workdir's own, if it may be.

    Returns:
      The harmless differences from the config that it had, as 'field: old → new'.

    Raises:
      UserError: it belongs to a run with another config; every field that differs is named.
    """
    path = workdir / CONFIG_FILE
    changes: list[str] = []
    if path.exists():
        old = configs.from_json(path.read_text(), str(path))
        changes = configs.differences(old, config)
        serious = [change for change in changes if not _harmless(change, config)]
        if serious:
            raise UserError(
                f"{workdir}: holds a run with another config: {'; '.join(serious)}. Resume it with its own config, or "
                "choose another --workdir"
            )
        if not changes:
            return []
    partial = workdir / (CONFIG_FILE + ".partial")
    partial.write_text(config.to_json())
    partial.replace(path)
    return changes


def _harmless(change: str, config: Config) -> bool:
    if change.startswith("train.num_steps") and config.optimizer.schedule in ("cosine", "linear"):
        return False  # these schedules end at num_steps
    return change.startswith(HARMLESS)
