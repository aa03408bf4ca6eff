"""Plans training on chips that are not attached: memory, communication and a bound of the speed of a config's step.

    python -m transformer.plan --config=configs/NAME.py --topology=v5e:4x4 [--fit] [--scaling] [--json]

Compiles the training step for the topology, on any machine with its compiler (`make plan` installs that for TPU), and
reads bytes, FLOPs and collectives from the compiled program. Needs no data: the batch consists of sentences of
maximum length. Topologies: v5e:4x4, v5p:4x4x8, v6e:4x4, h100:8, h200:8, b200:8, and cpu:8 for simulated devices;
several with commas. Tokens are those of the target side, including padding. With --json the last line of stdout is
one JSON object for each topology.
"""

import argparse
import json
import os
import time
from typing import TYPE_CHECKING, Any

from transformer import command_line
from transformer.command_line import positive_int
from transformer.config import Config
from transformer.data.batching import rows_per_batch
from transformer.models import flops as cost
from transformer.planning import hlo_cost, roofline
from transformer.planning.hardware import GIB, Topology, parse_topology
from transformer.planning.hlo import Program
from transformer.runtime.errors import UserError
from transformer.runtime.logging import log_info
from transformer.runtime.rounding import round_up

if TYPE_CHECKING:
    from transformer.planning import aot

Row = dict[str, Any]


def main(argv: list[str]) -> None:
    """Parses flags and config before JAX is imported."""
    config, args = command_line.parse_with_config(_parser(), argv, needs_data=False)
    topologies = [parse_topology(name) for name in args.topology.split(",")]
    length = args.length or config.data.max_row_length
    if config.train.batch_tokens < length:
        raise UserError(f"--length={length}: expected at most config.train.batch_tokens = {config.train.batch_tokens}")
    set_environment(topologies)
    if args.scaling:
        for topology in topologies:
            check_data_parallel(config, topology)
    rows = []
    for topology in topologies:
        row = plan(config, topology, length, args.effort, find_largest=args.fit)
        rows.append(row)
        print("\n".join(format_report(row)), flush=True)
        if args.scaling:
            row["scaling"] = scaling(config, topology, row)
            print("\n".join(["", *scaling_table(topology, row)]), flush=True)
    if len(rows) > 1:
        print("\n".join(["", *summary_table(rows)]))
    if args.json:
        for row in rows:
            print(json.dumps(row))


def _parser() -> argparse.ArgumentParser:
    parser = command_line.config_parser("python -m transformer.plan", __doc__, "--topology=NAME")
    parser.add_argument(
        "--topology",
        required=True,
        metavar="NAME",
        help="v5e:4x4, v5p:4x4x8, v6e:4x4, h100:8, h200:8, b200:8, cpu:8 or the like; several with commas between",
    )
    parser.add_argument(
        "--length",
        type=positive_int,
        help="width of the batch (default: data.max_length, rounded up to data.length_multiple)",
    )
    parser.add_argument("--fit", action="store_true", help="find the largest train.batch_tokens that fits")
    parser.add_argument("--scaling", action="store_true", help="predict the efficiency of a chip among 8 to 1,024")
    parser.add_argument("--json", action="store_true", help="print a JSON object for each topology last")
    parser.add_argument(
        "--effort",
        type=float,
        default=-1.0,
        help="of the compiler: -1, fast (default), to 0, as in training, which takes minutes",
    )
    return parser


