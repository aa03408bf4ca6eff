"""What all families of models share: ids and positions become states, and states become logits.

A family is a `TextModel` with the methods of `model.Transformer`: `encode` and `decode` all places at once, a call
that does both, `start` and `step` to decode one place at a time, `step_attending` and `cross_attention` to tell
where it looked in the source. Its cache has the methods `reorder` and `grow`.

B batch, S source length, T target length, D model width, N beams, V vocabulary.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from transformer.attention.dropout import dropout
from transformer.config import ModelConfig
from transformer.data.tokenizer import BOS, EOS, PAD
from transformer.distributed import sharding
from transformer.models.layers import STATES, Embedding, make_param, sinusoids, split_key, use


def segments(ids_BT: Array) -> Array:
    """The number of the sentence that each token belongs to, from 1, and 0 for padding: int32 [B, T]."""
    ends_BT = (ids_BT == EOS).astype(jnp.int32)
    return jnp.where(ids_BT == PAD, 0, jnp.cumsum(ends_BT, axis=1) - ends_BT + 1)


def positions(segments_BT: Array) -> Array:
    """The place of each token within its sentence, from 0: int32 [B, T]."""
    here_BT = jax.lax.broadcasted_iota(jnp.int32, segments_BT.shape, 1)
    before_BT = jnp.pad(segments_BT[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    starts_BT = jnp.where(segments_BT != before_BT, here_BT, 0)
    return here_BT - jax.lax.cummax(starts_BT, axis=1)


def shift_right(target_BT: Array) -> Array:
    """The decoder's input: every sentence begins with BOS and lacks its end."""
    before_BT = jnp.pad(target_BT[:, :-1], ((0, 0), (1, 0)), constant_values=EOS)
    return jnp.where(before_BT == EOS, BOS, before_BT)


Key = Array | None

Cache = Any
"""Any pytree of arrays: what the step function remembers of each hypothesis."""


class TextModel(nnx.Module):
    """Embeddings and positions.

    `share_embeddings` uses one matrix for source, target and output (paper, 3.4); otherwise there
    are three. Sequences of ids end in EOS and are padded with PAD; the decoder's input is the target
    shifted right by BOS.
    """

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

        Without `key` there is no dropout. `packed` rows hold several sentences, which do not see each other.
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
        """Logits float32 [B, T, V] of all places of the target at once, each given the tokens before it."""
        raise NotImplementedError

    def cross_attention(self, source_BS: Array, target_BT: Array) -> Array:
        """How the decoder weighs the source where it predicts each target token, teacher-forced.

        Returns:
          float32 [B, L, H, T, S], of the layers and heads that look at the source; rows of padding mean nothing.
        """
        raise NotImplementedError

    def start(self, source_BS: Array, beams: int, max_length: int, room: int | None = None) -> tuple[Any, Any]:
        """What decoding step by step needs: the source as the decoder sees it, and an empty cache of all beams.

        Args:
          room: places that a cache whose size depends on the length has before it grows; None: max_length.
        """
        raise NotImplementedError

    def advance(
        self, memory: Any, cache: Any, inputs_BN: Array, position: Array, attending: bool
    ) -> tuple[Array, Any, Any]:
        """One position of every beam: logits, cache and, if `attending`, attention, as the two methods below."""
        raise NotImplementedError

    def step(self, memory: Any, cache: Any, inputs_BN: Array, position: Array) -> tuple[Array, Any]:
        """One position of every beam: logits float32 [B, N, V], and the cache with it written."""
        logits_BNV, cache, _ = self.advance(memory, cache, inputs_BN, position, False)
        return logits_BNV, cache

    def step_attending(self, memory: Any, cache: Any, inputs_BN: Array, position: Array) -> tuple[Array, Any, Array]:
        """As `step`, and the last layer's attention to the source, the mean over heads: float32 [B, N, S], of sum 1."""
        return self.advance(memory, cache, inputs_BN, position, True)

    def _layer_keys(self, key: Key) -> tuple[Key, Key]:
        """Dropout's keys for each layer, and for the embeddings."""
        if key is None:
            return None, None
        keys = jax.random.split(key, self.config.num_layers + 1)
        return keys[:-1], keys[-1]

    def _table(self, name: str) -> Embedding:
        return self.embeddings["shared" if self.config.share_embeddings else name]

    def _positions(self, side: str, length: int, places_BT: Array | None = None) -> Array:
        """Encodings of places 0 … length - 1, or of given ones: float32 [1 or B, length, D]."""
        if self.config.positions == "sinusoidal":
            table_TD = jnp.asarray(sinusoids(length, self.config.emb_dim))
        else:
            table = self.source_positions if side == "source" else self.target_positions
            # Beyond the table there is padding only: the config sees to it that every sentence fits.
            rows = jnp.minimum(jnp.arange(length), table.shape[0] - 1)
            table_TD = use(table)[rows]
        return table_TD[None] if places_BT is None else jnp.take(table_TD, places_BT, axis=0)

    def _embed(self, side: str, ids: Array, positions: Array | None, key: Key) -> Array:
        x = self._table(side)(ids, self.dtype)
        if positions is not None:
            # In float32, as is then the sum over rows that is the gradient of learned positions.
            x = (x.astype(jnp.float32) + positions).astype(self.dtype)
        return dropout(sharding.with_logical_constraint(x, STATES), self.config.dropout_rate, key)

    def _logits(self, x: Array) -> Array:
        return self._table("output").logits(x)


def take_beams(values: jax.Array, beams: jax.Array) -> jax.Array:
    """values [B, M, ...], beams int32 [B, N] within 0..M-1 → [B, N, ...]; batched, so a sharded B stays put."""
    indices = beams.reshape(beams.shape + (1,) * (values.ndim - 2))
    return jnp.take_along_axis(values, indices, axis=1, mode="promise_in_bounds")


def move_beams(cache: Cache, parents_BN: jax.Array) -> Cache:
    """Each leaf [B, N, ...] with the beams that `parents_BN`, int32 [B, N], names."""
    return jax.tree.map(lambda leaf: take_beams(leaf, parents_BN), cache)
