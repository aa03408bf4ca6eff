"""The rows of the paper's Table 3 with its results: sizes and updates scaled to the base, rates as they are.

    python -m benchmarks.ablation --config=configs/paper_cldr.py --changes=benchmarks/changes/table3.py
        --split=validation --output=runs/table3

The base is the model that stands for the paper's. Big has three times the updates. With --seeds=3 --only=base first, a
difference within the interval of the base is called chance.
"""

import dataclasses
from typing import Any

from configs.paper import ROWS
from transformer.config import Config


def get_changes(base: Config) -> dict[str, dict[str, Any]]:
    """A change for each row."""
    return {
        name: {**scale(row.fields, base), "published": {"perplexity": row.perplexity, "bleu": row.bleu}}
        for name, row in ROWS.items()
    }


def scale(fields: dict[str, Any], base: Config) -> dict[str, Any]:
    """The fields of a row, whole numbers times base / paper's base.

    Raises:
      ValueError: a scaled size is not an integer.
    """
    values, paper = dataclasses.asdict(base), dataclasses.asdict(Config())
    scaled = dict(fields)
    if "model.emb_dim" in fields:  # widths of keys and values follow, as in the paper
        scaled["model.qkv_dim"] = scaled["model.value_dim"] = fields["model.emb_dim"]
    for field, value in scaled.items():
        section, _, key = field.partition(".")
        if type(value) is int:
            scaled[field], rest = divmod(values[section][key] * value, paper[section][key])
            if rest:
                raise ValueError(
                    f"{field} = {values[section][key]}: a row needs {value} / {paper[section][key]} of it, which is "
                    "not an integer; choose another base, such as configs/paper_cldr.py"
                )
    return scaled
