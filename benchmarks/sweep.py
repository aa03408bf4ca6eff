"""Trains the rows of the paper's Table 3 on any data set, scaled to any base model; resumable.

    python -m benchmarks.sweep --table=3 --config=configs/demo.py [--config.SECTION.FIELD=VALUE …]
        [--rows=base,a-h1] [--seeds=3] [--output=runs/sweep] [--split=validation]

The config is the base model. Each row changes it as in the paper: sizes and updates by the same factor (big has three
times the updates), rates to the same value. Each row trains in a workdir under --output; interrupted rows are resumed
and finished ones reused. Prints params, perplexity and BLEU of each finished row with those of the paper, and whether
its difference to the base model has the same sign; writes table3.md, table3.json and table3.svg. With --seeds the base
model is trained that many times, and smaller differences than between those runs are called chance. Diverged rows are
listed below the table. Processes with different --rows may share --output; run the command again at the end for the
table of all rows. The last line of stdout is one JSON object.
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
from transformer.runtime.errors import DivergedError, UserError
from transformer.runtime.files import write_atomic
from transformer.runtime.logging import log_info

GROUPS = {"a": "A heads", "b": "B keys", "c": "C sizes", "d": "D rates", "e": "E places", "big": "big"}
Result = dict[str, Any]


def main(argv: list[str]) -> None:
    """Trains and scores what is not done yet; writes the table after each row."""
    parser = command_line.config_parser("python -m benchmarks.sweep", __doc__)
    parser.add_argument("--table", choices=["3"], default="3", help="of the paper")
    parser.add_argument("--rows", default="", help="names from configs/paper.py, commas between (default: all)")
    parser.add_argument("--seeds", type=command_line.positive_int, default=1, help="of the base model (default: 1)")
    parser.add_argument("--output", default="runs/sweep", type=command_line.absolute_path, help="folder of all rows")
    parser.add_argument("--split", default="validation", help="that is scored (default: validation, as in the paper)")
    base, args = command_line.parse_with_config(parser, argv)
    names = command_line.known_names("--rows", args.rows, ROWS) if args.rows else list(ROWS)
    output, results, diverged = epath.Path(args.output), {}, {}
    selected = [name for name in ROWS if name in names or result_path(output / name, args.split).exists()]
    rows = {name: row_config(base, name) for name in selected}
    for name, config in rows.items():
        try:
            results[name] = result(config, output / name, args.split)
        except DivergedError as error:
            log_info(f"row {name} diverged; continuing with the others: {error}")
            diverged[name] = {"diverged": str(error)}
        save(output, results, diverged)
    if args.seeds > 1 and "base" in results:
        results["base"]["spread"] = spread(rows["base"], results["base"], output, args.split, args.seeds)
        save(output, results, diverged)
    draw(output, results)
    print(table(results, diverged))
    log_info(f"table3.md, table3.json and table3.svg: {output}")
    print(json.dumps(results | diverged))


def save(output: epath.Path, results: dict[str, Result], diverged: dict[str, Result]) -> None:
    """Writes the table of the results so far."""
    write_atomic(output / "table3.json", json.dumps(results | diverged, indent=1) + "\n")
    write_atomic(output / "table3.md", table(results, diverged) + "\n")


def spread(base: Config, first: Result, output: epath.Path, split: str, seeds: int) -> Result:
    """The range of the figures of the base model over several seeds, of which the first is `first`."""
    runs = [first]
    for seed in range(base.train.seed + 1, base.train.seed + seeds):
        config = dataclasses.replace(base, train=dataclasses.replace(base.train, seed=seed))
        runs.append(result(config, output / f"base-seed{seed}", split))
    figures = {key: [run[key] for run in runs] for key in ("perplexity", "bleu")}
    return {"seeds": seeds, **{key: max(values) - min(values) for key, values in figures.items()}}


def row_config(base: Config, name: str) -> Config:
    """The config of a row: the base model, changed as in the paper.

    Raises:
      UserError: a scaled size is not an integer.
    """
    values, paper = dataclasses.asdict(base), dataclasses.asdict(Config())
    fields = dict(ROWS[name].fields)
    if "model.emb_dim" in fields:  # widths of keys and values follow, as in the paper
        fields["model.qkv_dim"] = fields["model.value_dim"] = fields["model.emb_dim"]
    for field, value in fields.items():
        section, _, key = field.partition(".")
        if type(value) is int:
            value = scaled(field, value, paper[section][key], values[section][key], name)
        values[section][key] = value
    return validation.validate(values)


def scaled(field: str, row_size: int, paper_base: int, base: int, name: str) -> int:
    """The size of a row: base · row_size / paper_base."""
    if base * row_size % paper_base:
        raise UserError(
            f"config.{field} = {base}: row {name} needs {row_size} / {paper_base} of it, which is not an integer; "
            "choose another base model, or leave the row out of --rows"
        )
    return base * row_size // paper_base


def result_path(workdir: epath.Path, split: str) -> epath.Path:
    """The file of a finished row with its result and config."""
    return workdir / f"result.{split}.json"


def result(config: Config, workdir: epath.Path, split: str) -> Result:
    """The result of a row: saved, or else of a new or resumed training.

    Raises:
      UserError: the saved result has another config.
    """
    path, config = result_path(workdir, split), schema.with_absolute_paths(config)
    if path.exists():
        saved = json.loads(path.read_text())
        if changes := schema.diff(validation.validate(saved["config"], strict=False), config):
            raise UserError(
                f"{path}: has another config: {'; '.join(map(str, changes))}. Choose another --output, or "
                "delete that folder"
            )
        return saved["found"]
    log_info(f"row {workdir.name}")

    from train import train
    from transformer.checkpoints.loading import load_checkpoint
    from transformer.evaluation import evaluator

    train(config, workdir)
    trained = load_checkpoint(workdir, "latest")
    dataset = evaluator.load_eval_dataset(config.data, split, None, None)
    evaluation = evaluator.CheckpointEvaluator(dataset).evaluate(trained)
    figures = {
        "params": trained.model.num_params(),
        "perplexity": evaluation.perplexity,
        "bleu": evaluation.scores["bleu"],
        "signature": evaluation.scores["bleu_signature"],
        "step": trained.step,
    }
    write_atomic(path, json.dumps({"found": figures, "config": dataclasses.asdict(config)}, indent=1) + "\n")
    return figures


def table(results: dict[str, Result], diverged: Iterable[str] = ()) -> str:
    """Our results and the paper's as Markdown; a row agrees if its difference to the base model has the same sign."""
    ours_and_paper = "perplexity", "the paper's", "agrees", "BLEU", "the paper's", "agrees"
    heads = "row", "params, M", "the paper's", *ours_and_paper
    rows = []
    for name, ours in results.items():
        row, millions = ROWS[name], ours["params"] / 1e6
        perplexity = f"{ours['perplexity']:.3f}", f"{row.perplexity:.2f}", agrees(results, name, "perplexity")
        bleu = f"{ours['bleu']:.1f}", f"{row.bleu:.1f}", agrees(results, name, "bleu")
        rows.append((name, f"{millions:.2f}", row.params or "", *perplexity, *bleu))
    lines = command_line.markdown_table(heads, rows)
    if ranges := results.get("base", {}).get("spread"):
        limits = f"{ranges['perplexity']:.3f} of perplexity and {ranges['bleu']:.1f} of BLEU"
        lines += ["", f"Chance: at most the range over {ranges['seeds']} seeds of the base model, {limits}."]
    if names := ", ".join(diverged):
        lines += ["", f"Diverged: {names}."]
    return "\n".join(lines)


