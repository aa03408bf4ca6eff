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
from transformer.runtime.files import write_atomic

VISIBILITY_TIMEOUT_S = (
    15.0  # seconds until what one host wrote must be seen by all: a network file system may take some
)
MARKER_FILE = "hosts"  # the file by which hosts see that they share a workdir


def assert_equal(what: str, mine: str, remedy: str) -> None:
    """Raises a UserError on every host unless all give the same text."""
    found = multihost.allgather(what, mine)
    others = {i: text for i, text in enumerate(found) if text != found[0]}
    if others:
        first = min(others)
        raise UserError(
            f"{what} differs between hosts: {found[0]} on {multihost.process_name(0)}, {others[first]} on "
            f"{multihost.process_name(first)}"
            f"{f' and {len(others) - 1} more' if others.keys() - {first} else ''}; {remedy}"
        )


def assert_same_code() -> None:
    """Raises a UserError on every host unless all run the same program and versions of what it computes with."""
    if multihost.process_count() > 1:
        assert_equal(
            "the code", f"version {code_version()}", "install the same commit and requirements.txt on every host"
        )


def code_version() -> str:
    """The digest of the code, and the versions of what it computes with."""
    return f"{code_digest()} with {', '.join(f'{name} {version}' for name, version in versions().items())}"


def assert_same_config(config: Config) -> None:
    """Raises a UserError on every host unless all have the same config; data may lie elsewhere on each."""
    texts = multihost.allgather("config", config.to_json())
    lead = validation.from_json(texts[0], "the config of host 0")
    for host, text in enumerate(texts):
        other = validation.from_json(text, f"the config of host {host}")
        changes = [c for c in schema.diff(lead, other) if c.section != "data" or c.field not in schema.PATH_FIELDS]
        if changes:
            raise UserError(
                f"the config differs between hosts, {multihost.process_name(0)} → {multihost.process_name(host)}: "
                f"{'; '.join(map(str, changes))}; give the same --config flags to every host"
            )


def assert_same_data(data: str, tokenizer: str) -> None:
    """Raises a UserError on every host unless all read the same data and vocabulary, by their digests."""
    assert_equal(
        "the data",
        f"digest {data[:16]}, vocabulary {tokenizer[:16]}",
        "copy the same files to every host, or set data.dir and data.data_dir to a folder that all share",
    )


def assert_shared_workdir(workdir: epath.Path) -> None:
    """Raises a UserError on every host unless all see the workdir of the lead."""
    if multihost.process_count() == 1:
        return
    mark = multihost.broadcast_from_primary("mark of the workdir", lambda: _write_marker(workdir))
    blind = [
        i for i, found in enumerate(multihost.allgather("workdir", str(_can_see(workdir, mark)))) if found != str(True)
    ]
    if blind:
        raise UserError(
            f"--workdir={workdir}: {_several(blind)} cannot see what {multihost.process_name(0)} writes there; "
            "it must be a folder that all hosts share, or object storage such as gs://BUCKET/RUN"
        )


def _several(numbers: Sequence[int]) -> str:
    return multihost.process_name(numbers[0]) + (f" and {len(numbers) - 1} more" if len(numbers) > 1 else "")


def _write_marker(workdir: epath.Path) -> str:
    mark = uuid.uuid4().hex
    write_atomic(workdir / MARKER_FILE, f"{mark}\n{multihost.process_description()}\n")
    return mark


def _can_see(workdir: epath.Path, mark: str) -> bool:
    deadline = time.monotonic() + VISIBILITY_TIMEOUT_S
    while True:
        try:
            if (workdir / MARKER_FILE).read_text().startswith(mark):
                return True
            os.listdir(workdir) if "://" not in os.fspath(workdir) else None  # has NFS look again
        except OSError:
            pass
        if time.monotonic() > deadline:
            return False
        time.sleep(0.5)
