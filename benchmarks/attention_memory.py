"""Memory of the compiled training step against length, for each way to attend.

    python -m benchmarks.attention_memory [--paths=plain,blockwise] [--lengths=1024,2048,4096,8192,16384]

Nothing is run: XLA tells the size of the temporary arrays of the step that it compiles. One row of that many
source and target tokens, 2+2 layers of width 64, 4 heads. The last line of stdout is one JSON object.
"""

import argparse
import json
import math
import sys
from typing import Any

import jax
import jax.numpy as jnp

from transformer import sharding, step, validation
from transformer.batching import Batch
from transformer.command_line import run, say
from transformer.config import Config
from transformer.errors import UserError

VOCAB = 256


def main(argv: list[str]) -> None:
    """Reads the flags, compiles, prints."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attention_memory", allow_abbrev=False)
    parser.add_argument("--paths", default="plain,blockwise", help="values of model.attention")
    parser.add_argument("--lengths", default="1024,2048,4096,8192,16384", help="tokens of a row on either side")
    args = parser.parse_args(argv[1:])
    lengths = two_or_more(args.lengths)
    table: dict[str, Any] = {"lengths": lengths}
    for path in args.paths.split(","):
        table[path] = [temporary_mb(path, length) for length in lengths]
        table[f"{path}_exponent"] = round(growth(lengths, table[path]), 2)
    show(table)
    print(json.dumps(table))


def two_or_more(text: str) -> list[int]:
    """Different lengths, ascending: growth needs two."""
    words = text.split(",")
    lengths = sorted({int(word) for word in words if word.strip().isdecimal() and int(word)})
    if len(lengths) < max(len(words), 2):
        raise UserError(f"--lengths: expected at least two different numbers with commas between, got {text!r}")
    return lengths


def temporary_mb(path: str, length: int) -> float:
    """MiB of temporary arrays of one update on one device."""
    config = small_model(path)
    mesh = sharding.make_mesh(config.mesh)
    model = step.Model(config.model, VOCAB)
    row = jax.ShapeDtypeStruct((1, length), jnp.int32)
    update = step.make_train_step(model, config, mesh)
    compiled = update.lower(step.abstract_state(model, config, mesh), Batch(row, row)).compile()  # type: ignore[attr-defined]
    found = round(compiled.memory_analysis().temp_size_in_bytes / 2**20, 1)
    say(f"{path}, {length:,} tokens: {found:,} MiB")
    return found


def small_model(path: str) -> Config:
    """2+2 layers of width 64 without dropout."""
    model = {"num_layers": 2, "emb_dim": 64, "qkv_dim": 64, "value_dim": 64, "mlp_dim": 128, "num_heads": 4}
    return validation.resolve({"model": {**model, "dropout_rate": 0.0, "attention": path}, "mesh": {"data": 1}})


def growth(lengths: list[int], sizes: list[float]) -> float:
    """The exponent p of size ∝ length^p between the two longest."""
    return math.log(sizes[-1] / sizes[-2]) / math.log(lengths[-1] / lengths[-2])


def show(table: dict[str, Any]) -> None:
    """For people, on stderr."""
    paths = [name for name in table if f"{name}_exponent" in table]
    print("| tokens | " + " | ".join(f"{path}, MiB" for path in paths) + " |", file=sys.stderr)
    print("|---|" + "---|" * len(paths), file=sys.stderr)
    for i, length in enumerate(table["lengths"]):
        print(f"| {length:,} | " + " | ".join(f"{table[path][i]:,}" for path in paths) + " |", file=sys.stderr)
    exponents = " | ".join(str(table[f"{path}_exponent"]) for path in paths)
    print(f"| growth exponent at the end | {exponents} |", file=sys.stderr)


if __name__ == "__main__":
    run(main)
