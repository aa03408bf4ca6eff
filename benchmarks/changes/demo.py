"""Six ideas since 2017, each alone, in short runs of configs/demo.py.

    python -m benchmarks.ablation --config=configs/demo.py --changes=benchmarks/changes/demo.py --seeds=2
        --output=runs/ablation

300 updates make about a minute and a half of a run on two cores; after so few, a difference is one of learning speed.
"""

from typing import Any

from transformer.config import Config


def get_changes(base: Config) -> dict[str, dict[str, Any]]:
    """Fields that differ from configs/demo.py; those of `base` apply to every run."""
    return {
        "base": {
            "train.num_steps": 300,
            "train.batch_tokens": 2048,
            "optimizer.warmup_steps": 100,
            "train.log_every_steps": 20,
            "train.eval_every_steps": 150,
            "train.checkpoint_every_steps": 50,
            "eval.validation_sentences": 200,
            "eval.validation_beam_size": 1,
        },
        "pre-norm": {"model.norm": "pre", "comment": "Xiong et al. 2020"},
        "rms": {"model.norm_type": "rms", "comment": "Zhang & Sennrich 2019"},
        "swiglu": {
            "model.activation": "swiglu",
            "model.mlp_dim": round(base.model.mlp_dim * 2 / 3 / 8) * 8,
            "comment": "Shazeer 2020; the width that has about the params and FLOPs of the base",
        },
        "rotary": {"model.positions": "rotary", "comment": "Su et al. 2021"},
        "rdrop": {
            "train.consistency": "rdrop",
            "train.consistency_weight": 5.0,
            "comment": "Liang et al. 2021; an update costs twice as much",
        },
        "muon": {"optimizer.name": "muon", "comment": "Jordan et al. 2024"},
    }
