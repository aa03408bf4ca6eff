"""Launchers (Slurm, mpirun, torchrun, TPU pods): detects them, and which GPUs of the machine a process takes.

A launcher starts a program several times, and gives each process its rank in environment variables. Functions of an
`environment` depend on it alone: they ask neither the network nor, except on a machine that may be a TPU VM, JAX.
"""

import contextlib
import glob
import importlib.metadata
import importlib.util
import itertools
import pathlib
import re
import subprocess
from collections.abc import Mapping
from typing import NamedTuple

from transformer.runtime.errors import UserError


class Launcher(NamedTuple):
    """The environment variables with a launcher's number and rank of processes, of the run and of one machine."""

    name: str
    size: str
    rank: str
    local_size: str
    local_rank: str


OPEN_MPI = Launcher("Open MPI", *(f"OMPI_COMM_WORLD_{name}" for name in ("SIZE", "RANK", "LOCAL_SIZE", "LOCAL_RANK")))
# Tried in this order, before Slurm, which may have started the launcher itself.
LAUNCHERS = (
    OPEN_MPI,
    Launcher("MPICH or Intel MPI", "PMI_SIZE", "PMI_RANK", "MPI_LOCALNRANKS", "MPI_LOCALRANKID"),
    Launcher("Cray PALS", "PMI_SIZE", "PMI_RANK", "PMI_LOCAL_SIZE", "PMI_LOCAL_RANK"),
    Launcher("torchrun", "WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE", "LOCAL_RANK"),
)
SLURM_STEP = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")
# ROCR_ first: HIP numbers what it leaves.
VISIBLE = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
CHOSEN = ("JAX_LOCAL_DEVICE_IDS", "JAX_CUDA_VISIBLE_DEVICES", "JAX_ROCM_VISIBLE_DEVICES")
GPU_PLATFORMS = {"cuda", "gpu", "rocm"}


class LocalGpus(NamedTuple):
    """The GPUs that one process takes.

    Attributes:
      ids: their numbers among those visible to the process, as JAX's `local_device_ids`; None leaves it to JAX.
      idle: how many of the machine's GPUs that the run was given no process takes.
    """

    ids: list[int] | None
    idle: int = 0


def detect_cluster(environment: Mapping[str, str]) -> str | None:
    """Returns the launcher that has started this process as one of several and that JAX can join; None if none has.

    Raises:
      UserError: a launcher from which JAX does not learn where process 0 is, such as Open MPI 5
        (github.com/jax-ml/jax/issues/14576).
    """
    if _int(environment, OPEN_MPI.size) > 1 and "OMPI_MCA_orte_hnp_uri" in environment:
        return "Open MPI"
    started = _started_by(environment)
    if started and _int(environment, started.size) > 1:
        raise UserError(
            f"started by {started.name} as one of several, and JAX does not learn from it where process 0 is (of Open "
            "MPI it knows versions up to 4); give --coordinator=HOST:PORT of process 0 "
            f"--num_processes=${started.size} --process_id=${started.rank}, all of it inside bash -c '…' in single "
            "quotes, so that each process fills them in (docs/multihost.md)"
        )
    if environment.keys() >= set(SLURM_STEP):
        # An interactive shell of salloc may be a step of one task, which keeps the SLURM_NTASKS of the job.
        tasks = _int(environment, "SLURM_STEP_NUM_TASKS") or _int(environment, "SLURM_NTASKS")
        return "Slurm" if tasks > 1 else None
    return _tpu_cluster(environment)


def local_gpus(environment: Mapping[str, str], gpus: int) -> LocalGpus:
    """Returns the part of the machine's GPUs that this process takes, one of several of a run.

    Processes that see the same GPUs share them evenly, by local rank. One to which the launcher has given GPUs of
    its own, as Slurm does with --gpus-per-task, takes all it sees. JAX_LOCAL_DEVICE_IDS overrides.

    Args:
      gpus: those of the machine, as `count_gpus` finds them.

    Raises:
      UserError: more processes than GPUs.
    """
    for name in CHOSEN:
        if (text := environment.get(name)) and text != "all":
            try:
                return LocalGpus([int(each) for each in text.split(",")])
            except ValueError as error:
                raise UserError(f"{name}={text}: expected numbers of GPUs with commas between, such as 0,1") from error
    platforms = set(filter(None, environment.get("JAX_PLATFORMS", "").split(",")))
    seen = _visible(environment, gpus)
    if not seen or (platforms and not platforms & GPU_PLATFORMS):
        return LocalGpus(None)
    rank, size = local_rank_and_size(environment)
    given = 0 if _started_by(environment) else _int(environment, "SLURM_GPUS_ON_NODE")
    if size > 1 and _has_its_own(environment, seen, size, given or gpus, by_slurm=given > 0):
        return LocalGpus(list(range(seen)), max(given - seen * size, 0))
    share = seen // size
    if not share:
        raise UserError(
            f"{size} processes on this machine share {seen} GPU{'s' if seen > 1 else ''}: expected at most one process "
            "for each GPU. Start fewer on each machine, or ask for more GPUs; JAX_PLATFORMS=cpu leaves GPUs alone"
        )
    return LocalGpus(list(range(rank * share, (rank + 1) * share)), seen - size * share)


