"""Measures the paper's Table 1: attention, recurrence and convolution by depth, FLOPs, path length and speed.

    python -m benchmarks.parallelism [--lengths=16,32,…,4096] [--tokens=4096,…] [--width=128] [--program_only]
        [--families=attention,recurrent,convolutional] [--attention=plain] [--dtype=float32] [--output=runs/parallelism]

For one layer, from the compiled program: sequential depth, and FLOPs with loops counted by their trip counts; by
gradient: the longest path between two positions. For training of 1+1 layers of each family with about equal params,
and plain attention unless --attention names another: target tokens a second, temporary memory and compile time, for
each length and each number of tokens in a batch. Prints tables, and writes them with plots and parallelism.json to
--output. --program_only only compiles single layers. The last line of stdout is one JSON object.
"""

import bisect
import itertools
import json
import statistics
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from benchmarks import one_layer, plots, timing
from benchmarks.attention_memory import exponent
from benchmarks.flag_lists import distinct_numbers, known_names
from benchmarks.one_layer import FAMILIES, family_config
from transformer import command_line
from transformer.command_line import markdown_table, positive_int
from transformer.config import Config
from transformer.data.batching import Batch
from transformer.data.tokenizer import EOS, UNK
from transformer.models import registry
from transformer.runtime import errors
from transformer.runtime.files import write_atomic
from transformer.runtime.logging import log_info

RESULT = "parallelism.json"
VOCAB = 256
PATH_LENGTHS = (16, 32, 64, 128)  # for gradients between all pairs of positions
PATH_WIDTH = 16
MIN_SECONDS = 1.0  # of timed steps, of which the median counts
FORMULAS = {  # the paper's Table 1: work, sequential operations, longest path
    "attention": ("O(n² · d)", "O(1)", "O(1)"),
    "recurrent": ("O(n · d²)", "O(n)", "O(n)"),
    "convolutional": ("O(k · n · d²)", "O(1)", "O(log_k n)"),
}

Row = dict[str, Any]


def main(argv: list[str]) -> None:
    """Parses the flags, measures, writes and prints."""
    parser = command_line.command_parser("python -m benchmarks.parallelism", __doc__)
    parser.add_argument("--lengths", default="16,32,64,128,256,512,1024,2048,4096", help="tokens of a sentence")
    counts = "4096" if jax.default_backend() == "cpu" else "4096,16384,65536"
    parser.add_argument("--tokens", default=counts, help=f"of a batch, several with commas between (default: {counts})")
    parser.add_argument("--width", type=positive_int, default=128, help="of attention; others have as many params")
    parser.add_argument("--families", default=",".join(FAMILIES), help="to measure, commas between")
    parser.add_argument("--attention", default="plain", help="value of model.attention in training (default: plain)")
    parser.add_argument("--dtype", default="float32", help="float32 or bfloat16")
    parser.add_argument("--output", default="runs/parallelism", type=command_line.absolute_path, help="folder")
    parser.add_argument("--program_only", action="store_true", help="compile single layers, train nothing")
    args = parser.parse_args(argv[1:])
    lengths = distinct_numbers("--lengths", args.lengths, least=2)
    families = known_names("--families", args.families, FAMILIES)
    output = epath.Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    results: Row = {"device": str(jax.devices()[0].device_kind), "width": args.width, "lengths": lengths}
    results["layer"] = {family: layer_figures(family, args.width, lengths) for family in families}
    log_info("\n".join(table_1(results["layer"])))
    if not args.program_only:
        other = {"dtype": args.dtype, "attention": args.attention}
        configs = {family: equal_config(family, args.width, **other) for family in families}
        results["params"] = {family: params(config) for family, config in configs.items()}
        results["training"] = []
        for tokens, length in itertools.product(distinct_numbers("--tokens", args.tokens), lengths):
            results["training"] += measure_families(configs, length, tokens)
            write_atomic(output / RESULT, json.dumps(results, indent=1) + "\n")
        log_info("\n".join(["", *training_table(results["training"])]))
    write_atomic(output / RESULT, json.dumps(results, indent=1) + "\n")
    draw(output, results)
    log_info(f"plots and {RESULT}: {output}")
    print(json.dumps(results))


def layer_figures(family: str, width: int, lengths: Sequence[int]) -> Row:
    """Depth, FLOPs and path length of one layer at each length, and their growth exponents.

    Always compiled for a CPU: a GPU's compiler uses library calls for products, which cannot be counted.
    """
    log_info(f"{family}: compiling a layer for each length")
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        whole = [one_layer.layer_program(family, width, length) for length in lengths]
        core = [one_layer.core_program(family, width, length) for length in lengths]
        figures: Row = {
            "depth": [one_layer.depth(program) for program in whole],
            "flops": [one_layer.flops(program) for program in whole],
            "core_flops": [one_layer.flops(program) for program in core],
            "path_lengths": list(PATH_LENGTHS),
            "path": [one_layer.path_length(family, PATH_WIDTH, length) for length in PATH_LENGTHS],
        }
    for name, over in (("depth", lengths), ("flops", lengths), ("core_flops", lengths), ("path", PATH_LENGTHS)):
        figures[f"{name}_exponent"] = round(exponent(over, figures[name]), 3)
    return figures


