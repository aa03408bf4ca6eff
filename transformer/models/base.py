"""The base class of all architectures: embeddings, positions, logits; segment ids and the reordering of beams.

An architecture is a `Seq2SeqModel` that overrides the methods below without a body of their own; its cache has the
methods `reorder` and `resize`. docs/extending.md names the other places that know architectures.

B batch, S source length, T target length, D model width, N beams, V vocabulary, H heads, L layers.

Names of params in a model's attributes are part of the checkpoint format: renaming one breaks old checkpoints.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from transformer.attention.dropout import dropout, token_keep_mask
from transformer.config import ModelConfig
from transformer.data.tokenizer import BOS, EOS, PAD
from transformer.distributed import sharding
from transformer.models.layers import Embedding, sinusoidal_position_encoding
from transformer.models.params import Key, make_param, read_param, split_key


def segment_ids(ids_BT: Array) -> Array:
    """Numbers the sentences of a packed row from 1; 0 is padding: int32 [B, T].

    ids [7, EOS, 8, 9, EOS, PAD] → [1, 1, 2, 2, 2, 0].
    """
    ends_BT = (ids_BT == EOS).astype(jnp.int32)
    return jnp.where(ids_BT == PAD, 0, jnp.cumsum(ends_BT, axis=1) - ends_BT + 1)


def position_ids(segment_ids_BT: Array) -> Array:
    """Positions of tokens within their sentences, from 0: int32 [B, T].

    segment ids [1, 1, 2, 2, 2, 0] → [0, 1, 0, 1, 2, 0].
    """
    index_BT = jax.lax.broadcasted_iota(jnp.int32, segment_ids_BT.shape, 1)
    previous_BT = jnp.pad(segment_ids_BT[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    starts_BT = jnp.where(segment_ids_BT != previous_BT, index_BT, 0)
    return index_BT - jax.lax.cummax(starts_BT, axis=1)


def shift_right(target_BT: Array) -> Array:
    """The decoder's input: each sentence with BOS in front and without EOS.

    ids [7, EOS, 8, 9, EOS] → [BOS, 7, BOS, 8, 9].
    """
    previous_BT = jnp.pad(target_BT[:, :-1], ((0, 0), (1, 0)), constant_values=EOS)
    return jnp.where(previous_BT == EOS, BOS, previous_BT)


CUT = -1
"""The id of a token that is cut off: its embedding is zero, its position encoding is not (see `cut_tokens`)."""


def cut_tokens(ids_BT: Array, rate: float, key: Array, num_tags: int = 0) -> Array:
    """Replaces each token but EOS, padding and the first `num_tags` of a row by CUT with probability `rate`.

    The decoder's input of such a target has the same tokens cut off, and never BOS, which `shift_right` makes of EOS.
    """
    is_tag_BT = jax.lax.broadcasted_iota(jnp.int32, ids_BT.shape, 1) < num_tags
    keep_BT = token_keep_mask(key, rate, *ids_BT.shape) | (ids_BT == EOS) | (ids_BT == PAD) | is_tag_BT
    return jnp.where(keep_BT, ids_BT, CUT)


Cache = Any
"""Any pytree of arrays: the decoder's state of each hypothesis."""


