"""LSTM, convolution and attention at an equal budget: 1.8M params and 10 epochs of Multi30k, English to German.

    python -m benchmarks.ablation --config=configs/multi30k_families.py --changes=benchmarks/changes/families.py
        --config.data.dir=FOLDER --split=test_2016_flickr --output=runs/families

or one of them: `python train.py --config=configs/multi30k_families.py:recurrent --workdir=… --config.data.dir=FOLDER`.
FOLDER, data, vocabulary and batches as in configs/multi30k.py. Attention is that model; the others have its number of
params within 1%.
"""

from ml_collections import config_dict

from transformer.config import default_config

from . import multi30k

SIZES = {
    "attention": {},  # those of multi30k.py
    "recurrent": {"num_layers": 2, "emb_dim": 172},
    "convolutional": {"num_layers": 4, "emb_dim": 144},
}


def get_config(family: str = "attention") -> config_dict.ConfigDict:
    """Ten epochs, scored after every second one."""
    if family not in SIZES:
        raise ValueError(f"expected one of {', '.join(SIZES)}, got {family!r}")
    config = multi30k.get_config()
    if family != "attention":
        config.model = default_config().model
        config.model.update({"family": family, "dropout_rate": 0.2, **SIZES[family]})

    config.optimizer.warmup_steps = 300
    config.optimizer.clip_norm = 1.0

    config.train.num_steps = 1450  # of 145 an epoch
    config.train.eval_every_steps = 290
    config.train.checkpoint_every_steps = 145
    config.train.keep_last = 2

    config.decode = default_config().decode
    config.decode.beam_size = 5
    config.decode.length_penalty = 1.0
    return config
