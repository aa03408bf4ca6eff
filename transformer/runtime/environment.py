"""The environment of a run: code, versions and hardware that a bit-exact resume depends on, and the compilation cache.

On a GPU last bits may differ in the same environment: gradients of embeddings are summed in no fixed order, and each
compilation may choose other kernels.
"""

import functools
import hashlib
import importlib.metadata
import os
import pathlib
import platform
import sys
import threading
import time
from collections.abc import Mapping

from transformer.runtime import progress

SETTINGS = (
    "jax_default_matmul_precision",
    "jax_default_prng_impl",
    "jax_disable_most_optimizations",
    "jax_enable_x64",
    "jax_threefry_partitionable",
)

_trials: dict[str, str] = {}


def fingerprint() -> dict[str, str]:
    """Code, versions, compiler flags, devices, cores and results of kernel trials, as text by name."""
    return {**_fixed_properties(), **_trials}


def set_trials(trials: Mapping[str, str]) -> None:
    """Sets the results of kernel trials, on which the programs of this process depend: name → result."""
    _trials.clear()
    _trials.update(trials)


@functools.cache
def _fixed_properties() -> dict[str, str]:
    import jax

    devices = jax.devices()
    settings = (f"{name.removeprefix('jax_')}={getattr(jax.config, name, None)}" for name in SETTINGS)
    return {
        "code": code_digest(),
        **versions(),
        "XLA_FLAGS": " ".join(os.environ.get("XLA_FLAGS", "").split()),
        "JAX settings": " ".join(settings),
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "processes": str(jax.process_count()),
        "CPU": cpu(),
        "cores": str(available_cpus()),
    }


def diff(old: dict[str, str], new: dict[str, str]) -> list[str]:
    """The differences of two environments, as 'name: old → new'; empty if the old one is not known."""
    names = [*old, *(name for name in new if name not in old)] if old else []
    pairs = [(name, old.get(name, "none"), new.get(name, "none")) for name in names]
    return [f"{name}: {before or 'none'} → {after or 'none'}" for name, before, after in pairs if before != after]


def changed_parts(old: dict[str, str], new: dict[str, str]) -> str:
    """What differs between two environments, in words; empty if nothing does or the old one is not known."""
    changed = {change.partition(":")[0] for change in diff(old, new)}
    packages = versions().keys()
    parts = {
        "other code": changed & {"code"},
        "other packages": changed & packages,
        "another machine or other settings": changed - packages - {"code"},
    }
    return " and ".join(part for part, names in parts.items() if names)


def cpu() -> str:
    """The architecture of the CPU, and a digest of its instruction set."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    features = next((line for line in lines if line.lower().startswith(("flags", "features"))), platform.processor())
    return f"{platform.machine()}-{hashlib.sha256(features.encode()).hexdigest()[:8]}"


def available_cpus() -> int:
    """The number of cores that this process may use: XLA splits its sums by it."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_LOWERED = "/jax/core/compile/jaxpr_to_mlir_module_duration"
_COMPILED = "/jax/core/compile/backend_compile_duration"


def cache_folder() -> pathlib.Path:
    """The folder for what may be deleted at any time."""
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache", "transformer-jax")


def enable_compilation_cache() -> str:
    """Keeps compiled programs between runs, in JAX_COMPILATION_CACHE_DIR or ~/.cache/transformer-jax.

    Returns the folder. Time to compile is left out of the time left that `progress` shows.
    """
    import jax

    _leave_out_compilation()
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(cache_folder() / cpu())
    jax.config.update("jax_compilation_cache_dir", folder)
    if "://" in folder:
        # XLA's own caches, such as that of what it tunes for GPUs, would go there too, and XLA cannot write there.
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    return folder


@functools.cache
def _leave_out_compilation() -> None:
    import jax

    lock, left_out_until = threading.Lock(), 0.0

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        nonlocal left_out_until
        if event in (_LOWERED, _COMPILED):
            with lock:  # programs may be compiled at once, and their common time counts once
                now = time.perf_counter()
                progress.leave_out(now - max(now - duration_secs, left_out_until))
                left_out_until = now

    jax.monitoring.register_event_duration_secs_listener(listen)


PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "grain", "sentencepiece", "sacrebleu")


def code_digest() -> str:
    """Of the package's own files."""
    digest = hashlib.sha256()
    folder = pathlib.Path(__file__).parent.parent
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder)} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()[:12]


def versions() -> dict[str, str]:
    """Of Python and of the packages that the code computes with."""
    return {"Python": f"{sys.version_info.major}.{sys.version_info.minor}", **{p: _version(p) for p in PACKAGES}}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"