def equal_config(family: str, width: int, dtype: str = "float32", attention: str = "plain") -> Config:
    """1+1 layers of a family, with the width whose params are closest to those of attention of the given width."""

    def config(width: int) -> Config:
        return family_config(family, width, dtype, attention)

    if family == "attention":
        return config(width)
    target = params(family_config("attention", width))
    number = bisect.bisect_left(range(width), target, lo=1, key=lambda number: params(config(8 * number)))
    candidates = [config(8 * n) for n in (max(number - 1, 1), number)]
    return min(candidates, key=lambda candidate: abs(params(candidate) - target))


def params(config: Config) -> int:
    """The number of params of the model."""
    return registry.ModelDef(config.model, VOCAB).num_params()


def measure_families(configs: dict[str, Config], length: int, tokens: int) -> list[Row]:
    """Measures each family at one batch shape; skips shapes without a row or too large for the memory."""
    if tokens < length:
        return []
    rows = []
    for family, config in configs.items():
        log_info(f"{family}: training on {tokens // length} x {length} tokens")
        try:
            figures = measure(config, tokens // length, length)
        except jax.errors.JaxRuntimeError as error:
            if not errors.is_out_of_memory(error):
                raise
            log_info("out of memory: skipped")
            continue
        rows.append({"family": family, "length": length, "tokens": tokens, **figures})
    return rows


def measure(config: Config, rows: int, length: int) -> Row:
    """Compiles one update for a batch of full sentences, and times it."""
    ids = np.random.default_rng(0).integers(UNK + 1, VOCAB, (rows, length), np.int32)
    ids[:, -1] = EOS
    update = timing.compile_update(config, VOCAB, Batch(ids, ids))
    times: list[float] = []
    while sum(times) < MIN_SECONDS or len(times) < 3:
        times.append(timing.seconds_of(update.run))
    return {
        "target_tokens_per_s": round(rows * length / statistics.median(times)),
        "step_ms": round(1000 * statistics.median(times), 2),
        "temporary_mb": round(update.program.memory_analysis().temp_size_in_bytes / 2**20, 1),
        "compile_s": round(update.compile_s, 2),
    }


def table_1(layers: dict[str, Row]) -> list[str]:
    """The paper's formulas and the measured exponents p of n^p."""
    heads = "layer", "work", "n^p, whole layer", "position mixing", "sequential", "n^p", "path", "n^p"
    rows = []
    for family, row in layers.items():
        work, sequential, path = FORMULAS[family]
        whole, mixing, depth, longest = (
            f"{row[f'{key}_exponent']:.2f}" for key in ("flops", "core_flops", "depth", "path")
        )
        rows.append((family, work, whole, mixing, sequential, depth, path, longest))
    note = "O(log_k n) takes dilated convolutions; these are not, and need n / (k - 1) · 2 layers."
    return [*markdown_table(heads, rows), note]


def training_table(rows: Sequence[Row]) -> list[str]:
    """The results of training by family and batch shape."""
    names = ("length", "tokens", "target_tokens_per_s", "step_ms", "temporary_mb", "compile_s")
    return markdown_table(("family", *names), ((row["family"], *(f"{row[name]:,}" for name in names)) for row in rows))


def draw(output: epath.Path, results: Row) -> None:
    """Writes a plot for each figure; those of training by length at the largest batch, and by tokens of a batch.

    The latter, where there are several, at the shortest length.
    """
    lengths, layers = results["lengths"], results["layer"]
    for name, title, over in (
        ("depth", "Sequential steps of one layer", lengths),
        ("core_flops", "FLOPs of position mixing", lengths),
        ("path", "Operations from the first position to the last", PATH_LENGTHS),
    ):
        by_length = {family: zip(over, row[name], strict=True) for family, row in layers.items()}
        plots.write(output / f"{name}.svg", title, "length", by_length)
    rows = results.get("training", [])
    most, shortest = max((row["tokens"] for row in rows), default=0), min((row["length"] for row in rows), default=0)
    axes = [("length", "length", [row for row in rows if row["tokens"] == most])]
    if len({row["tokens"] for row in rows}) > 1:
        axes.append(("tokens", "tokens of a batch", [row for row in rows if row["length"] == shortest]))
    for name, title in (
        ("target_tokens_per_s", "Training, target tokens a second"),
        ("temporary_mb", "Temporary memory of the step, MiB"),
        ("compile_s", "Time to compile the step, s"),
    ):
        for axis, label, points in axes:
            lines = {f: [(r[axis], r[name]) for r in points if r["family"] == f] for f in layers}
            plots.write(output / f"{name}.{axis}.svg", title, label, lines)


if __name__ == "__main__":
    command_line.reexec_with_malloc_settings()
    command_line.run(main)
