"""The paper's base model at an eighth of its width, on the embedded data: the base model of Table 3 scaled down.

    python -m benchmarks.ablation --config=configs/paper_cldr.py --changes=benchmarks/changes/table3.py
        --split=validation --output=runs/table3

trains it and all other rows of the table; docs/architectures.md has the results. This config has validation BLEU 81.8
(sacreBLEU nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:2.6.0) and perplexity 1.222 after 1,600 updates, 1.5M
target tokens, 5 minutes without validation on one core of an AMD EPYC, float32 (2026-11-28, commit 08c5c93); big 99.4
after 4,800, 33 minutes. It is not trained to convergence, where the rows differ less.
"""

from ml_collections import config_dict

from . import paper


def get_config() -> config_dict.ConfigDict:
    """3+3 layers of width 64, 8 heads of width 16; every row of the table is a whole number of each."""
    config = paper.get_config()
    config.model.num_layers = 3
    config.model.emb_dim = 64
    config.model.mlp_dim = 256
    config.model.qkv_dim = 128  # heads of width 8 learn this data far later than all others
    config.model.value_dim = 128
    config.model.qkv_init_gain = 0.5**0.5

    config.data.name = "cldr"
    config.data.vocab_size = 1000
    config.data.max_length = 64
    config.data.batching = "pack"

    config.optimizer.schedule = "cosine"
    config.optimizer.learning_rate = 1.5e-3
    config.optimizer.warmup_steps = 200

    config.train.num_steps = 1600
    config.train.batch_tokens = 1024
    config.train.log_every_steps = 200
    config.train.eval_every_steps = 800
    config.train.checkpoint_every_steps = 800
    return config