def local_rank_and_size(environment: Mapping[str, str]) -> tuple[int, int]:
    """Returns which of the run's processes on this machine this is, and how many there are: (0, 1) if nobody says."""
    started = _started_by(environment)
    if started:
        return _int(environment, started.local_rank), _int(environment, started.local_size)
    if environment.keys() >= set(SLURM_STEP):
        return _int(environment, "SLURM_LOCALID"), _slurm_tasks(environment)
    return 0, 1


def count_gpus() -> int:
    """Returns how many GPUs the driver lists on this machine or in this container; 0 without JAX's plugin for them."""
    plugins = " ".join(entry.name for entry in importlib.metadata.entry_points(group="jax_plugins"))
    if "cuda" in plugins:
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=False)
            if found := re.findall("^GPU ", listed.stdout, re.MULTILINE):
                return len(found)
        return len(glob.glob("/dev/nvidia[0-9]*"))
    if "rocm" in plugins:
        nodes = pathlib.Path("/sys/class/kfd/kfd/topology/nodes").glob("*/properties")
        return sum(bool(re.search(r"^simd_count [1-9]", node.read_text(), re.MULTILINE)) for node in nodes)
    return 0


def _has_its_own(environment: Mapping[str, str], seen: int, size: int, there: int, *, by_slurm: bool) -> bool:
    """Whether the GPUs seen are this process's alone, not shared by all `size` on the machine, which has `there`."""
    mask = environment.get("CUDA_VISIBLE_DEVICES", "")
    if mask.startswith("MIG-") and not by_slurm:
        return "," not in mask
    # What Slurm hides it hides from each task. Others may hide the same from all: not where too few are left for all.
    return seen * size <= there and (by_slurm or seen < size)


def _visible(environment: Mapping[str, str], gpus: int) -> int:
    """How many of `gpus` are left by the variables that hide some: as CUDA does, up to the first invalid entry."""

    def valid(entry: str) -> bool:
        return entry.startswith(("GPU-", "MIG-")) or (entry.isdecimal() and int(entry) < gpus)

    for name in VISIBLE:
        if name in environment:
            entries = [entry.strip() for entry in environment[name].split(",")]
            one = entries[0].startswith("MIG-")  # CUDA enumerates no second one
            gpus = min(gpus, 1 if one else len(list(itertools.takewhile(valid, entries))))
    return gpus


def _started_by(environment: Mapping[str, str]) -> Launcher | None:
    """The first of LAUNCHERS whose variables are there."""
    return next((launcher for launcher in LAUNCHERS if environment.keys() >= {*launcher[1:]}), None)


def _slurm_tasks(environment: Mapping[str, str]) -> int:
    """Tasks of the step on this node, of a list by node such as 8(x2),4."""
    text = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE", "")
    by_node = [int(tasks) for tasks, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text) for _ in range(int(times or 1))]
    node = _int(environment, "SLURM_NODEID")
    return by_node[node] if node < len(by_node) else _int(environment, "SLURM_NTASKS")


def _tpu_cluster(environment: Mapping[str, str]) -> str | None:
    """The kind of TPU slice that this process is on, if of several hosts; JAX asks a TPU VM's own metadata for them."""
    if not _is_tpu_vm():
        return None
    workers = environment.get("TPU_PROCESS_ADDRESSES", environment.get("TPU_WORKER_HOSTNAMES", ""))
    if path := environment.get("TPU_PROCESS_ADDRESSES_PATH"):  # known to JAX from 0.12 on
        workers = pathlib.Path(path).read_text()
    if workers:
        return "GKE" if "," in workers or _int(environment, "MEGASCALE_NUM_SLICES") > 1 else None
    return None if "TPU_SKIP_MDS_QUERY" in environment else "TPU VM"


def _is_tpu_vm() -> bool:
    """Whether TPU chips are attached, as JAX sees it: /dev/vfio alone is there on other machines too."""
    if importlib.util.find_spec("libtpu") is None or not (glob.glob("/dev/accel*") or glob.glob("/dev/vfio/*")):
        return False
    # Importing jax looks for chips on the PCI bus; no public name tells what it found.
    from jax._src import cloud_tpu_init

    return cloud_tpu_init.running_in_cloud_tpu_vm


def _int(environment: Mapping[str, str], name: str) -> int:
    """The number in a variable, 0 if there is none."""
    text = environment.get(name, "")
    return int(text) if text.isdecimal() else 0
