"""What attention replaced, at an equal budget: 1.8M params and 10 epochs of Multi30k, English to German.

    python -m benchmarks.equal_budget --config.data.dir=FOLDER --output=runs/families

or one of them: `python train.py --config=configs/multi30k_families.py:recurrent --workdir=… --config.data.dir=FOLDER`.
FOLDER as in configs/multi30k.py, and so are data, vocabulary and batches: attention is that model, the others
have its number of params to 1%.
"""

from ml_collections import config_dict

from transformer.config import default_config

FAMILIES = ("attention", "recurrent", "convolutional")


def get_config(family: str = "attention") -> config_dict.ConfigDict:
    """Ten epochs, scored after every second one."""
    config = default_config()
    config.model.family = family
    config.model.dropout_rate = 0.2
    if family == "attention":
        config.model.num_layers = 4
        config.model.emb_dim = 128
        config.model.mlp_dim = 256
        config.model.num_heads = 4
        config.model.norm = "pre"
    elif family == "recurrent":
        config.model.num_layers = 2
        config.model.emb_dim = 172
    else:
        config.model.num_layers = 4
        config.model.emb_dim = 144

    config.data.name = "text"
    config.data.source_language = "en"
    config.data.target_language = "de"
    config.data.vocab_size = 4000
    config.data.max_length = 64

    config.optimizer.schedule = "cosine"
    config.optimizer.learning_rate = 4e-3
    config.optimizer.warmup_steps = 300
    config.optimizer.clip_norm = 1.0

    config.train.num_steps = 1450  # of 145 an epoch
    config.train.batch_tokens = 4096
    config.train.eval_every_steps = 290
    config.train.checkpoint_every_steps = 145
    config.train.keep_last = 2

    config.decode.beam_size = 5
    config.decode.length_penalty = 1.0
    return config
