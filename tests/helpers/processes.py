"""Several processes of one run, on this machine."""

import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np

from tests.conftest import ROOT

WORDS = ["red", "green", "blue", "old", "new", "house", "tree", "cat", "dog", "sees"]
TINY = [
    "--config=configs/text.py",
    "--config.model.num_layers=1",
    "--config.model.emb_dim=16",
    "--config.model.num_heads=2",
    "--config.model.mlp_dim=32",
    "--config.data.vocab_size=286",
    "--config.data.max_length=32",
    "--config.data.num_buckets=1",
    "--config.optimizer.warmup_steps=10",
    "--config.train.batch_tokens=256",
    "--config.train.log_every_steps=1",
    "--config.train.keep_last=20",
    "--config.decode.beam_size=2",
    "--config.decode.batch_rows=8",
    "--config.decode.max_extra_length=4",
    "--config.decode.max_source_tokens=32",
]


def write_data(folder: pathlib.Path) -> pathlib.Path:
    """Pairs whose target is the source spelled backwards, as text files; 13 to evaluate.

    Those to validate by are about as long as each other: a validation compiles a program for each width.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for split, count, (fewest, most) in (("train", 120, (2, 6)), ("val", 5, (4, 5)), ("test", 13, (2, 6))):
        lines = [" ".join(rng.choice(WORDS, rng.integers(fewest, most + 1))) for _ in range(count)]
        (folder / f"{split}.en").write_text("".join(f"{line}\n" for line in lines))
        (folder / f"{split}.de").write_text("".join(f"{line[::-1]}\n" for line in lines))
    return folder


def data_flags(folder: pathlib.Path) -> list[str]:
    return [f"--config.data.dir={folder}", f"--config.data.data_dir={folder}/prepared"]


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def environment(devices: int) -> dict[str, str]:
    """As of these tests, with so many simulated devices, and without proxies, which the runtime warns of."""
    kept = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    return {
        **kept,
        "XLA_FLAGS": re.sub(r"(device_count)=\d+", rf"\1={devices}", os.environ["XLA_FLAGS"]),
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",  # set, so that training does not start itself anew
    }


class Processes:
    """Hosts of one command, each with its own output; killed at the end of the block if they still run."""

    def __init__(self, commands, devices, folder: pathlib.Path, environments=()):
        folder.mkdir(parents=True, exist_ok=True)
        self.outputs = [folder / f"host{i}.{time.monotonic_ns()}" for i in range(len(commands))]
        self.all = []
        for i, (command, output) in enumerate(zip(commands, self.outputs, strict=True)):
            with output.open("wb") as out, output.with_suffix(".err").open("wb") as err:
                full = [sys.executable, *map(str, command)]
                settings = {**environment(devices), **(environments[i] if environments else {})}
                self.all.append(subprocess.Popen(full, stdout=out, stderr=err, cwd=ROOT, env=settings))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.all:
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.kill()
            process.wait()

    def wait(self, timeout: float = 240) -> list[int]:
        """Their exit codes; fails where one does not end."""
        deadline = time.monotonic() + timeout
        return [process.wait(max(deadline - time.monotonic(), 0.1)) for process in self.all]

    def stderr(self, host: int) -> str:
        return self.outputs[host].with_suffix(".err").read_text(errors="replace")

    def printed(self, host: int) -> str:
        return self.outputs[host].read_text()

    def wait_until(self, host: int, text: str, timeout: float = 180) -> None:
        deadline = time.monotonic() + timeout
        while text not in self.stderr(host):
            assert time.monotonic() < deadline, self.stderr(host)
            assert self.all[host].poll() is None, self.stderr(host)
            time.sleep(0.05)


def on_hosts(count, command, folder, devices, timeout=60, commands=None) -> Processes:
    """A command on so many hosts, by explicit flags; as it is for one.

    Args:
      devices: of each host.
      timeout: seconds after which a silent host is given up.
      commands: one for each host instead; fewer than there should be leave some out.
    """
    commands = commands or [command] * count
    if count == 1:
        return Processes(commands, devices, folder)
    where = [f"--coordinator=127.0.0.1:{free_port()}", f"--num_processes={count}", f"--host_timeout={timeout}"]
    return Processes([[*own, *where, f"--process_id={i}"] for i, own in enumerate(commands)], devices, folder)
