"""Launchers and layouts: which part of a machine's GPUs each process takes, and who started it.

The environments of Slurm were read from srun of slurm-wlm 22.05 with eight devices configured as GPUs; those of Open
MPI 4 from mpirun 4.1.4; the others are their documentation's.
"""

import argparse
import glob
import importlib.util
import os
import shutil
import subprocess
import sys

import jax
import pytest

from tests.conftest import ROOT
from tests.helpers import slurm
from transformer import command_line
from transformer.distributed import launchers, multihost
from transformer.runtime import logging
from transformer.runtime.errors import UserError

ALL = "0,1,2,3,4,5,6,7"


def slurm_step(local_id, tasks, node=0, **others):
    """What srun tells a task of two nodes with so many tasks on each; names of `others` without SLURM_."""
    values = {"JOB_ID": 7, "STEP_NODELIST": "n[1-2]", "NTASKS": 2 * tasks, "STEP_TASKS_PER_NODE": f"{tasks}(x2)"}
    values |= {"LOCALID": local_id, "NODEID": node, "PROCID": node * tasks + local_id, **others}
    return {name if name == "CUDA_VISIBLE_DEVICES" else f"SLURM_{name}": str(value) for name, value in values.items()}


def open_mpi(local_rank, local_size, **others):
    names = {"SIZE": 2 * local_size, "RANK": local_rank, "LOCAL_SIZE": local_size, "LOCAL_RANK": local_rank}
    return {**{f"OMPI_COMM_WORLD_{name}": str(value) for name, value in names.items()}, **others}


def hydra(local_rank, local_size):
    return {
        "PMI_SIZE": str(2 * local_size),
        "PMI_RANK": str(local_rank),
        "MPI_LOCALNRANKS": str(local_size),
        "MPI_LOCALRANKID": str(local_rank),
    }


def pals(local_rank, local_size):
    names = {"SIZE": 2 * local_size, "RANK": local_rank, "LOCAL_SIZE": local_size, "LOCAL_RANK": local_rank}
    return {f"PMI_{name}": str(value) for name, value in names.items()}


def torchrun(local_rank, local_size):
    names = {"WORLD_SIZE": 2 * local_size, "RANK": local_rank}
    names |= {"LOCAL_WORLD_SIZE": local_size, "LOCAL_RANK": local_rank}
    return {name: str(value) for name, value in names.items()}


