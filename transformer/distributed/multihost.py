"""The processes of one run, called hosts: joining them, exchanging short texts, and ending together.

JAX's own coordination service, which host 0 runs, carries it all. A process that is alone, and everything in
it, goes on as if this room were not there: no service is started, no port opened. Host 0 is the lead: it alone
writes logs, scores and what else a run has one of.
"""

import argparse
import contextlib
import functools
import os
import socket
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec

from transformer.distributed import launchers
from transformer.distributed.heartbeat import Heartbeat, report_on_sigabrt
from transformer.runtime import logging
from transformer.runtime.errors import StoppedError, UserError

LONG_MS = 7 * 24 * 3600 * 1000  # waiting has no end of its own: a host that falls silent ends it
JAX_SLACK = 60  # seconds that JAX waits longer than we do, so that the message is ours
P = ParamSpec("P")


class _SingleProcess:
    """What there is of hosts in a process that is alone."""

    index, count = 0, 1

    def allgather(self, name: str, text: str) -> list[str]:
        return [text]


class _ProcessGroup:
    """This process among several."""

    def __init__(self, client: Any, index: int, count: int, timeout: float, lost_exit_code: int):
        self.index, self.count, self._client = index, count, client
        self._rounds: dict[str, int] = {}
        self.names = [f"host {i} ({name})" for i, name in enumerate(self.allgather("names", process_description()))]
        self.heartbeat = Heartbeat(client, index, self.names, timeout, lost_exit_code)

    def allgather(self, name: str, text: str) -> list[str]:
        number = self._rounds[name] = self._rounds.get(name, 0) + 1
        folder = f"{name}/{number}"
        self._client.key_value_set(f"{folder}/{self.index}", text)
        self._client.wait_at_barrier(folder.replace("/", "."), LONG_MS)
        found = dict(self._client.key_value_dir_get(f"{folder}/"))
        return [found[f"{folder}/{i}"] for i in range(self.count)]


_group: _SingleProcess | _ProcessGroup = _SingleProcess()


def is_multiprocess(args: argparse.Namespace) -> bool:
    """Whether flags or surroundings name other processes; asks neither JAX nor a network.

    Raises:
      UserError: flags that do not go together.
    """
    flags = {name: getattr(args, name) for name in ("coordinator", "num_processes", "process_id")}
    given = {name for name, value in flags.items() if value is not None}
    if given and given != flags.keys():
        missing = ", ".join(f"--{name}" for name in sorted(flags.keys() - given))
        raise UserError(f"--coordinator, --num_processes and --process_id go together: got no {missing}")
    if given:
        if not 0 <= args.process_id < args.num_processes:
            raise UserError(
                f"--process_id={args.process_id}: expected 0 to {args.num_processes - 1} for "
                f"--num_processes={args.num_processes}"
            )
        if not args.coordinator.rpartition(":")[2].isdecimal() or args.coordinator.startswith(":"):
            raise UserError(f"--coordinator={args.coordinator}: expected HOST:PORT of process 0")
        return args.num_processes > 1
    return launchers.detect_cluster(os.environ) is not None


@contextlib.contextmanager
def initialize(args: argparse.Namespace) -> Iterator[None]:
    """Joins the other processes, if there are any, for the length of the block; every host leaves it together.

    An error in one host ends them all, each with a message. The process then ends inside this block, as
    Python's own way out waits for the others.
    """
    global _group
    if not is_multiprocess(args):
        yield
        return
    _group = group = _join(args)
    gone = f"{group.names[0]}, which all others depend on, has gone away"
    with report_on_sigabrt(gone, args.lost_host_exit_code):
        group.heartbeat.start()
        stopped = None
        try:
            try:
                yield
            except StoppedError as error:  # on which all have agreed
                stopped = error
            _leave(group)
        except BaseException as error:
            group.heartbeat.abort(error)
    if stopped:
        raise stopped


def _join(args: argparse.Namespace) -> _ProcessGroup:
    import jax
    from jax._src import distributed  # its client has no public name; Orbax takes it from here too

    # JAX would take SIGTERM for itself; training has its own way to stop together.
    jax.config.update("jax_enable_preemption_service", False)
    gpus = launchers.local_gpus(os.environ, launchers.count_gpus())
    where = args.coordinator or f"the address that {launchers.detect_cluster(os.environ)} gives"
    what = f"not all processes joined at {where} within {args.host_timeout} s (--host_timeout); see which did not start"
    with report_on_sigabrt(what, args.lost_host_exit_code):
        jax.distributed.initialize(
            args.coordinator,
            args.num_processes,
            args.process_id,
            local_device_ids=gpus.ids,
            # With the flags there is nothing to detect, and what JAX finds would be another's: a Slurm step, a pod.
            cluster_detection_method="deactivate" if args.coordinator else None,
            initialization_timeout=args.host_timeout,
            heartbeat_timeout_seconds=args.host_timeout + JAX_SLACK,
            shutdown_timeout_seconds=args.host_timeout,
        )
        state = distributed.global_state
        logging.set_process(state.process_id, state.num_processes)
        if gpus.idle:
            logging.log_info(
                f"warning: {gpus.idle} of this machine's GPUs stay idle; start as many processes on it as divide their "
                "number, or one, which takes them all"
            )
        count, timeout = state.num_processes, args.host_timeout
        return _ProcessGroup(state.client, state.process_id, count, timeout, args.lost_host_exit_code)


def _leave(group: _ProcessGroup) -> None:
    """Once all have come here, there is nothing to wait for any more."""
    import jax

    group.allgather("done", "")
    group.heartbeat.stop()
    jax.distributed.shutdown()


def process_description() -> str:
    """This process, for people."""
    return f"process {os.getpid()} on {socket.gethostname()}"


def process_count() -> int:
    """How many hosts there are."""
    return _group.count


def process_name(host: int) -> str:
    """A host, for people."""
    return _group.names[host] if isinstance(_group, _ProcessGroup) else process_description()


def is_primary() -> bool:
    """Whether this host writes what a run has one of."""
    return _group.index == 0


def primary_only(function: Callable[P, None]) -> Callable[P, None]:
    """The function, which other hosts than the lead leave out."""

    @functools.wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> None:
        if is_primary():
            function(*args, **kwargs)

    return called


def allgather(what: str, text: str) -> list[str]:
    """What each host gives, in their order. All must call it, with the same sequence of names."""
    return _group.allgather(what, text)


def barrier(what: str) -> None:
    """Until all hosts are here."""
    allgather(what, "")


def broadcast_from_primary(what: str, make: Callable[[], str]) -> str:
    """What the lead makes; the others wait for it."""
    return allgather(what, make() if is_primary() else "")[0]


@contextlib.contextmanager
def primary_first(what: str) -> Iterator[None]:
    """The lead does the block while the others wait, to find done what can be shared."""
    if not is_primary():
        barrier(what)
    yield
    if is_primary():
        barrier(what)
