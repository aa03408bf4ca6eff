"""Measures the memory of the compiled training step by length, for each attention implementation.

    python -m benchmarks.attention_memory [--topology=cpu:8] [--paths=plain,blockwise,ring:2,ring:4,ring:8,splash]
        [--lengths=1024,4096,16384,65536] [--plot=FILE.svg]

Nothing is run: the compiler reports the size of temporary arrays on each device, for one row of that many source and
target tokens, 2+2 layers of width 64 and 4 heads. ring:8 is a ring of 8 devices. splash needs a TPU topology, such
as v5e:2x4, and its compiler (`make tpu-compiler`). The last line of stdout is one JSON object.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks import plots
from benchmarks.flag_lists import distinct_numbers
from transformer.command_line import absolute_path, command_parser, markdown_table, run
from transformer.config import Config, validation
from transformer.plan import set_environment
from transformer.planning.hardware import Topology, parse_topology
from transformer.runtime.errors import UserError
from transformer.runtime.logging import log_info

VOCAB = 256
EFFORT = -1.0  # of the compiler, as in `plan`


def main(argv: list[str]) -> None:
    """Parses the flags, compiles and prints."""
    parser = command_parser("python -m benchmarks.attention_memory", __doc__)
    parser.add_argument("--topology", default="cpu:8", help="chips to compile for, as in transformer.plan")
    parser.add_argument(
        "--paths",
        default="plain,blockwise,ring:2,ring:4,ring:8",
        help="values of model.attention; ring:N over N devices",
    )
    parser.add_argument("--lengths", default="1024,4096,16384,65536", help="tokens of a row on either side")
    parser.add_argument("--plot", type=absolute_path, metavar="FILE.svg", help="also draw a plot")
    args = parser.parse_args(argv[1:])
    lengths, paths = distinct_numbers("--lengths", args.lengths, least=2), args.paths.split(",")
    topology = parse_topology(args.topology)
    for path in paths:
        small_model(path)
    set_environment([topology])
    table: dict[str, Any] = {"topology": topology.name, "lengths": lengths}
    for path in paths:
        table[path] = [temporary_mb(path, length, topology) for length in lengths]
        table[f"{path}_exponent"] = round(exponent(lengths[-2:], table[path][-2:]), 2)
    rows = [(f"{length:,}", *(f"{table[path][i]:,}" for path in paths)) for i, length in enumerate(lengths)]
    rows.append(("growth exponent at the end", *(str(table[f"{path}_exponent"]) for path in paths)))
    log_info("\n".join(markdown_table(["tokens", *(f"{path}, MiB" for path in paths)], rows)))
    if args.plot:
        lines = {path: zip(lengths, table[path], strict=True) for path in paths}
        plots.write(args.plot, "Temporary memory of the step, MiB", "tokens on either side", lines)
    print(json.dumps(table))


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


def exponent(lengths: Sequence[int], values: Sequence[float]) -> float:
    """p of value ∝ length^p, by least squares."""
    return float(np.polyfit(np.log(lengths), np.log(values), 1)[0])


if __name__ == "__main__":
    run(main)