def set_environment(topologies: list[Topology]) -> None:
    """Sets the environment before JAX is imported, so that this machine's own accelerator is not used."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    # Several processes may load libtpu at once, as none uses a chip. The other variables stop libtpu's search for one.
    for name, value in (
        ("TPU_SKIP_MDS_QUERY", "1"),
        ("TPU_WORKER_HOSTNAMES", "localhost"),
        ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),
        ("TPU_LOG_DIR", "disabled"),
        ("TPU_STDERR_LOG_LEVEL", "3"),
        ("TF_CPP_MIN_LOG_LEVEL", "3"),
        ("JAX_ENABLE_COMPILATION_CACHE", "false"),  # it cannot load programs for other machines
    ):
        os.environ.setdefault(name, value)
    simulated = max((topology.chips for topology in topologies if topology.chip.platform == "cpu"), default=0)
    flags = os.environ.get("XLA_FLAGS", "")
    if simulated and "xla_force_host_platform_device_count" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={simulated}".strip()


def plan(config: Config, topology: Topology, length: int, effort: float, *, find_largest: bool) -> Row:
    """Compiles the training step; the figures are of one chip unless the key says otherwise."""
    from transformer.distributed import sharding
    from transformer.distributed.mesh import make_mesh
    from transformer.planning import aot

    mesh = make_mesh(config.mesh, aot.topology_devices(topology))
    rows = aot.batch_rows(config, mesh, length)
    start = time.perf_counter()
    compiled = aot.compile_step(config, mesh, rows, length, effort)
    row: Row = {
        "topology": topology.name,
        "chips": mesh.size,
        "mesh": {name: size for name, size in mesh.shape.items() if size > 1},
        "dtype": config.model.dtype,
        "batch_tokens": config.train.batch_tokens,
        "rows": rows,
        "length": length,
        "compile_s": round(time.perf_counter() - start, 1),
        "bytes_per_chip": compiled.needed,
        "bytes_available": topology.chip.memory,
        "fits": bool(compiled.text) and compiled.needed <= topology.chip.memory,
        **cost_and_bounds(config, topology, compiled, mesh, rows, length),
    }
    if find_largest:
        unit = sharding.num_shards("batch", mesh) * config.train.accumulation_steps

        def needed(units: int) -> int:
            if units * unit == rows:
                return compiled.needed
            size = aot.compile_step(config, mesh, units * unit, length, effort).needed
            log_info(f"{units * unit * length:,} tokens: {size / GIB:.2f} GiB a chip")
            return size

        units = aot.max_batch(needed, topology.chip.memory, rows // unit)
        largest = length * rows_per_batch(units * unit * length, length) if units else 0  # as training rounds it down
        row |= {"fit_batch_tokens": largest, "fit_tokens_per_chip": largest // mesh.size}
    return row


def cost_and_bounds(
    config: Config, topology: Topology, compiled: "aot.Compiled", mesh: Any, rows: int, length: int
) -> Row:
    """Memory, FLOPs and bounds of a program; only the closed form of its FLOPs if it is too large to compile."""
    from transformer.distributed import sharding

    width = round_up(length, sharding.num_shards("length", mesh))  # as in training
    closed_form = cost.training_flops(config.model, config.data.vocab_size, config.train.passes * rows, width, width)
    if not compiled.text:
        return {
            "flops_per_step": closed_form,
            "flops_closed_form": closed_form,
            "collectives": {},
            "tokens_per_s_bound": None,
        }
    program = Program(compiled.text)
    kernels = hlo_cost.kernel_costs(program)
    flops = sum(kernel.num_runs * kernel.flops for kernel in kernels)
    moved = sum(kernel.num_runs * kernel.hbm_bytes for kernel in kernels)
    if program.unknown_loops:
        log_info(f"unknown trip counts of these loops are taken as 1: {', '.join(program.unknown_loops)}")
    collectives = hlo_cost.collectives(program, dict(mesh.shape))
    times = roofline.step_times(topology.chip, flops, moved, collectives)
    predicted = max(roofline.predicted_seconds(topology.chip, kernels), times.communication)
    # Every compilation of the step reads its arguments and writes its results.
    least = compiled.arguments + compiled.outputs + compiled.aliased
    bound = roofline.step_times(topology.chip, flops, least, collectives)
    tokens = rows_per_batch(config.train.batch_tokens, length) * length
    return {
        **{f"{part}_bytes": getattr(compiled, part) for part in ("arguments", "temporaries", "outputs", "code")},
        "flops_per_step": flops * mesh.size,
        "flops_closed_form": closed_form,
        "memory_traffic_bytes": moved,
        "flops_per_byte": round(flops / max(moved, 1), 1),
        "collectives": _collectives_json(collectives),
        "compute_ms": round(1000 * times.compute, 3),
        "memory_ms": round(1000 * times.memory, 3),
        "state_ms": round(1000 * bound.memory, 3),
        "communication_ms": round(1000 * times.communication, 3),
        "predicted_ms": round(1000 * predicted, 3),
        "predicted_mfu": round(closed_form / mesh.size / topology.chip.flops / predicted, 4),
        "predicted_tokens_per_s": round(tokens / predicted),
        "tokens_per_s_as_compiled": round(tokens / times.bound),
        "bound_by": bound.bound_by,
        "tokens_per_s_bound": round(tokens / bound.bound),
    }


def _collectives_json(collectives: list[hlo_cost.Collective]) -> Row:
    """Kind → count, bytes, and bytes for each set of axes."""
    kinds: Row = {}
    for collective in collectives:
        kind = kinds.setdefault(collective.kind, {"count": 0, "bytes": 0, "axes": {}})
        axes = "+".join(collective.axes) or "other"
        kind["count"] += collective.num_runs
        kind["bytes"] += collective.bytes
        kind["axes"][axes] = kind["axes"].get(axes, 0) + collective.bytes
    return kinds


def format_report(row: Row) -> list[str]:
    """The lines of a plan for the terminal."""
    mesh = " ".join(f"{name}={size}" for name, size in row["mesh"].items()) or "one device"
    lines = [
        f"{row['topology']}: {row['chips']} chips, {mesh}, {row['dtype']}, {row['rows']} rows of {row['length']} + "
        f"{row['length']} tokens, compiled in {row['compile_s']} s",
        f"  memory of a chip   {_gib(row['bytes_per_chip'])} of {_gib(row['bytes_available'])}: "
        + ("fits" if row["fits"] else "does not fit"),
    ]
    if "memory_traffic_bytes" in row:
        parts = ", ".join(
            f"{part} {_gib(row[f'{part}_bytes'])}" for part in ("arguments", "temporaries", "outputs", "code")
        )
        lines += [
            f"                     {parts}",
            f"  FLOPs of a step    {row['flops_per_step']:.4g}; by the closed form {row['flops_closed_form']:.4g}",
            f"  memory traffic     {_gib(row['memory_traffic_bytes'])} a chip, {row['flops_per_byte']} FLOPs a byte",
            *(f"  {line}" for line in _collective_lines(row["collectives"])),
            f"  at published peaks compute {row['compute_ms']} ms, memory {row['memory_ms']} ms as compiled and "
            f"{row['state_ms']} ms for the state alone, communication {row['communication_ms']} ms",
            f"  prediction         {row['predicted_ms']:.1f} ms a step, {row['predicted_tokens_per_s']:,} target "
            f"tokens/s, MFU {row['predicted_mfu']:.0%}: a roofline of each kernel at the chip's bfloat16 peak, not a "
            "measurement",
            f"  target tokens/s    {row['tokens_per_s_as_compiled']:,} at best as compiled; never above "
            f"{row['tokens_per_s_bound']:,}, bound by {row['bound_by']}",
        ]
    if fit := row.get("fit_batch_tokens"):
        largest = f"train.batch_tokens={fit}: {row['fit_tokens_per_chip']:,} tokens a chip, to 4%"
        lines.append(f"  largest that fits  {largest}")
    elif fit == 0:
        lines.append("  largest that fits  none: the smallest batch does not fit")
    return lines


def _collective_lines(kinds: Row) -> list[str]:
    if not kinds:
        return ["collectives        none"]
    lines = []
    for kind, total in kinds.items():
        axes = ", ".join(f"{name} {_mib(size)}" for name, size in total["axes"].items())
        lines.append(f"{kind:<18} {total['count']} of {_mib(total['bytes'])} in all; over {axes}")
    return lines


def summary_table(rows: list[Row]) -> list[str]:
    """Several plans as a Markdown table."""
    heads = (
        *("topology", "mesh", "rows × length", "memory of a chip", "FLOPs a step", "FLOPs a byte", "collectives"),
        *("compute, memory, communication ms", "tokens/s as compiled", "bound", "compiled in s"),
    )
    table = []
    for row in rows:
        mesh = " ".join(f"{name}={size}" for name, size in row["mesh"].items())
        sent = ", ".join(
            f"{total['count']} {kind} {_mib(total['bytes'])}" for kind, total in row["collectives"].items()
        )
        times = ", ".join(str(row.get(f"{name}_ms", "–")) for name in ("compute", "memory", "communication"))
        memory = f"{_gib(row['bytes_per_chip'])} of {_gib(row['bytes_available'])}" + (
            "" if row["fits"] else ", too much"
        )
        speeds = [row.get(f"tokens_per_s_{name}") for name in ("as_compiled", "bound")]
        cells = [
            *(row["topology"], mesh, f"{row['rows']} × {row['length']}", memory, f"{row['flops_per_step']:.4g}"),
            *(str(row.get("flops_per_byte", "–")), sent, times, *(f"{value:,}" if value else "–" for value in speeds)),
            str(row["compile_s"]),
        ]
        table.append(cells)
    return command_line.markdown_table(heads, table)


def check_data_parallel(config: Config, topology: Topology) -> None:
    """Raises a UserError for a mesh that --scaling cannot predict from, before anything is compiled."""
    from transformer.distributed.mesh import MESH_AXES, mesh_shape

    shape = zip(MESH_AXES, mesh_shape(config.mesh, topology.chips), strict=True)
    if split := [f"mesh.{name} = {size}" for name, size in shape if name != "data" and size > 1]:
        raise UserError(
            f"--scaling predicts from a data-parallel plan: expected mesh.data alone, got {', '.join(split)}; leave "
            "these fields, or --scaling, out"
        )


def scaling(config: Config, topology: Topology, row: Row) -> list[Row]:
    """Predicted efficiency by the number of chips; empty for a program that is too large to compile."""
    if "memory_traffic_bytes" not in row:
        return []
    from transformer.models import registry

    params = registry.ModelDef(config.model, config.data.vocab_size).num_params()
    flops, moved = row["flops_per_step"] // row["chips"], row["memory_traffic_bytes"]
    gradients = row["collectives"].get("all-reduce", {"bytes": 4 * params})["bytes"]
    width = 2 if config.model.dtype == "bfloat16" else 4
    shardings = {
        "data-parallel": roofline.data_parallel(topology.chip, flops, moved, gradients),
        "fully sharded": roofline.fully_sharded(topology.chip, flops, moved, params, width),
    }
    return [
        {
            "chips": point.chips,
            "parameters": sharding,
            **{f"{name}_ms": round(1000 * part, 6) for name, part in point.step_times._asdict().items()},
            "efficiency_overlapped": round(point.overlapped, 6),
            "efficiency_not_overlapped": round(point.serial, 6),
        }
        for sharding, points in shardings.items()
        for point in points
    ]


def scaling_table(topology: Topology, row: Row) -> list[str]:
    """The result of `scaling` as Markdown; each chip has as many tokens as in this plan."""
    if not row["scaling"]:
        return [f"{topology.chip.name}: no efficiency is predicted, the step is too large to compile"]
    tokens = row["rows"] * row["length"] // row["chips"]
    heads = ("chips", "parameters", *(f"{name} ms" for name in roofline.StepTimes._fields))
    table = []
    for point in row["scaling"]:
        times = (f"{point[f'{name}_ms']:.1f}" for name in roofline.StepTimes._fields)
        efficiencies = f"{point['efficiency_overlapped']:.1%}", f"{point['efficiency_not_overlapped']:.1%}"
        table.append((f"{point['chips']:,}", point["parameters"], *times, *efficiencies))
    lines = command_line.markdown_table((*heads, "efficiency, overlapped", "not overlapped"), table)
    return [f"{topology.chip.name}, {tokens:,} tokens a chip:", "", *lines]


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB"


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB" if size >= 2**17 else f"{size:,} B"


if __name__ == "__main__":
    command_line.run(main)
