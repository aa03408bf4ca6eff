import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT
from tests.helpers import work
from transformer.runtime.errors import UserError
from transformer.runtime.worker_pool import WorkerPool


def test_results_are_in_order_and_values_taken_as_needed():
    taken = []

    def values():
        for number in range(12):
            taken.append(number)
            yield (number, 0.2 if number == 0 else 0.0)

    with WorkerPool(work.square_after, 2) as pool:
        results = pool.map(values())
        assert next(results) == 0
        assert len(taken) < 6
        assert list(results) == [number**2 for number in range(1, 12)]


def test_one_worker_is_this_process():
    with WorkerPool(work.process_id, 1) as pool:
        assert set(pool.map([0, 0])) == {os.getpid()}
    with WorkerPool(work.process_id, 2) as pool:
        assert os.getpid() not in set(pool.map([0.1] * 3))


def test_workers_import_no_jax_and_what_they_print_is_no_result(capfd):
    with WorkerPool(work.jax_is_imported, 2) as pool:
        assert list(pool.map(["printed"] * 2)) == [False] * 2
    out, err = capfd.readouterr()
    assert (out, err) == ("", "printed\n" * 2)


def test_errors_come_back_in_order():
    with WorkerPool(work.fail_at_3, 2) as pool:
        results = pool.map(range(10))
        assert [next(results) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(UserError, match="three") as error:
            next(results)
        assert error.value.exit_code == 2
    with WorkerPool(work.fail_oddly, 2) as pool, pytest.raises(RuntimeError, match="odd"):
        list(pool.map(range(3)))


def test_a_killed_worker_is_one_message():
    with WorkerPool(work.kill_self, 2) as pool, pytest.raises(UserError, match=r"ended \(SIGKILL\).*--workers"):
        list(pool.map(range(3)))


PARENT = """
from tests.helpers import work
from transformer.runtime.worker_pool import WorkerPool
with WorkerPool(work.sleep_and_tell, 2) as pool:
    list(pool.map([60, 60]))
"""


def test_workers_end_with_their_parent_however_it_ends():
    process = subprocess.Popen([sys.executable, "-c", PARENT], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    pids = [int(process.stderr.readline()) for _ in range(2)]
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stderr.close()
    deadline = time.monotonic() + 5
    while any(map(is_running, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_running(pid):
    with contextlib.suppress(OSError), open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] != "Z"
    return False
