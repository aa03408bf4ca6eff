"""A Slurm cluster of one node on this machine, of Debian's slurm-wlm and munge, as root."""

import os
import pathlib
import shutil
import signal
import socket
import stat
import subprocess
import time

from tests.helpers.processes import environment, free_port

CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
{gpus}NodeName={host} NodeAddr=127.0.0.1 CPUs=2 {gres}State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:8
"""


def is_installed() -> bool:
    return os.getuid() == 0 and all(map(shutil.which, ("munged", "mungekey", "slurmctld", "slurmd", "sbatch", "srun")))


class Cluster:
    """Started at the beginning of the block and ended with it.

    Args:
      gpus: how many its node has: copies of /dev/null, which Slurm hands out as it does real ones.

    Attributes:
      env: for the commands of users.
    """

    def __init__(self, folder: pathlib.Path, gpus: int = 0):
        folder.mkdir(mode=0o755)
        self.gpus = gpus
        self.folder, self.env = folder, {**environment(2), "SLURM_CONF": str(folder / "slurm.conf")}

    def __enter__(self) -> "Cluster":
        folder = self.folder
        (folder / "state").mkdir()
        (folder / "spool").mkdir()
        values = {"host": socket.gethostname(), "folder": folder, "ports": (free_port(), free_port())}
        values |= {
            "gpus": "GresTypes=gpu\n" if self.gpus else "",
            "gres": f"Gres=gpu:{self.gpus} " if self.gpus else "",
        }
        for number in range(self.gpus):
            os.mknod(folder / f"nvidia{number}", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        if self.gpus:
            files = f"{folder}/nvidia[0-{self.gpus - 1}]"
            (folder / "gres.conf").write_text(f"Name=gpu File={files} Flags=nvidia_gpu_env\n")
        (folder / "slurm.conf").write_text(CONF.format(**values))
        # slurmd of Debian 12 starts no job without a cgroup plugin, even if nothing is to use it.
        version = 1 if pathlib.Path("/sys/fs/cgroup/cpu").exists() else 2
        (folder / "cgroup.conf").write_text(f"CgroupPlugin=cgroup/v{version}\nCgroupAutomount=no\n")
        self.run("mungekey", "-c", "-k", folder / "munge.key")
        places = {
            "key": "munge.key",
            "socket": "munge.socket",
            "pid": "munged.pid",
            "log": "munged.log",
            "seed": "seed",
        }
        named = [f"--{name}{'' if name == 'socket' else '-file'}={folder / place}" for name, place in places.items()]
        self.run("munged", "--force", *named)
        self.run("slurmctld", "-c", "-f", folder / "slurm.conf")
        self.run("slurmd", "-f", folder / "slurm.conf")
        self.wait_for(lambda: "idle" in self.run("sinfo", "-h", "-o", "%T"), "the node is idle")
        return self

    def __exit__(self, *_: object) -> None:
        for name in ("slurmd", "slurmctld", "munged"):
            path = self.folder / f"{name}.pid"
            if path.exists():
                os.kill(int(path.read_text()), signal.SIGTERM)

    def run(self, *command: object) -> str:
        result = subprocess.run(list(map(str, command)), env=self.env, capture_output=True, text=True, timeout=60)
        assert result.returncode == 0, f"{command}: {result.stderr}{self.logs()}"
        return result.stdout

    def logs(self) -> str:
        return "\n".join(path.read_text(errors="replace")[-2000:] for path in self.folder.glob("*.log"))

    def wait_for(self, condition, what: str, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"not so after {seconds} s: {what}\n{self.logs()}"
            time.sleep(0.2)
