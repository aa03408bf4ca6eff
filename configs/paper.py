"""The models of the paper's Table 3, each with the results that the paper reports: configs/paper.py:ROW.

    python train.py --config=configs/paper.py:base --workdir=runs/base
    python -m benchmarks.ablation --config=configs/paper.py --changes=benchmarks/changes/table3.py
        --split=validation --output=runs/table3

ROW is base (the default), big, or one of ROWS below, named by its group and its change: a-h1, b-dk16, c-n2,
d-drop0, e-learned … None has been trained here at this size.

Data set, batch_tokens and number of updates are those of configs/wmt14.py:en_de_base (en_de_big for big), but widths
are not multiples of 8, and validation searches all sentences as the paper did: on fast devices that takes longer than
the updates between; --config.eval.validation_sentences=1000 --config.eval.validation_beam_size=1 shorten it. The paper
scored newstest2013, which is the validation split, by beam 4, alpha 0.6, without averaging checkpoints. Its numbers of
params agree with a shared vocabulary of 40,900 subword tokens for every row but big, whose 213 million would need
36,100 (40,900 give 218). With its "about 37000 tokens" (section 5.1) base has 63 million, and the paper reports 65.
"""

from typing import Any, NamedTuple

from ml_collections import config_dict

from transformer.config import default_config


class Row(NamedTuple):
    """A row of Table 3: fields that differ from the base model, and the printed results.

    Attributes:
      params: millions; None if blank in the paper: the base model's.
      perplexity: per subword token, on newstest2013.
      bleu: on newstest2013.
    """

    fields: dict[str, Any]
    perplexity: float
    bleu: float
    params: int | None = None


ROWS: dict[str, Row] = {
    "base": Row({}, 4.92, 25.8, 65),
    "a-h1": Row({"model.num_heads": 1}, 5.29, 24.9),
    "a-h4": Row({"model.num_heads": 4}, 5.00, 25.5),
    "a-h16": Row({"model.num_heads": 16}, 4.91, 25.8),
    "a-h32": Row({"model.num_heads": 32}, 5.01, 25.4),
    "b-dk16": Row({"model.qkv_dim": 8 * 16}, 5.16, 25.1, 58),
    "b-dk32": Row({"model.qkv_dim": 8 * 32}, 5.01, 25.4, 60),
    "c-n2": Row({"model.num_layers": 2}, 6.11, 23.7, 36),
    "c-n4": Row({"model.num_layers": 4}, 5.19, 25.3, 50),
    "c-n8": Row({"model.num_layers": 8}, 4.88, 25.5, 80),
    "c-d256": Row({"model.emb_dim": 256}, 5.75, 24.5, 28),
    "c-d1024": Row({"model.emb_dim": 1024}, 4.66, 26.0, 168),
    "c-ff1024": Row({"model.mlp_dim": 1024}, 5.12, 25.4, 53),
    "c-ff4096": Row({"model.mlp_dim": 4096}, 4.75, 26.2, 90),
    "d-drop0": Row({"model.dropout_rate": 0.0}, 5.77, 24.6),
    "d-drop0.2": Row({"model.dropout_rate": 0.2}, 4.95, 25.5),
    "d-ls0": Row({"optimizer.label_smoothing": 0.0}, 4.67, 25.3),
    "d-ls0.2": Row({"optimizer.label_smoothing": 0.2}, 5.47, 25.7),
    "e-learned": Row({"model.positions": "learned"}, 4.92, 25.7),
    "big": Row(
        {
            "model.emb_dim": 1024,
            "model.mlp_dim": 4096,
            "model.num_heads": 16,
            "model.dropout_rate": 0.3,
            "train.num_steps": 300_000,
        },
        4.33,
        26.4,
        213,
    ),
}


def get_config(name: str = "base") -> config_dict.ConfigDict:
    """A row; the base model's fields are the defaults."""
    if name not in ROWS:
        raise ValueError(f"no row {name!r}; there are {', '.join(ROWS)}")
    config = default_config()
    config.data.name = "wmt_t2t_translate/de-en"
    config.data.source_language = "en"
    config.data.target_language = "de"
    config.data.vocab_size = 37_000
    config.decode.max_source_tokens = 256
    config.train.num_steps = 100_000
    config.train.batch_tokens = 25_000
    config.train.checkpoint_every_steps = 1500
    config.train.eval_every_steps = 3000
    for field, value in ROWS[name].fields.items():
        section, _, key = field.partition(".")
        config[section][key] = value
    if config.model.positions == "learned":
        config.model.max_positions = 512
    return config
