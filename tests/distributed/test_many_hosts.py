"""Several processes, the long way: numbers of hosts in turn, other meshes, mpirun, hosts that stop or differ."""

import json
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.conftest import ROOT
from tests.distributed.test_multihost import LONG, command, losses, train_here
from tests.helpers.processes import environment, on_hosts, write_data

pytestmark = pytest.mark.hosts


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


def recorded(files):
    """Step → the example of each row of the global batch, from what all hosts noted."""
    actual = {}
    for file in files:
        for line in file.read_text().splitlines():
            step, rows, examples = json.loads(line)
            actual.setdefault(step, {}).update(zip(rows, examples, strict=True))
    return {step: [of[row] for row in sorted(of)] for step, of in actual.items()}


def test_other_numbers_of_hosts_take_over_from_each_other(folder, tmp_path):
    """1 → 2 → 4 → 1 hosts on other meshes: the very examples of an undisturbed run, and its losses."""
    settings = ["--config.train.num_steps=16", "--config.train.eval_every_steps=100"]
    settings += ["--config.train.checkpoint_every_steps=100", "--config.model.dropout_rate=0.1"]
    chain = [(1, 4, []), (2, 2, ["--config.mesh.fsdp=2"]), (4, 1, ["--config.mesh.tensor=2"]), (1, 4, [])]
    records = {}
    for name, sittings in (("whole", [(1, 4, [], 16)]), ("chain", [(*chain[i], 4 * i + 4) for i in range(4)])):
        for hosts, devices, mesh, last in sittings:
            flags = [*settings, f"--config.train.num_steps={last}", *mesh]
            own = [
                [
                    "-m",
                    "tests.helpers.recorder",
                    tmp_path / f"{name}.{last}.{i}",
                    *command(folder, tmp_path / name, *flags)[1:],
                ]
                for i in range(hosts)
            ]
            with on_hosts(hosts, [], tmp_path / "out", devices, commands=own) as processes:
                assert processes.wait() == [0] * hosts, processes.stderr(0)
        records[name] = recorded(sorted(tmp_path.glob(f"{name}.*.*")))
    assert records["whole"].keys() == records["chain"].keys() == set(range(16))
    for step, examples in records["whole"].items():
        others = records["chain"][step]
        assert others[: len(examples)] == examples
        assert set(others[len(examples) :]) <= {-1}
    whole, chain = losses(tmp_path / "whole"), losses(tmp_path / "chain")
    np.testing.assert_allclose([chain[i] for i in whole], [whole[i] for i in whole], rtol=0, atol=1e-4)


def test_a_mesh_may_reach_over_hosts_that_share_rows(folder, tmp_path):
    """The tensor axis does, so both read the same rows; packed rows and parts of a batch are as good."""
    flags = ["--config.mesh.data=1", "--config.mesh.tensor=2", "--config.mesh.sequence=2"]
    flags += ["--config.data.batching=pack"]
    flags += ["--config.train.accumulation_steps=2", "--config.train.num_steps=4"]
    train_here(folder, tmp_path / "alone", *flags)
    with on_hosts(2, command(folder, tmp_path / "run", *flags), tmp_path / "out", devices=2) as pair:
        assert pair.wait() == [0, 0], pair.stderr(0)
    ours, theirs = losses(tmp_path / "run"), losses(tmp_path / "alone")
    assert ours.keys() == theirs.keys()
    np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=1e-5)


def test_a_host_that_stops_ends_the_other_within_a_minute(folder, tmp_path):
    """Host 0, whom the other asks how all are; test_multihost kills the other."""
    with on_hosts(2, command(folder, tmp_path / "run", *LONG), tmp_path / "out", devices=2, timeout=10) as pair:
        pair.wait_until(0, "step 5/")
        since, name = time.monotonic(), f"host 0 (process {pair.all[0].pid} on"
        pair.all[0].send_signal(signal.SIGSTOP)
        assert pair.all[1].wait(60) == 1
        assert time.monotonic() - since < 60
        assert name in pair.stderr(1).splitlines()[-1]


def test_hosts_with_other_data_get_an_error(folder, tmp_path):
    other = write_data(tmp_path / "other")
    (other / "train.en").write_text((folder / "train.en").read_text().replace("red", "read"))
    commands = [command(where, tmp_path / "run") for where in (folder, other)]
    with on_hosts(2, [], tmp_path / "out", devices=1, commands=commands) as pair:
        assert pair.wait() == [2, 2]
        for host in (0, 1):
            assert "the data differs between hosts: digest" in pair.stderr(host)


def test_hosts_with_other_code_get_an_error(folder, tmp_path):
    """Host 1 has a copy of the package with one more comment."""
    shutil.copytree(ROOT, tmp_path / "copy", ignore=shutil.ignore_patterns(".*", "runs"))
    with (tmp_path / "copy" / "transformer" / "models" / "loss.py").open("a") as file:
        file.write("# another\n")
    ours = command(folder, tmp_path / "run")
    theirs = [tmp_path / "copy" / "train.py", *ours[1:]]
    commands = [ours, theirs]
    with on_hosts(2, [], tmp_path / "out", devices=1, commands=commands) as pair:
        assert pair.wait() == [2, 2], pair.stderr(0) + pair.stderr(1)
        for host in (0, 1):
            assert "the code differs between hosts: version" in pair.stderr(host)


def test_hosts_that_do_not_share_the_workdir_get_an_error(folder, tmp_path):
    commands = [command(folder, tmp_path / f"run{host}") for host in (0, 1)]
    with on_hosts(2, [], tmp_path / "out", devices=1, commands=commands) as pair:
        assert pair.wait(120) == [2, 2]
        for host in (0, 1):
            assert "host 1 (process" in pair.stderr(host)
            assert "cannot see what host 0" in pair.stderr(host)


def test_a_workdir_that_is_held_is_refused_on_every_host(folder, tmp_path):
    from etils import epath

    from transformer.training import workdir

    with (
        workdir.acquire_lock(epath.Path(tmp_path / "run")),
        on_hosts(2, command(folder, tmp_path / "run"), tmp_path / "out", devices=1) as pair,
    ):
        assert pair.wait() == [4, 4]
        assert "held by process" in pair.stderr(1)


@pytest.mark.skipif(shutil.which("mpirun") is None, reason="needs mpirun, of Debian's openmpi-bin")
def test_mpirun_trains_and_scores_like_one_process(folder, tmp_path):
    """Two processes of one device against one of two: losses, and translations of the same checkpoint."""
    mpirun = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-np", "2"]

    def start(launcher, devices, *flags):
        full = [*launcher, sys.executable, *flags]
        result = subprocess.run(full, cwd=ROOT, env=environment(devices), capture_output=True, timeout=550)
        assert result.returncode == 0, result.stderr.decode()
        return result.stdout

    scores = []
    for launcher, devices, own in (([], 2, []), (mpirun, 1, ["--host_timeout=120"])):
        start(launcher, devices, *command(folder, tmp_path / f"run{devices}"), *own)
        report = json.loads(start(launcher, devices, "eval.py", f"--workdir={tmp_path}/run2", *own).splitlines()[-1])
        text = (tmp_path / "run2" / "translations" / "8.test.txt").read_bytes()
        scores.append((report["sentences"], report["bleu"], text))
    ours, theirs = losses(tmp_path / "run1"), losses(tmp_path / "run2")
    assert ours.keys() == theirs.keys()
    np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=1e-3)  # sums in another order
    assert scores[0] == scores[1]
    assert scores[0][0] == 13
