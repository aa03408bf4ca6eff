"""Changes of modern.py and combinations of them at full length: all updates of configs/multi30k.py.

    python -m benchmarks.ablation --config=configs/multi30k.py --changes=benchmarks/changes/modern_full_length.py
        --config.data.dir=FOLDER --split=validation --output=runs/modern_full_length

Shows whether a ranking at half the schedule holds, and what a regularizer that needs more updates gives.
"""

from typing import Any

from benchmarks.changes import modern
from transformer.config import Config


def get_changes(base: Config) -> dict[str, dict[str, Any]]:
    """The paper's recipe, the best changes of half the schedule, and regularizers with the best."""
    changes = modern.get_changes(base)
    return {
        "base": {"eval.validation_beam_size": 1},
        "paper": changes["paper"],
        "rotary": changes["rotary"],
        "rotary-rms-swiglu": changes["rotary"] | changes["rms"] | changes["swiglu"] | {"comment": "the best three"},
        "rotary-dropout0.3": changes["rotary"] | {"model.dropout_rate": 0.3, "comment": "0.2 in the base"},
        "rotary-simcut": changes["rotary"] | changes["simcut"],
    }
