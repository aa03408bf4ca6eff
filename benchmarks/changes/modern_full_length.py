"""Changes of modern.py and combinations of them at full length: all updates of configs/multi30k.py.

    python -m benchmarks.ablation --config=configs/multi30k.py --changes=benchmarks/changes/modern_full_length.py
        --config.data.dir=FOLDER --split=validation --output=runs/modern_full_length

A regularizer that needs more updates than half of the schedule is judged here.
"""

from typing import Any

from transformer.config import Config


def get_changes(base: Config) -> dict[str, dict[str, Any]]:
    """The best change of half the schedule, and SimCut with it."""
    return {
        "base": {"eval.validation_beam_size": 1},
        "rotary": {"model.positions": "rotary", "comment": "Su et al. 2021"},
        "rotary-simcut": {
            "model.positions": "rotary",
            "train.consistency": "simcut",
            "comment": "Gao et al. 2022; an update costs twice as much",
        },
    }
