"""Multi30k, lowercased and tokenized, English to German: the published baseline of 2.57M params.

    python train.py --config=configs/multi30k_tok.py:FOLDER --workdir=runs/multi30k_tok
    python eval.py --workdir=runs/multi30k_tok --checkpoint=average:10 --split=test_2016_flickr

FOLDER holds train, val and test_2016_flickr with .en and .de (29,000 / 1,014 / 1,000), lowercased and tokenized by
Moses, and `bpe.codes`, 10,000 merges. From a clone of https://github.com/multi30k/dataset at its commit 7bee46b
(train.en is not the same in all), with `pip install subword-nmt` (0.3.8):

    for split in train val test_2016_flickr; do for code in en de; do
      cp dataset/data/task1/tok/$split.lc.norm.tok.$code FOLDER/$split.$code
    done; done
    cat FOLDER/train.en FOLDER/train.de | subword-nmt learn-bpe -s 10000 > FOLDER/bpe.codes

These codes are those of the data of Wu et al., byte for byte (SHA-256 5b545f31…). Other text or merges give another
vocab_size than 9,712; the message names it.

Wu et al. 2021 ("Good for Misconceived Reasons") print 41.02, tokenized lowercased BLEU, for this model and recipe.
Here seed 0 has 41.11 on test_2016_flickr (sacrebleu -tok none -lc -s none:
nrefs:1|case:lc|eff:no|tok:none|smooth:none|version:2.6.0), mean of the last 10 checkpoints, after 8,000 updates: 56.3
million target tokens, 1.1e15 FLOPs, 2.4 hours beside other work on 2 cores of an AMD EPYC, float32 (2026-11-20, trained
at commit 3fddd27). It is the only seed tried. The search ends as fairseq's does (decode.early_stopping); the whole
search gives 40.83, and on validation 41.87 in place of 41.83. The original runs also end after 10 epochs without a
better validation loss, as train.early_stopping_patience=10 with train.best_metric=loss and a validation every 60
updates would; here all 8,000 are made.
"""

from ml_collections import config_dict

from transformer.config import default_config


def get_config(folder: str = "multi30k_tok") -> config_dict.ConfigDict:
    """4+4 layers of width 128, post-norm; data, vocabulary and scorer of the published figure."""
    config = default_config()
    config.model.num_layers = 4
    config.model.emb_dim = 128
    config.model.mlp_dim = 256
    config.model.num_heads = 4
    config.model.dropout_rate = 0.3
    config.model.qkv_init_gain = 0.5**0.5

    config.data.name = "text"
    config.data.dir = folder
    config.data.source_language = "en"
    config.data.target_language = "de"
    config.data.tokenizer = f"{folder}/bpe.codes"
    config.data.vocab_size = 9712  # 9,708 pieces and the special ones
    config.data.tokenized = True
    config.data.max_length = 64

    config.optimizer.schedule = "inverse_sqrt"
    config.optimizer.learning_rate = 5e-3
    config.optimizer.warmup_steps = 2000
    config.optimizer.clip_norm = 25.0
    config.optimizer.epsilon = 1e-8

    config.train.num_steps = 8000
    config.train.batch_tokens = 8192
    config.train.eval_every_steps = 600  # ten epochs
    config.train.checkpoint_every_steps = 60
    config.train.keep_last = 10

    config.decode.beam_size = 5
    config.decode.length_penalty = 1.0
    config.decode.length_penalty_form = "length"
    config.decode.early_stopping = True
    return config
