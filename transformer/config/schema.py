"""The config schema: all fields with default, bounds and documentation.

A config file is Python code; the ConfigDict that it returns is checked by `validation` before JAX is imported, and
becomes the frozen dataclasses below.
"""

import dataclasses
import json
import re
import textwrap
import typing
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import config_dict

from transformer.config.optimizers import OPTIMIZER_TRAITS, SCHEDULE_TRAITS
from transformer.runtime.files import absolute_path
from transformer.runtime.rounding import round_up

MAX_INT = 2**31 - 1


def _field(
    default: Any,
    doc: str,
    *,
    low: float | None = None,
    high: float | None = None,
    one_of: tuple = (),
    list_of: tuple = (),
) -> Any:
    """A dataclass field with its documentation.

    Args:
      low, high: closed bounds; ints are at most int32's.
      one_of: the choices.
      list_of: the names that a list, with commas between, may have.
    """
    high = MAX_INT if high is None and type(default) is int else high
    metadata = {"doc": doc, "low": low, "high": high, "one_of": one_of, "list_of": list_of}
    return dataclasses.field(default=default, metadata=metadata)


POSITIVE = 1e-30  # the closed lower bound that means "above 0"
DEFAULTS_TO_EMB_DIM = ("qkv_dim", "value_dim")

