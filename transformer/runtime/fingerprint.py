"""The host that a run computes on: what must stay the same for a run resumed on a CPU to be exact to the last bit.

On a GPU last bits may differ even so: it adds up the gradients of embeddings in no fixed order, and may choose other
kernels each time it compiles.
"""

import functools
import hashlib
import os
import pathlib
import platform

import jax

from transformer.attention import fused
from transformer.distributed import consistency

SETTINGS = (
    "jax_default_matmul_precision",
    "jax_default_prng_impl",
    "jax_disable_most_optimizations",
    "jax_enable_x64",
    "jax_threefry_partitionable",
)


def of_host() -> dict[str, str]:
    """Code, versions, compiler flags, devices, cores and kernels that were tried, each as text under its name."""
    return {**_unchanging(), **fused.in_training()}


@functools.cache
def _unchanging() -> dict[str, str]:
    devices = jax.devices()
    settings = (f"{name.removeprefix('jax_')}={getattr(jax.config, name, None)}" for name in SETTINGS)
    return {
        "code": consistency.code_digest(),
        **consistency.versions(),
        "XLA_FLAGS": " ".join(os.environ.get("XLA_FLAGS", "").split()),
        "JAX settings": " ".join(settings),
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "processes": str(jax.process_count()),
        "CPU": cpu(),
        "cores": str(_cores()),
    }


def differences(old: dict[str, str], new: dict[str, str]) -> list[str]:
    """What of one host is not so on the other, as 'name: old → new'; nothing where the old one is not known."""
    names = [*old, *(name for name in new if name not in old)] if old else []
    pairs = [(name, old.get(name, "none"), new.get(name, "none")) for name in names]
    return [f"{name}: {before or 'none'} → {after or 'none'}" for name, before, after in pairs if before != after]


def cpu() -> str:
    """The kind of CPU: its architecture, and a digest of the instructions that it has."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    features = next((line for line in lines if line.lower().startswith(("flags", "features"))), platform.processor())
    return f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:8]}"


def _cores() -> int:
    """Those that this process may use: XLA splits its sums by their number."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
