"""Learning rates around that of any base: a quarter, a half, twice and four times as high.

    python -m benchmarks.ablation --config=configs/demo.py --changes=benchmarks/changes/learning_rate.py
        --split=validation --output=runs/learning_rate

The validation split decides, not the test split that is reported later.
"""

from typing import Any

from transformer.config import Config

FACTORS = (0.25, 0.5, 2.0, 4.0)


def get_changes(base: Config) -> dict[str, dict[str, Any]]:
    """A change for each factor."""
    return {
        f"rate-x{factor:g}": {"optimizer.learning_rate": factor * base.optimizer.learning_rate} for factor in FACTORS
    }
