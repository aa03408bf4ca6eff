"""What an accelerator makes of this project: speed, correctness and time by kernel, in phases with a limit each.

    python -m benchmarks.accelerator --output=DIR [--budget=540] [--only=probe,correct] [--skip=multi30k]
        [--data=FOLDER] [--torch=PYTHON]
    python -m benchmarks.accelerator --list
    python -m benchmarks.accelerator --output=DIR --smoke

Run it from the repository's root. Each phase is a process of its own, and what it has found is on disk after every
measurement: one that fails, hangs or is ended costs what it was at. Training steps are timed by
`transformer.benchmark` on random sentences of one width. FOLDER holds the data of configs/multi30k_tok.py; without it
that phase is left out. PYTHON has PyTorch, for a peer of the same size. --smoke tries one phase of each kind at toy
sizes on the CPU.

DIR gets results.json, kernels.json, log.txt, and the compiled programs of some phases. A second command with the same
DIR does what the first did not; --only does its phases again. Compiled programs for a second command are kept in
--scratch. The last line of stdout is one JSON object.
"""

import argparse
import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any, NamedTuple

from benchmarks import accelerator_phases as phases
from benchmarks.findings import Findings, Row, read_json
from transformer import command_line
from transformer.command_line import absolute_path
from transformer.runtime import files
from transformer.runtime.errors import UserError
from transformer.runtime.logging import log_info

CUBLAS = {"XLA_FLAGS": "--xla_gpu_enable_triton_gemm=false"}


class Phase(NamedTuple):
    """A measurement in a process of its own.

    Attributes:
      run: what it calls, with `settings`.
      most: seconds after which it is ended.
      least: seconds without which it does not begin.
      environment: what its process has besides.
    """

    run: Callable[..., None]
    most: int
    least: int
    settings: Mapping[str, Any] = types.MappingProxyType({})
    environment: Mapping[str, str] = types.MappingProxyType({})


def training(variant: str, attention: str, environment: Mapping[str, str] | None = None, **shape: Any) -> Phase:
    """The training step of a variant of configs/wmt14.py."""
    return Phase(phases.training, 120, 45, {"variant": variant, "attention": attention, **shape}, environment or {})


# In the order in which they run: by what they are worth.
PHASES = {
    "probe": Phase(phases.probe, 80, 20),
    "correct": Phase(phases.correct, 60, 20),
    "attention": Phase(phases.attention, 80, 30),
    "base": training("en_de_base", "auto", keep_program=True),
    "big": training("en_de_big", "auto", keep_program=True),
    "torch_big": Phase(phases.torch_training, 110, 45, {"variant": "en_de_big"}),
    "big_plain": training("en_de_big", "plain", keep_program=True),
    "torch_base": Phase(phases.torch_training, 110, 45, {"variant": "en_de_base"}),
    "beam_search": Phase(phases.beam_search, 110, 45),
    "multi30k": Phase(phases.multi30k, 330, 150),
    "base_plain": training("en_de_base", "plain"),
    "big_cublas": training("en_de_big", "auto", CUBLAS),
    "big_256": training("en_de_big", "auto", target=256),
    "big_256_plain": training("en_de_big", "plain", target=256),
    "base_256_blockwise": training("en_de_base", "blockwise", target=256),
    "big_39": training("en_de_big", "auto", target=39, source=37),
    "big_100k": training("en_de_big", "auto", batch_tokens=100_000),
    "families": Phase(phases.families, 240, 60),
}


