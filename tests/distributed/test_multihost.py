"""Several processes of one run: the same training and scores as one, and every way to end.

Each process has simulated devices of its own; they talk over loopback as hosts do over a network.
"""

import argparse
import json
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

from tests.conftest import ROOT
from tests.helpers.processes import TINY, Processes, data_flags, environment, on_hosts, write_data
from train import train as fit
from transformer import command_line
from transformer.checkpoints.manager import CheckpointManager
from transformer.distributed import multihost
from transformer.runtime.errors import UserError

STEPS = ["--config.train.num_steps=8", "--config.train.eval_every_steps=4", "--config.train.checkpoint_every_steps=2"]


LONG = [f"--config.train.{name}=100000" for name in ("num_steps", "eval_every_steps", "checkpoint_every_steps")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


def config_flags(folder, flags):
    """Those of a tiny run, without what is not read with the others."""
    packs = "--config.data.batching=pack" in flags
    return [*(flag for flag in TINY if not (packs and "num_buckets" in flag)), *STEPS, *data_flags(folder), *flags]


def train_here(folder, workdir, *flags):
    """In this process, on its 8 devices."""
    settings, _ = command_line.config_flags(["", *config_flags(folder, flags)])
    fit(settings, workdir)


def command(folder, workdir, *flags):
    return ["train.py", f"--workdir={workdir}", *config_flags(folder, flags)]


def losses(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


def evaluate_here(workdir, capsys):
    from eval import main

    main(["eval.py", f"--workdir={workdir}"])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.fixture(scope="module")
def alone(folder, tmp_path_factory):
    """Trained by one process, undisturbed."""
    workdir = tmp_path_factory.mktemp("runs") / "alone"
    train_here(folder, workdir)
    return workdir


@pytest.mark.hosts
def test_two_hosts_do_what_one_does(folder, alone, tmp_path, capsys):
    """SIGTERM to one of two hosts stops both at one step; one host goes on; all losses and scores are those of one."""
    with on_hosts(2, command(folder, tmp_path / "run"), tmp_path / "out", devices=4) as pair:
        pair.wait_until(0, "step 1/")
        pair.all[1].send_signal(signal.SIGTERM)
        assert pair.wait() == [143, 143], pair.stderr(0) + pair.stderr(1)
        stopped = [re.findall(r"stopped by SIGTERM; saved step (\d+)", pair.stderr(host)) for host in (0, 1)]
    (step,) = stopped[0]
    assert stopped[1] == [step]
    assert CheckpointManager(tmp_path / "run").latest_valid_step() == int(step) < 8
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert {"hosts/step_ms/median", "hosts/input_wait/max", "hosts/memory_mb/max", "hosts/slowest"} <= line.keys()

    train_here(folder, tmp_path / "run")
    ours, theirs = losses(tmp_path / "run"), losses(alone)
    assert ours.keys() == theirs.keys() == set(range(1, 9))
    np.testing.assert_allclose([ours[i] for i in ours], [theirs[i] for i in ours], rtol=1e-5)

    one = evaluate_here(alone, capsys)
    written = alone / "translations" / "8.test.txt"
    translations = written.read_bytes()
    written.unlink()
    with on_hosts(2, ["eval.py", f"--workdir={alone}"], tmp_path / "out", devices=4) as pair:
        assert pair.wait() == [0, 0], pair.stderr(0) + pair.stderr(1)
        two = json.loads(pair.printed(0).splitlines()[-1])
        assert '"bleu"' not in pair.printed(1)
    assert written.read_bytes() == translations
    assert two["sentences"] == 13
    assert two["loss"] == pytest.approx(one["loss"], abs=1e-5)
    scores = ("bleu", "chrf", "ter", "chrfpp", "bleu_signature", "length_ratio")
    assert {name: two[name] for name in scores} == {name: one[name] for name in scores}


SLURM = {
    "SLURM_JOB_ID": "1",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}


def slurm_task(number):
    """What srun tells the tasks of a job."""
    return {**SLURM, "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_PROCID": str(number), "SLURM_LOCALID": str(number)}


@pytest.mark.hosts
def test_a_killed_host_ends_the_others_with_its_name(folder, tmp_path):
    """Started as Slurm does, by its environment."""
    job = {"SLURM_JOB_ID": str(np.random.default_rng().integers(1, 4000))}  # JAX makes a port of it
    tasks = [{**slurm_task(number), **job} for number in (0, 1)]
    own = [*command(folder, tmp_path / "run", *LONG), "--host_timeout=10", "--lost_host_exit_code=75"]
    with Processes([own, own], 1, tmp_path / "out", tasks) as pair:
        pair.wait_until(0, "step 2/")
        victim = pair.all[1].pid
        pair.all[1].kill()
        assert pair.wait(30) == [75, -9]
        assert f"host 1 (process {victim} on" in pair.stderr(0).splitlines()[-1]
        assert "silent for 10 s" in pair.stderr(0)


@pytest.mark.hosts
@pytest.mark.skipif(shutil.which("mpirun") is None, reason="needs mpirun, of Debian's openmpi-bin")
def test_hosts_that_disagree_end_with_a_message_each(folder, tmp_path):
    flags = ["--config.train.seed=1"], ["--config.train.seed=2"]
    commands = [[sys.executable, *command(folder, tmp_path / "run", *own, "--host_timeout=60")] for own in flags]
    mpirun = [
        "mpirun",
        "--allow-run-as-root",
        "--oversubscribe",
        "-np",
        "1",
        *commands[0],
        ":",
        "-np",
        "1",
        *commands[1],
    ]
    result = subprocess.run(mpirun, env=environment(1), cwd=ROOT, capture_output=True, timeout=200)
    assert result.returncode == 2
    stderr = result.stderr.decode()
    for host in (0, 1):
        assert f"train.py (host {host} of 2): the config differs between hosts" in stderr
    assert stderr.count("train.seed: 1 → 2") == 2
    assert "Traceback" not in stderr


@pytest.mark.hosts
def test_a_host_that_never_joins_ends_the_others(folder, tmp_path):
    commands = [command(folder, tmp_path / "run")]
    with on_hosts(2, [], tmp_path / "out", devices=1, timeout=3, commands=commands) as lonely:
        assert lonely.wait(60) == [1]
        assert "not all processes joined at 127.0.0.1:" in lonely.stderr(0).splitlines()[-1]


def flags(*argv):
    parser = argparse.ArgumentParser()
    command_line.add_process_flags(parser)
    return parser.parse_args(argv)


def test_a_process_without_flags_or_launcher_is_alone():
    assert not multihost.is_multiprocess(flags())
    with multihost.initialize(flags()):
        assert (multihost.process_count(), multihost.is_primary()) == (1, True)
        assert multihost.broadcast_from_primary("x", lambda: "made") == "made"
        assert multihost.allgather("x", "mine") == ["mine"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--process_id=0"], "got no --coordinator, --num_processes"),
        (["--coordinator=a:1", "--num_processes=2"], "got no --process_id"),
        (["--coordinator=a:1", "--num_processes=2", "--process_id=2"], "expected 0 to 1"),
        (["--coordinator=a:1", "--num_processes=2", "--process_id=-1"], "expected 0 to 1"),
        (["--coordinator=a", "--num_processes=2", "--process_id=0"], "expected HOST:PORT"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(argv, message):
    with pytest.raises(UserError, match=message):
        multihost.is_multiprocess(flags(*argv))


def test_a_process_under_open_mpi_5_needs_the_flags(monkeypatch):
    for name, value in {"SIZE": "2", "RANK": "0", "LOCAL_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(f"OMPI_COMM_WORLD_{name}", value)
    with pytest.raises(UserError, match=r"--num_processes=\$OMPI_COMM_WORLD_SIZE"):
        multihost.is_multiprocess(flags())
    assert multihost.is_multiprocess(flags("--coordinator=a:1", "--num_processes=2", "--process_id=0"))