def draw(output: epath.Path, results: dict[str, Result]) -> None:
    """Plots our losses by the paper's, with a line for each group; rising lines agree with the paper.

    Losses are in doublings of the base model's: those of small models on easy data differ by orders of magnitude.
    """
    if "base" not in results:
        return

    def doublings(perplexity: float, base_perplexity: float) -> float:
        return math.log2(math.log(perplexity) / math.log(base_perplexity))

    lines = {}
    for group, title in GROUPS.items():
        names = [name for name in results if name == "base" or name.partition("-")[0] == group]
        paper = [doublings(ROWS[name].perplexity, ROWS["base"].perplexity) for name in names]
        ours = [doublings(results[name]["perplexity"], results["base"]["perplexity"]) for name in names]
        lines[title] = sorted(zip(paper, ours, strict=True))
    title = "Rows of Table 3: loss in doublings of the base model's"
    plots.write(output / "table3.svg", title, "the same in the paper", lines, log=False)


def agrees(results: dict[str, Result], name: str, key: str) -> str:
    """Whether the difference to the base model has the paper's sign: yes, no, or chance.

    "" if the paper's difference, or ours, is 0.
    """
    paper = getattr(ROWS[name], key) - getattr(ROWS["base"], key)
    ours = results[name][key] - results["base"][key] if "base" in results else 0.0
    if not paper or not ours:
        return ""
    if abs(ours) <= results["base"].get("spread", {}).get(key, 0.0):
        return "chance"
    return "yes" if (paper > 0) == (ours > 0) else "no"


if __name__ == "__main__":
    command_line.reexec_with_huge_pages()
    command_line.run(main)
