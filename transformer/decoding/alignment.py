"""Word alignments from cross-attention.

Source and translation are run through the model once more, teacher-forced: decoding is neither slowed nor changed, and
a translation from any system can be aligned. Words are separated by spaces, in both languages.

L layers, H heads, T target tokens, S source tokens; EOS is the last token of both.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from transformer.config import DecodeConfig
from transformer.data.batching import Batch
from transformer.data.tokenizer import Tokenizer
from transformer.decoding.decode import batch_rows
from transformer.decoding.teacher_forcing import map_pairs
from transformer.distributed import sharding
from transformer.models.registry import ModelDef, Params
from transformer.runtime.errors import UserError

Alignment = list[tuple[int, int]]
"""Pairs (source word, target word), counted from 0, sorted."""

MAX_CELLS = 1 << 16  # attention weights of one head over the rows of a device, so that long sentences fit in memory


class Attention(NamedTuple):
    """Attention weights of one sentence pair, float32; each row sums to 1.

    Attributes:
      weights_LHTS: of cross-attention.
      source, target: the ids of the S and T tokens.
      encoder_LHSS, decoder_LHTT: of self-attention; None if it was not asked for or the architecture has none.
    """

    weights_LHTS: np.ndarray
    source: np.ndarray
    target: np.ndarray
    encoder_LHSS: np.ndarray | None = None
    decoder_LHTT: np.ndarray | None = None


class Aligner:
    """Computes cross-attention and alignments of one model with any params of its shape; each shape is compiled once.

    Args:
      layer: decoder layer of alignments, counted from 1; default: `default_layer`.
      self_attention: whether self-attention is returned too.

    Raises:
      UserError: the model has no such layer.
    """

    def __init__(
        self,
        model: ModelDef,
        tokenizer: Tokenizer,
        config: DecodeConfig,
        mesh: jax.sharding.Mesh,
        layer: int | None = None,
        self_attention: bool = False,
    ):
        num_layers = model.config.num_cross_attention_layers
        self.layer = default_layer(num_layers) if layer is None else layer
        if not 1 <= self.layer <= num_layers:
            raise UserError(f"expected an alignment layer from 1 to {num_layers}, got {layer}")
        self._tokenizer, self._config, self._mesh = tokenizer, config, mesh

        def weights(params: Params, batch: Batch) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
            module, ids = model.bind(params), (batch.source_BS, batch.target_BT)
            return module.cross_attention(*ids), module.self_attention(*ids) if self_attention else None

        self._weights = sharding.data_parallel_jit(mesh, weights)

    def attention(
        self, params: Params, sources: Sequence[str], translations: Sequence[str], tag: str = ""
    ) -> Iterator[tuple[int, Attention]]:
        """Yields the index and attention of each pair without a blank side, in the order of the batches.

        Long sources are truncated as in decoding; `tag`, of the target language, is put before each.
        """
        indices = [i for i, pair in enumerate(zip(sources, translations, strict=True)) if all(map(str.strip, pair))]
        encode, config = self._tokenizer.encode_truncated, self._config
        source, _ = encode([sources[i] for i in indices], config.max_source_tokens, tag)
        target, _ = encode([translations[i] for i in indices], config.max_target_tokens)

        def rows_of(width: int) -> int:
            return batch_rows(self._config, self._mesh, MAX_CELLS * self._mesh.size // width**2)

        for i, (weights_LHTS, of_self) in map_pairs(self._weights, self._mesh, params, source, target, rows_of):
            S, T = len(source[i]), len(target[i])
            own = (of_self[0][:, :, :S, :S], of_self[1][:, :, :T, :T]) if of_self else (None, None)
            yield indices[i], Attention(weights_LHTS[:, :, :T, :S], source[i], target[i], *own)

    def word_alignment(self, attention: Attention) -> Alignment:
        """Pairs each target word with the source word that it attends to most.

        Weights are averaged over the heads of the layer, summed over the subwords of a source word and of a target
        word; a sum over target subwords has the same maximum as their mean.
        """
        weights_TS = attention.weights_LHTS[self.layer - 1].mean(0)
        source_words = np.array(self._tokenizer.word_ids(attention.source.tolist()))
        target_words = np.array(self._tokenizer.word_ids(attention.target.tolist()))
        if source_words.max() < 0 or target_words.max() < 0:  # the tokenizer normalizes the line to spaces
            return []
        is_source_word_SW = source_words[:, None] == np.arange(source_words.max() + 1)
        is_target_word_WT = np.arange(target_words.max() + 1)[:, None] == target_words
        words_WW = is_target_word_WT.astype(np.float32) @ weights_TS @ is_source_word_SW.astype(np.float32)
        return sorted((int(source), target) for target, source in enumerate(words_WW.argmax(1)))


def default_layer(num_layers: int) -> int:
    """The decoder layer, counted from 1, whose attention, averaged over heads, aligns best.

    The penultimate one of six (Garg et al. 2019, section 4.1); the last one of up to three, because the first layer of
    two attends to noise.
    """
    return num_layers if num_layers <= 3 else num_layers - 1


def to_pharaoh(alignment: Alignment) -> str:
    """`0-0 1-2`: source word, hyphen, target word."""
    return " ".join(f"{source}-{target}" for source, target in alignment)