ORTE = {"OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:3"}
EVERYTHING = list(range(8))
LAYOUTS = {
    # name: environment, GPUs of the machine → ids, idle GPUs
    "Slurm, a task a node, 8 GPUs": (slurm_step(0, 1, GPUS_ON_NODE=8, CUDA_VISIBLE_DEVICES=ALL), 8, EVERYTHING, 0),
    "Slurm, a task a node, 2 of 8 GPUs": (slurm_step(0, 1, GPUS_ON_NODE=2, CUDA_VISIBLE_DEVICES="0,1"), 2, [0, 1], 0),
    "Slurm, 8 tasks, 8 GPUs": (slurm_step(5, 8, GPUS_ON_NODE=8, CUDA_VISIBLE_DEVICES=ALL), 8, [5], 0),
    "Slurm, 8 tasks, second node": (slurm_step(5, 8, node=1, GPUS_ON_NODE=8, CUDA_VISIBLE_DEVICES=ALL), 8, [5], 0),
    "Slurm, 4 tasks, 8 GPUs": (slurm_step(3, 4, GPUS_ON_NODE=8, CUDA_VISIBLE_DEVICES=ALL), 8, [6, 7], 0),
    "Slurm, 3 tasks, 8 GPUs": (slurm_step(2, 3, GPUS_ON_NODE=8, CUDA_VISIBLE_DEVICES=ALL), 8, [4, 5], 2),
    "Slurm, uneven nodes": (slurm_step(1, 2, node=1, STEP_TASKS_PER_NODE="4,2", NTASKS=6), 8, [4, 5, 6, 7], 0),
    "Slurm, --gpus-per-task=1": (slurm_step(3, 4, GPUS_ON_NODE=4, CUDA_VISIBLE_DEVICES="3"), 8, [0], 0),
    "Slurm, --gpus-per-task=1 with cgroup": (slurm_step(3, 4, GPUS_ON_NODE=4, CUDA_VISIBLE_DEVICES="0"), 1, [0], 0),
    "Slurm, --gpus-per-task=2": (slurm_step(1, 4, GPUS_ON_NODE=8, CUDA_VISIBLE_DEVICES="2,3"), 8, [0, 1], 0),
    "Slurm, --gpus-per-task=2 --gpu-bind=none": (slurm_step(1, 4, GPUS_ON_NODE=8), 8, [2, 3], 0),
    "Slurm, --gpu-bind=single:1": (slurm_step(1, 4, GPUS_ON_NODE=8, CUDA_VISIBLE_DEVICES="1"), 8, [0], 4),
    "Slurm, 2 of 8 GPUs, remapped": (slurm_step(1, 2, GPUS_ON_NODE=2, CUDA_VISIBLE_DEVICES="6,7"), 8, [1], 0),
    "Slurm that knows no GPUs": (slurm_step(1, 2), 8, [4, 5, 6, 7], 0),
    "Slurm on a CPU partition": (slurm_step(1, 2), 0, None, 0),
    "Slurm, MIG instances": (slurm_step(1, 2, GPUS_ON_NODE=2, CUDA_VISIBLE_DEVICES="MIG-b"), 1, [0], 0),
    "sbatch, outside srun": ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_GPUS_ON_NODE": "8"}, 8, EVERYTHING, 0),
    "Open MPI 4, 8 processes": (open_mpi(5, 8, **ORTE), 8, [5], 0),
    "Open MPI 4, a process a machine": (open_mpi(0, 1, **ORTE), 8, EVERYTHING, 0),
    "Open MPI 5, 2 processes": (open_mpi(1, 2), 8, [4, 5, 6, 7], 0),
    "Open MPI, GPUs hidden from all": (open_mpi(1, 2, CUDA_VISIBLE_DEVICES="4,5,6,7"), 8, [2, 3], 0),
    "Open MPI, a GPU each by a wrapper": (open_mpi(3, 4, CUDA_VISIBLE_DEVICES="3"), 8, [0], 0),
    "Open MPI in a Slurm job": ({**slurm_step(0, 1, GPUS_ON_NODE=8), **open_mpi(3, 4)}, 8, [6, 7], 0),
    "Open MPI in a Slurm job, GPUs hidden from all": (
        {**slurm_step(0, 1, GPUS_ON_NODE=8), **open_mpi(1, 2, CUDA_VISIBLE_DEVICES="0,1,2,3")}, 8, [2, 3], 0,
    ),
    "MPICH, 4 processes": (hydra(3, 4), 8, [6, 7], 0),
    "Cray PALS, 4 processes": (pals(3, 4), 4, [3], 0),
    "torchrun, 4 processes": (torchrun(1, 4), 8, [2, 3], 0),
    "flags alone, as ssh.sh gives them": ({}, 8, EVERYTHING, 0),
    "Kubernetes, a pod a node": ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, 8, EVERYTHING, 0),
    "flags, GPUs remapped": ({"CUDA_VISIBLE_DEVICES": "7,3"}, 8, [0, 1], 0),
    "flags, GPUs by UUID": ({"CUDA_VISIBLE_DEVICES": "GPU-8932f937,GPU-1c2d"}, 8, [0, 1], 0),
    "flags, a MIG instance": ({"CUDA_VISIBLE_DEVICES": "MIG-1a2b"}, 1, [0], 0),
    "Open MPI, a MIG instance each": (open_mpi(1, 2, CUDA_VISIBLE_DEVICES="MIG-1a2b"), 1, [0], 0),
    "an invalid entry ends the list, as in CUDA": ({"CUDA_VISIBLE_DEVICES": "0,1,-1,2"}, 8, [0, 1], 0),
    "all GPUs hidden": (open_mpi(1, 2, CUDA_VISIBLE_DEVICES=""), 8, None, 0),
    "AMD, hidden twice": ({"ROCR_VISIBLE_DEVICES": "4,5,6,7", "HIP_VISIBLE_DEVICES": "2,3"}, 8, [0, 1], 0),
    "no GPU": (open_mpi(1, 2), 0, None, 0),
    "a CPU run on a machine with GPUs": (open_mpi(1, 4, JAX_PLATFORMS="cpu"), 2, None, 0),
    "JAX_PLATFORMS of GPUs": (open_mpi(1, 2, JAX_PLATFORMS="cuda,cpu"), 2, [1], 0),
    "chosen by hand": (open_mpi(1, 2, JAX_LOCAL_DEVICE_IDS="2,5"), 8, [2, 5], 0),
}  # fmt: skip


@pytest.mark.parametrize(("environment", "gpus", "ids", "idle"), LAYOUTS.values(), ids=LAYOUTS.keys())
def test_device_ids_by_launcher_and_layout(environment, gpus, ids, idle):
    assert launchers.local_gpus(environment, gpus) == (ids, idle)


@pytest.mark.parametrize(("make", "tasks"), [(slurm_step, 4), (open_mpi, 2), (hydra, 8), (torchrun, 1)])
def test_the_processes_of_a_machine_take_each_gpu_once(make, tasks):
    taken = [gpu for rank in range(tasks) for gpu in launchers.local_gpus(make(rank, tasks), 8).ids]
    assert taken == EVERYTHING


