"""Measures the memory of the compiled training step by length, for each attention implementation.

    python -m benchmarks.attention_memory [--topology=cpu:8] [--paths=plain,blockwise,ring:2,ring:4,ring:8,splash]
        [--lengths=1024,4096,16384,65536] [--plot=FILE.svg]

Nothing is run: the compiler reports the size of temporary arrays on each device, for one row of that many source and
target tokens, 2+2 layers of width 64 and 4 heads. ring:8 is a ring of 8 devices. splash needs a TPU topology, such
as v5e:2x4, and its compiler (`make tpu-compiler`). The last line of stdout is one JSON object.
"""

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from transformer.command_line import absolute_path, run
from transformer.config import Config, validation
from transformer.evaluation.charts import Axis
from transformer.plan import set_environment
from transformer.planning.hardware import Topology, parse_topology
from transformer.runtime.errors import UserError
from transformer.runtime.files import write_atomic
from transformer.runtime.logging import log_info

VOCAB = 256
EFFORT = -1.0  # of the compiler, as in `plan`


def main(argv: list[str]) -> None:
    """Parses the flags, compiles and prints."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attention_memory", allow_abbrev=False)
    parser.add_argument("--topology", default="cpu:8", help="chips to compile for, as in transformer.plan")
    parser.add_argument(
        "--paths",
        default="plain,blockwise,ring:2,ring:4,ring:8",
        help="values of model.attention; ring:N over N devices",
    )
    parser.add_argument("--lengths", default="1024,4096,16384,65536", help="tokens of a row on either side")
    parser.add_argument("--plot", type=absolute_path, metavar="FILE.svg", help="also draw a plot")
    args = parser.parse_args(argv[1:])
    lengths, topology, paths = two_or_more(args.lengths), parse_topology(args.topology), args.paths.split(",")
    for path in paths:
        small_model(path)
    set_environment([topology])
    table: dict[str, Any] = {"topology": topology.name, "lengths": lengths}
    for path in paths:
        table[path] = [temporary_mb(path, length, topology) for length in lengths]
        table[f"{path}_exponent"] = round(growth(lengths, table[path]), 2)
    show(table)
    if args.plot:
        write_atomic(args.plot, drawing(lengths, {path: table[path] for path in paths}))
    print(json.dumps(table))


def two_or_more(text: str) -> list[int]:
    """Parses at least two different lengths, ascending, as growth needs two."""
    words = text.split(",")
    lengths = sorted({int(word) for word in words if word.strip().isdecimal() and int(word)})
    if len(lengths) < max(len(words), 2):
        raise UserError(f"--lengths: expected at least two different numbers with commas between, got {text!r}")
    return lengths


def temporary_mb(path: str, length: int, topology: Topology) -> float:
    """MiB of temporary arrays of an update on each device; all memory needed, if a chip has less."""
    from transformer.distributed.mesh import make_mesh
    from transformer.planning import aot

    config = small_model(path)
    mesh = make_mesh(config.mesh, aot.topology_devices(topology))
    compiled = aot.compile_step(config, mesh, 1, length, EFFORT)
    size = round((compiled.temporaries if compiled.text else compiled.needed) / 2**20, 1)
    log_info(f"{path}, {length:,} tokens: {size:,} MiB")
    return size


def small_model(path: str) -> Config:
    """2+2 layers of width 64 without dropout."""
    attention, _, devices = path.partition(":")
    if devices and not (attention == "ring" and devices.isdecimal() and int(devices)):
        raise UserError(f"--paths: expected values of model.attention, and ring:2, say, for two devices; got {path!r}")
    model = {"num_layers": 2, "emb_dim": 64, "qkv_dim": 64, "value_dim": 64, "mlp_dim": 128, "num_heads": 4}
    sections = {
        "model": {**model, "dropout_rate": 0.0, "attention": attention},
        "data": {"vocab_size": VOCAB},
        "mesh": {"data": 1, "sequence": int(devices or 1)},
    }
    return validation.validate(sections)


def growth(lengths: list[int], sizes: list[float]) -> float:
    """The exponent p of size ∝ length^p between the two largest lengths."""
    return math.log(sizes[-1] / sizes[-2]) / math.log(lengths[-1] / lengths[-2])


def show(table: dict[str, Any]) -> None:
    """Prints the table on stderr."""
    paths = [name for name in table if f"{name}_exponent" in table]
    print("| tokens | " + " | ".join(f"{path}, MiB" for path in paths) + " |", file=sys.stderr)
    print("|---|" + "---|" * len(paths), file=sys.stderr)
    for i, length in enumerate(table["lengths"]):
        print(f"| {length:,} | " + " | ".join(f"{table[path][i]:,}" for path in paths) + " |", file=sys.stderr)
    exponents = " | ".join(str(table[f"{path}_exponent"]) for path in paths)
    print(f"| growth exponent at the end | {exponents} |", file=sys.stderr)


WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 380, 96, 80, 16, 44
COLORS = ("#c0392b", "#2471a3", "#1e8449", "#7d3c98", "#b9770e", "#117a65", "#5d6d7e")
STYLE = "text{font:12px sans-serif;fill:#555}.grid{stroke:#ccc}polyline{fill:none;stroke-width:2}"


def drawing(lengths: Sequence[int], sizes: Mapping[str, Sequence[float]]) -> str:
    """An SVG plot with logarithmic axes, whose slopes are exponents."""
    smallest, largest = min(map(min, sizes.values())), max(map(max, sizes.values()))
    decades = range(math.floor(math.log10(smallest)), math.ceil(math.log10(largest)) + 1)
    x = Axis(math.log2(lengths[0]), math.log2(lengths[-1]), LEFT, WIDTH - RIGHT)
    y = Axis(decades[0], decades[-1], HEIGHT - BOTTOM, TOP)
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}"><style>{STYLE}</style>']
    parts.append(f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>')
    for decade in decades:
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(decade):.0f}" y2="{y(decade):.0f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y(decade) + 4:.0f}" text-anchor="end">{10**decade:,} MiB</text>')
    for length in lengths:
        position = f'x="{x(math.log2(length)):.0f}" y="{HEIGHT - BOTTOM + 18}"'
        parts.append(f'<text {position} text-anchor="middle">{length:,}</text>')
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">tokens on either side</text>'
    )
    for (path, row), color in zip(sizes.items(), COLORS * len(sizes), strict=False):
        points = [(x(math.log2(length)), y(math.log10(size))) for length, size in zip(lengths, row, strict=True)]
        polyline = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
        parts.append(f'<polyline points="{polyline}" stroke="{color}"/>')
        parts.append(
            f'<text x="{points[-1][0] + 6:.0f}" y="{points[-1][1] + 4:.0f}" style="fill:{color}">{path}</text>'
        )
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    run(main)
