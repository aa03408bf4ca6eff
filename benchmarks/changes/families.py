"""LSTM and convolution in place of attention, with as many params: the sizes of configs/multi30k_families.py.

    python -m benchmarks.ablation --config=configs/multi30k_families.py --changes=benchmarks/changes/families.py
        --config.data.dir=FOLDER --split=test_2016_flickr --output=runs/families

The base is attention.
"""

from typing import Any

from configs.multi30k_families import SIZES
from transformer.config import Config


def get_changes(base: Config) -> dict[str, dict[str, Any]]:
    """The other families."""
    return {
        family: {"model.family": family, **{f"model.{field}": size for field, size in sizes.items()}}
        for family, sizes in SIZES.items()
        if family != base.model.family
    }
