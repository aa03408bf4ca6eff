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
    for rule in jobset["spec"]["failurePolicy"]["rules"]:
        assert re.fullmatch("[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", rule["name"])  # JobSet refuses others
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


RUNNING = "RUNNING None N/A"  # what squeue says of the job: state, reason, time of preemption


@pytest.mark.parametrize(
    ("code", "saves", "state", "requeued"),
    [
        (75, True, RUNNING, True),  # a host was lost
        (75, False, RUNNING, False),
        (143, True, RUNNING, True),  # before the time limit, or in the grace time of a preemption
        (143, True, "COMPLETING TimeLimit N/A", True),
        (143, True, "COMPLETING None 2026-11-30T08:28:03", True),  # preempted without grace
        (143, True, "COMPLETING None N/A", False),  # scancel
        (143, False, RUNNING, False),
        (137, True, RUNNING, True),  # killed
        (130, True, RUNNING, False),
        (1, True, RUNNING, False),  # a failure inside
        (2, True, RUNNING, False),
        (0, True, RUNNING, False),
    ],
)
def test_slurm_requeues_where_another_start_can_help(tmp_path, code, saves, state, requeued):
    """With commands in place of srun, which may save a checkpoint, scontrol and squeue, with what 22.05 says."""
    newer = tmp_path / "run" / "checkpoints" / "20"
    for step, manifest in (("10", "manifest.json"), ("30.partial", "manifest.json"), ("40", "unfinished")):
        (tmp_path / "run" / "checkpoints" / step).mkdir(parents=True)
        (tmp_path / "run" / "checkpoints" / step / manifest).touch()
    save = f"mkdir {newer} && touch {newer}/manifest.json" if saves else "true"
    program(tmp_path / "bin" / "srun", f'echo "$SRUN_CPUS_PER_TASK $*" >>{tmp_path}/called; {save}; exit {code}')
    program(tmp_path / "bin" / "scontrol", f'echo "$@" >>{tmp_path}/called')
    program(tmp_path / "bin" / "squeue", f'echo "{state}"')
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


@pytest.mark.parametrize(("name", "code"), [("TERM", 143), ("INT", 130)])
def test_ssh_stops_before_the_trainers_start(tmp_path, name, code):
    """With a command in place of ssh that takes a moment to connect, in which the signal comes."""
    slow = f'[[ "$*" != *train.py* ]] || {{ kill -{name} $PPID; sleep 1; }}'
    program(tmp_path / "bin" / "ssh", f'{slow}; shift 3; echo "$*" >>{tmp_path}/called; exec bash -c "$*"')
    program(tmp_path / "bin" / "python", f"touch {tmp_path}/started; exec sleep 5")
    (tmp_path / "hosts.txt").write_text("127.0.0.1\n127.0.0.1\n")
    env = {**os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "PYTHON": f"{tmp_path}/bin/python"}
    # Bash cannot trap a signal that was ignored at its start, as SIGINT is in background jobs.
    command = ["env", f"--default-signal={name}", "launch/ssh.sh", tmp_path / "hosts.txt", f"--workdir={tmp_path}"]
    result = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert not (tmp_path / "started").exists()
    assert result.returncode == code, result.stderr
    assert not result.stderr
    assert re.findall(r"^rm .*\.(\d)\.stop$", (tmp_path / "called").read_text(), re.MULTILINE) == ["0", "1"]


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


@pytest.mark.hosts
@pytest.mark.skipif(not slurm.is_installed(), reason="needs root and Debian's slurm-wlm and munge")
def test_slurm_requeues_what_was_not_cancelled(tmp_path):
    """With a trainer that only saves at SIGTERM, which each of the commands sends to it."""
    trainer = """
        [ "$1" != - ] || exec "$REAL" "$@"
        trap 'mkdir -p "$RUN/checkpoints/20" && touch "$RUN/checkpoints/20/manifest.json"; exit 143' TERM
        touch "$RUN/started"
        for i in {1..600}; do sleep 0.1; done"""
    program(tmp_path / "bin" / "python", trainer)
    with slurm.Cluster(tmp_path / "slurm") as cluster:
        cluster.env |= {"PYTHON": f"{tmp_path}/bin/python", "REAL": sys.executable}

        def state(job):
            return re.findall(r"(?:JobState|Restarts)=(\w+)", cluster.run("scontrol", "show", "job", job))

        def state_after(run, *command):
            run.mkdir()
            cluster.env["RUN"] = str(run)
            options = ["--nodes=1", "--cpus-per-task=1", f"--chdir={ROOT}", f"--output={run}/log", "--parsable"]
            job = cluster.run("sbatch", *options, LAUNCH / "slurm.sbatch", f"--workdir={run}").strip()
            cluster.wait_for((run / "started").exists, "it starts")
            cluster.run(*command, job)
            cluster.wait_for(lambda: state(job)[0] not in ("RUNNING", "COMPLETING"), "it ends")
            assert (run / "checkpoints").exists()
            return state(job)

        assert state_after(tmp_path / "cancelled", "scancel") == ["CANCELLED", "0"]
        assert state_after(tmp_path / "signalled", "scancel", "--signal=TERM") == ["PENDING", "1"]
        assert state_after(tmp_path / "requeued", "scontrol", "requeue") == ["PENDING", "1"]
