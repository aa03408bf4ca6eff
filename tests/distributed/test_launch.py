"""The recipes in launch/: each names commands and flags that there are, and starts what it says."""

import os
import pathlib
import re
import shutil
import stat
import subprocess
import sys
import time

import pytest
import yaml

import train
from tests.conftest import ROOT
from tests.distributed.test_multihost import losses, train_here
from tests.helpers import slurm
from tests.helpers.processes import TINY, data_flags, environment, write_data
from transformer import command_line
from transformer.checkpoints.manager import CheckpointManager

LAUNCH = ROOT / "launch"
SCRIPTS = sorted(path for path in LAUNCH.iterdir() if path.suffix in (".sh", ".sbatch"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_well_formed(path):
    subprocess.run(["bash", "-n", path], check=True)
    assert path.stat().st_mode & stat.S_IXUSR
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", path], check=True)


@pytest.mark.parametrize("path", sorted(LAUNCH.iterdir()), ids=lambda path: path.name)
def test_files_and_flags_that_recipes_name_exist(path, capsys):
    text = path.read_text()
    for config in re.findall(r"configs/\w+\.py[:\w]*", text):
        command_line.config_flags(["train.py", f"--config={ROOT}/{config}"])
    for document in re.findall(r"docs/\w+\.md", text):
        assert (ROOT / document).exists()
    with pytest.raises(SystemExit, match="0"):
        train.main(["train.py", "--help"])
    known = set(re.findall(r"--\w+", capsys.readouterr().out))
    ours = {"--config", "--workdir", "--coordinator", "--num_processes", "--process_id", "--lost_host_exit_code"}
    assert known >= ours & set(re.findall(r"--\w+", text))
    assert set(re.findall(r"--[a-z]+_\w+", text)) <= ours


def test_the_jobset_names_one_number_of_hosts_and_flags_that_train_takes():
    (jobset,) = yaml.safe_load_all((LAUNCH / "jobset.yaml").read_text())
    (job,) = jobset["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    flags = dict(argument.split("=", 1) for argument in container["args"])
    assert spec["parallelism"] == spec["completions"] == int(flags["--num_processes"])
    name = jobset["metadata"]["name"]
    assert flags["--coordinator"].split(":")[0] == f"{name}-{job['name']}-0-0.{name}"
    port = container["ports"][0]["containerPort"]
    assert flags["--coordinator"].endswith(f":{port}")
    (variable,) = re.findall(r"\$\((\w+)\)", flags["--process_id"])
    assert variable in {each["name"] for each in container["env"]}
    (rule,) = spec["podFailurePolicy"]["rules"]
    final = rule["onExitCodes"]["values"]
    assert (rule["onExitCodes"]["containerName"], final) == (container["name"], [1, 2, 3])
    assert int(flags["--lost_host_exit_code"]) not in final
    grace = spec["template"]["spec"]["terminationGracePeriodSeconds"]
    assert grace >= 60


def program(path: pathlib.Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


def test_the_tpu_recipe_starts_the_same_command_everywhere(tmp_path):
    program(tmp_path / "bin" / "gcloud", f'printf "%s\\n" "$*" >> {tmp_path}/called')
    env = {**os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "TPU": "slice", "ZONE": "z"}
    env["CACHE_DIR"] = "gs://b/compiled"
    subprocess.run(
        ["launch/tpu_pod.sh", "--config=configs/demo.py", "--workdir=gs://b/r"], env=env, check=True, cwd=ROOT
    )
    copied, *_, started = (tmp_path / "called").read_text().splitlines()
    assert re.match(r"compute tpus tpu-vm scp \S+/code.tar.gz slice:code.tar.gz --zone=z --worker=all", copied)
    assert started.startswith("compute tpus tpu-vm ssh slice --zone=z --worker=all --command=cd transformer && ")
    assert " JAX_COMPILATION_CACHE_DIR=gs://b/compiled exec .venv/bin/python train.py" in started
    assert started.rstrip().endswith("train.py --config=configs/demo.py --workdir=gs://b/r")


@pytest.mark.parametrize(
    ("code", "saves", "requeued"),
    [
        (75, True, True),  # a host was lost
        (75, False, False),
        (143, True, True),  # preempted, or out of time
        (143, False, False),
        (137, True, True),  # killed
        (130, True, False),
        (1, True, False),  # a failure inside
        (2, True, False),
        (0, True, False),
    ],
)
def test_slurm_requeues_where_another_start_can_help(tmp_path, code, saves, requeued):
    """With commands in place of srun, which may save a checkpoint, and scontrol."""
    newer = tmp_path / "run" / "checkpoints" / "20"
    for step, manifest in (("10", "manifest.json"), ("30.partial", "manifest.json"), ("40", "unfinished")):
        (tmp_path / "run" / "checkpoints" / step).mkdir(parents=True)
        (tmp_path / "run" / "checkpoints" / step / manifest).touch()
    save = f"mkdir {newer} && touch {newer}/manifest.json" if saves else "true"
    program(tmp_path / "bin" / "srun", f'echo "$SRUN_CPUS_PER_TASK $*" >>{tmp_path}/called; {save}; exit {code}')
    program(tmp_path / "bin" / "scontrol", f'echo "$@" >>{tmp_path}/called')
    env = {**os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "PYTHON": sys.executable}
    env |= {"SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "8"}
    command = ["launch/slurm.sbatch", "--config=configs/demo.py", "--workdir", tmp_path / "run"]
    result = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    started, *others = (tmp_path / "called").read_text().splitlines()
    assert others == (["requeue 7"] if requeued else [])
    assert result.returncode == (0 if requeued else code)
    assert ("after step 20" in result.stderr) == requeued
    assert started.startswith("8 ")  # srun does not take the CPUs of a task from sbatch
    assert started.endswith(f"train.py --lost_host_exit_code=75 --config=configs/demo.py --workdir {tmp_path}/run")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


STEPS = ["--config.train.num_steps=40", "--config.train.eval_every_steps=40"]


@pytest.fixture(scope="module")
def alone(folder, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "alone"
    train_here(folder, workdir, *STEPS)
    return losses(workdir)


def check(workdir, alone):
    ours = losses(workdir)
    assert ours.keys() == alone.keys()
    assert list(ours.values()) == pytest.approx(list(alone.values()), rel=1e-5)


@pytest.mark.hosts
def test_ssh_trains_on_all_machines(folder, alone, tmp_path):
    """With a command in place of ssh that runs everything here."""
    program(tmp_path / "bin" / "ssh", 'shift 3; exec bash -c "$*"')
    (tmp_path / "hosts.txt").write_text("127.0.0.1  \n# a comment\n\n127.0.0.1\n".replace("  ", ""))
    command = ["launch/ssh.sh", tmp_path / "hosts.txt", *TINY, *data_flags(folder), *STEPS, "--host_timeout=60"]
    env = {**environment(4), "PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "PYTHON": sys.executable}
    run = [*map(str, command), f"--workdir={tmp_path}/run"]
    with subprocess.Popen(run, env=env, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) as first:
        for line in first.stderr:
            if b"step 2/" in line:
                first.terminate()
                break
        stderr = first.stderr.read().decode()
    assert first.returncode == 143, stderr
    assert re.search(r"^\[1\] train.py \(host 1 of 2\): stopped by SIGTERM", stderr, re.MULTILINE)
    second = subprocess.run(run, env=env, cwd=ROOT, capture_output=True, timeout=300)
    assert second.returncode == 0, second.stderr.decode()
    check(tmp_path / "run", alone)


@pytest.mark.hosts
@pytest.mark.skipif(not slurm.is_installed(), reason="needs root and Debian's slurm-wlm and munge")
def test_slurm_trains_requeues_and_resumes(folder, alone, tmp_path):
    with slurm.Cluster(tmp_path / "slurm") as cluster:
        options = [
            "--nodes=1",
            "--ntasks-per-node=2",
            "--cpus-per-task=1",
            f"--chdir={ROOT}",
            f"--output={tmp_path}/log",
            "--parsable",
        ]
        flags = [*TINY, *data_flags(folder), *STEPS, "--host_timeout=60", f"--workdir={tmp_path}/run"]
        cluster.env |= {"PYTHON": sys.executable, **environment(4)}
        job = cluster.run("sbatch", *options, LAUNCH / "slurm.sbatch", *flags).strip()

        def stderr():
            return (tmp_path / "log").read_text(errors="replace") if (tmp_path / "log").exists() else ""

        cluster.wait_for(lambda: "step 2/" in stderr(), "it trains", 180)
        cluster.run("scontrol", "requeue", job)
        cluster.wait_for(lambda: "stopped by SIGTERM; saved step" in stderr(), "it saves")
        (step,) = set(re.findall(r"stopped by SIGTERM; saved step (\d+)", stderr()))
        deadline = time.monotonic() + 300
        while "resuming after step" not in stderr():
            assert time.monotonic() < deadline, stderr() + cluster.run("scontrol", "show", "job", job)
            subprocess.run(
                ["scontrol", "update", f"JobId={job}", "StartTime=now"], env=cluster.env, capture_output=True
            )
            time.sleep(1)
        assert f"resuming after step {step}" in stderr()
        cluster.wait_for(lambda: job not in cluster.run("squeue", "-h", "-o", "%i").split(), "it ends", 180)
        assert "JobState=COMPLETED" in cluster.run("scontrol", "show", "job", job)
        assert "Restarts=1" in cluster.run("scontrol", "show", "job", job)
    assert CheckpointManager(tmp_path / "run").latest_valid_step() == 40
    check(tmp_path / "run", alone)