@pytest.mark.parametrize(
    ("environment", "gpus"),
    [
        (slurm_step(0, 4, GPUS_ON_NODE=1, CUDA_VISIBLE_DEVICES="0"), 8),
        (slurm_step(0, 8, GPUS_ON_NODE=4, CUDA_VISIBLE_DEVICES="0"), 8),  # --gpu-bind=single:2
        (open_mpi(0, 8), 4),
        (open_mpi(0, 2, CUDA_VISIBLE_DEVICES="0"), 1),
        (open_mpi(0, 2, CUDA_VISIBLE_DEVICES="MIG-a,MIG-b"), 8),
        (torchrun(1, 2), 1),
    ],
)
def test_more_processes_than_gpus_are_refused(environment, gpus):
    with pytest.raises(UserError, match=r"processes on this machine share \d GPU.*expected at most one process"):
        launchers.local_gpus(environment, gpus)


def test_numbers_of_gpus_that_are_none_are_refused():
    with pytest.raises(UserError, match="JAX_LOCAL_DEVICE_IDS=a: expected numbers of GPUs"):
        launchers.local_gpus({"JAX_LOCAL_DEVICE_IDS": "a"}, 8)


STEP = {
    "SLURM_JOB_ID": "1",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}


@pytest.mark.parametrize(
    ("environment", "name"),
    [
        ({}, None),
        ({**ORTE, "OMPI_COMM_WORLD_SIZE": "2"}, "Open MPI"),
        ({**ORTE, "OMPI_COMM_WORLD_SIZE": "1"}, None),
        (STEP, "Slurm"),
        ({**STEP, "SLURM_NTASKS": "1"}, None),
        ({**STEP, "PMI_SIZE": "2", "PMI_RANK": "0"}, "Slurm"),  # srun --mpi=pmi2
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "2"}, None),  # inside sbatch or salloc, outside srun
        ({**STEP, "SLURM_STEP_NUM_TASKS": "1"}, None),  # a shell of salloc with LaunchParameters=use_interactive_step
        ({**STEP, "SLURM_STEP_NUM_TASKS": "2"}, "Slurm"),
    ],
)
def test_launchers_are_known_by_their_environment(environment, name):
    assert launchers.detect_cluster(environment) == name


@pytest.mark.parametrize(
    ("environment", "flags"),
    [
        (open_mpi(0, 2), r"\$OMPI_COMM_WORLD_SIZE --process_id=\$OMPI_COMM_WORLD_RANK"),
        (hydra(0, 2), r"\$PMI_SIZE --process_id=\$PMI_RANK"),
        (pals(0, 2), r"\$PMI_SIZE --process_id=\$PMI_RANK"),
        (torchrun(0, 2), r"\$WORLD_SIZE --process_id=\$RANK"),
    ],
)
def test_an_unknown_launcher_gets_an_error_that_names_the_flags(environment, flags):
    with pytest.raises(UserError, match="started by .* as one of several.*--num_processes=" + flags):
        launchers.detect_cluster(environment)


@pytest.fixture
def attached(monkeypatch):
    """A machine with libtpu and /dev/vfio, on which JAX finds TPU chips or does not."""

    def attach(chips):
        find, matching = importlib.util.find_spec, glob.glob
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "libtpu" or find(name))
        monkeypatch.setattr(glob, "glob", lambda pattern: ["/dev/vfio/0"] if "vfio" in pattern else matching(pattern))
        monkeypatch.setattr(jax._src.cloud_tpu_init, "running_in_cloud_tpu_vm", chips > 0)

    return attach


@pytest.mark.parametrize(
    ("environment", "name"),
    [
        ({}, "TPU VM"),
        ({"TPU_SKIP_MDS_QUERY": "1"}, None),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "GKE"),
        ({"TPU_PROCESS_ADDRESSES": "a:8471,b:8471"}, "GKE"),
        ({"TPU_PROCESS_ADDRESSES": "a:8471", "TPU_WORKER_HOSTNAMES": "a,b"}, None),  # the first goes before
        ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "10"}, "GKE"),
    ],
)
def test_hosts_of_a_tpu_slice_are_known(attached, environment, name):
    attached(chips=4)
    assert launchers.detect_cluster(environment) == name


def test_addresses_of_a_tpu_slice_may_be_in_a_file(attached, tmp_path):
    attached(chips=4)
    (tmp_path / "addresses").write_text("a:8471,b:8471\n")
    assert launchers.detect_cluster({"TPU_PROCESS_ADDRESSES_PATH": str(tmp_path / "addresses")}) == "GKE"


