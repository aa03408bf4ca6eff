"""Checks that all processes run the same code, config and data; on a difference each reports it.

Without the checks every process would train on, with rows of different batches.
"""

import contextlib
import os
import time
import uuid

from etils import epath

from transformer.config import Config, mixture, schema, validation
from transformer.distributed import multihost
from transformer.runtime import environment, object_storage
from transformer.runtime.environment import code_digest, versions
from transformer.runtime.errors import UserError
from transformer.runtime.files import write_atomic
from transformer.runtime.logging import log_info

# Seconds in which all processes must see a file that one wrote: network file systems take some.
VISIBILITY_TIMEOUT_S = 15.0
CACHE_VISIBILITY_TIMEOUT_S = 5.0  # of a cache, which a run can do without
MARKER_FILE = "hosts"  # the file by which processes check that they share a workdir


def assert_equal(what: str, text: str, remedy: str) -> None:
    """Raises a UserError on every process unless all have the same text."""
    texts = multihost.allgather(what, text)
    others = {i: other for i, other in enumerate(texts) if other != texts[0]}
    if others:
        first = min(others)
        raise UserError(
            f"{what} differs between hosts: {texts[0]} on {multihost.process_name(0)}, {others[first]} on "
            f"{multihost.process_name(first)}"
            f"{f' and {len(others) - 1} more' if others.keys() - {first} else ''}; {remedy}"
        )


def assert_same_code() -> None:
    """Raises a UserError on every process unless all run the same code and versions of packages."""
    if multihost.process_count() > 1:
        assert_equal(
            "the code", f"version {code_version()}", "install the same commit and requirements.txt on every host"
        )


def code_version() -> str:
    """The digest of the code and the versions of its packages."""
    return f"{code_digest()} with {', '.join(f'{name} {version}' for name, version in versions().items())}"


def assert_same_config(config: Config) -> None:
    """Raises a UserError on every process unless all have the same config; paths of the data may differ."""
    texts = multihost.allgather("config", config.to_json())
    primary = validation.from_json(texts[0], "the config of host 0")
    for host, text in enumerate(texts):
        other = validation.from_json(text, f"the config of host {host}")
        changes = [change for change in schema.diff(primary, other) if not mixture.moves_data_only(change)]
        if changes:
            raise UserError(
                f"the config differs between hosts, {multihost.process_name(0)} → {multihost.process_name(host)}: "
                f"{'; '.join(map(str, changes))}; give the same config to every host"
            )


def assert_same_data(data: str, tokenizer: str) -> None:
    """Raises a UserError on every process unless all read the same data and vocabulary, by their digests."""
    assert_equal(
        "the data",
        f"digest {data[:16]}, vocabulary {tokenizer[:16]}",
        "copy the same files to every host, or put the text and data.data_dir into folders that all share",
    )


def assert_shared_workdir(workdir: epath.Path) -> None:
    """Raises a UserError on every process unless all see the workdir of the primary."""
    if multihost.process_count() == 1:
        return
    marker = multihost.broadcast_from_primary("marker of the workdir", lambda: _write_marker(workdir))
    answers = multihost.allgather("workdir", str(_can_see(workdir / MARKER_FILE, marker, VISIBILITY_TIMEOUT_S)))
    missing = [multihost.process_name(i) for i, answer in enumerate(answers) if answer != str(True)]
    if missing:
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(
            f"{workdir}: {missing[0]}{others} cannot see what {multihost.process_name(0)} writes there; "
            "it must be a folder that all hosts share, or object storage such as gs://BUCKET/RUN"
        )


def _write_marker(workdir: epath.Path) -> str:
    marker = uuid.uuid4().hex
    write_atomic(workdir / MARKER_FILE, f"{marker}\n{multihost.process_description()}\n")
    return marker


def enable_compilation_cache() -> None:
    """Keeps compiled programs between runs; of several processes only where all see the folder of the primary.

    The primary alone writes programs. Where it finds one and others do not, it would not compile, and on GPUs the
    others would wait for its share of the tuning that processes divide.
    """
    folder = epath.Path(environment.enable_compilation_cache())
    if multihost.process_count() == 1:
        return
    import jax

    marker = multihost.broadcast_from_primary("marker of the compilation cache", lambda: uuid.uuid4().hex)
    path = folder / f"{MARKER_FILE}-{marker}"
    with contextlib.suppress(Exception):  # whatever the storage raises
        if multihost.is_primary():
            folder.mkdir(parents=True, exist_ok=True)
            write_atomic(path, marker)
    answers = multihost.allgather("compilation cache", str(_can_see(path, marker, CACHE_VISIBILITY_TIMEOUT_S)))
    with contextlib.suppress(Exception):
        if multihost.is_primary():
            path.unlink()
    if answers != [str(True)] * len(answers):
        jax.config.update("jax_enable_compilation_cache", False)
        log_info(
            f"warning: not all hosts see {folder}, so programs are compiled at every start; set "
            "JAX_COMPILATION_CACHE_DIR to a folder that all share"
        )


def _can_see(path: epath.Path, marker: str, seconds: float) -> bool:
    """Whether a file begins with the marker, perhaps after a while."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            if path.read_text().startswith(marker):
                return True
            if not object_storage.is_remote(path):
                os.listdir(path.parent)  # makes NFS look again
        except Exception:  # whatever the storage raises
            pass
        if time.monotonic() > deadline:
            return False
        time.sleep(0.5)
