"""Multi30k, English to German, from a folder of raw text: 4+4 layers of width 128, 1.8M params.

    python train.py --config=configs/multi30k.py --workdir=runs/multi30k --config.data.dir=FOLDER
    python eval.py --workdir=runs/multi30k --split=test_2016_flickr

FOLDER holds train, val and test_2016_flickr with .en and .de, one sentence a line (29,000 / 1,014 / 1,000); it is
data/task1/raw of https://github.com/multi30k/dataset, whose files may stay compressed.
BLEU 38.9 on test_2016_flickr (sacreBLEU nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:2.6.0), beam 5, the
last checkpoint; nothing was chosen on that set. 8,000 updates of 28.4M target tokens and 3.8e14 FLOPs, in 100
minutes on 2 cores of a shared AMD EPYC, float32 (2026-11-20, commit e2f8182 with this file).

Idle, the same cores train 13,000 target tokens/s, 36 minutes for the run, and 6.1 times what JoeyNMT 2.3.0 does
(`python -m benchmarks.ab_compare`, median of three, 12,927 against 2,114; 2026-11-20, commit 3059c83); bfloat16 is no
faster on this CPU: 12,148.
"""

from ml_collections import config_dict

from transformer.config import default_config


def get_config() -> config_dict.ConfigDict:
    """Pre-norm, dropout 0.2, a cosine to zero; every 200th update is kept, for averaging."""
    config = default_config()
    config.model.num_layers = 4
    config.model.emb_dim = 128
    config.model.mlp_dim = 256
    config.model.num_heads = 4
    config.model.norm = "pre"
    config.model.dropout_rate = 0.2

    config.data.name = "text"
    config.data.source_language = "en"
    config.data.target_language = "de"
    config.data.vocab_size = 4000
    config.data.max_length = 64

    config.optimizer.schedule = "cosine"
    config.optimizer.learning_rate = 4e-3
    config.optimizer.warmup_steps = 1000

    config.train.num_steps = 8000
    config.train.batch_tokens = 4096
    config.train.eval_every_steps = 1000
    config.train.checkpoint_every_steps = 200
    config.train.keep_last = 20

    config.decode.beam_size = 5
    config.decode.length_penalty = 1.0
    config.decode.max_extra_length = 20  # as in the training pairs; a lower limit ends the search sooner
    config.decode.batch_rows = 8  # for a CPU, where small batches wait less for their slowest sentence; on a GPU set 0
    return config
