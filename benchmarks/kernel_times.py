"""Profiles a program: milliseconds of each kernel, from the trace of JAX's profiler."""

import pathlib
import re
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

# A kernel's kind is that of the first pattern that its name matches.
KINDS = {
    "attention": r"flash|fmha|sdpa|fprop|bprop|cudnn",
    "product": r"nvjet|cutlass|gemm|cublas|xmma|wgmma|matmul|dot|splitK",
    "scatter": r"scatter",
    "softmax or norm": r"softmax|norm",
    "transpose": r"transpose|concatenate|copy",
    "reduce": r"reduce",
    "memory": r"memcpy|memset",
    "convert": r"convert",
    "elementwise": r"fusion|wrapped|loop|triton_poi|elementwise",
}


class KernelTime(NamedTuple):
    """Total milliseconds and calls of a kernel in one repeat."""

    name: str
    ms: float
    calls: float


def profile(run: Callable[[], Any], repeats: int) -> list[KernelTime]:
    """Profiles `repeats` calls of `run`, which must be compiled; the costliest kernel first."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(repeats):
                result = run()
            jax.block_until_ready(result)
        return read(pathlib.Path(folder), repeats)


def read(folder: pathlib.Path, repeats: int) -> list[KernelTime]:
    """The kernels of a trace: those on the streams of the accelerators, or on the threads of the CPU."""
    paths = sorted(folder.rglob("*.xplane.pb"))
    if not paths:
        return []
    planes = list(jax.profiler.ProfileData.from_file(str(paths[-1])).planes)
    devices = [plane for plane in planes if plane.name.startswith("/device:") and "CUSTOM" not in plane.name]
    totals: dict[str, tuple[float, int]] = {}
    for plane in devices or [plane for plane in planes if plane.name == "/host:CPU"]:
        lines = list(plane.lines)
        streams = [line for line in lines if "Stream" in line.name or line.name == "XLA Ops"]  # of GPUs, of TPUs
        for line in streams or [line for line in lines if line.name != "python"]:
            for event in line.events:
                ms, count = totals.get(event.name, (0.0, 0))
                totals[event.name] = (ms + event.duration_ns / 1e6, count + 1)
    times = [KernelTime(name, ms / repeats, count / repeats) for name, (ms, count) in totals.items() if ms]
    return sorted(times, key=lambda time: -time.ms)


def by_kind(times: list[KernelTime]) -> dict[str, float]:
    """Milliseconds of each kind, the costliest first."""
    totals: dict[str, float] = {}
    for time in times:
        kind = next((kind for kind, pattern in KINDS.items() if re.search(pattern, time.name, re.IGNORECASE)), "other")
        totals[kind] = totals.get(kind, 0.0) + time.ms
    return {kind: round(ms, 3) for kind, ms in sorted(totals.items(), key=lambda item: -item[1])}


def summary(times: list[KernelTime], most: int = 30) -> dict[str, Any]:
    """The summary for a report."""
    return {
        "busy_ms": round(sum(time.ms for time in times), 3),
        "kernels": round(sum(time.calls for time in times), 1),
        "by_kind_ms": by_kind(times),
        "top": [[time.name[:90], round(time.ms, 3), round(time.calls, 1)] for time in times[:most]],
    }
