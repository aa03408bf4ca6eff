"""The paper's base model on WMT 2014 English to German: the recipe of its sections 5 and 6, Table 3 (base).

    python -m transformer.prepare --config=configs/wmt14_base.py --report
    python train.py --config=configs/wmt14_base.py --workdir=runs/wmt14_base
    python eval.py --workdir=runs/wmt14_base --checkpoint=average:5

Not trained here yet. The paper's BLEU on newstest2014 is 27.3, of tokenized text, which is scored higher than
sacreBLEU scores the raw text. Its 8 P100 took 12 hours; on GPU and TPU add
--config.model.dtype=bfloat16, and where a batch does not fit, --config.train.accumulation_steps=4.

Data: TFDS's wmt_t2t_translate, which is the paper's WMT14, 4.6M pairs, of four archives (1.7 GB) that prepare fetches
or finds in data.manual_dir. The vocabulary is a shared BPE of 37,000 pieces by SentencePiece; the paper made its own
"of about 37000 tokens" on tokenized text.
"""

from ml_collections import config_dict

from transformer.config import default_config


def get_config() -> config_dict.ConfigDict:
    """6+6 layers of width 512, 100,000 updates; every field that the paper fixes, defaults included."""
    config = default_config()
    config.model.num_layers = 6
    config.model.emb_dim = 512
    config.model.mlp_dim = 2048
    config.model.num_heads = 8
    config.model.norm = "post"
    config.model.positions = "sinusoidal"
    config.model.share_embeddings = True
    config.model.dropout_rate = 0.1

    config.data.name = "wmt_t2t_translate/de-en"
    config.data.source_language = "en"
    config.data.target_language = "de"
    config.data.tokenizer = "bpe"
    config.data.vocab_size = 37_000
    config.data.length_multiple = 8  # widths that a GPU's matrix units like

    config.optimizer.name = "adam"
    config.optimizer.beta1 = 0.9
    config.optimizer.beta2 = 0.98
    config.optimizer.epsilon = 1e-9
    config.optimizer.schedule = "paper"
    config.optimizer.learning_rate = 1.0
    config.optimizer.warmup_steps = 4000
    config.optimizer.label_smoothing = 0.1

    config.train.num_steps = 100_000
    config.train.batch_tokens = 25_000
    config.train.checkpoint_every_steps = 1500  # ten minutes of the paper's
    config.train.eval_every_steps = 3000  # each saves too, so a multiple of that
    config.train.keep_last = 5

    config.decode.beam_size = 4
    config.decode.length_penalty = 0.6
    config.decode.max_extra_length = 50
    return config
