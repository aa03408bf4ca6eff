"""What training costs, by arithmetic alone: FLOPs of a batch shape, and what a run has spent so far.

Counted are the matrix products, two FLOPs a multiply-add: projections, attention scores and weighted
values, feed-forward, output logits. Their backward pass multiplies twice as much, once for the gradient
of either factor, so training is three times the forward pass. Padding, and what a causal mask hides,
count like anything else: the hardware computes them. Not counted: softmax, LayerNorm, activations,
dropout, embedding lookup, loss, optimizer, and what is computed again, as attention by blocks does in its
backward pass; that it leaves out hidden blocks is not taken off either. The paper's Table 2 has another
figure: time x GPUs x what such a GPU can sustain, whether it was used or not.

S source length, T target length, D model width, F feed-forward width, L layers, V vocabulary.
"""

from collections.abc import Mapping
from typing import NamedTuple

from transformer.config import ModelConfig
from transformer.data.batching import Batch


def batch_flops(model: ModelConfig, vocab_size: int, batch: Batch) -> int:
    """FLOPs of an update by one batch."""
    rows, source = batch.source_BS.shape
    return training_flops(model, vocab_size, rows, source, batch.target_BT.shape[1])


def training_flops(model: ModelConfig, vocab_size: int, rows: int, source: int, target: int) -> int:
    """FLOPs of forward and backward pass over one batch of `rows` sentence pairs, padded to these lengths."""
    return 3 * forward_flops(model, vocab_size, rows, source, target)


def forward_flops(model: ModelConfig, vocab_size: int, rows: int, source: int, target: int) -> int:
    """FLOPs of encoder, decoder and logits over one batch, the whole target at once."""
    logits = 2 * target * model.emb_dim * vocab_size
    return rows * (LAYERS[model.family](model, source, target) + logits)


def _attention_layers(model: ModelConfig, source: int, target: int) -> int:
    """Of one sentence pair, as the two functions below."""
    attention = (
        attention_flops(model, source, source)
        + attention_flops(model, target, target)
        + attention_flops(model, target, source)
    )
    feed_forward = 2 * 2 * (source + target) * model.emb_dim * model.mlp_dim
    return model.num_layers * (attention + feed_forward)


def _recurrent_layers(model: ModelConfig, source: int, target: int) -> int:
    """An LSTM of width w multiplies each of its inputs and the state before by 4 w."""
    D, above = model.emb_dim, model.num_layers - 1
    both_directions = 2 * (D + D // 2) * 4 * (D // 2)
    encoder = both_directions + above * (D + D) * 4 * D
    decoder = (D + D) * 4 * D + above * (2 * D + D) * 4 * D
    output = 2 * D * D
    return 2 * (source * encoder + target * (decoder + output)) + _source_attention(model, source, target)


def _convolutional_layers(model: ModelConfig, source: int, target: int) -> int:
    D = model.emb_dim
    convolution = 2 * (source + target) * model.kernel_width * D * 2 * D
    output = 2 * target * D * D
    return model.num_layers * (convolution + output + _source_attention(model, source, target))


def _source_attention(model: ModelConfig, source: int, target: int) -> int:
    """One head with projections of queries and keys, scores and weighted values."""
    D = model.emb_dim
    return 2 * ((source + target) * D * D + 2 * source * target * D)


LAYERS = {"attention": _attention_layers, "recurrent": _recurrent_layers, "convolutional": _convolutional_layers}


def attention_flops(model: ModelConfig, queries: int, keys: int) -> int:
    """FLOPs of one multi-head attention of one sentence, with its four projections."""
    projections = (queries + keys) * model.emb_dim * (model.qkv_dim + model.value_dim)
    scores_and_values = queries * keys * (model.qkv_dim + model.value_dim)
    return 2 * (projections + scores_and_values)


class Spent(NamedTuple):
    """What a run has cost since its first update, over all its sittings.

    Attributes:
      flops: of training, see above.
      tokens, source_tokens: real ones that were trained on, a sentence once for each epoch.
      seconds: wall-clock time of training with its wait for batches and its compilation, but without
        validation and the writing of checkpoints. Updates that a kill made the run do again count once.
    """

    flops: float = 0.0
    tokens: float = 0.0
    source_tokens: float = 0.0
    seconds: float = 0.0

    def metrics(self) -> dict[str, float]:
        """As it is logged, and saved with a checkpoint."""
        return {
            "train/flops": self.flops,
            "train/tokens": self.tokens,
            "train/source_tokens": self.source_tokens,
            "train/hours": self.seconds / 3600,
        }

    @classmethod
    def of(cls, metrics: Mapping[str, float]) -> "Spent | None":
        """As it was saved; None where it was not."""
        names = cls().metrics()
        if not names.keys() <= metrics.keys():
            return None
        flops, tokens, source_tokens, hours = (metrics[name] for name in names)
        return cls(flops, tokens, source_tokens, 3600 * hours)

    def __str__(self) -> str:
        return f"{_short(self.tokens)} target tokens, {self.flops:.1e} FLOPs, {self.seconds / 3600:.2f} hours"


def _short(count: float) -> str:
    """28.8 M for 28,800,000."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f}"
