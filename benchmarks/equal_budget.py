"""Compares the three model families at an equal budget: BLEU by time and by tokens; resumable.

    python -m benchmarks.equal_budget --config.data.dir=FOLDER [--config=configs/multi30k_families.py]
        [--families=attention,recurrent,convolutional] [--output=runs/families] [--split=test_2016_flickr]

Trains CONFIG:FAMILY in a workdir each under --output; resumes interrupted runs and reuses finished ones. Prints a
table, and writes it with two plots and equal_budget.json to --output. Hours are those of training on this machine,
without validation. The last line of stdout is one JSON object.
"""

import json
from typing import Any

from etils import epath

from benchmarks import plots, sweep
from transformer import command_line
from transformer.runtime.files import METRICS_FILE, write_atomic

FAMILIES = ("attention", "recurrent", "convolutional")
Row = dict[str, Any]


def main(argv: list[str]) -> None:
    """Trains and scores the families that are not finished."""
    parser = command_line.command_parser("python -m benchmarks.equal_budget", __doc__)
    parser.add_argument("--config", default="configs/multi30k_families.py", help="file that takes :FAMILY")
    parser.add_argument("--families", default=",".join(FAMILIES), help="commas between")
    parser.add_argument("--output", default="runs/families", type=command_line.absolute_path, help="folder of all")
    parser.add_argument("--split", default="test_2016_flickr", help="that is scored at the end")
    config_flags, rest = command_line.split_flags(argv[1:], "config")
    fields = [flag for flag in config_flags if not flag.startswith("--config=")]
    args = parser.parse_args([*rest, *(flag for flag in config_flags if flag not in fields)])
    output, results = epath.Path(args.output), {}
    for family in command_line.known_names("--families", args.families, FAMILIES):
        config, _ = command_line.config_flags([argv[0], f"--config={args.config}:{family}", *fields])
        row = sweep.result(config, output / family, args.split)
        results[family] = {**row, "curve": curve((output / family / METRICS_FILE).read_text())}
        write_atomic(output / "equal_budget.json", json.dumps(results, indent=1) + "\n")
    write_atomic(output / "equal_budget.md", table(results) + "\n")
    for axis, label in (
        ("minutes", "minutes of training, compilation included"),
        ("tokens", "target tokens trained on"),
    ):
        lines = {name: [(p[axis], p["bleu"]) for p in row["curve"]] for name, row in results.items()}
        plots.write(output / f"bleu_by_{axis}.svg", "Validation BLEU", label, lines, log=False)
    print(table(results))
    print(json.dumps(results))


def curve(metrics: str) -> list[Row]:
    """BLEU, loss and the cost of training so far, for each validation."""
    rows = [json.loads(line) for line in metrics.splitlines()]
    return [
        {
            "step": row["step"],
            "bleu": row["valid/bleu"],
            "loss": row["valid/loss"],
            "tokens": row["train/tokens"],
            "minutes": 60 * row["train/hours"],
            "flops": row["train/flops"],
        }
        for row in rows
        if "valid/bleu" in row
    ]


def table(results: dict[str, Row]) -> str:
    """The results as Markdown."""
    heads = ("family", "params", "test BLEU", "perplexity", "target tokens", "FLOPs", "minutes", "tokens/s")
    rows = []
    for family, row in results.items():
        last = row["curve"][-1]
        rate = last["tokens"] / max(60 * last["minutes"], 1e-9)
        quality = f"{row['bleu']:.1f}", f"{row['perplexity']:.2f}"
        cost = f"{last['tokens']:,.0f}", f"{last['flops']:.1e}", f"{last['minutes']:.1f}", f"{rate:,.0f}"
        rows.append((family, f"{row['params']:,}", *quality, *cost))
    return "\n".join(command_line.markdown_table(heads, rows))


if __name__ == "__main__":
    command_line.reexec_with_huge_pages()
    command_line.run(main)
