"""English into German, French, Spanish and Dutch with one model: a mixture by temperature, with tags.

    python train.py --config=configs/tatoeba.py:FOLDER --workdir=runs/tatoeba
    python eval.py --workdir=runs/tatoeba --split=val
    echo "I have a dog." | python -m transformer.translate --workdir=runs/tatoeba --target_language=fr

FOLDER holds train.en-LANG.tsv.xz and valid.en-LANG.tsv.xz for de, fr, es and nl: English, tab, the other language.
Sentence pairs of https://tatoeba.org, through https://www.manythings.org/anki/ (CC BY 2.0), are such text. The files
there have a third column, which `cut -f1,2` removes. The scores below are of a split by a hash of the lowercased
English sentence, so that no English sentence is in two splits: 2,658, 2,541, 1,797 and 783 validation pairs for de, fr,
es and nl. A mixture does not need the same number of pairs: with data.mixture_temperature = 2 a language with a quarter
of another's pairs gets half as many examples.

BLEU on the four validation files (sacreBLEU nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:2.6.0), beam 4, the
last checkpoint: de 22.2, fr 27.4, es 25.5, nl 29.5, mean 26.2. 2.15M params, 2,500 updates of 8.3M target tokens and
1.3e14 FLOPs; 24 minutes on 2 cores of a shared AMD EPYC, float32, preparation and scoring included (2026-11-29, commit
5157eaf).
"""

from ml_collections import config_dict

from transformer.config import default_config

LANGUAGES = ("de", "fr", "es", "nl")


def get_config(folder: str = "tatoeba") -> config_dict.ConfigDict:
    """3+3 layers of width 128, pre-norm; short sentences."""
    config = default_config()
    config.model.num_layers = 3
    config.model.emb_dim = 128
    config.model.mlp_dim = 512
    config.model.num_heads = 4
    config.model.norm = "pre"

    config.data.mixture = tuple(
        {
            "train": f"{folder}/train.en-{language}.tsv.xz",
            "valid": f"{folder}/valid.en-{language}.tsv.xz",
            "source_language": "en",
            "target_language": language,
            "tag": f"<2{language}>",
        }
        for language in LANGUAGES
    )
    config.data.mixture_temperature = 2.0
    config.data.vocab_size = 6000
    config.data.max_length = 48
    config.data.num_buckets = 5

    config.optimizer.schedule = "cosine"
    config.optimizer.learning_rate = 4e-3
    config.optimizer.warmup_steps = 500

    config.train.num_steps = 2500
    config.train.batch_tokens = 4096
    config.train.eval_every_steps = 500
    config.train.checkpoint_every_steps = 500

    config.eval.validation_sentences = 200  # of each direction
    config.eval.validation_beam_size = 1
    config.decode.max_extra_length = 20
    config.decode.max_source_tokens = 128
    return config
