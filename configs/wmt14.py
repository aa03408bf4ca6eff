"""The paper's models on WMT 2014, by the recipe of its sections 5 and 6: configs/wmt14.py:VARIANT.

    python -m transformer.prepare --config=configs/wmt14.py:en_de_base --report
    python train.py --config=configs/wmt14.py:en_de_base --workdir=runs/en_de_base
    python eval.py --workdir=runs/en_de_base --checkpoint=average:5

VARIANT is one of four. BLEU is the paper's on newstest2014, of tokenized text, and higher than sacreBLEU of raw text;
time is the paper's, on 8 P100. Beside it stand legacy_compound_split_bleu of eval.py's JSON for German, and
legacy_tokenized_bleu for French.

    VARIANT     languages          model               updates  --checkpoint  BLEU  time
    en_de_base  English to German  Table 3, base       100,000  average:5     27.3  12 hours
    en_de_big   English to German  Table 3, big        300,000  average:20    28.4  3.5 days
    en_fr_base  English to French  Table 3, base       100,000  average:5     38.1  12 hours
    en_fr_big   English to French  big, dropout 0.1    300,000  average:20    41.8  3.5 days (41.0 in section 6.1)

Not trained here yet. On GPU and TPU add --config.model.dtype=bfloat16 and, if a batch does not fit,
--config.train.accumulation_steps=4.

train.batch_tokens counts padding; the paper's batches have about 25,000 tokens without. 25,000 divided by the fill that
`prepare --report` prints, or the 32,768 positions of tensor2tensor on 8 GPUs, come closer.

Checkpoints are as many updates apart as the paper made in ten minutes. On devices where that takes seconds, saving
would hold up training: train with --config.train.num_steps=288000 --config.train.checkpoint_every_steps=6000
--config.train.eval_every_steps=6000 first (big; base: 92500, 3000, 3000), then by the same command without these three
flags, --config included, for the last 20 (5) checkpoints.

Data for German: TFDS's wmt_t2t_translate, tensor2tensor's choice of WMT14 with a later News Commentary (v13), 4.6M
pairs, of four archives (1.7 GB); wmt14_translate/de-en has v9. eval.py --test_set=wmt14/full scores sacreBLEU's own
copy of newstest2014. The vocabulary is a shared BPE of 37,000 subword tokens by SentencePiece; the paper made its own
"of about 37000 tokens" on tokenized text. Data for French: TFDS's wmt14_translate/fr-en, of six archives (6.7 GB),
about 40M pairs, where the paper speaks of 36M. The paper has 32,000 word pieces here, made by a tool that is not
public; this is a shared BPE of 32,000 by SentencePiece. `prepare` downloads the archives or takes them from
data.manual_dir.
"""

from ml_collections import config_dict

from transformer.config import default_config

VARIANTS = ("en_de_base", "en_de_big", "en_fr_base", "en_fr_big")


def get_config(variant: str = "") -> config_dict.ConfigDict:
    """6+6 layers of width 512, or of 1024 if big; every field that the paper fixes, defaults included."""
    if variant not in VARIANTS:
        raise ValueError(f"expected :VARIANT, one of {', '.join(VARIANTS)}, got {variant!r}")
    is_big, is_french = variant.endswith("big"), variant.startswith("en_fr")
    config = default_config()
    config.model.num_layers = 6
    config.model.emb_dim = 1024 if is_big else 512
    config.model.mlp_dim = 4096 if is_big else 2048
    config.model.num_heads = 16 if is_big else 8
    config.model.norm = "post"
    config.model.positions = "sinusoidal"
    config.model.share_embeddings = True
    config.model.dropout_rate = 0.3 if variant == "en_de_big" else 0.1

    config.data.name = "wmt14_translate/fr-en" if is_french else "wmt_t2t_translate/de-en"
    config.data.source_language = "en"
    config.data.target_language = "fr" if is_french else "de"
    config.data.tokenizer = "bpe"
    config.data.vocab_size = 32_000 if is_french else 37_000
    config.data.length_multiple = 8  # widths that a GPU's matrix units like

    config.optimizer.name = "adam"
    config.optimizer.beta1 = 0.9
    config.optimizer.beta2 = 0.98
    config.optimizer.epsilon = 1e-9
    config.optimizer.schedule = "paper"
    config.optimizer.learning_rate = 1.0
    config.optimizer.warmup_steps = 4000
    config.optimizer.label_smoothing = 0.1

    config.train.num_steps = 300_000 if is_big else 100_000
    config.train.batch_tokens = 25_000
    config.train.checkpoint_every_steps = 600 if is_big else 1500  # ten minutes of the paper's
    config.train.eval_every_steps = 3000  # each saves too, so a multiple of that
    config.train.keep_last = 20 if is_big else 5

    config.decode.beam_size = 4
    config.decode.length_penalty = 0.6
    config.decode.max_extra_length = 50
    config.eval.validation_sentences = 1000  # greedy, for a small part of the time; eval.py searches in all of them
    config.eval.validation_beam_size = 1
    return config
