"""Multi-host runs: the processes join, exchange short texts, and end together.

Messages call a process a host. All goes through JAX's coordination service, which process 0 runs; a single process
starts no service and opens no port. Process 0 is the primary: it alone writes logs, scores and other single files.
"""

import argparse
import contextlib
import functools
import json
import os
import socket
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, ParamSpec

from transformer.distributed import launchers
from transformer.distributed.heartbeat import Heartbeat, report_on_sigabrt
from transformer.runtime import logging
from transformer.runtime.errors import StoppedError, UserError

LONG_MS = 7 * 24 * 3600 * 1000  # no timeout of its own: the heartbeat ends a wait for a silent process
JAX_SLACK = 60  # seconds that JAX waits longer, so that the user reads our message
P = ParamSpec("P")


class _SingleProcess:
    """A process that is alone."""

    index, count = 0, 1

    def allgather(self, name: str, text: str) -> list[str]:
        return [text]


class _ProcessGroup:
    """This process as one of several."""

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
        texts = dict(self._client.key_value_dir_get(f"{folder}/"))
        return [texts[f"{folder}/{i}"] for i in range(self.count)]


_group: _SingleProcess | _ProcessGroup = _SingleProcess()


def is_multiprocess(args: argparse.Namespace) -> bool:
    """Whether flags or environment variables name other processes; asks neither JAX nor the network.

    Raises:
      UserError: invalid flags, or only some of them.
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
    """Joins the other processes, if there are any, for the block, which all leave together.

    An error in one process ends them all, each with a message. The process then ends inside this block, because
    Python's normal exit would wait for the others.
    """
    global _group
    if not is_multiprocess(args):
        yield
        return
    import jax

    _group = group = _join(args)
    gone = "another host" if group.index == 0 else f"{group.names[0]}, which all others depend on,"
    aborted = f"{gone} has gone away, or XLA failed here, as the lines above say"
    with report_on_sigabrt(aborted, args.lost_host_exit_code):
        group.heartbeat.start()
        stopped = None
        try:
            try:
                yield
            except StoppedError as error:  # by a signal that all processes know of
                stopped = error
            group.allgather("done", "")
            group.heartbeat.stop()
            jax.distributed.shutdown()
        except BaseException as error:
            group.heartbeat.abort(error)
    if stopped:
        raise stopped


def _join(args: argparse.Namespace) -> _ProcessGroup:
    import jax

    # Private: the client of the coordination service has no public name; Orbax imports it from here too.
    from jax._src import distributed

    # JAX would handle SIGTERM itself; see `training.preemption`.
    jax.config.update("jax_enable_preemption_service", False)
    gpus = launchers.local_gpus(os.environ, launchers.count_gpus())
    address = args.coordinator or f"the address that {launchers.detect_cluster(os.environ)} gives"
    timed_out = (
        f"not all processes joined at {address} within {args.host_timeout} s (--host_timeout); see which did not start"
    )
    with report_on_sigabrt(timed_out, args.lost_host_exit_code):
        jax.distributed.initialize(
            args.coordinator,
            args.num_processes,
            args.process_id,
            local_device_ids=gpus.ids,
            # With the flags nothing is detected: what JAX finds may belong to another program, such as a Slurm step.
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
        numbers = state.process_id, state.num_processes, args.host_timeout, args.lost_host_exit_code
        return _ProcessGroup(state.client, *numbers)


def process_index() -> int:
    """The number of this process, from 0."""
    return _group.index


def stop_all(error: StoppedError) -> NoReturn:
    """Ends all processes as this one ends, by a signal that the others do not know of.

    Raises:
      StoppedError: the error, in a process that is alone.
    """
    if isinstance(_group, _ProcessGroup):
        _group.heartbeat.abort(error)
    raise error


def process_description() -> str:
    """Process id and machine of this process, for messages."""
    return f"process {os.getpid()} on {socket.gethostname()}"


def process_count() -> int:
    """The number of processes."""
    return _group.count


def process_name(index: int) -> str:
    """The name of a process, for messages."""
    return _group.names[index] if isinstance(_group, _ProcessGroup) else process_description()


def is_primary() -> bool:
    """Whether this process writes the files of the run."""
    return _group.index == 0


def primary_only(function: Callable[P, None]) -> Callable[P, None]:
    """Decorates a function that only the primary process runs; on others it returns at once."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> None:
        if is_primary():
            function(*args, **kwargs)

    return wrapper


def allgather(name: str, text: str) -> list[str]:
    """The texts of all processes, by index. All must call it, in the same order of names."""
    return _group.allgather(name, text)


def barrier(name: str) -> None:
    """Waits until all processes are here."""
    allgather(name, "")


def broadcast_from_primary(name: str, make: Callable[[], Any]) -> Any:
    """What the primary process makes, passed as JSON: tuples become lists; the others wait for it."""
    return json.loads(allgather(name, json.dumps(make()) if is_primary() else "")[0])


@contextlib.contextmanager
def primary_first(name: str) -> Iterator[None]:
    """Runs the block in the primary process, then in the others, which find its files."""
    if not is_primary():
        barrier(name)
    yield
    if is_primary():
        barrier(name)
