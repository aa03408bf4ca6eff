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
from transformer.distributed.heartbeat import Heartbeat, end_when_aborted
from transformer.runtime import logging
from transformer.runtime.errors import StoppedError, UserError

LONG_MS = 7 * 24 * 3600 * 1000  # waiting has no end of its own: a host that falls silent ends it
JAX_SLACK = 60  # seconds that JAX waits longer than we do, so that the message is ours
P = ParamSpec("P")


class _Alone:
    """What there is of hosts in a process that is alone."""

    index, count = 0, 1

    def gather(self, name: str, text: str) -> list[str]:
        return [text]


class _Together:
    """This process among several."""

    def __init__(self, client: Any, index: int, count: int, timeout: float, lost_exit_code: int):
        self.index, self.count, self._client = index, count, client
        self._rounds: dict[str, int] = {}
        self.names = [f"host {i} ({who})" for i, who in enumerate(self.gather("who", who()))]
        self.heartbeat = Heartbeat(client, index, self.names, timeout, lost_exit_code)

    def gather(self, name: str, text: str) -> list[str]:
        number = self._rounds[name] = self._rounds.get(name, 0) + 1
        folder = f"{name}/{number}"
        self._client.key_value_set(f"{folder}/{self.index}", text)
        self._client.wait_at_barrier(folder.replace("/", "."), LONG_MS)
        found = dict(self._client.key_value_dir_get(f"{folder}/"))
        return [found[f"{folder}/{i}"] for i in range(self.count)]


_here: _Alone | _Together = _Alone()


def is_one_of_several(args: argparse.Namespace) -> bool:
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
    return launchers.cluster(os.environ) is not None


@contextlib.contextmanager
def joined(args: argparse.Namespace) -> Iterator[None]:
    """Joins the other processes, if there are any, for the length of the block; every host leaves it together.

    An error in one host ends them all, each with a message. The process then ends inside this block, as
    Python's own way out waits for the others.
    """
    global _here
    if not is_one_of_several(args):
        yield
        return
    _here = together = _join(args)
    gone = f"{together.names[0]}, which all others depend on, has gone away"
    with end_when_aborted(gone, args.lost_host_exit_code):
        together.heartbeat.start()
        stopped = None
        try:
            try:
                yield
            except StoppedError as error:  # on which all have agreed
                stopped = error
            _leave(together)
        except BaseException as error:
            together.heartbeat.fail(error)
    if stopped:
        raise stopped


def _join(args: argparse.Namespace) -> _Together:
    import jax
    from jax._src import distributed  # its client has no public name; Orbax takes it from here too

    # JAX would take SIGTERM for itself; training has its own way to stop together.
    jax.config.update("jax_enable_preemption_service", False)
    gpus = launchers.local_gpus(os.environ, launchers.count_gpus())
    where = args.coordinator or f"the address that {launchers.cluster(os.environ)} gives"
    what = f"not all processes joined at {where} within {args.host_timeout} s (--host_timeout); see which did not start"
    with end_when_aborted(what, args.lost_host_exit_code):
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
        logging.speak_as(state.process_id, state.num_processes)
        if gpus.idle:
            logging.say(
                f"warning: {gpus.idle} of this machine's GPUs stay idle; start as many processes on it as divide their "
                "number, or one, which takes them all"
            )
        count, timeout = state.num_processes, args.host_timeout
        return _Together(state.client, state.process_id, count, timeout, args.lost_host_exit_code)


def _leave(together: _Together) -> None:
    """Once all have come here, there is nothing to wait for any more."""
    import jax

    together.gather("done", "")
    together.heartbeat.stop()
    jax.distributed.shutdown()


def who() -> str:
    """This process, for people."""
    return f"process {os.getpid()} on {socket.gethostname()}"


def count() -> int:
    """How many hosts there are."""
    return _here.count


def name(host: int) -> str:
    """A host, for people."""
    return _here.names[host] if isinstance(_here, _Together) else who()


def is_lead() -> bool:
    """Whether this host writes what a run has one of."""
    return _here.index == 0


def lead_only(function: Callable[P, None]) -> Callable[P, None]:
    """The function, which other hosts than the lead leave out."""

    @functools.wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> None:
        if is_lead():
            function(*args, **kwargs)

    return called


def gather(what: str, text: str) -> list[str]:
    """What each host gives, in their order. All must call it, with the same sequence of names."""
    return _here.gather(what, text)


def wait(what: str) -> None:
    """Until all hosts are here."""
    gather(what, "")


def from_lead(what: str, make: Callable[[], str]) -> str:
    """What the lead makes; the others wait for it."""
    return gather(what, make() if is_lead() else "")[0]


@contextlib.contextmanager
def lead_first(what: str) -> Iterator[None]:
    """The lead does the block while the others wait, to find done what can be shared."""
    if not is_lead():
        wait(what)
    yield
    if is_lead():
        wait(what)