# What may make a checkpoint the best → whether lower is better; `evaluation.metrics` defines all but the loss.
LOWER_IS_BETTER = {
    "loss": True,
    "bleu": False,
    "chrf": False,
    "ter": True,
    "chrfpp": False,
    "exact_match": False,
    "accuracy": False,
    "rouge1": False,
    "rouge2": False,
    "rougeL": False,
}
METRIC_NAMES = tuple(name for name in LOWER_IS_BETTER if name != "loss")
ALWAYS_VALIDATED = ("bleu", "chrf")  # by every validation, whatever eval.metrics is


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The model; the default sizes are those of the paper's base model (Table 3)."""

    family: str = _field(
        "attention",
        "attention: the Transformer; recurrent: LSTMs as in GNMT; convolutional: gated convolutions as in ConvS2S",
        one_of=("attention", "recurrent", "convolutional"),
    )
    num_layers: int = _field(6, "layers of the encoder and of the decoder each", low=1)
    encoder_layers: int = _field(0, "layers of the encoder; 0: num_layers", low=0)
    decoder_layers: int = _field(
        0, "layers of the decoder; 0: num_layers; few make translation faster (Kasai et al. 2021)", low=0
    )
    emb_dim: int = _field(512, "model width D (paper: d_model)", low=1)
    num_heads: int = _field(8, "attention heads H", low=1)
    qkv_dim: int = _field(0, "width per head times heads, H * K, of queries and keys; 0: emb_dim", low=0)
    value_dim: int = _field(0, "the same of values: Table 3 (B) varies only the key width; 0: emb_dim", low=0)
    mlp_dim: int = _field(2048, "feed-forward width F (paper: d_ff)", low=1)
    activation: str = _field(
        "relu",
        "of the feed-forward block; swiglu, geglu: a gate, silu or gelu of a third matrix, multiplies the hidden layer "
        "(Shazeer 2020), so 2/3 of mlp_dim has the params and FLOPs of the others",
        one_of=("relu", "gelu", "silu", "swiglu", "geglu"),
    )
    use_bias: bool = _field(True, "biases of feed-forward blocks and LayerNorm; projections of attention have none")
    norm: str = _field("post", "norm after the residual sum (paper) or before the layer", one_of=("post", "pre"))
    norm_type: str = _field(
        "layer",
        "layer: LayerNorm; rms: RMSNorm, without mean and bias (Zhang & Sennrich 2019)",
        one_of=("layer", "rms"),
    )
    norm_epsilon: float = _field(1e-6, "added to the variance or mean square in norms", low=POSITIVE, high=1)
    qk_norm: bool = _field(
        False, "norm of queries and keys, over each head's width (Henry et al. 2020, Dehghani et al. 2023)"
    )
    positions: str = _field(
        "sinusoidal",
        "position encodings; sinusoidal, learned: added to the embeddings; rotary: queries and keys of self-attention "
        "are rotated (Su et al. 2021), not those of cross-attention",
        one_of=("sinusoidal", "learned", "rotary"),
    )
    max_positions: int = _field(1024, "rows of the table of learned positions; unused by others", low=1)
    share_embeddings: bool = _field(True, "one matrix for source, target and output embeddings (paper, 3.4)")
    dropout_rate: float = _field(
        0.1, "on each sublayer's output and on the embedded input (paper, 5.4)", low=0, high=0.99
    )
    attention_dropout_rate: float = _field(0.0, "on the attention weights", low=0, high=0.99)
    mlp_dropout_rate: float = _field(0.0, "inside the feed-forward block, after its activation", low=0, high=0.99)
    attention: str = _field(
        "auto",
        "plain; blockwise: memory linear in length; ring: blockwise with the length split over mesh.sequence; cudnn, "
        "splash: fused kernels for GPU and TPU in training, otherwise as auto; auto: ring if mesh.sequence is above "
        "1, else cudnn where it is supported, else plain, and from length 512 splash or blockwise",
        one_of=("auto", "plain", "blockwise", "cudnn", "splash", "ring"),
    )
    qkv_init_gain: float = _field(
        1.0,
        "factor on the Glorot initialization of queries, keys and values; 0.7071 equals one matrix for all three, as "
        "in fairseq",
        low=POSITIVE,
        high=10,
    )
    attention_score: str = _field(
        "dot",
        "recurrent, convolutional: attention score of the decoder: dot product (Luong) or additive (Bahdanau), whose "
        "memory is target x source x width",
        one_of=("dot", "additive"),
    )
    kernel_width: int = _field(3, "convolutional: width of the kernels; odd", low=1, high=99)
    remat: str = _field(
        "none",
        "rematerialization, what the backward pass recomputes: none; dots: all but products with params; full: whole "
        "layers",
        one_of=("none", "dots", "full"),
    )
    scan_layers: bool = _field(False, "lax.scan over stacked params of all layers: compiles faster, runs slower")
    dtype: str = _field(
        "float32", "of activations; params, softmax and loss stay float32", one_of=("float32", "bfloat16")
    )

    def __post_init__(self) -> None:
        for name in DEFAULTS_TO_EMB_DIM:  # replaced, as saved configs and comparisons of configs have the widths
            object.__setattr__(self, name, getattr(self, name) or self.emb_dim)

    def widths_of_emb_dim(self) -> dict[str, int]:
        """The fields that are as wide as emb_dim, as 0, so that they follow another."""
        return {name: 0 for name in DEFAULTS_TO_EMB_DIM if getattr(self, name) == self.emb_dim}

    @property
    def num_encoder_layers(self) -> int:
        """The layers of the encoder."""
        return self.encoder_layers or self.num_layers

    @property
    def num_decoder_layers(self) -> int:
        """The layers of the decoder."""
        return self.decoder_layers or self.num_layers

    @property
    def num_cross_attention_layers(self) -> int:
        """The number of decoder layers with attention to the source."""
        return 1 if self.family == "recurrent" else self.num_decoder_layers

    @property
    def is_gated(self) -> bool:
        """Whether the feed-forward block has a gate."""
        return self.activation in ("swiglu", "geglu")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixtureEntry:
    """An entry of `data.mixture`: where its pairs are, the languages, how often they are trained on, and tags."""

    name: str = _field("text", "as data.name")
    source_language: str = _field("", "language code translated from")
    target_language: str = _field("", "language code translated to")
    dir: str = _field("", "text: as data.dir")
    train_source: str = _field("", "text: as data.train_source")
    train_target: str = _field("", "text: as data.train_target")
    valid_source: str = _field("", "text: as data.valid_source")
    valid_target: str = _field("", "text: as data.valid_target")
    train: str = _field("", "text: as data.train")
    valid: str = _field("", "text: as data.valid")
    columns: str = _field("", "as data.columns; in the other order, such as '2,1', they swap the sides")
    weight: float = _field(1.0, "share of the examples, relative to the other entries", low=POSITIVE)
    tag: str = _field("", "token of the target language put before each source, such as <2de>; empty: none")
    origin_tag: str = _field("", "token of the origin put after it in training, such as <bt>; empty: none")
    from_step: int = _field(0, "updates done before the entry joins", low=0)
    until_step: int = _field(0, "updates done when the entry leaves; 0: never", low=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The data set, the vocabulary and batching."""

    name: str = _field("cldr", "a TFDS translation set (`cldr` is embedded), or `text` for your own files")
    source_language: str = _field("en", "language code translated from")
    target_language: str = _field("de", "language code translated to")
    dir: str = _field(
        "", "text: a folder of train.LANG, val.LANG and test files TEST.LANG; names may end in .gz .xz .zst"
    )
    train_source: str = _field("", "text: training sentences of the source language, one a line, or a pattern of files")
    train_target: str = _field("", "text: their translations, line by line")
    valid_source: str = _field("", "text: validation sentences; empty holds out a part of training")
    valid_target: str = _field("", "text: their translations")
    train: str = _field(
        "", "text: both sides of training in one file: .tsv .jsonl .parquet .tmx .po; * ? [ ] match several"
    )
    valid: str = _field("", "text: both sides of validation in one file")
    columns: str = _field(
        "",
        "tsv, parquet: which two columns are source and target, counted from 1, as in '1,2'; parquet, jsonl: their "
        "names, as in 'source,target'",
    )
    mixture: tuple = _field(
        (),
        "several sources in place of one, a list of dicts with the fields of MixtureEntry; examples are drawn from "
        "them by weight, one vocabulary serves all; on the command line as JSON",
    )
    mixture_temperature: float = _field(
        0.0,
        "mixture: T in shares proportional to weight * pairs^(1/T): 1 draws by the number of pairs, more is nearer to "
        "equal shares; 0: by weight alone",
        low=0,
        high=1000,
    )
    data_dir: str = _field(
        "", "folder of prepared data, vocabularies and token ids; empty: TFDS_DATA_DIR or ~/tensorflow_datasets"
    )
    manual_dir: str = _field(
        "", "folder of WMT archives fetched by hand, with their original names; empty: downloads/manual under data_dir"
    )
    vocab_size: int = _field(
        37000, "subword tokens of the shared vocabulary, including special ones", low=8, high=1_000_000
    )
    tokenizer: str = _field(
        "bpe",
        "SentencePiece model type, bpe or unigram, or a path: a trained .model, BPE merges of subword-nmt (.codes, "
        "whose vocabulary is all subword tokens of the training text), or the .json that a run with such merges saves",
    )
    tokenized: bool = _field(
        False,
        "the text is lowercased and tokenized, as some published sets are: BLEU is then that of sacrebleu -tok none "
        "-lc -s none, comparable with published scores of such sets and not with BLEU of raw text",
    )
    bleu_tokenizer: str = _field(
        "auto",
        "sacreBLEU's tokenizer for BLEU; auto: zh or char for scripts without spaces, by the code of the target "
        "language or else by the letters of the references, and 13a for all others",
        one_of=("auto", "13a", "intl", "zh", "char", "none"),
    )
    max_length: int = _field(256, "training drops pairs with a side of more tokens, end included", low=2, high=65536)
    filter_min_length: int = _field(0, "training drops pairs with a side of fewer filter_unit; 0: off", low=0)
    filter_max_length: int = _field(0, "training drops pairs with a side of more filter_unit; 0: off", low=0)
    filter_max_ratio: float = _field(
        0.0, "training drops pairs with a side of over this times as many filter_unit as the other; 0: off", low=0
    )
    filter_unit: str = _field(
        "words",
        "what filters of length and ratio count; words are separated by white space",
        one_of=("words", "characters"),
    )
    filter_copies: bool = _field(False, "training drops pairs whose source equals the target")
    filter_controls: bool = _field(
        False, "training drops pairs with control characters other than tabs, or U+FFFD, which stands for damaged text"
    )
    filter_script: float = _field(
        0.0,
        "training drops pairs with a side of which less than this share of letters is in the script of its language, "
        "where that is known; 0: off",
        low=0,
        high=1,
    )
    filter_duplicates: bool = _field(False, "training drops pairs that occur before, by a 64-bit hash")
    subword_dropout: float = _field(
        0.0,
        "bpe: probability of leaving out a merge when a word of training is split, which varies from epoch to epoch "
        "(BPE-dropout, Provilkov et al. 2020: 0.1); 0: off",
        low=0,
        high=0.999999,
    )
    batching: str = _field(
        "bucket",
        "bucket: rows of one sentence, in shapes by length; pack: rows of several, in one shape",
        one_of=("bucket", "pack"),
    )
    num_buckets: int = _field(8, "bucket: shapes by length; more give less padding, and compile longer", low=1, high=64)
    length_multiple: int = _field(
        1,
        "widths of training batches are multiples of this, so the widest may exceed max_length (longer pairs are still "
        "dropped); 8 suits the matrix units of a GPU",
        low=1,
        high=1024,
    )

    @property
    def max_row_length(self) -> int:
        """The largest width of a training row on the target side: max_length rounded up to length_multiple."""
        return round_up(self.max_length, self.length_multiple)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer, Adam in the paper, and the learning rate schedule (paper, section 5.3)."""

    name: str = _field(
        "adam",
        "adam as in the paper; adamw: with decoupled weight decay; nadamw: with Nesterov momentum (Dozat 2016); muon: "
        "orthogonal updates of hidden matrices (Jordan et al. 2024), adamw for the rest; schedule_free_adamw: averages "
        "in place of a schedule (Defazio et al. 2024), with schedule = constant",
        one_of=tuple(OPTIMIZER_TRAITS),
    )
    learning_rate: float = _field(
        1.0, "paper: a factor on D^-0.5 min(step^-0.5, step warmup^-1.5); else the peak", low=0
    )
    warmup_steps: int = _field(4000, "steps of linear warm-up; cosine, linear, wsd: fewer than train.num_steps", low=0)
    schedule: str = _field(
        "paper",
        "learning rate after warm-up; cosine, linear and wsd reach zero at train.num_steps; wsd: constant, then linear "
        "over the last decay_fraction of the steps (Hu et al. 2024)",
        one_of=tuple(SCHEDULE_TRAITS),
    )
    decay_fraction: float = _field(
        0.1, "wsd: share of train.num_steps over which the rate falls to zero", low=POSITIVE, high=1
    )
    beta1: float = _field(
        0.9,
        "decay of the first moment; schedule_free_adamw: weight of the average in the params at which gradients are "
        "taken, above 0",
        low=0,
        high=0.999999,
    )
    beta2: float = _field(0.98, "decay of the second moment", low=0, high=0.9999999)
    epsilon: float = _field(1e-9, "added to the root of the second moment", low=POSITIVE)
    weight_decay: float = _field(0.0, "all but adam: decoupled decay of matrices, not of biases and norms", low=0)
    clip_norm: float = _field(0.0, "largest global norm of the gradient; 0 does not clip", low=0)
    label_smoothing: float = _field(0.1, "weight of the uniform distribution (paper, 5.4)", low=0, high=0.99)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The training loop: length, batch size, and intervals of logging, validation and checkpoints."""

    num_steps: int = _field(100_000, "updates of the whole run", low=1)
    batch_tokens: int = _field(25_000, "target tokens of the global batch, padding counted", low=1)
    accumulation_steps: int = _field(1, "micro-batches of a batch, whose gradients are summed", low=1, high=4096)
    consistency: str = _field(
        "none",
        "loss of how much two predictions of each target token differ, added to cross-entropy; each row is computed "
        "twice; rdrop: with different dropout (Liang et al. 2021); simcut: of the sentence pair, and of the pair with "
        "tokens cut off (Gao et al. 2022)",
        one_of=("none", "rdrop", "simcut"),
    )
    consistency_weight: float = _field(
        3.0, "alpha, the weight of that loss; published for translation: rdrop 5, simcut 3", low=0
    )
    cutoff_rate: float = _field(
        0.05,
        "simcut: probability that the embedding of a source token, or of a target token in the decoder's input, is "
        "zero",
        low=POSITIVE,
        high=0.999999,
    )
    log_every_steps: int = _field(50, "steps between lines of metrics", low=1)
    eval_every_steps: int = _field(2_000, "steps between validations: loss, BLEU, chrF2 and eval.metrics", low=1)
    checkpoint_every_steps: int = _field(1_000, "steps between checkpoints", low=1)
    best_metric: str = _field(
        "auto",
        "validation metric of the best checkpoint: loss, bleu, chrf or another of eval.metrics; auto: bleu, or chrf if "
        "most validation references have under four tokens, or the first of eval.metrics if bleu is not among them; "
        "decided at the start of the run and saved in its config.json",
        one_of=("auto", *LOWER_IS_BETTER),
    )
    early_stopping_patience: int = _field(
        0, "validations without a better best_metric before the run ends; 0: off", low=0
    )
    keep_last: int = _field(5, "newest checkpoints to keep", low=1)
    keep_best: int = _field(1, "checkpoints with the best best_metric, which are kept too", low=0)
    ema_decay: float = _field(
        0.0,
        "decay of a moving average of the params, min(this, (1 + step) / (10 + step)), which validation, eval and "
        "translate use instead of the params (except average:N); 0: off",
        low=0,
        high=0.999999,
    )
    spike_factor: float = _field(
        0.0,
        "skips updates whose loss is over this times the mean of about the last 50; the schedule does not count them; "
        "0: off",
        low=0,
    )
    max_skipped_updates: int = _field(
        10, "with spike_factor: the most updates skipped in a row; if the loss stays high, training continues", low=1
    )
    seed: int = _field(0, "of initialization, data order and dropout", low=0)
    profile_steps: str = _field(
        "",
        "A:B writes a trace of updates A to B to WORKDIR/plugins/profile, for TensorBoard and Perfetto; empty: none",
    )
    init_from: str = _field(
        "",
        "workdir of the run to fine-tune: initial params and vocabulary; sizes of model and vocabulary at their "
        "defaults become those of that run",
    )
    init_checkpoint: str = _field("latest", "with init_from: its checkpoint, as in eval.py --checkpoint")

    @property
    def passes(self) -> int:
        """How often an update computes each row of its batch."""
        return 1 if self.consistency == "none" else 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """Decoding, the same in validation, evaluation and translation."""

    method: str = _field(
        "beam",
        "beam search, sampling, or minimum Bayes risk: the one of mbr_samples samples most similar to the others "
        "by chrF",
        one_of=("beam", "sample", "mbr"),
    )
    beam_size: int = _field(4, "hypotheses kept by beam search; 1 is greedy", low=1, high=1000)
    length_penalty: float = _field(0.6, "alpha of the length penalty (sample: of scores); 0 is none", low=0, high=10)
    length_penalty_form: str = _field(
        "gnmt",
        "divisor of log-probabilities: gnmt ((5 + length) / 6)^alpha, or length^alpha",
        one_of=("gnmt", "length"),
    )
    coverage_penalty: float = _field(0.0, "beam: beta of GNMT's coverage penalty; 0 is none", low=0, high=10)
    early_stopping: bool = _field(False, "beam: stop a sentence once beam_size hypotheses are finished, as in fairseq")
    min_length: int = _field(0, "least tokens of a translation without EOS, within the maximum length", low=0)
    no_repeat_ngram: int = _field(0, "no n-gram of this length occurs twice in a translation; 0: off", low=0)
    temperature: float = _field(1.0, "sample, mbr: divisor of the logits", low=0.01, high=100)
    top_k: int = _field(0, "sample, mbr: sample from this many most probable tokens; 0: all", low=0)
    top_p: float = _field(
        1.0, "sample, mbr: sample from the fewest tokens with this probability in sum; 1: all", low=POSITIVE, high=1
    )
    seed: int = _field(0, "sample, mbr: of the samples; equal sentences get equal samples", low=0)
    mbr_samples: int = _field(16, "mbr: samples of each sentence", low=2, high=1000)
    max_extra_length: int = _field(50, "a translation has at most source length + this many tokens", low=1)
    batch_rows: int = _field(
        0,
        "sentences decoded at once, fewer if long, whatever --batch_size is; 0: 16 on a CPU, 256 on each GPU or TPU",
        low=0,
    )
    max_source_tokens: int = _field(512, "longer sources are truncated to this many tokens", low=2)

    @property
    def max_target_tokens(self) -> int:
        """The most tokens of a translation, EOS counted: of the longest source."""
        return self.max_source_tokens + self.max_extra_length


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """The scores of translations, the same for validation, for one system and for a comparison."""

    metrics: str = _field(
        "bleu,chrf,ter",
        "metrics of validation (but ter), eval.py and comparisons, the most important first; exact_match ignores "
        "case, punctuation and articles, rouge1, rouge2 and rougeL need the package rouge-score",
        list_of=METRIC_NAMES,
    )
    validation_sentences: int = _field(
        0,
        "sentences that validation during training translates, of each direction, spread over the split, always the "
        "same; 0: all",
        low=0,
    )
    validation_beam_size: int = _field(
        0, "beam size of validation during training, 1 is greedy; 0: decode.beam_size", low=0, high=1000
    )

    @property
    def metric_names(self) -> tuple[str, ...]:
        """The metrics, each once."""
        return tuple(dict.fromkeys(self.metrics.split(",")))


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """The device mesh: the product of the four is the number of devices. One may be -1: all remaining devices."""

    data: int = _field(-1, "devices over which the rows of a batch are split; -1: all remaining", low=-1)
    fsdp: int = _field(1, "the same, with params and optimizer state sharded over them; divides emb_dim", low=-1)
    tensor: int = _field(
        1, "devices over which heads, mlp_dim and the vocabulary are split; divides each of them", low=-1
    )
    sequence: int = _field(1, "devices over which the length of a sentence is split, see attention = ring", low=-1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The config of a run."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    decode: DecodeConfig = DecodeConfig()
    eval: EvalConfig = EvalConfig()
    mesh: MeshConfig = MeshConfig()

    def to_json(self, **extra: str) -> str:
        """The config as JSON, one field a line, as saved in the workdir and in every checkpoint.

        Args:
          extra: further entries beside the sections.
        """
        return json.dumps({**dataclasses.asdict(self), **extra}, indent=1) + "\n"


RUN_ID = "run_id"  # the id of the run in a workdir's config.json, not a field
TEXT_PATH_FIELDS = ("dir", "train_source", "train_target", "valid_source", "valid_target", "train", "valid")
PATH_FIELDS = (*TEXT_PATH_FIELDS, "data_dir", "manual_dir")
WMT_NAMES = ("wmt14_translate", "wmt_t2t_translate")  # data sets of TFDS whose archives `data.download` fetches
TOKENIZER_ALGORITHMS = ("bpe", "unigram")  # any other value is a path
SPEED_FIELDS = ("batch_rows",)  # of the decode section: how many sentences at once, which changes no translation
SECTIONS: dict[str, type] = {field.name: typing.cast(type, field.type) for field in dataclasses.fields(Config)}


def default_config() -> config_dict.ConfigDict:
    """All sections with their defaults, to be changed by a config file; unknown fields are errors.

    `model.qkv_dim` and `model.value_dim` equal `model.emb_dim` unless set.
    """
    config = config_dict.ConfigDict(dataclasses.asdict(Config()))
    for name in DEFAULTS_TO_EMB_DIM:
        config.model[name] = config.model.get_oneway_ref("emb_dim")
    return config.lock()


def with_absolute_paths(config: Config) -> Config:
    """Makes local paths absolute, so that the config does not depend on the current folder."""
    data, train = config.data, config.train
    paths: dict[str, Any] = {name: absolute_path(getattr(data, name)) for name in PATH_FIELDS}
    paths["mixture"] = tuple(
        dataclasses.replace(entry, **{name: absolute_path(getattr(entry, name)) for name in TEXT_PATH_FIELDS})
        for entry in data.mixture
    )
    if data.tokenizer not in TOKENIZER_ALGORITHMS:
        paths["tokenizer"] = absolute_path(data.tokenizer)
    train = dataclasses.replace(train, init_from=absolute_path(train.init_from))
    return dataclasses.replace(config, data=dataclasses.replace(data, **paths), train=train)


class FieldDiff(NamedTuple):
    """A field in which two configs differ."""

    section: str
    field: str
    old: Any
    new: Any

    def __str__(self) -> str:
        change = f"{self.old!r} → {self.new!r}"
        if isinstance(self.old, tuple):  # the entries of a mixture
            change = _entry_changes(self.old, self.new)
        return f"{self.section}.{self.field}: {change}"


def _entry_changes(old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]) -> str:
    """What differs between the entries of two mixtures."""
    if len(old) != len(new):
        return f"{len(old)} entries → {len(new)}"
    return ", ".join(
        f"entry {number}, {name}: {before[name]!r} → {after[name]!r}"
        for number, (before, after) in enumerate(zip(old, new, strict=True), 1)
        for name in before
        if before[name] != after[name]
    )


def diff(old: Config, new: Config) -> list[FieldDiff]:
    """All fields in which two configs differ."""
    before, after = dataclasses.asdict(old), dataclasses.asdict(new)
    return [
        FieldDiff(section, field, value, after[section][field])
        for section, fields in before.items()
        for field, value in fields.items()
        if value != after[section][field]
    ]


def parse_steps(text: str) -> range:
    """The steps A to B of 'A:B', both included; none for an empty text.

    Raises:
      ValueError: it is not of that form, or not 1 ≤ A ≤ B.
    """
    if not text:
        return range(0)
    match = re.fullmatch(r"([1-9][0-9]*):([1-9][0-9]*)", text)
    if not match or int(match[1]) > int(match[2]):
        raise ValueError(text)
    return range(int(match[1]), int(match[2]) + 1)


def field_default(section: str, name: str) -> Any:
    """The default of a field."""
    return getattr(SECTIONS[section], name)


def field_help() -> str:
    """All fields as text for the terminal: flag with default, meaning, bounds; those of an entry of a mixture last."""
    blocks = []
    for name, section in SECTIONS.items():
        blocks += _section_help(name, section, f"--config.{name}.")
    return "\n".join([*blocks, *_section_help("data.mixture", MixtureEntry, "")])


def _section_help(name: str, section: type, prefix: str) -> list[str]:
    """The lines of one section and an empty one."""
    blocks = [f"{name}: {(section.__doc__ or '').splitlines()[0]}"]
    for field in dataclasses.fields(section):
        text = "; ".join(filter(None, (field.metadata["doc"], _bounds_help(field.metadata))))
        blocks.append(f"  {prefix}{field.name}={field.default}")
        blocks += textwrap.wrap(text, 100, initial_indent=" " * 6, subsequent_indent=" " * 6, break_on_hyphens=False)
    return [*blocks, ""]


def _bounds_help(metadata: Mapping[str, Any]) -> str:
    if metadata["one_of"]:
        return f"one of {', '.join(map(str, metadata['one_of']))}"
    if metadata["list_of"]:
        return f"several of {', '.join(metadata['list_of'])}, with commas between"
    low = {None: "", POSITIVE: "above 0"}.get(metadata["low"], f"at least {metadata['low']}")
    high = "" if metadata["high"] in (None, MAX_INT) else f"at most {metadata['high']}"
    return ", ".join(filter(None, (low, high)))


def field_names(section: str) -> list[str]:
    """The fields of a section."""
    return [field.name for field in dataclasses.fields(SECTIONS[section])]
