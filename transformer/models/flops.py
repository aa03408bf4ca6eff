"""Analytic FLOPs of a training step, and the accumulated cost of a run.

Counts matrix products at two FLOPs a multiply-add: projections, attention scores and weighted values, feed-forward,
output logits. The backward pass costs twice the forward pass, so training costs three times. Padding and masked
positions count, because the hardware computes them. Not counted: softmax, norms, activations, rotation, dropout,
embedding lookup, loss, optimizer and rematerialization; blocks that blockwise attention skips are not subtracted. The
paper's Table 2 estimates another figure: time x GPUs x the sustained FLOPs of a GPU.

S source length, T target length, D model width, F feed-forward width, L layers, V vocabulary.
"""

from collections.abc import Mapping
from typing import NamedTuple

from transformer.config import ModelConfig
from transformer.data.batching import Batch


def batch_flops(model: ModelConfig, vocab_size: int, batch: Batch, passes: int = 1) -> int:
    """FLOPs of one update, with one or more passes over each row (`TrainConfig.passes`)."""
    rows, source = batch.source_BS.shape
    return training_flops(model, vocab_size, passes * rows, source, batch.target_BT.shape[1])


def training_flops(model: ModelConfig, vocab_size: int, rows: int, source: int, target: int) -> int:
    """FLOPs of forward and backward pass over one batch of `rows` sentence pairs, padded to these lengths."""
    return 3 * forward_flops(model, vocab_size, rows, source, target)


def forward_flops(model: ModelConfig, vocab_size: int, rows: int, source: int, target: int) -> int:
    """FLOPs of encoder, decoder and logits over one batch, the whole target at once."""
    logits = 2 * target * model.emb_dim * vocab_size
    return rows * (LAYER_FLOPS[model.family](model, source, target) + logits)


def _attention_layers(model: ModelConfig, source: int, target: int) -> int:
    """FLOPs of the layers for one sentence pair, as the two functions below."""
    token_feed_forward = 2 * (3 if model.is_gated else 2) * model.emb_dim * model.mlp_dim
    encoder = attention_flops(model, source, source) + source * token_feed_forward
    decoder = attention_flops(model, target, target) + attention_flops(model, target, source)
    decoder += target * token_feed_forward
    return model.num_encoder_layers * encoder + model.num_decoder_layers * decoder


def _recurrent_layers(model: ModelConfig, source: int, target: int) -> int:
    """An LSTM of width w multiplies its input and its previous state by matrices of 4 w columns."""
    D = model.emb_dim
    both_directions = 2 * (D + D // 2) * 4 * (D // 2)
    encoder = both_directions + (model.num_encoder_layers - 1) * (D + D) * 4 * D
    decoder = (D + D) * 4 * D + (model.num_decoder_layers - 1) * (2 * D + D) * 4 * D
    output = 2 * D * D
    return 2 * (source * encoder + target * (decoder + output)) + _cross_attention(model, source, target)


def _convolutional_layers(model: ModelConfig, source: int, target: int) -> int:
    D = model.emb_dim
    token_convolution = 2 * model.kernel_width * D * 2 * D
    decoder = target * (token_convolution + 2 * D * D) + _cross_attention(model, source, target)
    return model.num_encoder_layers * source * token_convolution + model.num_decoder_layers * decoder


def _cross_attention(model: ModelConfig, source: int, target: int) -> int:
    """One head with projections of queries and keys, scores and weighted values."""
    D = model.emb_dim
    return 2 * ((source + target) * D * D + 2 * source * target * D)


LAYER_FLOPS = {"attention": _attention_layers, "recurrent": _recurrent_layers, "convolutional": _convolutional_layers}


def attention_flops(model: ModelConfig, queries: int, keys: int) -> int:
    """FLOPs of one multi-head attention of one sentence, with its four projections."""
    projections = (queries + keys) * model.emb_dim * (model.qkv_dim + model.value_dim)
    scores_and_values = queries * keys * (model.qkv_dim + model.value_dim)
    return 2 * (projections + scores_and_values)


class TrainingCost(NamedTuple):
    """The cost of a run since its first update, across resumes.

    Attributes:
      flops: of training, as counted by `training_flops`.
      tokens, source_tokens: trained on, without padding, once for each epoch.
      seconds: wall-clock time of training, with waiting for batches and compilation, without validation and
        checkpointing. Updates repeated after a kill count once.
    """

    flops: float = 0.0
    tokens: float = 0.0
    source_tokens: float = 0.0
    seconds: float = 0.0

    def metrics(self) -> dict[str, float]:
        """The values as logged and saved with a checkpoint."""
        return {
            "train/flops": self.flops,
            "train/tokens": self.tokens,
            "train/source_tokens": self.source_tokens,
            "train/hours": self.seconds / 3600,
        }

    @classmethod
    def from_metrics(cls, metrics: Mapping[str, float]) -> "TrainingCost | None":
        """Reads the values from saved metrics; None if they are missing."""
        names = cls().metrics()
        if not names.keys() <= metrics.keys():
            return None
        flops, tokens, source_tokens, hours = (metrics[name] for name in names)
        return cls(flops, tokens, source_tokens, 3600 * hours)

    def __str__(self) -> str:
        return f"{format_count(self.tokens)} target tokens, {self.flops:.1e} FLOPs, {self.seconds / 3600:.2f} hours"


def format_count(count: float) -> str:
    """28.8 M for 28,800,000."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f}"