def main(argv: list[str]) -> None:
    """Reads the flags; runs the phases, or is the process of one."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accelerator", description=(__doc__ or "").split("\n")[0], allow_abbrev=False
    )
    parser.add_argument("--output", type=absolute_path, default="runs/accelerator", help="folder of results")
    parser.add_argument("--budget", type=float, default=540, help="seconds for all phases together (default: 540)")
    parser.add_argument("--only", default="", help="phases, commas between, in this order")
    parser.add_argument("--skip", default="", help="phases, commas between")
    parser.add_argument("--data", type=absolute_path, help="folder of data for the phase multi30k")
    parser.add_argument("--torch", default=sys.executable, help="a Python that has PyTorch (default: this one)")
    folder = os.path.join(tempfile.gettempdir(), f"accelerator-{os.getuid()}")
    parser.add_argument(
        "--scratch", type=absolute_path, default=folder, help=f"folder of what is kept (default: {folder})"
    )
    parser.add_argument("--smoke", action="store_true", help="try one phase of each kind, at toy sizes on the CPU")
    parser.add_argument("--list", action="store_true", help="name the phases, with their limits")
    parser.add_argument("--phase", help=argparse.SUPPRESS)
    args = parser.parse_args(argv[1:])
    if args.list:
        for name, phase in PHASES.items():
            print(f"{name:18} {phase.most:4} s at most, {phase.least:3} s at least")
    elif args.phase:
        ceiling = 1e12 * read_json(results_path(args)).get("probe", {}).get("matmul_tflops", 0.0)
        found = Findings(args.phase, scratch_path(args, args.phase), args, ceiling)
        PHASES[args.phase].run(found, **PHASES[args.phase].settings)
    else:
        drive(args, argv[1:])


def chosen(args: argparse.Namespace) -> list[str]:
    """The names of the phases that the flags ask for."""
    first = {phase.run: name for name, phase in reversed(PHASES.items())}
    names = args.only.split(",") if args.only else [name for name in PHASES if not args.smoke or name in first.values()]
    skipped = args.skip.split(",") if args.skip else []
    if unknown := [name for name in [*names, *skipped] if name not in PHASES]:
        raise UserError(f"expected phases out of {', '.join(PHASES)}, got {unknown[0]!r}")
    if "multi30k" in names and not args.data:
        skipped.append("multi30k")
        log_info("phase multi30k is left out: it needs --data=FOLDER")
    return [name for name in names if name not in skipped]


def scratch_path(args: argparse.Namespace, name: str) -> pathlib.Path:
    return pathlib.Path(args.scratch, f"{name}{'.smoke' if args.smoke else ''}.json")


def results_path(args: argparse.Namespace) -> pathlib.Path:
    """Toy figures have a file of their own: a real measurement must not take them for done."""
    return pathlib.Path(args.output, f"results{'.smoke' if args.smoke else ''}.json")


def drive(args: argparse.Namespace, flags: list[str]) -> None:
    """Runs the phases one after the other; a table on stderr, a JSON object on stdout.

    Raises:
      UserError: some of them were not done.
    """
    deadline = time.monotonic() + args.budget
    names, output = chosen(args), pathlib.Path(args.output)
    for folder in (output, pathlib.Path(args.scratch)):
        folder.mkdir(parents=True, exist_ok=True)
    results = read_json(results_path(args))
    before = [name for name in names if is_done(results.get(name, {})) and not args.only]
    if before:
        log_info(f"done before: {', '.join(before)}; --only does phases again")
    with (output / "log.txt").open("ab") as log:
        for name in (name for name in names if name not in before):
            for row in run_phase(name, args, flags, deadline, log):
                results[name] = row
                files.write_atomic(results_path(args), json.dumps(results, indent=1))
            log_info(line_of(name, results[name]))
    log_info(table(results))
    print(json.dumps({name: {key: row[key] for key in BRIEF if key in row} for name, row in results.items()}))
    undone = [name for name in names if not is_done(results[name])]
    if undone:
        raise UserError(f"not done: {', '.join(undone)}; see {output}/log.txt")


def is_done(row: Row) -> bool:
    return row.get("status") in ("done", "skipped")


def run_phase(name: str, args: argparse.Namespace, flags: list[str], deadline: float, log: IO[bytes]) -> Iterator[Row]:
    """What a phase has found so far, twice a second while its process runs, and in the end."""
    phase, path, since = PHASES[name], scratch_path(args, name), time.monotonic()
    path.unlink(missing_ok=True)
    if deadline - since < (0 if args.smoke else phase.least):
        yield {"status": f"not begun: {max(deadline - since, 0):.0f} s left"}
        return
    limit = min(phase.most, deadline - since)
    log.write(f"\n===== {name}, at most {limit:.0f} s\n".encode())
    log.flush()
    command = [sys.executable, "-m", "benchmarks.accelerator", *flags, f"--phase={name}"]
    environment = {**os.environ, **environment_of(args), **phase.environment}
    process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        while process.poll() is None and time.monotonic() - since < limit:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.5)
            yield {**read_json(path), "status": "running"}
        status = {None: f"ended after {limit:.0f} s", 0: "done"}.get(
            process.returncode, f"failed, exit code {process.returncode}"
        )
    finally:
        with contextlib.suppress(ProcessLookupError):  # what it has started goes with it
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    found = read_json(path)
    status = "skipped" if status == "done" and "skipped" in found else status
    yield {**found, "status": status, "seconds": round(time.monotonic() - since, 1)}


def environment_of(args: argparse.Namespace) -> dict[str, str]:
    """As training has it, and compiled programs and tuned kernels kept for the command that comes after."""
    return {
        "PYTHONUNBUFFERED": "1",
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", command_line.HUGE_PAGES),
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92",
        "JAX_COMPILATION_CACHE_DIR": str(pathlib.Path(args.scratch, "compiled")),
        "JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES": "xla_gpu_per_fusion_autotune_cache_dir",
        **({"JAX_PLATFORMS": "cpu"} if args.smoke else {}),
    }


BRIEF = (
    *("status", "seconds", "step_ms", "target_tokens_per_s", "slots_per_s", "tflops", "mfu", "mfu_of_measured"),
    *("matmul_tflops", "copy_tb_s", "update_under_transfer_guard", "bleu"),
)


def line_of(name: str, row: Row) -> str:
    """For people, once a phase has ended."""
    figures = "  ".join(f"{key}={row[key]}" for key in BRIEF[2:] if key in row)
    return f"{name:18} {row.get('seconds', 0):6.1f} s  {row['status']:24} {row.get('skipped', figures)}"


def table(results: Row) -> str:
    """Markdown, of the training steps."""
    heads = ("training step", "ms", "positions/s", "TFLOP/s", "MFU", "of measured", "GB moved", "GiB", "compile, s")
    rows = []
    for name, row in results.items():
        if "slots_per_s" in row and "tflops" in row:
            speed = f"{row['step_ms']:.2f}", f"{row['slots_per_s']:,}", f"{row['tflops']:.1f}"
            shares = (f"{row[key]:.1%}" if key in row else "" for key in ("mfu", "mfu_of_measured"))
            memory = f"{row.get('gb_moved', '')}", f"{row.get('temporaries_gib', '')}"
            rows.append((name, *speed, *shares, *memory, f"{row['compile_s']:.1f}"))
    return "\n".join(["", *command_line.markdown_table(heads, rows)])


if __name__ == "__main__":
    command_line.run(main)