class Seq2SeqModel(nnx.Module):
    """Embeddings, positions and logits of an encoder–decoder model.

    `share_embeddings` uses one matrix for source, target and output (paper, 3.4); otherwise there
    are three. Sequences of ids end in EOS and are padded with PAD; the decoder's input is the target
    shifted right by BOS.

    Attributes:
      has_cut_tokens: whether ids may be CUT; static, so that without them nothing is compiled for it.
      attends_across_beams: whether hypotheses read the caches of all beams of their sentence, each its own history
        in them, or the cache of their own beam alone; static.
    """

    has_cut_tokens: bool = False
    attends_across_beams: bool = True

    def __init__(self, config: ModelConfig, vocab_size: int, rngs: nnx.Rngs):
        self.config, self.vocab_size = config, vocab_size
        self.dtype = jnp.dtype(config.dtype)
        tables = ["shared"] if config.share_embeddings else ["source", "target", "output"]
        self.embeddings = nnx.Dict({name: Embedding(vocab_size, config.emb_dim, rngs) for name in tables})
        if config.positions == "learned":
            shape, init = (config.max_positions, config.emb_dim), jax.nn.initializers.normal(config.emb_dim**-0.5)
            self.source_positions = make_param(rngs, init, shape, ("positions", "embed"))
            self.target_positions = make_param(rngs, init, shape, ("positions", "embed"))

    def __call__(self, source_BS: Array, target_BT: Array, key: Key = None, packed: bool = False) -> Array:
        """Teacher forcing: logits float32 [B, T, V] of each target token given those before it.

        Without `key` there is no dropout. `packed` rows hold several sentences, which do not attend to each other.
        """
        encoder_key, decoder_key = split_key(key, 2)
        encoded_BSD = self.encode(source_BS, encoder_key, packed)
        return self.decode(encoded_BSD, source_BS, target_BT, decoder_key, packed)

    def encode(self, source_BS: Array, key: Key = None, packed: bool = False) -> Array:
        """Ids int32 [B, S] → states [B, S, D] in the compute dtype; those at padding must not be used."""
        raise NotImplementedError

    def decode(
        self, encoded_BSD: Array, source_BS: Array, target_BT: Array, key: Key = None, packed: bool = False
    ) -> Array:
        """Logits float32 [B, T, V] of all target positions at once, each given the tokens before it."""
        raise NotImplementedError

    def cross_attention(self, source_BS: Array, target_BT: Array) -> Array:
        """Cross-attention weights where each target token is predicted, teacher-forced.

        Returns:
          float32 [B, L, H, T, S] of all layers and heads with cross-attention; rows of padding are meaningless.
        """
        raise NotImplementedError

    def self_attention(self, source_BS: Array, target_BT: Array) -> tuple[Array, Array] | None:
        """Self-attention weights of encoder and decoder, teacher-forced; None if the architecture has none.

        Returns:
          float32 [B, L, H, S, S] and [B, L, H, T, T]; rows of padding are meaningless.
        """
        return None

    def init_decode(
        self, source_BS: Array, beams: int, max_length: int, cache_length: int | None = None
    ) -> tuple[Any, Any]:
        """Encodes the source for `decode_step` and makes an empty cache of all beams.

        Args:
          cache_length: positions that the cache holds before it is resized, where it depends on the length at all;
            None: max_length.
        """
        raise NotImplementedError

    def decode_step(
        self, source: Any, cache: Any, inputs_BN: Array, position: Array, return_attention: bool = False
    ) -> tuple[Array, Any, Array | None]:
        """Decodes one position of every beam.

        Returns:
          Logits float32 [B, N, V]; the updated cache; with `return_attention` the cross-attention of the last layer,
          the mean over heads, float32 [B, N, S] of sum 1.
        """
        raise NotImplementedError

    def _embedding(self, name: str) -> Embedding:
        return self.embeddings["shared" if self.config.share_embeddings else name]

    def _position_encodings(self, side: str, length: int, position_ids_BT: Array | None = None) -> Array:
        """Position encodings of 0 … length - 1, or of given positions below it: float32 [1, length, D] or [B, T, D]."""
        positions = self.config.positions
        if positions == "sinusoidal":
            table_TD = jnp.asarray(sinusoidal_position_encoding(length, self.config.emb_dim))
        elif positions == "learned":
            table = self.source_positions if side == "source" else self.target_positions
            # Beyond the table there is only padding: config validation ensures that every sentence fits.
            rows = jnp.minimum(jnp.arange(length), table.shape[0] - 1)
            table_TD = read_param(table)[rows]
        else:
            raise ValueError(f"model.positions = {positions}: not added to embeddings")
        return table_TD[None] if position_ids_BT is None else jnp.take(table_TD, position_ids_BT, axis=0)

    def _embed(self, side: str, ids: Array, positions: Array | None, key: Key) -> Array:
        if self.has_cut_tokens:
            x = self._embedding(side)(jnp.maximum(ids, 0), self.dtype)
            x = jnp.where((ids == CUT)[..., None], jnp.zeros((), self.dtype), x)
        else:
            x = self._embedding(side)(ids, self.dtype)
        if positions is not None:
            # In float32, and so is the gradient of learned positions, a sum over rows.
            x = (x.astype(jnp.float32) + positions).astype(self.dtype)
        return dropout(sharding.with_logical_constraint(x, sharding.ACTIVATION_AXES), self.config.dropout_rate, key)

    def _logits(self, x: Array) -> Array:
        return self._embedding("output").logits(x)


def gather_beams(values: jax.Array, beams: jax.Array) -> jax.Array:
    """values [B, M, ...] of M beams, beams int32 [B, N] in 0 … M - 1 → [B, N, ...]; batched: B stays sharded."""
    indices = beams.reshape(beams.shape + (1,) * (values.ndim - 2))
    return jnp.take_along_axis(values, indices, axis=1, mode="promise_in_bounds")


class FixedSizeCache(NamedTuple):
    """What each decoder layer keeps of each beam, arrays [B, N, ...] whose size does not depend on the length."""

    layers: list[Any]

    def reorder(self, parents_BN: Array) -> "FixedSizeCache":
        """Moves hypotheses, with what is kept of them, from beams `parents_BN`, int32 [B, N]."""
        return reorder_beams(self, parents_BN)

    def resize(self, cache_length: int) -> "FixedSizeCache":
        """Returns the cache unchanged."""
        return self


def reorder_beams(cache: Cache, parents_BN: jax.Array) -> Cache:
    """Replaces beam n of each leaf [B, N, ...] by beam `parents_BN[:, n]`, int32 [B, N]."""
    return jax.tree.map(lambda leaf: gather_beams(leaf, parents_BN), cache)