@pytest.mark.parametrize("environment", [{}, {"TPU_WORKER_HOSTNAMES": "a,b"}])
def test_a_machine_with_vfio_and_libtpu_is_no_tpu_without_chips(attached, environment):
    attached(chips=0)
    assert launchers.detect_cluster(environment) is None


def test_gpus_are_those_that_the_driver_lists(monkeypatch, tmp_path):
    entry = argparse.Namespace(name="xla_cuda13")
    monkeypatch.setattr(launchers.importlib.metadata, "entry_points", lambda group: [entry])
    (tmp_path / "nvidia-smi").write_text(
        "#!/bin/sh\necho 'GPU 0: NVIDIA H100 (UUID: GPU-a)'\necho '  MIG 1g.10gb Device 0: (UUID: MIG-b)'\n"
        "echo 'GPU 1: NVIDIA H100 (UUID: GPU-c)'\n"
    )
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert launchers.count_gpus() == 2
    entry.name = "xla_other"
    assert launchers.count_gpus() == 0  # JAX would not use them


def test_jax_is_given_the_device_ids(monkeypatch, capsys):
    """By flags under a launcher that JAX 0.10 does not know, on a machine with 8 GPUs for 3 processes."""
    given = {}
    monkeypatch.setattr(launchers, "count_gpus", lambda: 8)
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **kwargs: given.update(kwargs))
    monkeypatch.setattr(multihost, "_ProcessGroup", lambda *_: None)
    monkeypatch.setattr(logging, "set_process", lambda *_: None)
    for name, value in {**open_mpi(1, 3), "JAX_PLATFORMS": "cuda"}.items():
        monkeypatch.setenv(name, value)
    parser = argparse.ArgumentParser()
    command_line.add_process_flags(parser)
    multihost._join(parser.parse_args(["--coordinator=a:1", "--num_processes=6", "--process_id=1"]))
    assert given["local_device_ids"] == [2, 3]
    assert given["cluster_detection_method"] == "deactivate"
    assert "warning: 2 of this machine's GPUs stay idle" in capsys.readouterr().err


@pytest.mark.hosts
@pytest.mark.skipif(not slurm.is_installed(), reason="needs root and Debian's slurm-wlm and munge")
def test_srun_gives_each_task_its_gpus(tmp_path):
    """A real srun, on a node with eight devices that are configured as GPUs."""
    program = (
        "import os; from transformer.distributed import launchers; "
        "print(os.environ['SLURM_LOCALID'], *launchers.local_gpus(os.environ, 8), sep=':')"
    )
    layouts = {
        "--ntasks=1 --gpus-per-node=8": ["0:[0, 1, 2, 3, 4, 5, 6, 7]:0"],
        "--ntasks=2 --gpus-per-node=8": ["0:[0, 1, 2, 3]:0", "1:[4, 5, 6, 7]:0"],
        "--ntasks=2 --gpus-per-node=3": ["0:[0]:1", "1:[1]:1"],
        "--ntasks=2 --gpus-per-task=1": ["0:[0]:0", "1:[0]:0"],
        "--ntasks=2 --gpus-per-task=2": ["0:[0, 1]:0", "1:[0, 1]:0"],
        "--ntasks=2 --gpus-per-node=4 --gpu-bind=single:1": ["0:[0]:2", "1:[0]:2"],
    }
    with slurm.Cluster(tmp_path / "slurm", gpus=8) as cluster:
        del cluster.env["JAX_PLATFORMS"]  # cpu, in tests
        for options, expected in layouts.items():
            stdout = cluster.run("srun", *options.split(), f"--chdir={ROOT}", sys.executable, "-c", program)
            assert sorted(stdout.splitlines()) == expected, options
        # Refused by us, each task alone.
        failed = ["srun", "--ntasks=2", "--gpus-per-node=1", f"--chdir={ROOT}", sys.executable, "-c", program]
        result = subprocess.run(failed, env=cluster.env, capture_output=True, text=True, timeout=60)
        assert "2 processes on this machine share 1 GPU" in result.stderr


@pytest.mark.hosts
@pytest.mark.skipif(shutil.which("mpirun") is None, reason="needs mpirun, of Debian's openmpi-bin")
def test_mpirun_gives_each_process_its_gpus():
    program = (
        "import os; from transformer.distributed import launchers; "
        "print(launchers.local_rank_and_size(os.environ), launchers.local_gpus(os.environ, 8).ids)"
    )
    mpirun = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-np", "2", sys.executable, "-c", program]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    stdout = subprocess.run(mpirun, env=clean, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True).stdout
    assert sorted(stdout.splitlines()) == ["(0, 2) [0, 1, 2, 3]", "(1, 2) [4, 5, 6, 7]"]
