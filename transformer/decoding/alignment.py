"""Which source words a translation comes from, read off the decoder's attention to the source.

Source and translation are run through the model once more, teacher-forced, so that decoding is neither
slowed nor changed by it, and any translation can be aligned, whoever made it. Words are what spaces
separate, in both languages.

L layers, H heads, T target tokens, S source tokens; EOS is the last token of both.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from transformer.config import DecodeConfig
from transformer.data.batching import PAD_EXAMPLE, Batch, JaggedArray, eval_batches, make_batch, select_rows
from transformer.data.tokenizer import Tokenizer, truncate
from transformer.decoding.decode import batch_rows
from transformer.distributed import sharding
from transformer.models.registry import ModelDef, Params
from transformer.runtime.errors import UserError

Alignment = list[tuple[int, int]]
MAX_CELLS = 1 << 16  # of one head's weights over all rows of a batch, so that long sentences fit in memory


class Attention(NamedTuple):
    """How the decoder weighs a source while it predicts each token of its translation.

    Attributes:
      weights_LHTS: float32; each row of it sums to 1.
      source, target: the ids of the S and T tokens.
    """

    weights_LHTS: np.ndarray
    source: np.ndarray
    target: np.ndarray


class Aligner:
    """Reads the attention of one model with any params of its shape; each shape is compiled once.

    Args:
      layer: of the decoder, counted from 1, which alignments come from. Default: `default_layer`.

    Raises:
      UserError: the model has no such layer.
    """

    def __init__(
        self,
        model: ModelDef,
        tokenizer: Tokenizer,
        num_layers: int,
        config: DecodeConfig,
        mesh: jax.sharding.Mesh,
        layer: int | None = None,
    ):
        self.layer = default_layer(num_layers) if layer is None else layer
        if not 1 <= self.layer <= num_layers:
            raise UserError(f"expected an alignment layer from 1 to {num_layers}, got {layer}")
        self._tokenizer, self._config, self._mesh = tokenizer, config, mesh

        def weights(params: Params, batch: Batch) -> jax.Array:
            return model.bind(params).cross_attention(batch.source_BS, batch.target_BT)

        self._weights = sharding.data_parallel_jit(mesh, weights)

    def attention(
        self, params: Params, sources: Sequence[str], translations: Sequence[str]
    ) -> Iterator[tuple[int, Attention]]:
        """The place and attention of each pair of which neither side is blank, in the order of the batches.

        What decoding cuts of a long source is cut here too.
        """
        params = sharding.replicate(self._mesh, params)
        filled = [i for i, pair in enumerate(zip(sources, translations, strict=True)) if all(map(str.strip, pair))]
        longest = self._config.max_source_tokens
        source = self._encode([sources[i] for i in filled], longest)
        target = self._encode([translations[i] for i in filled], longest + self._config.max_extra_length)
        for planned in eval_batches(source.lengths, target.lengths, self._rows):
            batch = make_batch(planned, source, target)
            numbers = sharding.local_row_indices(self._mesh, len(planned.examples_B), rows="decode_batch")
            here = make_batch(select_rows(planned, numbers), source, target)
            placed = sharding.shard_batch(self._mesh, here, rows="decode_batch")
            found_BLHTS = jax.device_get(self._weights(params, placed))
            for row, example in enumerate(planned.examples_B[planned.examples_B != PAD_EXAMPLE]):
                S, T = source.lengths[example], target.lengths[example]
                ids = batch.source_BS[row, :S], batch.target_BT[row, :T]
                yield filled[example], Attention(found_BLHTS[row, :, :, :T, :S], *ids)

    def align(self, params: Params, sources: Sequence[str], translations: Sequence[str]) -> list[Alignment]:
        """For each pair, (source word, target word), counted from 0; a blank side has no links."""
        links: list[Alignment] = [[] for _ in sources]
        for place, attention in self.attention(params, sources, translations):
            links[place] = self.word_alignment(attention)
        return links

    def word_alignment(self, attention: Attention) -> Alignment:
        """Each target word with the source word that it attends to most.

        Weights are averaged over the heads of the layer and over the pieces of a target word, and
        summed over those of a source word.
        """
        weights_TS = attention.weights_LHTS[self.layer - 1].mean(0)
        source_words = np.array(self._tokenizer.word_ids(attention.source.tolist()))
        target_words = np.array(self._tokenizer.word_ids(attention.target.tolist()))
        if source_words.max() < 0 or target_words.max() < 0:  # of a line that the tokenizer takes for spaces alone
            return []
        onto_SW = source_words[:, None] == np.arange(source_words.max() + 1)
        from_WT = np.arange(target_words.max() + 1)[:, None] == target_words
        words_WW = from_WT.astype(np.float32) @ weights_TS @ onto_SW.astype(np.float32)
        return sorted((int(best), word) for word, best in enumerate(words_WW.argmax(1)))

    def _encode(self, lines: Sequence[str], longest: int) -> JaggedArray:
        return JaggedArray.from_sequences([truncate(ids, longest) for ids in self._tokenizer.encode(lines)])

    def _rows(self, width: int) -> int:
        fitting = sharding.padded_batch_size(self._mesh, max(MAX_CELLS // width**2, 1), rows="decode_batch")
        return min(batch_rows(self._config, self._mesh), fitting)


def default_layer(num_layers: int) -> int:
    """The decoder layer, counted from 1, whose attention averaged over heads aligns best.

    Of six layers that is the last but one (Garg et al. 2019, section 4.1). Of up to three it is the last: in a model of
    two, the first layer's attention is noise.
    """
    return num_layers if num_layers <= 3 else num_layers - 1


def to_pharaoh(links: Alignment) -> str:
    """`0-0 1-2`: source word, hyphen, target word."""
    return " ".join(f"{source}-{target}" for source, target in links)
