"""The paper's big model on WMT 2014 English to French: the recipe of its sections 5 and 6, Table 3 (big).

    python -m transformer.prepare --config=configs/wmt14_en_fr_big.py --report
    python train.py --config=configs/wmt14_en_fr_big.py --workdir=runs/wmt14_en_fr_big
    python eval.py --workdir=runs/wmt14_en_fr_big --checkpoint=average:20

Not trained here yet. The paper's BLEU on newstest2014 is 41.8, of tokenized text, which is scored higher than
sacreBLEU scores the raw text. Its 8 P100 took 3.5 days; on GPU and TPU add
--config.model.dtype=bfloat16, and where a batch does not fit, --config.train.accumulation_steps=4.

Data: TFDS's wmt14_translate/fr-en, of six archives (6.7 GB) that prepare fetches or finds in data.manual_dir; about 40M
pairs, where the paper speaks of 36M. The paper has 32,000 word pieces here, made by a tool that is not public; this is
a shared BPE of 32,000 by SentencePiece.
"""

from ml_collections import config_dict

from transformer.config import default_config


def get_config() -> config_dict.ConfigDict:
    """6+6 layers of width 1024, 300,000 updates; every field that the paper fixes, defaults included."""
    config = default_config()
    config.model.num_layers = 6
    config.model.emb_dim = 1024
    config.model.mlp_dim = 4096
    config.model.num_heads = 16
    config.model.norm = "post"
    config.model.positions = "sinusoidal"
    config.model.share_embeddings = True
    config.model.dropout_rate = 0.1

    config.data.name = "wmt14_translate/fr-en"
    config.data.source_language = "en"
    config.data.target_language = "fr"
    config.data.tokenizer = "bpe"
    config.data.vocab_size = 32_000
    config.data.length_multiple = 8  # widths that a GPU's matrix units like

    config.optimizer.name = "adam"
    config.optimizer.beta1 = 0.9
    config.optimizer.beta2 = 0.98
    config.optimizer.epsilon = 1e-9
    config.optimizer.schedule = "paper"
    config.optimizer.learning_rate = 1.0
    config.optimizer.warmup_steps = 4000
    config.optimizer.label_smoothing = 0.1

    config.train.num_steps = 300_000
    config.train.batch_tokens = 25_000
    config.train.checkpoint_every_steps = 600  # ten minutes of the paper's
    config.train.eval_every_steps = 3000  # each saves too, so a multiple of that
    config.train.keep_last = 20

    config.decode.beam_size = 4
    config.decode.length_penalty = 0.6
    config.decode.max_extra_length = 50
    return config
