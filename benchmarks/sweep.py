"""The rows of the paper's Table 3 on any data set, scaled to any base model; resumable.

    python -m benchmarks.sweep --table=3 --config=configs/demo.py [--config.SECTION.FIELD=VALUE …]
        [--rows=base,a-h1] [--seeds=3] [--output=runs/sweep] [--split=validation]

The config is the base model; each row changes it as the paper's row changes the paper's base model: sizes by the same
factor, rates to the same value, updates too (big has three times as many). Each row trains in a workdir of its own
under --output, where a row that was begun goes on and one that is done is only read. Prints each row that is done
there with its params, perplexity and BLEU, the paper's, and whether it came out on the same side of the base model,
and writes table3.md, table3.json and table3.svg. With --seeds the base model is trained so often, and what is no more
than those runs differ by is called chance. A row that diverges is named below the table, and the others go on. Two
processes with other --rows may share --output; the command once more, when both are done, makes the table of all. The
last line of stdout is one JSON object.
"""

import dataclasses
import json
import math
from collections.abc import Iterable
from typing import Any

from etils import epath

from benchmarks import plots
from configs.paper import ROWS
from transformer import command_line
from transformer.config import Config, schema, validation
from transformer.evaluation.charts import Series
from transformer.runtime.errors import DivergedError, UserError
from transformer.runtime.files import write_atomic
from transformer.runtime.logging import log_info

GROUPS = {"a": "A heads", "b": "B keys", "c": "C sizes", "d": "D rates", "e": "E places", "big": "big"}
Found = dict[str, Any]


def main(argv: list[str]) -> None:
    """Trains and scores what is not done yet; writes the table after each row."""
    parser = command_line.config_parser("python -m benchmarks.sweep", __doc__)
    parser.add_argument("--table", choices=["3"], default="3", help="of the paper")
    parser.add_argument("--rows", default="", help="names from configs/paper.py, commas between (default: all)")
    parser.add_argument("--seeds", type=command_line.positive_int, default=1, help="of the base model (default: 1)")
    parser.add_argument("--output", default="runs/sweep", type=command_line.absolute_path, help="folder of all rows")
    parser.add_argument("--split", default="validation", help="that is scored (default: validation, as in the paper)")
    base, args = command_line.parse_with_config(parser, argv)
    names = args.rows.split(",") if args.rows else list(ROWS)
    unknown = [name for name in names if name not in ROWS]
    if unknown:
        raise UserError(f"--rows: expected some of {', '.join(ROWS)}, got {unknown[0]!r}")
    output, found, diverged = epath.Path(args.output), {}, {}
    wanted = [name for name in ROWS if name in names or result_path(output / name, args.split).exists()]
    rows = {name: row_config(base, name) for name in wanted}
    for name, config in rows.items():
        try:
            found[name] = result(config, output / name, args.split)
        except DivergedError as error:
            log_info(f"row {name} diverged, the others go on: {error}")
            diverged[name] = {"diverged": str(error)}
        keep(output, found, diverged)
    if args.seeds > 1 and "base" in found:
        found["base"]["spread"] = spread(rows["base"], found["base"], output, args.split, args.seeds)
        keep(output, found, diverged)
    draw(output, found)
    print(table(found, diverged))
    log_info(f"table3.md, table3.json and table3.svg: {output}")
    print(json.dumps(found | diverged))


def keep(output: epath.Path, found: dict[str, Found], diverged: dict[str, Found]) -> None:
    """Writes what there is so far."""
    write_atomic(output / "table3.json", json.dumps(found | diverged, indent=1) + "\n")
    write_atomic(output / "table3.md", table(found, diverged) + "\n")


def spread(base: Config, first: Found, output: epath.Path, split: str, seeds: int) -> Found:
    """How far apart the figures of the base model lie with so many seeds, the first of which is done."""
    runs = [first]
    for seed in range(base.train.seed + 1, base.train.seed + seeds):
        config = dataclasses.replace(base, train=dataclasses.replace(base.train, seed=seed))
        runs.append(result(config, output / f"base-seed{seed}", split))
    figures = {key: [run[key] for run in runs] for key in ("perplexity", "bleu")}
    return {"seeds": seeds, **{key: max(values) - min(values) for key, values in figures.items()}}


def row_config(base: Config, name: str) -> Config:
    """The base model changed as a row of the table changes the paper's.

    Raises:
      UserError: a size that the row asks for is no whole number.
    """
    values = dataclasses.asdict(base)
    paper: dict[str, Any] = dataclasses.asdict(Config())
    changes: dict[str, Any] = {}
    for field, wanted in ROWS[name].fields.items():
        section, _, key = field.partition(".")
        if type(wanted) is int:
            changes[field] = scaled(field, wanted, paper[section][key], values[section][key], name)
        else:
            changes[field] = wanted
    if "model.emb_dim" in changes:  # widths of keys and values follow, as in the paper
        for key in ("qkv_dim", "value_dim"):
            wanted = ROWS[name].fields["model.emb_dim"]
            changes[f"model.{key}"] = scaled(key, wanted, paper["model"]["emb_dim"], values["model"][key], name)
    for field, value in changes.items():
        section, _, key = field.partition(".")
        values[section][key] = value
    return validation.validate(values)


