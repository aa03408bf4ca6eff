"""What all hosts of a run must have in common, and what becomes of it if they do not: a message on each of them.

A difference would not show by itself: every host would train on, each on rows of another batch.
"""

import os
import time
import uuid
from collections.abc import Sequence

from etils import epath

from transformer.config import Config, schema, validation
from transformer.distributed import multihost
from transformer.runtime.environment import code_digest, versions
from transformer.runtime.errors import UserError
from transformer.runtime.files import write_whole

PATIENCE = 15.0  # seconds until what one host wrote must be seen by all: a network file system may take some
SIGN = "hosts"  # the file by which hosts see that they share a workdir


def same(what: str, mine: str, remedy: str) -> None:
    """Raises a UserError on every host unless all give the same text."""
    found = multihost.gather(what, mine)
    others = {i: text for i, text in enumerate(found) if text != found[0]}
    if others:
        first = min(others)
        raise UserError(
            f"{what} differs between hosts: {found[0]} on {multihost.name(0)}, {others[first]} on "
            f"{multihost.name(first)}"
            f"{f' and {len(others) - 1} more' if others.keys() - {first} else ''}; {remedy}"
        )


def same_code() -> None:
    """Raises a UserError on every host unless all run the same program and versions of what it computes with."""
    if multihost.count() > 1:
        same("the code", f"version {code_version()}", "install the same commit and requirements.txt on every host")


def code_version() -> str:
    """The digest of the code, and the versions of what it computes with."""
    return f"{code_digest()} with {', '.join(f'{name} {version}' for name, version in versions().items())}"


def same_config(config: Config) -> None:
    """Raises a UserError on every host unless all have the same config; data may lie elsewhere on each."""
    texts = multihost.gather("config", config.to_json())
    lead = validation.from_json(texts[0], "the config of host 0")
    for host, text in enumerate(texts):
        other = validation.from_json(text, f"the config of host {host}")
        changes = [c for c in schema.differences(lead, other) if c.section != "data" or c.field not in schema.PATHS]
        if changes:
            raise UserError(
                f"the config differs between hosts, {multihost.name(0)} → {multihost.name(host)}: "
                f"{'; '.join(map(str, changes))}; give the same --config flags to every host"
            )


def same_data(data: str, tokenizer: str) -> None:
    """Raises a UserError on every host unless all read the same data and vocabulary, by their digests."""
    same(
        "the data",
        f"digest {data[:16]}, vocabulary {tokenizer[:16]}",
        "copy the same files to every host, or set data.dir and data.data_dir to a folder that all share",
    )


def same_folder(workdir: epath.Path) -> None:
    """Raises a UserError on every host unless all see the workdir of the lead."""
    if multihost.count() == 1:
        return
    mark = multihost.from_lead("mark of the workdir", lambda: _sign(workdir))
    blind = [i for i, found in enumerate(multihost.gather("workdir", str(_sees(workdir, mark)))) if found != str(True)]
    if blind:
        raise UserError(
            f"--workdir={workdir}: {_several(blind)} cannot see what {multihost.name(0)} writes there; it must be a "
            "folder that all hosts share, or object storage such as gs://BUCKET/RUN"
        )


def _several(numbers: Sequence[int]) -> str:
    return multihost.name(numbers[0]) + (f" and {len(numbers) - 1} more" if len(numbers) > 1 else "")


def _sign(workdir: epath.Path) -> str:
    mark = uuid.uuid4().hex
    write_whole(workdir / SIGN, f"{mark}\n{multihost.who()}\n")
    return mark


def _sees(workdir: epath.Path, mark: str) -> bool:
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            if (workdir / SIGN).read_text().startswith(mark):
                return True
            os.listdir(workdir) if "://" not in os.fspath(workdir) else None  # has NFS look again
        except OSError:
            pass
        if time.monotonic() > deadline:
            return False
        time.sleep(0.5)
