"""Multi30k task 1, English to German, raw text: a folder with train, val and test files of each language.

    python train.py --config=configs/multi30k.py --workdir=runs/multi30k --config.data.dir=FOLDER

The sizes are those of the published small models for this set (Wu et al., 2021). No score is claimed yet:
that run is owed.
"""

from ml_collections import config_dict

from transformer.config import default_config


def get_config() -> config_dict.ConfigDict:
    """4+4 layers of width 128."""
    config = default_config()
    config.model.num_layers = 4
    config.model.emb_dim = 128
    config.model.mlp_dim = 256
    config.model.num_heads = 4
    config.model.dropout_rate = 0.3

    config.data.name = "text"
    config.data.source_language = "en"
    config.data.target_language = "de"
    config.data.vocab_size = 4000
    config.data.max_length = 64

    config.optimizer.schedule = "inverse_sqrt"
    config.optimizer.learning_rate = 5e-3
    config.optimizer.warmup_steps = 2000

    config.train.num_steps = 8000
    config.train.batch_tokens = 4096
    config.train.eval_every_steps = 500
    config.train.checkpoint_every_steps = 250

    config.decode.beam_size = 5
    config.decode.length_penalty = 1.0
    return config