def scaled(field: str, wanted: int, paper: int, own: int, name: str) -> int:
    """What the row makes of our own size: own · wanted / paper."""
    if own * wanted % paper:
        raise UserError(
            f"config.{field} = {own}: row {name} asks for {wanted} / {paper} of it, which is no whole number; choose "
            "another base model, or leave the row out of --rows"
        )
    return own * wanted // paper


def result_path(workdir: epath.Path, split: str) -> epath.Path:
    """Where a row that is done keeps what it came to, and by which config."""
    return workdir / f"result.{split}.json"


def result(config: Config, workdir: epath.Path, split: str) -> Found:
    """What a row came to: read where it was found before, else trained for, or gone on with.

    Raises:
      UserError: it was found before by another config.
    """
    path, config = result_path(workdir, split), schema.with_absolute_paths(config)
    if path.exists():
        kept = json.loads(path.read_text())
        if changes := schema.diff(validation.validate(kept["config"], strict=False), config):
            raise UserError(
                f"{path}: found with another config: {'; '.join(map(str, changes))}. Choose another --output, or "
                "delete that folder"
            )
        return kept["found"]
    log_info(f"row {workdir.name}")

    from train import train
    from transformer.checkpoints.loading import load_checkpoint
    from transformer.evaluation import evaluator

    train(config, workdir)
    trained = load_checkpoint(workdir, "latest")
    dataset = evaluator.load_eval_dataset(config.data, split, None, None)
    result = evaluator.CheckpointEvaluator(dataset).evaluate(trained)
    found = {
        "params": trained.model.num_params(),
        "perplexity": result.perplexity,
        "bleu": result.scores["bleu"],
        "signature": result.scores["bleu_signature"],
        "step": trained.step,
    }
    write_atomic(path, json.dumps({"found": found, "config": dataclasses.asdict(config)}, indent=1) + "\n")
    return found


def table(found: dict[str, Found], diverged: Iterable[str] = ()) -> str:
    """Markdown: ours beside the paper's; a difference to the base model agrees if it has the paper's sign."""
    lines = [
        "| row | params, M | the paper's | perplexity | the paper's | agrees | BLEU | the paper's | agrees |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, ours in found.items():
        row, millions = ROWS[name], ours["params"] / 1e6
        agree = [agrees(found, name, key) for key in ("perplexity", "bleu")]
        lines.append(
            f"| {name} | {millions:.2f} | {row.params or ''} | {ours['perplexity']:.3f} | {row.perplexity:.2f} "
            f"| {agree[0]} | {ours['bleu']:.1f} | {row.bleu:.1f} | {agree[1]} |"
        )
    if apart := found.get("base", {}).get("spread"):
        within = f"{apart['perplexity']:.3f} of perplexity and {apart['bleu']:.1f} of BLEU"
        lines += ["", f"Chance: no more than {apart['seeds']} seeds of the base model differ by, {within}."]
    if names := ", ".join(diverged):
        lines += ["", f"Diverged: {names}."]
    return "\n".join(lines)


def draw(output: epath.Path, found: dict[str, Found]) -> None:
    """Losses by the paper's, a line for each group through the base model at 0, 0: one that rises agrees.

    They are drawn as doublings of the base model's: of small models on easy data they lie orders of magnitude apart.
    """
    if "base" not in found:
        return

    def doublings(perplexity: float, of_base: float) -> float:
        return math.log2(math.log(perplexity) / math.log(of_base))

    lines = []
    for group, title in GROUPS.items():
        names = [name for name in found if name == "base" or name.partition("-")[0] == group]
        theirs = [doublings(ROWS[name].perplexity, ROWS["base"].perplexity) for name in names]
        ours = [doublings(found[name]["perplexity"], found["base"]["perplexity"]) for name in names]
        lines.append(Series(title, sorted(zip(theirs, ours, strict=True)), True))
    title = "Rows of Table 3: loss in doublings of the base model's"
    plots.write(output / "table3.svg", title, "the same in the paper", lines, log=False)


def agrees(found: dict[str, Found], name: str, key: str) -> str:
    """Whether a row lies on the same side of the base model as in the paper: yes, no, or a difference by chance.

    Empty where the paper's rows, or ours, are equal.
    """
    base, theirs = ROWS["base"], ROWS[name]
    paper = getattr(theirs, key) - getattr(base, key)
    ours = found[name][key] - found["base"][key] if "base" in found else 0.0
    if not paper or not ours:
        return ""
    if abs(ours) <= found["base"].get("spread", {}).get(key, 0.0):
        return "chance"
    return "yes" if (paper > 0) == (ours > 0) else "no"


if __name__ == "__main__":
    command_line.reexec_with_huge_pages()
    command_line.run(main)
