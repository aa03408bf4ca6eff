"""Fourteen ideas beyond the paper's, each alone, and the paper's recipe, at half the updates of configs/multi30k.py.

    python -m benchmarks.ablation --config=configs/multi30k.py --changes=benchmarks/changes/modern.py
        --config.data.dir=FOLDER --split=validation --output=runs/modern

The schedule ends with the run. Sizes keep the number of params within 1%; rates are those of the base.
"""

from typing import Any

from transformer.config import Config


def get_changes(base: Config) -> dict[str, dict[str, Any]]:
    """The paper's recipe, and one idea a change."""
    gated = {"model.mlp_dim": round(base.model.mlp_dim * 2 / 3 / 8) * 8}  # three matrices in place of two
    return {
        "base": {
            "train.num_steps": 4000,
            "optimizer.warmup_steps": 500,
            "train.checkpoint_every_steps": 500,
            "train.keep_last": 1,
            "eval.validation_beam_size": 1,
        },
        "paper": {
            "model.norm": "post",
            "model.dropout_rate": 0.1,
            "optimizer.schedule": "paper",
            "optimizer.learning_rate": 1.0,
            "comment": "norm, dropout and schedule of Vaswani et al. 2017",
        },
        "rms": {"model.norm_type": "rms", "comment": "Zhang & Sennrich 2019"},
        "swiglu": {"model.activation": "swiglu", **gated, "comment": "Shazeer 2020"},
        "geglu": {"model.activation": "geglu", **gated, "comment": "Shazeer 2020"},
        "rotary": {"model.positions": "rotary", "comment": "Su et al. 2021"},
        "qk-norm": {"model.qk_norm": True, "comment": "Henry et al. 2020, Dehghani et al. 2023"},
        "deep-encoder": {
            "model.encoder_layers": 7,
            "model.decoder_layers": 2,
            "comment": "Kasai et al. 2021; as many params as 4+4 layers",
        },
        "simcut": {"train.consistency": "simcut", "comment": "Gao et al. 2022; an update costs twice as much"},
        "rdrop": {
            "train.consistency": "rdrop",
            "train.consistency_weight": 5.0,
            "comment": "Liang et al. 2021; an update costs twice as much",
        },
        "subword-dropout": {"data.subword_dropout": 0.1, "comment": "BPE-dropout, Provilkov et al. 2020"},
        "muon": {"optimizer.name": "muon", "comment": "Jordan et al. 2024"},
        "schedule-free": {
            "optimizer.name": "schedule_free_adamw",
            "optimizer.schedule": "constant",
            "comment": "Defazio et al. 2024",
        },
        "nadamw": {"optimizer.name": "nadamw", "optimizer.weight_decay": 0.01, "comment": "Dozat 2016"},
        "wsd": {"optimizer.schedule": "wsd", "optimizer.decay_fraction": 0.2, "comment": "Hu et al. 2024"},
        "ema": {"train.ema_decay": 0.999, "comment": "moving average of the params"},
    }
